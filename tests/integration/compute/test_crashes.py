"""The service killed at named places: what was acknowledged stays, what was not is finished or undone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from google.longrunning import operations_pb2
from google.protobuf.message import Message

from tests.integration.compute.rig import (
    NODE,
    PARENT,
    Client,
    Process,
    Refused,
    Service,
    State,
    metadata,
    name,
    service,
)
from virtfleet.compute.v1 import domain_pb2, domain_spec_pb2
from virtfleet.type.v1 import resource_pb2

GUEST_MEMORY = 5
"""Where a line of the driver's file says how many bytes of memory a guest has."""


@pytest.fixture
async def process(place: Path) -> AsyncIterator[Process]:
    made = Process(place)
    try:
        yield made
    finally:
        await made.kill()


async def cut(process: Process, client: Client, work: object) -> None:
    """Make a call in which the process dies."""
    with pytest.raises(grpc.aio.AioRpcError):
        await work  # type: ignore[misc]  # any awaitable
    await process.died()
    await client.close()


async def operations(client: Client) -> list[operations_pb2.Operation]:
    request = operations_pb2.ListOperationsRequest(name=f"nodes/{NODE}/services/compute")
    answer = await client.call(client.operations.ListOperations, request)
    return list(answer.operations)


def running(place: Path) -> set[str]:
    """Read from outside which guests the driver has."""
    active: dict[str, bool] = {}
    path = place / "guests"
    for line in path.read_text().splitlines() if path.exists() else ():
        uid, *rest = json.loads(line)
        active[uid] = bool(rest) and rest[0] not in (State.DOMAIN_STATE_SHUT_OFF, State.DOMAIN_STATE_CRASHED)
    return {uid for uid, is_active in active.items() if is_active}


@pytest.mark.parametrize(
    ("failpoint", "runs"),
    [("compute.start.intent", False), ("compute.start.connected", False), ("compute.start.started", True)],
)
async def test_a_start_that_is_cut(process: Process, place: Path, failpoint: str, *, runs: bool) -> None:
    client = await process.start(failpoint)
    domain = await client.create("web")
    await cut(process, client, client.start("web"))
    client = await process.start()
    after = await client.get("web")
    assert after.status.active == runs
    assert running(place) == ({domain.uid} if runs else set())
    for operation in await operations(client):
        assert operation.done
    failed = [operation for operation in await operations(client) if operation.HasField("error")]
    assert [Refused(operation.error).reason for operation in failed] == ([] if runs else ["CHANGE_ROLLED_BACK"])
    await client.start("web")
    await client.stop("web")
    assert running(place) == set()
    await client.close()


@pytest.mark.parametrize("failpoint", ["compute.create.intent", "compute.start.started", "compute.create.made"])
async def test_a_creation_that_is_cut(process: Process, place: Path, failpoint: str) -> None:
    spec = domain_spec_pb2.DomainSpec()
    spec.interfaces["net0"].mac_address = "52:54:00:00:00:01"
    client = await process.start(failpoint)
    await cut(process, client, client.create("web", spec=spec, start=True))
    client = await process.start()
    assert not (await client.list()).domains
    assert running(place) == set()
    assert all(operation.done for operation in await operations(client))
    await client.create("web", spec=spec, start=True)
    await client.close()


def memory(place: Path, uid: str) -> int:
    """Read from outside how much memory a guest of the driver has."""
    lines = [json.loads(line) for line in (place / "guests").read_text().splitlines()]
    *_, last = (line for line in lines if line[0] == uid)
    return int(last[GUEST_MEMORY])


async def test_a_change_of_a_running_guest_that_is_cut_is_undone(process: Process, place: Path) -> None:
    """The guest had changed, and nothing is recorded of it: it gets back what is."""
    spec = domain_spec_pb2.DomainSpec()
    spec.memory.current_bytes, spec.memory.maximum_bytes = 1 << 30, 2 << 30
    client = await process.start("compute.update.live")
    before = await client.create("web", spec=spec, start=True)
    wanted = domain_pb2.Domain(name=name("web"))
    wanted.spec.memory.current_bytes = 1 << 29
    # The MAC of a card that waits for the next start is taken from the change on.
    wanted.spec.interfaces["net9"].mac_address = "52:54:00:00:00:09"
    await cut(process, client, client.update(wanted, "spec.memory.current_bytes", "spec.interfaces.net9"))
    assert memory(place, before.uid) == 1 << 29, "the effect was there"
    client = await process.start()
    after = await client.get("web")
    assert (after.generation, after.spec) == (before.generation, before.spec)
    assert after.status.active_spec == before.status.active_spec
    assert memory(place, before.uid) == 1 << 30, "what is recorded is what the guest has"
    [failed] = [one for one in await operations(client) if one.HasField("error")]
    assert Refused(failed.error).reason == "CHANGE_ROLLED_BACK"
    other = domain_spec_pb2.DomainSpec()
    other.interfaces["net0"].mac_address = "52:54:00:00:00:09"
    await client.create("other", spec=other)
    del wanted.spec.interfaces["net9"]
    assert (await client.update(wanted, "spec.memory.current_bytes")).generation == before.generation + 1
    assert memory(place, before.uid) == 1 << 29
    await client.close()


@pytest.mark.parametrize("verb", ["Reboot", "Reset", "Suspend", "Resume"])
async def test_a_verb_that_is_cut_tells_what_is(process: Process, place: Path, verb: str) -> None:
    client = await process.start("operations.worked:2" if verb != "Resume" else "operations.worked:3")
    domain = await client.create("web", start=True)
    if verb == "Resume":
        await client.verb("Suspend", "web")
    await cut(process, client, client.verb(verb, "web"))
    client = await process.start()
    assert running(place) == {domain.uid}
    after = await client.get("web")
    assert after.status.runtime_id == domain.status.runtime_id
    [last] = [one for one in await operations(client) if _method(one).endswith(f".{verb}Domain")][-1:]
    assert last.done
    if verb in ("Suspend", "Resume"):
        # What came out can be seen, and stands.
        assert not last.HasField("error"), last
        assert after.status.state == (State.DOMAIN_STATE_PAUSED if verb == "Suspend" else State.DOMAIN_STATE_RUNNING)
    else:
        # Whether the guest has booted again cannot be seen: nobody claims that it has not.
        assert Refused(last.error).reason == "HYPERVISOR_FAILED"
        assert "not known" in last.error.message
    await client.close()


@pytest.mark.parametrize("failpoint", ["compute.reconcile.compared", "operations.recorded"])
async def test_a_death_on_the_way_back_costs_nothing(process: Process, place: Path, failpoint: str) -> None:
    """The service dies again while it holds what it had recorded against what runs, or right behind a commit."""
    client = await process.start("operations.worked:3")
    domain = await client.create("web", start=True)
    await client.create("idle")
    await cut(process, client, client.stop("web"))
    if failpoint == "compute.reconcile.compared":
        with pytest.raises((TimeoutError, grpc.aio.AioRpcError)):
            await process.start(failpoint, seconds=3)
        assert await process.died() == -9
        client = await process.start()
    else:
        client = await process.start(failpoint)
        request = domain_pb2.StartDomainRequest(name=name("idle"), request_id="once")
        await cut(process, client, client.call(client.domains.StartDomain, request))
        client = await process.start()
        # It was recorded, and not answered: whoever asks again is told so, and it is not done again.
        run = (await client.get("idle")).status.runtime_id
        assert run
        operation = await client.call(client.domains.StartDomain, request)
        assert operation.done
        assert not operation.HasField("error")
        assert (await client.get("idle")).status.runtime_id == run
        await client.stop("idle")
    assert running(place) == set()
    assert (await client.get("web")).status.state == State.DOMAIN_STATE_SHUT_OFF
    assert all(operation.done for operation in await operations(client))
    assert (await client.start("web")).uid == domain.uid
    await client.close()


@pytest.mark.parametrize("failpoint", ["compute.stop.force", "compute.stop.ended"])
async def test_a_stop_that_is_cut(process: Process, place: Path, failpoint: str) -> None:
    client = await process.start(failpoint)
    await client.create("web", start=True)
    await cut(process, client, client.stop("web"))
    client = await process.start()
    runs = failpoint == "compute.stop.force"
    assert (await client.get("web")).status.active == runs
    assert bool(running(place)) == runs
    assert all(operation.done for operation in await operations(client))
    await client.close()


@pytest.mark.parametrize("failpoint", ["compute.delete.stopped", "compute.delete.undone"])
async def test_a_deletion_that_is_cut_is_finished(process: Process, place: Path, failpoint: str) -> None:
    client = await process.start(failpoint)
    await client.create("web", start=True)
    await cut(process, client, client.delete("web", stop=True))
    client = await process.start()
    assert not (await client.list()).domains
    assert running(place) == set()
    assert not [operation for operation in await operations(client) if operation.HasField("error")]
    await client.close()


async def test_guests_outlive_the_service_and_are_found_again(process: Process, place: Path) -> None:
    client = await process.start()
    domain = await client.create("web", start=True)
    await client.create("idle")
    await client.close()
    await process.kill()
    assert running(place) == {domain.uid}
    client = await process.start()
    after = await client.get("web")
    assert after.status.runtime_id == domain.status.runtime_id
    assert after.status.start_time == domain.status.start_time
    assert after.status.active
    await client.stop("web")
    await client.close()


async def test_a_repeated_request_after_a_crash_is_done_once(process: Process) -> None:
    client = await process.start("compute.start.started")
    await client.create("web")
    request = domain_pb2.StartDomainRequest(name=name("web"), request_id="once")
    await cut(process, client, client.call(client.domains.StartDomain, request))
    client = await process.start()
    run = (await client.get("web")).status.runtime_id
    operation = await client.wait(await client.call(client.domains.StartDomain, request))
    assert not operation.HasField("error")
    assert (await client.get("web")).status.runtime_id == run
    await client.close()


def ids(count: int) -> list[str]:
    return [f"d{number}" for number in range(count)]


def batch_of(verb: str, domains: list[str], **fields: object) -> Message:
    """Return the request of a batch about some domains, and one item that must fail."""
    item = getattr(domain_pb2, f"{verb}DomainRequest")
    several = getattr(domain_pb2, f"Batch{verb}DomainsRequest")
    if verb == "Create":
        return several(parent=PARENT, requests=[item(domain_id=id_, **fields) for id_ in ["taken", *domains]])  # type: ignore[no-any-return]  # a message
    return several(parent=PARENT, requests=[item(name=name(id_), **fields) for id_ in ["missing", *domains]])  # type: ignore[no-any-return]  # a message


@pytest.mark.parametrize(
    ("verb", "failpoint", "fields", "ended"),
    [
        ("Create", "compute.batch.defined", {"domain": domain_pb2.Domain()}, 8),
        (
            "Create",
            "compute.start.started:5",
            {"domain": domain_pb2.Domain(), "start": domain_pb2.StartOptions()},
            None,
        ),
        ("Start", "compute.start.started:5", {}, None),
        ("Stop", "compute.batch.stopped:5", {"mode": domain_pb2.STOP_MODE_FORCE}, None),
        ("Delete", "compute.delete.undone:5", {"stop": True}, None),
    ],
)
async def test_a_batch_that_is_cut_tells_of_each_item(
    process: Process, place: Path, verb: str, failpoint: str, fields: dict[str, object], ended: int | None
) -> None:
    """What is told of an item is what is: read from the driver's file and from the domains."""
    client = await process.start(failpoint)
    await client.create("taken")
    for id_ in ids(8) if verb != "Create" else ():
        await client.create(id_, start=verb in ("Stop", "Delete"))
    request = batch_of(verb, ids(8), **fields)
    await cut(process, client, client.call(getattr(client.domains, f"Batch{verb}Domains"), request))
    client = await process.start()
    settled = [one for one in await operations(client) if one.name and _method(one).endswith(f"Batch{verb}Domains")]
    assert len(settled) == 1
    assert settled[0].done
    assert not settled[0].HasField("error"), settled[0]
    response = getattr(domain_pb2, f"Batch{verb}DomainsResponse")()
    assert settled[0].response.Unpack(response)
    domains = {domain.name: domain for domain in (await client.list()).domains}
    guests = running(place)
    outcomes: dict[str, bool] = {}
    for result in response.results[1:]:
        domain = domains.get(result.name)
        runs = domain is not None and domain.uid in guests
        there = domain is not None
        effect = {"Create": there, "Start": runs, "Stop": there and not runs, "Delete": not there}[verb]
        outcomes[result.name] = effect
        assert result.HasField("status"), result
        if effect:
            assert result.status.code == 0, result
            assert result.HasField("domain") == (verb != "Delete"), result
        else:
            assert Refused(result.status).reason == "CHANGE_ROLLED_BACK", result
    assert list(outcomes) == [name(id_) for id_ in ids(8)]
    if ended is not None:
        assert sum(outcomes.values()) == ended
    first = Refused(response.results[0].status)
    wanted = "RESOURCE_EXISTS" if verb == "Create" else "RESOURCE_NOT_FOUND"
    assert first.reason in (wanted, "CHANGE_ROLLED_BACK"), response.results[0]
    # The same again makes the rest whole.
    again = await client.wait(await client.call(getattr(client.domains, f"Batch{verb}Domains"), request))
    assert not again.HasField("error")
    await client.close()


def _method(operation: operations_pb2.Operation) -> str:
    return metadata(operation).method


async def test_without_a_state_file_guests_end_with_the_process(place: Path) -> None:
    async with service(place) as node:
        await node.create("web", start=True)
        spec = domain_spec_pb2.DomainSpec(lifetime=resource_pb2.LIFETIME_TRANSIENT)
        await node.create("gone", spec=spec)
    async with service(place) as node:
        domain = await node.get("web")
        assert domain.status.state == State.DOMAIN_STATE_SHUT_OFF
        assert [one.name for one in (await node.list()).domains] == [name("web")]


async def test_autostart_after_a_boot_and_only_then(place: Path) -> None:
    async with service(place) as node:
        for id_, autostart in (("always", 2), ("once", 3), ("never", 1)):
            await node.create(id_, spec=domain_spec_pb2.DomainSpec(autostart=autostart))  # type: ignore[arg-type]  # a number
    async with service(place) as node:
        assert not [one for one in (await node.list()).domains if one.status.active], "the node has not booted"
        await forget_boot(node)
    async with service(place) as node:
        await node.until("always", State.DOMAIN_STATE_RUNNING)
        await node.until("once", State.DOMAIN_STATE_RUNNING)
        async with asyncio.timeout(10):
            while (await node.get("once")).spec.autostart != resource_pb2.AUTOSTART_NEVER:
                await asyncio.sleep(0.02)
        assert not (await node.get("never")).status.active


async def test_autostart_waits_for_what_is_not_up_and_says_so(place: Path) -> None:
    spec = domain_spec_pb2.DomainSpec(autostart=resource_pb2.AUTOSTART_ALWAYS)
    async with service(place) as node:
        await node.create("web", spec=spec)
        await forget_boot(node)
    faults = [{"method": "start", "reason": "BACKEND_UNREACHABLE", "count": 1}]
    async with service(place, drivers={"test": {"faults": faults}}) as node:
        domain = await node.until("web", State.DOMAIN_STATE_RUNNING)
        assert not domain.status.conditions
        await forget_boot(node)
    faults = [{"method": "start", "reason": "BACKEND_UNREACHABLE"}]
    async with service(place, autostart_seconds=0.1, drivers={"test": {"faults": faults}}) as node:
        async with asyncio.timeout(10):
            while not (conditions := (await node.get("web")).status.conditions):
                await asyncio.sleep(0.02)
        assert (conditions[0].type, conditions[0].reason) == ("AutostartFailed", "BACKEND_UNREACHABLE")


async def forget_boot(node: Service) -> None:
    """Let the next instance of the service believe that the node has booted."""
    async with asyncio.timeout(10):
        # It is written when all has been started, after the domain is seen to run.
        while node.app.store.get_record("service", "boot_id") in (None, b"another boot"):
            await asyncio.sleep(0.02)
    await node.app.store.write(lambda tx: tx.put_record("service", "boot_id", b"another boot"))

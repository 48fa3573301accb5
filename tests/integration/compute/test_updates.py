"""Changes of domains: what each scope does to a stopped and to a running one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from google.longrunning import operations_pb2

from tests.integration.compute.rig import PARENT, Refused, Service, name, service
from virtfleet.compute.v1 import device_pb2, domain_pb2, domain_spec_pb2, watch_pb2
from virtfleet.type.v1 import resource_pb2

GIB = 1 << 30
UNSPECIFIED = resource_pb2.CHANGE_SCOPE_UNSPECIFIED
CONFIG = resource_pb2.CHANGE_SCOPE_CONFIG
LIVE = resource_pb2.CHANGE_SCOPE_LIVE
BOTH = resource_pb2.CHANGE_SCOPE_LIVE_AND_CONFIG


def sized(current: int = GIB, maximum: int = 2 * GIB) -> domain_spec_pb2.DomainSpec:
    spec = domain_spec_pb2.DomainSpec()
    spec.memory.current_bytes = current
    spec.memory.maximum_bytes = maximum
    return spec


def wanted(**memory: int) -> domain_pb2.Domain:
    domain = domain_pb2.Domain(name=name("web"))
    for field, value in memory.items():
        setattr(domain.spec.memory, field, value)
    return domain


def pending(domain: domain_pb2.Domain) -> dict[str, str]:
    return {change.path: change.reason for change in domain.status.pending_changes}


@pytest.mark.parametrize("scope", [UNSPECIFIED, CONFIG, BOTH])
async def test_a_stopped_domain_takes_every_change_of_its_definition(node: Service, scope: int) -> None:
    await node.create("web", spec=sized())
    domain = await node.update(wanted(maximum_bytes=4 * GIB), "spec.memory.maximum_bytes", scope=scope)
    assert domain.generation == 2
    assert domain.status.observed_generation == 2
    assert domain.status.resolved_spec.memory.maximum_bytes == 4 * GIB
    assert not pending(domain)


async def test_live_needs_a_guest(node: Service) -> None:
    await node.create("web", spec=sized())
    with pytest.raises(Refused) as refused:
        await node.update(wanted(current_bytes=GIB // 2), "spec.memory.current_bytes", scope=LIVE)
    assert refused.value.reason == "WRONG_STATE"


@pytest.mark.parametrize(
    ("scope", "definition", "active", "left"),
    [
        (UNSPECIFIED, GIB // 2, GIB // 2, {}),
        (CONFIG, GIB // 2, GIB, {"spec.memory.current_bytes": "SCOPE_CONFIG"}),
        (LIVE, GIB, GIB // 2, {"spec.memory.current_bytes": "SCOPE_LIVE"}),
        (BOTH, GIB // 2, GIB // 2, {}),
    ],
)
async def test_what_can_go_live(node: Service, scope: int, definition: int, active: int, left: dict[str, str]) -> None:
    await node.create("web", spec=sized(), start=True)
    domain = await node.update(wanted(current_bytes=GIB // 2), "spec.memory.current_bytes", scope=scope)
    assert domain.spec.memory.current_bytes == definition
    assert domain.status.resolved_spec.memory.current_bytes == definition
    assert domain.status.active_spec.memory.current_bytes == active
    assert pending(domain) == left
    assert domain.generation == (1 if scope == LIVE else 2)
    await node.stop("web")
    assert not pending(await node.get("web"))
    assert (await node.start("web")).status.active_spec.memory.current_bytes == definition


@pytest.mark.parametrize("scope", [UNSPECIFIED, CONFIG])
async def test_what_cannot_go_live_waits(node: Service, scope: int) -> None:
    await node.create("web", spec=sized(), start=True)
    domain = await node.update(wanted(maximum_bytes=4 * GIB), "spec.memory.maximum_bytes", scope=scope)
    reason = "NEEDS_RESTART" if scope == UNSPECIFIED else "SCOPE_CONFIG"
    assert pending(domain) == {"spec.memory.maximum_bytes": reason}
    assert domain.status.active_spec.memory.maximum_bytes == 2 * GIB
    await node.stop("web")
    assert (await node.start("web")).status.active_spec.memory.maximum_bytes == 4 * GIB


@pytest.mark.parametrize("scope", [LIVE, BOTH])
async def test_what_cannot_go_live_is_refused_as_a_whole(place: Path, scope: int) -> None:
    file = place / "guests"
    async with service(place, drivers={"test": {"state_file": str(file)}}) as node:
        before = await node.create("web", spec=sized(), start=True)
        lines = file.read_bytes()
        with pytest.raises(Refused) as refused:
            await node.update(
                wanted(maximum_bytes=4 * GIB, current_bytes=GIB // 2),
                "spec.memory.maximum_bytes",
                "spec.memory.current_bytes",
                scope=scope,
            )
        assert (refused.value.code, refused.value.reason) == (
            grpc.StatusCode.FAILED_PRECONDITION.value[0],
            "NOT_LIVE_UPDATABLE",
        )
        assert refused.value.subjects == ["domain.spec.memory.maximum_bytes"]
        assert file.read_bytes() == lines, "what could go live was not done either"
        assert await node.get("web") == before


async def test_a_running_guest_does_not_change_for_a_definition_that_cannot_be(place: Path) -> None:
    """A card with a MAC that another domain has, and less memory for the guest that runs: neither."""
    file = place / "guests"
    async with service(place, drivers={"test": {"state_file": str(file)}}) as node:
        spec = domain_spec_pb2.DomainSpec()
        spec.interfaces["net0"].mac_address = "52:54:00:00:00:01"
        await node.create("holder", spec=spec)
        before = await node.create("web", spec=sized(), start=True)
        lines = file.read_bytes()
        change = wanted(current_bytes=GIB // 2)
        change.spec.interfaces["net9"].mac_address = "52:54:00:00:00:01"
        with pytest.raises(Refused) as refused:
            await node.update(change, "spec.memory.current_bytes", "spec.interfaces.net9")
        assert (refused.value.code, refused.value.reason) == (
            grpc.StatusCode.ALREADY_EXISTS.value[0],
            "IDENTITY_IN_USE",
        )
        assert refused.value.metadata["holder"] == name("holder")
        assert file.read_bytes() == lines, "the guest was not touched"
        assert await node.get("web") == before
        # A change that fails later on gives the MAC up that it had taken.
        change.spec.interfaces["net9"].mac_address = "52:54:00:00:00:02"
        node.faults({"method": "update_live", "reason": "HYPERVISOR_FAILED", "count": 1})
        with pytest.raises(Refused) as failed:
            await node.update(change, "spec.memory.current_bytes", "spec.interfaces.net9")
        assert failed.value.reason == "HYPERVISOR_FAILED"
        spec.interfaces["net0"].mac_address = "52:54:00:00:00:02"
        await node.create("other", spec=spec)


async def test_a_pending_change_is_not_made_live_by_the_next_call(node: Service) -> None:
    await node.create("web", spec=sized(), start=True)
    await node.update(wanted(current_bytes=GIB // 2), "spec.memory.current_bytes", scope=CONFIG)
    other = domain_pb2.Domain(name=name("web"), labels={"a": "b"})
    domain = await node.update(other, "labels")
    assert pending(domain) == {"spec.memory.current_bytes": "SCOPE_CONFIG"}
    assert domain.status.active_spec.memory.current_bytes == GIB


@pytest.mark.parametrize("running", [False, True])
async def test_what_the_service_heeds_is_always_live(node: Service, *, running: bool) -> None:
    await node.create("web", start=running)
    domain = domain_pb2.Domain(name=name("web"))
    domain.spec.title, domain.spec.deletion_protection = "the web", True
    changed = await node.update(domain, "spec.title", "spec.deletion_protection", scope=CONFIG)
    assert not pending(changed)
    if running:
        assert changed.status.active_spec.title == "the web"


async def test_no_change_is_no_generation(node: Service) -> None:
    domain = await node.create("web", spec=sized(), labels={"a": "b"})
    again = await node.update(domain)
    assert again.generation == 1
    assert again.etag == domain.etag


async def test_devices_by_their_ids(node: Service) -> None:
    spec = sized()
    spec.interfaces["net0"].SetInParent()
    spec.interfaces["net1"].SetInParent()
    before = await node.create("web", spec=spec, start=True)
    macs = {key: card.mac_address for key, card in before.status.resolved_spec.interfaces.items()}
    slots = {key: card.slot for key, card in before.status.resolved_spec.interfaces.items()}
    domain = domain_pb2.Domain(name=name("web"))
    domain.spec.interfaces["net2"].SetInParent()
    after = await node.update(domain, "spec.interfaces.net0", "spec.interfaces.net2")
    assert sorted(after.spec.interfaces) == ["net1", "net2"]
    assert after.status.resolved_spec.interfaces["net1"].mac_address == macs["net1"], "what was decided stays"
    assert after.status.resolved_spec.interfaces["net1"].slot == slots["net1"]
    assert set(pending(after)) == {"spec.interfaces.net0", "spec.interfaces.net2"}
    live = domain_pb2.Domain(name=name("web"))
    live.spec.interfaces["net1"].link_up = False
    after = await node.update(live, "spec.interfaces.net1.link_up")
    assert "spec.interfaces.net1.link_up" not in pending(after)
    assert not after.status.active_spec.interfaces["net1"].link_up


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("spec.nothing", "MASK_PATH_UNKNOWN"),
        ("spec.driver", "FIELD_CONFLICT"),
        ("spec.memory.current_bytes.x", "MASK_PATH_UNKNOWN"),
    ],
)
async def test_bad_masks(node: Service, path: str, reason: str) -> None:
    await node.create("web")
    domain = domain_pb2.Domain(name=name("web"))
    domain.spec.driver = "other"
    with pytest.raises(Refused) as refused:
        await node.update(domain, path)
    assert refused.value.reason == reason


async def test_etag_and_uid_of_an_update(node: Service) -> None:
    old = await node.create("web")
    await node.update(domain_pb2.Domain(name=old.name, display_name="new"), "display_name")
    old.display_name = "mine"
    with pytest.raises(Refused) as refused:
        await node.update(old, "display_name")
    assert refused.value.reason == "ETAG_MISMATCH"
    stranger = domain_pb2.Domain(name=old.name, uid="00000000-0000-4000-8000-000000000000", display_name="x")
    with pytest.raises(Refused) as refused:
        await node.update(stranger, "display_name")
    assert refused.value.reason == "UID_MISMATCH"


async def test_a_plan_changes_nothing(node: Service) -> None:
    await node.create("web", spec=sized(), start=True)
    before = await node.get("web")
    plan = await node.update(
        wanted(maximum_bytes=4 * GIB, current_bytes=GIB // 2),
        "spec.memory.maximum_bytes",
        "spec.memory.current_bytes",
        validate_only=True,
    )
    assert plan.generation == 2
    assert pending(plan)["spec.memory.maximum_bytes"] == "NEEDS_RESTART"
    assert await node.get("web") == before


async def test_apply_creates_what_is_not_there(node: Service) -> None:
    domain = await node.update(domain_pb2.Domain(name=name("web"), spec=sized()), allow_missing=True)
    assert domain.generation == 1
    with pytest.raises(Refused) as refused:
        await node.update(domain_pb2.Domain(name=name("other"), spec=sized()))
    assert refused.value.reason == "RESOURCE_NOT_FOUND"


@pytest.mark.parametrize("plan", [False, True])
async def test_apply_changes_what_somebody_has_made_in_the_meantime(node: Service, *, plan: bool) -> None:
    node.faults({"method": "resolve", "count": 1, "latency_seconds": 0.5})
    # It has found none, and takes its time to decide on one.
    applied = domain_pb2.Domain(name=name("web"), labels={"mine": "yes"}, spec=sized())
    late = asyncio.create_task(node.update(applied, allow_missing=True, validate_only=plan, request_id="once"))
    await asyncio.sleep(0.1)
    made = await node.update(domain_pb2.Domain(name=name("web"), labels={"theirs": "yes"}), allow_missing=True)
    domain = await late
    assert (domain.uid, domain.generation, dict(domain.labels)) == (made.uid, 2, {"mine": "yes", "theirs": "yes"})
    assert ((await node.get("web")).generation == 2) is not plan


async def test_apply_creates_what_somebody_deletes_in_the_meantime(node: Service) -> None:
    before = await node.create("web")
    node.faults({"method": "resolve", "count": 1, "latency_seconds": 0.5})
    applied = domain_pb2.Domain(name=name("web"), spec=sized())
    late = asyncio.create_task(node.update(applied, allow_missing=True, request_id="once"))
    await asyncio.sleep(0.1)
    await node.delete("web")
    domain = await late
    assert domain.uid != before.uid
    assert (domain.generation, domain.spec.memory.current_bytes) == (1, GIB)


async def test_apply_does_not_bring_back_what_was_read_and_deleted_since(node: Service) -> None:
    await node.create("web", spec=sized())
    read = await node.get("web")
    await node.delete("web")
    for plan in (True, False):
        with pytest.raises(Refused) as refused:
            await node.update(read, allow_missing=True, validate_only=plan)
        assert (refused.value.reason, refused.value.metadata["expected_etag"]) == ("ETAG_MISMATCH", read.etag)
    read.etag = ""
    assert (await node.update(read, allow_missing=True)).uid == read.uid


async def test_a_transient_domain_has_no_second_place(node: Service) -> None:
    spec = sized()
    spec.lifetime = resource_pb2.LIFETIME_TRANSIENT
    await node.create("web", spec=spec)
    with pytest.raises(Refused) as refused:
        await node.update(wanted(current_bytes=GIB // 2), "spec.memory.current_bytes", scope=CONFIG)
    assert refused.value.reason == "WRONG_STATE"
    with pytest.raises(Refused) as refused:
        await node.update(wanted(maximum_bytes=4 * GIB), "spec.memory.maximum_bytes")
    assert refused.value.reason == "NOT_LIVE_UPDATABLE"
    persistent = domain_pb2.Domain(name=name("web"))
    persistent.spec.lifetime = resource_pb2.LIFETIME_PERSISTENT
    await node.update(persistent, "spec.lifetime")
    await node.stop("web")
    assert (await node.get("web")).name == name("web")


async def test_a_second_operation_on_a_domain_is_refused_with_the_name_of_the_first(node: Service) -> None:
    await node.create("web")
    node.faults({"method": "start", "hang": True})
    request = domain_pb2.StartDomainRequest(name=name("web"))
    request.inline_wait.FromNanoseconds(0)
    first: operations_pb2.Operation = await node.call(node.domains.StartDomain, request)
    assert not first.done
    for attempt in (node.stop("web"), node.update(wanted(current_bytes=GIB), "spec.memory.current_bytes")):
        with pytest.raises(Refused) as refused:
            await attempt
        assert refused.value.reason == "OPERATION_CONFLICT"
        assert refused.value.metadata["operation"] == first.name
    batch = domain_pb2.BatchStopDomainsRequest(parent=PARENT, requests=[domain_pb2.StopDomainRequest(name=name("web"))])
    answer = await node.do(node.domains.BatchStopDomains, batch, domain_pb2.BatchStopDomainsResponse)
    assert answer.results[0].status.code == 10
    await node.call(node.operations.CancelOperation, operations_pb2.CancelOperationRequest(name=first.name))
    ended = await node.wait(first)
    assert Refused(ended.error).reason == "OPERATION_CANCELLED"
    node.faults()
    await node.start("web")


async def test_an_operation_that_lasts_is_shown_until_its_end(node: Service) -> None:
    await node.create("web")
    node.faults({"method": "start", "hang": True})
    request = domain_pb2.StartDomainRequest(name=name("web"))
    request.inline_wait.FromNanoseconds(0)
    operation = await node.call(node.domains.StartDomain, request)
    stream = node.watches.WatchResources(
        watch_pb2.WatchResourcesRequest(parent=PARENT, resource_types=[watch_pb2.RESOURCE_TYPE_DOMAIN]), timeout=10
    )
    seen: list[tuple[list[str], int]] = []
    async for response in stream:
        for change in response.changes:
            if change.WhichOneof("kind") == "put":
                status = change.put.domain.status
                seen.append((list(status.operations), status.control.state))
        if len(seen) == 2:
            cancel = operations_pb2.CancelOperationRequest(name=operation.name)
            await node.call(node.operations.CancelOperation, cancel)
        if len(seen) == 3:
            break
    stream.cancel()
    ok, busy = domain_pb2.CONTROL_STATE_OK, domain_pb2.CONTROL_STATE_BUSY
    assert seen == [([], ok), ([operation.name], busy), ([], ok)]


async def test_a_repeated_request_is_done_once(node: Service) -> None:
    await node.create("web")
    request = domain_pb2.StartDomainRequest(name=name("web"), request_id="one")
    first = await node.call(node.domains.StartDomain, request)
    await node.stop("web")
    again = await node.call(node.domains.StartDomain, request)
    assert again.name == first.name
    assert not (await node.get("web")).status.active
    other = domain_pb2.StartDomainRequest(name=name("web"), request_id="one", paused=True)
    with pytest.raises(Refused) as refused:
        await node.call(node.domains.StartDomain, other)
    assert refused.value.reason == "REQUEST_ID_REUSED"


async def test_a_repeated_update_is_not_refused_for_what_it_has_changed_itself(node: Service) -> None:
    domain = await node.create("web")
    request = domain_pb2.UpdateDomainRequest(
        domain=domain_pb2.Domain(name=domain.name, etag=domain.etag, labels={"a": "b"}), request_id="one"
    )
    first = await node.call(node.domains.UpdateDomain, request)
    again = await node.call(node.domains.UpdateDomain, request)
    assert again == first
    assert (await node.get("web")).generation == 2
    # Also when there is nothing left to look at.
    await node.delete("web")
    assert await node.call(node.domains.UpdateDomain, request) == first


async def test_a_repeated_creation_needs_nothing_that_the_first_one_needed(node: Service) -> None:
    request = domain_pb2.CreateDomainRequest(
        parent=PARENT, domain_id="web", domain=domain_pb2.Domain(), request_id="one"
    )
    batch = domain_pb2.BatchCreateDomainsRequest(
        parent=PARENT,
        requests=[domain_pb2.CreateDomainRequest(domain_id="other", domain=domain_pb2.Domain())],
        request_id="one",
    )
    first = await node.call(node.domains.CreateDomain, request)
    batched = await node.call(node.domains.BatchCreateDomains, batch)
    node.faults({"method": "resolve", "reason": "DRIVER_BROKEN"})
    assert await node.call(node.domains.CreateDomain, request) == first
    assert await node.call(node.domains.BatchCreateDomains, batch) == batched


async def test_a_driver_without_a_facet(node: Service) -> None:
    settings = node.driver._settings
    object.__setattr__(settings, "without", frozenset({"Suspend", "LiveUpdate"}))
    await node.create("web", spec=sized(), start=True)
    with pytest.raises(Refused) as refused:
        await node.verb("Suspend", "web")
    assert refused.value.reason == "CAPABILITY_MISSING"
    assert refused.value.metadata["capability"] == "domain.suspend"
    domain = await node.update(wanted(current_bytes=GIB // 2), "spec.memory.current_bytes")
    assert pending(domain) == {"spec.memory.current_bytes": "CAPABILITY_MISSING"}


@pytest.mark.parametrize("role", ["viewer", "operator"])
async def test_what_a_role_may_not_do(node: Service, role: str) -> None:
    client = node.as_(role)
    try:
        spec = domain_spec_pb2.DomainSpec()
        spec.disks["data"].host_path = "/dev/sda"
        spec.disks["data"].format = device_pb2.DISK_FORMAT_RAW
        with pytest.raises(Refused) as refused:
            await client.create("web", spec=spec)
        assert refused.value.reason == ("READ_ONLY_SOCKET" if role == "viewer" else "PERMISSION_MISSING")
        await node.create("web", spec=spec)
    finally:
        await client.close()

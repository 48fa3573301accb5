"""What guests do by themselves, and who is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from tests.integration.compute.rig import (
    PARENT,
    Client,
    Reason,
    Refused,
    Service,
    State,
    name,
    refusal,
    seconds,
    service,
)
from virtfleet.compute.v1 import (
    capability_pb2,
    console_pb2,
    domain_pb2,
    domain_spec_pb2,
    guest_agent_pb2,
    host_pb2,
    stats_pb2,
    watch_pb2,
)
from virtfleet.type.v1 import resource_pb2


async def typed(node: Client, id_: str, text: str, *, until: bytes = b"") -> bytes:
    """Write a line to a guest's console and return what it puts out until the console ends or a text is seen."""

    async def messages() -> AsyncIterator[console_pb2.OpenConsoleRequest]:
        yield console_pb2.OpenConsoleRequest(name=name(id_), open=console_pb2.ConsoleOpen())
        yield console_pb2.OpenConsoleRequest(data=text.encode() + b"\n")

    seen = b""
    stream = node.consoles.OpenConsole(messages(), timeout=10)
    async for response in stream:
        seen += response.data.data
        if response.WhichOneof("event") == "closed" or (until and until in seen):
            break
    stream.cancel()
    return seen


def with_console() -> domain_spec_pb2.DomainSpec:
    spec = domain_spec_pb2.DomainSpec()
    spec.serials["con"].SetInParent()
    return spec


@pytest.mark.parametrize(
    ("command", "state", "reason"),
    [
        ("poweroff", State.DOMAIN_STATE_SHUT_OFF, Reason.DOMAIN_STATE_REASON_GUEST_SHUTDOWN),
        ("crash", State.DOMAIN_STATE_CRASHED, Reason.DOMAIN_STATE_REASON_GUEST_CRASHED),
        ("die", State.DOMAIN_STATE_SHUT_OFF, Reason.DOMAIN_STATE_REASON_HYPERVISOR_DIED),
    ],
)
async def test_a_guest_that_ends_by_itself(node: Service, command: str, state: int, reason: int) -> None:
    await node.create("web", spec=with_console(), start=True)
    await typed(node, "web", command)
    domain = await node.until("web", state)
    assert domain.status.state_reason == reason
    assert not domain.status.active
    assert node.app.context.admission.active_count == 0
    assert (await node.start("web")).status.active


async def test_a_transient_guest_that_ends_by_itself_is_gone(node: Service) -> None:
    spec = with_console()
    spec.lifetime = resource_pb2.LIFETIME_TRANSIENT
    spec.test.power_off_delay.CopyFrom(seconds(0.2))
    request = watch_pb2.WatchResourcesRequest(parent=PARENT, resource_types=[watch_pb2.RESOURCE_TYPE_DOMAIN])
    stream = node.watches.WatchResources(request, timeout=10)
    await node.create("web", spec=spec)
    kinds: list[str] = []
    async for response in stream:
        kinds += [str(change.WhichOneof("kind")) for change in response.changes]
        if "delete" in kinds:
            break
    stream.cancel()
    assert kinds[-2:] == ["event", "delete"]
    assert not (await node.list()).domains


async def test_the_order_of_a_watch(node: Service) -> None:
    stream = node.watches.WatchResources(watch_pb2.WatchResourcesRequest(parent=PARENT), timeout=10)
    responses = aiter(stream)
    first = await anext(responses)
    assert {change.put.WhichOneof("resource") for change in first.changes} <= {"host", "driver"}
    await node.create("web")
    await node.start("web")
    await node.verb("Suspend", "web")
    await node.stop("web")
    await node.delete("web")
    states: list[tuple[str, int]] = []
    async for response in responses:
        for change in response.changes:
            if change.put.WhichOneof("resource") == "domain":
                states.append(("put", change.put.domain.status.state))
            elif change.event.type == watch_pb2.EVENT_TYPE_DOMAIN_STATE_CHANGED:
                states.append(("event", change.event.domain_state_changed.new_state))
            elif change.HasField("delete"):
                states.append(("delete", 0))
        if states and states[-1][0] == "delete":
            break
    stream.cancel()
    off, run, paused = State.DOMAIN_STATE_SHUT_OFF, State.DOMAIN_STATE_RUNNING, State.DOMAIN_STATE_PAUSED
    assert states == [
        ("put", off),
        ("put", run),
        ("event", run),
        ("put", paused),
        ("event", paused),
        ("put", off),
        ("event", off),
        ("delete", 0),
    ]


async def test_events_are_listed(node: Service) -> None:
    await node.create("web", spec=with_console(), start=True)
    await typed(node, "web", "reboot\nioerror", until=b"ioerror")
    domain = await node.until("web", State.DOMAIN_STATE_PAUSED)
    assert domain.status.state_reason == Reason.DOMAIN_STATE_REASON_IO_ERROR
    answer = await node.call(
        node.watches.ListEvents, watch_pb2.ListEventsRequest(parent=PARENT, filter=f'resource="{name("web")}"')
    )
    types = [event.type for event in answer.events]
    assert watch_pb2.EVENT_TYPE_DOMAIN_REBOOTED in types
    assert watch_pb2.EVENT_TYPE_DOMAIN_IO_ERROR in types
    assert all(event.uid == domain.uid for event in answer.events)


async def test_a_console_echoes_and_keeps_its_history(node: Service) -> None:
    await node.create("web", spec=with_console(), start=True)
    assert b"hello" in await typed(node, "web", "hello", until=b"hello")
    log = console_pb2.ReadConsoleLogRequest(name=name("web"), device_id="con")
    messages = [message async for message in node.consoles.ReadConsoleLog(log, timeout=10)]
    assert messages[0].WhichOneof("event") == "opened"
    assert b"".join(message.data.data for message in messages).startswith(b"test guest web booted")
    assert messages[-1].closed.reason == console_pb2.CONSOLE_CLOSE_REASON_END_OF_LOG
    end = messages[-1].closed.offset
    log.offset, log.epoch = end, messages[0].opened.epoch
    messages = [message async for message in node.consoles.ReadConsoleLog(log, timeout=10)]
    assert [message.WhichOneof("event") for message in messages] == ["opened", "closed"]
    await node.stop("web")
    log.offset = 0
    messages = [message async for message in node.consoles.ReadConsoleLog(log, timeout=10)]
    assert messages[-1].closed.reason == console_pb2.CONSOLE_CLOSE_REASON_GUEST_ENDED
    await node.start("web")
    messages = [message async for message in node.consoles.ReadConsoleLog(log, timeout=10)]
    assert messages[1].WhichOneof("event") == "gap", "offsets of another epoch are told as a gap"


async def test_one_writer_many_readers(node: Service) -> None:
    await node.create("web", spec=with_console(), start=True)

    def opened(mode: int, *, force: bool = False) -> Any:
        async def messages() -> AsyncIterator[console_pb2.OpenConsoleRequest]:
            yield console_pb2.OpenConsoleRequest(
                name=name("web"),
                open=console_pb2.ConsoleOpen(mode=mode, force=force),  # type: ignore[arg-type]  # a number
            )
            await asyncio.Event().wait()

        return node.consoles.OpenConsole(messages(), timeout=10)

    first = opened(console_pb2.CONSOLE_MODE_READ_WRITE)
    assert (await first.read()).opened.writable
    reader = opened(console_pb2.CONSOLE_MODE_READ_ONLY)
    assert not (await reader.read()).opened.writable
    second = opened(console_pb2.CONSOLE_MODE_READ_WRITE)
    with pytest.raises(Exception, match="another caller writes"):
        await second.read()
    third = opened(console_pb2.CONSOLE_MODE_READ_WRITE, force=True)
    assert (await third.read()).opened.writable
    assert (await first.read()).closed.reason == console_pb2.CONSOLE_CLOSE_REASON_TAKEN_OVER
    await node.stop("web")
    assert (await reader.read()).closed.reason == console_pb2.CONSOLE_CLOSE_REASON_GUEST_ENDED
    for stream in (first, reader, third):
        stream.cancel()


async def test_a_console_is_opened_on_the_domain_that_is_meant(node: Service) -> None:
    domain = await node.create("web", spec=with_console(), start=True)

    async def refused(*messages: console_pb2.OpenConsoleRequest) -> tuple[str, str]:
        async def sent() -> AsyncIterator[console_pb2.OpenConsoleRequest]:
            for message in messages:
                yield message
            await asyncio.Event().wait()

        stream = node.consoles.OpenConsole(sent(), timeout=10)
        try:
            while (await stream.read()).WhichOneof("event") != "closed":
                pass
        except grpc.aio.AioRpcError as error:
            found = refusal(error)
            return found.reason, "".join(found.fields)
        return "", ""

    def opened(**fields: str) -> console_pb2.OpenConsoleRequest:
        return console_pb2.OpenConsoleRequest(name=domain.name, open=console_pb2.ConsoleOpen(), **fields)  # type: ignore[arg-type]  # texts

    assert (await refused(opened(expected_uid="11111111-2222-4333-8444-555555555555")))[0] == "UID_MISMATCH"
    assert (await refused(opened(etag="stale")))[0] == "ETAG_MISMATCH"
    bye = console_pb2.OpenConsoleRequest(close=console_pb2.ConsoleClose())
    assert await refused(opened(etag=domain.etag, expected_uid=domain.uid), bye) == ("", "")
    late = console_pb2.OpenConsoleRequest(data=b"rm", expected_uid=domain.uid)
    assert await refused(opened(), late) == ("FIELD_CONFLICT", "expected_uid")


async def test_parents_and_enums_that_mean_nothing_are_refused(node: Service) -> None:
    for method, request in (
        (node.stats.BatchGetDomainStats, stats_pb2.BatchGetDomainStatsRequest(parent="nodes/n1/domains/web")),
        (node.drivers.ListDrivers, capability_pb2.ListDriversRequest(parent="nodes/n1/anything")),
        (node.watches.ListEvents, watch_pb2.ListEventsRequest(parent="nodes/n1/domains/web")),
    ):
        with pytest.raises(Refused) as error:
            await node.call(method, request)
        assert (error.value.reason, error.value.fields) == ("NAME_MALFORMED", ["parent"])
    with pytest.raises(Refused) as error:
        await node.list(view=99)
    assert (error.value.reason, error.value.fields) == ("FIELD_OUT_OF_RANGE", ["view"])


async def test_a_console_that_does_not_exist(node: Service) -> None:
    await node.create("web", start=True)
    with pytest.raises(Exception, match="no serial or console port"):
        await typed(node, "web", "x")


async def test_counters_by_name_come_in_pages_and_leave_nobody_out(node: Service) -> None:
    for id_ in ("a", "b", "c"):
        await node.create(id_, labels={"half": "one" if id_ < "c" else "two"})
    wanted = [name(id_) for id_ in ("c", "gone", "a", "b")]
    request = stats_pb2.BatchGetDomainStatsRequest(parent=PARENT, names=wanted, page_size=3)
    first = await node.call(node.stats.BatchGetDomainStats, request)
    assert [one.name for one in first.stats] == wanted[:3]
    assert [one.failure.code for one in first.stats] == [0, 5, 0]
    request.page_token = first.next_page_token
    rest = await node.call(node.stats.BatchGetDomainStats, request)
    assert ([one.name for one in rest.stats], rest.next_page_token) == (wanted[3:], "")
    request.page_token, request.page_size, request.filter = "", 0, 'labels.half="one"'
    some = await node.call(node.stats.BatchGetDomainStats, request)
    assert [one.name for one in some.stats] == [name("gone"), name("a"), name("b")]
    request.page_token = first.next_page_token
    with pytest.raises(Refused) as refused:
        await node.call(node.stats.BatchGetDomainStats, request)
    assert refused.value.reason == "PAGE_TOKEN_INVALID"
    stream = node.stats.StreamDomainStats(stats_pb2.StreamDomainStatsRequest(parent=PARENT, names=wanted), timeout=10)
    response = await stream.read()
    assert ([one.name for one in response.stats], response.round_end) == (wanted, True)
    stream.cancel()


async def test_counters_move_and_stand_in_groups(node: Service) -> None:
    spec = domain_spec_pb2.DomainSpec()
    spec.interfaces["net0"].SetInParent()
    await node.create("web", spec=spec, start=True)
    await node.create("idle")
    request = stats_pb2.GetDomainStatsRequest(name=name("web"))
    first = await node.call(node.stats.GetDomainStats, request)
    assert first.interfaces[0].device_id == "net0"
    assert first.state.state == State.DOMAIN_STATE_RUNNING
    request.groups.append(stats_pb2.STATS_GROUP_CPU)
    second = await node.call(node.stats.GetDomainStats, request)
    assert not second.interfaces
    assert second.cpu.total_time.ToNanoseconds() >= first.cpu.total_time.ToNanoseconds()
    batch = await node.call(
        node.stats.BatchGetDomainStats, stats_pb2.BatchGetDomainStatsRequest(parent=PARENT, page_size=1)
    )
    assert [stats.name for stats in batch.stats] == [name("idle")]
    assert not batch.stats[0].HasField("cpu")
    batch = await node.call(
        node.stats.BatchGetDomainStats,
        stats_pb2.BatchGetDomainStatsRequest(parent=PARENT, page_token=batch.next_page_token, page_size=1),
    )
    assert [stats.name for stats in batch.stats] == [name("web")]
    stream = node.stats.StreamDomainStats(
        stats_pb2.StreamDomainStatsRequest(parent=PARENT, interval=seconds(0.1)), timeout=10
    )
    rounds = [await stream.read() for _ in range(3)]
    stream.cancel()
    assert [message.round_number for message in rounds] == [1, 2, 3]
    assert all(len(message.stats) == 2 for message in rounds)
    node.faults({"method": "domain_stats", "reason": "DRIVER_BROKEN"})
    batch = await node.call(node.stats.BatchGetDomainStats, stats_pb2.BatchGetDomainStatsRequest(parent=PARENT))
    assert {stats.name: stats.failure.code for stats in batch.stats} == {name("idle"): 0, name("web"): 14}


async def test_the_host_and_its_drivers(node: Service) -> None:
    host = await node.call(node.hosts.GetHost, host_pb2.GetHostRequest(name=f"{PARENT}/host"))
    assert host.status.memory_total_bytes > 0
    assert host.status.cpu.online_count > 0
    assert host.status.accelerators[0].usable
    spec = domain_spec_pb2.DomainSpec()
    spec.memory.maximum_bytes = 1 << 30
    await node.create("web", spec=spec, start=True)
    host = await node.call(node.hosts.GetHost, host_pb2.GetHostRequest(name=f"{PARENT}/host"))
    assert host.status.allocated.memory_bytes == 1 << 30
    stats = await node.call(node.stats.GetHostStats, stats_pb2.GetHostStatsRequest(name=f"{PARENT}/host"))
    assert stats.uptime.seconds > 0
    drivers = await node.call(node.drivers.ListDrivers, capability_pb2.ListDriversRequest(parent=PARENT))
    assert [driver.name for driver in drivers.drivers] == [f"{PARENT}/drivers/test"]
    driver = await node.call(node.drivers.GetDriver, capability_pb2.GetDriverRequest(name=f"{PARENT}/drivers/test"))
    assert driver.status.default
    assert "domain.suspend" in [capability.id for capability in driver.status.capabilities]


async def test_a_driver_that_cannot_run_is_listed_with_its_reason(place: Path) -> None:
    async with service(place, drivers={"test": {"broken": "no hypervisor here"}}) as node:
        drivers = await node.call(node.drivers.ListDrivers, capability_pb2.ListDriversRequest(parent=PARENT))
        assert drivers.drivers[0].status.state == capability_pb2.DRIVER_STATE_BROKEN
        assert drivers.drivers[0].status.init_error.message == "no hypervisor here"
        with pytest.raises(Refused) as refused:
            await node.create("web")
        assert refused.value.reason == "DRIVER_BROKEN"


async def test_addresses_with_their_sources(node: Service) -> None:
    spec = domain_spec_pb2.DomainSpec()
    spec.interfaces["net0"].SetInParent()
    await node.create("web", spec=spec, start=True)
    answer = await node.call(
        node.agents.ListGuestAddresses, guest_agent_pb2.ListGuestAddressesRequest(name=name("web"))
    )
    assert [(one.device_id, one.source) for one in answer.addresses] == [("net0", domain_pb2.ADDRESS_SOURCE_DRIVER)]
    request = guest_agent_pb2.ListGuestAddressesRequest(name=name("web"), sources=[domain_pb2.ADDRESS_SOURCE_AGENT])
    answer = await node.call(node.agents.ListGuestAddresses, request)
    assert answer.missing_sources == [domain_pb2.ADDRESS_SOURCE_AGENT]


async def test_watchers_of_the_host_hear_within_a_second_what_guests_have(node: Service) -> None:
    await node.create("web")

    def told() -> int:
        row = node.app.store.get(f"{PARENT}/host")
        return host_pb2.Host.FromString(row.body).status.allocated.domain_count if row is not None else -1

    for started in (True, False):
        await (node.start("web") if started else node.stop("web"))
        async with asyncio.timeout(1.5):
            while told() != started:
                await asyncio.sleep(0.02)

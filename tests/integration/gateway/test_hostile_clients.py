"""Clients of no good will, and of bad luck: each has a clear answer at once, and the others do not notice."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from tests.integration.gateway import hostile
from tests.integration.gateway.client import Watcher, failure, list_all, names
from tests.integration.gateway.hostile import Stage, domain, uid
from tests.integration.gateway.nodes import details_of
from tests.integration.gateway.real import eventually
from virtfleet.compute.v1 import console_pb2_grpc, domain_pb2, domain_pb2_grpc
from virtfleet.compute.v1 import watch_pb2 as compute_watch
from virtfleet.compute.v1 import watch_pb2_grpc as compute_watch_grpc
from virtfleet.type.v1 import resource_pb2
from virtfleet_gateway import wire
from virtfleet_gateway.routing import Destination, build_table

pytestmark = pytest.mark.timeout(120)

NAMES = [f"nodes/n1/domains/d{number}" for number in range(3)]


@pytest_asyncio.fixture
async def fleet() -> AsyncIterator[Stage]:
    with tempfile.TemporaryDirectory(prefix="vfh") as folder:
        async with hostile.stage(Path(folder)) as made:
            await made.add("n1", *(domain(name, uid(number)) for number, name in enumerate(NAMES)))
            await eventually(lambda: list_all(made), lambda answer: names(answer) == NAMES)
            yield made


def private_mib() -> float:
    """Return the memory that this process, with its gateway, shares with nobody."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


_BOMB = """
import sys, grpc
from virtfleet_gateway import wire
channel = grpc.insecure_channel(sys.argv[1], [("grpc.max_send_message_length", -1)])
message = wire.delimited(1, b"nodes/n1/domains/d0") + wire.delimited(900, bytes(256 << 20))
try:
    channel.unary_unary("/virtfleet.compute.v1.DomainService/GetDomain")(message, compression=grpc.Compression.Gzip)
except grpc.RpcError as error:
    print(error.code().name, flush=True)
sys.stdin.read()
"""
_WATCHERS = """
import sys, grpc
from virtfleet.compute.v1 import watch_pb2
channel = grpc.insecure_channel(sys.argv[1])
request = watch_pb2.WatchResourcesRequest(parent="nodes/-").SerializeToString()
watch = channel.unary_stream("/virtfleet.compute.v1.WatchService/WatchResources")
calls = [watch(request) for _ in range(200)]
for call in calls:
    call.initial_metadata()
print(len(calls), flush=True)
sys.stdin.read()
"""


@contextlib.asynccontextmanager
async def elsewhere(fleet: Stage, program: str) -> AsyncIterator[Callable[[], Awaitable[str]]]:
    """Run a client in a process of its own, whose memory is not ours; yields what reads a line that it says."""
    client = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        program,
        f"unix:{fleet.folder}/g/gateway/admin.sock",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert client.stdin is not None
    assert client.stdout is not None
    output = client.stdout

    async def told() -> str:
        return (await asyncio.wait_for(output.readline(), 60)).decode().strip()

    try:
        yield told
    finally:
        client.stdin.close()
        await client.wait()


# Names


BAD_NAMES = [
    "nodes/%6e1/domains/d0",
    "nodes/n1\0/domains/d0",
    "nodes/\uff4e1/domains/d0",
    "nodes/n1/domains/" + "d" * 4096,
    "nodes/" + "n" * 4096 + "/domains/d0",
    "nodes/-/domains/%",
    "nodes/-/domains/d0\0",
    "nodes/-/domains/" + "d" * 4096,
    "nodes/-/../n1/domains/d0",
    "/nodes/n1/domains/d0",
    "nodes/N1/domains/d0",
    "nodes/--/domains/d0",
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: ascii(name[:30]))
async def test_a_name_that_is_none_is_refused(fleet: Stage, name: str) -> None:
    domains = domain_pb2_grpc.DomainServiceStub(fleet.channel)
    watch = compute_watch_grpc.WatchServiceStub(fleet.channel)
    for call in (
        domains.GetDomain(domain_pb2.GetDomainRequest(name=name), timeout=5),
        watch.WatchResources(compute_watch.WatchResourcesRequest(parent=name), timeout=5).read(),
    ):
        error = await failure(call)
        assert (error.code(), details_of(error)["reason"]) == (grpc.StatusCode.INVALID_ARGUMENT, "NAME_MALFORMED")


async def test_no_change_is_made_on_all_nodes(fleet: Stage) -> None:
    """Every method of nodes that changes something, and each that is a stream of the caller's."""
    asked = 0
    for route in build_table().values():
        if route.destination is not Destination.NODE or not (route.mutates or route.client_streaming):
            continue
        asked += 1
        for name in ("nodes/-", "nodes/-/domains/d0", "nodes/-/pools/p/volumes/v"):
            inner = wire.delimited(1, name.encode())
            request = wire.delimited(1, inner) if len(route.field_path) == 2 else inner
            kind = (
                f"{'stream' if route.client_streaming else 'unary'}_{'stream' if route.server_streaming else 'unary'}"
            )
            start: Any = getattr(fleet.channel, kind)(route.path)
            if route.client_streaming:
                call = start(timeout=10)
                await call.write(request)
                await call.done_writing()
            else:
                call = start(request, timeout=10)
            error = await failure(call.read() if route.server_streaming else call)
            assert (error.code(), details_of(error)["reason"]) == (
                grpc.StatusCode.INVALID_ARGUMENT,
                "NAME_MALFORMED",
            ), route.path
    assert asked > 30


@pytest.mark.parametrize(
    "stated", [("n2",), ("n1/storage",), ("-",), ("n1/",), ("n1", "n2"), ("%6e1",), ("n" * 4000,)], ids=str
)
async def test_metadata_that_name_another_node_are_refused(fleet: Stage, stated: tuple[str, ...]) -> None:
    await fleet.add("n2")
    metadata = tuple(("x-virtfleet-node", value) for value in stated)
    domains = domain_pb2_grpc.DomainServiceStub(fleet.channel)
    for call in (
        domains.GetDomain(domain_pb2.GetDomainRequest(name=NAMES[0]), metadata=metadata),
        domains.ListDomains(domain_pb2.ListDomainsRequest(parent="nodes/-"), metadata=metadata),
    ):
        error = await failure(call)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert details_of(error)["reason"] in ("FIELD_CONFLICT", "NAME_MALFORMED")


# Requests


FILTERS = {
    "64 KB": 'labels.a="' + "x" * 65_536 + '"',
    "nested a thousand times": "(" * 1000 + "labels:x" + ")" * 1000,
    "nested a hundred times": "(" * 100 + "labels:x" + ")" * 100,
    "a thousand terms": " AND ".join(["labels:x"] * 400),
    "not not not": "NOT " * 900 + "labels:x",
    "quotes": '"' * 4000,
    "NUL": 'name="\0',
}


@pytest.mark.parametrize("filter_", FILTERS, ids=str)
async def test_a_filter_without_end_is_refused_at_once(fleet: Stage, filter_: str) -> None:
    started = time.monotonic()
    error = await failure(list_all(fleet, filter=FILTERS[filter_]))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details_of(error)["reason"] in ("FILTER_SYNTAX", "FIELD_OUT_OF_RANGE")
    error = await failure(Watcher(fleet, filter=FILTERS[filter_]).call.read())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert time.monotonic() - started < 2


async def test_what_is_compressed_does_not_grow_without_end(fleet: Stage) -> None:
    domains = domain_pb2_grpc.DomainServiceStub(fleet.channel)
    small = domain_pb2.ListDomainsRequest(parent="nodes/-")
    assert names(await domains.ListDomains(small, compression=grpc.Compression.Gzip)) == NAMES
    before = private_mib()
    async with elsewhere(fleet, _BOMB) as told:
        assert await told() == "RESOURCE_EXHAUSTED"
    assert private_mib() - before < 50


@pytest.mark.parametrize("seconds", [0.001, 0.0])
async def test_a_deadline_that_is_over_costs_nobody_else_anything(fleet: Stage, seconds: float) -> None:
    domains = domain_pb2_grpc.DomainServiceStub(fleet.channel)
    requests = [
        domain_pb2.ListDomainsRequest(parent="nodes/-", read_through=True),
        domain_pb2.ListDomainsRequest(parent="nodes/-"),
    ]
    calls = [domains.ListDomains(request, timeout=seconds) for request in requests for _ in range(50)]
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        assert not isinstance(outcome, grpc.aio.AioRpcError) or outcome.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    # Without any deadline a fleet's list ends nevertheless.
    assert names(await list_all(fleet)) == NAMES
    await eventually(_open_calls(fleet), lambda count: count == 0)


def _open_calls(fleet: Stage) -> Any:
    async def count() -> int:
        forwarders = fleet.app.server._forwarders
        passing = sum(len(one.open_calls) + len(one.open_unary_calls) for one in forwarders)
        return passing + fleet.app.server.active_calls_count

    return count


# Streams


async def test_streams_that_never_speak_hold_nobody_up(fleet: Stage) -> None:
    async with fleet.connect() as channel:
        consoles = console_pb2_grpc.ConsoleServiceStub(channel)
        silent: list[Any] = [consoles.OpenConsole() for _ in range(1000)]
        await asyncio.gather(*(call.wait_for_connection() for call in silent))
        started = time.monotonic()
        assert names(await list_all(fleet)) == NAMES
        assert time.monotonic() - started < 1
        for call in silent:
            call.cancel()
    await eventually(_open_calls(fleet), lambda count: count == 0)


async def test_watchers_that_never_read_cost_little(fleet: Stage) -> None:
    """Two hundred that ask for all of eight MiB, and read nothing of it."""
    play = fleet.nodes["n1"].play
    for number in range(800):
        play.say(_put(domain(f"nodes/n1/domains/large{number:04}", uid(1000 + number), display_name="x" * 10_000)))
    stub = domain_pb2_grpc.DomainServiceStub(fleet.channel)
    last = domain_pb2.GetDomainRequest(name=f"nodes/-/domains/{uid(1799)}", view=resource_pb2.RESOURCE_VIEW_BASIC)
    await eventually(lambda: _exists(stub, last), bool)
    before = private_mib()
    async with elsewhere(fleet, _WATCHERS) as told:
        assert await told() == "200"
        await asyncio.sleep(2)
        grown = private_mib() - before
        assert grown < 100
        started = time.monotonic()
        assert (await stub.GetDomain(last)).uid == uid(1799)
        assert time.monotonic() - started < 1


def _put(one: domain_pb2.Domain) -> compute_watch.Change:
    change = compute_watch.Change()
    change.put.domain.CopyFrom(one)
    return change


async def _exists(stub: Any, request: domain_pb2.GetDomainRequest) -> bool:
    try:
        await stub.GetDomain(request)
    except grpc.aio.AioRpcError:
        return False
    return True


async def test_watchers_of_a_gateway_that_starts_anew_share_the_way_back(fleet: Stage) -> None:
    play = fleet.nodes["n1"].play
    watchers = [Watcher(fleet) for _ in range(60)]
    for watcher in watchers:
        await watcher.until(lambda watch: watch.snapshot_ended)
    play.say(_put(domain(NAMES[0], uid(0), generation=2)))
    for watcher in watchers:
        await watcher.until(lambda watch: ("put", NAMES[0], 2) in watch.history)
    tokens = [await watcher.stop() for watcher in watchers]
    await fleet.stop_gateway()
    # The log of the node has gone on when the gateway is back.
    for generation in range(3, 40):
        play.say(_put(domain(NAMES[0], uid(0), generation=generation)))
    play.tokens_asked.clear()
    await fleet.start_gateway()
    resumed = [Watcher(fleet, resume_token=token) for token in tokens]
    for watcher in resumed:
        await watcher.until(lambda watch: ("put", NAMES[0], 39) in watch.history)
        assert [number for _, _, number in watcher.history] == list(range(3, 40)), "each once, in order"
    # One stream for the index, and few for all who come back.
    assert len(play.tokens_asked) <= 6
    play.say(_put(domain(NAMES[0], uid(0), generation=40)))
    for watcher in resumed:
        await watcher.until(lambda watch: watch.history[-1:] == [("put", NAMES[0], 40)])
        await watcher.stop()

"""One node that lies, or speaks no protocol at all, speaks for itself alone: lists and watches of the others go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from google.longrunning import operations_pb2
from google.protobuf import message_factory

from tests.integration.gateway.nodes import Node
from virtfleet.compute.v1 import domain_pb2, stats_pb2, watch_pb2
from virtfleet.type.v1 import resource_pb2
from virtfleet.type.v1 import watch_pb2 as type_watch
from virtfleet_gateway import lists
from virtfleet_gateway.channels import Channels
from virtfleet_gateway.fanout import FanOut
from virtfleet_gateway.fleet_operations import FleetOperations
from virtfleet_gateway.index import PackageIndex
from virtfleet_gateway.lists import FleetReads
from virtfleet_gateway.relay import abort
from virtfleet_gateway.source import LIVE
from virtfleet_gateway.watch import FleetWatch
from virtfleet_service.authorization import Authorizer
from virtfleet_service.call import Call, Caller
from virtfleet_service.errors import FilterSyntax, PageTokenInvalid, ResourceNotFound
from virtfleet_service.methods import facts_of

WATCH = "virtfleet.compute.v1.WatchService.WatchResources"
STATS = stats_pb2.DESCRIPTOR.services_by_name["StatsService"].methods_by_name["BatchGetDomainStats"]
LIST = domain_pb2.DESCRIPTOR.services_by_name["DomainService"].methods_by_name["ListDomains"]
EVENTS = watch_pb2.DESCRIPTOR.services_by_name["WatchService"].methods_by_name["ListEvents"]
OPERATIONS = operations_pb2.DESCRIPTOR.services_by_name["Operations"].methods_by_name["ListOperations"]
NAMES = {node: f"nodes/{node}/domains/web" for node in ("n1", "n2")}
UIDS = {
    "n1": "11111111-1111-4111-8111-111111111111",
    "n2": "22222222-2222-4222-8222-222222222222",
}


def domain(node: str) -> domain_pb2.Domain:
    return domain_pb2.Domain(name=NAMES[node], uid=UIDS[node], labels={"a": "b"})


def snapshot(node: str) -> list[bytes]:
    """Return what a node says when it is asked what it has."""
    first = watch_pb2.WatchResourcesResponse(resume_token="one")
    first.changes.add().put.domain.CopyFrom(domain(node))
    end = watch_pb2.WatchResourcesResponse(resume_token="two")
    end.snapshot_end.SetInParent()
    return [first.SerializeToString(), end.SerializeToString()]


def call() -> Call:
    return Call(facts_of(LIST), Caller("spiffe://virtfleet.dev/user/a", ("admin",), "tls"), Authorizer())


class Fleet:
    """Is two nodes of which the second does what a test says, and what a gateway makes of them."""

    def __init__(self) -> None:
        self.nodes = {"n1": Node(), "n2": Node()}
        self.said: asyncio.Queue[bytes] = asyncio.Queue()
        self.channels = Channels(None, lambda *_: "")
        self.index = PackageIndex("compute", self.channels)
        fan_out = FanOut(self.channels, lambda: "spiffe://virtfleet.dev/gateway/g1")
        self.reads = FleetReads(self.index, fan_out, b"k" * 32)
        self.watch = FleetWatch(self.index, self.channels)
        owners: Any = None
        self.operations = FleetOperations(owners, fan_out, lambda: {"n1": ["compute"], "n2": ["compute"]}, b"k" * 32)

    def unary(self, full_name: str, answer: Callable[[str], bytes]) -> None:
        for node, server in self.nodes.items():

            async def behaviour(_request: bytes, _context: object, node: str = node) -> bytes:
                return answer(node)

            server.unary[full_name] = behaviour

    async def list_domains(self, **fields: Any) -> domain_pb2.ListDomainsResponse:
        request = domain_pb2.ListDomainsRequest(parent="nodes/-", **fields)
        kind = self.index.shape.kind_by_name["domain"]
        return domain_pb2.ListDomainsResponse.FromString(await self.reads.list_indexed(kind, LIST, request, call()))


@asynccontextmanager
async def running() -> AsyncIterator[Fleet]:
    fleet = Fleet()
    for node, server in fleet.nodes.items():

        async def watch(_request: bytes, context: Any, node: str = node) -> None:
            for message in snapshot(node):
                await context.write(message)
            while True:
                try:
                    await context.write(await asyncio.wait_for(fleet.said.get() if node == "n2" else never(), 0.5))
                except TimeoutError:
                    quiet = watch_pb2.WatchResourcesResponse(resume_token="two")
                    quiet.bookmark.SetInParent()
                    await context.write(quiet.SerializeToString())

        server.stream[WATCH] = watch
        await server.start()
        fleet.channels.put(node, {"compute": f"127.0.0.1:{server.port}"})
        fleet.index.follow(node)
    await fleet.index.settled(10)
    try:
        yield fleet
    finally:
        await fleet.index.close()
        await fleet.channels.close()
        for server in fleet.nodes.values():
            await server.stop()


async def never() -> bytes:
    await asyncio.Event().wait()
    return b""


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    async with running() as made:
        yield made


async def eventually(good: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not good():
            await asyncio.sleep(0.02)


def broken_put() -> bytes:
    """Return a change whose domain has a status that does not parse."""
    whole = watch_pb2.WatchResourcesResponse(resume_token="three")
    whole.changes.add().put.domain.CopyFrom(domain("n2"))
    # Field 11 of a domain, of five bytes, of which the first one begins a group that never ends.
    status = b"\x5a\x05\xfb\xff\xff\xff\xff"
    body = domain("n2").SerializeToString() + status
    put = b"\x52" + bytes([len(body) & 0x7F | 0x80, len(body) >> 7]) + body
    kind = whole.changes[0].put.DESCRIPTOR.fields_by_name["domain"].number
    put = bytes([kind << 3 & 0x7F | 2]) + put[1:] if kind < 16 else put
    change = b"\x12" + bytes([len(put) & 0x7F | 0x80, len(put) >> 7]) + put
    return b"\x0a" + bytes([len(change) & 0x7F | 0x80, len(change) >> 7]) + change + b"\x12\x05three"


def moved_in(old_name: str) -> bytes:
    response = watch_pb2.WatchResourcesResponse(resume_token="three")
    response.changes.add().moved_in.CopyFrom(
        type_watch.ResourceMovedIn(
            resource_type="domain", name="nodes/n2/domains/mine", uid=UIDS["n2"], old_name=old_name
        )
    )
    return response.SerializeToString()


@pytest.mark.parametrize(
    "said",
    [b"\xff\xff\xff", broken_put(), b"\x12\x02\xff\xfe", moved_in("nowhere"), moved_in("nodes/n1")],
    ids=["noise", "a domain that does not parse", "a token that is no text", "a move from nowhere", "a move of a node"],
)
async def test_what_does_not_parse_is_kept_from_readers_and_the_node_is_followed_on(fleet: Fleet, said: bytes) -> None:
    request = watch_pb2.WatchResourcesRequest(parent="nodes/-", view=resource_pb2.RESOURCE_VIEW_BASIC)
    request.snapshot.SetInParent()
    heard: list[watch_pb2.WatchResourcesResponse] = []

    async def read() -> None:
        async for message in fleet.watch.stream(request, call()):
            parsed = watch_pb2.WatchResourcesResponse.FromString(message)
            heard.append(parsed)

    reading = asyncio.create_task(read())
    await eventually(lambda: any(message.HasField("snapshot_end") for message in heard))
    fleet.said.put_nowait(said)
    await asyncio.sleep(0.3)
    for view in (1, 2):
        listed = await fleet.list_domains(view=view, filter='labels.a = "b"', allow_stale=True)
        assert [one.name for one in listed.domains] == [NAMES["n1"], NAMES["n2"]]
    # It is taken back when it speaks again.
    await eventually(lambda: fleet.index.sources["n2"].state == LIVE)
    told = len(heard)
    good = watch_pb2.WatchResourcesResponse(resume_token="four")
    good.changes.add().put.domain.CopyFrom(domain("n2"))
    fleet.said.put_nowait(good.SerializeToString())
    await eventually(lambda: any(one.changes for one in heard[told:]))
    assert not reading.done()
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)


async def test_a_node_takes_over_nothing_that_it_does_not_know(fleet: Fleet) -> None:
    fleet.said.put_nowait(moved_in(NAMES["n1"]))
    good = watch_pb2.WatchResourcesResponse(resume_token="four")
    good.changes.add().put.domain.CopyFrom(domain_pb2.Domain(name="nodes/n2/domains/after", uid=UIDS["n2"]))
    fleet.said.put_nowait(good.SerializeToString())
    await eventually(lambda: "nodes/n2/domains/after" in fleet.index.sources["n2"].tables["domain"])
    assert NAMES["n1"] in fleet.index.sources["n1"].tables["domain"]
    assert not [change for item in fleet.index.feed.after(0) for change in item.changes if change.new_name]


def stats(name: str) -> bytes:
    return stats_pb2.BatchGetDomainStatsResponse(stats=[stats_pb2.DomainStats(name=name)]).SerializeToString()


@pytest.mark.parametrize(
    "answer",
    [b"\xff\xff", stats(NAMES["n1"]), stats("nodes/n22/domains/web"), b"\x0a\x02\x0a\x05", bytes(4 << 20)],
    ids=["noise", "the stats of another", "of one whose name begins alike", "a cut item", "4 MiB"],
)
async def test_an_answer_that_is_none_is_missing_and_named(fleet: Fleet, answer: bytes) -> None:
    fleet.unary(STATS.full_name, lambda node: stats(NAMES[node]) if node == "n1" else answer)
    request = stats_pb2.BatchGetDomainStatsRequest(parent="nodes/-")
    body = await fleet.reads.list_live(STATS, request, call(), counted=None)
    found = stats_pb2.BatchGetDomainStatsResponse.FromString(body)
    assert [one.name for one in found.stats] == [NAMES["n1"]]
    assert [one.node for one in found.unreachable] == ["nodes/n2"]
    assert "no answer" in found.unreachable[0].status.message


@pytest.mark.parametrize("method", [LIST, STATS, EVENTS], ids=lambda method: method.name)
async def test_a_filter_that_is_wrong_is_refused_once_and_not_by_each_node(fleet: Fleet, method: Any) -> None:
    kind = fleet.index.shape.kind_by_name["domain"] if method is not EVENTS else None
    request = message_factory.GetMessageClass(method.input_type)(parent="nodes/-", filter="nothing = 1")
    with pytest.raises(FilterSyntax):
        await fleet.reads.list_live(method, request, call(), counted=kind)


async def test_a_list_asked_of_the_nodes_goes_on_in_its_own_view_only(fleet: Fleet) -> None:
    def answer(node: str) -> bytes:
        return domain_pb2.ListDomainsResponse(domains=[domain(node)], next_page_token="more").SerializeToString()

    fleet.unary(LIST.full_name, answer)
    first = await fleet.list_domains(read_through=True, page_size=1)
    going = {"read_through": True, "page_size": 1, "page_token": first.next_page_token}
    # The node that is in the midst of its part would refuse it, and be left out of the rest of the list.
    with pytest.raises(PageTokenInvalid):
        await fleet.list_domains(**going, view=resource_pb2.RESOURCE_VIEW_BASIC)
    assert (await fleet.list_domains(**going, view=resource_pb2.RESOURCE_VIEW_FULL)).domains


async def test_a_node_without_what_a_list_is_below_is_empty_and_not_away(fleet: Fleet) -> None:
    fleet.unary(LIST.full_name, lambda node: domain_pb2.ListDomainsResponse(domains=[domain(node)]).SerializeToString())

    async def without(_request: bytes, context: Any) -> bytes:
        await abort(context, ResourceNotFound("nodes/n2/pools/p1 does not exist", resource="nodes/n2/pools/p1"))

    fleet.nodes["n2"].unary[LIST.full_name] = without
    answer = await fleet.list_domains(read_through=True)
    assert [one.name for one in answer.domains] == [NAMES["n1"]]
    assert not answer.unreachable
    assert [one.node for one in answer.freshness] == ["nodes/n1", "nodes/n2"]


def counting(fleet: Fleet, page_limit: int = 1000) -> None:
    """Have nodes answer with the counters of what they are asked for, some at a time; `left-out` matches no filter."""
    for node, server in fleet.nodes.items():

        async def behaviour(encoded: bytes, _context: object, node: str = node) -> bytes:
            request = stats_pb2.BatchGetDomainStatsRequest.FromString(encoded)
            assert request.parent == f"nodes/{node}"
            answer = stats_pb2.BatchGetDomainStatsResponse()
            for name in request.names:
                if len(answer.stats) == page_limit:
                    answer.next_page_token = "more"
                    break
                if name == f"nodes/{node}/domains/{UIDS[node]}":
                    answer.stats.add(name=NAMES[node], uid=UIDS[node])
                elif not name.endswith("/left-out"):
                    answer.stats.add(name=name)
            return answer.SerializeToString()

        server.unary[STATS.full_name] = behaviour


WANTED = [
    "nodes/n2/domains/a",
    "nodes/n1/domains/b",
    "nodes/n1/domains/left-out",
    "nodes/n2/domains/a",
    f"nodes/n1/domains/{UIDS['n1']}",
    "nodes/n9/domains/x",
    "nodes/n2/domains/c",
]
COUNTED = [WANTED[0], WANTED[1], WANTED[3], NAMES["n1"], WANTED[6]]


@pytest.mark.parametrize("asked_at_once", [1, 2, 64])
@pytest.mark.parametrize(("page_size", "page_limit"), [(0, 1000), (1, 1000), (2, 1000), (0, 2), (3, 1)])
async def test_counters_of_names_come_in_the_order_of_the_names(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, page_size: int, page_limit: int, asked_at_once: int
) -> None:
    counting(fleet, page_limit)
    # A page of names on a thousand nodes must not ask all of them side by side.
    monkeypatch.setattr(lists, "ASKED_AT_ONCE", asked_at_once)
    ask = fleet.reads._fan_out.ask

    async def counted(method: Any, service: str, requests: dict[str, bytes], of: Call) -> Any:
        assert len(requests) <= asked_at_once
        return await ask(method, service, requests, of)

    monkeypatch.setattr(fleet.reads._fan_out, "ask", counted)
    request = stats_pb2.BatchGetDomainStatsRequest(parent="nodes/-", names=WANTED, page_size=page_size)
    kind = fleet.index.shape.kind_by_name["domain"]
    found: list[str] = []
    missing: set[str] = set()
    for _ in WANTED:
        body = await fleet.reads.list_live(STATS, request, call(), counted=kind)
        page = stats_pb2.BatchGetDomainStatsResponse.FromString(body)
        assert len(page.stats) <= (page_size or len(WANTED))
        found += [one.name for one in page.stats]
        missing |= {one.node for one in page.unreachable}
        request.page_token = page.next_page_token
        if not page.next_page_token:
            break
    assert found == COUNTED
    assert missing == {"nodes/n9"}


async def test_a_node_answers_a_batch_for_itself_alone(fleet: Fleet) -> None:
    batch = domain_pb2.DESCRIPTOR.services_by_name["DomainService"].methods_by_name["BatchGetDomains"]

    def answer(node: str) -> bytes:
        results = domain_pb2.BatchGetDomainsResponse()
        results.results.add(name=NAMES[node]).domain.CopyFrom(domain(node))
        if node == "n2":
            # Under its own name, what is another's.
            results.results[0].domain.name = NAMES["n1"]
        return results.SerializeToString()

    fleet.unary(batch.full_name, answer)
    request = domain_pb2.BatchGetDomainsRequest(parent="nodes/-", names=list(NAMES.values()), read_through=True)
    body = await fleet.reads.batch_get(fleet.index.shape.kind_by_name["domain"], batch, request, call())
    found = domain_pb2.BatchGetDomainsResponse.FromString(body)
    assert [(one.name, one.domain.name) for one in found.results] == [(NAMES["n1"], NAMES["n1"]), (NAMES["n2"], "")]


async def test_operations_of_others_are_not_told_by_a_node(fleet: Fleet) -> None:
    def answer(node: str) -> bytes:
        name = "nodes/n1/services/compute/operations/" + ("op1" if node == "n1" else "op2")
        return operations_pb2.ListOperationsResponse(
            operations=[operations_pb2.Operation(name=name)]
        ).SerializeToString()

    fleet.unary(OPERATIONS.full_name, answer)
    request = operations_pb2.ListOperationsRequest(name="nodes/-/services/-")
    body = await fleet.operations.list_operations(request, call())
    assert isinstance(body, bytes)
    found = operations_pb2.ListOperationsResponse.FromString(body)
    assert [one.name for one in found.operations] == ["nodes/n1/services/compute/operations/op1"]
    assert list(found.unreachable) == ["nodes/n2/services/compute"]

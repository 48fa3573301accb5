"""Lists and watches of a fleet, out of an index that the tests fill themselves: no node, no gRPC."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.unit.service.rig import call
from virtfleet.compute.v1 import domain_pb2, watch_pb2
from virtfleet.type.v1 import resource_pb2
from virtfleet.type.v1 import watch_pb2 as type_watch
from virtfleet_gateway import lists, watch
from virtfleet_gateway.channels import Channels
from virtfleet_gateway.fanout import FanOut
from virtfleet_gateway.feed import PLACES_LIMIT, Feed, Place, decode_place, encode_tokens
from virtfleet_gateway.index import PackageIndex
from virtfleet_gateway.lists import FleetReads
from virtfleet_gateway.source import LIVE, Source
from virtfleet_gateway.watch import FleetWatch
from virtfleet_service.call import Call
from virtfleet_service.errors import PageTokenInvalid, SlowReader

LIST = domain_pb2.DESCRIPTOR.services_by_name["DomainService"].methods_by_name["ListDomains"]


def domain(node: str, number: int, tier: str = "") -> domain_pb2.Domain:
    made = domain_pb2.Domain(name=f"nodes/{node}/domains/d{number:05}", generation=1)
    made.uid = f"{node}-{number}"
    if tier:
        made.labels["tier"] = tier
    return made


class Fleet:
    """An index, and what nodes say to it."""

    def __init__(self, **nodes: int) -> None:
        self.channels = Channels(None, lambda _node, _service: "")
        self.index = PackageIndex("compute", self.channels)
        self.reads = FleetReads(self.index, FanOut(self.channels, str), b"key")
        self.watch = FleetWatch(self.index, self.channels)
        self._said = 0
        for node, count in nodes.items():
            source = self.index.sources[node] = Source(node, self.index.shape, self.index._holders)
            source.state, source.synced, source.observe_seconds = LIVE, True, time.time()
            source.observed = source.heard
            self.say(node, *(put(domain(node, number)) for number in range(count)))

    def say(self, node: str, *changes: watch_pb2.Change) -> None:
        """Have a node say changes, in one message."""
        self._said += 1
        said = watch_pb2.WatchResourcesResponse(changes=changes, resume_token=f"{node}-{self._said}")
        taken, token, marker, _ = self.index.shape.response(said.SerializeToString())
        self.index._take(self.index.sources[node], taken, token, marker)

    async def list(self, call_: Call | None = None, **fields: Any) -> domain_pb2.ListDomainsResponse:
        request = domain_pb2.ListDomainsRequest(parent="nodes/-", **fields)
        kind = self.index.shape.kind_by_name["domain"]
        answer = await self.reads.list_indexed(kind, LIST, request, call_ or call())
        return domain_pb2.ListDomainsResponse.FromString(answer)

    def stream(self, **fields: Any) -> AsyncIterator[bytes]:
        request = watch_pb2.WatchResourcesRequest(
            parent="nodes/-", resource_types=[watch_pb2.RESOURCE_TYPE_DOMAIN], **fields
        )
        return self.watch.stream(request, call())


def put(one: domain_pb2.Domain) -> watch_pb2.Change:
    change = watch_pb2.Change()
    change.put.domain.CopyFrom(one)
    return change


def delete(one: domain_pb2.Domain) -> watch_pb2.Change:
    change = watch_pb2.Change()
    change.delete.CopyFrom(type_watch.ResourceDelete(resource_type="domain", name=one.name, uid=one.uid))
    return change


async def read(stream: AsyncIterator[bytes]) -> watch_pb2.WatchResourcesResponse:
    async with asyncio.timeout(5):
        return watch_pb2.WatchResourcesResponse.FromString(await anext(stream))


async def until_end(stream: AsyncIterator[bytes]) -> list[watch_pb2.Change]:
    """Read a snapshot."""
    changes: list[watch_pb2.Change] = []
    while True:
        answer = await read(stream)
        changes += answer.changes
        if answer.HasField("snapshot_end"):
            return changes


# Watches


async def test_a_snapshot_that_was_cut_is_ended_by_the_stream_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MESSAGE_CHANGES", 1)
    fleet = Fleet(n1=2, n2=2)
    first = fleet.stream()
    cut = await read(first)
    assert not cut.HasField("snapshot_end")
    fleet.say("n1", delete(domain("n1", 0)))
    # Cut once more, when a node has been told whole.
    again = fleet.stream(resume_token=cut.resume_token)
    told: list[watch_pb2.WatchResourcesResponse] = []
    while not told or told[-1].source_status.state != type_watch.SOURCE_STATE_LIVE:
        told.append(await read(again))
    assert list(decode_place(told[-1].resume_token)) == ["n1"]
    assert not any(answer.HasField("snapshot_end") for answer in told)
    last = fleet.stream(resume_token=told[-1].resume_token)
    changes = [change for answer in told for change in answer.changes] + await until_end(last)
    assert [change.put.domain.name for change in changes] == [
        "nodes/n1/domains/d00001",
        "nodes/n2/domains/d00000",
        "nodes/n2/domains/d00001",
    ]
    # What goes on from behind the end has none.
    fleet.say("n2", put(domain("n2", 9)))
    answer = await read(last)
    resumed = fleet.stream(resume_token=answer.resume_token)
    assert (await read(resumed)).HasField("bookmark")
    for stream in (first, again, last, resumed):
        await stream.aclose()  # type: ignore[attr-defined]  # it is a generator


@pytest.mark.parametrize(
    "other",
    [
        {"filter": 'labels.tier="silver"'},
        {"event_types": [watch_pb2.EVENT_TYPE_DOMAIN_REBOOTED]},
        {"view": resource_pb2.RESOURCE_VIEW_BASIC},
    ],
    ids=lambda other: next(iter(other)),
)
async def test_a_token_is_good_for_its_own_watch_only(other: dict[str, Any]) -> None:
    fleet = Fleet(n1=2)
    fleet.say("n1", put(domain("n1", 0, tier="silver")))
    first = fleet.stream(filter='labels.tier="gold"')
    token = (await read(first)).resume_token
    # It would be told what changes from here on, and never of what matched before.
    with pytest.raises(PageTokenInvalid) as caught:
        await read(fleet.stream(**{"filter": 'labels.tier="gold"', "resume_token": token, **other}))
    assert caught.value.field == "resume_token"
    again = fleet.stream(filter='labels.tier="gold"', view=resource_pb2.RESOURCE_VIEW_FULL, resume_token=token)
    bookmark = await read(again)
    assert bookmark.HasField("bookmark")
    third = fleet.stream(filter='labels.tier="gold"', resume_token=bookmark.resume_token)
    assert (await read(third)).HasField("bookmark")
    # That of a list, and that of an older gateway, are good for any.
    answer = await read(fleet.stream(resume_token=encode_tokens(fleet.index.tokens()), **other))
    assert answer.HasField("bookmark")


async def test_a_fleet_without_nodes_has_been_told_whole() -> None:
    fleet = Fleet()
    stream = fleet.stream()
    end = await read(stream)
    assert end.HasField("snapshot_end")
    answer = await read(fleet.stream(resume_token=end.resume_token))
    assert answer.HasField("bookmark"), "no second snapshot"


@pytest.mark.parametrize("last", ["a change", "its end"])
async def test_a_slow_reader_is_told_what_has_ceased_to_match(last: str) -> None:
    fleet = Fleet(n1=2)
    mine = domain("n1", 0, tier="gold")
    fleet.say("n1", put(mine))
    stream = fleet.stream(filter='labels.tier="gold"')
    assert [change.put.domain.name for change in await until_end(stream)] == [mine.name]
    # Between two reads it ceases to match, and then changes again: what makes it void is left out for who is behind.
    fleet.say("n1", put(domain("n1", 0)))
    for _ in range(watch.COALESCE_CHANGES):
        fleet.say("n1", put(domain("n1", 1)))
    fleet.say("n1", put(domain("n1", 0)) if last == "a change" else delete(mine))
    answer = await read(stream)
    assert mine.name in [change.delete.name for change in answer.changes if change.HasField("delete")]


async def test_a_filter_leaves_out_the_end_of_what_never_matched() -> None:
    fleet = Fleet(n1=3)
    stream = fleet.stream(filter='labels.tier="gold"')
    assert await until_end(stream) == []
    fleet.say("n1", delete(domain("n1", 1)))
    fleet.say("n1", put(domain("n1", 9, tier="gold")))
    (change,) = (await read(stream)).changes
    assert change.put.domain.name == "nodes/n1/domains/d00009"


async def test_events_are_those_of_what_the_filter_holds_for() -> None:
    fleet = Fleet(n1=2)
    gold = domain("n1", 0, tier="gold")
    fleet.say("n1", put(gold))
    stream = fleet.stream(filter='labels.tier="gold"')
    await until_end(stream)

    def event(one: domain_pb2.Domain) -> watch_pb2.Change:
        change = watch_pb2.Change()
        change.event.resource, change.event.uid = one.name, one.uid
        return change

    fleet.say("n1", event(domain("n1", 1)), event(domain("n1", 7)), event(gold))
    assert [change.event.resource for change in (await read(stream)).changes] == [gold.name]
    fleet.say("n1", event(gold), delete(gold))
    told = [change.WhichOneof("kind") for change in (await read(stream)).changes]
    assert told == ["event", "delete"], "also of what is gone by now"


async def test_a_search_lets_others_have_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_SCAN_SECONDS", 0.0)
    fleet = Fleet(n1=6400)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.ensure_future(other())
    assert await until_end(fleet.stream(filter='labels.tier="gold"')) == []
    task.cancel()
    assert turns >= 50


async def test_a_token_of_many_nodes_that_are_gone_is_told_quickly() -> None:
    fleet = Fleet(n1=1)
    token = encode_tokens({f"gone{number}": "t" for number in range(5000)} | fleet.index.tokens())
    stream = fleet.stream(resume_token=token)
    started = time.monotonic()
    answers = [await read(stream) for _ in range(5001)]
    assert time.monotonic() - started < 4
    assert sum(answer.source_status.state == type_watch.SOURCE_STATE_LOST for answer in answers) == 5000
    assert answers[-1].HasField("bookmark")
    assert all(len(answer.resume_token) < 100 for answer in answers)


@pytest.mark.parametrize(
    "token", ["x" * (2 << 20), encode_tokens({"n1\0": "t"}), encode_tokens({"N1": "t"}), encode_tokens({"n/1": "t"})]
)
async def test_a_token_that_nobody_has_made_is_refused(token: str) -> None:
    with pytest.raises(PageTokenInvalid):
        await anext(Fleet(n1=1).stream(resume_token=token))


async def test_a_reader_that_the_feed_has_left_behind_is_told_so_also_while_it_catches_up() -> None:
    fleet = Fleet(n1=1, n2=1)
    fleet.index.feed._limit = 50
    stream = fleet.stream(resume_token=encode_tokens({"n1": "unknown", "n2": fleet.index.sources["n2"].token}))
    waiting = asyncio.ensure_future(read(stream))
    await asyncio.sleep(0.05)
    for _ in range(200):
        fleet.say("n2", put(domain("n2", 0)))
    answer = await waiting
    assert answer.bookmark.closing.message
    with pytest.raises(SlowReader):
        await read(stream)
    await stream.aclose()  # type: ignore[attr-defined]  # it is a generator


def test_places_of_a_quiet_node_are_bounded() -> None:
    feed = Feed()
    feed.append("n1", "first")
    for number in range(3 * PLACES_LIMIT):
        feed.place("n1", f"t{number}")
    assert len(feed._places["n1"]) == PLACES_LIMIT
    assert feed.locate("n1", f"t{3 * PLACES_LIMIT - 1}") == feed.head


def test_the_text_of_a_place_follows_it() -> None:
    place = Place({"n1": "a"})
    before = place.text
    place.set("n1", "a")
    assert place.text is before
    place.set("n2", "b")
    assert decode_place(place.text).tokens == {"n1": "a", "n2": "b"}
    place.drop("n1")
    assert (decode_place(place.text).tokens, list(place)) == ({"n2": "b"}, ["n2"])


# Lists


async def test_a_watch_from_any_page_tells_what_has_changed_in_the_pages_before() -> None:
    fleet = Fleet(n1=4, n2=4)
    first = await fleet.list(page_size=3)
    fleet.say("n1", put(domain("n1", 0, tier="gold")))
    page, token = first, first.next_page_token
    while token:
        page = await fleet.list(page_size=3, page_token=token)
        token = page.next_page_token
        assert page.resume_token == first.resume_token
    answer = await read(fleet.stream(resume_token=page.resume_token))
    assert [change.put.domain.labels["tier"] for change in answer.changes] == ["gold"]


async def test_every_page_comes_further_however_slow_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "SCAN_SECONDS", -1.0)
    fleet = Fleet(n1=3, n2=2)
    found, token = list[str](), ""
    for _ in range(8):
        page = await fleet.list(page_token=token)
        found += [one.name for one in page.domains]
        token = page.next_page_token
        if not token:
            break
    assert found == [
        f"nodes/{node}/domains/d{number:05}" for node, count in (("n1", 3), ("n2", 2)) for number in range(count)
    ]
    assert not token


async def test_a_page_token_tells_no_names_and_serves_its_own_list() -> None:
    fleet = Fleet(n1=4)
    limited = call(LIST.full_name, roles=("viewer@nodes/n1/domains/d00003",))
    limited._authorizer.register(limited.method)
    token = (await fleet.list(page_size=2)).next_page_token
    # Whoever has the token of another caller is shown what he may see himself, and no more.
    assert [one.name for one in (await fleet.list(limited, page_token=token)).domains] == ["nodes/n1/domains/d00003"]
    # What is asked for in another way is the same list.
    assert (await fleet.list(page_token=token, view=resource_pb2.RESOURCE_VIEW_FULL)).domains
    for other in ({"filter": "labels:x"}, {"view": 1}):
        with pytest.raises(PageTokenInvalid):
            await fleet.list(page_token=token, **other)
    for forged in (token[:-2] + "AA", token + "A", "A" * len(token), "nodes/n1", "x" * (2 << 20)):
        with pytest.raises(PageTokenInvalid):
            await fleet.list(page_token=forged)

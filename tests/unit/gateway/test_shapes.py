from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtfleet.compute.v1 import domain_pb2, watch_pb2
from virtfleet.network.v1 import network_pb2
from virtfleet.type.v1 import resource_pb2
from virtfleet.type.v1 import watch_pb2 as type_watch
from virtfleet_gateway import wire
from virtfleet_gateway.feed import Feed, decode_place, encode_tokens
from virtfleet_gateway.shapes import BASIC, MARKER_BOOKMARK, Change, Entry, Shape, Sort
from virtfleet_gateway.source import Gathering, Source
from virtfleet_gateway.wire import WireError
from virtfleet_service.errors import PageTokenInvalid
from virtfleet_service.views import apply_view

COMPUTE = Shape("compute")
FULL = resource_pb2.RESOURCE_VIEW_FULL


def domain(name: str = "nodes/n1/domains/web") -> domain_pb2.Domain:
    made = domain_pb2.Domain(name=name, uid="u1", display_name="Web", labels={"tier": "gold"}, generation=3)
    made.spec.title = "asked"
    made.status.state = domain_pb2.DOMAIN_STATE_RUNNING
    made.status.active_spec.title = "runs"
    made.status.resolved_spec.SetInParent()
    made.status.observed_generation = 3
    return made


def test_a_response_is_taken_apart_and_put_together_unchanged() -> None:
    response = watch_pb2.WatchResourcesResponse(resume_token="here")
    put = response.changes.add()
    put.time.FromSeconds(5)
    put.put.cause = "virtfleet.compute.v1.DomainService.StartDomain"
    put.put.old_generation = 2
    put.put.domain.CopyFrom(domain())
    response.changes.add().delete.CopyFrom(
        type_watch.ResourceDelete(resource_type="domain", name="nodes/n1/domains/old", uid="u2", cause="x")
    )
    event = response.changes.add().event
    event.resource, event.uid, event.type = "nodes/n1/domains/web", "u1", watch_pb2.EVENT_TYPE_DOMAIN_PANICKED
    response.bookmark.SetInParent()
    changes, token, marker, _ = COMPUTE.response(response.SerializeToString())
    assert (token, marker) == ("here", MARKER_BOOKMARK)
    assert [change.sort for change in changes] == [Sort.PUT, Sort.DELETE, Sort.EVENT]
    assert [change.kind for change in changes] == ["domain", "domain", "domain"]
    assert changes[2].event_type == watch_pb2.EVENT_TYPE_DOMAIN_PANICKED
    again = [watch_pb2.Change.FromString(change.encode(FULL)) for change in changes]
    assert again == list(response.changes)
    basic = watch_pb2.Change.FromString(changes[0].encode(BASIC))
    assert basic.put.domain == apply_view(domain(), BASIC)
    assert basic.put.cause == put.put.cause
    gone = watch_pb2.Change.FromString(COMPUTE.filtered(changes[0]))
    assert (gone.delete.name, gone.delete.cause, gone.time.seconds) == ("nodes/n1/domains/web", "filter", 5)


def test_both_halves_of_a_move_say_the_same() -> None:
    out = watch_pb2.Change()
    out.moved_out.CopyFrom(
        type_watch.ResourceMovedOut(
            resource_type="domain", name="nodes/n1/domains/a", uid="u", new_name="nodes/n2/domains/a"
        )
    )
    into = watch_pb2.Change()
    into.moved_in.CopyFrom(
        type_watch.ResourceMovedIn(
            resource_type="domain", name="nodes/n2/domains/a", uid="u", old_name="nodes/n1/domains/a"
        )
    )
    told = []
    for change in (out, into):
        response = watch_pb2.WatchResourcesResponse(changes=[change])
        (taken,), *_ = COMPUTE.response(response.SerializeToString())
        told.append(watch_pb2.Change.FromString(taken.encode(FULL)).moved)
    assert told[0] == told[1]
    assert (told[0].old_name, told[0].new_name) == ("nodes/n1/domains/a", "nodes/n2/domains/a")


@pytest.mark.parametrize("service", ["compute", "storage", "network"])
def test_basic_views_are_those_of_the_services(service: str) -> None:
    shape = Shape(service)
    for kind in shape.kind_by_name.values():
        message = kind.message(name="nodes/n1/things/x", uid="u")
        for part in ("spec", "status"):
            if part in message.DESCRIPTOR.fields_by_name:
                getattr(message, part).SetInParent()
        basic = kind.message.FromString(kind.basic(message.SerializeToString()))
        assert basic == apply_view(message, BASIC), kind.name
    network = network_pb2.Network(name="nodes/n1/networks/x")
    network.status.active_spec.SetInParent()
    if service == "network":
        entry = Entry(shape.kind_by_name["network"], network.SerializeToString())
        assert network_pb2.Network.FromString(entry.seen(BASIC)) == apply_view(network, BASIC)


def sound() -> watch_pb2.WatchResourcesResponse:
    response = watch_pb2.WatchResourcesResponse(resume_token="here")
    put = response.changes.add().put
    put.cause, put.old_generation = "x", 2
    put.domain.CopyFrom(domain())
    response.changes.add().delete.CopyFrom(type_watch.ResourceDelete(resource_type="domain", name="n", uid="u"))
    response.changes.add().event.CopyFrom(watch_pb2.Event(resource="nodes/n1/domains/web", uid="u1"))
    response.changes.add().moved_in.CopyFrom(type_watch.ResourceMovedIn(resource_type="domain", name="n", uid="u"))
    return response


@given(st.data())
def test_whatever_a_node_says_is_taken_or_refused_and_what_is_taken_can_be_read(data: st.DataObject) -> None:
    spoiled = bytearray(sound().SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(spoiled) - 1))
        spoiled[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    try:
        changes, *_ = COMPUTE.response(bytes(spoiled))
    except WireError:
        return
    for change in changes:
        for view in (FULL, BASIC):
            watch_pb2.Change.FromString(change.encode(view))


def long_name(response: watch_pb2.WatchResourcesResponse) -> None:
    response.changes[0].put.domain.name = "nodes/n1/domains/" + "a" * 600


def long_uid(response: watch_pb2.WatchResourcesResponse) -> None:
    response.changes[0].put.domain.uid = "u" * 600


def long_token(response: watch_pb2.WatchResourcesResponse) -> None:
    response.resume_token = "t" * 5000


def large_resource(response: watch_pb2.WatchResourcesResponse) -> None:
    response.changes[0].put.domain.spec.title = "x" * (3 << 20)


def large_message(response: watch_pb2.WatchResourcesResponse) -> None:
    for _ in range(9):
        response.changes.add().event.message = "x" * (1 << 20)


@pytest.mark.parametrize("spoil", [long_name, long_uid, long_token, large_resource, large_message])
def test_what_no_release_of_a_node_would_say_is_refused(
    spoil: Callable[[watch_pb2.WatchResourcesResponse], None],
) -> None:
    response = sound()
    spoil(response)
    with pytest.raises(WireError):
        COMPUTE.response(response.SerializeToString())


def test_bytes_that_are_no_resource_are_refused() -> None:
    name = wire.delimited(1, b"nodes/n1/domains/a")
    for rubbish in (wire.delimited(11, b"\xff\xff"), wire.delimited(3, b"\xff"), b"\x5b"):
        put = wire.delimited(2, wire.delimited(10, name + rubbish))
        with pytest.raises(WireError):
            COMPUTE.response(wire.delimited(1, put))
    with pytest.raises(WireError):
        COMPUTE.response(wire.delimited(2, b"\xff"))


def test_a_node_speaks_of_its_own_resources_only() -> None:
    source = Source("n1", COMPUTE)
    response = watch_pb2.WatchResourcesResponse()
    for name in ("nodes/n1/domains/a", "nodes/n2/domains/a", "nodes/n10/domains/a"):
        response.changes.add().put.domain.CopyFrom(domain(name))
    changes, *_ = COMPUTE.response(response.SerializeToString())
    assert [change.name for change in source.apply(changes)] == ["nodes/n1/domains/a"]
    assert source.names("domain") == ["nodes/n1/domains/a"]


def test_a_verdict_is_formed_once_a_resource_and_filter() -> None:
    entry = Entry(COMPUTE.kind_by_name["domain"], domain().SerializeToString())
    asked: list[str] = []

    def test(message: object) -> bool:
        assert isinstance(message, domain_pb2.Domain)
        asked.append(message.name)
        return message.labels["tier"] == "gold"

    assert entry.holds("x", test)
    assert entry.holds("x", test)
    assert len(asked) == 1


node_names = st.from_regex(r"[a-z]([a-z0-9-]{0,7}[a-z0-9])?", fullmatch=True)


@given(st.dictionaries(node_names, st.text(min_size=1, max_size=80).filter(lambda text: "\0" not in text), max_size=8))
def test_tokens_of_a_fleet_hold_those_of_its_nodes(tokens: dict[str, str]) -> None:
    assert decode_place(encode_tokens(tokens)).tokens == tokens


@given(st.text(max_size=40))
def test_what_is_no_token_is_refused(text: str) -> None:
    try:
        decode_place(text)
    except PageTokenInvalid:
        return
    # A text that parses is one that could have been made.
    assert encode_tokens(decode_place(text).tokens)


def test_the_ring_forgets_the_oldest_and_knows_its_places() -> None:
    feed = Feed(limit_changes=8)
    for number in range(10):
        feed.append("n1", f"t{number}")
    assert feed.head == 10
    assert feed.tail == 2
    assert feed.locate("n1", "t0") is None
    assert feed.locate("n1", "t9") == 10
    assert feed.locate("n1", "t5") == 6
    assert [item.token for item in feed.after(6)] == ["t6", "t7", "t8", "t9"]
    feed.append("n1", "new", snapshot=[])
    assert feed.locate("n1", "t9") is None
    assert feed.locate("n1", "new") == 11
    assert feed.locate("n2", "new") is None


def test_the_ring_holds_no_more_bytes_than_it_may() -> None:
    feed = Feed(limit_bytes=64 << 10)
    for number in range(400):
        change = Change(Sort.EVENT, "domain", "nodes/n1/domains/d", "u", raw=b"e" * (10 if number < 200 else 6000))
        feed.append("n1", f"t{number}", [change])
        assert sum(item.size for item in feed.after(0)) <= 64 << 10
    assert 5 <= len(feed.after(0)) <= 11
    assert feed.locate("n1", "t399") == 400
    assert feed.locate("n1", "t300") is None
    # What is larger than all of it is told nevertheless.
    feed.append("n1", "large", [Change(Sort.EVENT, "domain", "d", "u", raw=b"e" * (100 << 10))])
    assert [item.token for item in feed.after(0)] == ["large"]


def test_what_a_node_says_of_others_is_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    source = Source("n1", COMPUTE)
    response = watch_pb2.WatchResourcesResponse()
    for number in range(500):
        response.changes.add().put.domain.CopyFrom(domain(f"nodes/n2/domains/d{number}"))
    changes, *_ = COMPUTE.response(response.SerializeToString())
    assert source.apply(changes) == []
    (line,) = [record.getMessage() for record in caplog.records if record.name == "virtfleet_gateway.source"]
    assert "nodes/n2/domains/d0 (500 such)" in line


@pytest.mark.parametrize("way", ["in a snapshot", "one by one", "all without"])
def test_a_node_has_a_uid_once(way: str) -> None:
    """However often it says it: what is looked for by uid must not become a search."""
    source = Source("n1", COMPUTE)
    response = watch_pb2.WatchResourcesResponse()
    for number in range(20_000):
        one = domain_pb2.Domain(name=f"nodes/n1/domains/d{number}", uid="" if way == "all without" else "u1")
        response.changes.add().put.domain.CopyFrom(one)
    changes, *_ = COMPUTE.response(response.SerializeToString())
    started = time.monotonic()
    if way == "in a snapshot":
        snapshot = Gathering(source)
        snapshot.take(changes)
        source.replace(snapshot.tables)
    else:
        source.apply(changes)
    assert time.monotonic() - started < 5
    expected = 20_000 if way == "all without" else 1
    assert len(source.names("domain")) == expected
    assert "nodes/n1/domains/d19999" in source.names("domain")
    source.replace({kind: {} for kind in COMPUTE.kind_by_name})
    assert source.used_bytes == 0

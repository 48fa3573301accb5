# ruff: noqa: ARG001 - behaviours have the signature that grpc calls
"""Nodes that lie, babble, or have bad luck: one of them spoils nobody's answer but its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from google.longrunning import operations_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.integration.gateway import hostile
from tests.integration.gateway.client import Watcher, failure, list_all, names
from tests.integration.gateway.hostile import Stage, domain, uid
from tests.integration.gateway.nodes import details_of
from tests.integration.gateway.real import eventually
from virtfleet.common.v1 import admin_pb2
from virtfleet.compute.v1 import domain_pb2, domain_pb2_grpc, stats_pb2, stats_pb2_grpc
from virtfleet.compute.v1 import watch_pb2 as compute_watch
from virtfleet.fleet.v1 import node_pb2, node_pb2_grpc
from virtfleet.type.v1 import watch_pb2
from virtfleet_gateway import index, source, wire
from virtfleet_service.store import StoreUnwritable
from virtfleet_service.transaction import Transaction

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

pytestmark = pytest.mark.timeout(120)

GOOD = "nodes/good/domains/web"


@pytest_asyncio.fixture
async def fleet() -> AsyncIterator[Stage]:
    with tempfile.TemporaryDirectory(prefix="vfh") as folder:
        async with hostile.stage(Path(folder)) as made:
            await made.add("good", domain(GOOD, uid(1), labels={"tier": "gold"}))
            await made.add("bad", domain("nodes/bad/domains/own", uid(2)))
            await listed(made, GOOD, "nodes/bad/domains/own")
            yield made


async def listed(fleet: Stage, *wanted: str, **fields: Any) -> domain_pb2.ListDomainsResponse:
    """Return the fleet's list when it has just these domains."""
    answer: domain_pb2.ListDomainsResponse = await eventually(
        lambda: list_all(fleet, **fields),
        lambda answer: names(answer) == sorted(wanted),
    )
    return answer


def away(answer: Any) -> list[str]:
    return [one.node for one in answer.unreachable]


def put(one: domain_pb2.Domain) -> compute_watch.Change:
    change = compute_watch.Change()
    change.put.domain.CopyFrom(one)
    return change


def moved_in(name: str, uid_: str, old_name: str) -> compute_watch.Change:
    change = compute_watch.Change()
    change.moved_in.resource_type, change.moved_in.name = "domain", name
    change.moved_in.uid, change.moved_in.old_name = uid_, old_name
    return change


def moved_out(name: str, uid_: str, new_name: str) -> compute_watch.Change:
    change = compute_watch.Change()
    change.moved_out.resource_type, change.moved_out.name = "domain", name
    change.moved_out.uid, change.moved_out.new_name = uid_, new_name
    return change


def delete(name: str, uid_: str) -> compute_watch.Change:
    change = compute_watch.Change()
    change.delete.resource_type, change.delete.name, change.delete.uid = "domain", name, uid_
    return change


# What it says in its watch


def _resource(rubbish: bytes, name: bytes = b"nodes/bad/domains/x") -> bytes:
    head = wire.delimited(1, name) + wire.delimited(2, uid(9).encode())
    return wire.delimited(1, wire.delimited(2, wire.delimited(10, head + rubbish)))


RUBBISH = {
    "no message": b"\xff\xff\xff",
    "a token that is no text": wire.delimited(2, b"\xff\xfe"),
    "a token without end": wire.delimited(2, b"t" * 100_000),
    "a resource that does not parse": _resource(wire.delimited(11, b"\xff\xff")),
    "a label that is no text": _resource(wire.delimited(4, wire.delimited(1, b"a") + wire.delimited(2, b"\xff"))),
    "a resource of 3 MiB": _resource(wire.delimited(3, b"x" * (3 << 20))),
    "a name without end": _resource(b"", b"nodes/bad/domains/" + b"x" * 100_000),
    "a message of 12 MiB": wire.delimited(900, bytes(12 << 20)),
    "a message of 100 MiB": wire.delimited(900, bytes(100 << 20)),
    "a move from nowhere": compute_watch.WatchResourcesResponse(
        changes=[moved_in("nodes/bad/domains/own", uid(2), "")]
    ).SerializeToString(),
    "an event that is no text": wire.delimited(1, wire.delimited(6, wire.delimited(1, b"\xff"))),
}
HARMLESS = {"a move from nowhere"}


@pytest.mark.parametrize("rubbish", RUBBISH, ids=str)
async def test_rubbish_in_a_watch_makes_its_node_stale_and_spoils_nothing_else(fleet: Stage, rubbish: str) -> None:
    bad = fleet.nodes["bad"]
    watcher = Watcher(fleet)
    await watcher.until(lambda watch: watch.snapshot_ended)

    async def babble(request: bytes, context: Context) -> None:
        await context.write(RUBBISH[rubbish])
        await asyncio.sleep(30)

    bad.play.say_bytes(RUBBISH[rubbish])
    bad.behaviours[hostile.WATCH] = babble
    if rubbish not in HARMLESS:
        await watcher.until(lambda watch: ("nodes/bad", watch_pb2.SOURCE_STATE_STALE) in watch.statuses)
        answer = await listed(fleet, GOOD)
        assert away(answer) == ["nodes/bad"]
    # The others are told, listed, filtered and counted as before.
    fleet.nodes["good"].play.say(put(domain(GOOD, uid(1), generation=2, labels={"tier": "gold"})))
    await watcher.until(lambda watch: ("put", GOOD, 2) in watch.history)
    assert names(await list_all(fleet, filter='labels.tier="gold"')) == [GOOD]
    nodes = await node_pb2_grpc.NodeServiceStub(fleet.channel).ListNodes(node_pb2.ListNodesRequest())
    assert [node.name for node in nodes.nodes] == ["nodes/bad", "nodes/good"]
    # It is heard again when it makes sense again.
    bad.play.said.clear()
    bad.reset()
    fleet.app.index.packages["compute"].follow("bad")
    await watcher.until(lambda watch: watch.statuses[-1:] in ([], [("nodes/bad", watch_pb2.SOURCE_STATE_LIVE)]))
    bad.play.say(put(domain("nodes/bad/domains/late", uid(3))))
    await watcher.until(lambda watch: "nodes/bad/domains/late" in watch.known)
    await watcher.stop()


async def test_a_node_speaks_for_no_other(fleet: Stage) -> None:
    watcher = Watcher(fleet)
    await watcher.until(lambda watch: watch.snapshot_ended)
    bad = fleet.nodes["bad"].play
    bad.say(put(domain(GOOD, uid(1), generation=99)))
    bad.say(put(domain("nodes/good/domains/new", uid(5))))
    bad.say(delete(GOOD, uid(1)))
    bad.say(moved_out(GOOD, uid(1), "nodes/bad/domains/own"))
    # A move that its other half denies, with a name of its own and the uid of the other, and the other way round.
    bad.say(moved_in("nodes/bad/domains/stolen", uid(1), GOOD))
    bad.say(moved_out("nodes/bad/domains/own", uid(1), "nodes/bad/domains/other"))
    bad.say(put(domain("nodes/bad/domains/last", uid(6))))
    await watcher.until(lambda watch: "nodes/bad/domains/last" in watch.known)
    assert watcher.moves == []
    assert [entry for entry in watcher.history if entry[1] in (GOOD, "nodes/good/domains/new")] == [("put", GOOD, 0)]
    assert names(await list_all(fleet))[-1] == GOOD
    domains = domain_pb2_grpc.DomainServiceStub(fleet.channel)
    found = await domains.GetDomain(domain_pb2.GetDomainRequest(name=f"nodes/-/domains/{uid(1)}"))
    assert (found.name, found.generation) == (GOOD, 0)
    await watcher.stop()


@pytest.mark.parametrize("first", ["the old node", "the new node"])
async def test_a_move_is_told_once_and_before_its_put(fleet: Stage, first: str) -> None:
    watcher = Watcher(fleet)
    await watcher.until(lambda watch: watch.snapshot_ended)
    new = "nodes/bad/domains/web"

    def leave() -> None:
        fleet.nodes["good"].play.say(moved_out(GOOD, uid(1), new))

    def arrive() -> None:
        fleet.nodes["bad"].play.say(moved_in(new, uid(1), GOOD), put(domain(new, uid(1), generation=7)))

    halves = [leave, arrive] if first == "the old node" else [arrive, leave]
    halves[0]()
    await asyncio.sleep(0.3)
    halves[1]()
    await watcher.until(lambda watch: ("put", new, 7) in watch.history)
    assert watcher.moves == [(uid(1), GOOD, new)]
    assert watcher.history.index(("moved", new, 0)) < watcher.history.index(("put", new, 7))
    assert not [entry for entry in watcher.history if entry[0] == "delete"]
    await listed(fleet, new, "nodes/bad/domains/own")
    await watcher.stop()


async def test_a_move_from_a_node_that_is_away_is_believed(fleet: Stage) -> None:
    watcher = Watcher(fleet)
    await watcher.until(lambda watch: watch.snapshot_ended)
    await fleet.nodes["good"].stop()
    await watcher.until(lambda watch: ("nodes/good", watch_pb2.SOURCE_STATE_STALE) in watch.statuses)
    new = "nodes/bad/domains/web"
    fleet.nodes["bad"].play.say(moved_in("nodes/bad/domains/x", uid(8), GOOD))
    fleet.nodes["bad"].play.say(moved_in(new, uid(1), GOOD), put(domain(new, uid(1))))
    await watcher.until(lambda watch: new in watch.known)
    assert watcher.moves == [(uid(1), GOOD, new)]
    await watcher.stop()


async def test_two_nodes_with_one_uid_are_both_listed_and_warned_of(
    fleet: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    twin = "nodes/bad/domains/twin"
    fleet.nodes["bad"].play.say(put(domain(twin, uid(1))))
    await listed(fleet, twin, GOOD, "nodes/bad/domains/own")
    domains = domain_pb2_grpc.DomainServiceStub(fleet.channel)
    error = await failure(domains.GetDomain(domain_pb2.GetDomainRequest(name=f"nodes/-/domains/{uid(1)}")))
    assert details_of(error)["reason"] == "AMBIGUOUS_NAME"
    assert any(uid(1) in record.getMessage() and GOOD in record.getMessage() for record in caplog.records)
    fleet.nodes["bad"].play.say(delete(twin, uid(1)))
    await listed(fleet, GOOD, "nodes/bad/domains/own")
    found = await domains.GetDomain(domain_pb2.GetDomainRequest(name=f"nodes/-/domains/{uid(1)}"))
    assert found.name == GOOD


async def test_what_a_node_says_last_holds_also_where_it_counts_backwards(fleet: Stage) -> None:
    bad = fleet.nodes["bad"].play
    for generation in (9, 3):
        bad.say(put(domain("nodes/bad/domains/own", uid(2), generation=generation)))
    domains = domain_pb2_grpc.DomainServiceStub(fleet.channel)
    found = await eventually(
        lambda: domains.GetDomain(domain_pb2.GetDomainRequest(name=f"nodes/-/domains/{uid(2)}")),
        lambda found: found.generation == 3,
    )
    assert found.name == "nodes/bad/domains/own"


# Snapshots


async def endless(request: bytes, context: Context) -> None:
    number = 0
    while True:
        response = compute_watch.WatchResourcesResponse(resume_token="t")
        for _ in range(50):
            number += 1
            response.changes.append(put(domain(f"nodes/bad/domains/d{number}", uid(number), display_name="x" * 900)))
        await context.write(response.SerializeToString())


async def test_a_snapshot_without_end_is_ended(fleet: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    package = fleet.app.index.packages["compute"]
    package.drop("bad")
    monkeypatch.setattr(package, "_node_bytes", 4 << 20)
    fleet.nodes["bad"].behaviours[hostile.WATCH] = endless
    package.follow("bad")
    answer = await eventually(lambda: list_all(fleet), lambda answer: "4194304 bytes" in str(answer.unreachable))
    assert names(answer) == [GOOD]
    assert package.sources["bad"].used_bytes == 0


async def test_a_node_may_not_grow_without_end(fleet: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet.app.index.packages["compute"].sources["bad"], "_limit_bytes", 1 << 20)
    bad = fleet.nodes["bad"].play
    for number in range(100):
        bad.say(put(domain(f"nodes/bad/domains/d{number}", uid(100 + number), display_name="x" * 20_000)))
    answer = await eventually(lambda: list_all(fleet), lambda answer: away(answer) == ["nodes/bad"])
    assert "more than 1048576 bytes" in str(answer.unreachable)
    assert fleet.app.index.packages["compute"].sources["bad"].used_bytes <= 1 << 20


async def test_nobody_waits_again_and_again_for_a_snapshot_that_does_not_come(
    fleet: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow(request: bytes, context: Context) -> None:
        while True:
            await context.write(compute_watch.WatchResourcesResponse(resume_token="t").SerializeToString())
            await asyncio.sleep(0.2)

    monkeypatch.setattr(index, "PATIENCE_SECONDS", 0.5)
    package = fleet.app.index.packages["compute"]
    package.drop("bad")
    fleet.nodes["bad"].behaviours[hostile.WATCH] = slow
    package.follow("bad")
    await asyncio.sleep(0.6)
    started = time.monotonic()
    answer = await list_all(fleet)
    assert time.monotonic() - started < 1
    assert (names(answer), away(answer)) == ([GOOD], ["nodes/bad"])


# Answers


def refusing(code: grpc.StatusCode, details: bytes) -> Any:
    async def refuse(request: bytes, context: Context) -> None:
        await context.abort(code, "no", (("grpc-status-details-bin", details),))

    return refuse


def answering(body: bytes) -> Any:
    async def answer(request: bytes, context: Context) -> bytes:
        return body

    return answer


def named(name: str) -> bytes:
    """Return an answer with one item of a name."""
    return wire.delimited(1, wire.delimited(1, name.encode()))


ANSWERS: dict[str, Any] = {
    "in the name of another": answering(named(GOOD)),
    "no message": answering(b"\xff\xff"),
    "a token that is no text": answering(wire.delimited(2, b"\xff")),
    "a token without end": answering(wire.delimited(2, b"t" * 9000)),
    "an item that does not parse": answering(wire.delimited(1, b"\xff")),
    "100 MiB": answering(wire.delimited(900, bytes(100 << 20))),
    "an error that does not parse": refusing(grpc.StatusCode.INTERNAL, b"\xff\xff"),
    "an error of 12 KB": refusing(grpc.StatusCode.INTERNAL, b"\xff" * 12_000),
    "an error of 60 KB": refusing(grpc.StatusCode.INTERNAL, b"\xff" * 60_000),
    "an error without details": refusing(grpc.StatusCode.INTERNAL, b""),
}


@pytest.mark.parametrize("answer", ANSWERS, ids=str)
async def test_a_bad_answer_is_missing_from_what_the_others_answer(fleet: Stage, answer: str) -> None:
    bad, good = fleet.nodes["bad"], fleet.nodes["good"]
    for path in (hostile.STATS, hostile.LIST, hostile.OPERATIONS):
        bad.behaviours[path] = ANSWERS[answer]
        good.behaviours[path] = answering(named(GOOD))
    stats = await stats_pb2_grpc.StatsServiceStub(fleet.channel).BatchGetDomainStats(
        stats_pb2.BatchGetDomainStatsRequest(parent="nodes/-"), timeout=10
    )
    assert [one.name for one in stats.stats] == [GOOD]
    assert away(stats) == ["nodes/bad"]
    live = await list_all(fleet, read_through=True)
    assert (names(live), away(live)) == ([GOOD], ["nodes/bad"])
    list_operations: Any = fleet.channel.unary_unary(
        hostile.OPERATIONS,
        request_serializer=operations_pb2.ListOperationsRequest.SerializeToString,
        response_deserializer=operations_pb2.ListOperationsResponse.FromString,
    )
    operations = await list_operations(operations_pb2.ListOperationsRequest(name="nodes/-/services/compute"))
    assert [one.name for one in operations.operations] == [GOOD]
    assert list(operations.unreachable) == ["nodes/bad/services/compute"]


async def test_a_batch_takes_each_name_from_its_own_node(fleet: Stage) -> None:
    path = "/virtfleet.compute.v1.DomainService/BatchGetDomains"

    def result(name: str, title: str) -> bytes:
        answer = domain_pb2.BatchGetDomainsResponse()
        answer.results.add(name=name, domain=domain(name, uid(1), display_name=title))
        return answer.SerializeToString()

    fleet.nodes["good"].behaviours[path] = answering(result(GOOD, "true"))
    fleet.nodes["bad"].behaviours[path] = answering(result(GOOD, "forged"))
    wanted = [GOOD, "nodes/bad/domains/own"]
    batch = await domain_pb2_grpc.DomainServiceStub(fleet.channel).BatchGetDomains(
        domain_pb2.BatchGetDomainsRequest(parent="nodes/-", names=wanted, read_through=True)
    )
    assert [one.name for one in batch.results] == wanted
    assert batch.results[0].domain.display_name == "true"
    assert batch.results[1].status.code == grpc.StatusCode.INTERNAL.value[0]


@pytest.mark.parametrize("answer", ["100 MiB", "an error of 60 KB"])
async def test_what_is_too_large_for_a_call_says_so(fleet: Stage, answer: str) -> None:
    fleet.nodes["bad"].behaviours[hostile.GET] = ANSWERS[answer]
    domains = domain_pb2_grpc.DomainServiceStub(fleet.channel)
    error = await failure(domains.GetDomain(domain_pb2.GetDomainRequest(name="nodes/bad/domains/own")))
    details = details_of(error)
    assert (error.code(), details["reason"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE")
    assert details["metadata"]["node"] == "nodes/bad"


async def test_a_read_by_uid_of_what_does_not_parse_is_refused(fleet: Stage) -> None:
    fleet.nodes["bad"].behaviours[hostile.GET] = answering(b"\xff\xff")
    domains = domain_pb2_grpc.DomainServiceStub(fleet.channel)
    request = domain_pb2.GetDomainRequest(name=f"nodes/-/domains/{uid(2)}", read_through=True)
    error = await failure(domains.GetDomain(request))
    assert (error.code(), details_of(error)["reason"]) == (grpc.StatusCode.INTERNAL, "UNEXPECTED")


# What it says of itself


@pytest.mark.parametrize("said", ["rubbish", "a mebibyte"])
async def test_a_node_that_says_nonsense_of_itself_spoils_no_list_of_nodes(fleet: Stage, said: str) -> None:
    nodes = node_pb2_grpc.NodeServiceStub(fleet.channel)

    async def bad() -> node_pb2.Node:
        found: node_pb2.Node = await nodes.GetNode(node_pb2.GetNodeRequest(name="nodes/bad"))
        return found

    # One that goes before that has been noted still joins, and is not told to be missing.
    await eventually(bad, lambda node: node.status.state == node_pb2.NODE_STATE_READY)
    body = b"\xff\xff" if said == "rubbish" else admin_pb2.Server(boot_id="b" * (1 << 20)).SerializeToString()
    fleet.nodes["bad"].behaviours[hostile.SERVER] = answering(body)
    await fleet.nodes["bad"].stop()
    await eventually(bad, lambda node: node.status.state == node_pb2.NODE_STATE_NOT_READY)
    await fleet.nodes["bad"].start()
    if said == "rubbish":
        await eventually(
            bad, lambda node: all("does not parse" in service.channel_error for service in node.status.services), 30
        )
        fleet.nodes["bad"].reset()
    await eventually(bad, lambda node: node.status.state == node_pb2.NODE_STATE_READY, 30)
    listed = await nodes.ListNodes(node_pb2.ListNodesRequest())
    assert listed.ByteSize() < 20_000


@pytest.mark.parametrize("what", ["rubbish", "its end", "an error"])
async def test_health_and_reflection_of_a_node_that_answers_nonsense(fleet: Stage, what: str) -> None:
    async def reflect(requests: object, context: Context) -> None:
        await context.read()
        if what == "rubbish":
            await context.write(b"\xff\xff")
        elif what == "an error":
            await context.abort(grpc.StatusCode.INTERNAL, "no")

    bad = fleet.nodes["bad"]
    bad.behaviours[hostile.REFLECTION] = reflect
    bad.behaviours[hostile.CHECK] = answering(b"\xff") if what == "rubbish" else refusing(grpc.StatusCode.INTERNAL, b"")
    place = (("x-virtfleet-node", "bad"),)
    health = health_pb2_grpc.HealthStub(fleet.channel)
    answer = await health.Check(health_pb2.HealthCheckRequest(), metadata=place)
    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    call = reflection_pb2_grpc.ServerReflectionStub(fleet.channel).ServerReflectionInfo(metadata=place)
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    error = await failure(call.read())
    assert (error.code(), details_of(error)["reason"]) == (grpc.StatusCode.UNAVAILABLE, "NODE_UNREACHABLE")
    check: Any = fleet.channel.unary_unary("/grpc.health.v1.Health/Check")
    error = await failure(check(b"\xff\xff", metadata=place))
    assert (error.code(), details_of(error)["reason"]) == (grpc.StatusCode.INVALID_ARGUMENT, "DOCUMENT_INVALID")
    error = await failure(check(b"", metadata=(*place, ("x-virtfleet-node", "good"))))
    assert (error.code(), details_of(error)["reason"]) == (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_CONFLICT")


# Nodes that come and go


async def test_a_node_that_flaps_is_asked_less_and_less_often(fleet: Stage) -> None:
    bad = fleet.nodes["bad"]
    begun: list[float] = []

    async def flap(request: bytes, context: Context) -> None:
        begun.append(time.monotonic())
        await context.write(compute_watch.WatchResourcesResponse(resume_token="t").SerializeToString())
        await context.abort(grpc.StatusCode.UNKNOWN, "gone")

    asked: list[float] = []

    async def serve(request: bytes, context: Context) -> None:
        asked.append(time.monotonic())
        await context.write(
            health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING).SerializeToString()
        )
        await context.abort(grpc.StatusCode.UNKNOWN, "gone")

    bad.behaviours[hostile.WATCH] = flap
    bad.behaviours[hostile.HEALTH] = serve
    await bad.stop()
    await bad.start()
    await asyncio.sleep(6)
    # Each would be dozens at a steady pace: a stream is begun at once.
    assert len(begun) < 8
    assert len(asked) < 3 * 8
    assert names(await list_all(fleet))[-1] == GOOD


@pytest.mark.parametrize("how", ["a call", "a list of the fleet"])
async def test_a_node_that_is_removed_under_a_call_is_told_as_away(fleet: Stage, how: str) -> None:
    begun = asyncio.Event()

    async def hang(request: bytes, context: Context) -> None:
        begun.set()
        await asyncio.sleep(30)

    bad = fleet.nodes["bad"]
    bad.behaviours[hostile.GET] = bad.behaviours[hostile.STATS] = hang
    fleet.nodes["good"].behaviours[hostile.STATS] = answering(named(GOOD))
    call: Any
    if how == "a call":
        call = domain_pb2_grpc.DomainServiceStub(fleet.channel).GetDomain(
            domain_pb2.GetDomainRequest(name="nodes/bad/domains/own")
        )
    else:
        call = stats_pb2_grpc.StatsServiceStub(fleet.channel).BatchGetDomainStats(
            stats_pb2.BatchGetDomainStatsRequest(parent="nodes/-")
        )
    task = asyncio.ensure_future(call)
    await asyncio.wait_for(begun.wait(), 5)
    fleet.app.channels.remove("bad")
    if how == "a call":
        error = await failure(asyncio.wait_for(task, 4))
        assert (error.code(), details_of(error)["reason"]) == (grpc.StatusCode.UNAVAILABLE, "NODE_UNREACHABLE")
        assert details_of(error)["metadata"]["sent"] == "true"
    else:
        answer = await asyncio.wait_for(task, 4)
        assert ([one.name for one in answer.stats], away(answer)) == ([GOOD], ["nodes/bad"])


async def test_a_node_that_hangs_up_at_once_is_tried_less_and_less_often(fleet: Stage) -> None:
    tried: list[float] = []

    async def hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tried.append(time.monotonic())
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    endpoint = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    fleet.app.channels.put("shy", dict.fromkeys(("compute", "storage", "network"), endpoint))
    domains = domain_pb2_grpc.DomainServiceStub(fleet.channel)
    ends_at = time.monotonic() + 4
    while time.monotonic() < ends_at:
        started = time.monotonic()
        error = await failure(domains.GetDomain(domain_pb2.GetDomainRequest(name="nodes/shy/domains/a")))
        assert details_of(error)["reason"] == "NODE_UNREACHABLE"
        assert time.monotonic() - started < 2
    # From a fifth of a second on: 0, 0.2, 0.5, 1, 2, 4 …
    assert 2 <= len(tried) <= 8
    fleet.app.channels.remove("shy")
    server.close()


async def test_a_page_that_a_node_has_taken_the_time_of_leaves_the_others_theirs(fleet: Stage) -> None:
    async def hang(request: bytes, context: Context) -> bytes:
        await asyncio.sleep(30)
        return b""

    fleet.nodes["bad"].behaviours[hostile.STATS] = hang
    fleet.nodes["good"].behaviours[hostile.STATS] = answering(named(GOOD))
    stats = stats_pb2_grpc.StatsServiceStub(fleet.channel)
    # One domain each: the first node alone would fill the page.
    first = await stats.BatchGetDomainStats(
        stats_pb2.BatchGetDomainStatsRequest(parent="nodes/-", page_size=1), timeout=2
    )
    assert ([one.name for one in first.stats], away(first)) == ([], ["nodes/bad"])
    assert first.next_page_token
    started = time.monotonic()
    second = await stats.BatchGetDomainStats(
        stats_pb2.BatchGetDomainStatsRequest(parent="nodes/-", page_size=1, page_token=first.next_page_token), timeout=2
    )
    assert ([one.name for one in second.stats], away(second)) == ([GOOD], [])
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("years", [1, -1])
async def test_a_clock_that_is_set_makes_no_node_silent(
    fleet: Stage, monkeypatch: pytest.MonkeyPatch, years: int
) -> None:
    real = time.time
    registry = fleet.app.registry
    stored = node_pb2.NodeStatus(state=node_pb2.NODE_STATE_READY)
    await eventually(
        lambda: asyncio.sleep(0, registry.judge("good", stored).state), lambda state: state == stored.state
    )
    monkeypatch.setattr(time, "time", lambda: real() + years * 365 * 86_400)
    assert registry.judge("good", stored).state == node_pb2.NODE_STATE_READY
    registry._index.sweep()
    assert fleet.app.index.packages["compute"].sources["good"].state == source.LIVE
    await asyncio.sleep(1.2)
    assert registry.judge("good", stored).state == node_pb2.NODE_STATE_READY


async def test_a_gateway_whose_disk_is_full_passes_calls_and_goes_on_when_there_is_room(fleet: Stage) -> None:
    def limit(tx: Transaction) -> None:
        pages = tx.connection.execute("PRAGMA page_count").fetchone()[0]
        tx.connection.execute(f"PRAGMA max_page_count = {pages}")
        # Whatever room is left in the pages that there are.
        for number in range(10_000):
            try:
                tx.put_record("filling", str(number), bytes(2000))
            except sqlite3.OperationalError:
                break

    store = fleet.app.store
    with contextlib.suppress(StoreUnwritable):
        await store.write(limit)
    await store.write(lambda tx: tx.connection.execute("PRAGMA max_page_count = 1").fetchone())
    fleet.nodes["good"].behaviours[hostile.GET] = answering(domain(GOOD, uid(1)).SerializeToString())
    await fleet.nodes["bad"].stop()
    domains = domain_pb2_grpc.DomainServiceStub(fleet.channel)
    await eventually(lambda: list_all(fleet), lambda answer: away(answer) == ["nodes/bad"])
    # Longer than the states of nodes are looked at, and cannot be stored.
    await asyncio.sleep(2.5)
    assert (await domains.GetDomain(domain_pb2.GetDomainRequest(name=GOOD))).uid == uid(1)
    await store.write(lambda tx: tx.connection.execute("PRAGMA max_page_count = 1000000").fetchone())
    nodes = node_pb2_grpc.NodeServiceStub(fleet.channel)
    await eventually(
        lambda: nodes.GetNode(node_pb2.GetNodeRequest(name="nodes/bad")),
        lambda node: node.status.state == node_pb2.NODE_STATE_NOT_READY,
    )

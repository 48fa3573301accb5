from __future__ import annotations

import asyncio

import pytest

from tests.integration.gateway.client import Watcher, create, failure, list_all
from tests.integration.gateway.nodes import details_of
from tests.integration.gateway.real import RealFleet, eventually
from virtfleet.compute.v1 import domain_pb2, domain_pb2_grpc
from virtfleet.compute.v1 import watch_pb2 as compute_watch
from virtfleet.compute.v1 import watch_pb2_grpc as compute_watch_grpc
from virtfleet.fleet.v1 import node_pb2
from virtfleet.type.v1 import resource_pb2, watch_pb2

pytestmark = pytest.mark.timeout(120)


# The watch over all nodes


async def test_past_events_of_all_nodes(fleet: RealFleet) -> None:
    await create(fleet, "n1", "a")
    await create(fleet, "n2", "b")
    domains = domain_pb2_grpc.DomainServiceStub(fleet.channel)
    for name in ("nodes/n1/domains/a", "nodes/n2/domains/b"):
        await domains.StartDomain(domain_pb2.StartDomainRequest(name=name))
    watch = compute_watch_grpc.WatchServiceStub(fleet.channel)
    answer = await watch.ListEvents(compute_watch.ListEventsRequest(parent="nodes/-"))
    assert [event.resource for event in answer.events] == ["nodes/n1/domains/a", "nodes/n2/domains/b"]


async def test_the_watch_tells_all_nodes_in_order(fleet: RealFleet) -> None:
    await create(fleet, "n1", "old")
    await eventually(lambda: list_all(fleet), lambda answer: len(answer.domains) == 1)
    watcher = Watcher(fleet)
    await watcher.until(lambda watch: watch.snapshot_ended)
    assert list(watcher.known) == ["nodes/n1/domains/old"]
    await asyncio.gather(create(fleet, "n1", "a", "b"), create(fleet, "n2", "c"))
    domains = domain_pb2_grpc.DomainServiceStub(fleet.channel)
    for number in range(20):
        domain = domain_pb2.Domain(name="nodes/n1/domains/a", labels={"n": str(number)})
        await domains.UpdateDomain(domain_pb2.UpdateDomainRequest(domain=domain))
    await domains.DeleteDomain(domain_pb2.DeleteDomainRequest(name="nodes/n1/domains/b"))
    await watcher.until(
        lambda watch: (
            "nodes/n1/domains/b" not in watch.known
            and "nodes/n2/domains/c" in watch.known
            and watch.known.get("nodes/n1/domains/a", domain_pb2.Domain()).generation == 21
        )
    )
    generations = [number for kind, name, number in watcher.history if name.endswith("/a") and kind == "put"]
    assert generations == sorted(generations)
    await watcher.stop()


async def test_a_token_holds_across_a_gateway_that_starts_anew(fleet: RealFleet) -> None:
    await create(fleet, "n1", "a")
    await create(fleet, "n2", "b", "gone")
    watcher = Watcher(fleet)
    await watcher.until(lambda watch: watch.snapshot_ended and len(watch.known) == 3 and not watch.resyncing)
    token = await watcher.stop()
    await fleet.stop_gateway()
    # What happens while no gateway is there is told out of the nodes' own logs.
    await fleet.start_gateway()
    await create(fleet, "n1", "c")
    domains = domain_pb2_grpc.DomainServiceStub(fleet.channel)
    await domains.DeleteDomain(domain_pb2.DeleteDomainRequest(name="nodes/n2/domains/gone"))
    await domains.StartDomain(domain_pb2.StartDomainRequest(name="nodes/n1/domains/a"))
    resumed = Watcher(fleet, resume_token=token)
    await resumed.until(
        lambda watch: (
            "nodes/n1/domains/c" in watch.known
            and ("delete", "nodes/n2/domains/gone", 0) in watch.history
            and watch.events
        )
    )
    await create(fleet, "n1", "d")
    await resumed.until(lambda watch: "nodes/n1/domains/d" in watch.known)
    # Nothing but what the client had not been told, no gap, and no snapshot.
    assert set(resumed.known) == {"nodes/n1/domains/c", "nodes/n1/domains/d"}
    assert watch_pb2.SOURCE_STATE_RESYNCING not in [state for _, state in resumed.statuses]
    assert len(resumed.events) == 1
    puts = [name for kind, name, _ in resumed.history if kind == "put"]
    assert len(puts) == len(set(puts))
    await resumed.stop()


async def test_a_token_that_a_node_does_not_know_any_more_is_told_as_resyncing(fleet: RealFleet) -> None:
    await create(fleet, "n1", "a")
    await create(fleet, "n2", "b")
    watcher = Watcher(fleet)
    await watcher.until(lambda watch: watch.snapshot_ended and len(watch.known) == 2 and not watch.resyncing)
    token = await watcher.stop()
    # The node loses its store: the same node, another history.
    node = fleet.nodes["n1"]
    await node.end()
    await fleet.wait_state("n1", node_pb2.NODE_STATE_NOT_READY)
    for file in node.state.glob("compute.db*"):
        file.unlink()
    await node.start()
    await fleet.wait_state("n1", node_pb2.NODE_STATE_READY, 30)
    await create(fleet, "n1", "fresh")
    resumed = Watcher(fleet, resume_token=token)
    await resumed.until(
        lambda watch: (
            ("nodes/n1", watch_pb2.SOURCE_STATE_RESYNCING) in watch.statuses
            and ("nodes/n1", watch_pb2.SOURCE_STATE_LIVE) in watch.statuses
            and "nodes/n1/domains/fresh" in watch.known
        )
    )
    assert not any(node == "nodes/n2" for node, _ in resumed.statuses)
    assert set(resumed.known) == {"nodes/n1/domains/fresh"}
    await resumed.stop()


async def test_a_snapshot_that_was_cut_begins_anew(fleet: RealFleet) -> None:
    await create(fleet, "n1", "a")
    await create(fleet, "n2", "b")
    await eventually(lambda: list_all(fleet), lambda answer: len(answer.domains) == 2)
    watcher = Watcher(fleet)
    await watcher.until(lambda watch: watch.token and not watch.snapshot_ended)
    token = await watcher.stop()
    resumed = Watcher(fleet, resume_token=token)
    await resumed.until(lambda watch: len(watch.known) == 2)
    await resumed.until(lambda watch: ("nodes/n2", watch_pb2.SOURCE_STATE_LIVE) in watch.statuses)
    await resumed.until(lambda watch: watch.snapshot_ended)
    await resumed.stop()


async def test_filters_and_views_of_a_watch(fleet: RealFleet) -> None:
    await create(fleet, "n1", "gold", labels={"tier": "gold"})
    await create(fleet, "n2", "iron", labels={"tier": "iron"})
    await eventually(lambda: list_all(fleet), lambda answer: len(answer.domains) == 2)
    watcher = Watcher(fleet, filter='labels.tier="gold"', view=resource_pb2.RESOURCE_VIEW_BASIC)
    await watcher.until(lambda watch: watch.snapshot_ended)
    assert list(watcher.known) == ["nodes/n1/domains/gold"]
    assert not watcher.known["nodes/n1/domains/gold"].HasField("spec")
    domains = domain_pb2_grpc.DomainServiceStub(fleet.channel)
    for name, tier in (("nodes/n2/domains/iron", "gold"), ("nodes/n1/domains/gold", "iron")):
        domain = domain_pb2.Domain(name=name, labels={"tier": tier})
        await domains.UpdateDomain(domain_pb2.UpdateDomainRequest(domain=domain))
    await watcher.until(lambda watch: list(watch.known) == ["nodes/n2/domains/iron"])
    assert ("delete", "nodes/n1/domains/gold", 0) in watcher.history
    await watcher.stop()
    error = await failure(Watcher(fleet, filter="spec.").call.read())
    assert details_of(error)["reason"] == "FILTER_SYNTAX"
    error = await failure(Watcher(fleet, resume_token="rubbish").call.read())
    assert details_of(error)["reason"] == "PAGE_TOKEN_INVALID"


async def test_a_list_says_where_a_watch_goes_on(fleet: RealFleet) -> None:
    await create(fleet, "n1", "a")
    answer = await eventually(lambda: list_all(fleet), lambda answer: len(answer.domains) == 1)
    await create(fleet, "n2", "b")
    watcher = Watcher(fleet, resume_token=answer.resume_token)
    await watcher.until(lambda watch: "nodes/n2/domains/b" in watch.known)
    assert list(watcher.known) == ["nodes/n2/domains/b"]
    await watcher.stop()


async def test_a_gateway_that_drains_ends_watches_with_a_token(fleet: RealFleet) -> None:
    await create(fleet, "n1", "a")
    watcher = Watcher(fleet)
    await watcher.until(lambda watch: watch.snapshot_ended and "nodes/n1/domains/a" in watch.known)
    await fleet.stop_gateway()
    async with asyncio.timeout(10):
        await watcher.task
    assert watcher.closing
    await fleet.start_gateway()
    await create(fleet, "n1", "b")
    resumed = Watcher(fleet, resume_token=watcher.token)
    await resumed.until(lambda watch: "nodes/n1/domains/b" in watch.known)
    assert list(resumed.known) == ["nodes/n1/domains/b"]
    await resumed.stop()

"""The states of nodes, and what must not change them: a clock that is set, a gateway that has just started."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.unit.gateway.test_enrollment import KINDS
from virtfleet.common.v1 import admin_pb2
from virtfleet.compute.v1 import host_pb2
from virtfleet.fleet.v1 import node_pb2, watch_pb2
from virtfleet.storage.v1 import pool_pb2
from virtfleet_gateway import presence as presences
from virtfleet_gateway.channels import Channels
from virtfleet_gateway.index import Index
from virtfleet_gateway.nodes import LOST_SECONDS, Registry
from virtfleet_gateway.presence import SERVING, UNREACHABLE
from virtfleet_gateway.shapes import Entry
from virtfleet_gateway.source import LOST, STALE
from virtfleet_service import resources
from virtfleet_service.store import Store

SERVICES = ("compute", "storage", "network")


class Nodes:
    """Is a registry with one node that no connection reaches."""

    def __init__(self, store: Store) -> None:
        self.store = store
        # Nobody listens on port 1; what is heard of the node is what a test says.
        self.channels = Channels(None, lambda *_: "")
        self.index = Index(self.channels)
        self.registry = Registry(store, self.channels, self.index)

    async def put(self, *, state: node_pb2.NodeState.ValueType, seen_seconds: float = 0.0) -> None:
        node = node_pb2.Node()
        resources.create_head(node, "nodes/n1")
        node.status.state = state
        if seen_seconds:
            node.status.last_seen_time.FromNanoseconds(int(seen_seconds * 1e9))
        for service in SERVICES:
            node.status.services.add(service=service, endpoint="127.0.0.1:1")
        await self.store.write(lambda tx: tx.put("node", node, cause="test"))

    def hear(self) -> None:
        """Let all services be heard now, and the index be complete."""
        for service in SERVICES:
            presence = self.registry._presences["n1"][service]
            presence.state = SERVING
            assert presence.lane is not None
            presence.lane.touch()
            self.index.packages[service].sources["n1"].synced = True

    def state(self) -> str:
        status = node_pb2.Node.FromString(self.store.need("nodes/n1").body).status
        state = self.registry.judge("n1", status).state
        return node_pb2.NodeState.Name(state).removeprefix("NODE_STATE_")

    async def close(self) -> None:
        await self.registry.close()
        await self.index.close()
        await self.channels.close()


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[Nodes]:
    async with Store.open(tmp_path / "g.db", package="virtfleet.fleet.v1", resource_types=KINDS) as store:
        made = Nodes(store)
        yield made
        await made.close()


@pytest.mark.parametrize("jump_seconds", [-86_400, 61, 86_400])
async def test_a_clock_that_is_set_loses_no_node(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch, jump_seconds: int
) -> None:
    await nodes.put(state=node_pb2.NODE_STATE_READY)
    nodes.registry.start()
    nodes.hear()
    assert nodes.state() == "READY"
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + jump_seconds)
    assert nodes.state() == "READY"


async def test_a_clock_that_is_set_back_hides_no_silence(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    await nodes.put(state=node_pb2.NODE_STATE_READY)
    nodes.registry.start()
    nodes.hear()
    right, steady = time.time, time.monotonic
    monkeypatch.setattr(time, "time", lambda: right() - 86_400)
    monkeypatch.setattr(time, "monotonic", lambda: steady() + 10)
    assert nodes.state() == "NOT_READY"
    monkeypatch.setattr(time, "monotonic", lambda: steady() + LOST_SECONDS + 1)
    assert nodes.state() == "LOST"


async def test_a_gateway_that_has_just_started_calls_no_node_lost_that_was_not(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    await nodes.put(state=node_pb2.NODE_STATE_READY, seen_seconds=time.time() - 86_400)
    nodes.registry.start()
    assert nodes.state() == "NOT_READY"
    steady = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: steady() + LOST_SECONDS + 1)
    assert nodes.state() == "LOST"


async def test_a_node_that_was_lost_stays_so_until_it_is_heard(nodes: Nodes) -> None:
    await nodes.put(state=node_pb2.NODE_STATE_LOST, seen_seconds=time.time() - 86_400)
    nodes.registry.start()
    assert nodes.state() == "LOST"
    nodes.hear()
    assert nodes.state() == "READY"
    nodes.registry._presences["n1"]["compute"].state = UNREACHABLE
    assert nodes.state() == "NOT_READY"


async def test_watchers_are_told_of_a_loss_by_the_clock_that_nobody_sets(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    await nodes.put(state=node_pb2.NODE_STATE_READY)
    nodes.registry.start()
    source = nodes.index.packages["compute"].sources["n1"]
    source.state, source.observe_seconds, source.observed = STALE, time.time(), time.monotonic()
    right, steady = time.time, time.monotonic
    monkeypatch.setattr(time, "time", lambda: right() + 86_400)
    nodes.index.sweep()
    assert source.state == STALE
    monkeypatch.setattr(time, "time", lambda: right() - 86_400)
    monkeypatch.setattr(time, "monotonic", lambda: steady() + LOST_SECONDS + 1)
    nodes.index.sweep()
    assert source.state == LOST


async def test_room_that_no_disk_has_leaves_the_list_of_nodes_alone(nodes: Nodes) -> None:
    await nodes.put(state=node_pb2.NODE_STATE_READY)
    nodes.registry.start()
    package = nodes.index.packages["storage"]
    for number in range(2):
        pool = pool_pb2.Pool(name=f"nodes/n1/pools/p{number}")
        pool.status.state = pool_pb2.POOL_STATE_RUNNING
        pool.status.capacity_bytes = pool.status.allocation_bytes = pool.status.available_bytes = (1 << 63) - 1
        kind = package.shape.kind_by_name["pool"]
        package.sources["n1"].tables["pool"][pool.name] = Entry(kind, pool.SerializeToString())
    host = host_pb2.Host(name="nodes/n1/host")
    kind = nodes.index.packages["compute"].shape.kind_by_name["host"]
    nodes.index.packages["compute"].sources["n1"].tables["host"][host.name] = Entry(kind, host.SerializeToString())
    described = nodes.registry.describe(node_pb2.Node.FromString(nodes.store.need("nodes/n1").body))
    assert described.status.capacity.storage_bytes == (1 << 63) - 1


def test_what_a_service_says_of_itself_is_bounded() -> None:
    said = admin_pb2.Server(version="v" * 100_000, boot_id="b" * 100_000, pid=1)
    said.certificate_expire_time.seconds = 1 << 60
    kept = presences._bounded(said)
    assert kept.ByteSize() < 200
    assert not kept.HasField("certificate_expire_time")


async def test_a_machine_that_was_booted_anew_is_an_event(nodes: Nodes) -> None:
    await nodes.put(state=node_pb2.NODE_STATE_READY)
    nodes.registry.start()
    nodes.hear()
    events: list[str] = []
    nodes.store.on_commit(
        lambda entries: events.extend(
            watch_pb2.EventType.keys()[entry.type] for entry in entries if entry.sort == "event"
        )
    )
    for boot_id in ("one", "one", "two"):
        nodes.registry._presences["n1"]["compute"].server = admin_pb2.Server(boot_id=boot_id)
        await nodes.registry._judge("n1")
    status = node_pb2.Node.FromString(nodes.store.need("nodes/n1").body).status
    assert status.boot_id == "two"
    assert events.count("EVENT_TYPE_NODE_BOOTED") == 1


async def test_silence_is_noticed_while_something_changes_all_the_time(nodes: Nodes) -> None:
    """As the room of busy nodes does, or the health of one that means harm."""
    await nodes.put(state=node_pb2.NODE_STATE_READY)
    nodes.registry.start()
    source = nodes.index.packages["network"].sources["n1"]
    source.state, source.observed = STALE, time.monotonic() - LOST_SECONDS - 1
    running = asyncio.create_task(nodes.registry.run())
    try:
        async with asyncio.timeout(5):
            while source.state != LOST:
                nodes.registry.changed("n1")
                await asyncio.sleep(0.01)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_what_changes_all_the_time_does_not_fill_the_log(nodes: Nodes) -> None:
    await nodes.put(state=node_pb2.NODE_STATE_READY)
    nodes.registry.start()
    nodes.hear()
    running = asyncio.create_task(nodes.registry.run())
    before = nodes.store.last_seq
    until = time.monotonic() + 2
    number = 0
    while time.monotonic() < until:
        number += 1
        nodes.registry._presences["n1"]["compute"].server = admin_pb2.Server(version=f"{number}")
        nodes.registry.changed("n1")
        await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert number > 200
    assert nodes.store.last_seq - before < 100

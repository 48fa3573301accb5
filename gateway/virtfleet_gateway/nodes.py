"""The nodes of the fleet: the registry in the gateway's store, and what each of them is doing.

What is asked of a node and its state are stored; figures that change all the time (when it was last heard, the state
of channels, what is allocated) are added when a node is read. A node enters by enrolment and leaves by DeleteNode;
either is noticed by its entry in the log of the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict
from typing import TYPE_CHECKING, Final

import grpc

from virtfleet.fleet.v1 import node_pb2, watch_pb2
from virtfleet_gateway.presence import NOT_SERVING, SERVING, UNREACHABLE, Presence
from virtfleet_gateway.source import LIVE, set_time
from virtfleet_service import resources
from virtfleet_service.errors import VirtfleetError
from virtfleet_service.names import node_of
from virtfleet_service.transaction import DELETE, PUT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from virtfleet_gateway.channels import Channels
    from virtfleet_gateway.index import Index
    from virtfleet_service.store import Store
    from virtfleet_service.transaction import Entry as LogEntry
    from virtfleet_service.transaction import Transaction

_log = logging.getLogger(__name__)

KIND: Final = "node"
LOST_SECONDS: Final = 60.0
SILENCE_SECONDS: Final = 4.5
"""After so long without a heartbeat a service does not count as serving, whatever its health said last."""

_LOOK_SECONDS: Final = 1.0
"""How often all nodes are judged."""
_PACE_SECONDS: Final = 0.03
"""How long changes are gathered after a look: what changes all the time must not fill the log."""

_OBSERVED: Final = "observed"

_CHANNEL_STATES: Final = {
    grpc.ChannelConnectivity.IDLE: node_pb2.CHANNEL_STATE_IDLE,
    grpc.ChannelConnectivity.CONNECTING: node_pb2.CHANNEL_STATE_CONNECTING,
    grpc.ChannelConnectivity.READY: node_pb2.CHANNEL_STATE_READY,
    grpc.ChannelConnectivity.TRANSIENT_FAILURE: node_pb2.CHANNEL_STATE_TRANSIENT_FAILURE,
    grpc.ChannelConnectivity.SHUTDOWN: node_pb2.CHANNEL_STATE_IDLE,
}

_EVENTS: Final = {
    node_pb2.NODE_STATE_READY: watch_pb2.EVENT_TYPE_NODE_READY,
    node_pb2.NODE_STATE_NOT_READY: watch_pb2.EVENT_TYPE_NODE_NOT_READY,
    node_pb2.NODE_STATE_LOST: watch_pb2.EVENT_TYPE_NODE_LOST,
}


class Judgement:
    """Is the state of a node with its reason."""

    __slots__ = ("message", "reason", "state")

    def __init__(self, state: node_pb2.NodeState.ValueType, reason: str = "", message: str = "") -> None:
        self.state = state
        self.reason = reason
        self.message = message


class Registry:
    """Knows the nodes, follows them, and keeps their states.

    Args:
        store: The gateway's store.
        channels: The lanes to the nodes.
        index: Their resources.
    """

    def __init__(self, store: Store, channels: Channels, index: Index) -> None:
        self._store = store
        self._channels = channels
        self._index = index
        self._endpoints: dict[str, dict[str, str]] = {}
        self._presences: dict[str, dict[str, Presence]] = {}
        self._tasks: dict[str, list[asyncio.Task[None]]] = defaultdict(list)
        self._cordoned: set[str] = set()
        self._dirty: set[str] = set()
        self._said: dict[str, str] = {}
        self._wake = asyncio.Event()

    # Life

    def start(self) -> None:
        """Follow all nodes of the store, and those that come."""
        for row in self._store.list(KIND):
            self._take(node_pb2.Node.FromString(row.body))
        self._store.on_commit(self._committed)

    async def run(self) -> None:
        """Judge nodes when something changes, and every second whatever changes. Runs until cancelled."""
        loop = asyncio.get_running_loop()
        due = loop.time() + _LOOK_SECONDS
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self._wake.wait()
            nodes = list(self._dirty)
            if loop.time() >= due:
                # By its own time and not only when all is quiet: who is silent is found by looking.
                due = loop.time() + _LOOK_SECONDS
                self._index.sweep()
                nodes = list(self._endpoints)
            self._wake.clear()
            self._dirty.clear()
            for node in nodes:
                try:
                    await self._judge(node)
                except VirtfleetError as error:
                    # The disk: the state is shown as it was, and judged again with the next change or second.
                    self._complain(node, error.message)
                else:
                    self._said.pop(node, None)
            await asyncio.sleep(_PACE_SECONDS)

    def _complain(self, node: str, text: str) -> None:
        if self._said.get(node) != text:
            self._said[node] = text
            _log.error("the state of a node cannot be recorded: %s", text, extra={"node": node})

    async def close(self) -> None:
        """Stop following."""
        tasks = [task for tasks in self._tasks.values() for task in tasks]
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def changed(self, node: str) -> None:
        """Note that something about a node may be different."""
        self._dirty.add(node)
        self._wake.set()

    def services(self) -> Mapping[str, Iterable[str]]:
        """Return the services of each node of the fleet."""
        return self._endpoints

    def cordoned(self, node: str) -> bool:
        """Tell whether a node takes no new domains."""
        return node in self._cordoned

    def knows_domain(self, name: str) -> bool:
        """Tell whether the index has a domain of that name."""
        source = self._index.sources(node_of(name)).get("compute")
        return source is not None and name in source.tables["domain"]

    def _committed(self, entries: Sequence[LogEntry]) -> None:
        for entry in entries:
            if entry.kind != KIND:
                continue
            if entry.sort == PUT:
                row = self._store.get(entry.name)
                if row is not None:
                    self._take(node_pb2.Node.FromString(row.body))
            elif entry.sort == DELETE and self._store.get(entry.name) is None:
                self._drop(entry.name.removeprefix("nodes/"))

    def _take(self, node: node_pb2.Node) -> None:
        name = node.name.removeprefix("nodes/")
        if node.spec.HasField("schedulable") and not node.spec.schedulable:
            self._cordoned.add(name)
        else:
            self._cordoned.discard(name)
        endpoints = {service.service: service.endpoint for service in node.status.services}
        if self._endpoints.get(name) == endpoints:
            return
        self._endpoints[name] = endpoints
        self._channels.put(name, endpoints)
        if node.status.HasField("last_seen_time"):
            for channels in (self._channels.node(name) or {}).values():
                channels.control.last_seen_seconds = node.status.last_seen_time.ToNanoseconds() / 1e9
        for task in self._tasks.pop(name, []):
            task.cancel()
        self._presences[name] = {
            service: Presence(name, service, self._channels, self.changed) for service in endpoints
        }
        loop = asyncio.get_running_loop()
        self._tasks[name] = [
            loop.create_task(presence.follow(), name=f"presence of {presence.service} on {name}")
            for presence in self._presences[name].values()
        ]
        self._index.follow(name, set(endpoints))

    def _drop(self, name: str) -> None:
        for task in self._tasks.pop(name, []):
            task.cancel()
        self._presences.pop(name, None)
        self._endpoints.pop(name, None)
        self._cordoned.discard(name)
        self._index.drop(name)
        self._channels.remove(name)

    # State

    def judge(self, name: str, stored: node_pb2.NodeStatus) -> Judgement:
        """Return the state of a node from what is heard of it now."""
        presences = self._presences.get(name, {})
        silent = [
            presence.service
            for presence in presences.values()
            if presence.state == SERVING and presence.quiet_seconds > SILENCE_SECONDS
        ]
        away = [presence.service for presence in presences.values() if presence.state not in (SERVING, NOT_SERVING)]
        waiting = [presence.service for presence in presences.values() if presence.state == NOT_SERVING]
        if not silent and not away and not waiting and presences:
            unread = [service for service, source in self._index.sources(name).items() if not source.synced]
            if not unread:
                return Judgement(node_pb2.NODE_STATE_READY)
            # Who sees a node ready may rely on finding its resources in the lists of the fleet.
            return Judgement(
                node_pb2.NODE_STATE_JOINING
                if stored.state == node_pb2.NODE_STATE_JOINING
                else node_pb2.NODE_STATE_NOT_READY,
                "INDEX_INCOMPLETE",
                f"The gateway has not read all of {', '.join(sorted(unread))} yet",
            )
        heard = any(presence.server is not None for presence in presences.values())
        if stored.state == node_pb2.NODE_STATE_JOINING and not heard:
            return Judgement(stored.state, stored.reason, stored.message)
        if stored.state == node_pb2.NODE_STATE_LOST and not any(presence.heard for presence in presences.values()):
            # A gateway that has just started knows no better.
            return Judgement(stored.state, stored.reason, stored.message)
        if min((presence.quiet_seconds for presence in presences.values()), default=0.0) > LOST_SECONDS:
            return Judgement(
                node_pb2.NODE_STATE_LOST, "HEARTBEAT_MISSED", f"No service has been heard for {LOST_SECONDS:.0f} s"
            )
        if away:
            return Judgement(
                node_pb2.NODE_STATE_NOT_READY, "SERVICE_UNREACHABLE", f"Does not answer: {', '.join(sorted(away))}"
            )
        if silent:
            return Judgement(
                node_pb2.NODE_STATE_NOT_READY, "HEARTBEAT_MISSED", f"Has gone silent: {', '.join(sorted(silent))}"
            )
        return Judgement(
            node_pb2.NODE_STATE_NOT_READY, "SERVICE_NOT_SERVING", f"Takes no calls: {', '.join(sorted(waiting))}"
        )

    async def _judge(self, name: str) -> None:
        row = self._store.get(f"nodes/{name}")
        if row is None or not self._differs(name, node_pb2.Node.FromString(row.body)):
            return
        await self._store.write(lambda tx: self._record(tx, name))

    def _differs(self, name: str, node: node_pb2.Node) -> bool:
        verdict = self.judge(name, node.status)
        if (verdict.state, verdict.reason, verdict.message) != (
            node.status.state,
            node.status.reason,
            node.status.message,
        ):
            return True
        status = node_pb2.NodeStatus()
        status.CopyFrom(node.status)
        self._note_servers(name, status)
        return status != node.status

    def _record(self, tx: Transaction, name: str) -> None:
        row = tx.get(f"nodes/{name}")
        if row is None:
            return
        node = node_pb2.Node.FromString(row.body)
        verdict = self.judge(name, node.status)
        before, boot_id = node.status.state, node.status.boot_id
        self._note_servers(name, node.status)
        node.status.observed_generation = node.generation
        moved = verdict.state != before
        if moved:
            node.status.state_change_time.CopyFrom(resources.now())
        node.status.state, node.status.reason, node.status.message = verdict.state, verdict.reason, verdict.message
        self._note_seen(name, node.status)
        tx.put(KIND, node, cause=_OBSERVED)
        if boot_id and node.status.boot_id != boot_id:
            tx.event(
                watch_pb2.Event(
                    resource=node.name,
                    uid=node.uid,
                    type=watch_pb2.EVENT_TYPE_NODE_BOOTED,
                    reason="BOOT_ID_CHANGED",
                    message=f"Node {name} has been booted anew",
                )
            )
        if moved and verdict.state in _EVENTS:
            tx.event(
                watch_pb2.Event(
                    resource=node.name,
                    uid=node.uid,
                    type=_EVENTS[verdict.state],
                    reason=verdict.reason or "SERVING",
                    message=verdict.message or f"Node {name} is ready",
                    node_state_changed=watch_pb2.NodeStateChanged(old_state=before, new_state=verdict.state),
                )
            )

    def _note_servers(self, name: str, status: node_pb2.NodeStatus) -> None:
        """Take over what the services have said of themselves."""
        presences = self._presences.get(name, {})
        for service in status.services:
            presence = presences.get(service.service)
            if presence is None:
                continue
            service.state = presence.state
            if presence.server is not None:
                service.version = presence.server.version
                if presence.server.HasField("certificate_expire_time"):
                    service.certificate_expire_time.CopyFrom(presence.server.certificate_expire_time)
                if presence.server.boot_id:
                    status.boot_id = presence.server.boot_id

    def _note_seen(self, name: str, status: node_pb2.NodeStatus) -> None:
        seen = max((one.last_seen_seconds for one in self._presences.get(name, {}).values()), default=0.0)
        if seen:
            set_time(status.last_seen_time, seen)

    # Reading

    def describe(self, node: node_pb2.Node) -> node_pb2.Node:
        """Add to a stored node what is known at this moment; changes it in place."""
        name = node.name.removeprefix("nodes/")
        presences = self._presences.get(name, {})
        sources = self._index.sources(name)
        self._note_seen(name, node.status)
        observed: list[float] = []
        for service in node.status.services:
            presence, source = presences.get(service.service), sources.get(service.service)
            if presence is not None:
                self._describe_channel(service, presence)
            if source is not None and source.observe_seconds:
                set_time(service.index_observe_time, source.observe_seconds)
                observed.append(source.observe_seconds)
        if observed and len(observed) == len(node.status.services):
            set_time(node.status.index_observe_time, min(observed))
        self._describe_room(name, node.status)
        return node

    @staticmethod
    def _describe_channel(service: node_pb2.NodeServiceStatus, presence: Presence) -> None:
        lane = presence.lane
        if lane is None:
            return
        service.channel_state = _CHANNEL_STATES[lane.state]
        service.channel_error = presence.error if presence.state == UNREACHABLE else ""
        service.state = presence.state
        if lane.last_seen_seconds:
            set_time(service.last_seen_time, lane.last_seen_seconds)

    def _describe_room(self, name: str, status: node_pb2.NodeStatus) -> None:
        """Add what the node has, may give and has given, from its host and its running pools."""
        from virtfleet.compute.v1 import host_pb2
        from virtfleet.storage.v1 import pool_pb2

        sources = self._index.sources(name)
        compute, storage = sources.get("compute"), sources.get("storage")
        hosts = compute.tables["host"].values() if compute is not None else ()
        for entry in hosts:
            host = host_pb2.Host.FromString(entry.full).status
            status.capacity.vcpu_count = host.cpu.online_count
            status.capacity.memory_bytes = host.memory_total_bytes
            for mine, theirs in ((status.allocatable, host.allocatable), (status.allocated, host.allocated)):
                mine.vcpu_count, mine.memory_bytes = theirs.vcpu_count, theirs.memory_bytes
                mine.domain_count = theirs.domain_count
        for entry in storage.tables["pool"].values() if storage is not None else ():
            pool = pool_pb2.Pool.FromString(entry.full).status
            if pool.state == pool_pb2.POOL_STATE_RUNNING:
                _add(status.capacity, pool.capacity_bytes)
                _add(status.allocatable, pool.allocation_bytes, pool.available_bytes)
                _add(status.allocated, pool.allocation_bytes)

    def unreachable(self) -> list[str]:
        """Return the ids of the nodes that are not heard now, sorted."""
        return sorted(
            name
            for name, sources in ((name, self._index.sources(name)) for name in self._endpoints)
            if any(source.state != LIVE for source in sources.values())
        )


def _add(room: node_pb2.NodeResources, *more_bytes: int) -> None:
    """Add what a node says of its pools; whatever that is, the sum is a number that a message holds."""
    room.storage_bytes = min(room.storage_bytes + sum(max(part, 0) for part in more_bytes), (1 << 63) - 1)

"""What the gateway knows of the nodes' resources: their bytes, by node, kind and name, fed by one watch a service.

A source follows one service of one node: first by a snapshot, then by its log, resumed by token after each break. What
it hears goes into the tables here and, for the watchers of the fleet, into the feed of its package. A node that stops
talking is noticed by its missing heartbeat and told as stale; what was last heard of it is kept.
"""

from __future__ import annotations

import asyncio
import bisect
import logging
import time
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio

from virtfleet.type.v1 import resource_pb2, watch_pb2
from virtfleet_gateway.feed import RING_LIMIT_BYTES, Feed
from virtfleet_gateway.routing import SERVICES
from virtfleet_gateway.shapes import MARKER_BOOKMARK, MARKER_SNAPSHOT_END, Change, Entry, Shape, Sort
from virtfleet_service.errors import NodeUnknown, NodeUnreachable, VirtfleetError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from google.protobuf.timestamp_pb2 import Timestamp

    from virtfleet_gateway.channels import Channels, Lane

_log = logging.getLogger(__name__)

HEARTBEAT_SECONDS: Final = 1
"""How often a quiet node says that there is nothing new."""
SILENCE_SECONDS: Final = 4.0
"""After so long without a word a stream counts as broken."""
LOST_SECONDS: Final = 60.0
"""After so long a node counts as lost, and its part begins anew with a snapshot when it returns."""
_RETRY_SECONDS: Final = 0.5
_RETRY_LIMIT_SECONDS: Final = 5.0

LIVE: Final = watch_pb2.SOURCE_STATE_LIVE
STALE: Final = watch_pb2.SOURCE_STATE_STALE
RESYNCING: Final = watch_pb2.SOURCE_STATE_RESYNCING
LOST: Final = watch_pb2.SOURCE_STATE_LOST

_OF_NODE: Final = frozenset({"host", "pool"})
"""Kinds that a node's own resource takes figures from."""

_GONE: Final = frozenset({grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.INVALID_ARGUMENT})
"""How a node says that it does not know a resume token any more."""


class Source:
    """Is what is known of one service of one node.

    Attributes:
        node: The node.
        shape: The package.
        state: LIVE, STALE or LOST; RESYNCING until its first snapshot is complete.
        synced: Whether a snapshot has ever been complete.
        token: The node's own resume token after all that is known; empty: there is none.
        observe_seconds: When the index last agreed with the node, as `time.time()`; 0: never.
        observed: The same as `time.monotonic()`, which nobody sets.
    """

    def __init__(self, node: str, shape: Shape) -> None:
        self.node = node
        self.shape = shape
        self.state: watch_pb2.SourceState.ValueType = RESYNCING
        self.synced = False
        self.token = ""
        self.observe_seconds = 0.0
        self.observed = 0.0
        self.failure: VirtfleetError | None = None
        self.heard = time.monotonic()
        self.call: Any = None
        self.tables: dict[str, dict[str, Entry]] = {kind: {} for kind in shape.kind_by_name}
        self._sorted: dict[str, list[str]] = {}
        self._prefix = f"nodes/{node}/"

    def owns(self, name: str) -> bool:
        """Tell whether a name is one of this node: a node may speak of its own resources only."""
        return name.startswith(self._prefix)

    def speaks_of(self, change: Change) -> bool:
        """Tell whether a change is about this node, or a move from or to it."""
        if change.sort is Sort.EVENT and change.name in ("", self._prefix[:-1]):
            return True
        return self.owns(change.name) or (change.sort is Sort.MOVED and self.owns(change.new_name))

    @property
    def shown_state(self) -> watch_pb2.SourceState.ValueType:
        """The state as watchers are told it: a node that has never been heard is away, not on its way."""
        return STALE if self.failure is not None and not self.synced else self.state

    def names(self, kind: str) -> list[str]:
        """Return the names of a kind, sorted."""
        found = self._sorted.get(kind)
        if found is None:
            found = self._sorted[kind] = sorted(self.tables[kind])
        return found

    def apply(self, changes: list[Change]) -> list[Change]:
        """Take changes into the tables; returns those that count."""
        taken = []
        for change in changes:
            if not self.speaks_of(change):
                _log.warning("node %s speaks of %s, which is not its own", self.node, change.name)
                continue
            table = self.tables.get(change.kind)
            if change.entry is not None and table is not None:
                change.previous = table.get(change.name)
                if change.previous is None:
                    self._sorted.pop(change.kind, None)
                table[change.name] = change.entry
            elif change.sort in (Sort.DELETE, Sort.MOVED) and table is not None:
                change.previous = table.pop(change.name, None)
                if change.previous is not None:
                    self._sorted.pop(change.kind, None)
            taken.append(change)
        return taken

    def replace(self, entries: dict[str, dict[str, Entry]]) -> None:
        """Put a complete snapshot in the place of what was known."""
        self.tables = entries
        self._sorted.clear()

    def entries(self) -> Iterator[Entry]:
        """Return all resources, by kind and name."""
        for kind in self.tables:
            table = self.tables[kind]
            for name in self.names(kind):
                yield table[name]

    def status(self, state: watch_pb2.SourceState.ValueType) -> watch_pb2.WatchSourceStatus:
        """Return what watchers are told about the node."""
        status = watch_pb2.WatchSourceStatus(node=f"nodes/{self.node}", state=state)
        if self.failure is not None and state in (STALE, LOST):
            status.status.CopyFrom(self.failure.to_status())
        if self.observe_seconds:
            set_time(status.observe_time, self.observe_seconds)
        return status


def set_time(field: Timestamp, seconds: float) -> None:
    """Set a timestamp from `time.time()`."""
    field.FromNanoseconds(int(seconds * 1e9))


class PackageIndex:
    """Is the index of one package: a source a node, and their feed.

    Args:
        service: `compute`, `storage` or `network`.
        channels: The lanes to the nodes.
        on_change: Called with the node when a source changes its state or hears of the host.
        ring_bytes: How much of the newest changes the feed holds.
    """

    def __init__(
        self,
        service: str,
        channels: Channels,
        on_change: Callable[[str], None] = lambda _: None,
        *,
        ring_bytes: int = RING_LIMIT_BYTES,
    ) -> None:
        self.shape = Shape(service)
        self.feed = Feed(limit_bytes=ring_bytes)
        self.sources: dict[str, Source] = {}
        self._channels = channels
        self._on_change = on_change
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._moves: dict[tuple[str, str, str], None] = {}
        self._settled = asyncio.Event()

    # Nodes

    def follow(self, node: str) -> None:
        """Begin to follow a node, or begin anew because its endpoint has changed."""
        old = self._tasks.pop(node, None)
        if old is not None:
            old.cancel()
        source = self.sources.get(node)
        if source is None:
            source = self.sources[node] = Source(node, self.shape)
            self._settled.clear()
        self._tasks[node] = asyncio.get_running_loop().create_task(
            self._follow(source), name=f"index of {self.shape.service} on {node}"
        )

    def drop(self, node: str) -> None:
        """Forget a node that has been removed; watchers are told LOST."""
        task = self._tasks.pop(node, None)
        if task is not None:
            task.cancel()
        source = self.sources.pop(node, None)
        if source is not None:
            source.failure = NodeUnknown(f"Node {node} has been removed from the fleet", node=node)
            self.feed.append(node, "", status=source.status(LOST))
            self.feed.forget(node)
            self._check_settled()

    async def close(self) -> None:
        """Stop following."""
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def nodes(self) -> list[str]:
        """The ids of the nodes, sorted."""
        return sorted(self.sources)

    def tokens(self) -> dict[str, str]:
        """Return the nodes' own tokens at the head of the feed."""
        return {node: self.sources[node].token for node in sorted(self.sources) if self.sources[node].token}

    async def settled(self, seconds: float) -> None:
        """Wait until every node has told its resources once or is known to be away, but no longer than that."""
        if not self._settled.is_set():
            self._check_settled()
            try:
                async with asyncio.timeout(seconds):
                    await self._settled.wait()
            except TimeoutError:
                return

    def _check_settled(self) -> None:
        if all(source.synced or source.failure is not None for source in self.sources.values()):
            self._settled.set()

    # Lists

    def names_after(self, node: str, kind: str, after: str) -> list[str]:
        """Return the names of a kind on a node that come behind one, sorted."""
        names = self.sources[node].names(kind)
        return names[bisect.bisect_right(names, after) :] if after else names

    def by_uid(self, kind: str, uid: str) -> list[Entry]:
        """Return the resources of a kind with a uid: one, or more while one moves."""
        return [entry for source in self.sources.values() for entry in source.tables[kind].values() if entry.uid == uid]

    def by_id(self, kind: str, suffix: str) -> list[Entry]:
        """Return the resources of a kind whose names are `nodes/{any}/` and the suffix."""
        found = (source.tables[kind].get(f"nodes/{node}/{suffix}") for node, source in sorted(self.sources.items()))
        return [entry for entry in found if entry is not None]

    # Following

    async def _follow(self, source: Source) -> None:
        pause = _RETRY_SECONDS
        while True:
            source.heard = time.monotonic()
            try:
                lane = self._lane(source)
                await lane.up(None)
                await self._stream(source, lane)
                pause = _RETRY_SECONDS
            except NodeUnreachable as error:
                self._broken(source, error)
            except grpc.aio.AioRpcError as error:
                if error.code() in _GONE and source.token:
                    source.token = ""
                    continue
                self._broken(source, _lane_error(self._channels, source, error))
            except (grpc.aio.UsageError, ValueError) as error:
                # The channel was replaced under the stream, or the node says what no release of it would say.
                self._broken(source, _lane_error(self._channels, source, error))
            except NodeUnknown:
                return
            except Exception as error:  # noqa: BLE001  # the boundary to one node: what it says must not end the task
                _log.exception("what node %s says cannot be taken", source.node)
                self._broken(source, _lane_error(self._channels, source, error))
            await asyncio.sleep(pause)
            pause = min(pause * 2, _RETRY_LIMIT_SECONDS) if source.state != LIVE else _RETRY_SECONDS

    def _lane(self, source: Source) -> Lane:
        services = self._channels.node(source.node) or {}
        channels = services.get(self.shape.service)
        if channels is None:
            raise NodeUnknown(f"Node {source.node} has no service {self.shape.service}", node=source.node)
        return channels.control

    async def _stream(self, source: Source, lane: Lane) -> None:
        """Follow the node over one stream until it ends."""
        request = self.shape.messages.WatchResourcesRequest(
            parent=f"nodes/{source.node}", view=resource_pb2.RESOURCE_VIEW_FULL
        )
        request.bookmark_interval.FromSeconds(HEARTBEAT_SECONDS)
        fresh: dict[str, dict[str, Entry]] | None = None
        if source.token and source.synced and source.state != LOST:
            request.resume_token = source.token
        else:
            request.snapshot.SetInParent()
            fresh = {kind: {} for kind in self.shape.kind_by_name}
        start: Any = lane.callable(self.shape.watch_path, client_streaming=False, server_streaming=True)
        call = source.call = start(request.SerializeToString())
        try:
            while (data := await call.read()) is not grpc.aio.EOF:
                source.heard = time.monotonic()
                lane.touch()
                source.observe_seconds, source.observed = lane.last_seen_seconds, lane.heard_seconds
                changes, token, marker, _ = self.shape.response(data)
                if fresh is not None:
                    fresh = self._gather(source, fresh, changes, token, marker)
                else:
                    self._take(source, changes, token, marker)
            code = await call.code()
            if code is not grpc.StatusCode.OK:
                raise grpc.aio.AioRpcError(
                    code, grpc.aio.Metadata(), await call.trailing_metadata(), await call.details()
                )
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Not this task was cancelled but its call, by the sweep.
            raise lane.unreachable(sent=True, cause=f"no word for {SILENCE_SECONDS:.0f} s") from None
        finally:
            source.call = None
            call.cancel()

    def _gather(
        self,
        source: Source,
        fresh: dict[str, dict[str, Entry]],
        changes: list[Change],
        token: str,
        marker: int,
    ) -> dict[str, dict[str, Entry]] | None:
        """Collect a snapshot; at its end put it in place and tell the watchers. Returns None then."""
        for change in changes:
            if change.entry is not None and source.owns(change.name):
                fresh[change.kind][change.name] = change.entry
            elif change.sort in (Sort.DELETE, Sort.MOVED) and change.kind in fresh:
                # What has changed since the snapshot began comes before its end.
                fresh[change.kind].pop(change.name, None)
        if marker != MARKER_SNAPSHOT_END:
            return fresh
        source.replace(fresh)
        source.token, source.synced, source.state, source.failure = token, True, LIVE, None
        self.feed.append(source.node, token, snapshot=list(source.entries()))
        self._check_settled()
        self._on_change(source.node)
        return None

    def _take(self, source: Source, changes: list[Change], token: str, marker: int) -> None:
        status = None
        if source.state != LIVE:
            source.state, source.failure = LIVE, None
            status = source.status(LIVE)
        taken = self._without_echoes(source, source.apply(changes)) if changes else []
        if token:
            source.token = token
        if taken or status is not None:
            self.feed.append(source.node, source.token, taken, status=status)
        elif marker == MARKER_BOOKMARK:
            self.feed.place(source.node, source.token)
        if status is not None or any(change.kind in _OF_NODE for change in taken):
            self._on_change(source.node)

    def _without_echoes(self, source: Source, changes: list[Change]) -> list[Change]:
        """Leave the second half of a move out: the first one has told all of it.

        A node that says that it has taken over what is another's must know its uid: its word alone takes nothing away.
        """
        if not any(change.sort is Sort.MOVED for change in changes):
            return changes
        kept = []
        for change in changes:
            if change.sort is Sort.MOVED:
                move = change.uid, change.name, change.new_name
                if move in self._moves:
                    del self._moves[move]
                    continue
                old = self.sources.get(([*change.name.split("/", 2), ""])[1])
                held = old.tables.get(change.kind, {}).get(change.name) if old is not None else None
                if held is not None and held.uid != change.uid and old is not source:
                    _log.warning(
                        "node %s says that it has taken over %s, and does not know it", source.node, change.name
                    )
                    continue
                self._moves[move] = None
                while len(self._moves) > 10_000:
                    self._moves.pop(next(iter(self._moves)))
                if old is not None and held is not None:
                    del old.tables[change.kind][change.name]
                    old._sorted.pop(change.kind, None)  # noqa: SLF001
            kept.append(change)
        return kept

    def _broken(self, source: Source, error: VirtfleetError) -> None:
        """Tell that a node is away; nothing is forgotten."""
        source.failure = error
        if source.state == LIVE:
            source.state = STALE
            self.feed.append(source.node, source.token, status=source.status(STALE))
            self._on_change(source.node)
        self._check_settled()

    def sweep(self) -> None:
        """End streams that have gone silent, and tell which nodes are lost. Called every second."""
        now = time.monotonic()
        for source in self.sources.values():
            if source.call is not None and now - source.heard > SILENCE_SECONDS:
                source.call.cancel()
            if source.state == STALE and source.observed and now - source.observed > LOST_SECONDS:
                source.state = LOST
                self.feed.append(source.node, source.token, status=source.status(LOST))
                self._on_change(source.node)


def _lane_error(channels: Channels, source: Source, error: Exception) -> VirtfleetError:
    services = channels.node(source.node) or {}
    known = services.get(source.shape.service)
    cause = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
    if known is None:
        return NodeUnknown(f"The fleet has no node {source.node}", node=source.node)
    return known.control.unreachable(sent=True, cause=cause or "the stream ended")


class Index:
    """Holds the index of every package.

    Args:
        channels: The lanes to the nodes.
        on_change: Called with a node when something of note changes there.
        ring_bytes: How much of the newest changes the feed of each package holds.
    """

    def __init__(
        self,
        channels: Channels,
        on_change: Callable[[str], None] = lambda _: None,
        *,
        ring_bytes: int = RING_LIMIT_BYTES,
    ) -> None:
        self.packages: Mapping[str, PackageIndex] = {
            service: PackageIndex(service, channels, on_change, ring_bytes=ring_bytes) for service in SERVICES
        }

    def follow(self, node: str, services: set[str]) -> None:
        """Follow the services of a node."""
        for service, package in self.packages.items():
            if service in services:
                package.follow(node)
            else:
                package.drop(node)

    def drop(self, node: str) -> None:
        """Forget a node."""
        for package in self.packages.values():
            package.drop(node)

    def sources(self, node: str) -> dict[str, Source]:
        """Return the sources of a node by service."""
        return {service: package.sources[node] for service, package in self.packages.items() if node in package.sources}

    def sweep(self) -> None:
        """See `PackageIndex.sweep`."""
        for package in self.packages.values():
            package.sweep()

    async def close(self) -> None:
        """Stop following."""
        await asyncio.gather(*(package.close() for package in self.packages.values()))

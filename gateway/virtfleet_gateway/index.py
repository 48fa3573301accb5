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

from virtfleet.type.v1 import resource_pb2
from virtfleet_gateway import wire
from virtfleet_gateway.channels import unknown
from virtfleet_gateway.feed import RING_LIMIT_BYTES, Feed
from virtfleet_gateway.moves import Moves
from virtfleet_gateway.routing import SERVICES
from virtfleet_gateway.shapes import MARKER_BOOKMARK, MARKER_SNAPSHOT_END, Change, Entry, Shape, Sort
from virtfleet_gateway.source import LIVE, LOST, NODE_LIMIT_BYTES, STALE, Gathering, Holders, Source, node_of
from virtfleet_service.errors import NodeUnknown, NodeUnreachable, VirtfleetError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from virtfleet_gateway.channels import Channels, Lane

_log = logging.getLogger(__name__)

HEARTBEAT_SECONDS: Final = 1
"""How often a quiet node says that there is nothing new."""
SILENCE_SECONDS: Final = 4.0
"""After so long without a word a stream counts as broken."""
LOST_SECONDS: Final = 60.0
"""After so long a node counts as lost, and its part begins anew with a snapshot when it returns."""
PATIENCE_SECONDS: Final = 10.0
"""For so long whoever reads the index waits for the first snapshot of a node; then the node is one that is away."""
_RETRY_SECONDS: Final = 0.5
_RETRY_LIMIT_SECONDS: Final = 5.0
_STEADY_SECONDS: Final = 10.0

_OF_NODE: Final = frozenset({"host", "pool"})
"""Kinds that a node's own resource takes figures from."""

_CAUSE_CHARACTERS = 500
GONE: Final = frozenset({grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.INVALID_ARGUMENT})
"""How a node says that it does not know a resume token any more."""


class PackageIndex:
    """Is the index of one package: a source a node, and their feed.

    Args:
        service: `compute`, `storage` or `network`.
        channels: The lanes to the nodes.
        on_change: Called with the node when a source changes its state or hears of the host.
        ring_bytes: How much of the newest changes the feed holds.
        node_bytes: How much one node may have.
    """

    def __init__(
        self,
        service: str,
        channels: Channels,
        on_change: Callable[[str], None] = lambda _: None,
        *,
        ring_bytes: int = RING_LIMIT_BYTES,
        node_bytes: int = NODE_LIMIT_BYTES,
    ) -> None:
        self.shape = Shape(service)
        self.feed = Feed(limit_bytes=ring_bytes)
        self.sources: dict[str, Source] = {}
        self._node_bytes = node_bytes
        self._holders = Holders()
        self._channels = channels
        self._on_change = on_change
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._moves = Moves(self.sources)
        self._settled = asyncio.Event()

    # Nodes

    def follow(self, node: str) -> None:
        """Begin to follow a node, or begin anew because its endpoint has changed."""
        old = self._tasks.pop(node, None)
        if old is not None:
            old.cancel()
        source = self.sources.get(node)
        if source is None:
            source = self.sources[node] = Source(node, self.shape, self._holders, limit_bytes=self._node_bytes)
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
            source.replace({kind: {} for kind in self.shape.kind_by_name})
            source.failure = NodeUnknown(f"Node {node} has been removed from the fleet", node=f"nodes/{node}")
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
        # A snapshot may have no end: nobody waits for that again and again.
        since = time.monotonic() - PATIENCE_SECONDS
        if all(source.synced or source.failure is not None or source.began < since for source in self.sources.values()):
            self._settled.set()

    # Lists

    def names_after(self, node: str, kind: str, after: str) -> list[str]:
        """Return the names of a kind on a node that come behind one, sorted."""
        names = self.sources[node].names(kind)
        return names[bisect.bisect_right(names, after) :] if after else names

    def by_uid(self, kind: str, uid: str) -> list[Entry]:
        """Return the resources of a kind with a uid: one, or more while one moves."""
        return [entry for entry in self._holders.find(uid) if entry.kind.name == kind]

    def by_id(self, kind: str, suffix: str) -> list[Entry]:
        """Return the resources of a kind whose names are `nodes/{any}/` and the suffix."""
        found = (source.tables[kind].get(f"nodes/{node}/{suffix}") for node, source in sorted(self.sources.items()))
        return [entry for entry in found if entry is not None]

    def subject(self, change: Change) -> Entry | None:
        """Return the resource that a change is about, as it is now; None: there is none."""
        source = self.sources.get(node_of(change.name))
        return source.tables.get(change.kind, {}).get(change.name) if source is not None else None

    # Following

    async def _follow(self, source: Source) -> None:
        pause = _RETRY_SECONDS
        while True:
            begun = source.heard = time.monotonic()
            ended = False
            try:
                lane = self._lane(source)
                await lane.up(None)
                await self._stream(source, lane)
                ended = True
            except NodeUnreachable as error:
                self._broken(source, error)
            except grpc.aio.AioRpcError as error:
                if error.code() in GONE and source.token:
                    source.token = ""
                    continue
                self._broken(source, _lane_error(self._channels, source, error))
            except (grpc.aio.BaseError, wire.WireError) as error:
                # The channel was replaced under the stream, or the node says what no release of it would say.
                self._broken(source, _lane_error(self._channels, source, error))
            except NodeUnknown:
                return
            except Exception as error:  # noqa: BLE001 - the boundary of what a node says: it must not end the following
                _log.exception("the index of %s cannot take what %s says", self.shape.service, source.node)
                self._broken(source, _lane_error(self._channels, source, error))
            # A stream that has stood shows a node that is there; one that flaps is asked less and less often.
            if ended or time.monotonic() - begun > _STEADY_SECONDS:
                pause = _RETRY_SECONDS
            await asyncio.sleep(pause)
            pause = min(pause * 2, _RETRY_LIMIT_SECONDS)

    def _lane(self, source: Source) -> Lane:
        services = self._channels.node(source.node) or {}
        channels = services.get(self.shape.service)
        if channels is None:
            raise unknown(source.node, self.shape.service)
        return channels.control

    async def _stream(self, source: Source, lane: Lane) -> None:
        """Follow the node over one stream until it ends."""
        request = self.shape.messages.WatchResourcesRequest(
            parent=f"nodes/{source.node}", view=resource_pb2.RESOURCE_VIEW_FULL
        )
        request.bookmark_interval.FromSeconds(HEARTBEAT_SECONDS)
        fresh: Gathering | None = None
        if source.token and source.synced and source.state != LOST:
            request.resume_token = source.token
        else:
            request.snapshot.SetInParent()
            fresh = Gathering(source)
        start: Any = lane.callable(self.shape.watch_path, client_streaming=False, server_streaming=True)
        call = source.call = start(request.SerializeToString())
        try:
            while (data := await call.read()) is not grpc.aio.EOF:
                source.heard = time.monotonic()
                lane.touch()
                source.observe_seconds, source.observed = lane.last_seen_seconds, lane.heard_seconds
                changes, token, marker, _ = self.shape.response(data)
                if fresh is None:
                    await self._moves.departed(source, changes)
                    self._take(source, changes, token, marker)
                    continue
                fresh.take(changes)
                if marker == MARKER_SNAPSHOT_END:
                    self._replace(source, fresh, token)
                    fresh = None
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

    def _replace(self, source: Source, fresh: Gathering, token: str) -> None:
        """Put a snapshot that is complete in place, and tell the watchers."""
        source.replace(fresh.tables)
        source.token, source.synced, source.state, source.failure = token, True, LIVE, None
        self.feed.append(source.node, token, snapshot=list(source.entries()))
        self._warn_of_twins(source, source.entries())
        self._check_settled()
        self._on_change(source.node)

    def _take(self, source: Source, changes: list[Change], token: str, marker: int) -> None:
        applied = source.apply(changes) if changes else []
        status = None
        if source.state != LIVE:
            source.state, source.failure = LIVE, None
            status = source.status(LIVE)
        taken = self._news(source, applied)
        if token:
            source.token = token
        if taken or status is not None:
            self.feed.append(source.node, source.token, taken, status=status)
        elif marker == MARKER_BOOKMARK:
            self.feed.place(source.node, source.token)
        if status is not None or any(change.kind in _OF_NODE for change in taken):
            self._on_change(source.node)

    def _news(self, source: Source, changes: list[Change]) -> list[Change]:
        """Return what watchers are told of the changes of a node: of the two halves of a move one."""
        kept = [change for change in changes if change.sort is not Sort.MOVED or self._moves.is_news(source, change)]
        self._warn_of_twins(source, (change.entry for change in kept if change.entry and change.previous is None))
        return kept

    def _warn_of_twins(self, source: Source, entries: Iterable[Entry]) -> None:
        """Say that two nodes have resources with one uid, and are both there: one was copied, or lies."""
        twins = [(entry, other) for entry in entries for other in self._twins(source, entry)]
        if twins:
            entry, other = twins[0]
            _log.warning("%s and %s have the uid %s both (%d such)", other.name, entry.name, entry.uid, len(twins))

    def _twins(self, source: Source, entry: Entry) -> Iterator[Entry]:
        for other in self._holders.find(entry.uid):
            if other is not entry and not source.owns(other.name):
                elsewhere = self.sources.get(node_of(other.name))
                if elsewhere is not None and elsewhere.state == LIVE:
                    yield other

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
        return unknown(source.node)
    cause = cause[:_CAUSE_CHARACTERS] if cause else ""
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

"""The watch over all nodes of one package.

A reader follows the feed. Where it comes with a token that the feed does not reach back to (the gateway is new, or the
reader was away for long), its own stream is opened at that node from the token of that node, until it meets the feed:
so a token is good at any gateway, as long as the log of the node reaches back to it. Where it does not, the node is
told as RESYNCING, its resources follow, and LIVE ends them: never a silent gap.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio

from virtfleet.type.v1 import resource_pb2, watch_pb2
from virtfleet_gateway.feed import decode_tokens, encode_tokens
from virtfleet_gateway.index import HEARTBEAT_SECONDS, LIVE, LOST, RESYNCING, SILENCE_SECONDS
from virtfleet_gateway.shapes import BASIC, Change, Entry, Sort
from virtfleet_service import filters
from virtfleet_service.changes import field_bytes
from virtfleet_service.errors import NodeUnknown, ServiceDraining, SlowReader, VirtfleetError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from google.protobuf.message import Message

    from virtfleet_gateway.channels import Channels
    from virtfleet_gateway.feed import Item
    from virtfleet_gateway.index import PackageIndex, Source
    from virtfleet_service.call import Call

MESSAGE_CHANGES: Final = 256
MESSAGE_BYTES: Final = 256 << 10
COALESCE_CHANGES: Final = 64
"""From so many waiting changes on, a resource is sent only as it is last, and its end."""
DEFAULT_BOOKMARK_SECONDS: Final = 30.0
SETTLE_SECONDS: Final = 2.0
_CATCH_UP_LIMIT = 8


class Selection:
    """Says what a reader wants, and may see.

    Args:
        index: The index of the package.
        request: The WatchResourcesRequest.
        call: The call; its caller must be allowed to see a resource.
    """

    def __init__(self, index: PackageIndex, request: Any, call: Call) -> None:  # noqa: ANN401 - one class a package
        shape = index.shape
        numbers = set(request.resource_types)
        self.kinds = frozenset(
            kind.name for kind in shape.kind_by_name.values() if not numbers or kind.number in numbers
        )
        self.all_kinds = not numbers
        self.events = frozenset(request.event_types)
        self.view: int = request.view
        self.text: str = request.filter
        self._tests: dict[str, Callable[[Message], bool]] = {}
        if self.text:
            self._tests = {
                name: filters.compile_filter(self.text, shape.kind_by_name[name].message) for name in self.kinds
            }
        self._sees: Callable[[str], bool] | None = None if call.sees_all else call.may_see
        self._filtered = shape.filtered
        self.plain = self.all_kinds and not self.events and not self.text and self._sees is None
        """Whether everything is wanted, so that what is put together for one such reader is good for all."""

    def holds(self, entry: Entry) -> bool:
        """Tell whether a resource is wanted."""
        if entry.kind.name not in self.kinds or (self._sees is not None and not self._sees(entry.name)):
            return False
        test = self._tests.get(entry.kind.name)
        return test is None or entry.holds(self.text, test)

    def encode(self, change: Change) -> bytes | None:
        """Return a change as the reader is to see it; None: not at all."""
        if self.plain:
            return change.encode(self.view)
        if change.kind not in self.kinds and not (change.sort is Sort.EVENT and self.all_kinds):
            return None
        if self._sees is not None and not (
            self._sees(change.name) or (change.new_name and self._sees(change.new_name))
        ):
            return None
        if change.sort is Sort.EVENT:
            return change.encode(self.view) if not self.events or change.event_type in self.events else None
        if change.entry is None or not self._tests or self.holds(change.entry):
            return change.encode(self.view)
        if change.previous is not None and not self.holds(change.previous):
            return None
        return self._filtered(change)


class FleetWatch:
    """Answers WatchResources for the parent `nodes/-` of one package.

    Args:
        index: The index of the package.
        channels: The lanes to the nodes, for readers whose tokens the feed does not reach back to.
    """

    def __init__(self, index: PackageIndex, channels: Channels) -> None:
        self.index = index
        self.channels = channels
        self.closing = False
        self.fresh_count = 0
        """How many watches have begun with a snapshot or at the present."""
        self.resumed_count = 0
        """How many have gone on from a token."""
        self._shared: dict[tuple[int, int, bool], list[bytes]] = {}

    def close(self) -> None:
        """End all watches with a last bookmark and token."""
        self.closing = True
        self.index.feed.wake()

    async def stream(self, request: Any, call: Call) -> AsyncIterator[bytes]:  # noqa: ANN401 - one class a package
        """Stream changes until the gateway drains or the reader is too slow.

        Raises:
            PageTokenInvalid: The token is not one of a fleet's watch.
            SlowReader: The reader has fallen behind what is held; it may resume with its last token.
        """
        selection = Selection(self.index, request, call)
        tokens = decode_tokens(request.resume_token) if request.WhichOneof("start") == "resume_token" else None
        if tokens is None:
            self.fresh_count += 1
        else:
            self.resumed_count += 1
        await self.index.settled(SETTLE_SECONDS)
        reader = _Reader(self, selection, _bookmark_seconds(request))
        try:
            first = reader.snapshot() if tokens is None else reader.resume(tokens)
            for message in first:
                yield message
            async for message in reader.follow():
                yield message
        finally:
            await reader.close()

    def encoded(
        self, items: Sequence[Item], first: int, selection: Selection, *, overtaken: set[int], alone: bool
    ) -> list[bytes]:
        """Return the changes of items as one reader sees them; readers that see the same share the work.

        Args:
            items: The items.
            first: The reader's position before them.
            selection: What the reader wants.
            overtaken: The changes that later ones make void, by `id`.
            alone: Whether the reader has been told some of the nodes by other means.
        """
        if not selection.plain or overtaken or alone:
            wanted = (change for item in items for change in item.changes if id(change) not in overtaken)
            return [encoded for change in wanted if (encoded := selection.encode(change)) is not None]
        key = first, items[-1].number, selection.view == BASIC
        shared = self._shared.get(key)
        if shared is None:
            if len(self._shared) > _SHARED_LIMIT:
                self._shared.clear()
            shared = [change.encode(selection.view) for item in items for change in item.changes]
            self._shared[key] = shared
        return shared


_SHARED_LIMIT = 64


def _overtaken(items: Sequence[Item]) -> set[int]:
    """Return the puts, by `id`, that a later put of the same resource makes void for a slow reader.

    By uid, as a node does it: a name may have come to mean another resource, and the end of each is told.
    """
    if sum(len(item.changes) for item in items) < COALESCE_CHANGES:
        return set()
    void: set[int] = set()
    told: set[tuple[str, str]] = set()
    for item in reversed(items):
        for change in reversed(item.changes):
            if change.sort is Sort.PUT:
                if (change.kind, change.uid) in told:
                    void.add(id(change))
                told.add((change.kind, change.uid))
    return void


def _bookmark_seconds(request: Any) -> float:  # noqa: ANN401 - one class a package
    if not request.HasField("bookmark_interval"):
        return DEFAULT_BOOKMARK_SECONDS
    seconds: float = request.bookmark_interval.ToNanoseconds() / 1e9
    return max(1.0, min(seconds, 600.0))


class _CatchUp:
    """Is a reader's own stream at one node, from the reader's token to where the feed takes over."""

    __slots__ = ("arrived", "node", "room", "steps", "task", "token", "told_stale")

    def __init__(self, node: str, token: str) -> None:
        self.node = node
        self.token = token
        self.steps: deque[tuple[list[Change], str]] = deque()
        self.room = asyncio.Event()
        self.arrived: str | None = None
        """How it ended: `met` (the feed has the place), `gone` (the node's log does not reach back)."""
        self.told_stale = False
        self.task: asyncio.Task[None] | None = None


class _Reader:
    """Is one client of the watch."""

    def __init__(self, watch: FleetWatch, selection: Selection, bookmark_seconds: float) -> None:
        self._watch = watch
        self._index = watch.index
        self._feed = watch.index.feed
        self._shape = watch.index.shape
        self._selection = selection
        self._bookmark_seconds = bookmark_seconds
        self._position = self._feed.head
        self._tokens: dict[str, str] = {}
        # Items of a node up to this number have been told by other means.
        self._skip: dict[str, int] = {}
        self._behind: dict[str, _CatchUp] = {}
        self._waker = self._feed.subscribe()

    async def close(self) -> None:
        self._feed.unsubscribe(self._waker)
        tasks = [behind.task for behind in self._behind.values() if behind.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Where a reader begins

    def snapshot(self) -> Iterator[bytes]:
        """Tell all that exists, as it is at this moment. Until it is complete, its tokens begin it anew."""
        sources = [self._index.sources[node] for node in self._index.nodes]
        entries = [entry for source in sources for entry in source.entries() if self._selection.holds(entry)]
        tokens = self._index.tokens()
        statuses = [source.status(source.shown_state) for source in sources if source.shown_state != LIVE]
        yield from self._puts(entries)
        for status in statuses:
            yield self._shape.status(self._token(), status)
        self._tokens = tokens
        yield self._shape.codec.snapshot_end(self._token())

    def resume(self, tokens: dict[str, str]) -> Iterator[bytes]:
        """Go on from a token: per node from the feed, from the node's own log, or by a new snapshot of it."""
        head = self._position
        self._tokens = dict(tokens)
        for node in sorted(set(tokens) - set(self._index.sources)):
            self._tokens.pop(node)
            status = watch_pb2.WatchSourceStatus(node=f"nodes/{node}", state=LOST)
            status.status.CopyFrom(NodeUnknown(f"The fleet has no node {node}", node=node).to_status())
            yield self._shape.status(self._token(), status)
        for node in self._index.nodes:
            source = self._index.sources[node]
            token = tokens.get(node)
            if token is None:
                if source.synced:
                    yield from self._resync(source)
                continue
            number = self._feed.locate(node, token)
            if number is None:
                self._fall_behind(source, token)
                continue
            items = [item for item in self._feed.after(number) if item.node == node and item.number <= head]
            yield from self._replay(items)
            if source.state != LIVE and not any(item.status is not None for item in items):
                yield self._status(source, source.state)
        yield from self._marker_if_quiet()

    def _marker_if_quiet(self) -> Iterator[bytes]:
        """Tell at once that the watch stands, so that a client need not wait for the first bookmark."""
        if not self._behind:
            yield self._shape.codec.bookmark(time.time_ns(), self._token())

    # What a reader is told later

    async def follow(self) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        told = loop.time()
        while True:
            self._waker.clear()
            if self._position < self._feed.tail:
                for message in self._too_slow():
                    yield message
                raise SlowReader("the watch was read too slowly; resume it with the last token")
            sent = False
            for message in self._news():
                sent = True
                yield message
            if sent:
                told = loop.time()
                continue
            if self._watch.closing:
                closing = ServiceDraining("the gateway is about to stop; resume with the token")
                yield self._shape.codec.bookmark(time.time_ns(), self._token(), closing.to_status())
                return
            left = told + self._bookmark_seconds - loop.time()
            if left <= 0:
                self._freshen()
                yield self._shape.codec.bookmark(time.time_ns(), self._token())
                told = loop.time()
                continue
            try:
                async with asyncio.timeout(left):
                    await self._waker.wait()
            except TimeoutError:
                continue

    def _too_slow(self) -> Iterator[bytes]:
        closing = SlowReader("the watch was read too slowly; resume it with the token")
        yield self._shape.codec.bookmark(time.time_ns(), encode_tokens(self._tokens), closing.to_status())

    def _news(self) -> Iterator[bytes]:
        for behind in list(self._behind.values()):
            yield from self._caught_up(behind)
        items = self._feed.after(self._position)
        if items:
            yield from self._advance(items, _overtaken(items))
            self._skip = {node: number for node, number in self._skip.items() if number > self._position}

    def _advance(self, items: Sequence[Item], overtaken: set[int]) -> Iterator[bytes]:
        """Tell items of the feed, several in one message as far as they are changes alone."""
        run: list[Item] = []
        size = 0
        for item in items:
            told = item.node in self._behind or item.number <= self._skip.get(item.node, 0)
            special = item.snapshot is not None or item.status is not None
            if told or special or size >= MESSAGE_CHANGES:
                yield from self._tell(run, overtaken)
                run, size = [], 0
            if told or special:
                self._position = item.number
                if not told:
                    yield from self._special(item)
                continue
            run.append(item)
            size += len(item.changes)
        yield from self._tell(run, overtaken)

    def _tell(self, run: list[Item], overtaken: set[int]) -> Iterator[bytes]:
        if not run:
            return
        encoded = self._watch.encoded(
            run, self._position, self._selection, overtaken=overtaken, alone=bool(self._skip or self._behind)
        )
        before = dict(self._tokens)
        self._position = run[-1].number
        for item in run:
            self._tokens[item.node] = item.token
        yield from self._messages(encoded, before)

    def _special(self, item: Item) -> Iterator[bytes]:
        """Tell a new snapshot of a node, or how it stands."""
        if item.snapshot is not None:
            entries = [entry for entry in item.snapshot if self._selection.holds(entry)]
            yield from self._anew(item.node, entries, item.token, None)
            return
        assert isinstance(item.status, watch_pb2.WatchSourceStatus)  # noqa: S101 - no other item comes here
        if item.status.state == LOST and item.node not in self._index.sources:
            self._tokens.pop(item.node, None)
        yield self._shape.status(self._token(), item.status)
        yield from self._changes_of(item)

    def _changes_of(self, item: Item) -> Iterator[bytes]:
        before = dict(self._tokens)
        if item.token:
            self._tokens[item.node] = item.token
        encoded = (self._selection.encode(change) for change in item.changes)
        yield from self._messages([change for change in encoded if change is not None], before)

    def _anew(
        self, node: str, entries: Sequence[Entry], token: str, status: watch_pb2.WatchSourceStatus | None
    ) -> Iterator[bytes]:
        """Tell a node as if for the first time. Only the last message has a token that holds the node's own."""
        self._tokens.pop(node, None)
        begin = watch_pb2.WatchSourceStatus(node=f"nodes/{node}", state=RESYNCING)
        yield self._shape.status(self._token(), begin)
        yield from self._puts(entries)
        if token:
            self._tokens[node] = token
        end = status or watch_pb2.WatchSourceStatus(node=f"nodes/{node}", state=LIVE)
        yield self._shape.status(self._token(), end)

    def _replay(self, items: Sequence[Item]) -> Iterator[bytes]:
        """Tell items of one node that lie before the reader's position."""
        for item in items:
            if item.snapshot is not None or item.status is not None:
                yield from self._special(item)
            else:
                yield from self._changes_of(item)

    def _resync(self, source: Source) -> Iterator[bytes]:
        """Tell a node anew, because its history has a gap for this reader."""
        self._skip[source.node] = self._feed.head
        entries = [entry for entry in source.entries() if self._selection.holds(entry)]
        yield from self._anew(source.node, entries, source.token, source.status(source.state))

    # Messages

    def _puts(self, entries: Sequence[Entry]) -> Iterator[bytes]:
        """Tell what exists; the tokens are those of before."""
        view, put = self._selection.view, self._shape.snapshot_put
        for start in range(0, len(entries), MESSAGE_CHANGES):
            chunk = [put(entry).encode(view) for entry in entries[start : start + MESSAGE_CHANGES]]
            yield from self._messages(chunk, self._tokens)

    def _messages(self, encoded: Sequence[bytes], before: dict[str, str]) -> Iterator[bytes]:
        """Put changes into messages of bounded size; only the last one says that all of them have been told."""
        index = 0
        while index < len(encoded):
            parts: list[bytes] = []
            size = 0
            while index < len(encoded) and len(parts) < MESSAGE_CHANGES and size < MESSAGE_BYTES:
                parts.append(field_bytes(1, encoded[index]))
                size += len(encoded[index])
                index += 1
            token = self._token() if index >= len(encoded) else encode_tokens(before)
            parts.append(field_bytes(2, token.encode()))
            yield b"".join(parts)

    def _status(self, source: Source, state: watch_pb2.SourceState.ValueType) -> bytes:
        return self._shape.status(self._token(), source.status(state))

    def _token(self) -> str:
        return encode_tokens(self._tokens)

    def _freshen(self) -> None:
        """Take the tokens of bookmarks: quiet nodes stand further on than their last change."""
        for node, token in self._index.tokens().items():
            if node not in self._behind and node in self._tokens:
                self._tokens[node] = token

    # Catching up with a node from its own log

    def _fall_behind(self, source: Source, token: str) -> None:
        behind = self._behind[source.node] = _CatchUp(source.node, token)
        behind.task = asyncio.get_running_loop().create_task(
            self._catch_up(behind), name=f"catch up with {source.node}"
        )

    def _caught_up(self, behind: _CatchUp) -> Iterator[bytes]:
        """Tell what has come by the reader's own stream; at its end let the feed take over."""
        source = self._index.sources.get(behind.node)
        if source is None:
            self._abandon(behind)
            return
        if source.state != LIVE and not behind.told_stale and source.failure is not None:
            behind.told_stale = True
            yield self._status(source, source.shown_state)
        while behind.steps:
            changes, token = behind.steps.popleft()
            behind.room.set()
            before = dict(self._tokens)
            self._tokens[behind.node] = token
            encoded = (self._selection.encode(change) for change in changes)
            yield from self._messages([change for change in encoded if change is not None], before)
        if behind.arrived is None:
            return
        self._abandon(behind)
        number = self._feed.locate(behind.node, behind.token) if behind.arrived == "met" else None
        if number is None:
            yield from self._resync(source)
            return
        head = self._feed.head
        items = [item for item in self._feed.after(number) if item.node == behind.node]
        self._skip[behind.node] = head
        yield from self._replay(items)
        yield self._status(source, source.state)

    def _abandon(self, behind: _CatchUp) -> None:
        del self._behind[behind.node]
        if behind.task is not None:
            behind.task.cancel()

    async def _catch_up(self, behind: _CatchUp) -> None:
        while behind.arrived is None:
            try:
                await self._catch_up_once(behind)
            except VirtfleetError:
                # Away: the source of the index finds out when it is back, too.
                self._waker.set()
            except grpc.aio.AioRpcError as error:
                if error.code() in (grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.INVALID_ARGUMENT):
                    source = self._index.sources.get(behind.node)
                    if source is not None and source.synced:
                        behind.arrived = "gone"
                self._waker.set()
            except (grpc.aio.UsageError, ValueError):
                self._waker.set()
            if behind.arrived is None:
                await asyncio.sleep(0.5)

    async def _catch_up_once(self, behind: _CatchUp) -> None:
        services = self._watch.channels.node(behind.node) or {}
        channels = services.get(self._shape.service)
        if channels is None:
            raise NodeUnknown(f"The fleet has no node {behind.node}", node=behind.node)
        lane = channels.control
        await lane.up(None)
        request = self._shape.messages.WatchResourcesRequest(
            parent=f"nodes/{behind.node}", view=resource_pb2.RESOURCE_VIEW_FULL, resume_token=behind.token
        )
        request.bookmark_interval.FromSeconds(HEARTBEAT_SECONDS)
        start: Any = lane.callable(self._shape.watch_path, client_streaming=False, server_streaming=True)
        call = start(request.SerializeToString())
        try:
            while True:
                async with asyncio.timeout(SILENCE_SECONDS):
                    data = await call.read()
                if data is grpc.aio.EOF:
                    break
                changes, token, _, _ = self._shape.response(data)
                source = self._index.sources.get(behind.node)
                own = [change for change in changes if source is not None and source.speaks_of(change)]
                behind.token = token or behind.token
                if own or token:
                    behind.steps.append((own, behind.token))
                if self._feed.locate(behind.node, behind.token) is not None:
                    behind.arrived = "met"
                    self._waker.set()
                    return
                self._waker.set()
                while len(behind.steps) >= _CATCH_UP_LIMIT:
                    behind.room.clear()
                    await behind.room.wait()
            code = await call.code()
            if code is not grpc.StatusCode.OK:
                raise grpc.aio.AioRpcError(
                    code, grpc.aio.Metadata(), await call.trailing_metadata(), await call.details()
                )
        except TimeoutError as error:
            raise lane.unreachable(sent=True, cause="no word") from error
        finally:
            call.cancel()

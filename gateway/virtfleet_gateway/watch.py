"""The watch over all nodes of one package.

A reader follows the feed. Where it comes with a token that the feed does not reach back to (the gateway is new, or the
reader was away for long), it is told from the node's own log (`catch_up`), until that meets the feed: so a token is
good at any gateway, as long as the log of the node reaches back to it. Where it does not, the node is told as
RESYNCING, its resources follow, and LIVE ends them: never a silent gap.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final

from virtfleet.type.v1 import watch_pb2
from virtfleet_gateway.catch_up import MET, PART, TOO_OLD, CatchUp, CatchUps
from virtfleet_gateway.channels import unknown
from virtfleet_gateway.feed import Place, decode_place
from virtfleet_gateway.selection import Selection
from virtfleet_gateway.shapes import BASIC, Change, Entry, Sort
from virtfleet_gateway.source import LIVE, LOST, RESYNCING
from virtfleet_service.changes import field_bytes
from virtfleet_service.errors import PageTokenInvalid, ServiceDraining, SlowReader

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

    from virtfleet_gateway.channels import Channels
    from virtfleet_gateway.feed import Item
    from virtfleet_gateway.index import PackageIndex
    from virtfleet_gateway.source import Source
    from virtfleet_service.call import Call

MESSAGE_CHANGES: Final = 256
MESSAGE_BYTES: Final = 64 << 10
"""What a reader who does not read keeps of the gateway's memory is a message or two."""
COALESCE_CHANGES: Final = 64
"""From so many waiting changes on, a resource is sent only as it is last, and its end."""
OVERTAKEN_CHANGES: Final = 2048
"""How far ahead it is looked for what makes a change void."""
SHARED_BYTES: Final = 8 << 20
DEFAULT_BOOKMARK_SECONDS: Final = 30.0
SETTLE_SECONDS: Final = 2.0
CATCH_UPS_LIMIT: Final = 4
"""With how many nodes one reader catches up at once."""
_RETRY_SECONDS: Final = 0.5
_SCAN_SECONDS: Final = 0.02
"""After so long a search for what a reader wants lets others have a turn."""

_BREATH: Final = b""
"""Is no message: others have a turn."""


class FleetWatch:
    """Answers WatchResources for the parent `nodes/-` of one package.

    Args:
        index: The index of the package.
        channels: The lanes to the nodes, for readers whose tokens the feed does not reach back to.
    """

    def __init__(self, index: PackageIndex, channels: Channels) -> None:
        self.index = index
        self.closing = False
        self.fresh_count = 0
        """How many watches have begun with a snapshot or at the present."""
        self.resumed_count = 0
        """How many have gone on from a token."""
        self.catch_ups = CatchUps(index, channels)
        self._shared: dict[tuple[int, int, bool], list[bytes]] = {}
        self._shared_bytes = 0

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
        selection = Selection(self.index.shape, request, call, self.index.subject)
        place = decode_place(request.resume_token) if request.WhichOneof("start") == "resume_token" else None
        if place is not None and place.binding not in (selection.binding, b""):
            raise PageTokenInvalid(
                "the resume token is of a watch with other parameters: begin with a snapshot", field="resume_token"
            )
        if place is None:
            self.fresh_count += 1
        else:
            self.resumed_count += 1
        await self.index.settled(SETTLE_SECONDS)
        reader = _Reader(self, selection, _bookmark_seconds(request))
        try:
            first = reader.snapshot() if place is None else reader.resume(place)
            for message in first:
                if message:
                    yield message
                else:
                    await asyncio.sleep(0)
            async for message in reader.follow():
                yield message
        finally:
            reader.close()

    def encoded(
        self, items: Sequence[Item], first: int, selection: Selection, overtaken: Overtaken, *, alone: bool
    ) -> list[bytes]:
        """Return the changes of items as one reader sees them; readers that see the same share the work.

        Args:
            items: The items.
            first: The reader's position before them.
            selection: What the reader wants.
            overtaken: What later changes make void.
            alone: Whether the reader has been told some of the nodes by other means.
        """
        if not selection.plain or overtaken.changes or alone:
            wanted = (change for item in items for change in overtaken.left_of(item))
            told = (selection.encode(change, in_turn=change.uid not in overtaken.uids) for change in wanted)
            return [encoded for encoded in told if encoded is not None]
        key = first, items[-1].number, selection.view == BASIC
        shared = self._shared.get(key)
        if shared is None:
            shared = [change.encode(selection.view) for item in items for change in item.changes]
            size = sum(map(len, shared))
            if self._shared_bytes + size > SHARED_BYTES:
                self._shared.clear()
                self._shared_bytes = 0
            self._shared[key] = shared
            self._shared_bytes += size
        return shared


class Overtaken:
    """Is which puts a later put of the same resource makes void for a slow reader.

    By uid, as a node does it: a name may have come to mean another resource, and the end of each is told.

    Args:
        items: What waits for it.

    Attributes:
        changes: The puts that it need not be told, by the number of their item and their place in it.
        uids: The resources that they are about.
        until: The number of the last item that was looked at.
    """

    __slots__ = ("changes", "uids", "until")

    def __init__(self, items: Sequence[Item] = ()) -> None:
        self.changes: set[tuple[int, int]] = set()
        self.uids: set[str] = set()
        count = looked = 0
        for item in items:
            count += len(item.changes)
            looked += 1
            if count >= OVERTAKEN_CHANGES:
                break
        self.until = items[looked - 1].number if looked else 0
        if count < COALESCE_CHANGES:
            return
        told: set[tuple[str, str]] = set()
        for item in reversed(items[:looked]):
            for place in range(len(item.changes) - 1, -1, -1):
                change = item.changes[place]
                if change.sort is not Sort.PUT:
                    continue
                if (change.kind, change.uid) in told:
                    self.changes.add((item.number, place))
                    self.uids.add(change.uid)
                told.add((change.kind, change.uid))

    def left_of(self, item: Item) -> Sequence[Change]:
        """Return the changes of an item that are to be told."""
        if not self.changes:
            return item.changes
        return [change for place, change in enumerate(item.changes) if (item.number, place) not in self.changes]


def _bookmark_seconds(request: Any) -> float:  # noqa: ANN401 - one class a package
    if not request.HasField("bookmark_interval"):
        return DEFAULT_BOOKMARK_SECONDS
    seconds: float = request.bookmark_interval.ToNanoseconds() / 1e9
    return max(1.0, min(seconds, 600.0))


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
        self._overtaken = Overtaken()
        self._place = Place(binding=selection.binding)
        # Items of a node up to this number have been told by other means.
        self._skip: dict[str, int] = {}
        # Nodes that are told from their own logs, and from which token on.
        self._behind: dict[str, str] = {}
        self._catching_up: dict[str, tuple[CatchUp, int]] = {}
        self._retry_times: dict[str, float] = {}
        self._told_stale: set[str] = set()
        self._waker = self._feed.subscribe()

    def close(self) -> None:
        self._feed.unsubscribe(self._waker)
        for node in list(self._catching_up):
            self._leave(node)

    # Where a reader begins

    def snapshot(self) -> Iterator[bytes]:
        """Tell all that exists, as it is at this moment. Until it is complete, its tokens begin it anew."""
        self._place = Place(binding=self._selection.binding, in_snapshot=True)
        sources = [self._index.sources[node] for node in self._index.nodes]
        entries = [entry for source in sources for entry in source.entries()]
        whole = Place(self._index.tokens(), binding=self._selection.binding)
        statuses = [source.status(source.shown_state) for source in sources if source.shown_state != LIVE]
        yield from self._puts(entries)
        for status in statuses:
            yield self._shape.status(self._place.text, status)
        self._place = whole
        yield self._shape.codec.snapshot_end(self._place.text)

    def resume(self, place: Place) -> Iterator[bytes]:
        """Go on from a place: per node from the feed, from the node's own log, or by a new snapshot of it."""
        head, tokens = self._position, place.tokens
        known = {node: token for node, token in tokens.items() if node in self._index.sources}
        self._place = Place(known, binding=self._selection.binding, in_snapshot=place.in_snapshot)
        yield from self._removed(sorted(set(tokens) - set(known)))
        for node in self._index.nodes:
            source = self._index.sources.get(node)
            if source is None:
                continue
            token = tokens.get(node)
            if token is None:
                if source.synced:
                    yield from self._resync(source)
                elif place.in_snapshot:
                    yield self._status(source, source.shown_state)
                continue
            number = self._feed.locate(node, token)
            if number is None:
                self._behind[node] = token
                continue
            items = [item for item in self._feed.after(number) if item.node == node and item.number <= head]
            yield from self._replay(items)
            if source.state != LIVE and not any(item.status is not None for item in items):
                yield self._status(source, source.state)
        if place.in_snapshot:
            self._place.end_snapshot()
            yield self._shape.codec.snapshot_end(self._place.text)
        elif not self._behind:
            # Tell at once that the watch stands, so that a client need not wait for the first bookmark.
            yield self._shape.codec.bookmark(time.time_ns(), self._place.text)

    def _removed(self, nodes: Iterable[str]) -> Iterator[bytes]:
        """Tell of nodes that the fleet has no more."""
        for node in nodes:
            status = watch_pb2.WatchSourceStatus(node=f"nodes/{node}", state=LOST)
            status.status.CopyFrom(unknown(node).to_status())
            yield self._shape.status(self._place.text, status)

    # What a reader is told later

    async def follow(self) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        told = loop.time()
        while True:
            self._waker.clear()
            if self._position < self._feed.tail:
                closing = SlowReader("the watch was read too slowly; resume it with the token")
                yield self._shape.codec.bookmark(time.time_ns(), self._place.text, closing.to_status())
                raise SlowReader("the watch was read too slowly; resume it with the last token")
            sent = False
            for message in self._news():
                if message:
                    sent = True
                    yield message
                else:
                    await asyncio.sleep(0)
            if sent:
                told = loop.time()
                continue
            if self._watch.closing:
                error = ServiceDraining("the gateway is about to stop; resume with the token")
                yield self._shape.codec.bookmark(time.time_ns(), self._place.text, error.to_status())
                return
            left = told + self._bookmark_seconds - loop.time()
            if left <= 0:
                self._freshen()
                yield self._shape.codec.bookmark(time.time_ns(), self._place.text)
                told = loop.time()
                continue
            try:
                async with asyncio.timeout(left):
                    await self._waker.wait()
            except TimeoutError:
                continue

    def _news(self) -> Iterator[bytes]:
        if self._behind:
            yield from self._catch_up()
        while self._feed.tail <= self._position < self._feed.head:
            yield from self._next_items()
        self._skip = {node: number for node, number in self._skip.items() if number > self._position}

    def _next_items(self) -> Iterable[bytes]:
        """Return what is told of the next items: as much as goes into a message, or one special item.

        Nothing else of them is held while the reader takes its time.
        """
        items = self._feed.after(self._position)
        if self._position >= self._overtaken.until:
            self._overtaken = Overtaken(items)
        run: list[Item] = []
        size = count = 0
        for item in items:
            told = item.node in self._behind or item.number <= self._skip.get(item.node, 0)
            special = item.snapshot is not None or item.status is not None
            if run and (told or special or size >= MESSAGE_BYTES or count >= MESSAGE_CHANGES):
                break
            if special and not told:
                self._position = item.number
                return self._special(item)
            if told:
                self._position = item.number
                continue
            run.append(item)
            left = self._overtaken.left_of(item)
            count += len(left)
            size += sum(change.size for change in left)
        return self._tell(run) if run else ()

    def _tell(self, run: list[Item]) -> list[bytes]:
        encoded = self._watch.encoded(
            run, self._position, self._selection, self._overtaken, alone=bool(self._skip or self._behind)
        )
        before = self._place.text
        self._position = run[-1].number
        for item in run:
            if item.token:
                self._place.set(item.node, item.token)
        return list(self._messages(encoded, before))

    def _special(self, item: Item) -> Iterator[bytes]:
        """Tell a new snapshot of a node, or how it stands."""
        if item.snapshot is not None:
            yield from self._anew(item.node, item.snapshot, item.token, None)
            return
        assert isinstance(item.status, watch_pb2.WatchSourceStatus)  # noqa: S101 - no other item comes here
        if item.status.state == LOST and item.node not in self._index.sources:
            self._place.drop(item.node)
        yield self._shape.status(self._place.text, item.status)
        yield from self._changes_of(item)

    def _changes_of(self, item: Item) -> Iterator[bytes]:
        yield from self._step(item.node, item.changes, item.token)

    def _step(self, node: str, changes: Iterable[Change], token: str) -> Iterator[bytes]:
        """Tell changes of a node, and that it stands at a token after them."""
        before = self._place.text
        if token:
            self._place.set(node, token)
        encoded = (self._selection.encode(change) for change in changes)
        yield from self._messages([change for change in encoded if change is not None], before)

    def _anew(
        self, node: str, entries: Sequence[Entry], token: str, status: watch_pb2.WatchSourceStatus | None
    ) -> Iterator[bytes]:
        """Tell a node as if for the first time. Only the last message has a token that holds the node's own."""
        self._place.drop(node)
        begin = watch_pb2.WatchSourceStatus(node=f"nodes/{node}", state=RESYNCING)
        yield self._shape.status(self._place.text, begin)
        yield from self._puts(entries)
        if token:
            self._place.set(node, token)
        end = status or watch_pb2.WatchSourceStatus(node=f"nodes/{node}", state=LIVE)
        yield self._shape.status(self._place.text, end)

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
        yield from self._anew(source.node, list(source.entries()), source.token, source.status(source.state))

    # Messages

    def _puts(self, entries: Sequence[Entry]) -> Iterator[bytes]:
        """Tell what of all that exists is wanted; the tokens are those of before."""
        view, put = self._selection.view, self._shape.snapshot_put
        token = field_bytes(2, self._place.text.encode())
        parts: list[bytes] = []
        size = 0
        begun = time.monotonic()
        for number, entry in enumerate(entries):
            if self._selection.holds(entry):
                parts.append(field_bytes(1, put(entry).encode(view)))
                size += len(parts[-1])
                if len(parts) >= MESSAGE_CHANGES or size >= MESSAGE_BYTES:
                    message = b"".join((*parts, token))
                    parts, size = [], 0
                    yield message
                    begun = time.monotonic()
            if number % 64 == 63 and time.monotonic() - begun > _SCAN_SECONDS:
                yield _BREATH
                begun = time.monotonic()
        if parts:
            yield b"".join((*parts, token))

    def _messages(self, encoded: Sequence[bytes], before: str) -> Iterator[bytes]:
        """Put changes into messages of bounded size; only the last one says that all of them have been told."""
        index = 0
        while index < len(encoded):
            parts: list[bytes] = []
            size = 0
            while index < len(encoded) and len(parts) < MESSAGE_CHANGES and size < MESSAGE_BYTES:
                parts.append(field_bytes(1, encoded[index]))
                size += len(encoded[index])
                index += 1
            token = self._place.text if index >= len(encoded) else before
            parts.append(field_bytes(2, token.encode()))
            yield b"".join(parts)

    def _status(self, source: Source, state: watch_pb2.SourceState.ValueType) -> bytes:
        return self._shape.status(self._place.text, source.status(state))

    def _freshen(self) -> None:
        """Take the tokens of bookmarks: quiet nodes stand further on than their last change."""
        known = set(self._place)
        for node, token in self._index.tokens().items():
            if node not in self._behind and node in known:
                self._place.set(node, token)

    # Catching up with nodes from their own logs

    def _catch_up(self) -> Iterator[bytes]:
        for node in sorted(self._behind):
            source = self._index.sources.get(node)
            if source is None:
                # That it has been removed is told by the feed, from here on.
                self._leave(node)
                del self._behind[node]
                continue
            if source.state != LIVE and source.failure is not None:
                if node not in self._told_stale:
                    self._told_stale.add(node)
                    yield self._status(source, source.shown_state)
            elif node not in self._catching_up and self._may_ask(node):
                one = self._watch.catch_ups.join(node, self._behind[node], self._waker)
                self._catching_up[node] = one, 0
            if node in self._catching_up:
                yield from self._caught_up(source)

    def _may_ask(self, node: str) -> bool:
        now = asyncio.get_running_loop().time()
        return len(self._catching_up) < CATCH_UPS_LIMIT and self._retry_times.get(node, 0.0) <= now

    def _caught_up(self, source: Source) -> Iterator[bytes]:
        """Tell what has come of a node; at the end let the feed take over."""
        node = source.node
        one, told = self._catching_up[node]
        while told < len(one.steps):
            changes, token = one.steps[told]
            told += 1
            self._catching_up[node] = one, told
            self._behind[node] = token
            yield from self._step(node, changes, token)
        if not one.end or node not in self._catching_up:
            return
        self._leave(node)
        number = self._feed.locate(node, self._behind[node]) if one.end == MET else None
        if number is not None:
            yield from self._taken_over(source, number)
        elif one.end == TOO_OLD and source.synced:
            del self._behind[node]
            yield from self._resync(source)
        elif one.end in (MET, PART):
            # There is more, or the feed has gone on beyond where they met.
            self._waker.set()
        else:
            loop = asyncio.get_running_loop()
            self._retry_times[node] = loop.time() + _RETRY_SECONDS
            loop.call_later(_RETRY_SECONDS, self._waker.set)

    def _taken_over(self, source: Source, number: int) -> Iterator[bytes]:
        """Tell what the feed has of a node behind a number, and let it tell the rest."""
        del self._behind[source.node]
        items = [item for item in self._feed.after(number) if item.node == source.node]
        self._skip[source.node] = self._feed.head
        yield from self._replay(items)
        yield self._status(source, source.state)

    def _leave(self, node: str) -> None:
        found = self._catching_up.pop(node, None)
        if found is not None:
            self._watch.catch_ups.leave(found[0], self._waker)

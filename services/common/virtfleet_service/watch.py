"""The watch: every change of a service, in order, to any number of watchers.

The log in the store is the truth; its newest part stays in memory. A watcher is a place in the log and nothing
more: no queue is kept for him. He reads from memory, or, if he is behind, from the store with what has been
overtaken left out; if even that is gone, the watch ends with SLOW_READER. What watchers with equal parameters see
is put together once.
"""

from __future__ import annotations

import asyncio
import itertools
import struct
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from google.protobuf.message import Message
from google.rpc import status_pb2

from virtfleet_service import errors, filters, paging, tokens, transaction
from virtfleet_service.feeds import Decoder, Feed, OperationFeed, ResourceFeed
from virtfleet_service.store import Store
from virtfleet_service.tokens import ResumeToken
from virtfleet_service.transaction import Entry

if TYPE_CHECKING:
    from virtfleet.common.v1 import operations_pb2
    from virtfleet_service.call import Call

__all__ = ["OperationWatchService", "WatchHub", "WatchService", "operation_watch_service", "watch_service"]

RING_ENTRIES: Final = 4096
RING_BYTES: Final = 4 * 1024 * 1024
MESSAGE_ENTRIES: Final = 1024
MESSAGE_BYTES: Final = 512 * 1024
CATCH_UP_ENTRIES: Final = 2048
BOOKMARK_SECONDS: Final = 30.0
BATCH_ENTRIES: Final = 16
BATCH_SECONDS: Final = 0.002
"""A watcher that was told something so short a time ago waits for more: a message costs twelve times an event."""

_SHARED_ENTRY_BYTES: Final = 512
"""What a message that is kept for others takes beside its bytes."""

_COLUMNS: Final = "seq, time_ns, sort, kind, name, uid, type, body"


@dataclass(frozen=True, slots=True)
class _Place:
    """Is where a watcher stands: after this entry."""

    seq: int
    time_ns: int


@dataclass(frozen=True, slots=True)
class _Progress:
    """Is the state of an operation between two entries of the log; kept nowhere else."""

    number: int
    seq: int
    target: str
    body: bytes


class _Behind(Exception):
    """The log does not reach back to the place of the watcher any more."""


class WatchHub:
    """Gives the changes of one store to its watchers.

    Args:
        store: The store; the hub hears of every commit.
        ring_entries: How many of the newest entries stay in memory.
        ring_bytes: How many bytes they may have.
    """

    def __init__(self, store: Store, *, ring_entries: int = RING_ENTRIES, ring_bytes: int = RING_BYTES) -> None:
        self.store = store
        self._ring: deque[Entry] = deque()
        self._ring_entries = ring_entries
        self._ring_bytes = ring_bytes
        self._ring_used = 0
        self._head = _Place(store.last_seq, store.last_ns)
        self._waiters: set[asyncio.Future[None]] = set()
        self._decoder = Decoder(store.codec)
        self._shared: dict[tuple[object, int], tuple[bytes | None, _Place]] = {}
        self._shared_used = 0
        self._progress: deque[_Progress] = deque(maxlen=256)
        self._progress_number = 0
        self._closing: status_pb2.Status | None = None
        store.on_commit(self._publish)
        store.on_progress(self._show_operation)

    def close(self, error: errors.VirtfleetError | None = None) -> None:
        """End all watches: each gets what is left and a last bookmark with its token and the reason."""
        self._closing = (
            error or errors.ServiceDraining("the service is about to stop; resume with the token")
        ).to_status()
        self._wake()

    def _show_operation(self, target: str, body: bytes) -> None:
        self._progress_number += 1
        self._progress.append(_Progress(self._progress_number, self._head.seq, target, body))
        self._wake()

    # The streams.

    async def stream(self, request: Message, call: Call | None = None) -> AsyncIterator[bytes]:
        """Answer `WatchResources`: serialised responses until the hub closes or the reader is too slow.

        Raises:
            PageTokenInvalid: The resume token is not one of this watch.
            ResumeTokenCompacted: The log does not reach back to it, or it is of another store.
            FilterSyntax: The filter fits no kind that is watched.
            SlowReader: The log was compacted beyond what the reader had read.
        """
        feed = self._resource_feed(request, call)
        async for message in self._run(feed, request):
            yield message

    async def stream_operations(
        self, request: operations_pb2.WatchOperationsRequest, call: Call | None = None
    ) -> AsyncIterator[bytes]:
        """Answer `WatchOperations` in the same way.

        Raises:
            PageTokenInvalid: The resume token is not one of this watch.
            ResumeTokenCompacted: The log does not reach back to it, or it is of another store.
            SlowReader: The log was compacted beyond what the reader had read.
        """
        sees = None if call is None or call.sees_all else call.may_see
        feed = OperationFeed(self.store, target=request.target, sees=sees)
        async for message in self._run(feed, request):
            yield message

    def _resource_feed(self, request: Message, call: Call | None) -> ResourceFeed:
        codec = self.store.codec
        numbers: Sequence[int] = request.resource_types  # type: ignore[attr-defined]  # the shape of every watch request
        text: str = request.filter  # type: ignore[attr-defined]  # of every request
        kinds = frozenset(codec.type_by_kind_number.get(number, "") for number in numbers)
        watched = [of for kind, of in codec.resource_types.items() if not kinds or kind in kinds]
        by_class = {of.DESCRIPTOR.full_name: filters.compile_filter(text, of) for of in watched} if text.strip() else {}
        return ResourceFeed(
            self.store,
            self._decoder,
            kinds=kinds,
            event_types=frozenset(request.event_types),  # type: ignore[attr-defined]  # of every request
            matches=(lambda message: by_class[message.DESCRIPTOR.full_name](message)) if by_class else None,
            filter_text=text,
            view=request.view,  # type: ignore[attr-defined]  # of every request
            sees=None if call is None or call.sees_all else call.may_see,
        )

    async def _run(self, feed: Feed, request: Message) -> AsyncIterator[bytes]:
        token: str = request.resume_token  # type: ignore[attr-defined]  # the shape of every watch request
        start = self._accept(token, feed) if token else None
        place = _Place(start.seq, start.time_ns) if start else self._head
        feed.begin(snapshot=start is None)
        try:
            if start is None or start.kind:
                async for message, reached in self._snapshot(feed, place, start):
                    yield message
                    place = reached
            elif place.seq >= self._head.seq and self._closing is None:
                # Nothing is due: tell at once that the watch stands, so that nobody waits for the first bookmark.
                yield feed.bookmark(time.time_ns(), self._token(feed, place), None)
            async for message in self._follow(feed, place, _bookmark_seconds(request)):
                yield message
        except _Behind as behind:
            error = errors.SlowReader("the watch was read too slowly; begin again with a snapshot")
            last = _Place(*behind.args)
            yield feed.bookmark(time.time_ns(), self._token(feed, last), error.to_status())
            raise error from behind

    async def _snapshot(
        self, feed: Feed, place: _Place, start: ResumeToken | None
    ) -> AsyncIterator[tuple[bytes, _Place]]:
        """Send what exists, then what has changed since it began to, then the end; a token continues it anywhere."""
        kinds = feed.kinds
        after = ""
        if start is not None:
            kinds = kinds[kinds.index(start.kind) :] if start.kind in kinds else ()
            after = start.name
        for kind in kinds:
            while True:
                parts, after, seen = feed.page(kind, after, place.seq)
                if parts:
                    # A token is no secret to its holder: it names nothing that he may not see.
                    token = self._token(feed, place, kind, seen if after else "\uffff")
                    yield feed.response(parts, token), place
                if not after:
                    break
                await asyncio.sleep(0)
        until = self._head.seq
        while place.seq < until:
            message, place = self._next(feed, place)
            if message is not None:
                yield message, place
        yield feed.snapshot_end(self._token(feed, place)), place

    async def _follow(self, feed: Feed, place: _Place, bookmark_seconds: float) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        seen = 0
        told = loop.time()
        sent = 0.0
        while True:
            if isinstance(feed, OperationFeed):
                running, seen = self._running(feed, place, seen)
                if running:
                    yield feed.response(running, self._token(feed, place))
                    told = sent = loop.time()
            pause = sent + BATCH_SECONDS - loop.time()
            if pause > 0 and 0 < self._head.seq - place.seq < BATCH_ENTRIES and self._closing is None:
                await asyncio.sleep(pause)
            message, place = self._next(feed, place)
            if message is not None:
                sent = loop.time()
                yield message
                told = loop.time()
                continue
            if place.seq < self._head.seq:
                await asyncio.sleep(0)
                continue
            if self._closing is not None:
                yield feed.bookmark(time.time_ns(), self._token(feed, place), self._closing)
                return
            left = told + bookmark_seconds - loop.time()
            if left <= 0:
                yield feed.bookmark(time.time_ns(), self._token(feed, place), None)
                told = loop.time()
            elif seen == self._progress_number or not isinstance(feed, OperationFeed):
                await self._news(left)

    def _running(self, feed: OperationFeed, place: _Place, seen: int) -> tuple[list[bytes], int]:
        """Return progress that belongs behind the place; what is older has been overtaken by the log."""
        fresh = [item for item in self._progress if item.number > seen and item.seq <= self._head.seq]
        shown = [item.body for item in fresh if item.seq == place.seq and feed.wants(item.target)]
        later = [item.number for item in fresh if item.seq > place.seq]
        return shown, (min(later) - 1 if later else self._progress_number)

    # The log.

    def _publish(self, entries: Sequence[Entry]) -> None:
        self._forget_shared()
        for entry in entries:
            self._ring.append(entry)
            self._ring_used += len(entry.body)
        while self._ring and (len(self._ring) > self._ring_entries or self._ring_used > self._ring_bytes):
            self._ring_used -= len(self._ring.popleft().body)
        self._head = _Place(entries[-1].seq, entries[-1].time_ns)
        self._wake()

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _news(self, seconds: float) -> None:
        """Wait until there is something new, or the time is over."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        timer = loop.call_later(seconds, _ring_the_bell, waiter)
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            timer.cancel()
            self._waiters.discard(waiter)

    def _next(self, feed: Feed, place: _Place) -> tuple[bytes | None, _Place]:
        """Return the next message for a watcher, and where he stands after it.

        Raises:
            _Behind: What comes next is gone.
        """
        if place.seq >= self._head.seq:
            return None, place
        key = (feed.share, place.seq)
        if feed.share is not None and key in self._shared:
            return self._shared[key]
        in_memory = bool(self._ring) and place.seq + 1 >= self._ring[0].seq
        entries = self._from_memory(place) if in_memory else self._from_store(place)
        parts: list[bytes] = []
        used = 0
        last = place
        for entry in entries:
            shown = feed.shows(entry)
            last = _Place(entry.seq, entry.time_ns)
            if shown is not None:
                parts.append(shown)
                used += len(shown)
                if used >= MESSAGE_BYTES or len(parts) >= MESSAGE_ENTRIES:
                    break
        message = feed.response(parts, self._token(feed, last)) if parts else None
        found = (message, last)
        if feed.share is not None:
            # Watchers that share stand at few places; who asks for ever other ones must not fill the memory.
            size = _SHARED_ENTRY_BYTES + len(message or b"")
            if self._shared_used + size > self._ring_bytes:
                self._forget_shared()
            self._shared_used += size
            self._shared[key] = found
        return found

    def _forget_shared(self) -> None:
        self._shared.clear()
        self._shared_used = 0

    def _from_memory(self, place: _Place) -> list[Entry]:
        # From the new end: a deque is quick to reach there, and that is where almost every watcher stands.
        count = self._head.seq - place.seq
        if count < BATCH_ENTRIES:
            return [self._ring[index] for index in range(-count, 0)]
        first = len(self._ring) - count
        return list(itertools.islice(self._ring, first, first + MESSAGE_ENTRIES))

    def _from_store(self, place: _Place) -> list[Entry]:
        """Read a part of the log in which each resource occurs only as it was last."""
        reader = self.store.reader
        found = reader.execute(
            "SELECT seq, sort, kind, uid, length(body) FROM changes WHERE seq > ? ORDER BY seq LIMIT ?",
            (place.seq, CATCH_UP_ENTRIES),
        ).fetchall()
        if not found or found[0][0] != place.seq + 1:
            raise _Behind(place.seq, place.time_ns)
        last_of = {(kind, uid): seq for seq, sort, kind, uid, _ in found if sort == transaction.PUT}
        wanted: list[int] = []
        used = 0
        for seq, sort, kind, uid, size in found:
            if sort == transaction.PUT and last_of[kind, uid] != seq:
                continue
            wanted.append(seq)
            used += size
            if used >= MESSAGE_BYTES:
                break
        marks = ",".join("?" * len(wanted))
        rows = reader.execute(f"SELECT {_COLUMNS} FROM changes WHERE seq IN ({marks}) ORDER BY seq", wanted)  # noqa: S608
        return [Entry._make(row) for row in rows]

    # Tokens.

    def _token(self, feed: Feed, place: _Place, kind: str = "", name: str = "") -> str:
        return ResumeToken(self.store.store_id, place.seq, place.time_ns, feed.binding, kind, name).encode()

    def _accept(self, token: str, feed: Feed) -> ResumeToken:
        found = ResumeToken.decode(token)
        if found.store_id != self.store.store_id:
            raise _compacted("the token is of another store")
        if found.binding not in (feed.binding, tokens.ANY_WATCH):
            raise errors.PageTokenInvalid(
                "the resume token is of a watch with other parameters: begin with a snapshot", field="resume_token"
            )
        if found.seq > self._head.seq:
            raise _compacted("the store was put back to an earlier state")
        if found.seq == 0:
            if self.store.lowest_seq > 1:
                raise _compacted("the log does not reach back to the token")
            return found
        held = self.store.reader.execute("SELECT time_ns FROM changes WHERE seq = ?", (found.seq,)).fetchone()
        if held is None:
            raise _compacted("the log does not reach back to the token")
        if held[0] != found.time_ns:
            raise _compacted("the store was put back to an earlier state and has gone on from there")
        return found

    # Past events.

    def list_events(self, request: Message, call: Call | None = None) -> bytes:
        """Answer `ListEvents`: a serialised page of events, oldest first.

        Raises:
            PageTokenInvalid: The token is of another list.
            FilterSyntax: The filter does not parse.
        """
        codec = self.store.codec
        text: str = request.filter  # type: ignore[attr-defined]  # the shape of every such request
        page_token: str = request.page_token  # type: ignore[attr-defined]  # of every request
        size = paging.page_size_of(request)
        matches = filters.compile_filter(text, codec.event_class) if text else None
        sees = None if call is None or call.sees_all else call.may_see
        binding = tokens.binding_of("events", text)
        after, until = 0, self._head
        if page_token:
            payload = tokens.unseal(self.store.token_key, binding, page_token)
            after, seq, time_ns = _EVENTS_PLACE.unpack(payload)
            until = _Place(seq, time_ns)
        response = codec.events_response_class()
        deadline = time.monotonic() + paging.SCAN_SECONDS
        last, used, more = after, 0, False
        rows = self.store.reader.execute(
            "SELECT seq, name, body FROM changes WHERE sort = 'event' AND seq > ? AND seq <= ? ORDER BY seq",
            (after, until.seq),
        )
        for number, (seq, name, body) in enumerate(rows):
            full = len(response.events) == size or used > paging.PAGE_LIMIT_BYTES  # type: ignore[attr-defined]  # of every request
            if full or (number % 32 == 31 and time.monotonic() > deadline):
                more = True
                break
            last = seq
            event = codec.event_in(body)
            if (sees is None or sees(name)) and (matches is None or matches(event)):
                response.events.append(event)  # type: ignore[attr-defined]  # of every request
                used += len(body)
        rows.close()
        if more:
            place = _EVENTS_PLACE.pack(last, until.seq, until.time_ns)
            response.next_page_token = tokens.seal(self.store.token_key, binding, place)  # type: ignore[attr-defined]  # of every request
        resume = ResumeToken(self.store.store_id, until.seq, until.time_ns)
        response.resume_token = resume.encode()  # type: ignore[attr-defined]  # of every request
        return response.SerializeToString()


_EVENTS_PLACE = struct.Struct(">QQQ")


def _ring_the_bell(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _bookmark_seconds(request: Message) -> float:
    if not request.HasField("bookmark_interval"):
        return BOOKMARK_SECONDS
    nanoseconds: int = request.bookmark_interval.ToNanoseconds()  # type: ignore[attr-defined]  # asked for above
    return min(max(nanoseconds / 1e9, 1.0), 600.0)


def _compacted(why: str) -> errors.ResumeTokenCompacted:
    return errors.ResumeTokenCompacted(f"{why}: begin with a snapshot", field="resume_token")


class WatchService:
    """Serves the `WatchService` of any package."""

    def __init__(self, hub: WatchHub) -> None:
        self._hub = hub

    def watch_resources(self, request: Message, call: Call) -> AsyncIterator[bytes]:
        """Stream changes of resources and events."""
        return self._hub.stream(request, call)

    async def list_events(self, request: Message, call: Call) -> bytes:
        """List past events."""
        return self._hub.list_events(request, call)


class OperationWatchService:
    """Serves `virtfleet.common.v1.OperationService`.

    Args:
        hub: Tells of the operations.
        owner: The process whose operations they are; empty: a gateway.
    """

    def __init__(self, hub: WatchHub, owner: str) -> None:
        self._hub = hub
        self._owner = owner

    def watch_operations(self, request: operations_pb2.WatchOperationsRequest, call: Call) -> AsyncIterator[bytes]:
        """Stream operations as they start, progress and end.

        Raises:
            NameMalformed: The parent is another process.
        """
        if request.parent not in ("", self._owner):
            raise errors.NameMalformed(
                f"the operations of this service are those of {self._owner or 'the gateway'}",
                field="parent",
                name=request.parent,
            )
        return self._hub.stream_operations(request, call)


def watch_service(hub: WatchHub) -> WatchService:
    """Make the handlers of a package's `WatchService`."""
    return WatchService(hub)


def operation_watch_service(hub: WatchHub, owner: str) -> OperationWatchService:
    """Make the handlers of `OperationService` of a process."""
    return OperationWatchService(hub, owner)

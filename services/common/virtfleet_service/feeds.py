"""What one watcher sees of the log: which entries, in which form, inside which message."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, Final, Protocol

from google.protobuf.message import Message
from google.rpc import status_pb2

from virtfleet_service import tokens, transaction, views
from virtfleet_service.changes import ChangeCodec, bookmark_body, field_bytes, field_text
from virtfleet_service.store import Store
from virtfleet_service.transaction import Entry

SNAPSHOT_CAUSE: Final = "snapshot"
_DECODED_LIMIT: Final = 256
_SNAPSHOT_ROWS: Final = 500
_SNAPSHOT_BYTES: Final = 512 * 1024


class Feed(Protocol):
    """Is what a watch needs to know of its kind of watcher.

    Attributes:
        binding: Stands for the parameters, in resume tokens.
        share: Watchers with the same value see the same messages; None: this one has a memory of its own.
        kinds: The parts of the snapshot, in their order.
    """

    binding: bytes
    share: object
    kinds: tuple[str, ...]

    def begin(self, *, snapshot: bool) -> None:
        """Say whether the watcher is about to see all that exists, or has seen an unknown part of it before."""

    def shows(self, entry: Entry) -> bytes | None:
        """Return an entry in the form in which the watcher gets it; None: he does not."""

    def page(self, kind: str, after: str, newest_seq: int) -> tuple[list[bytes], str, str]:
        """Return a part of the snapshot, the name after which it goes on, and the last name that the watcher may know.

        An empty first name ends the kind.
        """

    def response(self, parts: Sequence[bytes], token: str) -> bytes:
        """Encode a message with news."""

    def bookmark(self, time_ns: int, token: str, closing: status_pb2.Status | None) -> bytes:
        """Encode a bookmark."""

    def snapshot_end(self, token: str) -> bytes:
        """Encode the end of the snapshot."""


class Decoder:
    """Decodes an entry once for all watchers that must look into it."""

    def __init__(self, codec: ChangeCodec) -> None:
        self._codec = codec
        self._resources: OrderedDict[int, tuple[Message, str, int] | None] = OrderedDict()
        self._basic: OrderedDict[int, bytes] = OrderedDict()

    def resource(self, entry: Entry) -> Message | None:
        """Return the resource of a put."""
        found = self._open(entry)
        return found[0] if found else None

    def basic(self, entry: Entry) -> bytes:
        """Return the change of a put as the view BASIC shows it."""
        kept = self._basic.get(entry.seq)
        if kept is None:
            found = self._open(entry)
            if found is None:
                return entry.body
            message, cause, old_generation = found
            body = views.apply_view(message, views.BASIC).SerializeToString()
            kept = self._codec.put(entry.time_ns, entry.kind, body, cause=cause, old_generation=old_generation)
            _keep(self._basic, entry.seq, kept)
        return kept

    def _open(self, entry: Entry) -> tuple[Message, str, int] | None:
        if entry.seq in self._resources:
            return self._resources[entry.seq]
        found = self._codec.resource_in(entry.body)
        _keep(self._resources, entry.seq, found)
        return found


def _keep(held: OrderedDict[int, Any], seq: int, value: object) -> None:
    held[seq] = value
    if len(held) > _DECODED_LIMIT:
        held.popitem(last=False)


class ResourceFeed:
    """Shows resources and events of a package.

    Args:
        store: Where they are.
        decoder: Shared by all watchers.
        kinds: Only these; empty: all.
        event_types: Only events of these types; empty: all.
        matches: Only resources for which it holds; None: all.
        filter_text: The text that it was made from.
        view: How much of each.
        sees: Whether the caller may see a name; None: all.
    """

    def __init__(
        self,
        store: Store,
        decoder: Decoder,
        *,
        kinds: frozenset[str],
        event_types: frozenset[int],
        matches: Callable[[Message], bool] | None,
        filter_text: str,
        view: int,
        sees: Callable[[str], bool] | None,
    ) -> None:
        self._store = store
        self._codec = store.codec
        self._decoder = decoder
        self._kinds = kinds
        self._event_types = event_types
        self._matches = matches
        self._basic = view == views.BASIC
        self._sees = sees
        parameters = (sorted(kinds), sorted(event_types), filter_text, self._basic)
        self.binding = tokens.binding_of("watch", *parameters)
        self.share: object = self.binding if matches is None and sees is None else None
        self.kinds = tuple(kind for kind in self._codec.resource_types if not kinds or kind in kinds)
        # With a filter: the uids that the watcher holds, and, if what he saw earlier is unknown, those told as gone.
        self._held: set[str] = set()
        self._dismissed: set[str] = set()
        self._saw_unknown = False

    def begin(self, *, snapshot: bool) -> None:
        """Say whether the watcher is about to see all that exists, or has seen an unknown part of it before."""
        self._saw_unknown = not snapshot

    def shows(self, entry: Entry) -> bytes | None:
        """Return the change in the form in which the watcher gets it; None: he does not."""
        if entry.sort == transaction.OPERATION or (self._kinds and entry.kind not in self._kinds):
            return None
        if self._sees is not None and not self._sees(entry.name):
            return None
        if entry.sort == transaction.EVENT:
            wanted = not self._event_types or entry.type in self._event_types
            return entry.body if wanted and (self._matches is None or self._event_matches(entry)) else None
        if self._matches is None:
            return self._decoder.basic(entry) if self._basic and entry.sort == transaction.PUT else entry.body
        return self._filtered(entry, self._matches)

    def _filtered(self, entry: Entry, matches: Callable[[Message], bool]) -> bytes | None:
        knows = entry.uid in self._held or (self._saw_unknown and entry.uid not in self._dismissed)
        if entry.sort == transaction.MOVED_IN:
            return entry.body
        if entry.sort == transaction.PUT:
            resource = self._decoder.resource(entry)
            if resource is not None and matches(resource):
                self._held.add(entry.uid)
                self._dismissed.discard(entry.uid)
                return self._decoder.basic(entry) if self._basic else entry.body
        self._held.discard(entry.uid)
        if self._saw_unknown:
            self._dismissed.add(entry.uid)
        if not knows:
            return None
        if entry.sort == transaction.PUT:
            return self._codec.delete(entry.time_ns, entry.kind, entry.name, entry.uid, cause="filter")
        return entry.body

    def _event_matches(self, entry: Entry) -> bool:
        if entry.uid in self._held:
            return True
        if self._matches is None or (entry.uid and not self._saw_unknown):
            return False
        row = self._store.get(entry.name)
        if row is None:
            return self._saw_unknown and entry.uid not in self._dismissed
        return self._matches(self._codec.resource_types[row.kind].FromString(row.body))

    def page(self, kind: str, after: str, newest_seq: int) -> tuple[list[bytes], str, str]:
        """Return a part of the snapshot, the name after which it goes on, and the last name that the watcher may know.

        An empty first name ends the kind. Rows that are newer than the place at which changes begin are left
        out: the log tells them.
        """
        sql = (
            "SELECT name, uid, time_ns, body FROM resources WHERE kind = ? AND name > ? AND seq <= ?"
            " ORDER BY name LIMIT ?"
        )
        found: list[bytes] = []
        used = count = 0
        last = seen = after
        of = self._codec.resource_types[kind]
        with closing(self._store.reader.execute(sql, (kind, after, newest_seq, _SNAPSHOT_ROWS))) as rows:
            for name, uid, time_ns, body in rows:
                count += 1
                last = name
                if self._sees is not None and not self._sees(name):
                    continue
                seen = name
                shown = body
                if self._basic or self._matches is not None:
                    message = of.FromString(body)
                    if self._matches is not None and not self._matches(message):
                        continue
                    if self._matches is not None:
                        self._held.add(uid)
                    if self._basic:
                        shown = views.apply_view(message, views.BASIC).SerializeToString()
                found.append(self._codec.put(time_ns, kind, shown, cause=SNAPSHOT_CAUSE))
                used += len(shown)
                if used >= _SNAPSHOT_BYTES:
                    return found, last, seen
        return found, last if count == _SNAPSHOT_ROWS else "", seen

    def response(self, parts: Sequence[bytes], token: str) -> bytes:
        """Encode a message with changes."""
        return self._codec.response(parts, token)

    def bookmark(self, time_ns: int, token: str, closing: status_pb2.Status | None) -> bytes:
        """Encode a bookmark."""
        return self._codec.bookmark(time_ns, token, closing)

    def snapshot_end(self, token: str) -> bytes:
        """Encode the end of the snapshot."""
        return self._codec.snapshot_end(token)


class OperationFeed:
    """Shows the operations of a service.

    Args:
        store: Where they are.
        target: Only operations on this resource; empty: all.
        sees: Whether the caller may see a target; None: all.
    """

    kinds: tuple[str, ...] = (transaction.OPERATION,)

    def __init__(self, store: Store, *, target: str, sees: Callable[[str], bool] | None) -> None:
        self._store = store
        self._target = target
        self._sees = sees
        self.binding = tokens.binding_of("operations", target)
        self.share: object = self.binding if sees is None else None

    def begin(self, *, snapshot: bool) -> None:
        """Take no notice: the operations that a watcher sees do not depend on what he saw."""

    def wants(self, target: str) -> bool:
        """Tell whether operations on a target are shown."""
        return (not self._target or target == self._target) and (self._sees is None or self._sees(target))

    def shows(self, entry: Entry) -> bytes | None:
        """Return the operation as it was stored; None: the watcher does not get it."""
        return entry.body if entry.sort == transaction.OPERATION and self.wants(entry.uid) else None

    def page(self, kind: str, after: str, newest_seq: int) -> tuple[list[bytes], str, str]:
        """Return a part of the snapshot, and twice the id after which it goes on; an empty first one ends it."""
        del kind
        sql = "SELECT id, target, body FROM operations WHERE id > ? AND seq <= ? ORDER BY id LIMIT ?"
        found: list[bytes] = []
        used = count = 0
        last = after
        with closing(self._store.reader.execute(sql, (after, newest_seq, _SNAPSHOT_ROWS))) as rows:
            for name, target, body in rows:
                count += 1
                last = name
                if self.wants(target):
                    found.append(body)
                    used += len(body)
                    if used >= _SNAPSHOT_BYTES:
                        return found, last, last
        return found, last if count == _SNAPSHOT_ROWS else "", last

    def response(self, parts: Sequence[bytes], token: str) -> bytes:
        """Encode a message with operations."""
        return b"".join([*(field_bytes(1, part) for part in parts), field_text(2, token)])

    def bookmark(self, time_ns: int, token: str, closing: status_pb2.Status | None) -> bytes:
        """Encode a bookmark."""
        return field_text(2, token) + field_bytes(3, bookmark_body(time_ns, closing))

    def snapshot_end(self, token: str) -> bytes:
        """Encode the end of the snapshot."""
        return field_text(2, token) + field_bytes(4, b"")

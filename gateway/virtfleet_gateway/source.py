"""What the gateway knows of one service of one node: its resources, where its watch stands, and how it is."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, Final

from virtfleet.type.v1 import watch_pb2
from virtfleet_gateway import wire
from virtfleet_gateway.shapes import Change, Entry, Shape, Sort

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.timestamp_pb2 import Timestamp

    from virtfleet_service.errors import VirtfleetError

_log = logging.getLogger(__name__)

NODE_LIMIT_BYTES: Final = 512 << 20
"""How much one service of one node may have in resources. A snapshot without end ends here, and not in the gateway."""

LIVE: Final = watch_pb2.SOURCE_STATE_LIVE
STALE: Final = watch_pb2.SOURCE_STATE_STALE
RESYNCING: Final = watch_pb2.SOURCE_STATE_RESYNCING
LOST: Final = watch_pb2.SOURCE_STATE_LOST

_RESOURCE_BYTES = 400
"""What a resource takes beside its bytes: the object, its name, its places in the tables."""


class Holders:
    """Finds resources by their uid, which is unique in a fleet, if no node lies and none was copied."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[Entry, ...] | Entry] = {}

    def find(self, uid: str) -> tuple[Entry, ...]:
        """Return the resources that have a uid: one, as a rule."""
        found = self._found.get(uid, ())
        return found if isinstance(found, tuple) else (found,)

    def add(self, entry: Entry) -> None:
        """Note who has a uid."""
        if not entry.uid:
            return
        others = self.find(entry.uid)
        self._found[entry.uid] = (*others, entry) if others else entry

    def drop(self, entry: Entry) -> None:
        """Note that a resource has gone, or is another object now."""
        left = tuple(one for one in self.find(entry.uid) if one is not entry)
        if not left:
            self._found.pop(entry.uid, None)
        else:
            self._found[entry.uid] = left[0] if len(left) == 1 else left


class Source:
    """Is what is known of one service of one node.

    Args:
        node: The node.
        shape: The package.
        holders: Gets the uids of all that it has; None: nobody asks for them.
        limit_bytes: How much it may have.

    Attributes:
        state: LIVE, STALE or LOST; RESYNCING until its first snapshot is complete.
        synced: Whether a snapshot has ever been complete.
        token: The node's own resume token after all that is known; empty: there is none.
        observe_seconds: When the index last agreed with the node, as `time.time()`; 0: never.
        observed: The same as `time.monotonic()`, which nobody sets.
        heard: When a stream of it was begun or heard, as `time.monotonic()`.
        began: When it was first asked, as `time.monotonic()`.
    """

    def __init__(
        self, node: str, shape: Shape, holders: Holders | None = None, *, limit_bytes: int = NODE_LIMIT_BYTES
    ) -> None:
        self.node = node
        self.shape = shape
        self.used_bytes = 0
        self._holders = holders if holders is not None else Holders()
        self._limit_bytes = limit_bytes
        self.state: watch_pb2.SourceState.ValueType = RESYNCING
        self.synced = False
        self.token = ""
        self.observe_seconds = 0.0
        self.failure: VirtfleetError | None = None
        self.began = self.heard = time.monotonic()
        self.observed = 0.0
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
        """Take changes into the tables; returns those that count.

        Raises:
            WireError: The node would have more than it may; nothing is taken then.
        """
        self._check_room(changes)
        taken = []
        strange: list[str] = []
        for change in changes:
            if not self.speaks_of(change):
                strange.append(change.name)
                continue
            if change.entry is not None and change.kind in self.tables:
                change.previous = self._put(change.entry)
            elif change.sort in (Sort.DELETE, Sort.MOVED):
                change.previous = self.forget(change.kind, change.name)
            else:
                change.previous = self.tables.get(change.kind, {}).get(change.name)
            taken.append(change)
        if strange:
            # One line a message: a node must not fill the log of the gateway either.
            _log.warning("node %s speaks of %s (%d such), which is not its own", self.node, strange[0], len(strange))
        return taken

    def _check_room(self, changes: list[Change]) -> None:
        used = self.used_bytes
        for change in changes:
            if change.entry is not None:
                used += self._size_of(change.entry) - self._size_of(self.tables[change.kind].get(change.name))
        self.check_room(used)

    def check_room(self, used_bytes: int) -> None:
        """Hold what the node would have against what it may.

        Raises:
            WireError: It is more.
        """
        if used_bytes > self._limit_bytes:
            raise wire.WireError(f"its resources take more than {self._limit_bytes} bytes")

    @staticmethod
    def _size_of(entry: Entry | None) -> int:
        return len(entry.full) + _RESOURCE_BYTES if entry is not None else 0

    def _put(self, entry: Entry) -> Entry | None:
        """Take a resource in; returns what was there under its name."""
        table = self.tables[entry.kind.name]
        for other in self._holders.find(entry.uid):
            # A node has a uid once: it goes by another name now.
            if other.kind is entry.kind and other.name != entry.name and self.owns(other.name):
                self.forget(other.kind.name, other.name)
        previous = table.get(entry.name)
        if previous is None:
            self._sorted.pop(entry.kind.name, None)
        else:
            self._holders.drop(previous)
        table[entry.name] = entry
        self._holders.add(entry)
        self.used_bytes += self._size_of(entry) - self._size_of(previous)
        return previous

    def forget(self, kind: str, name: str) -> Entry | None:
        """Take a resource out; returns it."""
        found = self.tables.get(kind, {}).pop(name, None)
        if found is not None:
            self._sorted.pop(kind, None)
            self._holders.drop(found)
            self.used_bytes -= self._size_of(found)
        return found

    def replace(self, entries: dict[str, dict[str, Entry]]) -> None:
        """Put a complete snapshot in the place of what was known."""
        for old in self.tables.values():
            for entry in old.values():
                self._holders.drop(entry)
        self.tables = {kind: _by_one_name(table) for kind, table in entries.items()}
        self._sorted.clear()
        self.used_bytes = 0
        for table in self.tables.values():
            for entry in table.values():
                self._holders.add(entry)
                self.used_bytes += self._size_of(entry)

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


class Gathering:
    """Is a snapshot that has begun and not ended."""

    def __init__(self, source: Source) -> None:
        self.tables: dict[str, dict[str, Entry]] = {kind: {} for kind in source.tables}
        self._source = source
        self._told_bytes = 0

    def take(self, changes: list[Change]) -> None:
        """Take the changes of one message.

        Raises:
            WireError: It has more than a node may have.
        """
        for change in changes:
            self._told_bytes += change.size
            if change.entry is not None and self._source.owns(change.name):
                self.tables[change.kind][change.name] = change.entry
            elif change.sort in (Sort.DELETE, Sort.MOVED) and change.kind in self.tables:
                # What has changed since the snapshot began comes before its end.
                self.tables[change.kind].pop(change.name, None)
        # All that was told, not what is left of it: the same again and again has no end either.
        self._source.check_room(self._told_bytes)


def _by_one_name(table: dict[str, Entry]) -> dict[str, Entry]:
    """Return a table in which a uid occurs once: under the name that was told last."""
    last = {entry.uid: entry for entry in table.values() if entry.uid}
    return {name: entry for name, entry in table.items() if not entry.uid or last[entry.uid] is entry}


def node_of(name: str) -> str:
    """Return the node of a name; empty: it has none."""
    parts = name.split("/", 2)
    return parts[1] if len(parts) > 1 and parts[0] == "nodes" else ""

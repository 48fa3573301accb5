"""One piece of work on the store: what it may read and write, all of it or nothing."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

from google.protobuf.message import Message

from virtfleet_service import errors
from virtfleet_service.changes import ChangeCodec

PUT: Final = "put"
DELETE: Final = "delete"
EVENT: Final = "event"
MOVED_OUT: Final = "moved_out"
MOVED_IN: Final = "moved_in"
MOVED: Final = "moved"
"""The space of the records that tell where a resource has gone: when (ns) and its new name, by the old one."""
OPERATION: Final = "operation"

_ROW_COLUMNS = "kind, name, uid, generation, body"

CLOCK_FAULT_NS: Final = 86_400 * 10**9
"""An entry that lies so far in the future was written by a clock that was wrong then; a clock that is set back by less
is not believed before it has caught up."""

T = TypeVar("T")

Records: TypeAlias = list[tuple[str, bytes]]
"""Private records, as (key, body)."""


class Row(NamedTuple):
    """Is one stored resource.

    Attributes:
        kind: Its singular noun: `volume`.
        name: Its full name.
        uid: Its identity.
        generation: The version of what was asked for.
        body: The whole resource, serialised, with spec and status.
    """

    kind: str
    name: str
    uid: str
    generation: int
    body: bytes


class Entry(NamedTuple):
    """Is one line of the log.

    Attributes:
        seq: Its number: without gaps, in the order of commits.
        time_ns: When it was written; never less than the one before, unless the clock had been a day and more ahead.
        sort: PUT, DELETE, EVENT, MOVED_OUT, MOVED_IN or OPERATION.
        kind: The kind of the resource that it is about; empty: none of the package.
        name: The name of that resource or operation.
        uid: The uid of that resource.
        type: The number of the event's type; 0 for other sorts.
        body: The serialised `Change`, or the serialised operation.
    """

    seq: int
    time_ns: int
    sort: str
    kind: str
    name: str
    uid: str
    type: int
    body: bytes


def uid_in(name: str) -> str:
    """Return the last segment of a name if it has the form of a uid, else an empty string."""
    last = name.rpartition("/")[2]
    if len(last) != 36 or last.count("-") != 4:
        return ""
    return last if [len(part) for part in last.split("-")] == [8, 4, 4, 4, 12] else ""


def select_row(connection: sqlite3.Connection, name: str) -> Row | None:
    """Read a resource by its name."""
    found = connection.execute(f"SELECT {_ROW_COLUMNS} FROM resources WHERE name = ?", (name,)).fetchone()  # noqa: S608
    return Row._make(found) if found else None


def select_row_by_uid(connection: sqlite3.Connection, kind: str, uid: str) -> Row | None:
    """Read a resource by its uid."""
    found = connection.execute(
        f"SELECT {_ROW_COLUMNS} FROM resources WHERE kind = ? AND uid = ?",  # noqa: S608
        (kind, uid),
    ).fetchone()
    return Row._make(found) if found else None


def iterate_recorded_rows(connection: sqlite3.Connection, kind: str, space: str) -> Generator[Row, None, None]:
    """Read the resources of a kind whose uids are keys of a space of private records, in the order of the uids."""
    columns = ", ".join(f"resources.{column.strip()}" for column in _ROW_COLUMNS.split(","))
    sql = (
        f"SELECT {columns} FROM records JOIN resources ON resources.kind = ? AND resources.uid = records.key"  # noqa: S608
        " WHERE records.space = ? ORDER BY records.key"
    )
    with closing(connection.execute(sql, (kind, space))) as cursor:
        for found in cursor:
            yield Row._make(found)


def iterate_rows(connection: sqlite3.Connection, kind: str, parent: str, after: str) -> Generator[Row, None, None]:
    """Read resources of a kind in the order of their names; close the iterator early to end the read.

    Args:
        connection: Where to read.
        kind: Only this kind.
        parent: Only below this name; a `-` in it stands for any one segment. Empty: all.
        after: Only names that come behind this one.
    """
    with closing(_iterate(connection, _ROW_COLUMNS, kind, parent, after)) as rows:
        for found in rows:
            yield Row._make(found)


def iterate_names(connection: sqlite3.Connection, kind: str, parent: str, after: str) -> Generator[str, None, None]:
    """Read the names of resources as `iterate_rows` does; the index has them, no row is touched."""
    with closing(_iterate(connection, "kind, name", kind, parent, after)) as rows:
        for found in rows:
            yield found[1]


def _iterate(
    connection: sqlite3.Connection, columns: str, kind: str, parent: str, after: str
) -> Generator[tuple[Any, ...], None, None]:
    """Read columns, of which the name is the second, of the resources of a kind."""
    sql = f"SELECT {columns} FROM resources WHERE kind = ? AND name > ?"  # noqa: S608
    parameters: list[str] = [kind, after]
    segments = parent.split("/") if parent else []
    wildcard = "-" in segments
    fixed = segments[: segments.index("-")] if wildcard else segments
    if fixed:
        prefix = "/".join(fixed) + "/"
        # "0" is the character after "/": names below the prefix lie between the two.
        sql += " AND name > ? AND name < ?"
        parameters += [prefix, prefix[:-1] + "0"]
    with closing(connection.execute(sql + " ORDER BY name", parameters)) as cursor:
        for found in cursor:
            if not wildcard or _below(found[1], segments):
                yield found


def select_rows(connection: sqlite3.Connection, kind: str, parent: str, after: str, limit: int | None) -> list[Row]:
    """Read resources as `iterate_rows` does, at most `limit`."""
    rows: list[Row] = []
    if limit is not None and limit <= 0:
        return rows
    with closing(iterate_rows(connection, kind, parent, after)) as found:
        for row in found:
            rows.append(row)
            if len(rows) == limit:
                break
    return rows


def select_record(connection: sqlite3.Connection, space: str, key: str) -> bytes | None:
    """Read a private record."""
    found = connection.execute("SELECT body FROM records WHERE space = ? AND key = ?", (space, key)).fetchone()
    return bytes(found[0]) if found else None


def select_records(connection: sqlite3.Connection, space: str, prefix: str) -> Records:
    """Read the private records of a space whose keys begin with a prefix, in the order of their keys."""
    sql = "SELECT key, body FROM records WHERE space = ? AND substr(key, 1, ?) = ? AND key >= ? ORDER BY key"
    return list(connection.execute(sql, (space, len(prefix), prefix, prefix)))


class Transaction:
    """Gives one piece of work its view of the store; used in the writer's thread only, never after the work.

    What one work writes, the next of the same batch sees; none is acknowledged before all are on the disk.
    """

    def __init__(
        self, connection: sqlite3.Connection, codec: ChangeCodec, *, last_seq: int, last_ns: int, served_seconds: float
    ) -> None:
        self.connection = connection
        self.served_seconds = served_seconds
        """For how long the store has been open in its life; the clock of request ids."""
        self.entries: list[Entry] = []
        self.touched: set[str] = set()
        self._codec = codec
        self._seq = last_seq
        self._ns = last_ns

    @property
    def last_seq(self) -> int:
        """Return the number of the newest entry of the log, those of this work included."""
        return self._seq

    @property
    def last_ns(self) -> int:
        """Return the time of the newest entry of the log."""
        return self._ns

    def get(self, name: str) -> Row | None:
        """Read a resource; None if there is none of that name."""
        return select_row(self.connection, name)

    def need(self, name: str) -> Row:
        """Read a resource that must exist.

        Raises:
            ResourceNotFound: There is none of that name.
        """
        row = self.get(name)
        if row is None:
            raise not_found(self.connection, name)
        return row

    def get_by_uid(self, kind: str, uid: str) -> Row | None:
        """Read a resource by its uid."""
        return select_row_by_uid(self.connection, kind, uid)

    def list(self, kind: str, *, parent: str = "", after: str = "", limit: int | None = None) -> list[Row]:
        """Read the resources of a kind below a parent, in the order of their names."""
        return select_rows(self.connection, kind, parent, after, limit)

    def put(self, kind: str, message: Message, *, cause: str, old_generation: int = 0) -> bool:
        """Store a resource under its `name` and tell the watchers.

        Args:
            kind: Its singular noun.
            message: The resource, whole. It is serialised at once and may be changed afterwards.
            cause: The full name of the method, or `observed`.
            old_generation: The generation before; 0: that of the stored row, if there is one.

        Returns:
            False if the stored resource is already exactly this; nothing is written then.
        """
        name: str = message.name  # type: ignore[attr-defined]  # every resource has a head
        uid: str = getattr(message, "uid", "")
        generation: int = getattr(message, "generation", 0)
        # Maps in a fixed order, so that an unchanged resource has unchanged bytes.
        body = message.SerializeToString(deterministic=True)
        before = self.get(name)
        if before is not None:
            if before.body == body and before.kind == kind:
                return False
            if before.uid != uid or before.kind != kind:
                self.delete(name, cause=cause)
            elif not old_generation:
                old_generation = before.generation
        else:
            self.delete_record(MOVED, name)
        entry = self._append(
            PUT, kind, name, uid, lambda ns: self._codec.put(ns, kind, body, cause=cause, old_generation=old_generation)
        )
        self.connection.execute(
            "INSERT OR REPLACE INTO resources (name, kind, uid, generation, seq, time_ns, body)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (name, kind, uid, generation, entry.seq, entry.time_ns, body),
        )
        self.touched.add(name)
        return True

    def any_taken(self, kind: str, names: Sequence[str], uids: Sequence[str]) -> bool:
        """Tell whether a resource of a kind has one of these names or one of these uids."""
        if not self.connection.execute("SELECT 1 FROM resources WHERE kind = ? LIMIT 1", (kind,)).fetchone():
            return False
        sql = (
            "SELECT 1 FROM resources WHERE name IN (SELECT value FROM json_each(?)) UNION ALL"
            " SELECT 1 FROM resources WHERE kind = ? AND uid IN (SELECT value FROM json_each(?)) LIMIT 1"
        )
        return self.connection.execute(sql, (json.dumps(names), kind, json.dumps(uids))).fetchone() is not None

    def put_new(self, kind: str, messages: Iterable[Message], *, cause: str) -> None:
        """Store resources whose names and uids no other has, as `put` does one by one.

        Args:
            kind: Their kind.
            messages: The resources, each with its head.
            cause: As for `put`.
        """
        changes: list[Entry] = []
        rows: list[tuple[Any, ...]] = []
        # They are put at once: at one time.
        self._ns = self._now_ns()
        for message in messages:
            name: str = message.name  # type: ignore[attr-defined]  # every resource has a head
            uid: str = message.uid  # type: ignore[attr-defined]  # every resource has a head
            generation: int = message.generation  # type: ignore[attr-defined]  # every resource has a head
            body = message.SerializeToString(deterministic=True)
            self._seq += 1
            change = self._codec.put(self._ns, kind, body, cause=cause, old_generation=0)
            changes.append(Entry(self._seq, self._ns, PUT, kind, name, uid, 0, change))
            rows.append((name, kind, uid, generation, self._seq, self._ns, body))
            self.touched.add(name)
        if self.connection.execute("SELECT 1 FROM records WHERE space = ? LIMIT 1", (MOVED,)).fetchone():
            for row in rows:
                self.delete_record(MOVED, row[0])
        self._insert("changes", changes)
        self._insert("resources", rows)
        self.entries += changes

    def put_records(self, space: str, records: Sequence[tuple[str, bytes]]) -> None:
        """Store private records that are not there yet; nobody is told."""
        self._insert("records", [(space, *record) for record in records])

    def _insert(self, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Insert rows that have all columns of a table."""
        if rows:
            places = ", ".join("?" * len(rows[0]))
            self.connection.executemany(f"INSERT INTO {table} VALUES ({places})", rows)  # noqa: S608  # names of ours

    def delete(self, name: str, *, cause: str) -> bool:
        """Remove a resource and tell the watchers; False if there is none of that name."""
        row = self.get(name)
        if row is None:
            return False
        self._remove(name)
        self._append(
            DELETE, row.kind, name, row.uid, lambda ns: self._codec.delete(ns, row.kind, name, row.uid, cause=cause)
        )
        return True

    def move_out(self, name: str, new_name: str) -> bool:
        """Remove a resource that lives on another node now, and tell the watchers its new name."""
        row = self.get(name)
        if row is None:
            return False
        self._remove(name)
        self.put_record(MOVED, name, f"{time.time_ns()} {new_name}".encode())
        self._append(
            MOVED_OUT, row.kind, name, row.uid, lambda ns: self._codec.moved_out(ns, row.kind, name, row.uid, new_name)
        )
        return True

    def move_in(self, kind: str, message: Message, old_name: str, *, cause: str) -> None:
        """Store a resource that has come from another node, and tell the watchers its old name."""
        name: str = message.name  # type: ignore[attr-defined]  # every resource has a head
        uid: str = message.uid  # type: ignore[attr-defined]  # every resource has a head
        self._append(MOVED_IN, kind, name, uid, lambda ns: self._codec.moved_in(ns, kind, name, uid, old_name))
        self.put(kind, message, cause=cause)

    def event(self, event: Message) -> None:
        """Append an `Event` of the package to the log; time and uid are filled in where they are unset."""
        filled = type(event)()
        filled.CopyFrom(event)
        resource: str = filled.resource  # type: ignore[attr-defined]  # fields 1 to 6 of every Event
        row = None if filled.uid else self.get(resource)  # type: ignore[attr-defined]  # of every Event
        if row is not None:
            filled.uid = row.uid  # type: ignore[attr-defined]  # of every Event
        uid: str = filled.uid  # type: ignore[attr-defined]  # of every Event
        number: int = filled.type  # type: ignore[attr-defined]  # of every Event
        has_time = filled.HasField("time")

        def encode(ns: int) -> bytes:
            if not has_time:
                filled.time.FromNanoseconds(ns)  # type: ignore[attr-defined]  # of every Event
            return self._codec.event(ns, filled.SerializeToString())

        self._append(EVENT, self._codec.kind_of_name(resource), resource, uid, encode, number)

    def tell(self, event_type: str, resource: str, uid: str, *, reason: str, message: str) -> None:
        """Append an event of a type that every package has: `OPERATION_STARTED`, `OPERATION_DONE`.

        A package that lacks the type is told nothing.
        """
        number = self._codec.event_numbers.get(event_type)
        if number is not None:
            self.event(self._codec.event_class(resource=resource, uid=uid, type=number, reason=reason, message=message))

    def log_operation(self, name: str, target: str, body: bytes) -> int:
        """Append the new state of an operation to the log and return its number; `target` stands for the uid."""
        return self._append(OPERATION, OPERATION, name, target, lambda _: body).seq

    def put_record(self, space: str, key: str, body: bytes) -> None:
        """Store a private record; nobody is told."""
        self.connection.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?)", (space, key, body))

    def get_record(self, space: str, key: str) -> bytes | None:
        """Read a private record."""
        return select_record(self.connection, space, key)

    def delete_record(self, space: str, key: str) -> bool:
        """Remove a private record; False if there is none."""
        return self.connection.execute("DELETE FROM records WHERE space = ? AND key = ?", (space, key)).rowcount > 0

    def list_records(self, space: str, prefix: str = "") -> Records:
        """Read the private records of a space whose keys begin with a prefix, as (key, body), in order."""
        return select_records(self.connection, space, prefix)

    def attempt(self, work: Callable[[Transaction], T]) -> T:
        """Run a part of the work so that, if it raises, that part alone is undone; the error is raised."""
        entries, seq, ns = len(self.entries), self._seq, self._ns
        self.connection.execute("SAVEPOINT part")
        try:
            result = work(self)
        except BaseException:
            # A full disk may already have undone the whole transaction.
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK TO part")
                self.connection.execute("RELEASE part")
            del self.entries[entries:]
            self._seq, self._ns = seq, ns
            raise
        self.connection.execute("RELEASE part")
        return result

    def _remove(self, name: str) -> None:
        self.connection.execute("DELETE FROM resources WHERE name = ?", (name,))
        self.touched.add(name)

    def _now_ns(self) -> int:
        """Return the time of the next entry: a clock that is set back must not turn the order of the log.

        But one that was far ahead, once, must not stamp all that happens in the years after.
        """
        now = time.time_ns()
        return self._ns if now < self._ns <= now + CLOCK_FAULT_NS else now

    def _append(
        self, sort: str, kind: str, name: str, uid: str, encode: Callable[[int], bytes], number: int = 0
    ) -> Entry:
        ns = self._now_ns()
        entry = Entry(self._seq + 1, ns, sort, kind, name, uid, number, encode(ns))
        self.connection.execute(
            "INSERT INTO changes VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (entry.seq, ns, sort, kind, name, uid, number, entry.body),
        )
        self._seq, self._ns = entry.seq, ns
        self.entries.append(entry)
        return entry


def not_found(connection: sqlite3.Connection, name: str) -> errors.NotFound:
    """Make the error for a resource that does not exist, or that lives under another name now."""
    moved = select_record(connection, MOVED, name)
    if moved is None:
        return errors.ResourceNotFound(f"{name} does not exist", resource=name, name=name)
    new_name = moved.decode().partition(" ")[2]
    return errors.ResourceMoved(f"{name} is {new_name} now", resource=name, name=name, new_name=new_name)


def _below(name: str, segments: list[str]) -> bool:
    parts = name.split("/")
    return len(parts) > len(segments) and all(
        wanted in ("-", part) for wanted, part in zip(segments, parts, strict=False)
    )

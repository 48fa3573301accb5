"""The tables of the store, and how an older file becomes a present one.

Migrations are numbered and only ever appended. Each names the oldest release that can read the file after it, so that a
release one step back opens the same file (it ignores what it does not know) and one too old refuses with a clear error.
"""

from __future__ import annotations

import functools
import os
import secrets
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

from virtfleet_service.durable import sync_folder

RELEASE = "0.1.0"
"""The release that this code is; compared with what a migration names."""

QUICK_CHECK_LIMIT_BYTES = 64 * 1024 * 1024
"""A larger file is not checked whole at each start: that would take longer than a service may take to come back."""

STORE_ID_BYTES = 16
JOURNAL_LIMIT_BYTES = 16 * 1024 * 1024


_OF_THE_DISK = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_READONLY,
    }
)
"""What SQLite says when the file may be whole, and cannot be read or written now."""


class StoreError(Exception):
    """Is a fault of the store file that keeps a service from starting; the text says what to do."""


class StoreNewer(StoreError):
    """The file was changed by a release that this one is too old for."""


class StoreCorrupt(StoreError):
    """The file is damaged or is no store."""


class StoreLocked(StoreError):
    """Another process has the store open."""


@dataclass(frozen=True, slots=True)
class Migration:
    """Is one step of the schema.

    Attributes:
        number: 1, 2, 3 …; the `user_version` of the file after it.
        summary: What it is for.
        oldest_reader: The oldest release that works on the file after it.
        statements: What is executed, in one transaction with all other steps.
    """

    number: int
    summary: str
    oldest_reader: str
    statements: tuple[str, ...]


MIGRATIONS: tuple[Migration, ...] = (
    Migration(
        number=1,
        summary="resources, their log, operations, request ids, journal, private records",
        oldest_reader="0.1.0",
        statements=(
            "CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID",
            (
                "CREATE TABLE migrations (number INTEGER PRIMARY KEY, oldest_reader TEXT NOT NULL,"
                " release TEXT NOT NULL, time_ns INTEGER NOT NULL)"
            ),
            # seq: the log entry that made the row what it is; a snapshot leaves out what the log will tell anyway.
            (
                "CREATE TABLE resources (name TEXT PRIMARY KEY, kind TEXT NOT NULL, uid TEXT NOT NULL,"
                " generation INTEGER NOT NULL, seq INTEGER NOT NULL, time_ns INTEGER NOT NULL, body BLOB NOT NULL)"
            ),
            "CREATE INDEX resources_by_kind ON resources (kind, name)",
            "CREATE INDEX resources_by_uid ON resources (kind, uid)",
            (
                "CREATE TABLE changes (seq INTEGER PRIMARY KEY, time_ns INTEGER NOT NULL, sort TEXT NOT NULL,"
                " kind TEXT NOT NULL, name TEXT NOT NULL, uid TEXT NOT NULL, type INTEGER NOT NULL, body BLOB NOT NULL)"
            ),
            "CREATE INDEX changes_events ON changes (seq) WHERE sort = 'event'",
            (
                "CREATE TABLE operations (id TEXT PRIMARY KEY, target TEXT NOT NULL, method TEXT NOT NULL,"
                " done INTEGER NOT NULL, exclusive INTEGER NOT NULL, seq INTEGER NOT NULL, end_ns INTEGER NOT NULL,"
                " body BLOB NOT NULL)"
            ),
            "CREATE INDEX operations_unfinished ON operations (target) WHERE done = 0",
            "CREATE INDEX operations_ended ON operations (end_ns) WHERE done = 1",
            (
                "CREATE TABLE requests (subject TEXT NOT NULL, method TEXT NOT NULL, request_id TEXT NOT NULL,"
                " digest BLOB NOT NULL, served_seconds REAL NOT NULL, sort TEXT NOT NULL, answer BLOB NOT NULL,"
                " PRIMARY KEY (subject, method, request_id)) WITHOUT ROWID"
            ),
            "CREATE INDEX requests_by_age ON requests (served_seconds)",
            (
                "CREATE TABLE journal (operation TEXT NOT NULL, number INTEGER NOT NULL, step TEXT NOT NULL,"
                " payload BLOB NOT NULL, PRIMARY KEY (operation, number)) WITHOUT ROWID"
            ),
            (
                "CREATE TABLE records (space TEXT NOT NULL, key TEXT NOT NULL, body BLOB NOT NULL,"
                " PRIMARY KEY (space, key)) WITHOUT ROWID"
            ),
        ),
    ),
)


def connect(path: Path) -> sqlite3.Connection:
    """Open the file as every connection of the store does.

    Raises:
        StoreCorrupt: It is no SQLite file.
        StoreError: It cannot be opened.
    """
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10.0)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA cache_size = -2048")
        # What a transaction notes to undo a part of it would be a file in /var/tmp, which may be full when this is not.
        connection.execute("PRAGMA temp_store = MEMORY")
        # After a burst the log file shrinks again.
        connection.execute(f"PRAGMA journal_size_limit = {JOURNAL_LIMIT_BYTES}")
    except sqlite3.DatabaseError as error:
        connection.close()
        raise damaged(path, error) from error
    return connection


def connect_in_memory() -> sqlite3.Connection:
    """Return the one connection to a new store of the present schema that is in memory alone; it ends with it."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    # Copying the pages of an empty store takes a fiftieth of the time that making its tables takes.
    _empty().backup(connection)
    _identify(connection)
    return connection


@functools.cache
def _empty() -> sqlite3.Connection:
    """Return an empty store that others are copied from."""
    connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    _migrate(connection, list(MIGRATIONS), RELEASE, fresh=True)
    return connection


def create_file(path: Path) -> None:
    """Make an empty file that only its owner reads, and the entry in its folder durable. Succeeds if it exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    sync_folder(path.parent)


def prepare(
    connection: sqlite3.Connection,
    path: Path,
    *,
    migrations: tuple[Migration, ...] = MIGRATIONS,
    release: str = RELEASE,
) -> None:
    """Check the file and bring it to the present schema; a file with content is copied first.

    The copy is `<name>.before-<number>`, beside the file. After an error the file is as it was.

    Raises:
        StoreNewer: A release that this one cannot read after has changed it.
        StoreCorrupt: It is damaged.
        StoreError: It cannot be opened.
    """
    try:
        version = check(connection, path, release)
        missing = [migration for migration in migrations if migration.number > version]
        if not missing:
            return
        if version:
            copy(connection, path.with_name(f"{path.name}.before-{missing[0].number}"))
        _migrate(connection, missing, release, fresh=version == 0)
    except sqlite3.DatabaseError as error:
        raise damaged(path, error) from error


def check(connection: sqlite3.Connection, path: Path, release: str = RELEASE) -> int:
    """Return the number of the schema of a file; 0: it is empty.

    Raises:
        StoreNewer: A release that this one cannot read after has changed it.
        StoreCorrupt: It is damaged or no store.
    """
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    if not tables and not version:
        return 0
    if not {"meta", "migrations"} <= tables:
        raise StoreCorrupt(f"{path} is an SQLite file but no store of virtfleet: give another path or move it away")
    for number, oldest in connection.execute("SELECT number, oldest_reader FROM migrations ORDER BY number"):
        if _parts(oldest) > _parts(release):
            raise StoreNewer(
                f"{path} has schema {number}, which needs release {oldest} or newer; this is {release}. Run the newer"
                f" release, or put back the copy {path.name}.before-* that was made before the upgrade"
            )
    if path.stat().st_size <= QUICK_CHECK_LIMIT_BYTES:
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise damaged(path, verdict)
    return version


def copy(connection: sqlite3.Connection, target: Path) -> None:
    """Copy a store that may be in use to a file of its own, durably: it is there whole or not at all."""
    partial = target.with_name(target.name + ".partial")
    create_file(partial)
    made = sqlite3.connect(partial)
    try:
        connection.backup(made)
    finally:
        made.close()
    descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    partial.replace(target)
    sync_folder(target.parent)


def _migrate(connection: sqlite3.Connection, missing: list[Migration], release: str, *, fresh: bool) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        for migration in missing:
            for statement in migration.statements:
                connection.execute(statement)
            connection.execute(
                "INSERT INTO migrations VALUES (?, ?, ?, ?)",
                (migration.number, migration.oldest_reader, release, time.time_ns()),
            )
            connection.execute(f"PRAGMA user_version = {migration.number:d}")
        if fresh:
            _identify(connection)
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _identify(connection: sqlite3.Connection) -> None:
    """Make a store one that has served nobody yet, with a name and a key that no other has."""
    connection.execute(
        "INSERT OR REPLACE INTO meta VALUES ('store_id', ?), ('token_key', ?), ('served_seconds', ?)",
        (secrets.token_bytes(STORE_ID_BYTES), secrets.token_bytes(32), b"0.0"),
    )


def _parts(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split("."))


def damaged(path: Path, cause: object) -> StoreError:
    """Return the error for a file that cannot be used, which says what to do.

    A full or unreadable disk is no damage: whoever put a copy back because of it would lose what came after the copy.
    """
    if isinstance(cause, sqlite3.Error) and cause.sqlite_errorcode & 0xFF in _OF_THE_DISK:
        return StoreError(f"{path} cannot be opened ({cause}): look at its disk, whether it is full, and at its owner")
    return StoreCorrupt(
        f"{path} is damaged or no store ({cause}): restore it from a copy, or move it away to start empty"
    )

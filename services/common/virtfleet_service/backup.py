"""Copies of a store, and how one is put in the place of the store.

A copy may be made at any time; putting one back needs the service to be stopped. What was in its place is kept.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import time
from contextlib import closing
from pathlib import Path

from virtfleet_service import schema
from virtfleet_service.durable import sync_folder
from virtfleet_service.schema import StoreCorrupt, StoreError
from virtfleet_service.store import locked

_MAGIC = b"SQLite format 3\0"
_BESIDE = ("-wal", "-shm")
"""What SQLite keeps beside a file that is open, or was when its process died."""


def back_up(path: Path, target: Path) -> None:
    """Copy a store, also while its service runs, to one file of its last commit.

    The copy is looked at whole before it gets its name. After an error there is none.

    Raises:
        FileExistsError: There is something at the target; it is left alone.
        StoreError: The file is no store, or damaged.
        OSError: The copy cannot be written.
    """
    if not path.exists():
        raise StoreError(f"there is no store {path}")
    if target.exists():
        raise FileExistsError(f"{target} exists; it is left alone")
    staged = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with closing(schema.connect(path)) as connection:
            _judge(connection, path)
            schema.copy(connection, staged)
        with closing(schema.connect(staged)) as connection:
            _judge(connection, staged)
        staged.replace(target)
    except sqlite3.DatabaseError as error:
        raise StoreCorrupt(f"{path} cannot be copied: {error}") from error
    finally:
        for name in (staged.name, *(staged.name + suffix for suffix in _BESIDE)):
            staged.with_name(name).unlink(missing_ok=True)
    sync_folder(target.parent)


def restore(source: Path, path: Path) -> Path | None:
    """Put a copy in the place of a store whose service does not run.

    A service that starts on it goes on from the copy's last commit, as another store: tokens of watches are refused, so
    whoever watches hears that what came after the copy is gone. The file that was there is kept as
    `NAME.replaced-TIME`; the new one gets its owner.

    Returns:
        Where the file that was there is; None: there was none.

    Raises:
        StoreLocked: The service runs.
        StoreNewer: A later release has written the copy.
        StoreError: The copy is no store, or damaged.
        OSError: The file cannot be written; the old one stands.
    """
    if not source.exists():
        raise StoreError(f"there is no copy {source}")
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    with locked(path):
        try:
            with closing(schema.connect(source)) as connection:
                _judge(connection, source)
                schema.copy(connection, staged)
            _rename(staged)
            owner = (path if path.exists() else path.parent).stat()
            os.chown(staged, owner.st_uid, owner.st_gid)
            kept = _set_aside(path)
            staged.replace(path)
        except sqlite3.DatabaseError as error:
            raise StoreCorrupt(f"{source} cannot be read: {error}") from error
        finally:
            for name in (staged.name, *(staged.name + suffix for suffix in _BESIDE)):
                staged.with_name(name).unlink(missing_ok=True)
        sync_folder(path.parent)
    return kept


def _set_aside(path: Path) -> Path | None:
    """Give a store and what belongs to it another name. Its log first: it must never meet the new file."""
    if not path.exists():
        return None
    kept = path.with_name(time.strftime(f"{path.name}.replaced-%Y%m%dT%H%M%SZ", time.gmtime()))
    try:
        _fold(path)
    except (StoreError, sqlite3.DatabaseError):
        # Damaged: this may be why it is replaced. It is kept as it is, with its log.
        for suffix in _BESIDE:
            beside = path.with_name(path.name + suffix)
            if beside.exists():
                beside.replace(kept.with_name(kept.name + suffix))
    path.replace(kept)
    return kept


def _fold(path: Path) -> None:
    """Write the log of a store into its file, so that there is one file and no order to mind.

    Raises:
        StoreError: It is no database. SQLite would throw its log away.
        sqlite3.DatabaseError: It is damaged.
    """
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise StoreCorrupt(f"{path} is no database")
    with closing(schema.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _rename(path: Path) -> None:
    """Make a copy another store than the one that it is of: its history parts from that one's here."""
    with closing(schema.connect(path)) as connection:
        fresh = secrets.token_bytes(schema.STORE_ID_BYTES)
        connection.execute("UPDATE meta SET value = ? WHERE key = 'store_id'", (fresh,))
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _judge(connection: sqlite3.Connection, path: Path) -> None:
    if not schema.check(connection, path):
        raise StoreCorrupt(f"{path} is empty")
    (verdict,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if verdict != "ok":
        raise StoreCorrupt(f"{path} is damaged: {verdict}")

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.unit.service.rig import domain, open_store, put
from virtfleet_service import backup, schema
from virtfleet_service.schema import StoreCorrupt, StoreError, StoreLocked, StoreNewer


@pytest.fixture
async def path(tmp_path: Path) -> Path:
    """Return a store with one domain that nobody has open."""
    async with open_store(tmp_path / "c.db") as store:
        await put(store, domain("a"))
    return tmp_path / "c.db"


async def names(path: Path) -> list[str]:
    async with open_store(path) as store:
        return [row.name.rpartition("/")[2] for row in store.list("domain")]


async def identity(path: Path) -> str:
    async with open_store(path) as store:
        return store.store_id


def left_beside(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if not entry.name.endswith((".lock", "-wal", "-shm")))


async def test_a_copy_is_made_while_the_store_is_written_and_put_back(path: Path) -> None:
    copy = path.with_name("copy.db")
    async with open_store(path) as store:
        await put(store, domain("b"))
        backup.back_up(path, copy)
        assert copy.stat().st_mode & 0o777 == 0o600
        await put(store, domain("c"))
        # The service runs: nothing is touched.
        with pytest.raises(StoreLocked):
            backup.restore(copy, path)
        await put(store, domain("d"))
    assert await names(path) == ["a", "b", "c", "d"]
    before = await identity(path)
    kept = backup.restore(copy, path)
    assert kept is not None
    # Another store: no token of the old one is good here.
    assert await identity(path) != before == await identity(kept)
    assert await names(path) == ["a", "b"]
    assert await names(kept) == ["a", "b", "c", "d"]
    assert left_beside(path.parent) == sorted(["c.db", "copy.db", kept.name])


async def test_a_store_is_put_where_none_is(path: Path, tmp_path: Path) -> None:
    copy, other = tmp_path / "copy.db", tmp_path / "new"
    other.mkdir()
    backup.back_up(path, copy)
    assert backup.restore(copy, other / "c.db") is None
    assert await names(other / "c.db") == ["a"]


async def test_the_owner_stays(path: Path) -> None:
    os.chown(path, 20123, 20124)
    backup.back_up(path, path.with_name("copy.db"))
    backup.restore(path.with_name("copy.db"), path)
    assert (path.stat().st_uid, path.stat().st_gid, path.stat().st_mode & 0o777) == (20123, 20124, 0o600)


async def test_nothing_is_overwritten_by_a_copy(path: Path) -> None:
    path.with_name("copy.db").write_text("mine")
    with pytest.raises(FileExistsError, match="left alone"):
        backup.back_up(path, path.with_name("copy.db"))
    assert path.with_name("copy.db").read_text() == "mine"
    with pytest.raises(StoreError, match="no store"):
        backup.back_up(path.with_name("none.db"), path.with_name("other.db"))
    assert not path.with_name("none.db").exists()


@pytest.mark.parametrize("content", [b"", b"no database " * 100, b"SQLite format 3\0" + bytes(5000)])
async def test_what_is_no_copy_is_not_put_back(path: Path, content: bytes) -> None:
    bad = path.with_name("bad.db")
    bad.write_bytes(content)
    with pytest.raises(StoreCorrupt):
        backup.restore(bad, path)
    assert left_beside(path.parent) == ["bad.db", "c.db"]
    assert await names(path) == ["a"]


async def test_a_copy_of_a_later_release_is_not_put_back(path: Path) -> None:
    copy = path.with_name("copy.db")
    backup.back_up(path, copy)
    connection = schema.connect(copy)
    later = schema.Migration(2, "much more", "9.0.0", ("CREATE TABLE extra (a)",))
    schema.prepare(connection, copy, migrations=(*schema.MIGRATIONS, later), release="9.0.0")
    connection.close()
    with pytest.raises(StoreNewer, match=r"needs release 9\.0\.0"):
        backup.restore(copy, path)
    assert await names(path) == ["a"]


async def test_a_damaged_store_is_replaced_and_kept_as_it_was(path: Path) -> None:
    backup.back_up(path, path.with_name("copy.db"))
    path.write_bytes(b"damaged" * 1000)
    path.with_name("c.db-wal").write_bytes(b"its log")
    kept = backup.restore(path.with_name("copy.db"), path)
    assert kept is not None
    assert kept.read_bytes() == b"damaged" * 1000
    assert kept.with_name(kept.name + "-wal").read_bytes() == b"its log"
    assert await names(path) == ["a"]


async def test_the_log_of_the_old_file_never_meets_the_new_one(path: Path) -> None:
    """As after SIGKILL: what was committed last lies in the log alone."""
    backup.back_up(path, path.with_name("copy.db"))
    writer = schema.connect(path)
    writer.execute("PRAGMA wal_autocheckpoint = 0")
    writer.execute("INSERT INTO records VALUES ('s', 'k', 'late')")
    log = path.with_name("c.db-wal").read_bytes()
    content = path.read_bytes()
    writer.close()
    path.write_bytes(content)
    path.with_name("c.db-wal").write_bytes(log)
    kept = backup.restore(path.with_name("copy.db"), path)
    assert kept is not None
    for place, expected in ((path, None), (kept, "late")):
        with closing(sqlite3.connect(place)) as store:
            found = store.execute("SELECT body FROM records WHERE space = 's'").fetchone()
        assert (found and found[0]) == expected


async def test_a_lock_that_a_command_makes_is_the_services(path: Path) -> None:
    """Moved away with its lock and put back by root, the store could not be opened by its service any more."""
    folder = path.parent / "moved"
    folder.mkdir()
    os.chown(folder, 20123, 20124)
    backup.back_up(path, path.with_name("copy.db"))
    backup.restore(path.with_name("copy.db"), folder / "c.db")
    assert {(entry.stat().st_uid, entry.stat().st_gid) for entry in folder.iterdir()} == {(20123, 20124)}
    assert (folder / "c.db.lock").exists()

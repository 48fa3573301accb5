"""What becomes of a store when its disk, its file, its listeners, or the clock of the machine fail it."""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from google.protobuf.message import Message

from tests.unit.service.rig import TEST_CAUSE, call, domain, open_store, put
from tests.unit.service.work import TARGET, reason_of, start
from virtfleet_service import schema
from virtfleet_service.operations import Commit, Job, Operations
from virtfleet_service.store import Entry, Limits, StoreCorrupt, StoreUnwritable, Transaction


async def test_what_is_committed_is_acknowledged_whatever_a_listener_does(tmp_path: Path) -> None:
    async with open_store(tmp_path / "c.db") as store:
        heard: list[str] = []

        def fail(_entries: Sequence[Entry]) -> None:
            raise ValueError("planted")

        store.on_commit(fail)
        store.on_commit(lambda entries: heard.extend(entry.name for entry in entries))
        async with asyncio.timeout(5):
            await put(store, domain("a"))
        assert heard == ["nodes/n1/domains/a"]


async def test_a_batch_that_cannot_be_undone_hangs_nobody(tmp_path: Path) -> None:
    async with open_store(tmp_path / "c.db") as store:
        await put(store, domain("a"))

        def deny_undo(action: int, what: str | None, *_: object) -> int:
            denied = action == sqlite3.SQLITE_TRANSACTION and what in ("ROLLBACK", "COMMIT")
            return sqlite3.SQLITE_DENY if denied else sqlite3.SQLITE_OK

        store._writer.set_authorizer(deny_undo)
        for _ in range(2):
            async with asyncio.timeout(5):
                with pytest.raises(StoreUnwritable):
                    await put(store, domain("b"))
        store._writer.set_authorizer(None)
        async with asyncio.timeout(5):
            await put(store, domain("c"))
        assert [row.name for row in store.list("domain")] == ["nodes/n1/domains/a", "nodes/n1/domains/c"]
        assert store.last_seq == 2


async def test_a_work_that_breaks_the_rules_of_the_tables_is_no_fault_of_the_disk(tmp_path: Path) -> None:
    async with open_store(tmp_path / "c.db") as store:
        with pytest.raises(sqlite3.IntegrityError):
            await store.write(lambda tx: tx.put_records("space", [("key", b"1"), ("key", b"2")]))
        assert store.list_records("space") == []


async def test_an_operation_whose_result_breaks_the_rules_of_the_tables_ends(tmp_path: Path) -> None:
    """It was taken for a full disk, and tried again for ever."""

    async def work(_job: Job) -> Commit:
        def commit(tx: Transaction) -> Message:
            tx.put_records("space", [("key", b"1"), ("key", b"2")])
            return domain("a")

        return commit

    async with open_store(tmp_path / "c.db") as store, Operations(store, "compute", "n1").running() as operations:
        async with asyncio.timeout(5):
            operation = await operations.run(call(), start(), target=TARGET, work=work)
        assert operation.done
        assert reason_of(operation) == "UNEXPECTED"


async def test_a_refusing_disk_is_told_once_and_its_end_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with open_store(tmp_path / "c.db") as store:

        def limit(tx: Transaction) -> None:
            pages = tx.connection.execute("PRAGMA page_count").fetchone()[0]
            tx.connection.execute(f"PRAGMA max_page_count = {pages + 2}")

        await store.write(limit)
        caplog.set_level(logging.INFO)
        for _ in range(20):
            with pytest.raises(StoreUnwritable):
                await store.write(lambda tx: tx.put_record("space", "key", bytes(1 << 20)))
        assert len([one for one in caplog.records if one.levelno == logging.ERROR]) == 1
        await store.write(lambda tx: tx.connection.execute("PRAGMA max_page_count = 1000000").fetchone())
        assert [one.message for one in caplog.records if one.levelno == logging.INFO] == [
            f"the store {store.path} can be written again"
        ]


async def test_pages_that_are_damaged_while_it_runs_are_told_with_advice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "c.db"
    # More than is held in memory.
    async with open_store(path) as store:
        for index in range(600):
            one = domain(f"d{index}")
            one.annotations["fill"] = "x" * 8000
            await put(store, one)
    async with open_store(path) as store:
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(os.urandom(path.stat().st_size - 4096))
        with pytest.raises(StoreUnwritable, match="is damaged"):
            await put(store, *(domain(f"d{index}", env="new") for index in range(600)))
        assert [one for one in caplog.records if "virtfleet store restore" in one.message]


async def test_a_damaged_file_that_is_too_large_to_be_looked_at_whole_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.db"
    async with open_store(path) as store:
        await put(store, *(domain(f"d{index}") for index in range(300)))
    monkeypatch.setattr(schema, "QUICK_CHECK_LIMIT_BYTES", 0)
    raw = bytearray(path.read_bytes())
    root = _root_page(path, "changes")
    raw[(root - 1) * 4096 : root * 4096] = os.urandom(4096)
    path.write_bytes(raw)
    with pytest.raises(StoreCorrupt, match="restore it from a copy"):
        async with open_store(path):
            pass


def _root_page(path: Path, table: str) -> int:
    connection = sqlite3.connect(path)
    try:
        number: int = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (table,)).fetchone()[0]
        return number
    finally:
        connection.close()


async def test_a_clock_that_was_years_ahead_stamps_nothing_after_it_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_store(tmp_path / "c.db") as store:
        right = time.time_ns
        monkeypatch.setattr(time, "time_ns", lambda: right() + 10 * 365 * 86_400 * 10**9)
        await put(store, domain("a"))
        monkeypatch.setattr(time, "time_ns", right)
        await put(store, domain("b"))
        assert abs(store.last_ns - right()) < 10 * 10**9
        await store.write(lambda tx: tx.put_new("domain", [domain("c")], cause=TEST_CAUSE))
        assert abs(store.last_ns - right()) < 10 * 10**9


async def test_entries_of_a_wrong_clock_leave_no_hole_in_the_log(tmp_path: Path) -> None:
    """An entry from the past in the middle must not go before those in front of it: watchers would miss it unseen."""
    async with open_store(tmp_path / "c.db", Limits(log_entries=8)) as store:
        for index in range(6):
            await put(store, domain(f"d{index}"))
        await store.write(
            lambda tx: tx.connection.execute("UPDATE changes SET time_ns = 5 WHERE seq IN (1, 4)").rowcount
        )
        await store.compact()
        assert [seq for (seq,) in store.reader.execute("SELECT seq FROM changes ORDER BY seq")] == [2, 3, 4, 5, 6]
        assert store.lowest_seq == 2


async def test_the_log_is_compacted_on_after_a_round_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("virtfleet_service.store.MAINTENANCE_SECONDS", 0.05)
    async with open_store(tmp_path / "c.db", Limits(log_entries=20)) as store:
        await store.write(lambda tx: tx.put_record("moved", "name", b"no number"))
        await asyncio.sleep(0.2)
        await put(store, *(domain(f"d{index}") for index in range(100)))
        async with asyncio.timeout(5):
            while store.lowest_seq < 80:
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("suffix", ["", "-wal"])
@pytest.mark.parametrize("replaced", [False, True])
async def test_nothing_is_acknowledged_that_goes_into_a_file_without_a_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str, *, replaced: bool
) -> None:
    """SQLite goes on in the file that was open: all that was written then was gone with the process."""
    path = tmp_path / "c.db"
    async with open_store(path) as store:
        await put(store, domain("a"))
        named, aside = tmp_path / f"c.db{suffix}", tmp_path / "aside"
        named.rename(aside)
        if replaced:
            named.write_bytes(aside.read_bytes())
        for _ in range(2):
            with pytest.raises(StoreUnwritable, match="nothing was done"):
                await put(store, domain("b"))
        assert [row.name for row in store.list("domain")] == ["nodes/n1/domains/a"]
        (told,) = [one.message for one in caplog.records if one.levelno == logging.ERROR]
        assert str(named) in told
        assert "moved, deleted or replaced" in told
        aside.rename(named)
        await put(store, domain("c"))
    async with open_store(path) as store:
        assert [row.name for row in store.list("domain")] == ["nodes/n1/domains/a", "nodes/n1/domains/c"]

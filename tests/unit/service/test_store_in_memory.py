"""A store in memory is a store: the same reads, writes, errors and watches, without a file and without a thread."""

from __future__ import annotations

import asyncio
import threading
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from tests.unit.service.rig import PACKAGE, TEST_CAUSE, TYPES, domain, put, watching
from virtfleet_service.errors import ResourceNotFound, WrongState
from virtfleet_service.store import BATCH_LIMIT, Limits, Store, StoreUnwritable, Transaction
from virtfleet_service.watch import WatchHub


def in_memory(limits: Limits | None = None) -> AbstractAsyncContextManager[Store]:
    return Store.open_in_memory("/nowhere/c.db", package=PACKAGE, resource_types=TYPES, limits=limits)


async def test_put_is_read_by_name_by_uid_in_lists_and_deleted() -> None:
    async with in_memory() as store:
        one, two = domain("a"), domain("b")
        await put(store, two, one)
        assert store.need(one.name).body == one.SerializeToString(deterministic=True)
        by_uid = store.get_by_uid("domain", two.uid)
        assert by_uid is not None
        assert by_uid.name == two.name
        assert [row.name for row in store.list("domain", parent="nodes/n1")] == [one.name, two.name]
        assert [row.name for row in store.iterate("domain")] == [one.name, two.name]
        await store.write(lambda tx: tx.delete(one.name, cause=TEST_CAUSE))
        with pytest.raises(ResourceNotFound):
            store.need(one.name)


async def test_an_error_undoes_its_own_work_only() -> None:
    async with in_memory() as store:

        def bad(tx: Transaction) -> None:
            tx.put("domain", domain("bad"), cause=TEST_CAUSE)
            raise WrongState("no", state="x")

        results = await asyncio.gather(
            put(store, domain("a")), store.write(bad), put(store, domain("b")), return_exceptions=True
        )
        assert [type(result) for result in results] == [type(None), WrongState, type(None)]
        assert [row.name for row in store.list("domain")] == ["nodes/n1/domains/a", "nodes/n1/domains/b"]
        assert [seq for (seq,) in store.reader.execute("SELECT seq FROM changes ORDER BY seq")] == [1, 2]


async def test_what_waits_is_committed_together_and_no_commit_takes_all_of_a_crowd() -> None:
    async with in_memory() as store:
        told: list[int] = []
        store.on_commit(lambda entries: told.append(len(entries)))
        await asyncio.gather(*(put(store, domain(f"d{number:04}")) for number in range(BATCH_LIMIT + 10)))
        assert told == [BATCH_LIMIT, 10]
        assert store.last_seq == BATCH_LIMIT + 10


async def test_a_cancelled_caller_does_not_cancel_the_write() -> None:
    async with in_memory() as store:
        task = asyncio.create_task(put(store, domain("a")))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await put(store, domain("b"))
        assert len(store.list("domain")) == 2


async def test_it_needs_no_file_and_no_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    async with Store.open_in_memory(tmp_path / "c.db", package=PACKAGE, resource_types=TYPES) as store:
        await put(store, domain("a"))
        # Threads of earlier tests may end meanwhile.
        assert set(threading.enumerate()) <= before
        assert list(tmp_path.iterdir()) == []
    async with Store.open_in_memory(tmp_path / "c.db", package=PACKAGE, resource_types=TYPES) as another:
        assert another.list("domain") == []
        assert another.last_seq == 0
        assert another.store_id != store.store_id
        assert another.token_key != store.token_key


async def test_what_was_asked_before_the_end_is_done_and_nothing_after_it() -> None:
    done: list[int] = []
    async with in_memory() as store:
        works = [asyncio.create_task(store.write(lambda _, n=n: done.append(n))) for n in range(3)]  # type: ignore[misc]  # bound here
        await asyncio.sleep(0)
    await asyncio.gather(*works)
    assert done == [0, 1, 2]
    with pytest.raises(StoreUnwritable):
        await put(store, domain("late"))


async def test_a_watch_sees_the_snapshot_and_what_follows() -> None:
    async with in_memory() as store:
        hub = WatchHub(store)
        await put(store, domain("a"))
        async with watching(hub) as watcher:
            assert [change.put.domain.name for change in await watcher.snapshot()] == ["nodes/n1/domains/a"]
            await put(store, domain("b"))
            assert [change.put.domain.name for change in await watcher.until(1)] == ["nodes/n1/domains/b"]
        hub.close()


async def test_the_log_is_compacted() -> None:
    async with in_memory(Limits(log_entries=3)) as store:
        await put(store, *(domain(f"d{number}") for number in range(10)))
        await store.compact()
        assert store.lowest_seq == 8
        assert len(store.list("domain")) == 10

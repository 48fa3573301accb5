from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.unit.service.rig import TEST_CAUSE, domain, open_store, put
from virtfleet.compute.v1 import domain_pb2, watch_pb2
from virtfleet_service import schema
from virtfleet_service.changes import ChangeCodec
from virtfleet_service.errors import ResourceNotFound, WrongState
from virtfleet_service.store import (
    Limits,
    Store,
    StoreCorrupt,
    StoreLocked,
    StoreNewer,
    StoreUnwritable,
    Transaction,
)

CRASHER = """
import asyncio, sys
from pathlib import Path
from tests.unit.service.rig import domain, open_store, put

async def main() -> None:
    async with open_store(Path(sys.argv[1])) as store:
        async def writer(number: int) -> None:
            for index in range(10_000):
                made = domain(f"d{number}-{index}")
                await put(store, made)
                print(made.name, flush=True)
        await asyncio.gather(*(writer(number) for number in range(4)))

asyncio.run(main())
"""


async def test_put_is_read_by_name_by_uid_and_in_lists(tmp_path: Path) -> None:
    async with open_store(tmp_path / "c.db") as store:
        one, two, other = domain("a"), domain("b"), domain("a", node="n2")
        await put(store, two, one, other)
        row = store.need(one.name)
        assert (row.kind, row.uid, row.generation) == ("domain", one.uid, 1)
        assert domain_pb2.Domain.FromString(row.body) == one
        by_uid = store.get_by_uid("domain", two.uid)
        assert by_uid is not None
        assert by_uid.name == two.name
        assert [row.name for row in store.list("domain", parent="nodes/n1")] == [one.name, two.name]
        assert [row.name for row in store.list("domain", parent="nodes/-")] == [one.name, two.name, other.name]
        assert [row.name for row in store.list("domain", parent="nodes/n1", after=one.name)] == [two.name]
        assert [row.name for row in store.list("domain", limit=1)] == [one.name]
        assert store.list("host") == []


async def test_a_parent_is_no_prefix_of_longer_ids(tmp_path: Path) -> None:
    async with open_store(tmp_path / "c.db") as store:
        await put(store, domain("a", node="n1"), domain("a", node="n10"), domain("a", node="n1-x"))
        assert [row.name for row in store.list("domain", parent="nodes/n1")] == ["nodes/n1/domains/a"]


async def test_find_takes_the_uid_as_last_segment_below_the_right_parent(tmp_path: Path) -> None:
    async with open_store(tmp_path / "c.db") as store:
        one = domain("a")
        await put(store, one)
        assert store.find("domain", one.name).name == one.name
        assert store.find("domain", f"nodes/n1/domains/{one.uid}").name == one.name
        with pytest.raises(ResourceNotFound):
            store.find("domain", f"nodes/n2/domains/{one.uid}")
        with pytest.raises(ResourceNotFound) as caught:
            store.find("domain", "nodes/n1/domains/b")
        assert caught.value.resource == "nodes/n1/domains/b"


async def test_an_error_undoes_its_own_work_only(tmp_path: Path) -> None:
    async with open_store(tmp_path / "c.db") as store:

        def bad(tx: Transaction) -> None:
            tx.put("domain", domain("bad"), cause=TEST_CAUSE)
            tx.put_record("space", "key", b"bad")
            raise WrongState("no", state="x")

        results = await asyncio.gather(
            put(store, domain("a")), store.write(bad), put(store, domain("b")), return_exceptions=True
        )
        assert [type(result) for result in results] == [type(None), WrongState, type(None)]
        assert [row.name for row in store.list("domain")] == ["nodes/n1/domains/a", "nodes/n1/domains/b"]
        assert store.get_record("space", "key") is None
        assert [seq for (seq,) in store.reader.execute("SELECT seq FROM changes ORDER BY seq")] == [1, 2]


async def test_a_cancelled_caller_does_not_cancel_the_write(tmp_path: Path) -> None:
    async with open_store(tmp_path / "c.db") as store:
        task = asyncio.create_task(put(store, domain("a")))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await put(store, domain("b"))
        assert len(store.list("domain")) == 2


async def test_unchanged_resources_write_nothing(tmp_path: Path) -> None:
    async with open_store(tmp_path / "c.db") as store:
        one = domain("a", env="prod")
        assert await store.write(lambda tx: tx.put("domain", one, cause=TEST_CAUSE))
        assert not await store.write(lambda tx: tx.put("domain", one, cause=TEST_CAUSE))
        assert store.last_seq == 1


async def test_a_new_uid_under_an_old_name_is_a_delete_and_a_put(tmp_path: Path) -> None:
    async with open_store(tmp_path / "c.db") as store:
        first, second = domain("a"), domain("a")
        await put(store, first)
        await put(store, second)
        assert [row[0] for row in store.reader.execute("SELECT sort FROM changes ORDER BY seq")] == [
            "put",
            "delete",
            "put",
        ]
        assert store.get_by_uid("domain", first.uid) is None


async def test_reads_follow_writes_through_the_cache(tmp_path: Path) -> None:
    async with open_store(tmp_path / "c.db") as store:
        one = domain("a")
        for generation in range(1, 50):
            one.generation = generation
            await put(store, one)
            assert store.need(one.name).generation == generation
            assert store.need(one.name).generation == generation
        await store.write(lambda tx: tx.delete(one.name, cause=TEST_CAUSE))
        assert store.get(one.name) is None


async def test_the_cache_is_bounded(tmp_path: Path) -> None:
    async with open_store(tmp_path / "c.db", Limits(cache_bytes=1000)) as store:
        made = [domain(f"d{index}") for index in range(50)]
        await put(store, *made)
        for one in made:
            store.need(one.name)
        assert sum(len(row.body) for row in store._cache._rows.values()) == store._cache._used <= 1000


async def test_a_read_of_many_shows_one_state_whatever_is_kept_and_written_meanwhile(tmp_path: Path) -> None:
    async with open_store(tmp_path / "c.db") as store:
        made = [domain(f"d{index}") for index in range(9)]
        await put(store, *made)

        def seen() -> list[tuple[str, int]]:
            with closing(store.iterate("domain", parent="nodes/n1")) as rows:
                return [(row.name, row.generation) for row in rows]

        first = [(one.name, 1) for one in made]
        # Read from the file, then as it is kept.
        assert seen() == seen() == first
        made[4].generation = 2
        await put(store, made[4])
        assert seen() == [(name, 2 if name == made[4].name else 1) for name, _ in first]
        with closing(store.iterate("domain")) as rows:
            begun = [next(rows) for _ in range(3)]
            for one in made:
                one.generation = 3
            gone = made.pop()
            await put(store, *made, domain("d99"))
            await store.write(lambda tx: tx.delete(gone.name, cause=TEST_CAUSE))
            begun += list(rows)
        assert [row.generation for row in begun] == [1, 1, 1, 1, 2, 1, 1, 1, 1]
        assert seen() == [(one.name, 3) for one in made] + [("nodes/n1/domains/d99", 1)]


async def test_a_list_longer_than_the_cache_does_not_wash_it_out(tmp_path: Path) -> None:
    async with open_store(tmp_path / "c.db", Limits(cache_bytes=1000)) as store:
        await put(store, *(domain(f"d{index:02}") for index in range(50)))
        last = store.need("nodes/n1/domains/d49")
        for _ in range(2):
            with closing(store.iterate("domain")) as rows:
                assert len(list(rows)) == 50
        assert store.get(last.name) is last
        assert 0 < store._cache._used <= 1000


async def test_records_are_listed_by_prefix(tmp_path: Path) -> None:
    async with open_store(tmp_path / "c.db") as store:

        def work(tx: Transaction) -> None:
            for key in ("a/1", "a/2", "b/1", "A/1", "a%"):
                tx.put_record("space", key, key.encode())
            tx.put_record("other", "a/9", b"")
            assert tx.get_record("space", "a/1") == b"a/1"
            assert tx.delete_record("space", "a/2")
            assert not tx.delete_record("space", "a/2")

        await store.write(work)
        assert store.list_records("space", "a/") == [("a/1", b"a/1")]
        assert [key for key, _ in store.list_records("space")] == ["A/1", "a%", "a/1", "b/1"]


async def test_reads_do_not_wait_for_the_writer(tmp_path: Path) -> None:
    async with open_store(tmp_path / "c.db") as store:
        await put(store, domain("a"))
        release = asyncio.Event()
        entered = asyncio.Event()
        loop = asyncio.get_running_loop()

        def slow(tx: Transaction) -> None:
            tx.put("domain", domain("b"), cause=TEST_CAUSE)
            loop.call_soon_threadsafe(entered.set)
            asyncio.run_coroutine_threadsafe(release.wait(), loop).result(10)

        writing = asyncio.create_task(store.write(slow))
        await entered.wait()
        began = time.monotonic()
        assert len(store.list("domain")) == 1
        assert store.get("nodes/n1/domains/b") is None
        assert time.monotonic() - began < 0.5
        release.set()
        await writing
        assert len(store.list("domain")) == 2


async def test_what_waits_is_committed_together(tmp_path: Path) -> None:
    async with open_store(tmp_path / "c.db") as store:
        batches: list[int] = []
        store.on_commit(lambda entries: batches.append(len(entries)))
        await asyncio.gather(*(put(store, domain(f"d{index}")) for index in range(500)))
        assert sum(batches) == 500
        assert len(batches) < 50


async def test_a_full_disk_is_an_error_with_nothing_half_done_and_the_service_goes_on(tmp_path: Path) -> None:
    async with open_store(tmp_path / "c.db") as store:
        await put(store, domain("a"))

        def limit(tx: Transaction) -> None:
            pages = tx.connection.execute("PRAGMA page_count").fetchone()[0]
            tx.connection.execute(f"PRAGMA max_page_count = {pages + 2}")

        def large(tx: Transaction) -> None:
            tx.put("domain", domain("b"), cause=TEST_CAUSE)
            tx.put_record("space", "key", bytes(1 << 20))

        await store.write(limit)
        seq = store.last_seq
        with pytest.raises(StoreUnwritable) as caught:
            await store.write(large)
        assert caught.value.reason == "BACKEND_FAILED"
        assert not caught.value.final
        assert store.get("nodes/n1/domains/b") is None
        assert store.get_record("space", "key") is None
        await store.write(lambda tx: tx.connection.execute("PRAGMA max_page_count = 1000000"))
        await store.write(large)
        assert store.last_seq == seq + 1


async def test_a_killed_process_loses_nothing_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "c.db"
    with subprocess.Popen([sys.executable, "-c", CRASHER, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        acknowledged = [process.stdout.readline().strip() for _ in range(300)]
        os.kill(process.pid, signal.SIGKILL)
        acknowledged += [
            line.strip() for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n")
        ]
    async with open_store(path) as store:
        names = {row.name for row in store.list("domain")}
        assert set(acknowledged) <= names
        seqs = [seq for (seq,) in store.reader.execute("SELECT seq FROM changes ORDER BY seq")]
        assert seqs == list(range(1, len(seqs) + 1))
        assert len(names) == len(seqs)


async def test_a_second_process_is_refused(tmp_path: Path) -> None:
    async with open_store(tmp_path / "c.db"):
        with pytest.raises(StoreLocked, match="open in another process"):
            async with open_store(tmp_path / "c.db"):
                pass


async def test_the_store_id_and_time_served_outlive_the_process(tmp_path: Path) -> None:
    async with open_store(tmp_path / "c.db") as store:
        store_id = store.store_id
        await asyncio.sleep(0.05)
    async with open_store(tmp_path / "c.db") as store:
        assert store.store_id == store_id
        assert 0.05 <= store.served_seconds < 5
    async with open_store(tmp_path / "d.db") as store:
        assert store.store_id != store_id
    assert (tmp_path / "c.db").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"no database at all " * 100, b"SQLite format 3\0" + bytes(5000)])
async def test_a_damaged_file_is_told_at_the_start(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.db").write_bytes(content)
    with pytest.raises(StoreCorrupt, match="damaged or no store"):
        async with open_store(tmp_path / "c.db"):
            pass
    assert (tmp_path / "c.db").read_bytes() == content


async def test_damaged_pages_are_told_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "c.db"
    async with open_store(path) as store:
        await put(store, *(domain(f"d{index}") for index in range(300)))
    raw = bytearray(path.read_bytes())
    for at in range(4096 * 4, len(raw) - 4096, 4096 * 3):
        raw[at : at + 200] = os.urandom(200)
    path.write_bytes(raw)
    with pytest.raises(StoreCorrupt):
        async with open_store(path):
            pass


async def test_a_foreign_database_is_refused(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "c.db")
    connection.execute("CREATE TABLE other (a)")
    connection.close()
    with pytest.raises(StoreCorrupt, match="no store of virtfleet"):
        async with open_store(tmp_path / "c.db"):
            pass


async def test_a_migration_copies_the_file_first_and_an_older_release_reads_on_or_refuses(tmp_path: Path) -> None:
    path = tmp_path / "c.db"
    async with open_store(path) as store:
        await put(store, domain("a"))
    expand = schema.Migration(2, "more", "0.1.0", ("ALTER TABLE resources ADD COLUMN extra TEXT",))
    change = schema.Migration(3, "much more", "0.2.0", ("CREATE TABLE extra (a)",))
    connection = schema.connect(path)
    schema.prepare(connection, path, migrations=(*schema.MIGRATIONS, expand), release="0.2.0")
    connection.close()
    copied = sqlite3.connect(tmp_path / "c.db.before-2")
    assert copied.execute("SELECT count(*) FROM resources").fetchone() == (1,)
    assert copied.execute("PRAGMA user_version").fetchone() == (1,)
    copied.close()
    async with open_store(path) as store:
        await put(store, domain("b"))
        assert len(store.list("domain")) == 2
    connection = schema.connect(path)
    schema.prepare(connection, path, migrations=(*schema.MIGRATIONS, expand, change), release="0.2.0")
    connection.close()
    with pytest.raises(StoreNewer, match=r"needs release 0\.2\.0"):
        async with open_store(path):
            pass
    shutil.copy(tmp_path / "c.db.before-3", path)
    async with open_store(path) as store:
        assert len(store.list("domain")) == 2


async def test_a_failing_migration_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "c.db"
    async with open_store(path) as store:
        await put(store, domain("a"))
    bad = schema.Migration(2, "bad", "0.1.0", ("CREATE TABLE fine (a)", "CREATE TABLE fine (a)"))
    connection = schema.connect(path)
    with pytest.raises(StoreCorrupt):
        schema.prepare(connection, path, migrations=(*schema.MIGRATIONS, bad), release="0.1.0")
    connection.close()
    async with open_store(path) as store:
        assert len(store.list("domain")) == 1
        assert store.reader.execute("PRAGMA user_version").fetchone() == (1,)


async def test_compaction_keeps_the_newest_entries(tmp_path: Path) -> None:
    async with open_store(tmp_path / "c.db", Limits(log_entries=10)) as store:
        for index in range(10):
            await put(store, *(domain(f"d{index}-{part}") for part in range(3)))
        await store.compact()
        assert store.lowest_seq == 21
        assert [seq for (seq,) in store.reader.execute("SELECT seq FROM changes ORDER BY seq")] == list(range(21, 31))
    async with open_store(tmp_path / "c.db", Limits(log_seconds=0)) as store:
        assert (store.lowest_seq, store.last_seq) == (21, 30)
        await store.compact()
        assert (store.lowest_seq, store.last_seq) == (30, 30)


async def test_a_crowded_log_is_compacted_at_once(tmp_path: Path) -> None:
    async with open_store(tmp_path / "c.db", Limits(log_entries=20)) as store:
        await put(store, *(domain(f"d{index}") for index in range(100)))
        async with asyncio.timeout(5):
            while store.lowest_seq < 80:
                await asyncio.sleep(0.01)


async def test_the_log_never_goes_back_in_time(tmp_path: Path) -> None:
    async with open_store(tmp_path / "c.db") as store:
        await put(store, domain("a"))
        future = time.time_ns() + 10**12
        await store.write(lambda tx: tx.connection.execute("UPDATE changes SET time_ns = ?", (future,)).rowcount)
    async with open_store(tmp_path / "c.db") as store:
        await put(store, domain("b"))
        assert store.last_ns == future


async def test_a_closed_store_refuses(tmp_path: Path) -> None:
    async with open_store(tmp_path / "c.db") as store:
        pass
    with pytest.raises(StoreUnwritable):
        await put(store, domain("a"))


async def test_a_clean_end_leaves_one_file_that_can_be_copied(tmp_path: Path) -> None:
    async with open_store(tmp_path / "c.db") as store:
        await put(store, domain("a"))
    assert not (tmp_path / "c.db-wal").exists()
    shutil.copy(tmp_path / "c.db", tmp_path / "d.db")
    async with open_store(tmp_path / "d.db") as store:
        assert store.get("nodes/n1/domains/a") is not None


async def test_a_fault_of_the_work_is_raised_to_its_caller(tmp_path: Path) -> None:
    async with open_store(tmp_path / "c.db") as store:
        with pytest.raises(AttributeError):
            await store.write(lambda tx: tx.nothing)  # type: ignore[attr-defined]  # the fault
        with pytest.raises(StoreUnwritable):
            await store.write(lambda tx: tx.connection.execute("INSERT INTO nothing VALUES (1)").rowcount)
        await put(store, domain("a"))
        assert store.last_seq == 1


async def test_kinds_must_be_in_the_package(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no field network"):
        async with Store.open(
            tmp_path / "c.db", package="virtfleet.compute.v1", resource_types={"network": domain_pb2.Domain}
        ):
            pass


def test_the_codec_agrees_with_the_real_parser() -> None:
    codec = ChangeCodec("virtfleet.compute.v1", {"domain": domain_pb2.Domain})
    one = domain("a", env="prod")
    expected = watch_pb2.Change()
    expected.time.FromNanoseconds(1_700_000_000_123_456_789)
    expected.put.cause = "x"
    expected.put.old_generation = 300
    expected.put.domain.CopyFrom(one)
    encoded = codec.put(1_700_000_000_123_456_789, "domain", one.SerializeToString(), cause="x", old_generation=300)
    assert watch_pb2.Change.FromString(encoded) == expected
    deleted = watch_pb2.Change.FromString(codec.delete(5, "domain", one.name, one.uid, cause="c"))
    assert (deleted.delete.resource_type, deleted.delete.name, deleted.delete.uid, deleted.delete.cause) == (
        "domain",
        one.name,
        one.uid,
        "c",
    )
    assert deleted.time.nanos == 5
    message = watch_pb2.WatchResourcesResponse.FromString(codec.response([encoded, encoded], "token"))
    assert list(message.changes) == [expected, expected]
    assert message.resume_token == "token"
    assert watch_pb2.WatchResourcesResponse.FromString(codec.snapshot_end("t")).WhichOneof("marker") == "snapshot_end"
    moved = watch_pb2.Change.FromString(codec.moved_out(1, "domain", "a", "u", "b"))
    assert (moved.moved_out.name, moved.moved_out.new_name) == ("a", "b")
    came = watch_pb2.Change.FromString(codec.moved_in(1, "domain", "b", "u", "a"))
    assert (came.moved_in.name, came.moved_in.old_name) == ("b", "a")
    assert codec.kind_of_name("nodes/n1/domains/a") == "domain"
    assert codec.kind_of_name("nodes/n1/pools/a") == ""


async def test_resources_put_all_at_once_are_those_put_one_by_one(tmp_path: Path) -> None:
    domains = [domain(f"d{number}") for number in range(250)]
    async with open_store(tmp_path / "one.db") as one, open_store(tmp_path / "all.db") as together:
        await put(one, *domains)
        await together.write(lambda tx: tx.put_new("domain", domains, cause=TEST_CAUSE))
        for rows in zip(one.list("domain"), together.list("domain"), strict=True):
            assert rows[0] == rows[1]
        logs = [
            [
                (seq, sort, kind, name, uid, _without_time(body))
                for seq, sort, kind, name, uid, body in store.reader.execute(
                    "SELECT seq, sort, kind, name, uid, body FROM changes ORDER BY seq"
                )
            ]
            for store in (one, together)
        ]
        assert logs[0] == logs[1]
        assert together.last_seq == one.last_seq
        # The next change counts on.
        domains[7].generation = 2
        await put(together, domains[7])
        assert together.need(domains[7].name).generation == 2


def _without_time(body: bytes) -> bytes:
    change = watch_pb2.Change.FromString(body)
    change.ClearField("time")
    return change.SerializeToString()


async def test_what_comes_back_under_an_old_name_has_moved_nowhere(tmp_path: Path) -> None:
    async with open_store(tmp_path / "c.db") as store:
        made = domain("a")
        await put(store, made)
        await store.write(lambda tx: tx.move_out(made.name, "nodes/n2/domains/a"))
        await store.write(lambda tx: tx.put_new("domain", [made], cause=TEST_CAUSE))
        await store.write(lambda tx: tx.delete(made.name, cause=TEST_CAUSE))
        with pytest.raises(ResourceNotFound):
            store.need(made.name)


async def test_names_and_uids_that_are_taken_are_found(tmp_path: Path) -> None:
    async with open_store(tmp_path / "c.db") as store:
        one, free = domain("a"), domain("b")
        assert not await store.write(lambda tx: tx.any_taken("domain", [one.name], [one.uid]))
        await put(store, one)
        for names, uids, taken in (
            ([free.name, one.name], [free.uid], True),
            ([free.name], [free.uid, one.uid], True),
            ([free.name], [free.uid], False),
            ([], [], False),
        ):
            assert await store.write(lambda tx, n=names, u=uids: tx.any_taken("domain", n, u)) is taken  # type: ignore[misc]  # bound here


async def test_resources_are_read_by_the_records_that_name_them(tmp_path: Path) -> None:
    async with open_store(tmp_path / "c.db") as store:
        domains = [domain(f"d{number}") for number in range(4)]
        await put(store, *domains)
        marked = [domains[1], domains[3]]
        await store.write(lambda tx: tx.put_records("marked", [(one.uid, b"") for one in marked]))
        await store.write(lambda tx: tx.put_record("marked", "nobody", b""))
        with closing(store.iterate_recorded("domain", "marked")) as rows:
            assert {row.name for row in rows} == {one.name for one in marked}
        with closing(store.iterate_recorded("host", "marked")) as rows:
            assert not list(rows)

"""The store of one service: an SQLite file, one writer, durable before acknowledged.

Writes are functions that run in the writer's thread, each in a savepoint of its own; what waits is committed
together with one sync of the disk. Reads run where they are called, on a second connection that sees the last
commit and never waits for the writer (write-ahead log); the bytes of resources that were just read are kept in
memory.

A store may also be in memory alone, for a process that holds hundreds of nodes and needs none of them again: nothing
waits for a disk there, so writes run on the event loop, and reads share their connection.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from google.protobuf.message import Message

from virtfleet_service import errors, expiry, schema
from virtfleet_service.changes import ChangeCodec
from virtfleet_service.expiry import Limits
from virtfleet_service.row_cache import RowCache
from virtfleet_service.schema import StoreCorrupt, StoreError, StoreLocked, StoreNewer
from virtfleet_service.transaction import (
    Entry,
    Records,
    Row,
    Transaction,
    iterate_names,
    iterate_recorded_rows,
    not_found,
    select_record,
    select_records,
    select_row,
    select_row_by_uid,
    select_rows,
    uid_in,
)

__all__ = [
    "Entry",
    "Limits",
    "Row",
    "Store",
    "StoreCorrupt",
    "StoreError",
    "StoreLocked",
    "StoreNewer",
    "StoreUnwritable",
    "Transaction",
    "locked",
]

_log = logging.getLogger(__name__)

BATCH_LIMIT = 256
"""How many works share one commit at most; more would make the first of them wait for too long."""

MAINTENANCE_SECONDS = 60.0

_FAULTS_OF_THE_WORK = (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.InterfaceError, sqlite3.DataError)
"""What SQLite says of a statement, not of the disk: to try the same again would be in vain."""

T = TypeVar("T")


class _Undone(Exception):  # no error: the way out of a transaction that was a trial
    """Undoes a trial."""


class StoreUnwritable(errors.BackendFailed):
    """The disk of the store refuses writes (full, broken). Nothing of the work was done; it may be tried again."""


@dataclass(slots=True)
class _Work:
    run: Callable[[Transaction], Any]
    future: asyncio.Future[Any]
    result: Any = None
    error: BaseException | None = None


_Batch: TypeAlias = list[_Work]


class Store:
    """Holds the state of one service. Made by `open` or `open_in_memory`; belongs to the event loop that opened it."""

    def __init__(self, path: Path, codec: ChangeCodec, limits: Limits, *, in_memory: bool = False) -> None:
        self.path = path
        self.codec = codec
        self.limits = limits
        self._loop = asyncio.get_running_loop()
        if in_memory:
            self._writer = self.reader = schema.connect_in_memory()
        else:
            self._writer, self.reader = _connect_twice(path)
        # `reader` is the connection for reads on the event loop; for the modules of this package.
        try:
            self._recall()
        except BaseException:
            self.reader.close()
            self._writer.close()
            raise
        # As they were opened: SQLite goes on in files that nobody will ever find again.
        self._files = {} if in_memory else identities(path)
        self._opened = time.monotonic()
        self._cache = RowCache(limits.cache_bytes)
        self._listeners: list[Callable[[Sequence[Entry]], None]] = []
        self._progress_listeners: list[Callable[[str, bytes], None]] = []
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._due: asyncio.Handle | None = None
        self._written_seq, self._written_ns = self.last_seq, self.last_ns
        self._closed = False
        self._crowded = asyncio.Event()
        # What the disk said last: told once, however many works it refuses.
        self._trouble = ""
        self._thread: threading.Thread | None = None
        if not in_memory:
            self._thread = threading.Thread(target=self._write_all, name=f"store {path.name}", daemon=True)

    def _recall(self) -> None:
        """Read what the file says of itself, and where its log begins and ends."""
        meta = dict(self.reader.execute("SELECT key, value FROM meta"))
        self.store_id: str = bytes(meta["store_id"]).hex()
        """Names this store; random, made with the file."""
        self.token_key: bytes = bytes(meta["token_key"])
        """Authenticates the page tokens of this store."""
        self._served_before = float(bytes(meta["served_seconds"]))
        newest = self.reader.execute("SELECT seq, time_ns FROM changes ORDER BY seq DESC LIMIT 1").fetchone()
        self.last_seq, self.last_ns = (int(newest[0]), int(newest[1])) if newest else (0, 0)
        lowest = self.reader.execute("SELECT min(seq) FROM changes").fetchone()[0]
        self.lowest_seq = int(lowest) if lowest is not None else self.last_seq + 1

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        path: Path | str,
        *,
        package: str,
        resource_types: Mapping[str, type[Message]],
        limits: Limits | None = None,
    ) -> AsyncIterator[Store]:
        """Open the store, make it if it is not there, migrate it if it is older.

        Args:
            path: The file.
            package: The package whose changes it logs: `virtfleet.storage.v1`.
            resource_types: The kinds that it holds: `{"pool": pool_pb2.Pool}`, by their field in `ResourcePut`.
            limits: How much it keeps.

        Raises:
            StoreNewer: A later release has changed it beyond what this one reads.
            StoreCorrupt: It is damaged.
            StoreError: The disk refuses.
            StoreLocked: Another process has it open.
        """
        path = Path(path)
        codec = ChangeCodec(package, resource_types)
        schema.create_file(path)
        with locked(path):
            try:
                store = cls(path, codec, limits or Limits())
            except sqlite3.DatabaseError as error:
                # Of a file that is too large to be looked at whole, the first reads find what is damaged.
                raise schema.damaged(path, error) from error
            async with store._running():
                yield store

    @classmethod
    @asynccontextmanager
    async def open_in_memory(
        cls,
        path: Path | str,
        *,
        package: str,
        resource_types: Mapping[str, type[Message]],
        limits: Limits | None = None,
    ) -> AsyncIterator[Store]:
        """Make a store that is in memory alone and ends with its context.

        Whoever reads must not wait in the middle of it: a write would change what he is about to read.

        Args:
            path: What it is called in messages; no file is made.
            package: As for `open`.
            resource_types: As for `open`.
            limits: As for `open`.
        """
        store = cls(Path(path), ChangeCodec(package, resource_types), limits or Limits(), in_memory=True)
        async with store._running():
            yield store

    @asynccontextmanager
    async def _running(self) -> AsyncIterator[None]:
        if self._thread is not None:
            self._thread.start()
        maintenance = asyncio.create_task(self._maintain(), name=f"maintenance of {self.path.name}")
        try:
            yield
        finally:
            maintenance.cancel()
            (ended,) = await asyncio.gather(maintenance, return_exceptions=True)
            await self._close()
            if isinstance(ended, Exception):
                _log.error("the maintenance of the store ended by an error", exc_info=ended)

    def on_commit(self, listener: Callable[[Sequence[Entry]], None]) -> None:
        """Have a function called on the event loop with the new entries of the log, before writers are told."""
        self._listeners.append(listener)

    def on_progress(self, listener: Callable[[str, bytes], None]) -> None:
        """Have a function called with the target and the state of operations between two entries of the log."""
        self._progress_listeners.append(listener)

    def show_progress(self, target: str, operation: bytes) -> None:
        """Tell how far an operation is; nothing is written."""
        for listener in self._progress_listeners:
            listener(target, operation)

    @property
    def served_seconds(self) -> float:
        """Return for how long this store has been open in its life; no clock jump and no downtime changes it."""
        return self._served_before + time.monotonic() - self._opened

    # Reads: on the event loop, in microseconds.

    def get(self, name: str) -> Row | None:
        """Read a resource; None if there is none of that name."""
        row = self._cache.get(name)
        if row is None:
            epoch = self._cache.epoch
            row = select_row(self.reader, name)
            if row is not None:
                self._cache.keep(row, epoch)
        return row

    def need(self, name: str) -> Row:
        """Read a resource that must exist.

        Raises:
            ResourceNotFound: There is none of that name.
        """
        row = self.get(name)
        if row is None:
            raise not_found(self.reader, name)
        return row

    def find(self, kind: str, name: str) -> Row:
        """Read a resource for a Get: the last segment of the name may be the uid.

        Raises:
            ResourceNotFound: There is none.
        """
        uid = uid_in(name)
        if not uid:
            return self.need(name)
        row = self.get_by_uid(kind, uid)
        if row is None or row.name.split("/")[:-1] != name.split("/")[:-1]:
            raise not_found(self.reader, name)
        return row

    def get_by_uid(self, kind: str, uid: str) -> Row | None:
        """Read a resource by its uid."""
        return select_row_by_uid(self.reader, kind, uid)

    def list(self, kind: str, *, parent: str = "", after: str = "", limit: int | None = None) -> list[Row]:
        """Read the resources of a kind below a parent (`-`: any segment), in the order of their names."""
        return select_rows(self.reader, kind, parent, after, limit)

    def iterate(self, kind: str, *, parent: str = "", after: str = "") -> Generator[Row, None, None]:
        """Read like `list`, row by row, from one state of the store. Close the iterator (`contextlib.closing`).

        The index gives the names; a row is read from the file only if it is not kept or a commit has come in between.
        """
        epoch = self._cache.epoch
        # A statement that is not at its end holds the connection at the state in which it began.
        holder = self.reader.execute("SELECT key FROM meta")
        with closing(holder), closing(iterate_names(self.reader, kind, parent, after)) as names:
            for name in names:
                row = self._cache.at(name, epoch)
                if row is None:
                    row = select_row(self.reader, name)
                    if row is None:
                        raise RuntimeError(f"the index has {name}, the table has not")
                    self._cache.fill(row, epoch)
                yield row

    def get_record(self, space: str, key: str) -> bytes | None:
        """Read a private record."""
        return select_record(self.reader, space, key)

    def iterate_recorded(self, kind: str, space: str) -> Generator[Row, None, None]:
        """Read the resources of a kind whose uids are keys of a space of private records, in the order of the uids.

        From one state of the store. Close the iterator (`contextlib.closing`).
        """
        return iterate_recorded_rows(self.reader, kind, space)

    def list_records(self, space: str, prefix: str = "") -> Records:
        """Read the private records of a space whose keys begin with a prefix, as (key, body), in order."""
        return select_records(self.reader, space, prefix)

    # Writes.

    async def write(self, work: Callable[[Transaction], T]) -> T:
        """Run a function in a transaction and return its result once that is on the disk.

        The function runs in the writer's thread: it must be quick, touch nothing but the transaction, and not keep it.
        If it raises, what it did is undone and the error is raised here. Cancelling the caller does not stop it.

        Raises:
            StoreUnwritable: The disk refuses; nothing was done.
        """
        if self._closed:
            raise StoreUnwritable("the store is closed", store=self.path.name)
        future: asyncio.Future[T] = self._loop.create_future()
        self._queue.put(_Work(work, future))
        if self._thread is None and self._due is None:
            self._due = self._loop.call_soon(self._write_waiting)
        return await future

    async def rehearse(self, work: Callable[[Transaction], T]) -> T:
        """Run a function as `write` does and undo all that it wrote; for plans.

        Raises:
            StoreUnwritable: The disk refuses.
        """
        results: list[T] = []

        def trial(tx: Transaction) -> None:
            results.append(work(tx))
            raise _Undone

        with suppress(_Undone):
            await self.write(trial)
        return results[0]

    async def _close(self) -> None:
        self._closed = True
        # What was committed a moment ago is told to nobody any more: listeners read.
        self._listeners.clear()
        self._progress_listeners.clear()
        if self._thread is None:
            while not self._queue.empty():
                self._write_waiting()
            if self._due is not None:
                self._due.cancel()
            self._writer.close()
            return
        self._queue.put(_Work(self._save_served, self._loop.create_future()))
        # Before the writer is told to end, so that it is the last one out and folds the log into the file.
        self.reader.close()
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    def _write_all(self) -> None:
        """Is the writer's thread: takes all that waits and commits it at once, until told to end."""
        ending = False
        while not ending:
            batch, ending = self._take(self._queue.get())
            if batch:
                entries = self._commit(batch)
                self._loop.call_soon_threadsafe(self._tell, batch, entries)
        self._writer.close()

    def _write_waiting(self) -> None:
        """Do on the event loop what the writer's thread does: take what waits and commit it at once."""
        self._due = None
        batch, _ = self._take(self._queue.get())
        if not self._queue.empty():
            self._due = self._loop.call_soon(self._write_waiting)
        self._tell(batch, self._commit(batch))

    def _take(self, item: _Work | None) -> tuple[_Batch, bool]:
        """Return an item of the queue with those behind it, as many as share a commit, and whether the end came."""
        batch: _Batch = []
        while item is not None:
            batch.append(item)
            if len(batch) == BATCH_LIMIT:
                break
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                break
        return batch, item is None

    def _commit(self, batch: _Batch) -> Sequence[Entry]:
        """Commit the works of a batch; each ends with a result or an error. Returns what the log has gained."""
        transaction = Transaction(
            self._writer,
            self.codec,
            last_seq=self._written_seq,
            last_ns=self._written_ns,
            served_seconds=self.served_seconds,
        )
        try:
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
            self._writer.execute("BEGIN IMMEDIATE")
            for work in batch:
                self._run(work, transaction)
            self._look()
            with self._cache.commit(transaction.touched):
                self._writer.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            # The disk: all of the batch is undone, and the service goes on with what the file holds.
            self._undo()
            for work in batch:
                work.error = work.error or self._unwritable(error)
            return []
        except Exception as error:  # noqa: BLE001  # the boundary of the thread: whoever waits must hear of it
            self._undo()
            for work in batch:
                work.error = work.error or error
            return []
        self._written_seq, self._written_ns = transaction.last_seq, transaction.last_ns
        if self._trouble and not any(isinstance(work.error, StoreUnwritable) for work in batch):
            self._trouble = ""
            _log.info("the store %s can be written again", self.path)
        return transaction.entries

    def _undo(self) -> None:
        """Undo a batch. If that fails too, the next one does it: the thread must live, or all that write would hang."""
        try:
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
        except sqlite3.Error:
            _log.exception("a batch of the store %s could not be undone yet", self.path)

    def _run(self, work: _Work, transaction: Transaction) -> None:
        try:
            work.result = transaction.attempt(work.run)
        except sqlite3.Error as error:
            if not self._writer.in_transaction:
                raise
            work.error = error if isinstance(error, _FAULTS_OF_THE_WORK) else self._unwritable(error)
        except Exception as error:  # noqa: BLE001  # the boundary: it is raised where the work was given
            work.error = error

    def _look(self) -> None:
        """Refuse to commit to files that have no name any more: what they hold is gone with the process.

        Raises:
            OSError: One was moved away, deleted or replaced, or cannot be looked at.
        """
        for path, identity in self._files.items():
            if _identity(path) != identity:
                raise FileNotFoundError(errno.ENOENT, "another file has its name", str(path))

    def _unwritable(self, error: sqlite3.Error | OSError) -> StoreUnwritable:
        # Of its own class for what is damaged or no database; a full or broken disk has one below it.
        damaged = type(error) is sqlite3.DatabaseError
        if self._trouble != str(error):
            self._trouble = str(error)
            advice = "; stop the service and put a copy back (`virtfleet store restore`)" if damaged else ""
            if isinstance(error, FileNotFoundError):
                advice = (
                    "; it was moved, deleted or replaced under the service: put it back, or stop and restore a copy"
                )
            _log.error("the store %s cannot be written: %s%s", self.path, error, advice)
        what = "is damaged" if damaged else "cannot be written"
        return StoreUnwritable(
            f"the store {self.path.name} {what} ({error}); nothing was done",
            retry_delay_seconds=1.0,
            store=self.path.name,
            cause=error,
        )

    def _tell(self, batch: _Batch, entries: Sequence[Entry]) -> None:
        if entries:
            self.last_seq, self.last_ns = entries[-1].seq, entries[-1].time_ns
            if self.last_seq - self.lowest_seq > self.limits.log_entries * 1.1:
                self._crowded.set()
            for listener in self._listeners:
                try:
                    listener(entries)
                except Exception:  # noqa: BLE001  # the boundary to who listens: what is committed must be acknowledged
                    _log.exception("a listener of the store %s failed", self.path)
        for work in batch:
            if work.future.done():
                continue
            if work.error is not None:
                work.future.set_exception(work.error)
            else:
                work.future.set_result(work.result)

    # Maintenance.

    async def _maintain(self) -> None:
        while True:
            try:
                async with asyncio.timeout(MAINTENANCE_SECONDS):
                    await self._crowded.wait()
            except TimeoutError:
                pass
            self._crowded.clear()
            try:
                await self.compact()
            except StoreUnwritable as error:
                _log.warning("maintenance of the store is put off: %s", error)
            except Exception:  # noqa: BLE001  # the boundary of the maintenance: without it the log would grow for ever
                _log.exception("maintenance of the store %s failed", self.path)

    async def compact(self) -> None:
        """Drop what is older than the limits: log, request ids, ended operations. In slices, so that writers go on."""
        limits = self.limits
        await self.write(self._save_served)
        while await self.write(partial(expiry.log, limits=limits)):
            pass
        lowest = self.reader.execute("SELECT min(seq) FROM changes").fetchone()[0]
        self.lowest_seq = int(lowest) if lowest is not None else self.last_seq + 1
        while await self.write(partial(expiry.requests, limits=limits, served_seconds=self.served_seconds)):
            pass
        while await self.write(partial(expiry.operations, limits=limits)):
            pass
        await self.write(partial(expiry.moves, limits=limits))

    def _save_served(self, tx: Transaction) -> None:
        tx.connection.execute(
            "UPDATE meta SET value = ? WHERE key = 'served_seconds'", (repr(self.served_seconds).encode(),)
        )


def _connect_twice(path: Path) -> tuple[sqlite3.Connection, sqlite3.Connection]:
    """Return a connection for writes to a file that has been brought to the present schema, and one for reads."""
    writer = schema.connect(path)
    try:
        schema.prepare(writer, path)
        reader = schema.connect(path)
    except BaseException:
        writer.close()
        raise
    reader.execute("PRAGMA query_only = ON")
    return writer, reader


def identities(path: Path) -> dict[Path, tuple[int, int]]:
    """Return device and inode of a store's file and of its log."""
    return {name: _identity(name) for name in (path, path.with_name(f"{path.name}-wal"))}


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the file against a second process; the lock ends with the process, however it ends."""
    lock = os.open(path.with_name(path.name + ".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        # A command of root's may make it: the service runs as another user.
        owner = (path if path.exists() else path.parent).stat()
        if os.geteuid() == 0 and os.fstat(lock).st_uid != owner.st_uid:
            os.fchown(lock, owner.st_uid, owner.st_gid)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreLocked(f"{path} is open in another process: only one service may use it") from error
        yield
    finally:
        os.close(lock)

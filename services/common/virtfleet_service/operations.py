"""Operations: work that touches a hypervisor, a pool or the kernel, and outlives the call that asked for it.

An operation is recorded before its work begins and ends in the transaction that records the result. In between
stands the effect: the journal says how far it got, and after a crash `settle` finishes it, undoes it, or fails it
with a reason.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from google.longrunning import operations_pb2
from google.protobuf.message import Message

from virtfleet.type.v1 import operation_pb2
from virtfleet_service import errors, failpoints, journal, operation_records, requests, resources
from virtfleet_service.journal import JournalEntry
from virtfleet_service.operation_records import OnFailure
from virtfleet_service.store import Store, StoreUnwritable
from virtfleet_service.transaction import Transaction

if TYPE_CHECKING:
    from virtfleet_service.call import Call

__all__ = ["Commit", "Handler", "Intent", "Job", "JournalEntry", "OnFailure", "Operations", "Work", "plan"]

_log = logging.getLogger(__name__)

INLINE_WAIT_SECONDS = 2.0
INLINE_WAIT_LIMIT_SECONDS = 30.0
SHARE_OF_DEADLINE = 0.8
PROGRESS_INTERVAL_SECONDS = 0.2
SETTLE_SECONDS = 50.0
DRAIN_SECONDS = 10.0
_STORE_RETRY_SECONDS = 1.0

Commit = Callable[[Transaction], Message]
"""Records the result of the work, in the transaction that ends the operation; returns the operation's response."""

Work = Callable[["Job"], Awaitable[Commit]]
Intent = Callable[[Transaction], "str | None"]
Handler = Callable[[operations_pb2.Operation, Sequence[JournalEntry]], Awaitable[Commit]]


class Job:
    """Is an operation as its own work sees it."""

    def __init__(
        self,
        operations: Operations,
        operation: operations_pb2.Operation,
        *,
        cancellable: bool,
        exclusive: bool,
        deadline: float | None,
    ) -> None:
        self.operation_name = operation.name
        self.exclusive = exclusive
        """Whether it works on one thing; else on many, of which some may have ended before the others."""
        self.deadline = deadline
        """When the work must have ended, in the time of the event loop; None: it may take what it takes."""
        self.cancel_requested = False
        self.ended = asyncio.Event()
        """Set when the operation is done and on the disk."""
        self.task: asyncio.Task[None] | None = None
        self.failures: list[OnFailure] = []
        self._operations = operations
        self._operation = operation
        self._metadata = operation_pb2.OperationMetadata()
        operation.metadata.Unpack(self._metadata)
        self._metadata.cancellable = cancellable
        self._rate_from = (0.0, 0)

    @property
    def metadata(self) -> operation_pb2.OperationMetadata:
        """Return the metadata; a detail or a warning that is set here is shown with the next progress."""
        return self._metadata

    @property
    def cancellable(self) -> bool:
        """Whether CancelOperation is heeded; set it to False before the step that cannot be undone."""
        return self._metadata.cancellable

    @cancellable.setter
    def cancellable(self, value: bool) -> None:
        self._metadata.cancellable = value

    def progress(
        self,
        *,
        phase: str = "",
        ratio: float | None = None,
        done_bytes: int | None = None,
        total_bytes: int | None = None,
    ) -> None:
        """Tell how far the work is. Cheap: watchers see at most five changes a second, and the disk none."""
        metadata = self._metadata
        if phase:
            metadata.phase = phase
        if total_bytes is not None:
            metadata.total_bytes = total_bytes
        if done_bytes is not None:
            self._count(done_bytes)
        if ratio is not None:
            metadata.progress_ratio = min(max(ratio, 0.0), 1.0)
        elif done_bytes is not None and metadata.total_bytes:
            metadata.progress_ratio = min(done_bytes / metadata.total_bytes, 1.0)
        self._operations.show_progress(self)

    def on_failure(self, record: OnFailure) -> None:
        """Register a function that records the state after a failure, in the transaction that ends the operation."""
        self.failures.append(record)

    async def journal(self, step: str, payload: bytes = b"") -> None:
        """Write down a step before its effect; returns when it is on the disk. After a crash `settle` gets them."""
        name = self.operation_name
        await self._operations.store.write(lambda tx: journal.append(tx, name, step, payload))

    def snapshot(self) -> operations_pb2.Operation:
        """Return the operation as it is now."""
        self._operation.metadata.Pack(self._metadata)
        copy = operations_pb2.Operation()
        copy.CopyFrom(self._operation)
        return copy

    def _count(self, done_bytes: int) -> None:
        metadata = self._metadata
        metadata.done_bytes = done_bytes
        now = time.monotonic()
        since, bytes_then = self._rate_from
        if not since:
            self._rate_from = (now, done_bytes)
        elif now - since >= 1.0:
            metadata.rate_bytes_per_second = max(int((done_bytes - bytes_then) / (now - since)), 0)
            self._rate_from = (now, done_bytes)
            if metadata.rate_bytes_per_second and metadata.total_bytes > done_bytes:
                metadata.remaining.FromSeconds((metadata.total_bytes - done_bytes) // metadata.rate_bytes_per_second)


class Operations:
    """Runs and keeps the operations of one service.

    Args:
        store: Where they are recorded.
        service: `compute`, `storage`, `network`.
        node: The id of the node.
        prefix: The collection of the names; None: `nodes/{node}/services/{service}/operations/`.
    """

    def __init__(self, store: Store, service: str, node: str, *, prefix: str | None = None) -> None:
        self.store = store
        self.prefix = f"nodes/{node}/services/{service}/operations/" if prefix is None else prefix
        self._jobs: dict[str, Job] = {}
        self._shown: dict[str, float] = {}
        self._awaiting_show: dict[str, asyncio.TimerHandle] = {}
        self._starting: set[asyncio.Task[operations_pb2.Operation]] = set()
        self._draining = False

    @property
    def owner(self) -> str:
        """The process whose operations they are: `nodes/{node}/services/{service}`; empty: a gateway."""
        return self.prefix.rpartition("operations/")[0].rstrip("/")

    @asynccontextmanager
    async def running(self, *, drain_seconds: float = DRAIN_SECONDS) -> AsyncIterator[Operations]:
        """Own the tasks of the operations: at the end what runs gets some time, then is left to the next start."""
        try:
            yield self
        finally:
            await self.drain(drain_seconds)

    async def drain(self, seconds: float = DRAIN_SECONDS) -> None:
        """Refuse new operations, give running ones some time, then stop them; `settle` of the next start ends those."""
        self._draining = True
        if self._starting:
            await asyncio.gather(*self._starting, return_exceptions=True)
        tasks = [job.task for job in self._jobs.values() if job.task is not None]
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=seconds)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=seconds)

    async def run(  # noqa: PLR0913  # all but the first two are named by the caller
        self,
        call: Call,
        request: Message,
        *,
        target: str,
        target_uid: str = "",
        work: Work,
        intent: Intent | None = None,
        cancellable: bool = True,
        exclusive: bool = True,
        timeout: float | None = None,
        steps: Sequence[tuple[str, bytes]] = (),
    ) -> operations_pb2.Operation:
        """Record an operation, start its work, and answer: done if it ends soon, else running.

        The work goes on if the caller goes away. A repeated request_id gets the same operation.

        Args:
            call: The call that asks for it.
            request: Its request: request_id and inline_wait are read from it.
            target: The name of what it changes; no second exclusive operation runs on it.
            target_uid: Its uid, as far as it is known here; what `intent` returns stands instead.
            work: Drives the back end, journals its steps, and returns the commit.
            intent: Checks and records in the transaction that accepts the operation; may return the target's uid. What
                it raises is the error of the call.
            cancellable: Whether CancelOperation is heeded at first.
            exclusive: False for work on many things (batches), whose items are operations or checks of their own.
            timeout: After so many seconds the work is cancelled and the operation fails with OPERATION_TIMED_OUT.
            steps: With what the journal begins, in the transaction that accepts the operation.

        Raises:
            OperationConflict: An operation on the target runs: metadata `operation`.
            RequestIdReused: The request_id belongs to another request of the caller.
            ServiceDraining: The service is about to stop.
            VirtfleetError: What `intent` raised, now or the first time.
        """
        if self._draining:
            raise errors.ServiceDraining("the service is about to stop", retry_delay_seconds=1.0)
        metadata = operation_pb2.OperationMetadata(
            target=target,
            target_uid=target_uid,
            method=requests.method_name(call),
            principal=call.caller.subject,
            request_id=getattr(request, "request_id", ""),
            create_time=resources.now(),
            cancellable=cancellable,
        )
        key = requests.key_of(call, request)
        # A task of its own: a caller that goes away between the record and the start of the work must not split them.
        start = asyncio.create_task(
            self._start(key, metadata, work, intent, steps, exclusive=exclusive, timeout=timeout),
            name=f"start {metadata.method}",
        )
        self._starting.add(start)
        start.add_done_callback(self._started)
        operation = await asyncio.shield(start)
        return await self._wait(operation, _inline_wait_seconds(call, request))

    def _started(self, start: asyncio.Task[operations_pb2.Operation]) -> None:
        self._starting.discard(start)
        if not start.cancelled():
            # A refusal that its caller did not wait for is nobody's error.
            start.exception()

    async def repeated(self, call: Call, request: Message) -> operations_pb2.Operation | None:
        """Return the operation that the same call has begun before, as `run` would; None: it is new.

        For what must be looked at before `run`: what the first call has changed must not refuse its repetition.

        Args:
            call: The call.
            request: Its request.

        Raises:
            RequestIdReused: The request_id belongs to another request of the caller.
            VirtfleetError: What the first call was refused with.
        """
        key = requests.key_of(call, request)
        if key is None:
            return None
        answer = requests.recall(self.store.reader, key)
        if answer is None:
            return None
        return await self._wait(self.get(answer.operation), _inline_wait_seconds(call, request))

    async def _start(
        self,
        key: requests.RequestKey | None,
        metadata: operation_pb2.OperationMetadata,
        work: Work,
        intent: Intent | None,
        steps: Sequence[tuple[str, bytes]],
        *,
        exclusive: bool,
        timeout: float | None,
    ) -> operations_pb2.Operation:
        operation = operations_pb2.Operation(name=self.prefix + _new_id())

        def prepare(tx: Transaction) -> None:
            if exclusive and metadata.target:
                operation_records.refuse_conflict(tx, metadata.target)
            metadata.target_uid = (intent(tx) if intent is not None else None) or metadata.target_uid
            operation.metadata.Pack(metadata)
            operation_records.save(tx, operation, metadata, exclusive=exclusive)
            for step, payload in steps:
                journal.append(tx, operation.name, step, payload)
            if key is not None:
                requests.remember_operation(tx, key, operation.name)

        def accept(tx: Transaction) -> tuple[str, errors.VirtfleetError | None]:
            answer = requests.recall(tx.connection, key) if key is not None else None
            if answer is not None:
                return answer.operation, None
            _, error = requests.guarded(tx, key, prepare)
            return "", error

        existing, error = await self.store.write(accept)
        if error is not None:
            raise error
        if existing:
            return self.get(existing)
        failpoints.reach("operations.accepted")
        deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout
        job = Job(self, operation, cancellable=metadata.cancellable, exclusive=exclusive, deadline=deadline)
        self._jobs[operation.name] = job
        job.task = asyncio.create_task(self._drive(job, work), name=operation.name)
        return job.snapshot()

    async def _wait(self, operation: operations_pb2.Operation, seconds: float) -> operations_pb2.Operation:
        job = self._jobs.get(operation.name)
        if job is None:
            return operation if operation.done else self.get(operation.name)
        if seconds > 0:
            try:
                async with asyncio.timeout(seconds):
                    await job.ended.wait()
            except TimeoutError:
                pass
        return self.get(operation.name)

    async def _drive(self, job: Job, work: Work) -> None:
        """Is the task of one operation; ends with its result on the disk, or, at drain, unfinished."""
        outcome: Commit | errors.VirtfleetError
        try:
            async with asyncio.timeout_at(job.deadline) as limit:
                outcome = await work(job)
        except asyncio.CancelledError:
            if not job.cancel_requested:
                # The service ends; the record and the journal tell the next start what there is to settle.
                self._forget(job)
                raise
            undone = "its effects are undone" if job.exclusive else "what had ended before stays, the rest is undone"
            outcome = errors.OperationCancelled(
                f"{job.operation_name} was cancelled; {undone}", operation=job.operation_name
            )
        except errors.VirtfleetError as error:
            outcome = error
        except Exception as error:  # noqa: BLE001  # the boundary of the work of an operation
            outcome = (
                errors.OperationTimedOut(f"{job.operation_name} took too long", operation=job.operation_name)
                if isinstance(error, TimeoutError) and limit.expired()
                else _unexpected(job.operation_name, error)
            )
        failpoints.reach("operations.worked")
        # What is decided is recorded even if somebody cancels now.
        job.cancellable = False
        self._hush(job)
        recording = asyncio.create_task(self._record(job, outcome), name=f"record {job.operation_name}")
        try:
            await asyncio.shield(recording)
        except asyncio.CancelledError:
            if self._draining:
                recording.cancel()
            await asyncio.wait([recording])
            raise
        finally:
            self._forget(job)

    def _hush(self, job: Job) -> None:
        """Show no progress any more: the end must be the last that watchers see."""
        timer = self._awaiting_show.pop(job.operation_name, None)
        if timer is not None:
            timer.cancel()

    def _forget(self, job: Job) -> None:
        self._hush(job)
        self._jobs.pop(job.operation_name, None)
        self._shown.pop(job.operation_name, None)
        job.ended.set()

    async def _record(self, job: Job, outcome: Commit | errors.VirtfleetError) -> None:
        operation, metadata = job.snapshot(), job.metadata
        if not isinstance(outcome, errors.VirtfleetError):
            commit = outcome
            try:
                await self._write(lambda tx: operation_records.finish(tx, operation, metadata, commit(tx)))
                failpoints.reach("operations.recorded")
                return
            except errors.VirtfleetError as error:
                outcome = error
            except Exception as error:  # noqa: BLE001  # the boundary of the commit of an operation
                outcome = _unexpected(operation.name, error)
        failure = outcome
        await self._write(lambda tx: operation_records.fail(tx, operation, metadata, failure, job.failures))

    async def _write(self, work: Callable[[Transaction], None]) -> None:
        """Write what has happened; while the disk refuses, try again: the effect stands and must not be forgotten."""
        said = ""
        while True:
            try:
                await self.store.write(work)
                return
            except StoreUnwritable as error:
                if said != error.message:
                    said = error.message
                    _log.warning("the end of an operation waits for the store: %s", error)
                await asyncio.sleep(_STORE_RETRY_SECONDS)

    def show_progress(self, job: Job) -> None:
        """Tell watchers how far a job is, at most five times a second; the last state is always told."""
        name = job.operation_name
        if name in self._awaiting_show or name not in self._jobs:
            return
        loop = asyncio.get_running_loop()
        since = loop.time() - self._shown.get(name, 0.0)
        if since < PROGRESS_INTERVAL_SECONDS:
            self._awaiting_show[name] = loop.call_later(PROGRESS_INTERVAL_SECONDS - since, self._show, job)
        else:
            self._show(job)

    def _show(self, job: Job) -> None:
        self._awaiting_show.pop(job.operation_name, None)
        self._shown[job.operation_name] = asyncio.get_running_loop().time()
        self.store.show_progress(job.metadata.target, job.snapshot().SerializeToString())

    def get(self, name: str) -> operations_pb2.Operation:
        """Return an operation as it is now.

        Raises:
            ResourceNotFound: There is none of that name.
        """
        job = self._jobs.get(name)
        if job is not None:
            return job.snapshot()
        found = self.store.reader.execute("SELECT body FROM operations WHERE id = ?", (name,)).fetchone()
        if found is None:
            raise errors.ResourceNotFound(f"{name} does not exist", resource=name, name=name)
        return operations_pb2.Operation.FromString(found[0])

    def shown(self, name: str, body: bytes) -> operations_pb2.Operation:
        """Return an operation that was read from the store, with the progress that only its task knows."""
        job = self._jobs.get(name)
        return job.snapshot() if job is not None else operations_pb2.Operation.FromString(body)

    async def wait(self, name: str, seconds: float) -> operations_pb2.Operation:
        """Return an operation when it is done or the time is over.

        Raises:
            ResourceNotFound: There is none of that name.
        """
        return await self._wait(self.get(name), seconds)

    def cancel(self, name: str) -> None:
        """Ask an operation to stop and undo; one that is done stays as it is.

        Raises:
            ResourceNotFound: There is none of that name.
            NotCancellable: It is past the point of no return, or never could be.
        """
        operation = self.get(name)
        if operation.done:
            return
        job = self._jobs.get(name)
        if job is None or job.task is None or not job.cancellable:
            raise errors.NotCancellable(f"{name} cannot be cancelled now", resource=name, operation=name)
        if not job.cancel_requested:
            job.cancel_requested = True
            job.metadata.cancel_requested = True
            job.task.cancel()
            self.show_progress(job)

    async def settle(self, handlers: Mapping[str, Handler], *, seconds: float = SETTLE_SECONDS) -> int:
        """End every operation that a crash left unfinished; call it once, at start, before operations are run.

        A handler gets the operation and its journal, finishes or undoes the work, and returns the commit or raises the
        error with which the operation fails. Without a handler it fails with CHANGE_ROLLED_BACK.

        Args:
            handlers: By the full name of the method.
            seconds: How long a handler may take.

        Returns:
            How many there were.
        """
        rows = self.store.reader.execute("SELECT body FROM operations WHERE done = 0 ORDER BY id").fetchall()
        left = [operations_pb2.Operation.FromString(body) for (body,) in rows]
        left = [operation for operation in left if operation.name not in self._jobs]
        await asyncio.gather(*(self._settle(operation, handlers, seconds) for operation in left))
        return len(left)

    async def _settle(
        self, operation: operations_pb2.Operation, handlers: Mapping[str, Handler], seconds: float
    ) -> None:
        metadata = operation_pb2.OperationMetadata()
        operation.metadata.Unpack(metadata)
        handler = handlers.get(metadata.method)
        try:
            if handler is None:
                raise errors.ChangeRolledBack(
                    f"the service stopped while {operation.name} ran; it has no effect", operation=operation.name
                )
            async with asyncio.timeout(seconds):
                commit = await handler(operation, journal.read(self.store.reader, operation.name))
            await self._write(lambda tx: operation_records.finish(tx, operation, metadata, commit(tx)))
            return
        except errors.VirtfleetError as error:
            failure = error
        except TimeoutError:
            failure = errors.OperationTimedOut(
                f"{operation.name} could not be settled in {seconds} s", operation=operation.name
            )
        except Exception as error:  # noqa: BLE001  # the boundary of a settlement
            failure = _unexpected(operation.name, error)
        await self._write(lambda tx: operation_records.fail(tx, operation, metadata, failure, ()))

    @staticmethod
    def plan(message: Message) -> operations_pb2.Operation:
        """Return the answer of validate_only: done, recorded nowhere, with what the resource would be."""
        return plan(message)


def plan(message: Message) -> operations_pb2.Operation:
    """Return the answer of validate_only: done, recorded nowhere, with what the resource would be."""
    operation = operations_pb2.Operation(done=True)
    operation.response.Pack(message)
    operation.metadata.Pack(
        operation_pb2.OperationMetadata(
            target=getattr(message, "name", ""), target_uid=getattr(message, "uid", ""), phase="validated"
        )
    )
    return operation


def _inline_wait_seconds(call: Call, request: Message) -> float:
    remaining = call.remaining()
    limit = INLINE_WAIT_LIMIT_SECONDS if remaining is None else max(remaining * SHARE_OF_DEADLINE, 0.0)
    wanted = INLINE_WAIT_SECONDS
    if "inline_wait" in request.DESCRIPTOR.fields_by_name and request.HasField("inline_wait"):
        wait = request.inline_wait  # type: ignore[attr-defined]  # asked for above
        wanted = min(max(wait.ToNanoseconds() / 1e9, 0.0), INLINE_WAIT_LIMIT_SECONDS)
    return min(wanted, limit)


def _new_id() -> str:
    """Return an id that sorts by time."""
    return f"op{time.time_ns() // 1_000_000:012x}{secrets.token_hex(5)}"


def _unexpected(name: str, error: BaseException) -> errors.Unexpected:
    log_id = uuid.uuid4().hex
    _log.error("the work of %s failed unexpectedly [%s]", name, log_id, exc_info=error)
    return errors.Unexpected(f"an unexpected error ended {name}; its log entry is {log_id}", log_id=log_id)

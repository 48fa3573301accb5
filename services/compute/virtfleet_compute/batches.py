"""Many domains in one call: one operation, one result per item, no item in the way of another."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from google.longrunning import operations_pb2
from google.protobuf.message import Message

from virtfleet.compute.v1 import domain_pb2
from virtfleet_compute import batch_results, lifecycle, records
from virtfleet_compute.batch_results import Response, Results
from virtfleet_compute.context import Context, ref, refuse_batched
from virtfleet_compute.creation import Creation, Draft
from virtfleet_compute.domains import Domains
from virtfleet_compute.guests import Guests
from virtfleet_compute.holds import Hold
from virtfleet_compute.lifecycle import Outcome, Verb
from virtfleet_compute.power import Power, record_end, record_failed_start, record_start
from virtfleet_service import failpoints, names, requests, resources
from virtfleet_service.errors import (
    FieldConflict,
    OperationConflict,
    VirtfleetError,
)
from virtfleet_service.operations import Commit, Job
from virtfleet_service.store import Transaction

if TYPE_CHECKING:
    from virtfleet_service.call import Call

DEFINE_SLICE = 250
"""How many plain definitions share one transaction: others may write in between."""

_Item = TypeVar("_Item", domain_pb2.StartDomainRequest, domain_pb2.StopDomainRequest, domain_pb2.DeleteDomainRequest)
_T = TypeVar("_T")

_Note = Callable[[Transaction], None]
"""Writes down that an item has ended well, in the transaction that records it."""


class _BatchRequest(Protocol):
    parent: str
    max_parallel: int
    validate_only: bool


class _Defining:
    """Stores some plain definitions in one transaction, each in a part of its own."""

    def __init__(
        self, context: Context, creation: Creation, drafts: Sequence[tuple[int, Draft]], operation: str, method: str
    ) -> None:
        self._context = context
        self._creation = creation
        self._drafts = drafts
        self._operation = operation
        self._method = method

    def __call__(self, tx: Transaction) -> list[VirtfleetError | None]:
        """Store them; returns the failure of each, or None."""
        return [self._attempt(tx, index, draft) for index, draft in self._drafts]

    def _attempt(self, tx: Transaction, index: int, draft: Draft) -> VirtfleetError | None:
        try:
            tx.attempt(lambda part: self._store(part, draft))
        except VirtfleetError as error:
            batch_results.note(tx, self._operation, index, error)
            return error
        batch_results.note(tx, self._operation, index)
        return None

    def _store(self, tx: Transaction, draft: Draft) -> None:
        refuse_batched(self._context, draft.domain.name)
        self._creation.accept(tx, draft, lasting=False)
        self._creation.record(tx, draft, None, self._method)


class Batches:
    """Does the batch methods of DomainService."""

    def __init__(self, context: Context, guests: Guests, creation: Creation, domains: Domains, power: Power) -> None:
        self._context = context
        self._guests = guests
        self._creation = creation
        self._domains = domains
        self._power = power

    # Create.

    async def create(self, request: domain_pb2.BatchCreateDomainsRequest, call: Call) -> operations_pb2.Operation:
        """Make many domains: see `BatchCreateDomains`."""
        repeated = await self._context.operations.repeated(call, request)
        if repeated is not None:
            return repeated
        for index, item in enumerate(request.requests):
            _check_item(item, index)
            if item.parent not in ("", request.parent):
                raise FieldConflict(
                    "an item has another parent than its batch", field=f"requests[{index}].parent", parent=item.parent
                )
        item_names = [f"{request.parent}/domains/{item.domain_id}" for item in request.requests]
        _check_twins(item_names, "domain_id")
        drafts: list[Draft | VirtfleetError] = []
        for item in request.requests:
            try:
                drafts.append(await self._creation.draft(item, call))
            except VirtfleetError as error:
                drafts.append(error)
        if request.validate_only:
            outcomes = await self._context.store.rehearse(lambda tx: self._accepted(tx, drafts))
            return self._context.operations.plan(self._planned(item_names, outcomes))
        method = requests.method_name(call)

        async def work(job: Job) -> Commit:
            results = Results(item_names, job)
            await self._define_simple(job, drafts, results, method)
            others = [index for index, draft in enumerate(drafts) if isinstance(draft, Draft) and not draft.simple]

            async def make(index: int) -> None:
                draft = drafts[index]
                assert isinstance(draft, Draft)  # noqa: S101  # chosen so
                results.done(index, await self._make(draft, call, job, index, method))

            await self._each(job, others, [item_names[index] for index in others], request, results, make)
            return lambda _tx: results.response(domain_pb2.BatchCreateDomainsResponse)

        return await self._run(call, request, item_names, work)

    def _accepted(self, tx: Transaction, drafts: list[Draft | VirtfleetError]) -> list[Draft | VirtfleetError]:
        """Say what becomes of drafts that are made one after the other."""
        outcomes: list[Draft | VirtfleetError] = []
        for draft in drafts:
            try:
                if isinstance(draft, Draft):
                    tx.attempt(partial(self._accept, draft=draft))
                outcomes.append(draft)
            except VirtfleetError as error:
                outcomes.append(error)
        return outcomes

    def _accept(self, tx: Transaction, draft: Draft) -> None:
        refuse_batched(self._context, draft.domain.name)
        self._creation.accept(tx, draft)

    def _planned(
        self, item_names: list[str], drafts: list[Draft | VirtfleetError]
    ) -> domain_pb2.BatchCreateDomainsResponse:
        results = Results(item_names, None)
        for index, draft in enumerate(drafts):
            if isinstance(draft, Draft):
                results.done(index, draft.domain)
            else:
                results.failed(index, draft)
        return results.response(domain_pb2.BatchCreateDomainsResponse)

    async def _define_simple(
        self, job: Job, drafts: list[Draft | VirtfleetError], results: Results, method: str
    ) -> None:
        """Store all definitions that need nobody's help, in few transactions."""
        context, creation = self._context, self._creation
        simple: list[tuple[int, Draft]] = []
        wrong: list[tuple[int, VirtfleetError]] = []
        for index, draft in enumerate(drafts):
            if isinstance(draft, VirtfleetError):
                results.failed(index, draft)
                wrong.append((index, draft))
            elif draft.simple:
                simple.append((index, draft))
        if wrong:
            await context.store.write(lambda tx: _note_all(tx, job.operation_name, wrong))

        for start in range(0, len(simple), DEFINE_SLICE):
            part = simple[start : start + DEFINE_SLICE]
            for _, draft in part:
                domain = draft.domain
                driver = context.driver(domain)
                await driver.define(ref(domain), domain.status.resolved_spec)
            store = _Defining(context, creation, part, job.operation_name, method)
            outcomes = await context.store.write(store)
            for (index, draft), error in zip(part, outcomes, strict=True):
                if error is None:
                    results.done(index, draft.domain)
                else:
                    results.failed(index, error)
            failpoints.reach("compute.batch.defined")

    async def _make(self, draft: Draft, call: Call, job: Job, index: int, method: str) -> domain_pb2.Domain:
        """Make one domain that needs volumes, ports or a start."""
        context, creation = self._context, self._creation
        async with context.holds.held(draft.domain.uid) as hold:
            try:
                # A cancellation may come when it is on its way to the disk.
                await context.store.write(lambda tx: creation.accept(tx, draft))
                async with AsyncExitStack() as undo:
                    run = await creation.make(draft, call, undo, lambda _: None, f"{job.operation_name}/{index}")
                    hold.seen = run.observation if run is not None else None
                    undo.pop_all()
            except BaseException:
                await _certain(context.store.write(lambda tx: creation.forget(tx, draft.creating)))
                raise

            def record(tx: Transaction) -> domain_pb2.Domain:
                batch_results.note(tx, job.operation_name, index)
                return creation.record(tx, draft, run, method)

            return await _certain(context.store.write(record))

    # Start, stop, delete.

    async def start(self, request: domain_pb2.BatchStartDomainsRequest, call: Call) -> operations_pb2.Operation:
        """Start many domains: see `BatchStartDomains`."""
        method = requests.method_name(call)

        async def one(
            item: domain_pb2.StartDomainRequest, domain: domain_pb2.Domain, hold: Hold, note: _Note
        ) -> domain_pb2.Domain:
            runtime_id = str(uuid.uuid4())
            starting = records.Starting(domain.name, runtime_id)
            store = self._context.store
            try:
                await store.write(lambda tx: tx.put_record(records.START, domain.uid, starting.encode()))
                async with AsyncExitStack() as undo:
                    run = await self._guests.start(domain, call, undo, runtime_id=runtime_id, paused=item.paused)
                    hold.seen = run.observation
                    undo.pop_all()
            except VirtfleetError as error:
                failure = error
                await store.write(lambda tx: record_failed_start(tx, domain, failure, method))
                raise
            except asyncio.CancelledError:
                await _certain(store.write(lambda tx: tx.delete_record(records.START, domain.uid)))
                raise

            def record(tx: Transaction) -> domain_pb2.Domain:
                note(tx)
                return record_start(tx, domain.name, run, method)

            return await _certain(store.write(record))

        return await self._verbs(request, request.requests, call, Verb.START, one, domain_pb2.BatchStartDomainsResponse)

    async def stop(self, request: domain_pb2.BatchStopDomainsRequest, call: Call) -> operations_pb2.Operation:
        """Stop many domains: see `BatchStopDomains`."""
        method = requests.method_name(call)

        async def one(
            item: domain_pb2.StopDomainRequest, domain: domain_pb2.Domain, hold: Hold, note: _Note
        ) -> domain_pb2.Domain:
            mode = item.mode or domain_pb2.STOP_MODE_GRACEFUL_THEN_FORCE
            observation = await self._guests.end(domain, mode, self._power.grace_seconds(item))
            hold.seen = observation
            failpoints.reach("compute.batch.stopped")
            await self._guests.let_go(domain)

            def record(tx: Transaction) -> domain_pb2.Domain:
                note(tx)
                return record_end(tx, domain, observation, method)

            return await _certain(self._context.store.write(record))

        return await self._verbs(request, request.requests, call, Verb.STOP, one, domain_pb2.BatchStopDomainsResponse)

    async def delete(self, request: domain_pb2.BatchDeleteDomainsRequest, call: Call) -> operations_pb2.Operation:
        """Delete many domains: see `BatchDeleteDomains`."""
        method = requests.method_name(call)

        async def one(item: domain_pb2.DeleteDomainRequest, domain: domain_pb2.Domain, hold: Hold, note: _Note) -> None:
            self._domains.check_delete(domain, item)
            if item.delete_volumes:
                self._authorize_volumes(domain, call)
            store = self._context.store
            await store.write(lambda tx: records.begin_deletion(tx, domain.uid, volumes=item.delete_volumes))
            try:
                await self._domains.take_down(
                    domain, hold, cause=method, delete_volumes=item.delete_volumes, stop=item.stop, call=call
                )
            except VirtfleetError:
                await store.write(lambda tx: tx.delete_record(records.DELETE, domain.uid))
                raise

            def record(tx: Transaction) -> None:
                note(tx)
                self._domains.record_delete(tx, domain, method)

            await _certain(store.write(record))

        return await self._verbs(request, request.requests, call, None, one, domain_pb2.BatchDeleteDomainsResponse)

    async def _verbs(  # what differs between the three batches of verbs
        self,
        request: _BatchRequest,
        items: Sequence[_Item],
        call: Call,
        verb: Verb | None,
        act: Callable[[_Item, domain_pb2.Domain, Hold, _Note], Awaitable[domain_pb2.Domain | None]],
        of: type[Response],
    ) -> operations_pb2.Operation:
        context = self._context
        for index, item in enumerate(items):
            _check_item(item, index)
            if names.parent_of(item.name) != request.parent:
                raise FieldConflict(
                    "an item is of another parent than its batch", field=f"requests[{index}].name", name=item.name
                )
        item_names = [item.name for item in items]
        _check_twins(item_names, "name")

        async def one(index: int, operation: str) -> domain_pb2.Domain | None:
            item = items[index]
            if getattr(item, "allow_missing", False) and context.store.get(item.name) is None:
                return None
            domain = context.domain(item.name)
            async with context.holds.held(domain.uid) as hold:
                domain = context.domain(item.name)
                resources.check_preconditions(domain, item.etag, item.expected_uid)
                if verb is not None and lifecycle.judge(verb, domain) is Outcome.DONE:
                    return domain
                return await act(item, domain, hold, partial(batch_results.note, operation=operation, index=index))

        if request.validate_only:
            return context.operations.plan(self._judged(items, verb, call, of))

        async def work(job: Job) -> Commit:
            results = Results(item_names, job)
            job.on_failure(lambda tx, _error: records.end_deletions(tx, item_names))

            async def each(index: int) -> None:
                results.done(index, await one(index, job.operation_name))

            await self._each(job, range(len(items)), item_names, request, results, each)
            return lambda _tx: results.response(of)

        return await self._run(call, request, item_names, work)

    def _judged(self, items: Sequence[_Item], verb: Verb | None, call: Call, of: type[Response]) -> Response:
        """Say what would become of each item."""
        results = Results([item.name for item in items], None)
        for index, item in enumerate(items):
            try:
                results.done(index, self._judge(item, verb, call))
            except VirtfleetError as error:
                results.failed(index, error)
        return results.response(of)

    def _judge(self, item: _Item, verb: Verb | None, call: Call) -> domain_pb2.Domain | None:
        """Say what would become of an item; None: there is no domain afterwards."""
        context = self._context
        if getattr(item, "allow_missing", False) and context.store.get(item.name) is None:
            return None
        domain = context.domain(item.name)
        resources.check_preconditions(domain, item.etag, item.expected_uid)
        if verb is not None:
            lifecycle.judge(verb, domain)
        if not isinstance(item, domain_pb2.DeleteDomainRequest):
            return domain
        self._domains.check_delete(domain, item)
        if item.delete_volumes:
            self._authorize_volumes(domain, call)
        return None

    def _authorize_volumes(self, domain: domain_pb2.Domain, call: Call) -> None:
        for volume in self._domains.volumes_of(domain.uid):
            call.authorize(volume, "volumes.delete")

    async def _run(
        self,
        call: Call,
        request: _BatchRequest,
        item_names: Sequence[str],
        work: Callable[[Job], Awaitable[Commit]],
    ) -> operations_pb2.Operation:
        assert isinstance(request, Message)  # noqa: S101  # every request is one
        return await self._context.operations.run(
            call,
            request,
            target=request.parent,
            work=work,
            exclusive=False,
            steps=batch_results.steps(item_names),
        )

    async def _each(  # the parts of one batch
        self,
        job: Job,
        indexes: Sequence[int],
        item_names: Sequence[str],
        request: _BatchRequest,
        results: Results,
        act: Callable[[int], Awaitable[None]],
    ) -> None:
        """Do the items, some at a time; a domain that another operation works on fails its item."""
        context = self._context
        limit = asyncio.Semaphore(request.max_parallel or context.settings.parallel_count)

        async def one(index: int, name: str) -> None:
            async with limit:
                try:
                    if name in context.batched:
                        raise OperationConflict(
                            f"another batch works on {name}", resource=name, operation=context.batched[name]
                        )
                    context.batched[name] = job.operation_name
                    try:
                        _refuse_running(context, name)
                        await act(index)
                    finally:
                        del context.batched[name]
                except VirtfleetError as error:
                    failure = error
                    results.failed(index, failure)
                    await context.store.write(lambda tx: batch_results.note(tx, job.operation_name, index, failure))

        async with asyncio.TaskGroup() as group:
            for index, name in zip(indexes, item_names, strict=True):
                group.create_task(one(index, name))


async def _certain(write: Coroutine[Any, Any, _T]) -> _T:
    """Write what has happened to an item; a cancellation waits for it, for the next one must see it."""
    writing = asyncio.create_task(write)
    try:
        return await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.wait([writing])
        raise


def _note_all(tx: Transaction, operation: str, failures: Sequence[tuple[int, VirtfleetError]]) -> None:
    for index, error in failures:
        batch_results.note(tx, operation, index, error)


def _refuse_running(context: Context, name: str) -> None:
    """Refuse an item whose domain an operation of its own works on."""
    found = context.store.reader.execute(
        "SELECT id, method FROM operations WHERE target = ? AND done = 0 AND exclusive = 1", (name,)
    ).fetchone()
    if found is not None:
        operation, method = found
        raise OperationConflict(
            f"{operation} ({method.rpartition('.')[2]}) runs on {name}: wait for it or cancel it",
            resource=name,
            retry_delay_seconds=1.0,
            operation=operation,
            method=method,
        )


def _check_item(item: _Item | domain_pb2.CreateDomainRequest, index: int) -> None:
    """Refuse what steers a call in an item of a batch.

    Raises:
        FieldConflict: The item has a request_id, validate_only or inline_wait.
    """
    for name, given in (
        ("request_id", bool(item.request_id)),
        ("validate_only", item.validate_only),
        ("inline_wait", item.HasField("inline_wait")),
    ):
        if given:
            raise FieldConflict(f"{name} stands in the batch, not in its items", field=f"requests[{index}].{name}")


def _check_twins(item_names: Sequence[str], field: str) -> None:
    """Refuse a name that occurs twice; `field` is that of an item which says it."""
    seen: set[str] = set()
    for index, name in enumerate(item_names):
        if name in seen:
            raise FieldConflict(f"{name} occurs twice", field=f"requests[{index}].{field}", name=name)
        seen.add(name)

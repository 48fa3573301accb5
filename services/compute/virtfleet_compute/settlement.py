"""What becomes of the operations that a crash cut: by what the service found when it came back.

Handlers run when the store has been held against the host: a domain's state is what is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from google.longrunning import operations_pb2
from google.protobuf import empty_pb2
from google.protobuf.message import Message
from google.rpc import status_pb2

from virtfleet.compute.v1 import domain_pb2
from virtfleet.type.v1 import operation_pb2
from virtfleet_compute import batch_results, records, statuses
from virtfleet_compute.batch_results import Results
from virtfleet_compute.context import Context, ref
from virtfleet_compute.domains import Domains
from virtfleet_compute.drivers.facets import LiveUpdate
from virtfleet_compute.updates import LIVE_STEP
from virtfleet_service.errors import ChangeRolledBack, HypervisorFailed, ResourceNotFound, VirtfleetError
from virtfleet_service.operations import Commit, Handler, JournalEntry
from virtfleet_service.store import Transaction

SERVICE = "virtfleet.compute.v1.DomainService"

State = domain_pb2.DomainState

_Holds = Callable[[domain_pb2.Domain | None], bool]


class Settlement:
    """Ends operations that were cut."""

    def __init__(self, context: Context, domains: Domains) -> None:
        self._context = context
        self._domains = domains

    def handlers(self) -> Mapping[str, Handler]:
        """Return the handlers by method."""
        return {
            f"{SERVICE}.StartDomain": self._start,
            f"{SERVICE}.StopDomain": self._stop,
            f"{SERVICE}.SuspendDomain": self._suspend,
            f"{SERVICE}.ResumeDomain": self._resume,
            f"{SERVICE}.RebootDomain": self._boot_again,
            f"{SERVICE}.ResetDomain": self._boot_again,
            f"{SERVICE}.UpdateDomain": self._update,
            f"{SERVICE}.DeleteDomain": self._delete,
            f"{SERVICE}.BatchCreateDomains": self._batch_create,
            f"{SERVICE}.BatchStartDomains": self._batch_start,
            f"{SERVICE}.BatchStopDomains": self._batch_stop,
            f"{SERVICE}.BatchDeleteDomains": self._batch_delete,
        }

    def _target(self, operation: operations_pb2.Operation) -> domain_pb2.Domain | None:
        metadata = operation_pb2.OperationMetadata()
        operation.metadata.Unpack(metadata)
        domain = self._domain(metadata.target)
        return domain if domain is None or metadata.target_uid in ("", domain.uid) else None

    def _domain(self, name: str) -> domain_pb2.Domain | None:
        row = self._context.store.get(name)
        return domain_pb2.Domain.FromString(row.body) if row is not None else None

    async def _start(self, operation: operations_pb2.Operation, _: Sequence[JournalEntry]) -> Commit:
        domain = self._target(operation)
        if domain is None or not statuses.is_active(domain):
            raise _rolled_back(operation, "the guest does not run")
        return _answer(domain)

    async def _stop(self, operation: operations_pb2.Operation, _: Sequence[JournalEntry]) -> Commit:
        domain = self._target(operation)
        if domain is not None and statuses.is_active(domain):
            raise _rolled_back(operation, "the guest runs on")
        # A transient one is gone.
        return _answer(domain if domain is not None else domain_pb2.Domain())

    async def _suspend(self, operation: operations_pb2.Operation, _: Sequence[JournalEntry]) -> Commit:
        return self._state(operation, State.DOMAIN_STATE_PAUSED)

    async def _resume(self, operation: operations_pb2.Operation, _: Sequence[JournalEntry]) -> Commit:
        return self._state(operation, State.DOMAIN_STATE_RUNNING)

    def _state(self, operation: operations_pb2.Operation, wanted: int) -> Commit:
        domain = self._target(operation)
        if domain is None or domain.status.state != wanted:
            raise _rolled_back(operation, "the guest is as before")
        return _answer(domain)

    async def _boot_again(self, operation: operations_pb2.Operation, _: Sequence[JournalEntry]) -> Commit:
        # Nothing that could be seen now tells whether the guest has been told.
        domain = self._target(operation)
        raise HypervisorFailed(
            f"the service stopped while {operation.name} ran; whether the guest was told to boot again is not known",
            resource=domain.name if domain is not None else "",
            operation=operation.name,
        )

    async def _update(self, operation: operations_pb2.Operation, entries: Sequence[JournalEntry]) -> Commit:
        """Undo a change: nothing of it is recorded, but the guest may have changed, and MACs are taken for it."""
        domain = self._target(operation)
        if domain is not None:
            await self._context.store.write(
                lambda tx: records.free_macs_beside(tx, domain, records.macs_of(tx, domain.uid))
            )
            recorded = domain.status.active_spec
            for entry in entries:
                if entry.step == LIVE_STEP and statuses.is_active(domain):
                    facet = self._context.facet(domain, LiveUpdate)  # type: ignore[type-abstract]  # a protocol names the facet
                    await facet.update_live(ref(domain), recorded, recorded, entry.payload.decode().split("\n"))
        raise _rolled_back(operation, "the domain is as it was before")

    async def _delete(self, operation: operations_pb2.Operation, _: Sequence[JournalEntry]) -> Commit:
        domain = self._target(operation)
        if domain is None:
            return lambda _tx: empty_pb2.Empty()
        if statuses.is_active(domain):
            await self._context.store.write(lambda tx: tx.delete_record(records.DELETE, domain.uid))
            raise _rolled_back(operation, "the guest runs on")
        return await self._domains.finish_delete(domain, f"{SERVICE}.DeleteDomain")

    # Batches: what was noted of an item stands; of the others the state of the domain tells.

    async def _batch_create(self, operation: operations_pb2.Operation, entries: Sequence[JournalEntry]) -> Commit:
        # A definition is noted in the transaction that stores it, so what is not noted is not there.
        return self._batch(operation, entries, lambda _: False, domain_pb2.BatchCreateDomainsResponse)

    async def _batch_start(self, operation: operations_pb2.Operation, entries: Sequence[JournalEntry]) -> Commit:
        def runs(domain: domain_pb2.Domain | None) -> bool:
            return domain is not None and statuses.is_active(domain)

        return self._batch(operation, entries, runs, domain_pb2.BatchStartDomainsResponse)

    async def _batch_stop(self, operation: operations_pb2.Operation, entries: Sequence[JournalEntry]) -> Commit:
        def stopped(domain: domain_pb2.Domain | None) -> bool:
            return domain is not None and not statuses.is_active(domain)

        return self._batch(operation, entries, stopped, domain_pb2.BatchStopDomainsResponse)

    async def _batch_delete(self, operation: operations_pb2.Operation, entries: Sequence[JournalEntry]) -> Commit:
        item_names, noted = batch_results.noted(entries)
        commits: list[Commit] = []
        for index, name in enumerate(item_names):
            domain = self._domain(name)
            if index in noted or domain is None:
                continue
            if self._context.store.get_record(records.DELETE, domain.uid) is None:
                continue
            if statuses.is_active(domain):
                continue
            try:
                commits.append(await self._domains.finish_delete(domain, f"{SERVICE}.BatchDeleteDomains"))
                noted[index] = status_pb2.Status()
            except VirtfleetError as error:
                noted[index] = error.to_status()
        respond = self._respond(
            operation, item_names, noted, _is_gone, domain_pb2.BatchDeleteDomainsResponse, shows=False
        )

        def commit(tx: Transaction) -> Message:
            for finish in commits:
                finish(tx)
            records.end_deletions(tx, item_names)
            return respond(tx)

        return commit

    def _batch(
        self,
        operation: operations_pb2.Operation,
        entries: Sequence[JournalEntry],
        holds: _Holds,
        of: type[batch_results.Response],
    ) -> Commit:
        return self._respond(operation, *batch_results.noted(entries), holds, of)

    def _respond(
        self,
        operation: operations_pb2.Operation,
        item_names: Sequence[str],
        noted: Mapping[int, status_pb2.Status],
        holds: _Holds,
        of: type[batch_results.Response],
        *,
        shows: bool = True,
    ) -> Commit:
        results = Results(item_names, None)
        cut = _rolled_back(operation, "the item has no effect").to_status()
        for index, name in enumerate(item_names):
            domain = self._domain(name)
            status = noted.get(index)
            if status is None and holds(domain):
                status = status_pb2.Status()
            elif status is None and domain is None and of is not domain_pb2.BatchCreateDomainsResponse:
                status = ResourceNotFound(f"{name} does not exist", resource=name, name=name).to_status()
            elif status is None:
                status = cut
            results.ended(index, status, domain if shows and status.code == 0 else None)
        response = results.response(of)
        return lambda _tx: response


def _is_gone(domain: domain_pb2.Domain | None) -> bool:
    return domain is None


def _answer(message: Message) -> Commit:
    return lambda _tx: message


def _rolled_back(operation: operations_pb2.Operation, what: str) -> ChangeRolledBack:
    return ChangeRolledBack(
        f"the service stopped while {operation.name} ran; {what}", operation=operation.name, outcome=what
    )

"""The results of a batch: collected while it runs, noted item by item in its journal, read again after a crash."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from google.rpc import status_pb2

from virtfleet.compute.v1 import domain_pb2
from virtfleet.type.v1 import operation_pb2
from virtfleet_compute import statuses
from virtfleet_service import journal
from virtfleet_service.errors import VirtfleetError
from virtfleet_service.operations import Job, JournalEntry
from virtfleet_service.transaction import Transaction

RESPONSE_LIMIT_BYTES = 1024 * 1024
"""Results of more than this carry domains of view BASIC; of more than this even so, none."""

Response = TypeVar(
    "Response",
    domain_pb2.BatchCreateDomainsResponse,
    domain_pb2.BatchStartDomainsResponse,
    domain_pb2.BatchStopDomainsResponse,
    domain_pb2.BatchDeleteDomainsResponse,
)

ITEMS = "items"
"""The step of the journal that names all items; the steps after it are numbers of items, with their statuses."""


class Results:
    """Collects the results of a batch and shows how many there are."""

    def __init__(self, item_names: Sequence[str], job: Job | None) -> None:
        self._results = [domain_pb2.DomainResult(name=name) for name in item_names]
        self._job = job
        self._detail = operation_pb2.BatchDetail(total_count=len(item_names))
        self._show()

    def done(self, index: int, domain: domain_pb2.Domain | None) -> None:
        """Take in the result of an item that has ended well."""
        self._results[index].status.SetInParent()
        if domain is not None:
            self._results[index].domain.CopyFrom(domain)
        self._detail.succeeded_count += 1
        self._show()

    def ended(self, index: int, status: status_pb2.Status, domain: domain_pb2.Domain | None) -> None:
        """Take in an item whose status is known."""
        if status.code:
            self._results[index].status.CopyFrom(status)
            self._detail.failed_count += 1
            self._show()
        else:
            self.done(index, domain)

    def failed(self, index: int, error: VirtfleetError) -> None:
        """Take in the failure of an item."""
        self.ended(index, status_of(index, error), None)

    def _show(self) -> None:
        if self._job is None:
            return
        self._job.metadata.batch.CopyFrom(self._detail)
        ended = self._detail.succeeded_count + self._detail.failed_count
        self._job.progress(ratio=ended / max(self._detail.total_count, 1))

    def response(self, of: type[Response]) -> Response:
        """Return the response, with as much of the domains as fits."""
        whole = of(results=self._results)
        if whole.ByteSize() <= RESPONSE_LIMIT_BYTES:
            return whole
        for result in self._results:
            if result.HasField("domain"):
                basic = statuses.basic(result.domain)
                result.domain.CopyFrom(basic)
        basic_response = of(results=self._results)
        if basic_response.ByteSize() <= RESPONSE_LIMIT_BYTES:
            return basic_response
        for result in self._results:
            result.ClearField("domain")
        return of(results=self._results)


def status_of(index: int, error: VirtfleetError) -> status_pb2.Status:
    """Return the status of an item that has failed; its fields are told as those of the batch that the client sent."""
    return error.rebased(lambda path: f"requests[{index}].{path}").to_status()


def steps(item_names: Sequence[str]) -> list[tuple[str, bytes]]:
    """Return the steps with which the journal of a batch begins."""
    return [(ITEMS, "\n".join(item_names).encode())]


def note(tx: Transaction, operation: str, index: int, error: VirtfleetError | None = None) -> None:
    """Write down how an item has ended; where it changed something, in the transaction of the change."""
    status = status_of(index, error) if error is not None else status_pb2.Status()
    journal.append(tx, operation, str(index), status.SerializeToString())


def noted(entries: Sequence[JournalEntry]) -> tuple[list[str], dict[int, status_pb2.Status]]:
    """Read a journal: the names of the items, and the statuses of those that had ended, by their numbers."""
    item_names: list[str] = []
    ended: dict[int, status_pb2.Status] = {}
    for entry in entries:
        if entry.step == ITEMS:
            item_names = entry.payload.decode().split("\n")
        else:
            ended[int(entry.step)] = status_pb2.Status.FromString(entry.payload)
    return item_names, ended

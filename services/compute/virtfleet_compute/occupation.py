"""Shows in the status of a domain which operation works on it, once that takes long enough for anybody to look.

Quick operations, nearly all, cost no write for it: their end says everything.
"""

from __future__ import annotations

import asyncio
from functools import partial

from virtfleet.compute.v1 import domain_pb2
from virtfleet_compute import records, statuses
from virtfleet_compute.background import Background
from virtfleet_compute.context import KIND
from virtfleet_compute.holds import Hold, Holds
from virtfleet_service.operations import Job
from virtfleet_service.store import Store, Transaction

SHOWN_AFTER_SECONDS = 1.0


class Occupation:
    """Holds domains for operations.

    Args:
        tasks: Owns the writes.
    """

    def __init__(self, store: Store, holds: Holds, tasks: Background) -> None:
        self._store = store
        self._holds = holds
        self._tasks = tasks

    async def hold(self, job: Job, uid: str) -> Hold:
        """Hold a domain until an operation has ended and is on the disk: its result is recorded after its work."""
        hold = await self._holds.acquire(uid)
        shown = False

        def show() -> None:
            nonlocal shown
            shown = True
            work = partial(show_operation, uid=uid, operation=job.operation_name)
            self._tasks.create_task(self._store.write(work), name=f"{job.operation_name} is shown")

        timer = asyncio.get_running_loop().call_later(SHOWN_AFTER_SECONDS, show)

        def end(_task: object) -> None:
            timer.cancel()
            self._holds.release(hold)
            if shown:
                work = partial(hide_operation, uid=uid)
                self._tasks.create_task(self._store.write(work), name=f"{job.operation_name} is hidden")

        assert job.task is not None  # noqa: S101  # this runs in that task
        job.task.add_done_callback(end)
        return hold

    async def forget(self) -> None:
        """Hide what an earlier instance of the service has shown."""
        for uid, _ in self._store.list_records(records.OCCUPIED):
            await self._store.write(partial(hide_operation, uid=uid))


def show_operation(tx: Transaction, *, uid: str, operation: str) -> None:
    """Write into a domain's status that an operation works on it."""
    row = tx.get_by_uid(KIND, uid)
    if row is None:
        return
    domain = domain_pb2.Domain.FromString(row.body)
    statuses.occupied(domain, operation)
    tx.put_record(records.OCCUPIED, uid, operation.encode())
    records.save(tx, domain, statuses.OBSERVED)


def hide_operation(tx: Transaction, *, uid: str) -> None:
    """Write into a domain's status that nothing works on it; nothing is written if it says so."""
    tx.delete_record(records.OCCUPIED, uid)
    row = tx.get_by_uid(KIND, uid)
    if row is None:
        return
    domain = domain_pb2.Domain.FromString(row.body)
    if statuses.free(domain):
        records.save(tx, domain, statuses.OBSERVED)

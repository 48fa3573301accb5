"""Starts after a boot of the node what is to be started then; waits for pools and networks, for a bounded time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from google.protobuf import duration_pb2

from virtfleet.compute.v1 import domain_pb2
from virtfleet.type.v1 import resource_pb2
from virtfleet_compute import records, statuses
from virtfleet_compute.context import KIND, Context
from virtfleet_compute.power import Power
from virtfleet_service import resources
from virtfleet_service.errors import (
    Aborted,
    BackingMissing,
    ResourceNotFound,
    Unavailable,
    VirtfleetError,
    WrongState,
)
from virtfleet_service.peers import error_from_status
from virtfleet_service.store import StoreUnwritable, Transaction

if TYPE_CHECKING:
    from virtfleet_service.call import Call

_log = logging.getLogger(__name__)

BOOT_KEY = "boot_id"
PARALLEL_COUNT = 4
FIRST_DELAY_SECONDS = 0.5
LAST_DELAY_SECONDS = 5.0
WAIT_SECONDS = 600.0

_WORTH_WAITING = (Unavailable, WrongState, Aborted, BackingMissing, ResourceNotFound, StoreUnwritable)
"""What passes by itself: a service that is not up, a pool or network that is not started yet, a disk that is full."""


UNKNOWN = domain_pb2.DOMAIN_STATE_UNKNOWN


def _unknown(domain: domain_pb2.Domain) -> VirtfleetError:
    return WrongState(
        f"nobody can say whether {domain.name} runs: its driver cannot", resource=domain.name, state="UNKNOWN"
    )


class Autostart:
    """Starts domains once per boot.

    Args:
        call: Makes a call of the service itself.
    """

    def __init__(self, context: Context, power: Power, boot_id: str, call: Callable[[], Call]) -> None:
        self._context = context
        self._power = power
        self._boot_id = boot_id.encode()
        self._call = call

    @property
    def rebooted(self) -> bool:
        """Whether the node has booted since domains were last started."""
        return self._context.store.get_record(records.SERVICE, BOOT_KEY) != self._boot_id

    async def run(self) -> None:
        """Start what is to be started; returns when all is started or given up."""
        if not self.rebooted:
            return
        limit = asyncio.Semaphore(PARALLEL_COUNT)

        async def one(uid: str) -> None:
            async with limit:
                await self._start(uid)

        async with asyncio.TaskGroup() as group:
            for uid, _ in self._context.store.list_records(records.AUTOSTART):
                group.create_task(one(uid))
        await self._note(lambda tx: tx.put_record(records.SERVICE, BOOT_KEY, self._boot_id))

    async def _start(self, uid: str) -> None:
        until = asyncio.get_running_loop().time() + self._context.settings.autostart_seconds
        delay_seconds = FIRST_DELAY_SECONDS
        while True:
            domain = self._context.by_uid(uid)
            if domain is None or (statuses.is_active(domain) and domain.status.state != UNKNOWN):
                return
            error = await self._attempt(domain) if domain.status.state != UNKNOWN else _unknown(domain)
            if error is None:
                await self._note(lambda tx: self._started(tx, uid))
                return
            late = asyncio.get_running_loop().time() + delay_seconds > until
            waiting = isinstance(error, _WORTH_WAITING) and not late
            await self._note(partial(self._waiting, uid=uid, error=error, waiting=waiting))
            if not waiting:
                _log.warning("%s is not started after the boot: %s", domain.name, error)
                return
            await asyncio.sleep(delay_seconds)
            delay_seconds = min(delay_seconds * 2, LAST_DELAY_SECONDS)

    async def _note(self, work: Callable[[Transaction], None]) -> None:
        """Write down how far it is; a full disk is waited for, and costs no other domain its start."""
        while True:
            try:
                await self._context.store.write(work)
                return
            except StoreUnwritable as error:
                _log.warning("autostart waits for the store: %s", error)
                await asyncio.sleep(FIRST_DELAY_SECONDS)

    async def _attempt(self, domain: domain_pb2.Domain) -> VirtfleetError | None:
        request = domain_pb2.StartDomainRequest(
            name=domain.name, expected_uid=domain.uid, inline_wait=duration_pb2.Duration(seconds=30)
        )
        try:
            operation = await self._power.start(request, self._call())
            if not operation.done:
                operation = await self._context.operations.wait(operation.name, WAIT_SECONDS)
        except VirtfleetError as error:
            return error
        return error_from_status(operation.error) if operation.HasField("error") else None

    @staticmethod
    def _started(tx: Transaction, uid: str) -> None:
        row = tx.get_by_uid(KIND, uid)
        if row is None:
            return
        domain = domain_pb2.Domain.FromString(row.body)
        for kind in ("AutostartWaiting", "AutostartFailed"):
            resources.clear_condition(domain.status.conditions, kind)
        if domain.spec.autostart == resource_pb2.AUTOSTART_ONCE:
            for spec in (domain.spec, domain.status.resolved_spec, domain.status.active_spec):
                spec.autostart = resource_pb2.AUTOSTART_NEVER
            resources.touch(domain)
            domain.status.observed_generation = domain.generation
        records.save(tx, domain, statuses.OBSERVED)

    @staticmethod
    def _waiting(tx: Transaction, *, uid: str, error: VirtfleetError, waiting: bool) -> None:
        row = tx.get_by_uid(KIND, uid)
        if row is None:
            return
        domain = domain_pb2.Domain.FromString(row.body)
        conditions = domain.status.conditions
        old, new = ("AutostartFailed", "AutostartWaiting") if waiting else ("AutostartWaiting", "AutostartFailed")
        resources.clear_condition(conditions, old)
        resources.set_condition(conditions, new, reason=error.reason, message=error.message)
        records.save(tx, domain, statuses.OBSERVED)

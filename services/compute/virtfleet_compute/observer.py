"""Takes in what drivers tell by themselves: guests that end, crash, pause, reboot, or drift from what is recorded."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from virtfleet.compute.v1 import domain_pb2, watch_pb2
from virtfleet_compute import records, statuses
from virtfleet_compute.background import Background
from virtfleet_compute.context import KIND, Context, ref
from virtfleet_compute.drivers.api import DomainObservation, Driver, DriverEvent, EventKind
from virtfleet_compute.guests import Guests
from virtfleet_service.errors import VirtfleetError
from virtfleet_service.store import StoreUnwritable, Transaction

_log = logging.getLogger(__name__)

RECORD_AGAIN_SECONDS = 1.0
"""When the store refuses what was seen, how long until it is asked again."""

_EVENT_TYPES: Mapping[EventKind, watch_pb2.EventType.ValueType] = {
    EventKind.REBOOTED: watch_pb2.EVENT_TYPE_DOMAIN_REBOOTED,
    EventKind.CLOCK_CHANGED: watch_pb2.EVENT_TYPE_DOMAIN_CLOCK_CHANGED,
    EventKind.WATCHDOG: watch_pb2.EVENT_TYPE_DOMAIN_WATCHDOG,
    EventKind.IO_ERROR: watch_pb2.EVENT_TYPE_DOMAIN_IO_ERROR,
    EventKind.PANICKED: watch_pb2.EVENT_TYPE_DOMAIN_PANICKED,
    EventKind.CONTROL_CHANGED: watch_pb2.EVENT_TYPE_DOMAIN_CONTROL_CHANGED,
    EventKind.DRIFTED: watch_pb2.EVENT_TYPE_DOMAIN_DRIFTED,
}


class Observer:
    """Records what drivers see.

    Args:
        tasks: Owns the work that an event causes.
    """

    def __init__(self, context: Context, guests: Guests, tasks: Background) -> None:
        self._context = context
        self._guests = guests
        self._tasks = tasks
        self._heard: set[str] = set()

    def listen(self, driver: Driver) -> None:
        """Take in the events of a driver from now on. Repeatable."""
        if driver.driver_id not in self._heard:
            self._heard.add(driver.driver_id)
            self._tasks.create_task(self.follow(driver), name=f"events of {driver.driver_id}")

    async def follow(self, driver: Driver) -> None:
        """Take in the events of a driver until cancelled."""
        async for event in driver.events():
            if event.kind is EventKind.GAP:
                self._tasks.create_task(self.compare_all(driver), name=f"compare all of {driver.driver_id}")
                continue
            if event.kind is not EventKind.STATE_CHANGED:
                try:
                    await self._tell(event)
                except VirtfleetError as error:
                    _log.error("an event of %s is not recorded: %s", event.uid, error)
            if event.observation is not None:
                self.take_in(event.uid, event.observation)

    def take_in(self, uid: str, observation: DomainObservation) -> None:
        """Record a new state of a domain, after whoever holds the domain now."""
        hold = self._context.holds.get(uid)
        if hold is not None:
            hold.news = observation
            return
        self._tasks.create_task(self._settle(uid, observation), name=f"observed {uid}")

    def look(self, uid: str) -> None:
        """Have a look at a domain and record what is seen."""
        self._tasks.create_task(self._settle(uid, None), name=f"look at {uid}")

    async def compare_all(self, driver: Driver) -> None:
        """Hold what is recorded against all that a driver has; for when its events may have been lost."""
        try:
            found = {observation.uid: observation for observation in await driver.list()}
        except VirtfleetError as error:
            _log.warning("driver %s cannot list its guests: %s", driver.driver_id, error)
            return
        known = {uid for uid, _ in self._context.store.list_records(records.ACTIVE)}
        for uid in known | set(found):
            domain = self._context.by_uid(uid)
            if domain is not None and domain.status.resolved_spec.driver == driver.driver_id:
                self.look(uid)

    async def _settle(self, uid: str, observation: DomainObservation | None) -> None:
        while True:
            try:
                await self._settle_once(uid, observation)
                return
            except StoreUnwritable as error:
                # The driver does not tell it again, and what an ended guest had is still its own.
                _log.warning("what was seen of %s is recorded later: %s", uid, error)
            await asyncio.sleep(RECORD_AGAIN_SECONDS)
            # Looked at anew: by then it may be another thing.
            observation = None

    async def _settle_once(self, uid: str, observation: DomainObservation | None) -> None:
        waited = self._context.holds.get(uid) is not None
        async with self._context.holds.held(uid) as hold:
            domain = self._context.by_uid(uid)
            if domain is None:
                return
            if observation is None or waited:
                try:
                    observation = await self._context.driver(domain).inspect(ref(domain))
                except VirtfleetError as error:
                    _log.warning("%s cannot be looked at: %s", domain.name, error)
                    return
            hold.seen = observation
            await self.record(domain, observation)

    async def record(self, domain: domain_pb2.Domain, observation: DomainObservation) -> None:
        """Record what is seen of a domain that the caller holds, and give back what an ended guest had."""
        probe = domain_pb2.Domain()
        probe.CopyFrom(domain)
        if not statuses.observed(probe, observation):
            return
        await self._context.store.write(lambda tx: self._record(tx, domain.uid, observation))
        if statuses.is_active(domain) and not observation.active:
            await self._guests.let_go(domain)
        elif not statuses.is_active(domain) and observation.active:
            self._context.admission.adopt(probe, counted=self._context.counted(probe))

    @staticmethod
    def _record(tx: Transaction, uid: str, observation: DomainObservation) -> None:
        row = tx.get_by_uid(KIND, uid)
        if row is None:
            return
        domain = domain_pb2.Domain.FromString(row.body)
        old_state = domain.status.state
        if statuses.observed(domain, observation):
            records.end(tx, domain, statuses.OBSERVED, old_state=old_state)

    async def _tell(self, event: DriverEvent) -> None:
        """Record an event that is no change of state."""
        row = self._context.store.get_by_uid(KIND, event.uid)
        if row is None:
            return
        told = watch_pb2.Event(
            resource=row.name,
            uid=event.uid,
            type=_EVENT_TYPES[event.kind],
            reason=event.reason,
            message=event.message,
        )
        told.time.FromDatetime(event.time)
        if event.kind is EventKind.IO_ERROR:
            told.domain_io_error.device_id = event.device_id
            told.domain_io_error.cause = event.cause
            told.domain_io_error.paused = event.paused
        await self._context.store.write(lambda tx: tx.event(told))

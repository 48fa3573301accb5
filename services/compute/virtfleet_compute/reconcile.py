"""Brings the store and the host together when the service starts: the host is the truth about what runs.

In this order: creations and starts that a crash cut are undone or finished, what is recorded as running is held against
    what
the drivers have, operations are settled by what came out of that, and what storage and network hold for nobody is given
back
as soon as they answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from virtfleet.compute.v1 import domain_pb2, domain_spec_pb2
from virtfleet_compute import records, statuses, wiring
from virtfleet_compute.context import KIND, Context, ref
from virtfleet_compute.creation import Creation
from virtfleet_compute.domains import Domains
from virtfleet_compute.drivers.api import DomainObservation, Driver
from virtfleet_compute.drivers.facets import FoundDomain, Inventory
from virtfleet_compute.power import record_start
from virtfleet_compute.settlement import Settlement
from virtfleet_service import failpoints, resources
from virtfleet_service.errors import DriverBroken, VirtfleetError
from virtfleet_service.store import Transaction

if TYPE_CHECKING:
    from virtfleet_compute.wiring import Connections

_log = logging.getLogger(__name__)

WRITE_SLICE = 500
RECONNECT_SECONDS = 5.0

State = domain_pb2.DomainState
Reason = domain_pb2.DomainStateReason


Record = Callable[[domain_pb2.Domain, DomainObservation], Awaitable[None]]
"""Records what is seen of a domain that the caller holds."""


@dataclass(frozen=True, slots=True)
class _Template:
    """Is the last domain that was taken over, with what was decided for its spec.

    Attributes:
        of: The spec as the driver has it: the same object for equal domains.
        domain: What became of it.
        observation: Its run, likewise.
    """

    of: domain_spec_pb2.DomainSpec
    domain: domain_pb2.Domain
    observation: DomainObservation | None


class Reconciler:
    """Does what is to be done at start."""

    def __init__(self, context: Context, creation: Creation, domains: Domains, *, rebooted: bool) -> None:
        self._context = context
        self._creation = creation
        self._domains = domains
        self._rebooted = rebooted
        self._found: dict[str, DomainObservation] = {}
        self._later_creations: dict[str, records.Creating] = {}
        """Creations that were cut, by the uid of the domain, whose driver cannot run yet."""
        self._later_starts: dict[str, records.Starting] = {}
        """Starts that were cut, likewise."""
        self._template: _Template | None = None

    async def run(self) -> None:
        """Bring store and host together; afterwards operations may be run."""
        context = self._context
        for driver in list(context.hypervisors.ready()):
            try:
                await self._list(driver)
            except VirtfleetError as error:
                # Who cannot be asked has not said that there are no guests.
                context.hypervisors.lost(driver.driver_id, error)
        await self._undo_creations()
        await self._end_starts()
        await self._compare()
        self._count_recorded()
        for driver in context.hypervisors.ready():
            await self._take_over(driver)
        await self._adopt_unknown()
        await context.operations.settle(Settlement(context, self._domains).handlers())

    def waits(self, uid: str) -> bool:
        """Tell whether a creation or a start of a domain was cut and its driver cannot say yet what came of it."""
        return uid in self._later_creations or uid in self._later_starts

    async def take_in(self, driver: Driver, record: Record) -> None:
        """Do for a driver that has come to run what could not be done at the start; calls are served meanwhile.

        Args:
            driver: The driver.
            record: Records what is seen of a domain that is held.

        Raises:
            VirtfleetError: The driver cannot say what runs.
        """
        holds = self._context.holds
        await self._list(driver)
        for uid, creating in list(self._later_creations.items()):
            if creating.driver == driver.driver_id:
                async with holds.held(uid):
                    await self._undo_creation(creating)
                del self._later_creations[uid]
        for uid, starting in list(self._later_starts.items()):
            domain = self._context.by_uid(uid)
            if domain is None or domain.status.resolved_spec.driver == driver.driver_id:
                async with holds.held(uid):
                    await self._end_start(uid, starting)
                del self._later_starts[uid]
        known = {uid for uid, _ in self._context.store.list_records(records.ACTIVE)}
        for uid in sorted(known | set(self._found)):
            async with holds.held(uid) as hold:
                domain = self._context.by_uid(uid)
                if domain is not None and domain.status.resolved_spec.driver == driver.driver_id:
                    hold.seen = await self._seen(driver, domain)
                    await record(domain, hold.seen)
        await self._take_over(driver)
        await self._adopt_unknown()
        self._found.clear()

    async def _seen(self, driver: Driver, domain: domain_pb2.Domain) -> DomainObservation:
        """Look at a domain that is held: what was listed before may be over."""
        observation = await driver.inspect(ref(domain))
        unknown = not observation.active and not observation.runtime_id
        return (self._gone(domain) if unknown else None) or observation

    async def _list(self, driver: Driver) -> None:
        for observation in await driver.list():
            self._found[observation.uid] = observation

    def _runs(self, driver_id: str) -> bool:
        """Tell whether a driver can say what became of something; one that is no more is not waited for."""
        try:
            self._context.hypervisors.get(driver_id)
        except DriverBroken:
            return False
        except VirtfleetError:
            return True
        return True

    async def _undo_creations(self) -> None:
        for _, body in self._context.store.list_records(records.CREATE):
            creating = records.Creating.decode(body)
            if self._runs(creating.driver):
                await self._undo_creation(creating)
            else:
                self._later_creations[creating.uid] = creating

    async def _undo_creation(self, creating: records.Creating) -> None:
        _log.info("the creation of %s was cut and is undone", creating.name)
        await self._creation.undo_crashed(creating)
        self._found.pop(creating.uid, None)
        await self._context.store.write(lambda tx: self._creation.forget(tx, creating))

    async def _end_starts(self) -> None:
        """Finish the starts whose guest runs, forget the others: what they hold is given back by the sweep."""
        for uid, body in self._context.store.list_records(records.START):
            starting = records.Starting.decode(body)
            domain = self._context.by_uid(uid)
            if domain is None or self._runs(domain.status.resolved_spec.driver):
                await self._end_start(uid, starting)
            else:
                self._later_starts[uid] = starting

    async def _end_start(self, uid: str, starting: records.Starting) -> None:
        context = self._context
        domain = context.by_uid(uid)
        observation = self._found.get(uid)
        if domain is None or observation is None or observation.runtime_id != starting.runtime_id:
            observation = None
        if domain is not None and observation is not None and observation.active:
            connections = await self._reconnect(domain, observation)
            run = statuses.Run(starting.runtime_id, observation.run_as_uid, connections, observation)
            name = domain.name
            await context.store.write(lambda tx: record_start(tx, name, run, statuses.OBSERVED))
        else:
            await context.store.write(lambda tx: _forget_start(tx, uid, starting))

    async def _reconnect(self, domain: domain_pb2.Domain, observation: DomainObservation) -> Connections:
        """Ask again for what a running guest is joined to: the answers are the same as at its start."""
        context, spec = self._context, domain.status.resolved_spec
        ports = wiring.ports_of(domain, spec, context.node)
        try:
            async with asyncio.timeout(RECONNECT_SECONDS):
                return await context.wiring.look(ref(domain), spec, ports, observation.run_as_uid)
        except (VirtfleetError, TimeoutError) as error:
            _log.warning("what %s is joined to is not known for now: %s", domain.name, error)
            return wiring.Connections()

    async def _compare(self) -> None:
        """Hold every domain that is recorded as active, or that a driver has, against what the drivers see."""
        context = self._context
        recorded = {uid for uid, _ in context.store.list_records(records.ACTIVE)}
        uids = sorted(recorded | set(self._found))
        for start in range(0, len(uids), WRITE_SLICE):
            part = uids[start : start + WRITE_SLICE]
            await context.store.write(lambda tx, part=part: self._record(tx, part))  # type: ignore[misc]  # bound here
            failpoints.reach("compute.reconcile.compared")

    def _record(self, tx: Transaction, uids: Sequence[str]) -> None:
        for uid in uids:
            row = tx.get_by_uid(KIND, uid)
            if row is None:
                continue
            domain = domain_pb2.Domain.FromString(row.body)
            observation = self._found.get(uid) or self._gone(domain)
            old_state = domain.status.state
            if observation is not None and statuses.observed(domain, observation):
                records.end(tx, domain, statuses.OBSERVED, old_state=old_state)

    def _gone(self, domain: domain_pb2.Domain) -> DomainObservation | None:
        """Say what became of a guest that no driver has; None: its driver cannot run, so nobody knows."""
        try:
            self._context.driver(domain)
        except VirtfleetError:
            return DomainObservation(
                domain.uid,
                State.DOMAIN_STATE_UNKNOWN,
                Reason.DOMAIN_STATE_REASON_HYPERVISOR_SILENT,
                runtime_id=domain.status.runtime_id,
                control_lost=True,
            )
        if not statuses.is_active(domain):
            return None
        if self._rebooted:
            return DomainObservation(domain.uid, State.DOMAIN_STATE_SHUT_OFF, Reason.DOMAIN_STATE_REASON_NODE_REBOOTED)
        return DomainObservation(domain.uid, State.DOMAIN_STATE_SHUT_OFF, Reason.DOMAIN_STATE_REASON_HYPERVISOR_DIED)

    # What the store does not know.

    async def _take_over(self, driver: Driver) -> None:
        """Make the definitions that a driver holds our own, once per inventory."""
        context = self._context
        facet = driver.facet(Inventory)  # type: ignore[type-abstract]  # a protocol names the facet
        if facet is None:
            return
        key = f"inventory/{driver.driver_id}"
        digest = facet.inventory_digest().encode()
        if not digest or context.store.get_record(records.SERVICE, key) == digest:
            return
        async for batch in facet.inventory():
            made = [await self._taken(driver, found) for found in batch]
            stored = await context.store.write(lambda tx, made=made: self._store_taken(tx, made))  # type: ignore[misc]  # bound here
            self._count(stored)
        await context.store.write(lambda tx: tx.put_record(records.SERVICE, key, digest))

    async def _taken(self, driver: Driver, found: FoundDomain) -> domain_pb2.Domain:
        same = self._template
        if same is not None and same.of is found.spec and same.observation is found.observation:
            # One of a group of equals: what was decided for the first holds for all.
            domain = domain_pb2.Domain()
            domain.CopyFrom(same.domain)
            domain.display_name = found.display_name
            if found.labels or domain.labels:
                domain.labels.clear()
                domain.labels.update(found.labels)
            resources.create_head(domain, f"nodes/{self._context.node}/domains/{found.domain_id}", uid=found.uid)
            if found.observation is not None:
                domain.status.runtime_id = found.runtime_id
            return domain
        domain = domain_pb2.Domain(display_name=found.display_name, labels=found.labels, spec=found.spec)
        domain.spec.driver = driver.driver_id
        resources.create_head(domain, f"nodes/{self._context.node}/domains/{found.domain_id}", uid=found.uid)
        resolved = await self._creation.resolve(domain, None)
        statuses.defined(domain, resolved)
        if found.observation is not None:
            run = statuses.Run(found.runtime_id, 0, wiring.Connections(), found.observation)
            statuses.started(domain, run)
        # Cards have MACs of their own.
        self._template = None if resolved.interfaces else _Template(found.spec, domain, found.observation)
        return domain

    @staticmethod
    def _store_taken(tx: Transaction, made: Sequence[domain_pb2.Domain]) -> Sequence[domain_pb2.Domain]:
        """Store domains whose names and uids are free; returns those."""
        names, uids = [one.name for one in made], [one.uid for one in made]
        alone = len(set(names)) == len(set(uids)) == len(made)
        if alone and not tx.any_taken(KIND, names, uids):
            for domain in made:
                records.take_macs(tx, domain)
            records.save_new(tx, made, statuses.OBSERVED)
            return made
        stored = []
        for domain in made:
            if tx.get(domain.name) is None and tx.get_by_uid(KIND, domain.uid) is None:
                records.take_macs(tx, domain)
                records.save(tx, domain, statuses.OBSERVED)
                stored.append(domain)
        return stored

    async def _adopt_unknown(self) -> None:
        """Make domains again out of guests that run and are not in the store: it was lost, or is an old one."""
        context = self._context
        prefix = f"nodes/{context.node}/domains/"
        making = {records.Creating.decode(body).uid for _, body in context.store.list_records(records.CREATE)}
        for uid, observation in self._found.items():
            if not observation.active or uid in making or context.store.get_by_uid(KIND, uid) is not None:
                continue
            spec, name = observation.active_spec, observation.name
            if spec is None or not name.startswith(prefix) or context.store.get(name) is not None:
                _log.warning("a guest with the uid %s runs that no domain stands for", uid)
                continue
            domain = domain_pb2.Domain(spec=spec)
            resources.create_head(domain, name, uid=uid)
            statuses.defined(domain, spec)
            connections = await self._reconnect(domain, observation)
            statuses.started(
                domain, statuses.Run(observation.runtime_id, observation.run_as_uid, connections, observation)
            )
            resources.set_condition(
                domain.status.conditions, "Adopted", reason="STORE_LOST", message="made again out of its running guest"
            )
            stored = await context.store.write(lambda tx, domain=domain: self._store_taken(tx, [domain]))  # type: ignore[misc]  # bound here
            self._count(stored)

    # The account of what active domains have.

    def _count_recorded(self) -> None:
        self._count(self._context.recorded(records.ACTIVE))

    def _count(self, domains: Iterable[domain_pb2.Domain]) -> None:
        context = self._context
        for domain in domains:
            if not statuses.is_active(domain):
                continue
            try:
                counted = context.counted(domain)
            except VirtfleetError:
                counted = True
            context.admission.adopt(domain, counted=counted)


def _forget_start(tx: Transaction, uid: str, starting: records.Starting) -> None:
    """Forget a start that was cut; one that has begun since stays."""
    body = tx.get_record(records.START, uid)
    if body is not None and records.Starting.decode(body) == starting:
        tx.delete_record(records.START, uid)

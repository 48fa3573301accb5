"""Changes of domains: the definition, the running guest, or both, as the scope says."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from google.longrunning import operations_pb2

from virtfleet.compute.v1 import domain_pb2, domain_spec_pb2
from virtfleet.type.v1 import resource_pb2
from virtfleet_compute import lifecycle, records, specs, statuses
from virtfleet_compute.context import Context, read, read_checked, ref
from virtfleet_compute.creation import Creation, authorize_spec
from virtfleet_compute.domains import Domains
from virtfleet_compute.drivers.facets import LivePlan, LiveUpdate
from virtfleet_compute.guests import Guests
from virtfleet_compute.lifecycle import Verb
from virtfleet_compute.wiring import Reservation
from virtfleet_service import failpoints, masks, names, requests, resources
from virtfleet_service.errors import (
    FieldConflict,
    NotLiveUpdatable,
    OperationConflict,
    ResourceNotFound,
    WrongState,
)
from virtfleet_service.operations import Commit, Job
from virtfleet_service.store import Transaction

if TYPE_CHECKING:
    from virtfleet_service.call import Call

IMMUTABLE = ("spec.driver",)
SCOPE_CONFIG = ("SCOPE_CONFIG", "the definition alone was changed")
LIVE_STEP = "live"
"""Of the journal: the paths, one a line, in which the running guest is about to change."""
_ATTEMPTS = 5

DomainSpec = domain_spec_pb2.DomainSpec

UNSPECIFIED = resource_pb2.CHANGE_SCOPE_UNSPECIFIED
CONFIG = resource_pb2.CHANGE_SCOPE_CONFIG
LIVE = resource_pb2.CHANGE_SCOPE_LIVE
BOTH = resource_pb2.CHANGE_SCOPE_LIVE_AND_CONFIG


class _Stale(Exception):  # no error: the work begins anew
    """The domain has changed between the decision and its record."""


@dataclass(slots=True)
class Change:
    """Is a change that has been decided on."""

    before: domain_pb2.Domain
    after: domain_pb2.Domain
    """The domain with the new definition, resolved spec and pending changes.

    Its active spec is that before the change.
    """
    changed: list[str]
    """The paths of the definition that differ."""
    live: list[str] = field(default_factory=list)
    """The paths that change in the running guest."""
    live_spec: DomainSpec = field(default_factory=DomainSpec)
    """What the guest has afterwards."""
    pending: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether nothing changes."""
        return not self.changed and not self.live


class Updates:
    """Changes domains."""

    def __init__(self, context: Context, guests: Guests, creation: Creation, domains: Domains) -> None:
        self._context = context
        self._guests = guests
        self._creation = creation
        self._domains = domains

    async def update(self, request: domain_pb2.UpdateDomainRequest, call: Call) -> operations_pb2.Operation:
        """Change a domain: see `UpdateDomain`."""
        repeated = await self._context.operations.repeated(call, request)
        if repeated is not None:
            return repeated
        for _ in range(_ATTEMPTS):
            try:
                domain = self._context.domain(request.domain.name)
            except ResourceNotFound:
                if not request.allow_missing:
                    raise
                try:
                    return await self._create(request, call)
                except _Stale:
                    continue
            resources.check_preconditions(domain, request.domain.etag, request.domain.uid)
            change = await self.decide(domain, request, call)
            if request.validate_only:
                statuses.pending(change.after, change.pending)
                return self._context.operations.plan(change.after)
            try:
                return await self._run(change, request, call)
            except _Stale:
                continue
        raise OperationConflict(
            f"{request.domain.name} is being changed all the time; read it again and retry",
            resource=request.domain.name,
            retry_delay_seconds=0.5,
        )

    async def _create(self, request: domain_pb2.UpdateDomainRequest, call: Call) -> operations_pb2.Operation:
        """Apply to a domain that does not exist: create it.

        Raises:
            _Stale: Somebody has made it meanwhile.
        """
        name = request.domain.name
        call.authorize(name, "domains.create")
        resources.check_absent(request.domain)
        create = domain_pb2.CreateDomainRequest(
            parent=names.parent_of(name), domain=request.domain, domain_id=names.id_of(name)
        )
        draft = await self._creation.draft(create, call)

        def accept(tx: Transaction) -> str:
            if tx.get(name) is not None:
                raise _Stale
            return self._creation.accept(tx, draft)

        if request.validate_only:
            await self._context.store.rehearse(accept)
            return self._context.operations.plan(draft.domain)
        return await self._domains.create_draft(draft, request, call, accept)

    # Decisions.

    async def decide(
        self, domain: domain_pb2.Domain, request: domain_pb2.UpdateDomainRequest, call: Call | None
    ) -> Change:
        """Decide what a request changes, without any effect.

        Raises:
            MaskPathUnknown, FieldConflict, FieldOutOfRange, FieldRequired: The request is wrong.
            NotLiveUpdatable: The scope wants it live, and it cannot be.
            WrongState: The scope wants it live, and there is no guest; or CONFIG on a transient domain.
            CapabilityMissing: The driver lacks something.
        """
        scope = request.scope
        active = statuses.is_active(domain)
        if scope == LIVE:
            lifecycle.judge(Verb.UPDATE_LIVE, domain)
            return self._decide_live(domain, request)
        if scope == CONFIG and statuses.transient(domain):
            raise WrongState(
                f"{domain.name} is transient: it has no definition beside what runs",
                resource=domain.name,
                state="TRANSIENT",
            )
        change = await self._decide_definition(domain, request, call)
        if active and scope != CONFIG:
            self._plan_live(change, all_or_nothing=scope == BOTH or statuses.transient(domain))
        elif active:
            change.pending = dict.fromkeys(_spec_paths(change.changed), SCOPE_CONFIG)
            self._heed_service_fields(change)
        return change

    async def _decide_definition(
        self, domain: domain_pb2.Domain, request: domain_pb2.UpdateDomainRequest, call: Call | None
    ) -> Change:
        after = domain_pb2.Domain()
        after.CopyFrom(domain)
        changed = masks.apply_update(after, request.domain, request.update_mask, immutable=IMMUTABLE)
        if not changed:
            return Change(domain, after, [])
        if any(path == "spec" or path.startswith("spec.") for path in changed):
            authorize_spec(after.name, after.spec, domain.spec, call)
            resolved = await self._creation.resolve(after, domain.status.resolved_spec)
            after.status.resolved_spec.CopyFrom(resolved)
            changed = masks.diff(_definition(domain), _definition(after))
            if not changed:
                return Change(domain, after, [])
        resources.touch(after)
        after.status.observed_generation = after.generation
        return Change(domain, after, changed)

    def _decide_live(self, domain: domain_pb2.Domain, request: domain_pb2.UpdateDomainRequest) -> Change:
        """Decide on a change of the running guest alone."""
        running = domain_pb2.Domain()
        running.CopyFrom(domain)
        running.spec.CopyFrom(domain.status.active_spec)
        changed = masks.apply_update(running, request.domain, request.update_mask, immutable=IMMUTABLE)
        foreign = [path for path in changed if not path.startswith("spec.") or path in specs.SERVICE_FIELDS]
        if foreign:
            raise FieldConflict(
                f"{foreign[0]} belongs to the definition: scope LIVE cannot change it", field="scope", path=foreign[0]
            )
        specs.normalize(running.spec, self._context.node)
        specs.check(running.spec)
        after = domain_pb2.Domain()
        after.CopyFrom(domain)
        change = Change(domain, after, [])
        paths = masks.diff(domain.status.active_spec, running.spec, prefix="spec.")
        self._sort(change, running.spec, paths, all_or_nothing=True)
        change.pending = dict.fromkeys(change.live, (statuses.SCOPE_LIVE, "the running guest alone was changed"))
        return change

    def _plan_live(self, change: Change, *, all_or_nothing: bool) -> None:
        """Sort what a new definition changes into what goes live and what waits."""
        self._heed_service_fields(change)
        old, new = change.before.status.resolved_spec, change.after.status.resolved_spec
        paths = [path for path in masks.diff(old, new, prefix="spec.") if path not in specs.SERVICE_FIELDS]
        wanted = DomainSpec()
        wanted.CopyFrom(change.after.status.active_spec)
        _copy_paths(wanted, new, paths)
        # What an earlier call has made live already needs no second time.
        missing = set(masks.diff(change.after.status.active_spec, wanted, prefix="spec."))
        self._sort(change, wanted, sorted(missing), all_or_nothing=all_or_nothing)

    def _heed_service_fields(self, change: Change) -> None:
        """Take over into the active spec what the service itself heeds."""
        active, new = change.after.status.active_spec, change.after.status.resolved_spec
        _copy_paths(active, new, sorted(specs.SERVICE_FIELDS))

    def _sort(self, change: Change, wanted: DomainSpec, paths: list[str], *, all_or_nothing: bool) -> None:
        if not paths:
            return
        current = change.after.status.active_spec
        driver = self._context.driver(change.before)
        facet = driver.facet(LiveUpdate)  # type: ignore[type-abstract]  # a protocol names the facet
        if facet is not None:
            plan = facet.plan_live_update(current, wanted, paths)
        else:
            text = f"driver {driver.driver_id} changes no running guests"
            plan = LivePlan(refused=tuple((path, "CAPABILITY_MISSING", text) for path in paths))
        if plan.refused and all_or_nothing:
            raise NotLiveUpdatable(
                f"{len(plan.refused)} of the changes cannot be made to the running guest of {change.before.name}:"
                f" {plan.refused[0][0]} {plan.refused[0][2]}",
                resource=change.before.name,
                violations=[(f"domain.{path}", text) for path, _, text in plan.refused],
                paths=",".join(path for path, _, _ in plan.refused),
            )
        change.live = list(plan.live)
        change.live_spec.CopyFrom(current)
        _copy_paths(change.live_spec, wanted, change.live)
        change.pending.update({path: (reason, text) for path, reason, text in plan.refused})

    # Effects.

    async def _run(
        self, change: Change, request: domain_pb2.UpdateDomainRequest, call: Call
    ) -> operations_pb2.Operation:
        context, method = self._context, requests.method_name(call)
        name, generation = change.before.name, change.before.generation

        def intent(tx: Transaction) -> str:
            if request.allow_missing and tx.get(name) is None:
                raise _Stale
            domain = read_checked(tx, context, name, request.domain.etag, request.domain.uid)
            _refuse_stale(domain, change)
            # Taken before anything changes, so that a running guest is not changed for a definition that cannot be.
            records.take_macs(tx, change.after)
            return domain.uid

        async def work(job: Job) -> Commit:
            job.on_failure(lambda tx, _error: records.free_macs_beside(tx, change.before, _macs(change.after)))
            await context.occupation.hold(job, change.before.uid)
            if change.empty:
                return lambda tx: read(tx, name)
            domain = context.domain(name)
            if domain.generation != generation or statuses.is_active(domain) != statuses.is_active(change.before):
                raise OperationConflict(
                    f"{name} has changed meanwhile; read it again and retry", resource=name, retry_delay_seconds=0.1
                )
            reservations = await self._make(change, domain, call, job)

            def commit(tx: Transaction) -> domain_pb2.Domain:
                stored = read(tx, name)
                _merge(stored, change)
                if reservations is not None:
                    statuses.reserved(stored, reservations)
                records.free_macs_beside(tx, stored, _macs(change.before))
                records.save(tx, stored, method)
                return stored

            return commit

        return await context.operations.run(call, request, target=name, work=work, intent=intent)

    async def _make(self, change: Change, domain: domain_pb2.Domain, call: Call, job: Job) -> list[Reservation] | None:
        """Bring a change to the ports, the driver and the running guest; returns the ports if they have changed."""
        context = self._context
        reservations: list[Reservation] | None = None
        async with AsyncExitStack() as undo:
            if _cards_changed(change) and not statuses.is_active(domain):
                job.progress(phase="reserving ports")
                reservations = await self._guests.ensure_ports(domain, change.after.status.resolved_spec, call, undo)
            if change.changed:
                await context.driver(domain).define(ref(domain), change.after.status.resolved_spec)
            job.cancellable = False
            if change.live:
                job.progress(phase="changing the running guest")
                facet = context.facet(domain, LiveUpdate)  # type: ignore[type-abstract]  # a protocol names the facet
                current = change.after.status.active_spec
                await job.journal(LIVE_STEP, "\n".join(change.live).encode())
                await facet.update_live(ref(domain), current, change.live_spec, change.live)
            failpoints.reach("compute.update.live")
            undo.pop_all()
        if reservations is not None:
            kept = {one.port for one in reservations}
            gone = [card.port for card in domain.status.interfaces if card.port not in kept]
            await context.wiring.unreserve(ref(domain), gone)
        return reservations


def _refuse_stale(domain: domain_pb2.Domain, change: Change) -> None:
    before = change.before
    if (
        domain.uid != before.uid
        or domain.generation != before.generation
        or statuses.is_active(domain) != statuses.is_active(before)
        or domain.status.runtime_id != before.status.runtime_id
        or domain.status.active_spec != before.status.active_spec
    ):
        raise _Stale


def _merge(stored: domain_pb2.Domain, change: Change) -> None:
    """Write a change into what is stored now: its status may be newer than that which the change was decided on."""
    after = change.after
    if change.changed:
        for name in ("display_name", "labels", "annotations", "spec", "generation", "etag", "update_time"):
            _take(stored, after, name)
        stored.status.observed_generation = after.generation
        stored.status.resolved_spec.CopyFrom(after.status.resolved_spec)
    if statuses.is_active(stored):
        stored.status.active_spec.CopyFrom(change.live_spec if change.live else after.status.active_spec)
    statuses.pending(stored, change.pending)


def _take(target: domain_pb2.Domain, source: domain_pb2.Domain, name: str) -> None:
    part = domain_pb2.Domain()
    part.CopyFrom(source)
    for descriptor in part.DESCRIPTOR.fields:
        if descriptor.name != name:
            part.ClearField(descriptor.name)  # type: ignore[arg-type]  # a field of this message
    target.ClearField(name)  # type: ignore[arg-type]  # a field of this message
    target.MergeFrom(part)


def _definition(domain: domain_pb2.Domain) -> domain_pb2.Domain:
    """Return what counts for the generation."""
    part = domain_pb2.Domain(display_name=domain.display_name)
    part.labels.MergeFrom(domain.labels)
    part.annotations.MergeFrom(domain.annotations)
    part.spec.CopyFrom(domain.spec)
    return part


def _copy_paths(target: DomainSpec, source: DomainSpec, paths: Iterable[str]) -> None:
    """Make `target` equal to `source` in some paths."""
    wanted = domain_pb2.Domain(spec=target)
    given = domain_pb2.Domain(spec=source)
    listed = list(paths)
    for start in range(0, len(listed), masks.PATHS_LIMIT):
        masks.apply_update(wanted, given, listed[start : start + masks.PATHS_LIMIT] or ["spec.title"])
    target.CopyFrom(wanted.spec)


def _spec_paths(paths: Iterable[str]) -> list[str]:
    return [path for path in paths if path.startswith("spec.") and path not in specs.SERVICE_FIELDS]


def _cards_changed(change: Change) -> bool:
    return any(path.startswith("spec.interfaces") for path in change.changed)


def _macs(domain: domain_pb2.Domain) -> list[str]:
    return [mac for mac, _ in specs.macs(domain.status.resolved_spec)]

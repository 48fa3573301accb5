"""The verbs that start, stop, pause and reset domains."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Protocol

from google.longrunning import operations_pb2
from google.protobuf.message import Message

from virtfleet.compute.v1 import domain_pb2
from virtfleet_compute import lifecycle, records, statuses
from virtfleet_compute.context import Context, read_checked, ref
from virtfleet_compute.drivers.api import DomainObservation
from virtfleet_compute.drivers.facets import Reboot, Reset, Suspend
from virtfleet_compute.guests import Guests
from virtfleet_compute.holds import Hold
from virtfleet_compute.lifecycle import Outcome, Verb
from virtfleet_service import failpoints, requests, resources
from virtfleet_service.errors import OperationCancelled, VirtfleetError
from virtfleet_service.operations import Commit, Job
from virtfleet_service.store import Transaction

if TYPE_CHECKING:
    from virtfleet_service.call import Call

Act = Callable[[Job, domain_pb2.Domain, Hold], Awaitable[Commit]]
Intent = Callable[[Transaction, domain_pb2.Domain], None]


class _VerbRequest(Protocol):
    name: str
    etag: str
    expected_uid: str
    validate_only: bool


class Power:
    """Does the verbs of DomainService that change what runs."""

    def __init__(self, context: Context, guests: Guests) -> None:
        self._context = context
        self._guests = guests

    async def start(self, request: domain_pb2.StartDomainRequest, call: Call) -> operations_pb2.Operation:
        """Start a domain: see `StartDomain`."""
        runtime_id = str(uuid.uuid4())
        method = requests.method_name(call)

        def intent(tx: Transaction, domain: domain_pb2.Domain) -> None:
            tx.put_record(records.START, domain.uid, records.Starting(domain.name, runtime_id).encode())

        async def act(job: Job, domain: domain_pb2.Domain, hold: Hold) -> Commit:
            job.on_failure(lambda tx, error: record_failed_start(tx, domain, error, method))
            failpoints.reach("compute.start.intent")
            async with AsyncExitStack() as undo:
                run = await self._guests.start(
                    domain,
                    call,
                    undo,
                    runtime_id=runtime_id,
                    paused=request.paused,
                    phase=lambda phase: job.progress(phase=phase),
                )
                job.cancellable = False
                hold.seen = run.observation
                undo.pop_all()
            return lambda tx: record_start(tx, domain.name, run, method)

        def forget(tx: Transaction, domain: domain_pb2.Domain) -> None:
            body = tx.get_record(records.START, domain.uid)
            if body is not None and records.Starting.decode(body).runtime_id == runtime_id:
                tx.delete_record(records.START, domain.uid)

        return await self.run(request, call, Verb.START, act, intent, forget)

    async def stop(self, request: domain_pb2.StopDomainRequest, call: Call) -> operations_pb2.Operation:
        """Stop a domain: see `StopDomain`."""
        mode = request.mode or domain_pb2.STOP_MODE_GRACEFUL_THEN_FORCE
        grace_seconds = self.grace_seconds(request)
        method = requests.method_name(call)

        async def act(job: Job, domain: domain_pb2.Domain, hold: Hold) -> Commit:
            def no_way_back() -> None:
                job.cancellable = False
                job.progress(phase="ending the guest")

            job.progress(phase="waiting for the guest" if mode != domain_pb2.STOP_MODE_FORCE else "ending the guest")
            observation = await self._guests.end(domain, mode, grace_seconds, before_force=no_way_back)
            job.cancellable = False
            failpoints.reach("compute.stop.ended")
            hold.seen = observation
            await self._guests.let_go(domain)
            return lambda tx: record_end(tx, domain, observation, method)

        return await self.run(request, call, Verb.STOP, act)

    def grace_seconds(self, request: domain_pb2.StopDomainRequest) -> float:
        """Return how long a guest may take to end."""
        if request.HasField("grace_period"):
            return request.grace_period.ToNanoseconds() / 1e9
        return self._context.settings.stop_grace_seconds

    async def reboot(self, request: domain_pb2.RebootDomainRequest, call: Call) -> operations_pb2.Operation:
        """Reboot a guest: see `RebootDomain`."""
        seconds = request.grace_period.ToNanoseconds() / 1e9 if request.HasField("grace_period") else None

        async def act(domain: domain_pb2.Domain) -> DomainObservation:
            facet = self._context.facet(domain, Reboot)  # type: ignore[type-abstract]  # a protocol
            return await facet.reboot(ref(domain), timeout_seconds=seconds)

        return await self._observe(request, call, Verb.REBOOT, act)

    async def reset(self, request: domain_pb2.ResetDomainRequest, call: Call) -> operations_pb2.Operation:
        """Reset a guest: see `ResetDomain`."""

        async def act(domain: domain_pb2.Domain) -> DomainObservation:
            facet = self._context.facet(domain, Reset)  # type: ignore[type-abstract]  # a protocol
            return await facet.reset(ref(domain))

        return await self._observe(request, call, Verb.RESET, act)

    async def suspend(self, request: domain_pb2.SuspendDomainRequest, call: Call) -> operations_pb2.Operation:
        """Pause a guest: see `SuspendDomain`."""

        async def act(domain: domain_pb2.Domain) -> DomainObservation:
            facet = self._context.facet(domain, Suspend)  # type: ignore[type-abstract]  # a protocol
            return await facet.suspend(ref(domain))

        return await self._observe(request, call, Verb.SUSPEND, act)

    async def resume(self, request: domain_pb2.ResumeDomainRequest, call: Call) -> operations_pb2.Operation:
        """Let a guest go on: see `ResumeDomain`."""

        async def act(domain: domain_pb2.Domain) -> DomainObservation:
            facet = self._context.facet(domain, Suspend)  # type: ignore[type-abstract]  # a protocol
            return await facet.resume(ref(domain))

        return await self._observe(request, call, Verb.RESUME, act)

    async def _observe(
        self,
        request: _VerbRequest,
        call: Call,
        verb: Verb,
        drive: Callable[[domain_pb2.Domain], Awaitable[DomainObservation]],
    ) -> operations_pb2.Operation:
        """Run a verb whose result is what the driver sees afterwards."""
        method = requests.method_name(call)

        async def act(_job: Job, domain: domain_pb2.Domain, hold: Hold) -> Commit:
            observation = await drive(domain)
            hold.seen = observation
            return lambda tx: record_observation(tx, domain, observation, method)

        return await self.run(request, call, verb, act)

    async def run(
        self,
        request: _VerbRequest,
        call: Call,
        verb: Verb,
        act: Act,
        intent: Intent | None = None,
        forget: Intent | None = None,
    ) -> operations_pb2.Operation:
        """Run a verb on a domain that is held: judged twice, when it is accepted and when it is its turn.

        Args:
            request: The request of a verb.
            call: The call.
            verb: The verb.
            act: Drives the driver; returns the commit.
            intent: Records what is intended, in the transaction that accepts the operation.
            forget: Takes that back when the operation fails, be it before its turn.
        """
        context = self._context
        message = request
        assert isinstance(message, Message)  # noqa: S101  # every request is one
        await context.look_again(request.name)

        if request.validate_only:
            domain = context.domain(request.name)
            resources.check_preconditions(domain, request.etag, request.expected_uid)
            lifecycle.judge(verb, domain)
            context.driver(domain)
            return context.operations.plan(domain)

        accepted: list[domain_pb2.Domain] = []

        def accept(tx: Transaction) -> str:
            domain = read_checked(tx, context, request.name, request.etag, request.expected_uid)
            if lifecycle.judge(verb, domain) is Outcome.ACT and intent is not None:
                intent(tx, domain)
            accepted[:] = [domain]
            return domain.uid

        async def work(job: Job) -> Commit:
            domain = accepted[0]
            if forget is not None:
                job.on_failure(lambda tx, _error: forget(tx, domain))
            hold = await context.occupation.hold(job, domain.uid)
            domain = context.domain(request.name)
            if lifecycle.judge(verb, domain) is Outcome.DONE:
                return lambda tx: _unchanged(tx, domain)
            return await act(job, domain, hold)

        return await context.operations.run(call, message, target=request.name, work=work, intent=accept)


def _unchanged(tx: Transaction, domain: domain_pb2.Domain) -> domain_pb2.Domain:
    tx.delete_record(records.START, domain.uid)
    row = tx.get(domain.name)
    return domain_pb2.Domain.FromString(row.body) if row is not None else domain


def record_start(tx: Transaction, name: str, run: statuses.Run, cause: str) -> domain_pb2.Domain:
    """Record that a run has begun."""
    domain = domain_pb2.Domain.FromString(tx.need(name).body)
    old_state = domain.status.state
    statuses.started(domain, run)
    tx.delete_record(records.START, domain.uid)
    records.save(tx, domain, cause, old_state=old_state)
    return domain


def record_failed_start(tx: Transaction, started: domain_pb2.Domain, error: VirtfleetError, cause: str) -> None:
    """Record that a start has failed; one that was cancelled leaves the state as it was."""
    tx.delete_record(records.START, started.uid)
    row = tx.get(started.name)
    if row is None or isinstance(error, OperationCancelled):
        return
    domain = domain_pb2.Domain.FromString(row.body)
    if domain.uid != started.uid or statuses.is_active(domain):
        return
    statuses.start_failed(domain, error)
    records.save(tx, domain, cause)


def record_end(
    tx: Transaction, stopped: domain_pb2.Domain, observation: DomainObservation, cause: str
) -> domain_pb2.Domain:
    """Record that a run has ended; a transient domain vanishes."""
    row = tx.get(stopped.name)
    domain = domain_pb2.Domain.FromString(row.body) if row is not None else stopped
    old_state = domain.status.state
    statuses.observed(domain, observation)
    if row is not None:
        records.end(tx, domain, cause, old_state=old_state)
    return domain


def record_observation(
    tx: Transaction, seen: domain_pb2.Domain, observation: DomainObservation, cause: str
) -> domain_pb2.Domain:
    """Record what a driver sees of a domain that goes on to run."""
    row = tx.get(seen.name)
    if row is None:
        return seen
    domain = domain_pb2.Domain.FromString(row.body)
    old_state = domain.status.state
    if statuses.observed(domain, observation):
        records.save(tx, domain, cause, old_state=old_state)
    return domain

"""The contract suite of drivers: one check per promise of `drivers/api.py`.

A binding is ten lines: a subclass of `DriverContract` (and of the suite of each facet that the driver has) with a
    fixture
`rig` that yields a `Rig`. `test_facets_are_bound` fails when a facet is there and its suite is not, or the other way
round.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, replace

import pytest

from virtfleet.compute.v1 import domain_spec_pb2, stats_pb2
from virtfleet_compute import specs
from virtfleet_compute.drivers.api import (
    DomainObservation,
    DomainRef,
    DomainState,
    Driver,
    DriverEvent,
    EventKind,
    StartPlan,
)
from virtfleet_compute.drivers.facets import (
    Console,
    ConsoleEnd,
    ConsoleEndReason,
    ConsoleGap,
    ConsoleOutput,
    ConsoleSession,
    GracefulStop,
    LiveUpdate,
    Reboot,
    Reset,
    Stats,
    Suspend,
)
from virtfleet_service.errors import GuestDidNotComply, RangeBeyondEnd, ResourceInUse, WrongState

EVENT_SECONDS = 20.0


@dataclass(frozen=True)
class Rig:
    """Is a driver that has been probed and entered, with what its guests need.

    Attributes:
        driver: The driver.
        spec: A spec that it can run, with a serial port `con`.
        plan: Completes a start plan with connections.
        end_inside: Makes a guest end by itself; None: that cannot be done here.
        leftovers: Returns what is left of guests on the host, seen from outside; None: nothing can be.
    """

    driver: Driver
    spec: domain_spec_pb2.DomainSpec
    plan: Callable[[StartPlan], Awaitable[StartPlan]]
    end_inside: Callable[[DomainRef], Awaitable[None]] | None = None
    leftovers: Callable[[], list[str]] | None = None
    node: str = "n1"

    def domain(self) -> DomainRef:
        """Return a new domain."""
        uid = str(uuid.uuid4())
        return DomainRef(f"nodes/{self.node}/domains/d{uid[:8]}", uid)

    async def resolved(self, domain: DomainRef) -> domain_spec_pb2.DomainSpec:
        """Return what the spec comes to for a domain."""
        full = specs.with_defaults(self.spec, self.driver.driver_id, None)
        return await self.driver.resolve(domain, full, None)

    async def planned(self, domain: DomainRef, *, paused: bool = False) -> StartPlan:
        """Return a plan of a new run."""
        spec = await self.resolved(domain)
        return await self.plan(StartPlan(domain, str(uuid.uuid4()), spec, 0, paused))

    async def started(self, *, paused: bool = False) -> tuple[StartPlan, DomainObservation]:
        """Define and start a domain."""
        domain = self.domain()
        plan = await self.planned(domain, paused=paused)
        await self.driver.define(domain, plan.spec)
        return plan, await self.driver.start(plan)

    async def gone(self, *domains: DomainRef) -> None:
        """Stop and undefine domains; nothing of them may be left."""
        for domain in domains:
            await self.driver.stop(domain)
            await self.driver.undefine(domain)
        if self.leftovers is not None:
            assert self.leftovers() == []


class DriverContract:
    """Holds the required part of a driver to its promises."""

    async def test_facets_are_bound(self, rig: Rig) -> None:
        bound = {kind for kind, suite in SUITES.items() if issubclass(type(self), suite)}
        assert bound == {kind for kind in SUITES if rig.driver.facet(kind) is not None}

    async def test_probe_tells_the_same_again(self, rig: Rig) -> None:
        report = await rig.driver.probe()
        assert report.version
        assert report.machines
        assert await rig.driver.probe() == report

    async def test_resolve_decides_once(self, rig: Rig) -> None:
        domain = rig.domain()
        before = domain_spec_pb2.DomainSpec()
        before.CopyFrom(rig.spec)
        first = await rig.resolved(domain)
        assert rig.spec == before, "the spec is not touched"
        assert first.os.machine in (await rig.driver.probe()).machines
        assert await rig.driver.resolve(domain, first, first) == first
        asked = specs.with_defaults(rig.spec, rig.driver.driver_id, first)
        assert await rig.driver.resolve(domain, asked, first) == first, "what was decided stays"

    async def test_define_and_undefine_may_be_repeated(self, rig: Rig) -> None:
        domain = rig.domain()
        spec = await rig.resolved(domain)
        await rig.driver.define(domain, spec)
        await rig.driver.define(domain, spec)
        await rig.driver.undefine(domain)
        await rig.driver.undefine(domain)

    async def test_an_unknown_domain_is_off(self, rig: Rig) -> None:
        observation = await rig.driver.inspect(rig.domain())
        assert not observation.active
        assert observation.runtime_id == ""

    async def test_start_runs_and_tells(self, rig: Rig) -> None:
        plan, observation = await rig.started()
        try:
            assert observation.state == DomainState.DOMAIN_STATE_RUNNING
            assert observation.runtime_id == plan.runtime_id
            assert observation.start_time is not None
            assert observation.start_time.tzinfo is not None
            seen = await rig.driver.inspect(plan.domain)
            assert (seen.state, seen.runtime_id, seen.pid) == (observation.state, plan.runtime_id, observation.pid)
            assert plan.domain.uid in {one.uid for one in await rig.driver.list() if one.active}
        finally:
            await rig.gone(plan.domain)

    async def test_start_paused(self, rig: Rig) -> None:
        plan, observation = await rig.started(paused=True)
        try:
            assert observation.state == DomainState.DOMAIN_STATE_PAUSED
        finally:
            await rig.gone(plan.domain)

    async def test_the_same_start_again_is_the_same_run(self, rig: Rig) -> None:
        plan, observation = await rig.started()
        try:
            again = await rig.driver.start(plan)
            assert (again.runtime_id, again.pid) == (plan.runtime_id, observation.pid)
        finally:
            await rig.gone(plan.domain)

    async def test_another_start_ends_the_run_before(self, rig: Rig) -> None:
        plan, _ = await rig.started()
        try:
            other = replace(plan, runtime_id=str(uuid.uuid4()))
            observation = await rig.driver.start(other)
            assert observation.runtime_id == other.runtime_id
            active = [one for one in await rig.driver.list() if one.uid == plan.domain.uid and one.active]
            assert [one.runtime_id for one in active] == [other.runtime_id]
        finally:
            await rig.gone(plan.domain)

    async def test_stop_may_be_repeated(self, rig: Rig) -> None:
        plan, _ = await rig.started()
        assert not (await rig.driver.stop(plan.domain)).active
        assert not (await rig.driver.stop(plan.domain)).active
        assert not (await rig.driver.stop(rig.domain())).active
        await rig.gone(plan.domain)

    async def test_a_cancelled_start_leaves_nothing(self, rig: Rig) -> None:
        for delay_seconds in (0.0, 0.001, 0.01, 0.03):
            domain = rig.domain()
            plan = await rig.planned(domain)
            task = asyncio.create_task(rig.driver.start(plan))
            await asyncio.sleep(delay_seconds)
            task.cancel()
            (result,) = await asyncio.gather(task, return_exceptions=True)
            if not isinstance(result, asyncio.CancelledError):
                # It was quicker than the cancellation.
                assert not isinstance(result, BaseException)
                await rig.driver.stop(domain)
            assert not (await rig.driver.inspect(domain)).active
            await rig.gone(domain)

    async def test_domains_do_not_wait_for_each_other(self, rig: Rig) -> None:
        runs = await asyncio.gather(*(rig.started() for _ in range(4)))
        assert all(observation.active for _, observation in runs)
        await asyncio.gather(*(rig.driver.stop(plan.domain) for plan, _ in runs))
        await rig.gone(*(plan.domain for plan, _ in runs))

    async def test_events_tell_starts_and_ends_in_order(self, rig: Rig) -> None:
        plan, _ = await rig.started()
        await rig.driver.stop(plan.domain)
        active = [event.observation.active async for event in _events(rig, plan.domain) if event.observation]
        assert active[-1] is False
        await rig.gone(plan.domain)

    async def test_a_guest_that_ends_by_itself_is_told(self, rig: Rig) -> None:
        if rig.end_inside is None:
            return
        plan, _ = await rig.started()
        await rig.end_inside(plan.domain)
        events = [event async for event in _events(rig, plan.domain)]
        assert events[-1].observation is not None
        assert not events[-1].observation.active
        assert events[-1].observation.runtime_id == plan.runtime_id
        assert not (await rig.driver.inspect(plan.domain)).active
        await rig.gone(plan.domain)


async def _events(rig: Rig, domain: DomainRef) -> AsyncIterator[DriverEvent]:
    """Yield the events of a domain until it is off."""
    events = rig.driver.events()
    async with asyncio.timeout(EVENT_SECONDS):
        while True:
            event = await anext(events)
            if event.uid != domain.uid:
                continue
            yield event
            observation = event.observation
            if event.kind is EventKind.STATE_CHANGED and observation and not observation.active:
                return


class GracefulStopContract:
    """Holds GracefulStop to its promises."""

    async def test_shut_down_of_what_does_not_run(self, rig: Rig) -> None:
        facet = rig.driver.facet(GracefulStop)  # type: ignore[type-abstract]  # a protocol is asked for
        assert facet is not None
        assert not (await facet.shut_down(rig.domain(), timeout_seconds=1)).active

    async def test_a_paused_guest_does_not_comply(self, rig: Rig) -> None:
        facet = rig.driver.facet(GracefulStop)  # type: ignore[type-abstract]  # a protocol is asked for
        assert facet is not None
        plan, _ = await rig.started(paused=True)
        with pytest.raises(GuestDidNotComply):
            await facet.shut_down(plan.domain, timeout_seconds=0.2)
        assert (await rig.driver.inspect(plan.domain)).active
        await rig.gone(plan.domain)


class SuspendContract:
    """Holds Suspend to its promises."""

    async def test_suspend_and_resume_may_be_repeated(self, rig: Rig) -> None:
        facet = rig.driver.facet(Suspend)  # type: ignore[type-abstract]  # a protocol is asked for
        assert facet is not None
        plan, _ = await rig.started()
        for _ in range(2):
            assert (await facet.suspend(plan.domain)).state == DomainState.DOMAIN_STATE_PAUSED
        for _ in range(2):
            assert (await facet.resume(plan.domain)).state == DomainState.DOMAIN_STATE_RUNNING
        await rig.gone(plan.domain)

    async def test_suspend_needs_a_guest(self, rig: Rig) -> None:
        facet = rig.driver.facet(Suspend)  # type: ignore[type-abstract]  # a protocol is asked for
        assert facet is not None
        for verb in (facet.suspend, facet.resume):
            with pytest.raises(WrongState):
                await verb(rig.domain())


class ResetContract:
    """Holds Reset to its promises."""

    async def test_reset_goes_on(self, rig: Rig) -> None:
        facet = rig.driver.facet(Reset)  # type: ignore[type-abstract]  # a protocol is asked for
        assert facet is not None
        plan, observation = await rig.started()
        after = await facet.reset(plan.domain)
        assert (after.runtime_id, after.pid) == (plan.runtime_id, observation.pid)
        await rig.gone(plan.domain)
        with pytest.raises(WrongState):
            await facet.reset(plan.domain)


class RebootContract:
    """Holds Reboot to its promises."""

    async def test_reboot_needs_a_guest(self, rig: Rig) -> None:
        facet = rig.driver.facet(Reboot)  # type: ignore[type-abstract]  # a protocol is asked for
        assert facet is not None
        with pytest.raises(WrongState):
            await facet.reboot(rig.domain(), timeout_seconds=None)


class LiveUpdateContract:
    """Holds LiveUpdate to its promises."""

    async def test_a_plan_names_every_path_once(self, rig: Rig) -> None:
        facet = rig.driver.facet(LiveUpdate)  # type: ignore[type-abstract]  # a protocol is asked for
        assert facet is not None
        current = await rig.resolved(rig.domain())
        wanted = domain_spec_pb2.DomainSpec()
        wanted.CopyFrom(current)
        wanted.memory.maximum_bytes *= 2
        wanted.os.machine = "another"
        paths = ["spec.memory.maximum_bytes", "spec.os.machine"]
        plan = facet.plan_live_update(current, wanted, paths)
        assert sorted([*plan.live, *(path for path, _, _ in plan.refused)]) == sorted(paths)
        assert "spec.os.machine" in [path for path, _, _ in plan.refused]
        assert all(reason and text for _, reason, text in plan.refused)


class StatsContract:
    """Holds Stats to its promises."""

    async def test_one_answer_per_domain(self, rig: Rig) -> None:
        facet = rig.driver.facet(Stats)  # type: ignore[type-abstract]  # a protocol is asked for
        assert facet is not None
        plan, _ = await rig.started()
        groups = frozenset({stats_pb2.STATS_GROUP_CPU})
        unknown = rig.domain()
        first, other = await facet.domain_stats([plan.domain, unknown], groups)
        assert first.HasField("cpu")
        assert not first.HasField("balloon")
        assert not other.HasField("cpu")
        (second,) = await facet.domain_stats([plan.domain], groups)
        assert second.cpu.total_time.ToNanoseconds() >= first.cpu.total_time.ToNanoseconds()
        await rig.gone(plan.domain)


class ConsoleContract:
    """Holds Console to its promises; the guest must have put out something within the time of an event."""

    async def test_history_and_end(self, rig: Rig) -> None:
        facet = rig.driver.facet(Console)  # type: ignore[type-abstract]  # a protocol is asked for
        assert facet is not None
        plan, _ = await rig.started()
        session = await facet.open_console(plan.domain, "con", writable=False, force=False, epoch="", offset=0)
        output = session.output()
        async with asyncio.timeout(EVENT_SECONDS):
            first = await anext(output)
        assert isinstance(first, ConsoleOutput)
        assert first.offset == 0
        assert first.data
        with pytest.raises(WrongState):
            await session.write(b"x")
        await rig.driver.stop(plan.domain)
        async with asyncio.timeout(EVENT_SECONDS):
            items = [item async for item in output]
        assert isinstance(items[-1], ConsoleEnd)
        assert items[-1].reason is ConsoleEndReason.GUEST_ENDED
        await session.close()
        await session.close()
        log = await facet.read_console_log(plan.domain, "con", epoch="", offset=0, follow=False)
        kept = [item async for item in log.output()]
        assert isinstance(kept[0], ConsoleOutput)
        assert kept[0].data.startswith(first.data[:1])
        await log.close()
        await rig.gone(plan.domain)

    async def test_one_writer(self, rig: Rig) -> None:
        facet = rig.driver.facet(Console)  # type: ignore[type-abstract]  # a protocol is asked for
        assert facet is not None
        plan, _ = await rig.started()

        async def opened(*, force: bool) -> ConsoleSession:
            return await facet.open_console(plan.domain, "con", writable=True, force=force, epoch="", offset=None)

        first = await opened(force=False)
        with pytest.raises(ResourceInUse):
            await opened(force=False)
        second = await opened(force=True)
        async with asyncio.timeout(EVENT_SECONDS):
            items = [item async for item in first.output()]
        assert isinstance(items[-1], ConsoleEnd)
        assert items[-1].reason is ConsoleEndReason.TAKEN_OVER
        await second.close()
        third = await opened(force=False)
        for session in (first, third):
            await session.close()
        await rig.gone(plan.domain)

    async def test_places_that_are_not_there(self, rig: Rig) -> None:
        facet = rig.driver.facet(Console)  # type: ignore[type-abstract]  # a protocol is asked for
        assert facet is not None
        plan, _ = await rig.started()
        with pytest.raises(RangeBeyondEnd):
            await facet.open_console(plan.domain, "con", writable=False, force=False, epoch="", offset=1 << 40)
        session = await facet.open_console(plan.domain, "con", writable=False, force=False, epoch="another", offset=5)
        async with asyncio.timeout(EVENT_SECONDS):
            assert isinstance(await anext(session.output()), ConsoleGap)
        await session.close()
        await rig.gone(plan.domain)


SUITES: Mapping[type, type] = {
    GracefulStop: GracefulStopContract,
    Suspend: SuspendContract,
    Reset: ResetContract,
    Reboot: RebootContract,
    LiveUpdate: LiveUpdateContract,
    Stats: StatsContract,
    Console: ConsoleContract,
}
"""The suite of each facet; Addresses and Inventory are held by tests of the drivers that have them."""

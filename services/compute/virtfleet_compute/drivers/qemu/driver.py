"""The QEMU driver itself: the required part of `drivers/api.py`, and the verbs of running guests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

from virtfleet.compute.v1 import domain_spec_pb2
from virtfleet_compute.drivers.api import (
    AcceleratorReport,
    DefinitionAuthority,
    DomainObservation,
    DomainRef,
    DomainStateReason,
    DriverEnvironment,
    DriverEvent,
    DriverReport,
    Facet,
    IsolationReport,
    StartPlan,
)
from virtfleet_compute.drivers.facets import Addresses, Console, Inventory, LiveUpdate, Stats
from virtfleet_compute.drivers.qemu import accelerator, arguments, failures, naming, probe, resolution
from virtfleet_compute.drivers.qemu.console import Consoles
from virtfleet_compute.drivers.qemu.guest import PAUSED, RUNNING, SHUT_OFF, Guest
from virtfleet_compute.drivers.qemu.guests import Guests
from virtfleet_compute.drivers.qemu.live import LiveChanges, settle_before_first_instruction
from virtfleet_compute.drivers.qemu.monitor import MonitorLost
from virtfleet_compute.drivers.qemu.probe import Emulator
from virtfleet_compute.drivers.qemu.records import Birth, End, Records
from virtfleet_compute.drivers.qemu.settings import from_table
from virtfleet_compute.drivers.qemu.stats import Counters
from virtfleet_service.errors import DriverBroken, GuestDidNotComply, HypervisorFailed, WrongState
from virtfleet_service.launcher import Capabilities, LauncherClient, LauncherError, Process, Spawn

_log = logging.getLogger(__name__)

INSPECT_SECONDS = 2.0
_EARLY_EXIT_SECONDS = 2.0
_CTRL_ALT_DEL = [{"type": "qcode", "data": key} for key in ("ctrl", "alt", "delete")]


def create(environment: DriverEnvironment) -> QemuDriver:
    """Make the driver from its settings.

    Raises:
        DriverBroken: The settings are wrong.
    """
    return QemuDriver(environment)


class QemuDriver:
    """Runs guests in QEMU processes that the node's launcher starts."""

    driver_id = "qemu"
    definition_authority = DefinitionAuthority.SERVICE

    def __init__(self, environment: DriverEnvironment) -> None:
        self._environment = environment
        self._settings = from_table(environment.settings)
        self._binary = self._settings.binary or probe.default_binary(resolution.ARCH)
        self._records = Records(environment.run_directory)
        self._launcher = LauncherClient.connect(str(environment.launcher_socket or "/nonexistent"))
        self._guests = Guests(self._launcher, self._records, self._settings)
        self._consoles = Consoles(self._guests)
        self._counters = Counters(self._guests)
        self._live = LiveChanges(self._guests, self._records)
        self._emulator: Emulator | None = None
        self._stamp: list[object] = []
        self._looking = asyncio.Lock()
        self._accelerators: tuple[AcceleratorReport, ...] = ()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Hold the connections to launcher and guests."""
        self._environment.run_directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        async with self._guests.running():
            yield

    async def probe(self) -> DriverReport:
        """Ask QEMU and the launcher what they can do, and try the accelerators."""
        if self._environment.launcher_socket is None:
            raise DriverBroken(
                "the QEMU driver needs the node's launcher", driver=self.driver_id, cause="no launcher_socket is set"
            )
        emulator = await self._look()
        try:
            launcher = await self._launcher.capabilities()
        except LauncherError as error:
            raise DriverBroken(
                f"the launcher at {self._environment.launcher_socket} does not answer: {error.message}",
                driver=self.driver_id,
                cause=str(error),
            ) from error
        if self._binary not in launcher.executables:
            cause = f"{self._binary} is not among the executables of the launcher's settings"
            raise DriverBroken(f"guests cannot be started: {cause}", driver=self.driver_id, cause=cause)
        return DriverReport(
            version=emulator.version,
            capabilities=resolution.CAPABILITIES,
            machines=tuple(sorted(emulator.machines)),
            archs=(resolution.ARCH,),
            accelerators=self._accelerators,
            isolation_layers=_isolation(launcher, emulator),
        )

    async def _look(self) -> Emulator:
        """Find out what the binary is and what drives its guests."""
        stamp = probe.stamp_of(self._binary)
        emulator = await probe.probe(self._binary, self._environment.state_directory)
        self._accelerators = await accelerator.accelerators(
            emulator, self._environment.state_directory, self._settings.accelerator
        )
        self._emulator, self._stamp = emulator, stamp
        return emulator

    def facet(self, kind: type[Facet]) -> Facet | None:
        """Return what implements a facet: the driver itself, or a part of it."""
        if kind in (Addresses, Inventory):
            return None
        parts = {LiveUpdate: self._live, Console: self._consoles, Stats: self._counters}
        candidate = parts.get(kind, self)
        return candidate if isinstance(candidate, kind) else None

    async def resolve(
        self, domain: DomainRef, spec: domain_spec_pb2.DomainSpec, previous: domain_spec_pb2.DomainSpec | None
    ) -> domain_spec_pb2.DomainSpec:
        """Decide machine, processor, buses, places."""
        emulator = await self._current_emulator()
        return resolution.resolve(
            domain.uid, spec, previous, resolution.Host(emulator, self._accelerator(domain_spec_pb2.QemuOptions()))
        )

    async def define(self, domain: DomainRef, resolved: domain_spec_pb2.DomainSpec) -> None:
        """Do nothing: QEMU learns a spec when it starts."""
        del domain, resolved

    async def undefine(self, domain: DomainRef) -> None:
        """Forget what is kept of a domain's last run."""
        await self._guests.forget(domain.uid)

    async def list(self) -> Sequence[DomainObservation]:
        """List what the launcher has of ours."""
        return await self._guests.list()

    def events(self) -> AsyncIterator[DriverEvent]:
        """Tell what happens to guests."""
        return self._guests.events()

    async def inspect(self, domain: DomainRef) -> DomainObservation:
        """Look at a guest, and ask it whether it is as we think."""
        guest = await self._guests.find(domain.uid)
        if guest is None:
            return DomainObservation(domain.uid, SHUT_OFF, DomainStateReason.DOMAIN_STATE_REASON_UNSPECIFIED)
        if guest.active and guest.monitor is not None and not guest.starting:
            try:
                await self._guests.ask(guest, "query-status", timeout_seconds=INSPECT_SECONDS)
            except HypervisorFailed as error:
                # `control_lost` says it.
                _log.info("%s: %s", domain.name, error)
        return guest.observe()

    # Starting.

    async def start(self, plan: StartPlan) -> DomainObservation:
        """Start a process, shake hands with it, and let the guest go."""
        uid = plan.domain.uid
        # Without a question to the launcher: it tells of a process that we do not know when it is to start another.
        guest = self._guests.get(uid)
        if guest is not None and guest.active and guest.runtime_id != plan.runtime_id:
            self._guests.decide(guest, End(SHUT_OFF, DomainStateReason.DOMAIN_STATE_REASON_DESTROYED))
            await self._guests.kill(guest)
            guest = None
        try:
            if guest is None or not guest.active:
                guest = await self._spawn(plan)
            await self._bring_up(guest, plan)
        except BaseException:
            await asyncio.shield(self._undo(uid))
            raise
        self._guests.announce(guest)
        return guest.observe()

    async def _spawn(self, plan: StartPlan) -> Guest:
        emulator = await self._current_emulator()
        accelerator_ = self._accelerator(plan.spec.qemu)
        invocation = arguments.build(plan, self._binary, accelerator_, sandbox=emulator.has_sandbox)
        birth = Birth(
            name=plan.domain.name,
            start_time=datetime.now(UTC),
            spec=plan.spec,
            images={key: connection.path for key, connection in plan.disks.items()},
            capacities={key: connection.capacity_bytes for key, connection in plan.disks.items()},
            taps={key: tap.interface_name for key, tap in plan.interfaces.items()},
        )
        spawn = Spawn(
            guest=naming.guest(plan.domain.uid),
            token=plan.runtime_id,
            argv=invocation.argv,
            env=arguments.ENVIRONMENT,
            uid=plan.run_as_uid or None,
            gid=plan.run_as_uid or None,
            groups=_groups(accelerator_) if plan.run_as_uid else (),
            sockets=invocation.sockets,
            taps=invocation.taps,
            consoles=invocation.consoles,
            # A core file of a guest holds its memory.
            rlimits={"CORE": (0, 0)},
            spec=birth.encode(),
        )
        process = await self._ask_launcher(spawn, plan)
        # Of earlier runs: they name the run that they are of, so they may wait until QEMU is on its way.
        self._records.clear(plan.domain.uid)
        guest = Guest(plan.domain.uid, plan.runtime_id, birth, plan.spec, process.pid, plan.run_as_uid, starting=True)
        self._guests.add(guest)
        return guest

    async def _ask_launcher(self, spawn: Spawn, plan: StartPlan) -> Process:
        what = f"starting {plan.domain.name}"
        try:
            return await self._launcher.spawn(spawn)
        except LauncherError as error:
            if error.reason != "ALREADY_RUNNING":
                raise failures.of_launcher(error, what) from error
        # A process that this driver has not found yet: another run's, which this one replaces.
        other = await self._guests.find(plan.domain.uid)
        if other is not None:
            await self._guests.kill(other)
        try:
            return await self._launcher.spawn(spawn)
        except LauncherError as error:
            raise failures.of_launcher(error, what) from error

    async def _bring_up(self, guest: Guest, plan: StartPlan) -> None:
        """Shake hands, set what is to hold from the first instruction on, and let the guest go if it is to run."""
        guests = self._guests
        if guest.monitor is None:
            try:
                await guests.connect(guest, self._settings.start_seconds)
            except MonitorLost as error:
                raise await self._why_silent(guest, error) from error
        if guest.state == RUNNING:
            return
        guest.starting = True
        try:
            await settle_before_first_instruction(guests, guest)
            if plan.paused:
                guest.state, guest.reason = PAUSED, DomainStateReason.DOMAIN_STATE_REASON_STARTED_PAUSED
            else:
                guest.why_running = DomainStateReason.DOMAIN_STATE_REASON_BOOTED
                await guests.ask(guest, "cont")
        except HypervisorFailed as error:
            if guest.active and guest.monitor is not None:
                raise
            raise await self._why_silent(guest, MonitorLost(str(error))) from error
        guest.starting = False
        if not guest.active:
            raise await self._why_silent(guest, MonitorLost("it ended"))

    async def _why_silent(self, guest: Guest, lost: MonitorLost) -> HypervisorFailed:
        """Make the error of a QEMU that does not answer: what it said, and whether it is still there."""
        name = naming.guest(guest.uid)
        ending = guest.exit
        if ending is None:
            try:
                async with asyncio.timeout(_EARLY_EXIT_SECONDS if "greeting:" in str(lost) else 0.05):
                    ending = await self._launcher.wait(name)
            except (TimeoutError, LauncherError):
                # It is there and does not speak QMP.
                ending = None
        said = await self._guests.said(name)
        what = failures.how(ending) if ending is not None else f"QEMU does not answer: {lost}"
        text = f"{guest.birth.name} did not start: {what}" + (f"; it said: {said}" if said else "")
        return HypervisorFailed(text, resource=guest.birth.name, said=said, cause=what)

    async def _undo(self, uid: str) -> None:
        """Leave nothing of a start that failed."""
        guest = self._guests.get(uid)
        try:
            if guest is None:
                # The launcher may have started what its answer did not tell us of.
                guest = await self._guests.find(uid)
            if guest is not None:
                guest.starting = True
                if guest.active:
                    await self._guests.kill(guest)
            await self._guests.forget(uid)
        # The error of the start is the one to tell; what is left is found by `list`.
        except Exception:  # noqa: BLE001
            _log.exception("the failed start of %s could not be undone", uid)

    # Stopping.

    async def stop(self, domain: DomainRef) -> DomainObservation:
        """Kill a guest's process."""
        guest = await self._guests.find(domain.uid)
        if guest is None:
            return DomainObservation(domain.uid, SHUT_OFF, DomainStateReason.DOMAIN_STATE_REASON_UNSPECIFIED)
        if guest.active:
            if guest.end is None:
                self._guests.decide(guest, End(SHUT_OFF, DomainStateReason.DOMAIN_STATE_REASON_DESTROYED))
            await self._guests.kill(guest)
        return guest.observe()

    async def shut_down(self, domain: DomainRef, *, timeout_seconds: float) -> DomainObservation:
        """Press the guest's power button and wait."""
        guest = await self._guests.find(domain.uid)
        if guest is None or not guest.active:
            return await self.inspect(domain)
        guest.stop_wanted = True
        if _stopped_itself(guest):
            # Kept for inspection; there is nobody left to ask.
            self._guests.decide(guest, End(SHUT_OFF, guest.reason))
            await self._guests.end(guest)
            return guest.observe()
        await self._guests.ask(guest, "system_powerdown")
        await self._wait(guest, guest.ended, timeout_seconds, "power itself off")
        return guest.observe()

    # Reboot, Reset, Suspend.

    async def reboot(self, domain: DomainRef, *, timeout_seconds: float | None) -> DomainObservation:
        """Press ctrl-alt-del on the guest's keyboard."""
        guest = self._need(domain)
        guest.reboot_wanted = True
        guest.was_reset.clear()
        await self._guests.ask(guest, "send-key", {"keys": _CTRL_ALT_DEL})
        if timeout_seconds is not None:
            await self._wait(guest, guest.was_reset, timeout_seconds, "boot again")
        return guest.observe()

    async def reset(self, domain: DomainRef) -> DomainObservation:
        """Press the guest's reset button."""
        guest = self._need(domain)
        await self._guests.reset(guest)
        return guest.observe()

    async def suspend(self, domain: DomainRef) -> DomainObservation:
        """Stop the guest's processors."""
        guest = self._need(domain)
        if guest.state != PAUSED:
            await self._guests.ask(guest, "stop")
        return guest.observe()

    async def resume(self, domain: DomainRef) -> DomainObservation:
        """Let the guest's processors go on."""
        guest = self._need(domain)
        if guest.state != RUNNING:
            await self._guests.ask(guest, "cont")
        return guest.observe()

    # Common parts.

    async def _wait(self, guest: Guest, event: asyncio.Event, seconds: float, what: str) -> None:
        loop = asyncio.get_running_loop()
        waits = [asyncio.create_task(each.wait()) for each in dict.fromkeys((event, guest.ended))]
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
        if not event.is_set():
            why = "it ended instead" if guest.ended.is_set() else f"within {seconds:g} s"
            raise GuestDidNotComply(
                f"the guest of {guest.birth.name} did not {what}: {why}",
                resource=guest.birth.name,
                timeout_seconds=seconds,
                observed=loop.time(),
            )

    def _need(self, domain: DomainRef) -> Guest:
        guest = self._guests.active(domain.uid)
        if guest is None:
            raise WrongState(f"{domain.name} has no guest", resource=domain.name, state="SHUT_OFF")
        return guest

    async def _current_emulator(self) -> Emulator:
        """Return what the binary is now: the distribution may have put another one in its place.

        Raises:
            DriverBroken: It is gone, or cannot be asked.
        """
        if self._emulator is None or self._stamp != probe.stamp_of(self._binary):
            async with self._looking:
                if self._emulator is None or self._stamp != probe.stamp_of(self._binary):
                    return await self._look()
        return self._emulator

    def _accelerator(self, options: domain_spec_pb2.QemuOptions) -> str:
        """Return the accelerator for a guest: the one that it or the settings ask for, else the best that works.

        Raises:
            DriverBroken: It asks for one that does not work here.
        """
        wanted = options.accelerator or self._settings.accelerator
        for report in self._accelerators:
            if wanted == report.name and not report.usable:
                raise DriverBroken(
                    f"accelerator {wanted} cannot be used: {report.reason}", driver=self.driver_id, cause=report.reason
                )
            if report.usable and wanted in ("", report.name):
                return report.name
        raise DriverBroken(f"there is no accelerator {wanted}", driver=self.driver_id, cause=f"unknown: {wanted}")


def _stopped_itself(guest: Guest) -> bool:
    return guest.state == PAUSED and guest.reason in (
        DomainStateReason.DOMAIN_STATE_REASON_GUEST_SHUTDOWN,
        DomainStateReason.DOMAIN_STATE_REASON_GUEST_REBOOT_STOP,
        DomainStateReason.DOMAIN_STATE_REASON_GUEST_CRASHED,
    )


def _groups(accelerator_: str, device: Path = accelerator.KVM_DEVICE) -> tuple[int, ...]:
    return (device.stat().st_gid,) if accelerator_ == "kvm" else ()


def _isolation(launcher: Capabilities, emulator: Emulator) -> tuple[IsolationReport, ...]:
    def layer(name: str, said: str, *, also: str = "") -> IsolationReport:
        found = launcher.layers.get(name)
        if found is None:
            return IsolationReport(name, enabled=False, reason="the launcher does not know it")
        enabled = found.possible and not also
        return IsolationReport(name, enabled=enabled, reason=said if enabled else also or found.reason)

    low, high = launcher.uids
    return (
        layer("user", f"each guest has a numeric user of its own from {low} to {high}"),
        layer(
            "seccomp",
            "QEMU filters its own system calls",
            also="" if emulator.has_sandbox else "this QEMU was built without seccomp",
        ),
        layer("cgroup", "each guest has a control group of its own"),
        layer("session", "each guest has a session of its own"),
        layer("no_new_privs", "no guest gains privileges by exec"),
    )

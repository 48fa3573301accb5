"""The test driver itself: every method of `drivers/api.py` over guests in memory."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from virtfleet.compute.v1 import domain_spec_pb2, stats_pb2
from virtfleet_compute.drivers.api import (
    AcceleratorReport,
    DefinitionAuthority,
    DomainObservation,
    DomainRef,
    DomainState,
    DomainStateReason,
    DriverEnvironment,
    DriverEvent,
    DriverReport,
    EventKind,
    Facet,
    IsolationReport,
    StartPlan,
)
from virtfleet_compute.drivers.facets import AddressObservation, ConsoleSession, FoundDomain, Inventory, LivePlan
from virtfleet_compute.drivers.test import resolution, stats
from virtfleet_compute.drivers.test.console import Port, Session
from virtfleet_compute.drivers.test.faults import Faults
from virtfleet_compute.drivers.test.guests import Guest, Guests
from virtfleet_compute.drivers.test.seeds import BATCH_COUNT, Seeds
from virtfleet_compute.drivers.test.settings import Settings, from_table
from virtfleet_service.errors import DriverBroken, GuestDidNotComply, ResourceNotFound, WrongState

EVENT_LIMIT = 10_000
"""How many events wait for the service; more become one GAP."""

_RUNNING = DomainState.DOMAIN_STATE_RUNNING
_PAUSED = DomainState.DOMAIN_STATE_PAUSED
_SHUT_OFF = DomainState.DOMAIN_STATE_SHUT_OFF
_CRASHED = DomainState.DOMAIN_STATE_CRASHED
_LIVE_PREFIXES = (
    "spec.memory.current_bytes",
    "spec.test",
    "spec.disks.*.throttle",
    "spec.interfaces.*.link_up",
)


def create(environment: DriverEnvironment) -> TestDriver:
    """Make the driver from its settings.

    Raises:
        DriverBroken: The settings are wrong.
    """
    settings = from_table(Settings, environment.settings, "[drivers.test]")
    return TestDriver(environment.node, settings)


class TestDriver:
    """Runs guests in memory. They end with the process unless a state file is set."""

    driver_id = "test"
    definition_authority = DefinitionAuthority.SERVICE

    def __init__(self, node: str, settings: Settings) -> None:
        self.faults = Faults(settings.faults, random_seed=settings.random_seed)
        self._node = node
        self._settings = settings
        self._guests = Guests()
        self._ports: dict[str, dict[str, Port]] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._events: asyncio.Queue[DriverEvent] = asyncio.Queue()
        self._seeds: Seeds | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Hold the guests in memory."""
        if self._settings.state_file is not None:
            self._guests.open(self._settings.state_file)
        for uid, guest in self._guests.items():
            if guest.state == _RUNNING:
                self._arm(uid, guest)
        try:
            yield
        finally:
            for timer in self._timers.values():
                timer.cancel()
            self._guests.close()

    async def probe(self) -> DriverReport:
        """Report what the settings say."""
        async with self.faults.around("probe", ""):
            if self._settings.broken:
                raise DriverBroken(self._settings.broken, cause=self._settings.broken)
            if self._settings.seed_file is not None and self._seeds is None:
                self._seeds = Seeds(self._settings.seed_file, self._node)
            return DriverReport(
                version=self._settings.version,
                capabilities=resolution.CAPABILITIES,
                machines=(resolution.machine(self._settings.version),),
                archs=resolution.ARCHS,
                accelerators=(AcceleratorReport("memory", usable=True, reason="guests are records in memory"),),
                uses_host_memory=self._settings.uses_host_memory,
                isolation_layers=(IsolationReport("process", enabled=False, reason="no guest code is run"),),
            )

    async def resolve(
        self, domain: DomainRef, spec: domain_spec_pb2.DomainSpec, previous: domain_spec_pb2.DomainSpec | None
    ) -> domain_spec_pb2.DomainSpec:
        """Decide machine, CPU model, buses and slots."""
        async with self.faults.around("resolve", domain.domain_id):
            return resolution.resolve(spec, previous, self._settings.version)

    async def define(self, domain: DomainRef, resolved: domain_spec_pb2.DomainSpec) -> None:
        """Do nothing: the service holds the definition."""
        async with self.faults.around("define", domain.domain_id):
            del resolved

    async def undefine(self, domain: DomainRef) -> None:
        """Forget what is kept of a domain."""
        async with self.faults.around("undefine", domain.domain_id):
            self._disarm(domain.uid)
            self._guests.forget(domain.uid)
            self._drop_ports(domain.uid)

    async def start(self, plan: StartPlan) -> DomainObservation:
        """Make a guest."""
        uid = plan.domain.uid
        async with self.faults.around("start", plan.domain.domain_id):
            guest = self._guests.get(uid)
            if guest is not None and _active(guest) and guest.runtime_id == plan.runtime_id:
                return self._observe(uid, guest)
            self._disarm(uid)
            self._drop_ports(uid)
            guest = self._guests.start(uid, plan.spec, plan.runtime_id, time.time_ns(), paused=plan.paused)
            if not plan.paused:
                self._arm(uid, guest)
            return self._told(uid, guest)

    async def stop(self, domain: DomainRef) -> DomainObservation:
        """End a guest."""
        async with self.faults.around("stop", domain.domain_id):
            guest = self._guests.get(domain.uid)
            if guest is None or not _active(guest):
                return self._observe(domain.uid, guest)
            return self._end(domain.uid, guest, DomainStateReason.DOMAIN_STATE_REASON_DESTROYED)

    async def inspect(self, domain: DomainRef) -> DomainObservation:
        """Look at a guest."""
        async with self.faults.around("inspect", domain.domain_id):
            return self._observe(domain.uid, self._guests.get(domain.uid))

    async def list(self) -> Sequence[DomainObservation]:
        """List all guests and ends on record."""
        async with self.faults.around("list", ""):
            return [self._observe(uid, guest) for uid, guest in self._guests.items()]

    async def events(self) -> AsyncIterator[DriverEvent]:
        """Tell what happens to guests."""
        while True:
            yield await self._events.get()

    def facet(self, kind: type[Facet]) -> Facet | None:
        """Return the driver itself for every facet that the settings leave in."""
        if kind.__name__ in self._settings.without or (kind is Inventory and self._seeds is None):
            return None
        return self if isinstance(self, kind) else None

    def hand_over(self, uid: str, spec: domain_spec_pb2.DomainSpec, target: TestDriver) -> None:
        """Give a guest to the test driver of another node: what a migration comes to. Nobody is told."""
        guest = self._guests.get(uid)
        self._disarm(uid)
        self._guests.forget(uid)
        self._drop_ports(uid)
        if guest is not None and _active(guest):
            moved = target._guests.start(uid, spec, guest.runtime_id, guest.start_ns, paused=guest.state == _PAUSED)
            target._arm(uid, moved)

    # GracefulStop, Reboot, Reset, Suspend.

    async def shut_down(self, domain: DomainRef, *, timeout_seconds: float) -> DomainObservation:
        """Press the power button of a guest and wait."""
        async with self.faults.around("shut_down", domain.domain_id):
            guest = self._guests.get(domain.uid)
            if guest is None or not _active(guest):
                return self._observe(domain.uid, guest)
            await self._button(domain, guest, timeout_seconds, "power itself off")
            now = self._guests.get(domain.uid)
            if now is None or not _active(now):
                return self._observe(domain.uid, now)
            return self._end(domain.uid, now, DomainStateReason.DOMAIN_STATE_REASON_GUEST_SHUTDOWN)

    async def reboot(self, domain: DomainRef, *, timeout_seconds: float | None) -> DomainObservation:
        """Ask a guest to boot again."""
        async with self.faults.around("reboot", domain.domain_id):
            guest = self._need(domain)
            if timeout_seconds is not None:
                await self._button(domain, guest, timeout_seconds, "boot again")
                guest = self._need(domain)
            if self._guests.shape(guest).obeys_power_button:
                self._emit(EventKind.REBOOTED, domain.uid, reason="GUEST_REBOOT")
            return self._observe(domain.uid, guest)

    async def reset(self, domain: DomainRef) -> DomainObservation:
        """Reset a guest."""
        async with self.faults.around("reset", domain.domain_id):
            guest = self._need(domain)
            self._emit(EventKind.REBOOTED, domain.uid, reason="RESET")
            return self._observe(domain.uid, guest)

    async def suspend(self, domain: DomainRef) -> DomainObservation:
        """Pause a guest."""
        async with self.faults.around("suspend", domain.domain_id):
            guest = self._need(domain)
            if guest.state == _PAUSED:
                return self._observe(domain.uid, guest)
            self._disarm(domain.uid)
            changed = self._guests.change(domain.uid, guest, _PAUSED, DomainStateReason.DOMAIN_STATE_REASON_USER)
            return self._told(domain.uid, changed)

    async def resume(self, domain: DomainRef) -> DomainObservation:
        """Let a guest go on."""
        async with self.faults.around("resume", domain.domain_id):
            guest = self._need(domain)
            if guest.state == _RUNNING:
                return self._observe(domain.uid, guest)
            changed = self._guests.change(domain.uid, guest, _RUNNING, DomainStateReason.DOMAIN_STATE_REASON_UNPAUSED)
            self._arm(domain.uid, changed)
            return self._told(domain.uid, changed)

    # LiveUpdate, Stats, Addresses, Inventory.

    def plan_live_update(
        self, current: domain_spec_pb2.DomainSpec, wanted: domain_spec_pb2.DomainSpec, paths: Sequence[str]
    ) -> LivePlan:
        """Call live what a real hypervisor could do: the balloon, throttles, links."""
        del current
        live, refused = [], []
        for path in paths:
            if path == "spec.memory.current_bytes" and wanted.memory.current_bytes > wanted.memory.maximum_bytes:
                refused.append((path, "NEEDS_RESTART", "the guest cannot have more than its maximum"))
            elif any(_covers(prefix, path) for prefix in _LIVE_PREFIXES):
                live.append(path)
            else:
                refused.append((path, "NEEDS_RESTART", "takes effect at the next start"))
        return LivePlan(tuple(live), tuple(refused))

    async def update_live(
        self,
        domain: DomainRef,
        current: domain_spec_pb2.DomainSpec,
        wanted: domain_spec_pb2.DomainSpec,
        paths: Sequence[str],
    ) -> None:
        """Change a guest."""
        del current, paths
        async with self.faults.around("update_live", domain.domain_id):
            guest = self._need(domain)
            self._guests.update(domain.uid, guest, wanted)

    async def domain_stats(
        self, domains: Sequence[DomainRef], groups: frozenset[stats_pb2.StatsGroup.ValueType]
    ) -> Sequence[stats_pb2.DomainStats]:
        """Compute counters that move with time."""
        async with self.faults.around("domain_stats", domains[0].domain_id if domains else ""):
            now_ns = time.time_ns()
            answers = []
            for domain in domains:
                guest = self._guests.get(domain.uid)
                answer = stats_pb2.DomainStats()
                if guest is not None and _active(guest):
                    stats.fill(answer, domain.uid, guest, self._guests.shape(guest), groups, now_ns)
                answers.append(answer)
            return answers

    async def guest_addresses(self, domain: DomainRef) -> Sequence[AddressObservation]:
        """Give each card of a running guest an address of its own, made from the uid."""
        async with self.faults.around("guest_addresses", domain.domain_id):
            guest = self._guests.get(domain.uid)
            if guest is None or guest.state != _RUNNING:
                return ()
            seed = uuid.UUID(domain.uid).int
            return [
                AddressObservation(
                    device_id, f"fd00::{(seed >> 16) & 0xFFFF or 1:x}:{(seed + number) & 0xFFFF or 1:x}", 64
                )
                for number, device_id in enumerate(self._guests.shape(guest).interfaces)
            ]

    def inventory_digest(self) -> str:
        """Return the digest of the seed file."""
        return self._seeds.digest if self._seeds is not None else ""

    async def inventory(self) -> AsyncIterator[Sequence[FoundDomain]]:
        """List the domains of the seed file; those that run are made to run."""
        batch: list[FoundDomain] = []
        of: domain_spec_pb2.DomainSpec | None = None
        first: Guest | None = None
        for found in self._seeds.found() if self._seeds is not None else ():
            if found.observation is not None:
                if first is None or found.spec is not of:
                    resolved = resolution.resolve(found.spec, None, self._settings.version)
                    of, first = (
                        found.spec,
                        self._guests.start(found.uid, resolved, found.runtime_id, time.time_ns(), paused=False),
                    )
                else:
                    # Domains of a group share their spec.
                    self._guests.start_another(found.uid, first, found.runtime_id)
            batch.append(found)
            if len(batch) == BATCH_COUNT:
                yield batch
                batch = []
        if batch:
            yield batch

    # Console.

    async def open_console(
        self, domain: DomainRef, device_id: str, *, writable: bool, force: bool, epoch: str, offset: int | None
    ) -> ConsoleSession:
        """Join a port of a guest."""
        async with self.faults.around("open_console", domain.domain_id):
            guest = self._need(domain)
            port = self._port(domain, device_id, guest)
            return Session(port, epoch=epoch, offset=offset, writable=writable, force=force)

    async def read_console_log(
        self, domain: DomainRef, device_id: str, *, epoch: str, offset: int, follow: bool
    ) -> ConsoleSession:
        """Read the history of a port."""
        async with self.faults.around("read_console_log", domain.domain_id):
            guest = self._guests.get(domain.uid)
            if guest is None:
                raise ResourceNotFound(f"{domain.name} never ran: no console output is kept", resource=domain.name)
            port = self._port(domain, device_id, guest)
            return Session(port, epoch=epoch, offset=offset, writable=False, follow=follow)

    def _port(self, domain: DomainRef, device_id: str, guest: Guest) -> Port:
        ports = self._ports.setdefault(domain.uid, {})
        port = ports.get(device_id)
        if port is None:
            port = Port(device_id, guest.runtime_id, lambda line: self._obey(domain.uid, line))
            port.put_out(f"test guest {domain.domain_id} booted\r\n".encode())
            port.ended = not _active(guest)
            ports[device_id] = port
        return port

    def _drop_ports(self, uid: str) -> None:
        for port in self._ports.pop(uid, {}).values():
            port.finish()

    def _obey(self, uid: str, line: str) -> None:
        """Let a guest do what was written to its console."""
        guest = self._guests.get(uid)
        if guest is None or not _active(guest):
            return
        if line == "poweroff":
            self._end(uid, guest, DomainStateReason.DOMAIN_STATE_REASON_GUEST_SHUTDOWN)
        elif line == "crash":
            self._emit(EventKind.PANICKED, uid, reason="GUEST_PANICKED")
            self._end(uid, guest, DomainStateReason.DOMAIN_STATE_REASON_GUEST_CRASHED, _CRASHED)
        elif line == "die":
            self._end(uid, guest, DomainStateReason.DOMAIN_STATE_REASON_HYPERVISOR_DIED)
        elif line == "reboot":
            if self._guests.shape(guest).reboots:
                self._emit(EventKind.REBOOTED, uid, reason="GUEST_REBOOT")
            else:
                self._end(uid, guest, DomainStateReason.DOMAIN_STATE_REASON_GUEST_REBOOT_STOP)
        elif line == "watchdog":
            self._emit(EventKind.WATCHDOG, uid, reason="WATCHDOG_FIRED")
        elif line == "ioerror":
            self._io_error(uid, guest)

    def _io_error(self, uid: str, guest: Guest) -> None:
        disk = next(iter(self._guests.shape(guest).disks), "")
        changed = self._guests.change(uid, guest, _PAUSED, DomainStateReason.DOMAIN_STATE_REASON_IO_ERROR)
        self._emit(EventKind.IO_ERROR, uid, reason="ENOSPC", device_id=disk, cause="enospc", paused=True)
        self._told(uid, changed)

    # Guests.

    def _need(self, domain: DomainRef) -> Guest:
        guest = self._guests.get(domain.uid)
        if guest is None or not _active(guest):
            raise WrongState(f"{domain.name} has no guest", resource=domain.name, state="SHUT_OFF")
        return guest

    async def _button(self, domain: DomainRef, guest: Guest, timeout_seconds: float, what: str) -> None:
        """Wait as long as the guest takes to heed its power button."""
        shape = self._guests.shape(guest)
        if not shape.obeys_power_button or shape.power_button_seconds > timeout_seconds or guest.state == _PAUSED:
            await asyncio.sleep(timeout_seconds)
            raise GuestDidNotComply(
                f"the guest of {domain.name} did not {what} within {timeout_seconds:g} s",
                resource=domain.name,
                timeout_seconds=timeout_seconds,
            )
        await asyncio.sleep(shape.power_button_seconds)

    def _arm(self, uid: str, guest: Guest) -> None:
        """Set the clock of a guest that is to end by itself."""
        shape = self._guests.shape(guest)
        loop = asyncio.get_running_loop()
        if shape.crash_seconds is not None:
            self._timers[uid] = loop.call_later(shape.crash_seconds, self._obey, uid, "crash")
        elif shape.power_off_seconds is not None:
            self._timers[uid] = loop.call_later(shape.power_off_seconds, self._obey, uid, "poweroff")

    def _disarm(self, uid: str) -> None:
        timer = self._timers.pop(uid, None)
        if timer is not None:
            timer.cancel()

    def _end(self, uid: str, guest: Guest, reason: int, state: int = _SHUT_OFF) -> DomainObservation:
        self._disarm(uid)
        for port in self._ports.get(uid, {}).values():
            port.finish()
        return self._told(uid, self._guests.change(uid, guest, state, reason))

    def _observe(self, uid: str, guest: Guest | None) -> DomainObservation:
        if guest is None:
            return DomainObservation(uid, _SHUT_OFF, DomainStateReason.DOMAIN_STATE_REASON_UNSPECIFIED)
        return DomainObservation(
            uid=uid,
            state=DomainState.ValueType(guest.state),
            reason=DomainStateReason.ValueType(guest.reason),
            runtime_id=guest.runtime_id,
            start_time=datetime.fromtimestamp(guest.start_ns / 1e9, UTC),
        )

    def _told(self, uid: str, guest: Guest) -> DomainObservation:
        """Return the state of a guest and tell it as an event."""
        observation = self._observe(uid, guest)
        self._emit(EventKind.STATE_CHANGED, uid, observation=observation)
        return observation

    def _emit(
        self,
        kind: EventKind,
        uid: str,
        *,
        observation: DomainObservation | None = None,
        reason: str = "",
        device_id: str = "",
        cause: str = "",
        paused: bool = False,
    ) -> None:
        if self._events.qsize() >= EVENT_LIMIT:
            while not self._events.empty():
                self._events.get_nowait()
            kind, uid, observation = EventKind.GAP, "", None
        time_ = datetime.now(UTC)
        self._events.put_nowait(
            DriverEvent(kind, uid, time_, observation, reason, "", device_id=device_id, cause=cause, paused=paused)
        )


def _active(guest: Guest) -> bool:
    return guest.state not in (_SHUT_OFF, _CRASHED)


def _covers(prefix: str, path: str) -> bool:
    wanted, given = prefix.split("."), path.split(".")
    return len(given) >= len(wanted) and all(one in ("*", other) for one, other in zip(wanted, given, strict=False))

"""The drivers of this node: made, probed, held, and shown as resources; those that cannot run with the reason why.

What keeps a driver from running may pass: the launcher comes up beside this service, a hypervisor is being installed.
So a broken one is probed again from time to time, and at once when somebody wants to use it. A driver that runs is
probed again as well, more rarely: what it reports may change under it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from virtfleet.compute.v1 import capability_pb2
from virtfleet_compute.drivers import registry
from virtfleet_compute.drivers.api import DefinitionAuthority, Driver, DriverEnvironment, DriverReport
from virtfleet_compute.drivers.facets import FACETS
from virtfleet_compute.settings import ComputeSettings
from virtfleet_service.errors import CapabilityMissing, DriverBroken, FieldOutOfRange, VirtfleetError

_log = logging.getLogger(__name__)

PROBE_SECONDS = 15.0

AGAIN_SECONDS = 5.0
"""How long after a probe that failed the next one is made by itself."""

AT_ONCE_SECONDS = 1.0
"""How soon after it who wants to use the driver has it probed again, and how long he waits for that."""

REPORT_SECONDS = 60.0
"""How old the report of a driver that runs may become."""

_TICK_SECONDS = 1.0

Facet = TypeVar("Facet")

_AUTHORITIES: Mapping[DefinitionAuthority, capability_pb2.DefinitionAuthority.ValueType] = {
    DefinitionAuthority.SERVICE: capability_pb2.DEFINITION_AUTHORITY_SERVICE,
    DefinitionAuthority.HYPERVISOR: capability_pb2.DEFINITION_AUTHORITY_HYPERVISOR,
}


Joined = Callable[[Driver], Awaitable[None]]
"""Takes in a driver that runs now and did not when the service started, or has lost sight of its guests.

Raises VirtfleetError: It does not run after all.
"""


@dataclass(slots=True)
class _Entry:
    """Is one driver.

    Attributes:
        driver: It; None: it could not even be made, and never will.
        report: What its last probe that went well has found.
        error: Why it cannot be used; None: it can.
        entered: Whether it holds what it needs (`Driver.running`).
        probed: When it was last probed, by the loop's clock.
        probing: The probe that is under way.
    """

    driver: Driver | None
    report: DriverReport | None = None
    error: VirtfleetError | None = None
    entered: bool = False
    probed: float = 0.0
    probing: asyncio.Task[None] | None = None


class Hypervisors:
    """Holds the drivers that the settings enable."""

    def __init__(self, settings: ComputeSettings) -> None:
        self._settings = settings
        self._entries: dict[str, _Entry] = {}
        self._stack = AsyncExitStack()
        self._joined: Joined | None = None
        self.default_id = settings.enabled_drivers[0]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Hypervisors]:
        """Make, probe and enter all drivers at once. One that fails is listed as broken; the others run."""
        for driver_id in self._settings.enabled_drivers:
            made = registry.make(driver_id, self._environment(driver_id))
            if isinstance(made, registry.Missing):
                self._entries[driver_id] = _Entry(None, error=made.error)
            else:
                self._entries[driver_id] = _Entry(made)
        async with self._stack:
            await asyncio.gather(*(self._begin(driver_id, entry) for driver_id, entry in self._entries.items()))
            try:
                yield self
            finally:
                probes = [entry.probing for entry in self._entries.values() if entry.probing is not None]
                for probe in probes:
                    probe.cancel()
                await asyncio.gather(*probes, return_exceptions=True)

    async def _begin(self, driver_id: str, entry: _Entry) -> None:
        if entry.driver is None:
            return
        entry.error = await self._probe(driver_id, entry) or await self._enter(driver_id, entry)
        if entry.error is not None:
            _log.warning("driver %s cannot run: %s", driver_id, entry.error)

    # What passes.

    async def watch(self, joined: Joined) -> None:
        """Probe again what cannot run, and now and then what does. Runs until cancelled.

        Args:
            joined: Is called with a driver that has come to run; who asks for the driver gets it from then on.
        """
        self._joined = joined
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            now = asyncio.get_running_loop().time()
            for driver_id, entry in self._entries.items():
                rest_seconds = REPORT_SECONDS if entry.error is None else AGAIN_SECONDS
                if now - entry.probed >= rest_seconds:
                    self._probe_again(driver_id, entry)

    async def look_again(self, driver_id: str) -> None:
        """Give a driver that could not run another chance; for who is about to use it. Waits for that a moment only."""
        entry = self._entries.get(driver_id)
        if entry is None or entry.error is None or self._joined is None:
            return
        if entry.probing is None and asyncio.get_running_loop().time() - entry.probed < AT_ONCE_SECONDS:
            return
        probing = self._probe_again(driver_id, entry)
        if probing is not None:
            await asyncio.wait({probing}, timeout=AT_ONCE_SECONDS)

    @property
    def any_broken(self) -> bool:
        """Whether a driver cannot run."""
        return any(entry.error is not None for entry in self._entries.values())

    def lost(self, driver_id: str, error: VirtfleetError) -> None:
        """Take that a driver cannot say what runs: until it can, nobody knows, and nothing may be concluded."""
        entry = self._entries[driver_id]
        entry.error = error
        _log.warning("driver %s cannot be used for now: %s", driver_id, error)

    def _probe_again(self, driver_id: str, entry: _Entry) -> asyncio.Task[None] | None:
        if entry.driver is not None and entry.probing is None:
            entry.probing = asyncio.create_task(self._reprobe(driver_id, entry), name=f"probe {driver_id}")
        return entry.probing

    async def _reprobe(self, driver_id: str, entry: _Entry) -> None:
        try:
            broken = entry.error is not None
            error = await self._probe(driver_id, entry)
            if not broken:
                # A driver that runs is not given up for a probe that fails: each use of it tells for itself.
                return
            error = error or await self._enter(driver_id, entry) or await self._join(driver_id, entry)
            if error is not None:
                entry.error = error
                return
            _log.info("driver %s can run now", driver_id)
        finally:
            entry.probing = None

    async def _join(self, driver_id: str, entry: _Entry) -> VirtfleetError | None:
        """Have a driver taken in, which it can be used for."""
        assert entry.driver is not None and self._joined is not None  # noqa: S101, PT018  # asked by the caller
        entry.error = None
        try:
            await self._joined(entry.driver)
        except VirtfleetError as error:
            return error
        except Exception as error:  # noqa: BLE001  # the boundary to code that may be anybody's, as below
            _log.exception("driver %s cannot be taken in", driver_id)
            cause = f"{type(error).__name__}: {error}"
            return DriverBroken(f"driver {driver_id} cannot be taken in: {cause}", driver=driver_id, cause=cause)
        return None

    def _environment(self, driver_id: str) -> DriverEnvironment:
        settings = self._settings
        return DriverEnvironment(
            node=settings.node,
            state_directory=settings.state_dir / "compute" / driver_id,
            run_directory=settings.run_dir / "compute" / driver_id,
            launcher_socket=settings.launcher_path,
            settings=settings.drivers.get(driver_id, {}),
        )

    async def _probe(self, driver_id: str, entry: _Entry) -> VirtfleetError | None:
        """Probe a driver; returns why it cannot run."""
        assert entry.driver is not None  # noqa: S101  # asked by the caller
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                entry.report = await entry.driver.probe()
        except VirtfleetError as error:
            return error
        except TimeoutError:
            return DriverBroken(
                f"the probe of driver {driver_id} took more than {PROBE_SECONDS:g} s", driver=driver_id, cause="timeout"
            )
        except Exception as error:  # noqa: BLE001  # the boundary to code that may be anybody's; the other drivers run
            _log.exception("the probe of driver %s failed unexpectedly", driver_id)
            cause = f"{type(error).__name__}: {error}"
            return DriverBroken(f"driver {driver_id} cannot be probed: {cause}", driver=driver_id, cause=cause)
        finally:
            entry.probed = asyncio.get_running_loop().time()
        return None

    async def _enter(self, driver_id: str, entry: _Entry) -> VirtfleetError | None:
        """Have a driver hold what it needs; returns why it cannot."""
        assert entry.driver is not None  # noqa: S101  # asked by the caller
        if entry.entered:
            return None
        try:
            await self._stack.enter_async_context(entry.driver.running())
        except VirtfleetError as error:
            return error
        except Exception as error:  # noqa: BLE001  # as above
            _log.exception("driver %s cannot begin", driver_id)
            cause = f"{type(error).__name__}: {error}"
            return DriverBroken(f"driver {driver_id} cannot begin: {cause}", driver=driver_id, cause=cause)
        entry.entered = True
        return None

    def ready(self) -> Iterator[Driver]:
        """Yield the drivers that run."""
        for entry in self._entries.values():
            if entry.driver is not None and entry.error is None:
                yield entry.driver

    def get(self, driver_id: str) -> Driver:
        """Return a driver that runs.

        Raises:
            FieldOutOfRange: This node has no such driver.
            DriverBroken: It cannot run.
        """
        entry = self._entries.get(driver_id)
        if entry is None:
            raise FieldOutOfRange(
                f"this node has no driver {driver_id}; it has {', '.join(self._entries)}",
                field="domain.spec.driver",
                driver=driver_id,
            )
        if entry.error is not None or entry.driver is None:
            raise DriverBroken(f"driver {driver_id} cannot run: {entry.error}", driver=driver_id, cause=entry.error)
        return entry.driver

    def report(self, driver_id: str) -> DriverReport:
        """Return what a driver that runs has found out.

        Raises:
            FieldOutOfRange: This node has no such driver.
            DriverBroken: It cannot run.
        """
        self.get(driver_id)
        report = self._entries[driver_id].report
        assert report is not None  # noqa: S101  # a driver without a report has an error
        return report

    def reports(self) -> Iterator[tuple[str, DriverReport]]:
        """Yield the reports of the drivers that run."""
        for driver_id, entry in self._entries.items():
            if entry.report is not None and entry.error is None:
                yield driver_id, entry.report

    def facet(self, driver_id: str, kind: type[Facet]) -> Facet:
        """Return a facet of a driver.

        Raises:
            CapabilityMissing: The driver lacks it.
            DriverBroken: The driver cannot run.
        """
        found = self.get(driver_id).facet(kind)
        if found is None:
            capability, meaning = FACETS[kind]
            raise CapabilityMissing(
                f"driver {driver_id} lacks {capability} ({meaning})", driver=driver_id, capability=capability
            )
        return found

    def resources(self) -> Iterator[capability_pb2.Driver]:
        """Yield every driver as the API shows it, without its head."""
        for driver_id, entry in self._entries.items():
            resource = capability_pb2.Driver(
                name=f"nodes/{self._settings.node}/drivers/{driver_id}", display_name=driver_id
            )
            status = resource.status
            status.default = driver_id == self.default_id
            if entry.driver is not None:
                status.definition_authority = _AUTHORITIES[entry.driver.definition_authority]
            if entry.error is not None or entry.driver is None or entry.report is None:
                status.state = capability_pb2.DRIVER_STATE_BROKEN
                if entry.error is not None:
                    status.init_error.CopyFrom(entry.error.to_status())
            else:
                status.state = capability_pb2.DRIVER_STATE_READY
                status.version = entry.report.version
                status.machines.extend(entry.report.machines)
                status.archs.extend(entry.report.archs)
                capabilities = [FACETS[kind] for kind in FACETS if entry.driver.facet(kind) is not None]
                for id_, description in sorted([*capabilities, *entry.report.capabilities]):
                    status.capabilities.add(id=id_, description=description)
            yield resource

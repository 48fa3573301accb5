"""The drivers of this node: made, probed, held, and shown as resources; those that cannot run with the reason why."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Mapping
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

Facet = TypeVar("Facet")

_AUTHORITIES: Mapping[DefinitionAuthority, capability_pb2.DefinitionAuthority.ValueType] = {
    DefinitionAuthority.SERVICE: capability_pb2.DEFINITION_AUTHORITY_SERVICE,
    DefinitionAuthority.HYPERVISOR: capability_pb2.DEFINITION_AUTHORITY_HYPERVISOR,
}


@dataclass(slots=True)
class _Entry:
    driver: Driver | None
    report: DriverReport | None = None
    error: VirtfleetError | None = None


class Hypervisors:
    """Holds the drivers that the settings enable."""

    def __init__(self, settings: ComputeSettings) -> None:
        self._settings = settings
        self._entries: dict[str, _Entry] = {}
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
        await asyncio.gather(*(self._probe(driver_id, entry) for driver_id, entry in self._entries.items()))
        async with AsyncExitStack() as stack:
            for driver_id, entry in self._entries.items():
                if entry.driver is not None and entry.error is None:
                    await self._enter(stack, driver_id, entry)
            yield self

    def _environment(self, driver_id: str) -> DriverEnvironment:
        settings = self._settings
        return DriverEnvironment(
            node=settings.node,
            state_directory=settings.state_dir / "compute" / driver_id,
            run_directory=settings.run_dir / "compute" / driver_id,
            launcher_socket=settings.launcher_path,
            settings=settings.drivers.get(driver_id, {}),
        )

    async def _probe(self, driver_id: str, entry: _Entry) -> None:
        if entry.driver is None:
            return
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                entry.report = await entry.driver.probe()
        except VirtfleetError as error:
            entry.error = error
        except TimeoutError:
            entry.error = DriverBroken(
                f"the probe of driver {driver_id} took more than {PROBE_SECONDS:g} s", driver=driver_id, cause="timeout"
            )
        except Exception as error:  # noqa: BLE001  # the boundary to code that may be anybody's; the other drivers run
            _log.exception("the probe of driver %s failed unexpectedly", driver_id)
            cause = f"{type(error).__name__}: {error}"
            entry.error = DriverBroken(f"driver {driver_id} cannot be probed: {cause}", driver=driver_id, cause=cause)
        if entry.error is not None:
            _log.warning("driver %s cannot run: %s", driver_id, entry.error)

    async def _enter(self, stack: AsyncExitStack, driver_id: str, entry: _Entry) -> None:
        assert entry.driver is not None  # noqa: S101  # asked by the caller
        try:
            await stack.enter_async_context(entry.driver.running())
        except VirtfleetError as error:
            entry.error = error
        except Exception as error:  # noqa: BLE001  # as above
            _log.exception("driver %s cannot begin", driver_id)
            cause = f"{type(error).__name__}: {error}"
            entry.error = DriverBroken(f"driver {driver_id} cannot begin: {cause}", driver=driver_id, cause=cause)

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

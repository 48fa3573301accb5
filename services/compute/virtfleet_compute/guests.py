"""Begins and ends runs: admission, volumes, ports and driver in the right order, undone in reverse on failure."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from virtfleet.compute.v1 import domain_pb2, domain_spec_pb2
from virtfleet_compute import wiring
from virtfleet_compute.context import Context, ref
from virtfleet_compute.drivers.api import DomainObservation, DomainRef, Driver, StartPlan
from virtfleet_compute.drivers.facets import FACETS, GracefulStop
from virtfleet_compute.statuses import Run
from virtfleet_compute.wiring import Reservation
from virtfleet_service import failpoints, names
from virtfleet_service.errors import CapabilityMissing, GuestDidNotComply, HypervisorFailed, VirtfleetError

if TYPE_CHECKING:
    from virtfleet_service.call import Call

_log = logging.getLogger(__name__)


def _silent(_phase: str) -> None:
    return


class Guests:
    """Begins and ends the runs of domains. The caller holds the domain (`holds`) and records the result."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def start(
        self,
        domain: domain_pb2.Domain,
        call: Call | None,
        undo: AsyncExitStack,
        *,
        runtime_id: str,
        paused: bool,
        phase: Callable[[str], None] = _silent,
    ) -> Run:
        """Begin a run.

        Args:
            domain: The domain, with its resolved spec.
            call: On whose behalf.
            undo: Gets the way back; the caller empties it once the result is certain to be recorded.
            runtime_id: Identifies the run.
            paused: Whether the guest waits before its first instruction.
            phase: Is told what is being done.

        Raises:
            NodeMemoryShort: It does not fit.
            DriverBroken: The driver cannot run.
            HypervisorFailed: The guest did not start.
            VirtfleetError: What storage or network answered.
        """
        context, resolved = self._context, domain.status.resolved_spec
        driver, target = context.driver(domain), ref(domain)
        context.admission.admit(domain, counted=context.counted(domain))
        undo.callback(context.admission.release, domain.uid)
        run_as_uid = context.admission.user_for(domain.uid)
        undo.callback(context.admission.release, domain.uid, run_as_uid)
        phase("attaching volumes and ports")
        reservations = await self.ensure_ports(domain, resolved, call, undo)
        ports = {one.device_id: one.port for one in reservations}
        for device_id, card in resolved.interfaces.items():
            if card.WhichOneof("source") == "port":
                ports[device_id] = names.absolute(card.port, context.node)
        connections = await context.wiring.connect(target, resolved, ports, run_as_uid, call, undo)
        failpoints.reach("compute.start.connected")
        phase("starting the guest")
        plan = StartPlan(
            domain=target,
            runtime_id=runtime_id,
            spec=resolved,
            run_as_uid=run_as_uid,
            paused=paused,
            disks=connections.disks,
            kernel=connections.kernel,
            initrd=connections.initrd,
            interfaces=connections.interfaces,
        )
        undo.push_async_callback(self._kill, driver, target)
        observation = await driver.start(plan)
        failpoints.reach("compute.start.started")
        if not observation.active:
            raise HypervisorFailed(
                f"{domain.name} ended while it started: {observation.failure or 'no reason is known'}",
                resource=domain.name,
            )
        return Run(runtime_id, run_as_uid, connections, observation, reservations)

    async def ensure_ports(
        self,
        domain: domain_pb2.Domain,
        spec: domain_spec_pb2.DomainSpec,
        call: Call | None,
        undo: AsyncExitStack,
    ) -> list[Reservation]:
        """Make the ports that the cards of a spec own, as far as they are not there, and return all of them.

        Raises:
            VirtfleetError: What network answered.
            BackendUnreachable: It is away.
        """
        node = self._context.node
        addresses: dict[str, list[str]] = {}
        for address in domain.status.addresses:
            if address.source == domain_pb2.ADDRESS_SOURCE_PORT:
                addresses.setdefault(address.device_id, []).append(address.address)
        recorded = {card.device_id: card for card in domain.status.interfaces}
        kept: list[Reservation] = []
        missing: list[str] = []
        stale: list[str] = []
        for device_id in wiring.owned_ports(spec):
            card, there = spec.interfaces[device_id], recorded.get(device_id)
            network = names.absolute(card.network, node)
            if there is not None and there.port.startswith(f"{network}/ports/"):
                if there.mac_address == card.mac_address:
                    fixed = tuple(addresses.get(device_id, ()))
                    kept.append(Reservation(device_id, there.port, there.mac_address, fixed))
                    continue
                # The port is fixed to its MAC: another MAC is another port of the same name.
                stale.append(there.port)
            missing.append(device_id)
        if stale:
            await self._context.wiring.unreserve(ref(domain), stale)
        if missing:
            kept += await self._context.wiring.reserve(ref(domain), spec, missing, call, undo)
        return sorted(kept, key=lambda one: one.device_id)

    async def end(
        self,
        domain: domain_pb2.Domain,
        mode: domain_pb2.StopMode.ValueType,
        grace_seconds: float,
        *,
        before_force: Callable[[], None] | None = None,
    ) -> DomainObservation:
        """End a run. The guest's volumes and ports are still taken afterwards; `let_go` gives them back.

        Args:
            domain: The domain.
            mode: How.
            grace_seconds: How long the guest may take.
            before_force: Is called when there is no way back.

        Raises:
            GuestDidNotComply: GRACEFUL, and it runs on.
            CapabilityMissing: GRACEFUL, and the driver cannot ask.
        """
        driver, target = self._context.driver(domain), ref(domain)
        if mode != domain_pb2.STOP_MODE_FORCE:
            graceful = driver.facet(GracefulStop)  # type: ignore[type-abstract]  # a protocol names the facet
            if graceful is not None:
                try:
                    return await graceful.shut_down(target, timeout_seconds=grace_seconds)
                except GuestDidNotComply:
                    if mode == domain_pb2.STOP_MODE_GRACEFUL:
                        raise
            elif mode == domain_pb2.STOP_MODE_GRACEFUL:
                capability, meaning = FACETS[GracefulStop]
                raise CapabilityMissing(
                    f"driver {driver.driver_id} lacks {capability} ({meaning})",
                    driver=driver.driver_id,
                    capability=capability,
                )
        if before_force is not None:
            before_force()
        failpoints.reach("compute.stop.force")
        return await driver.stop(target)

    async def let_go(self, domain: domain_pb2.Domain) -> None:
        """Give back what a run had: memory, user, volumes, links. Never raises for peers that are away.

        Args:
            domain: The domain as it was while it ran.
        """
        context, status = self._context, domain.status
        context.admission.release(domain.uid, status.run_as_uid)
        spec = status.active_spec if status.HasField("active_spec") else status.resolved_spec
        uses = wiring.volume_uses(spec, context.node)
        ports = set(wiring.ports_of(domain, spec, context.node).values())
        ports |= {card.port for card in status.interfaces if card.host_device}
        await context.wiring.disconnect(ref(domain), uses, sorted(ports))

    @staticmethod
    async def _kill(driver: Driver, target: DomainRef) -> None:
        try:
            await driver.stop(target)
        except VirtfleetError as error:
            # The failure that led here is the one to tell; reconciliation finds the guest if it lives.
            _log.warning("the guest of %s could not be ended on the way back: %s", target.name, error)

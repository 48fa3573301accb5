"""How a domain's status is written: one place for each kind of news, all of them pure."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from virtfleet.compute.v1 import domain_pb2, domain_spec_pb2, watch_pb2
from virtfleet.type.v1 import resource_pb2
from virtfleet_compute import lifecycle
from virtfleet_compute.drivers.api import DomainObservation
from virtfleet_compute.wiring import Connections, Reservation
from virtfleet_service import masks, resources, views
from virtfleet_service.errors import HypervisorFailed, VirtfleetError

State = domain_pb2.DomainState
Reason = domain_pb2.DomainStateReason

OBSERVED = "observed"
"""The cause of a change that no call made."""

NEEDS_RESTART = "NEEDS_RESTART"
SCOPE_LIVE = "SCOPE_LIVE"


@dataclass(frozen=True, slots=True)
class Run:
    """Is a run that has begun."""

    runtime_id: str
    run_as_uid: int
    connections: Connections
    observation: DomainObservation
    reservations: Sequence[Reservation] = ()


def defined(
    domain: domain_pb2.Domain, resolved: domain_spec_pb2.DomainSpec, reservations: Iterable[Reservation] = ()
) -> None:
    """Write the status of a domain that has just been defined and does not run."""
    status = domain.status
    status.Clear()
    status.state = State.DOMAIN_STATE_SHUT_OFF
    status.state_reason = Reason.DOMAIN_STATE_REASON_DEFINED
    status.observed_generation = domain.generation
    status.resolved_spec.CopyFrom(resolved)
    status.control.state = domain_pb2.CONTROL_STATE_OK
    reserved(domain, reservations)


def reserved(domain: domain_pb2.Domain, reservations: Iterable[Reservation]) -> None:
    """Write the ports that a definition owns, with their fixed addresses."""
    status = domain.status
    host_devices = {card.device_id: card.host_device for card in status.interfaces}
    del status.interfaces[:]
    learned = [address for address in status.addresses if address.source != domain_pb2.ADDRESS_SOURCE_PORT]
    del status.addresses[:]
    for reservation in reservations:
        status.interfaces.add(
            device_id=reservation.device_id,
            port=reservation.port,
            mac_address=reservation.mac_address,
            host_device=host_devices.get(reservation.device_id, ""),
        )
        for address in reservation.addresses:
            status.addresses.add(
                address=address,
                mac_address=reservation.mac_address,
                device_id=reservation.device_id,
                source=domain_pb2.ADDRESS_SOURCE_PORT,
            )
    status.addresses.extend(learned)


def started(domain: domain_pb2.Domain, run: Run) -> None:
    """Write that a run has begun."""
    status = domain.status
    if run.reservations:
        reserved(domain, run.reservations)
    observed(domain, run.observation)
    status.runtime_id = run.runtime_id
    status.run_as_uid = run.run_as_uid
    active = run.observation.active_spec
    status.active_spec.CopyFrom(active if active is not None else status.resolved_spec)
    del status.pending_changes[:]
    status.ClearField("last_failure")
    if not status.HasField("start_time"):
        status.start_time.FromNanoseconds(time.time_ns())
    status.observed_generation = domain.generation
    connected(domain, run.connections)
    resources.clear_condition(status.conditions, "AutostartWaiting")


def connected(domain: domain_pb2.Domain, connections: Connections) -> None:
    """Write what a guest is joined to."""
    status = domain.status
    del status.disks[:]
    for device_id in sorted(connections.disks):
        disk = connections.disks[device_id]
        status.disks.add(
            device_id=device_id,
            attachment_id=disk.attachment_id,
            path=disk.path,
            format=disk.format,
            backing_chain=[link.path for link in disk.backing_chain],
            capacity_bytes=disk.capacity_bytes,
        )
    cards = {card.device_id: card for card in status.interfaces}
    for device_id, tap in connections.interfaces.items():
        card = cards[device_id] if device_id in cards else status.interfaces.add(device_id=device_id)
        card.port = tap.port
        card.host_device = tap.interface_name
        card.mac_address = tap.mac_address


def observed(domain: domain_pb2.Domain, observation: DomainObservation) -> bool:
    """Write what a driver sees. Returns whether anything is different from before."""
    status = domain.status
    before = domain_pb2.DomainStatus()
    before.CopyFrom(status)
    status.state = observation.state
    if observation.reason or not _is_known(before, observation):
        status.state_reason = observation.reason
    status.active = observation.active
    if observation.control_lost:
        _control(status, domain_pb2.CONTROL_STATE_LOST, "HYPERVISOR_SILENT")
    else:
        _in_hand(status)
    if observation.active:
        _observed_active(status, observation)
    else:
        _ended(status)
    if observation.failure:
        status.last_failure.CopyFrom(HypervisorFailed(observation.failure, resource=domain.name).to_status())
    return before != status


def _is_known(before: domain_pb2.DomainStatus, observation: DomainObservation) -> bool:
    return before.state == observation.state


def _observed_active(status: domain_pb2.DomainStatus, observation: DomainObservation) -> None:
    if observation.runtime_id:
        status.runtime_id = observation.runtime_id
    if observation.start_time is not None:
        status.start_time.FromDatetime(observation.start_time)
    if observation.pid:
        status.pid = observation.pid
    if observation.run_as_uid:
        status.run_as_uid = observation.run_as_uid
    if observation.active_spec is not None:
        status.active_spec.CopyFrom(observation.active_spec)
    elif not status.HasField("active_spec"):
        status.active_spec.CopyFrom(status.resolved_spec)
    errors = {error.device_id: error.error for error in observation.disk_errors}
    for disk in status.disks:
        disk.error = errors.get(disk.device_id, "")


def _ended(status: domain_pb2.DomainStatus) -> None:
    for name in ("runtime_id", "start_time", "active_spec", "pid", "run_as_uid"):
        status.ClearField(name)
    del status.pending_changes[:]
    del status.disks[:]
    learned = [one for one in status.addresses if one.source == domain_pb2.ADDRESS_SOURCE_PORT]
    del status.addresses[:]
    status.addresses.extend(learned)
    for card in status.interfaces:
        card.host_device = ""


def occupied(domain: domain_pb2.Domain, operation: str) -> None:
    """Write that an operation works on a domain."""
    del domain.status.operations[:]
    domain.status.operations.append(operation)
    if domain.status.control.state != domain_pb2.CONTROL_STATE_LOST:
        _in_hand(domain.status)


def free(domain: domain_pb2.Domain) -> bool:
    """Write that no operation works on a domain. Returns whether that was different before."""
    if not domain.status.operations:
        return False
    del domain.status.operations[:]
    if domain.status.control.state == domain_pb2.CONTROL_STATE_BUSY:
        _in_hand(domain.status)
    return True


def _in_hand(status: domain_pb2.DomainStatus) -> None:
    if status.operations:
        _control(status, domain_pb2.CONTROL_STATE_BUSY, status.operations[0])
    else:
        _control(status, domain_pb2.CONTROL_STATE_OK, "")


def _control(status: domain_pb2.DomainStatus, state: domain_pb2.ControlState.ValueType, reason: str) -> None:
    if status.control.state == state and status.control.reason == reason:
        return
    status.control.state = state
    status.control.reason = reason
    status.control.since_time.CopyFrom(resources.now())


def start_failed(domain: domain_pb2.Domain, error: VirtfleetError) -> None:
    """Write that a start has failed."""
    status = domain.status
    _ended(status)
    status.state = State.DOMAIN_STATE_SHUT_OFF
    status.state_reason = Reason.DOMAIN_STATE_REASON_START_FAILED
    status.active = False
    status.last_failure.CopyFrom(error.to_status())


def pending(domain: domain_pb2.Domain, reasons: dict[str, tuple[str, str]] | None = None) -> None:
    """Write the difference between what runs and what the next start will be.

    Args:
        domain: The domain.
        reasons: (stable reason, sentence) of paths that have just become pending.
    """
    status = domain.status
    known = {change.path: (change.reason, change.message) for change in status.pending_changes}
    known.update(reasons or {})
    del status.pending_changes[:]
    if not status.active:
        return
    for path in masks.diff(status.active_spec, status.resolved_spec, prefix="spec."):
        reason, message = _reason(known, path)
        status.pending_changes.add(path=path, reason=reason, message=message)


def _reason(known: dict[str, tuple[str, str]], path: str) -> tuple[str, str]:
    for other, reason in known.items():
        if path == other or path.startswith(other + ".") or other.startswith(path + "."):
            return reason
    return NEEDS_RESTART, "takes effect at the next start"


def state_event(domain: domain_pb2.Domain, old_state: int, message: str = "") -> watch_pb2.Event:
    """Make the event of a change of state."""
    status = domain.status
    event = watch_pb2.Event(
        resource=domain.name,
        uid=domain.uid,
        type=watch_pb2.EVENT_TYPE_DOMAIN_STATE_CHANGED,
        reason=Reason.Name(status.state_reason).removeprefix("DOMAIN_STATE_REASON_"),
        message=message or status.last_failure.message,
    )
    event.domain_state_changed.old_state = State.ValueType(old_state)
    event.domain_state_changed.new_state = status.state
    event.domain_state_changed.reason = status.state_reason
    return event


def transient(domain: domain_pb2.Domain) -> bool:
    """Tell whether a domain vanishes when it stops."""
    return domain.spec.lifetime == resource_pb2.LIFETIME_TRANSIENT


def is_active(domain: domain_pb2.Domain) -> bool:
    """Tell whether a domain has a guest."""
    return lifecycle.active(domain.status.state)


def basic(domain: domain_pb2.Domain) -> domain_pb2.Domain:
    """Return a domain as view BASIC shows it."""
    return views.apply_view(domain, views.BASIC)

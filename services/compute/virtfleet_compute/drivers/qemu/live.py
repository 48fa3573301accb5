"""What of a guest can change while it runs, and what holds from its first instruction on: the same commands."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from virtfleet.compute.v1 import device_pb2, domain_spec_pb2
from virtfleet_compute.drivers.api import DomainRef
from virtfleet_compute.drivers.facets import LivePlan
from virtfleet_compute.drivers.qemu import naming
from virtfleet_compute.drivers.qemu.guest import Guest
from virtfleet_compute.drivers.qemu.guests import Guests
from virtfleet_compute.drivers.qemu.records import Records
from virtfleet_service.errors import WrongState

_LIMITS: Mapping[str, str] = {
    "iops": "iops_max",
    "iops_rd": "read_iops_max",
    "iops_wr": "write_iops_max",
    "bps": "bytes_per_second_max",
    "bps_rd": "read_bytes_per_second_max",
    "bps_wr": "write_bytes_per_second_max",
}
_LIVE = (
    "spec.memory.current_bytes",
    "spec.on_exit",
    "spec.on_exit.*",
    "spec.disks.*.throttle",
    "spec.disks.*.throttle.*",
    "spec.interfaces.*.link_up",
)


async def settle_before_first_instruction(guests: Guests, guest: Guest) -> None:
    """Set what QEMU takes only over its monitor: limits of disks, pulled cables, the first size of the memory.

    Raises:
        HypervisorFailed: QEMU refused.
    """
    spec = guest.spec
    for device_id, disk in sorted(spec.disks.items()):
        if disk.HasField("throttle") and disk.throttle.ByteSize():
            await _throttle(guests, guest, device_id, disk)
    for device_id, interface in sorted(spec.interfaces.items()):
        if not interface.link_up:
            await _link(guests, guest, device_id, interface)
    if spec.balloons and spec.memory.current_bytes < spec.memory.maximum_bytes:
        await guests.ask(guest, "balloon", {"value": spec.memory.current_bytes})


async def _throttle(guests: Guests, guest: Guest, device_id: str, disk: device_pb2.Disk) -> None:
    if disk.WhichOneof("source") == "empty":
        # There is nothing to limit, and QEMU takes no limits for it.
        return
    # The limits sit on the guest's side of the disk, so they can come and go without a new chain of nodes.
    limits = {name: getattr(disk.throttle, field) for name, field in _LIMITS.items()}
    backend = naming.backend(device_id, virtio=disk.bus == device_pb2.DISK_BUS_VIRTIO)
    await guests.ask(guest, "block_set_io_throttle", {"id": backend, **limits})


async def _link(guests: Guests, guest: Guest, device_id: str, interface: device_pb2.Interface) -> None:
    await guests.ask(guest, "set_link", {"name": naming.interface(device_id), "up": interface.link_up})


class LiveChanges:
    """Is the driver's LiveUpdate."""

    def __init__(self, guests: Guests, records: Records) -> None:
        self._guests = guests
        self._records = records

    def plan_live_update(
        self, current: domain_spec_pb2.DomainSpec, wanted: domain_spec_pb2.DomainSpec, paths: Sequence[str]
    ) -> LivePlan:
        """Call live what QEMU changes in a running guest."""
        live: list[str] = []
        refused: list[tuple[str, str, str]] = []
        for path in paths:
            why = _obstacle(current, wanted, path)
            if why:
                refused.append((path, "NEEDS_RESTART", why))
            else:
                live.append(path)
        return LivePlan(tuple(live), tuple(refused))

    async def update_live(
        self,
        domain: DomainRef,
        current: domain_spec_pb2.DomainSpec,
        wanted: domain_spec_pb2.DomainSpec,
        paths: Sequence[str],
    ) -> None:
        """Change a guest; a change that fails takes back those before it."""
        guest = self._guests.active(domain.uid)
        if guest is None:
            raise WrongState(f"{domain.name} has no guest", resource=domain.name, state="SHUT_OFF")
        spec = domain_spec_pb2.DomainSpec()
        spec.CopyFrom(guest.spec)
        done: list[tuple[str, str]] = []
        try:
            for subject in dict.fromkeys(_subject(path) for path in paths):
                await self._change(guest, wanted, subject)
                done.append(subject)
                _copy(spec, wanted, subject)
            self._records.put_active(guest.uid, guest.runtime_id, spec)
        except BaseException:
            for subject in reversed(done):
                await self._change(guest, current, subject)
            raise
        guest.spec = spec

    async def _change(self, guest: Guest, wanted: domain_spec_pb2.DomainSpec, subject: tuple[str, str]) -> None:
        kind, device_id = subject
        if kind == "memory":
            await self._guests.ask(guest, "balloon", {"value": wanted.memory.current_bytes})
        elif kind == "disks":
            await _throttle(self._guests, guest, device_id, wanted.disks[device_id])
        elif kind == "interfaces":
            await _link(self._guests, guest, device_id, wanted.interfaces[device_id])
        elif kind == "on_exit":
            restart = wanted.on_exit.reboot in (
                domain_spec_pb2.EXIT_ACTION_UNSPECIFIED,
                domain_spec_pb2.EXIT_ACTION_RESTART,
            )
            await self._guests.ask(guest, "set-action", {"reboot": "reset" if restart else "shutdown"})


def _obstacle(current: domain_spec_pb2.DomainSpec, wanted: domain_spec_pb2.DomainSpec, path: str) -> str:
    """Say why a path cannot go live; empty: it can."""
    if not any(fnmatch.fnmatchcase(path, pattern) for pattern in _LIVE):
        return "takes effect at the next start"
    kind, device_id = _subject(path)
    if kind == "memory":
        if not current.balloons:
            return "the guest has no memory balloon"
        if wanted.memory.current_bytes > current.memory.maximum_bytes:
            return "the guest cannot have more than its maximum"
    if kind == "disks" and (device_id not in current.disks or device_id not in wanted.disks):
        return "the guest does not have this disk"
    if kind == "interfaces" and (device_id not in current.interfaces or device_id not in wanted.interfaces):
        return "the guest does not have this card"
    return ""


def _subject(path: str) -> tuple[str, str]:
    """Return what a path changes: the kind, and the device where there are several."""
    _, kind, *rest = path.split(".")
    return kind, rest[0] if kind in ("disks", "interfaces") and rest else ""


def _copy(spec: domain_spec_pb2.DomainSpec, wanted: domain_spec_pb2.DomainSpec, subject: tuple[str, str]) -> None:
    kind, device_id = subject
    if kind == "memory":
        spec.memory.current_bytes = wanted.memory.current_bytes
    elif kind == "disks":
        spec.disks[device_id].throttle.CopyFrom(wanted.disks[device_id].throttle)
    elif kind == "interfaces":
        spec.interfaces[device_id].link_up = wanted.interfaces[device_id].link_up
    elif kind == "on_exit":
        spec.on_exit.CopyFrom(wanted.on_exit)

"""What the test driver decides for a spec, once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from virtfleet.compute.v1 import device_pb2, domain_spec_pb2
from virtfleet_service.errors import CapabilityMissing, FieldConflict

ARCHS: Final = ("x86_64", "aarch64")

CAPABILITIES: Final = (
    ("disk.format.qcow2", "disks in qcow2 images"),
    ("disk.format.raw", "disks in raw images"),
    ("disk.throttle.live", "limits of disks change live"),
    ("interface.link.live", "cables are pulled live"),
    ("memory.balloon.live", "memory changes live within its maximum"),
    ("os.boot.firmware", "boots firmware"),
    ("os.boot.kernel", "boots a kernel"),
)


_Device = device_pb2.Disk | device_pb2.Interface


def machine(version: str) -> str:
    """Return the versioned machine type of a version of the driver."""
    return f"test-{version}"


def resolve(
    spec: domain_spec_pb2.DomainSpec, previous: domain_spec_pb2.DomainSpec | None, version: str
) -> domain_spec_pb2.DomainSpec:
    """Return the spec with everything decided; what was decided before stays."""
    resolved = domain_spec_pb2.DomainSpec()
    resolved.CopyFrom(spec)
    before = previous if previous is not None else domain_spec_pb2.DomainSpec()
    _os(resolved.os, before.os, version)
    _cpu(resolved.cpu, before.cpu)
    for disk in resolved.disks.values():
        disk.device = disk.device or device_pb2.DISK_DEVICE_DISK
        disk.bus = disk.bus or device_pb2.DISK_BUS_VIRTIO
        disk.cache = disk.cache or device_pb2.DISK_CACHE_WRITEBACK
    for interface in resolved.interfaces.values():
        interface.model = interface.model or device_pb2.INTERFACE_MODEL_VIRTIO
    _slots(
        [(f"disks.{key}", resolved.disks[key]) for key in sorted(resolved.disks)]
        + [(f"interfaces.{key}", resolved.interfaces[key]) for key in sorted(resolved.interfaces)],
        [(f"disks.{key}", disk) for key, disk in before.disks.items()]
        + [(f"interfaces.{key}", interface) for key, interface in before.interfaces.items()],
    )
    return resolved


def _os(resolved: domain_spec_pb2.OperatingSystem, before: domain_spec_pb2.OperatingSystem, version: str) -> None:
    resolved.type = resolved.type or domain_spec_pb2.OS_TYPE_HVM
    if not resolved.HasField("arch"):
        resolved.arch = before.arch or ARCHS[0]
    elif resolved.arch not in ARCHS:
        raise CapabilityMissing(
            f"the test driver runs {' and '.join(ARCHS)}, not {resolved.arch}",
            field="domain.spec.os.arch",
            capability=f"arch.{resolved.arch}",
        )
    if resolved.machine in ("", "test"):
        resolved.machine = before.machine or machine(version)
    elif not resolved.machine.startswith("test-"):
        raise CapabilityMissing(
            f"the test driver has no machine {resolved.machine}",
            field="domain.spec.os.machine",
            capability=f"machine.{resolved.machine}",
        )
    if resolved.WhichOneof("boot") is None:
        resolved.firmware.type = domain_spec_pb2.FIRMWARE_TYPE_BIOS


def _cpu(resolved: domain_spec_pb2.Cpu, before: domain_spec_pb2.Cpu) -> None:
    if resolved.mode == domain_spec_pb2.CPU_MODE_UNSPECIFIED:
        resolved.mode = domain_spec_pb2.CPU_MODE_CUSTOM
    if not resolved.HasField("model"):
        resolved.model = before.model or "test-cpu-v1"


def _slots(devices: Iterable[tuple[str, _Device]], before: Iterable[tuple[str, _Device]]) -> None:
    """Give every device a slot: the one that was asked for, else the one it had, else a free one."""
    devices = list(devices)
    had = {path: device.slot for path, device in before}
    taken: dict[int, str] = {}
    for path, device in devices:
        if device.HasField("slot"):
            if device.slot in taken:
                raise FieldConflict(
                    f"{taken[device.slot]} and {path} cannot both have slot {device.slot}",
                    field=f"domain.spec.{path}.slot",
                    slot=device.slot,
                )
            taken[device.slot] = path
    for path, device in devices:
        if not device.HasField("slot") and path in had and had[path] not in taken:
            device.slot = had[path]
            taken[device.slot] = path
    free = iter(range(1, 1024))
    for path, device in devices:
        if not device.HasField("slot"):
            device.slot = next(slot for slot in free if slot not in taken)
            taken[device.slot] = path

"""What the QEMU driver decides for a spec, once: machine, processor, buses, places, MACs.

The place of a disk on a bus other than virtio is its number at the controller, and stands in `slot` too. The
accelerator stays open: it is no part of what the guest sees, and the start takes the best that works then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from virtfleet.compute.v1 import device_pb2, domain_spec_pb2
from virtfleet_compute.drivers.qemu import machines
from virtfleet_compute.drivers.qemu.machines import Family
from virtfleet_compute.drivers.qemu.probe import Emulator
from virtfleet_service.errors import CapabilityMissing, FieldConflict, FieldOutOfRange, FieldRequired

ARCH = "x86_64"
"""The one architecture whose machines the driver can furnish."""

MIB = 1024 * 1024
DEFAULT_MEMORY_BYTES = 512 * MIB
DEFAULT_LOG_BYTES = 256 * 1024
BALLOON_DEVICE_ID = "balloon"
"""The id of the balloon that a guest gets when it is to start with less memory than it may have."""

CAPABILITIES = (
    ("cpu.feature", "single features of the processor"),
    ("cpu.model", "named models of processors"),
    ("device.balloon", "memory balloons"),
    ("device.console.virtio", "virtio consoles"),
    ("device.panic", "tells when the guest's kernel panics"),
    ("device.rng", "sources of random numbers"),
    ("device.watchdog", "watchdogs"),
    ("disk.bus.ide", "disks on IDE, on machines that have it"),
    ("disk.bus.sata", "disks on SATA"),
    ("disk.bus.scsi", "disks on SCSI"),
    ("disk.bus.virtio", "disks on virtio"),
    ("disk.format.qcow2", "disks in qcow2 images"),
    ("disk.format.raw", "disks in raw images"),
    ("disk.throttle", "limits of disks"),
    ("disk.throttle.live", "limits of disks change live"),
    ("interface.link.live", "cables are pulled live"),
    ("memory.balloon.live", "memory changes live within its maximum"),
    ("os.boot.firmware", "boots a BIOS, which looks at disks and network"),
    ("os.boot.kernel", "boots a kernel"),
)

_MARK_OF_DESCRIPTORS = "{fd:"
_THROTTLE_LIMIT = 10**15
_ACCELERATORS = ("kvm", "tcg")
_REQUIRE = domain_spec_pb2.CPU_FEATURE_POLICY_REQUIRE


@dataclass(frozen=True, slots=True)
class Host:
    """Is what decisions depend on beside the spec."""

    emulator: Emulator
    accelerator: str
    """The one that a guest gets that does not ask for one."""


class _Placed(Protocol):
    slot: int

    def HasField(self, field_name: str) -> bool: ...  # noqa: N802  # protobuf's name


_Item = TypeVar("_Item")


def resolve(
    uid: str, spec: domain_spec_pb2.DomainSpec, previous: domain_spec_pb2.DomainSpec | None, host: Host
) -> domain_spec_pb2.DomainSpec:
    """Return the spec with all that it leaves open filled in."""
    resolved = domain_spec_pb2.DomainSpec()
    resolved.CopyFrom(spec)
    before = previous if previous is not None else domain_spec_pb2.DomainSpec()
    on_exit = resolved.on_exit
    on_exit.power_off = on_exit.power_off or domain_spec_pb2.EXIT_ACTION_STOP
    on_exit.reboot = on_exit.reboot or domain_spec_pb2.EXIT_ACTION_RESTART
    on_exit.crash = on_exit.crash or domain_spec_pb2.EXIT_ACTION_STOP
    family = _os(resolved.os, before.os, host)
    _cpu(resolved.cpu, before.cpu, host, resolved)
    _memory(resolved)
    for device_id, disk in resolved.disks.items():
        _disk(f"domain.spec.disks.{device_id}", device_id, disk, family, host)
    for device_id, interface in resolved.interfaces.items():
        _interface(f"domain.spec.interfaces.{device_id}", uid, device_id, interface, family)
    _ports(resolved, before)
    _others(resolved)
    _places(resolved, before)
    return resolved


# Machine, processor, memory.


def _os(resolved: domain_spec_pb2.OperatingSystem, before: domain_spec_pb2.OperatingSystem, host: Host) -> Family:
    resolved.type = resolved.type or domain_spec_pb2.OS_TYPE_HVM
    if resolved.type != domain_spec_pb2.OS_TYPE_HVM:
        raise _lacks("os.type", "container", "os.type.container", "QEMU runs machines, not containers")
    if not resolved.HasField("arch"):
        resolved.arch = before.arch or ARCH
    if resolved.arch != ARCH:
        raise _lacks("os.arch", resolved.arch, f"arch.{resolved.arch}", f"this QEMU runs {ARCH}")
    family = _machine(resolved, before.machine, host)
    boot = resolved.WhichOneof("boot")
    if boot == "kernel":
        _kernel(resolved.kernel)
    else:
        resolved.firmware.type = resolved.firmware.type or domain_spec_pb2.FIRMWARE_TYPE_BIOS
        if resolved.firmware.type != domain_spec_pb2.FIRMWARE_TYPE_BIOS:
            raise _lacks("os.firmware.type", "UEFI", "os.firmware.uefi", "the driver boots BIOS only")
    return family


def _machine(resolved: domain_spec_pb2.OperatingSystem, before: str, host: Host) -> Family:
    wanted = resolved.machine
    for family in machines.FAMILIES:
        if wanted not in ("", family.alias):
            continue
        if before.startswith(family.prefix if wanted else tuple(each.prefix for each in machines.FAMILIES)):
            # What an alias or nothing at all once stood for it stands for ever.
            resolved.machine = before
        else:
            resolved.machine = host.emulator.aliases.get(family.alias, family.alias)
        break
    found = machines.family_of(resolved.machine)
    if found is None or (resolved.machine not in host.emulator.machines and resolved.machine != before):
        raise _lacks(
            "os.machine",
            wanted or resolved.machine,
            f"machine.{wanted or resolved.machine}",
            f"QEMU {host.emulator.version} has pc, q35 and their versions",
        )
    return found


def _kernel(kernel: domain_spec_pb2.KernelBoot) -> None:
    if not kernel.kernel_volume:
        raise FieldRequired(
            "a guest that boots a kernel needs the volume that holds it", field="domain.spec.os.kernel.kernel_volume"
        )
    line = kernel.command_line
    if "\0" in line or _MARK_OF_DESCRIPTORS in line:
        raise FieldOutOfRange(
            "the arguments of a kernel can hold neither a zero byte nor the mark of a descriptor",
            field="domain.spec.os.kernel.command_line",
        )


def _cpu(
    cpu: domain_spec_pb2.Cpu, before: domain_spec_pb2.Cpu, host: Host, resolved: domain_spec_pb2.DomainSpec
) -> None:
    if not cpu.HasField("vcpu_count"):
        cpu.vcpu_count = 1
    if not cpu.HasField("maximum_vcpu_count"):
        cpu.maximum_vcpu_count = cpu.vcpu_count
    if cpu.maximum_vcpu_count < cpu.vcpu_count:
        raise FieldConflict(
            f"{cpu.vcpu_count} processors are more than the maximum of {cpu.maximum_vcpu_count}",
            field="domain.spec.cpu.maximum_vcpu_count",
            vcpu_count=cpu.vcpu_count,
            maximum_vcpu_count=cpu.maximum_vcpu_count,
        )
    limit = host.emulator.machines.get(resolved.os.machine, cpu.maximum_vcpu_count)
    if cpu.maximum_vcpu_count > limit:
        raise FieldOutOfRange(
            f"machine {resolved.os.machine} takes at most {limit} processors",
            field="domain.spec.cpu.maximum_vcpu_count",
            limit=limit,
        )
    _topology(cpu)
    accelerator = resolved.qemu.accelerator or host.accelerator
    if accelerator not in _ACCELERATORS:
        # One that is there and does not run today may run tomorrow: that the start says.
        raise _lacks("qemu.accelerator", accelerator, f"accelerator.{accelerator}", "it drives guests by kvm or tcg")
    _model(cpu, before, host, accelerator)
    for number, feature in enumerate(cpu.features):
        feature.policy = feature.policy or _REQUIRE
        if feature.name not in host.emulator.cpu_features:
            raise _lacks(
                f"cpu.features[{number}].name",
                feature.name,
                f"cpu.feature.{feature.name}",
                f"QEMU {host.emulator.version} knows no such feature",
            )
    if cpu.mode == domain_spec_pb2.CPU_MODE_MAXIMUM and accelerator == "tcg":
        _expand(cpu, before, host.emulator)


def _expand(cpu: domain_spec_pb2.Cpu, before: domain_spec_pb2.Cpu, emulator: Emulator) -> None:
    """Write down what the largest processor has today: tomorrow's QEMU has a larger one."""
    has = set(emulator.maximum_features)
    if before.mode == cpu.mode and before.features:
        # What was left out then and no longer is comes back; what is new since does not.
        known = {feature.name for feature in before.features}
        required = {feature.name for feature in before.features if feature.policy == _REQUIRE}
        has = required | (known & has)
    wanted = {feature.name for feature in cpu.features}
    for number, feature in enumerate(cpu.features):
        if feature.policy == _REQUIRE and feature.name not in emulator.maximum_features | has:
            raise _lacks(
                f"cpu.features[{number}].name",
                feature.name,
                f"cpu.feature.{feature.name}",
                f"QEMU {emulator.version} cannot emulate it",
            )
    for name in sorted(has - wanted):
        cpu.features.add(name=name, policy=_REQUIRE)


def _topology(cpu: domain_spec_pb2.Cpu) -> None:
    topology = cpu.topology
    if not any(topology.HasField(name) for name in ("socket_count", "die_count", "core_count", "thread_count")):
        topology.socket_count = cpu.maximum_vcpu_count
    for name in ("socket_count", "die_count", "core_count", "thread_count"):
        if not topology.HasField(name):
            setattr(topology, name, 1)
    product = topology.socket_count * topology.die_count * topology.core_count * topology.thread_count
    if product != cpu.maximum_vcpu_count:
        raise FieldConflict(
            f"the arrangement has room for {product} processors, not for {cpu.maximum_vcpu_count}",
            field="domain.spec.cpu.topology",
            product=product,
            maximum_vcpu_count=cpu.maximum_vcpu_count,
        )


def _model(cpu: domain_spec_pb2.Cpu, before: domain_spec_pb2.Cpu, host: Host, accelerator: str) -> None:
    custom = domain_spec_pb2.CPU_MODE_CUSTOM
    if cpu.mode == domain_spec_pb2.CPU_MODE_UNSPECIFIED:
        if cpu.HasField("model"):
            cpu.mode = custom
        elif before.mode not in (domain_spec_pb2.CPU_MODE_UNSPECIFIED, custom):
            cpu.mode = before.mode
        else:
            cpu.mode = domain_spec_pb2.CPU_MODE_MAXIMUM
    if cpu.mode == domain_spec_pb2.CPU_MODE_HOST_MODEL:
        raise _lacks("cpu.mode", "HOST_MODEL", "cpu.mode.host_model", "use HOST_PASSTHROUGH, MAXIMUM or a model")
    if cpu.mode == domain_spec_pb2.CPU_MODE_HOST_PASSTHROUGH and accelerator != "kvm":
        raise _lacks("cpu.mode", "HOST_PASSTHROUGH", "accelerator.kvm", "only KVM can show the host's processor")
    if cpu.mode != custom:
        return
    if not cpu.model:
        raise FieldRequired("mode CUSTOM needs a model", field="domain.spec.cpu.model")
    versioned = host.emulator.cpu_models.get(cpu.model)
    if versioned is None or cpu.model in ("max", "host", "base"):
        raise _lacks(
            "cpu.model", cpu.model, f"cpu.model.{cpu.model}", f"QEMU {host.emulator.version} has no such model"
        )
    cpu.model = versioned


def _memory(resolved: domain_spec_pb2.DomainSpec) -> None:
    memory = resolved.memory
    if not memory.HasField("maximum_bytes"):
        memory.maximum_bytes = max(DEFAULT_MEMORY_BYTES, memory.current_bytes)
    if not memory.HasField("current_bytes"):
        memory.current_bytes = memory.maximum_bytes
    if memory.current_bytes > memory.maximum_bytes:
        raise FieldConflict(
            "a guest cannot have more memory than its maximum",
            field="domain.spec.memory.current_bytes",
            current_bytes=memory.current_bytes,
            maximum_bytes=memory.maximum_bytes,
        )
    if memory.current_bytes < memory.maximum_bytes and not resolved.balloons:
        resolved.balloons[BALLOON_DEVICE_ID].free_page_reporting = False


# Devices.


def _disk(path: str, device_id: str, disk: device_pb2.Disk, family: Family, host: Host) -> None:  # noqa: C901  # a list
    source = disk.WhichOneof("source")
    if source is None:
        raise FieldRequired("a disk needs a volume, a path or no medium", field=f"{path}.volume")
    disk.device = disk.device or device_pb2.DISK_DEVICE_DISK
    cdrom = disk.device == device_pb2.DISK_DEVICE_CDROM
    if source == "empty" and not cdrom:
        raise FieldConflict("only a CD-ROM drive can be without a medium", field=f"{path}.empty")
    if source == "host_path" and not disk.format:
        raise FieldRequired("nobody knows the format of a host path: name it", field=f"{path}.format")
    if not disk.bus:
        optical = device_pb2.DISK_BUS_IDE if family.has_ide else device_pb2.DISK_BUS_SATA
        disk.bus = optical if cdrom else device_pb2.DISK_BUS_VIRTIO
    _check_bus(path, disk.bus, family, cdrom=cdrom)
    _check_throttle(f"{path}.throttle", disk.throttle)
    disk.cache = disk.cache or device_pb2.DISK_CACHE_WRITEBACK
    disk.io = disk.io or device_pb2.DISK_IO_THREADS
    disk.discard = disk.discard or device_pb2.DISK_DISCARD_UNMAP
    direct = disk.cache in (device_pb2.DISK_CACHE_NONE, device_pb2.DISK_CACHE_DIRECTSYNC)
    if disk.io == device_pb2.DISK_IO_NATIVE and not direct:
        raise FieldConflict("native input and output needs cache NONE or DIRECTSYNC", field=f"{path}.io")
    if disk.io == device_pb2.DISK_IO_IO_URING and not host.emulator.has_io_uring:
        raise CapabilityMissing(
            "this QEMU was built without io_uring", field=f"{path}.io", capability="disk.io.io_uring"
        )
    if not disk.HasField("detect_zeroes"):
        disk.detect_zeroes = False
    if not disk.HasField("read_only"):
        disk.read_only = cdrom
    if not disk.HasField("shareable"):
        disk.shareable = False
    if cdrom and not disk.read_only:
        raise FieldConflict("a CD-ROM is read-only", field=f"{path}.read_only")
    if disk.read_only and not cdrom and disk.bus in (device_pb2.DISK_BUS_IDE, device_pb2.DISK_BUS_SATA):
        raise FieldConflict("hard disks on IDE and SATA cannot be read-only", field=f"{path}.read_only")
    if not disk.HasField("serial_number"):
        disk.serial_number = device_id[:20]


def _check_throttle(path: str, throttle: device_pb2.Throttle) -> None:
    for limit, value in throttle.ListFields():
        if value > _THROTTLE_LIMIT:
            raise FieldOutOfRange(
                f"QEMU limits a disk to {_THROTTLE_LIMIT} a second at most; unset is without limit",
                field=f"{path}.{limit.name}",
                limit=_THROTTLE_LIMIT,
            )


def _check_bus(path: str, bus: int, family: Family, *, cdrom: bool) -> None:
    name = device_pb2.DiskBus.Name(device_pb2.DiskBus.ValueType(bus)).removeprefix("DISK_BUS_")
    if cdrom and bus == device_pb2.DISK_BUS_VIRTIO:
        raise FieldConflict("there are no CD-ROM drives on virtio", field=f"{path}.bus", bus=name)
    if bus == device_pb2.DISK_BUS_USB:
        raise CapabilityMissing("the driver has no USB storage", field=f"{path}.bus", capability="disk.bus.usb")
    if bus == device_pb2.DISK_BUS_IDE and not family.has_ide:
        raise CapabilityMissing(
            f"machines of family {family.alias} have no IDE", field=f"{path}.bus", capability="disk.bus.ide"
        )


def _interface(path: str, uid: str, device_id: str, interface: device_pb2.Interface, family: Family) -> None:
    interface.model = interface.model or device_pb2.INTERFACE_MODEL_VIRTIO
    if interface.model == device_pb2.INTERFACE_MODEL_E1000E and family.root_bus != "pcie.0":
        raise FieldConflict(f"an 82574L needs PCI express, which {family.alias} does not have", field=f"{path}.model")
    if interface.HasField("mtu_bytes") and interface.model != device_pb2.INTERFACE_MODEL_VIRTIO:
        raise CapabilityMissing(
            "only a virtio card tells the guest its MTU", field=f"{path}.mtu_bytes", capability="interface.mtu"
        )
    if not interface.HasField("queue_count"):
        interface.queue_count = 1
    if interface.queue_count != 1:
        raise CapabilityMissing(
            "the driver's cards have one pair of queues",
            field=f"{path}.queue_count",
            capability="interface.queues",
        )
    if not interface.HasField("mac_address"):
        digest = hashlib.sha256(f"{uid}/{device_id}".encode()).digest()
        interface.mac_address = ":".join(f"{byte:02x}" for byte in b"\x52\x54\x00" + digest[:3])
    if not interface.HasField("link_up"):
        interface.link_up = True


def _ports(resolved: domain_spec_pb2.DomainSpec, before: domain_spec_pb2.DomainSpec) -> None:
    for console in resolved.consoles.values():
        console.target = console.target or device_pb2.CONSOLE_TARGET_VIRTIO
    ports: list[device_pb2.Serial | device_pb2.Console] = [*resolved.serials.values(), *resolved.consoles.values()]
    for port in ports:
        if not port.HasField("log_bytes"):
            port.log_bytes = DEFAULT_LOG_BYTES
    _number(
        [(f"serials.{key}", resolved.serials[key]) for key in sorted(resolved.serials)],
        {f"serials.{key}": port.port_number for key, port in before.serials.items()},
        "port_number",
        range(4),
    )
    _number(
        [(f"consoles.{key}", resolved.consoles[key]) for key in sorted(resolved.consoles)],
        {f"consoles.{key}": port.port_number for key, port in before.consoles.items()},
        "port_number",
        range(31),
    )


def _others(resolved: domain_spec_pb2.DomainSpec) -> None:
    for balloon in resolved.balloons.values():
        if not balloon.HasField("free_page_reporting"):
            balloon.free_page_reporting = False
    actions = set()
    for watchdog in resolved.watchdogs.values():
        watchdog.action = watchdog.action or device_pb2.WATCHDOG_ACTION_RESET
        actions.add(watchdog.action)
    if len(actions) > 1:
        raise FieldConflict("QEMU has one action for all watchdogs of a guest", field="domain.spec.watchdogs")
    if len(resolved.panics) > 1:
        raise CapabilityMissing(
            "a guest has at most one panic device", field="domain.spec.panics", capability="device.panic.many"
        )


# Places.


def _places(resolved: domain_spec_pb2.DomainSpec, before: domain_spec_pb2.DomainSpec) -> None:
    virtio = device_pb2.DISK_BUS_VIRTIO
    kinds = ("disks", "interfaces", "balloons", "rngs", "watchdogs")

    def devices(
        spec: domain_spec_pb2.DomainSpec, wanted: Callable[[str, object], bool]
    ) -> Iterable[tuple[str, _Placed]]:
        for kind in kinds:
            found: Mapping[str, _Placed] = getattr(spec, kind)
            for device_id in sorted(found):
                if wanted(kind, found[device_id]):
                    yield f"{kind}.{device_id}", found[device_id]

    def on_pci(_: str, device: object) -> bool:
        return not isinstance(device, device_pb2.Disk) or device.bus == virtio

    _number(
        list(devices(resolved, on_pci)),
        {path: device.slot for path, device in devices(before, on_pci) if device.HasField("slot")},
        "slot",
        machines.FREE_SLOTS,
    )
    for bus, units in (
        (device_pb2.DISK_BUS_IDE, machines.IDE_UNITS),
        (device_pb2.DISK_BUS_SATA, machines.SATA_PORTS),
        (device_pb2.DISK_BUS_SCSI, machines.SCSI_UNITS),
    ):

        def on_bus(_: str, device: object, bus: int = bus) -> bool:
            return isinstance(device, device_pb2.Disk) and device.bus == bus

        _number(
            list(devices(resolved, on_bus)),
            {path: device.slot for path, device in devices(before, on_bus) if device.HasField("slot")},
            "slot",
            range(units),
        )


def _number(items: list[tuple[str, _Item]], had: Mapping[str, int], field: str, free: range) -> None:
    """Give every item a number: the one that was asked for, else the one it had, else a free one."""
    taken: dict[int, str] = {}
    open_: list[tuple[str, _Item]] = []
    for path, item in items:
        if not item.HasField(field):  # type: ignore[attr-defined]  # all are messages
            open_.append((path, item))
            continue
        number = getattr(item, field)
        if number in taken:
            raise FieldConflict(
                f"{taken[number]} and {path} cannot both have {field} {number}",
                field=f"domain.spec.{path}.{field}",
                number=number,
            )
        if number not in free:
            raise FieldOutOfRange(
                f"{field} must be from {free.start} to {free.stop - 1}",
                field=f"domain.spec.{path}.{field}",
                number=number,
            )
        taken[number] = path
    late = []
    for path, item in open_:
        number = had.get(path)
        if number is None or number in taken or number not in free:
            late.append((path, item))
        else:
            setattr(item, field, number)
            taken[number] = path
    rest = (number for number in free if number not in taken)
    for path, item in late:
        number = next(rest, None)
        if number is None:
            raise FieldOutOfRange(
                f"there is room for {len(free)} such devices", field=f"domain.spec.{path}", limit=len(free)
            )
        setattr(item, field, number)


def _lacks(field: str, value: str, capability: str, why: str) -> CapabilityMissing:
    return CapabilityMissing(
        f"the QEMU driver does not offer {value}: {why}", field=f"domain.spec.{field}", capability=capability
    )

"""From a start plan to QEMU's arguments: pure, and the only place that knows QEMU's syntax.

What callers chose stands either in JSON (`-blockdev`, `-device`, `-object`), where nothing needs to be escaped, or as
an argument of its own that QEMU takes as it is (`-append`, `-kernel`). The forms with commas hold only names that this
driver made or checked. Formats and backing files are always given, so QEMU never looks at bytes that a guest wrote to
find out what they are.

Every guest is started with `-S` and let go over QMP: that costs one short round trip, and in return no guest has run an
instruction when its start fails, and limits that QEMU takes only over QMP are there from the first one on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from virtfleet.compute.v1 import device_pb2, domain_spec_pb2
from virtfleet_compute.drivers.api import FileConnection, StartPlan
from virtfleet_compute.drivers.qemu import machines, naming
from virtfleet_compute.drivers.qemu.machines import Family
from virtfleet_service.errors import CapabilityMissing, HypervisorFailed
from virtfleet_service.launcher_model import SpawnConsole, SpawnSocket, SpawnTap

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

ENVIRONMENT: Mapping[str, str] = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""QEMU's heap in large pages: half of the page faults of a start, an eighth of its processor time (docs/adr/0014)."""

_FIRST_DEFAULT_BOOT_ORDER = 1001
"""Disks without a place in the order come after all that have one."""

_CACHES: Mapping[int, tuple[bool, bool, bool]] = {
    # direct, no-flush, write-cache
    device_pb2.DISK_CACHE_NONE: (True, False, True),
    device_pb2.DISK_CACHE_WRITEBACK: (False, False, True),
    device_pb2.DISK_CACHE_WRITETHROUGH: (False, False, False),
    device_pb2.DISK_CACHE_DIRECTSYNC: (True, False, False),
    device_pb2.DISK_CACHE_UNSAFE: (False, True, True),
}
_IO: Mapping[int, str] = {
    device_pb2.DISK_IO_THREADS: "threads",
    device_pb2.DISK_IO_NATIVE: "native",
    device_pb2.DISK_IO_IO_URING: "io_uring",
}
_CARDS: Mapping[int, str] = {
    device_pb2.INTERFACE_MODEL_VIRTIO: "virtio-net-pci",
    device_pb2.INTERFACE_MODEL_E1000: "e1000",
    device_pb2.INTERFACE_MODEL_E1000E: "e1000e",
    device_pb2.INTERFACE_MODEL_RTL8139: "rtl8139",
}
_WATCHDOG_ACTIONS: Mapping[int, str] = {
    device_pb2.WATCHDOG_ACTION_RESET: "reset",
    # The driver ends a guest whose watchdog has paused it; QEMU's own power-off would end without a word.
    device_pb2.WATCHDOG_ACTION_POWER_OFF: "pause",
    device_pb2.WATCHDOG_ACTION_PAUSE: "pause",
    device_pb2.WATCHDOG_ACTION_NONE: "none",
}

_MAXIMUM_EXPANDED = (
    "base,vendor=AuthenticAMD,family=15,model=107,stepping=1,model-id=QEMU TCG CPU version 2.5+,"
    "min-level=13,min-xlevel=2147483658"
)
"""What `max` is under emulation before its features, which stand in the resolved spec."""

_WITH_UNDERSCORE = frozenset({"host_mtu", "max_ports"})
"""Properties that QEMU itself names with an underscore."""


@dataclass(frozen=True, slots=True)
class Invocation:
    """Is what the launcher is asked to start."""

    argv: tuple[str, ...]
    sockets: tuple[SpawnSocket, ...]
    taps: tuple[SpawnTap, ...]
    consoles: tuple[SpawnConsole, ...]


def build(plan: StartPlan, binary: str, accelerator: str, *, sandbox: bool) -> Invocation:
    """Return the call of QEMU for a start plan.

    Args:
        plan: The plan; its spec is resolved.
        binary: The QEMU.
        accelerator: `kvm` or `tcg`.
        sandbox: Whether the binary has the seccomp filter.

    Raises:
        CapabilityMissing: The spec demands the filter and the binary lacks it.
        HypervisorFailed: The plan lacks what the spec needs.
    """
    spec = plan.spec
    family = machines.family_of(spec.os.machine)
    if family is None:
        raise HypervisorFailed(f"no machine {spec.os.machine!r} is known", machine=spec.os.machine)
    consoles = [*sorted(spec.serials), *sorted(spec.consoles)]
    logs = {**{key: port.log_bytes for key, port in spec.serials.items()}}
    logs.update({key: port.log_bytes for key, port in spec.consoles.items()})
    argv = [
        binary,
        *_machine(plan, family, accelerator),
        *_sandbox(spec, has_sandbox=sandbox),
        *_monitor(),
        *_boot(plan),
        *_disks(plan, family),
        *_interfaces(plan, family),
        *_serials(spec, family),
        *_others(spec, family),
    ]
    return Invocation(
        argv=tuple(argv),
        sockets=(SpawnSocket(naming.MONITOR_SOCKET), *(SpawnSocket(naming.console(key)) for key in consoles)),
        taps=tuple(SpawnTap(naming.tap(key), tap.interface_name) for key, tap in sorted(plan.interfaces.items())),
        consoles=tuple(SpawnConsole(naming.console(key), logs[key] or None) for key in consoles),
    )


def _json(value: Mapping[str, object]) -> str:
    # The launcher puts descriptors in the place of their marks; what a caller chose must not become one.
    return json.dumps(value, separators=(",", ":")).replace("{fd:", "\\u007bfd:")


def _device(driver: str, **properties: object) -> tuple[str, str]:
    """Return a device; an underscore in the name of a property stands for a hyphen, None for one that is left out."""
    given = {
        name if name in _WITH_UNDERSCORE else name.replace("_", "-"): value
        for name, value in properties.items()
        if value is not None
    }
    return "-device", _json({"driver": driver, **given})


def _address(slot: int) -> str:
    return f"{slot:#04x}"


# The machine.


def _machine(plan: StartPlan, family: Family, accelerator: str) -> Iterator[str]:
    spec = plan.spec
    yield from ("-name", f"guest={plan.domain.domain_id.replace(',', ',,')}", "-uuid", plan.domain.uid)
    yield from ("-nodefaults", "-no-user-config", "-display", "none", "-S")
    yield from ("-machine", f"{spec.os.machine},{family.options}")
    yield from ("-accel", accelerator)
    yield from ("-cpu", _cpu(spec.cpu))
    cpu = spec.cpu
    places = cpu.topology
    yield "-smp"
    yield (
        f"cpus={cpu.vcpu_count},maxcpus={cpu.maximum_vcpu_count},sockets={places.socket_count},"
        f"dies={places.die_count},cores={places.core_count},threads={places.thread_count}"
    )
    yield from ("-m", f"size={-(-spec.memory.maximum_bytes // 1024)}k")
    yield from ("-action", _actions(spec))


def _cpu(cpu: domain_spec_pb2.Cpu) -> str:
    if cpu.mode == domain_spec_pb2.CPU_MODE_MAXIMUM and cpu.features:
        model = _MAXIMUM_EXPANDED
    elif cpu.mode == domain_spec_pb2.CPU_MODE_CUSTOM:
        model = cpu.model
    else:
        model = "host" if cpu.mode == domain_spec_pb2.CPU_MODE_HOST_PASSTHROUGH else "max"
    words = [model]
    for feature in cpu.features:
        without = feature.policy == domain_spec_pb2.CPU_FEATURE_POLICY_DISABLE
        words.append(f"{feature.name}={'off' if without else 'on'}")
    if cpu.mode == domain_spec_pb2.CPU_MODE_CUSTOM and "=on" in "".join(words):
        # Without it QEMU drops what it cannot give, with a warning that nobody reads.
        words.append("enforce=on")
    return ",".join(words)


def _actions(spec: domain_spec_pb2.DomainSpec) -> str:
    """Say what QEMU does when the guest ends: it never goes by itself, so the next service finds out why.

    Only a reboot that is to go on is left to QEMU.
    """
    reboot = "reset" if spec.on_exit.reboot == domain_spec_pb2.EXIT_ACTION_RESTART else "shutdown"
    watchdog = next((_WATCHDOG_ACTIONS[item.action] for item in spec.watchdogs.values()), "reset")
    return f"reboot={reboot},shutdown=pause,panic=pause,watchdog={watchdog}"


def _sandbox(spec: domain_spec_pb2.DomainSpec, *, has_sandbox: bool) -> Iterator[str]:
    wanted = spec.qemu.sandbox
    if wanted == domain_spec_pb2.QEMU_SANDBOX_ON and not has_sandbox:
        raise CapabilityMissing(
            "this QEMU was built without seccomp", field="domain.spec.qemu.sandbox", capability="isolation.seccomp"
        )
    if has_sandbox and wanted != domain_spec_pb2.QEMU_SANDBOX_OFF:
        yield from ("-sandbox", SANDBOX)


def _monitor() -> Iterator[str]:
    name = naming.MONITOR_SOCKET
    yield from ("-chardev", f"socket,id={name},fd={{fd:{name}}},server=on,wait=off")
    yield from ("-mon", f"chardev={name},mode=control")


def _boot(plan: StartPlan) -> Iterator[str]:
    if plan.spec.os.WhichOneof("boot") != "kernel":
        return
    if plan.kernel is None:
        raise HypervisorFailed("the kernel of the guest is not attached")
    words = ["-kernel", plan.kernel.path, "-append", plan.spec.os.kernel.command_line]
    if plan.initrd is not None:
        words += ["-initrd", plan.initrd.path]
    for word in words:
        if "{fd:" in word or "\0" in word:
            raise HypervisorFailed(f"{word!r} cannot be given to QEMU", argument=word)
    yield from words


# Disks.


def _disks(plan: StartPlan, family: Family) -> Iterator[str]:
    spec = plan.spec
    buses = {disk.bus for disk in spec.disks.values()}
    root = family.root_bus
    if device_pb2.DISK_BUS_SCSI in buses:
        yield from _device("virtio-scsi-pci", id="scsi", bus=root, addr=_address(machines.SCSI_SLOT))
    if device_pb2.DISK_BUS_SATA in buses and not family.own_sata:
        yield from _device("ich9-ahci", id="sata", bus=root, addr=_address(machines.SATA_SLOT))
    for number, (device_id, disk) in enumerate(sorted(spec.disks.items(), key=lambda item: (item[1].slot, item[0]))):
        connection = plan.disks.get(device_id)
        if connection is None and disk.WhichOneof("source") != "empty":
            raise HypervisorFailed(f"disk {device_id} is not attached", device_id=device_id)
        if connection is not None:
            yield from _nodes(device_id, disk, connection)
        order = disk.boot_order or _FIRST_DEFAULT_BOOT_ORDER + number
        yield from _disk(device_id, disk, family, order, has_medium=connection is not None)


def _nodes(device_id: str, disk: device_pb2.Disk, connection: FileConnection) -> Iterator[str]:
    """Yield the block nodes of an image and all that is behind it, the last first."""
    chain = [(connection.path, connection.format), *((file.path, file.format) for file in connection.backing_chain)]
    direct, no_flush, _ = _CACHES[disk.cache]
    cache = {"direct": direct, "no-flush": no_flush}
    discard = "unmap" if disk.discard == device_pb2.DISK_DISCARD_UNMAP else "ignore"
    for depth in range(len(chain) - 1, -1, -1):
        path, format_ = chain[depth]
        read_only = depth > 0 or disk.read_only
        common: dict[str, object] = {"read-only": read_only, "cache": cache}
        if depth == 0:
            common["discard"] = discard
        yield "-blockdev"
        yield _json(
            {
                "driver": "file",
                "node-name": naming.file_node(device_id, depth),
                "filename": path,
                "aio": _IO[disk.io],
                **common,
            }
        )
        top: dict[str, object] = {
            "driver": format_,
            "node-name": naming.format_node(device_id, depth),
            "file": naming.file_node(device_id, depth),
            **common,
        }
        if depth == 0 and disk.detect_zeroes:
            top["detect-zeroes"] = "unmap" if discard == "unmap" else "on"
        if format_ != "raw":
            # null: there is no backing file, whatever the image says.
            top["backing"] = naming.format_node(device_id, depth + 1) if depth + 1 < len(chain) else None
        yield from ("-blockdev", _json(top))


def _disk(
    device_id: str, disk: device_pb2.Disk, family: Family, boot_order: int, *, has_medium: bool
) -> tuple[str, str]:
    cdrom = disk.device == device_pb2.DISK_DEVICE_CDROM
    write_cache = None
    if not cdrom:
        write_cache = "on" if _CACHES[disk.cache][2] else "off"
    common: dict[str, object | None] = {
        "id": naming.disk(device_id),
        "drive": naming.format_node(device_id) if has_medium else None,
        "bootindex": boot_order,
        "serial": disk.serial_number or None,
        "write_cache": write_cache,
        "share_rw": True if disk.shareable else None,
    }
    if disk.bus == device_pb2.DISK_BUS_VIRTIO:
        return _device("virtio-blk-pci", bus=family.root_bus, addr=_address(disk.slot), **common)
    if disk.bus == device_pb2.DISK_BUS_SCSI:
        return _device("scsi-cd" if cdrom else "scsi-hd", bus="scsi.0", scsi_id=disk.slot, lun=0, **common)
    place: dict[str, object] = {"bus": f"ide.{disk.slot}" if family.own_sata else f"sata.{disk.slot}", "unit": 0}
    if disk.bus == device_pb2.DISK_BUS_IDE:
        place = {"bus": f"ide.{disk.slot // 2}", "unit": disk.slot % 2}
    return _device("ide-cd" if cdrom else "ide-hd", **place, **common)


# Everything else.


def _interfaces(plan: StartPlan, family: Family) -> Iterator[str]:
    for device_id, interface in sorted(plan.spec.interfaces.items()):
        tap = plan.interfaces.get(device_id)
        backend = None
        if tap is not None:
            backend = f"tap.{naming.short(device_id)}"
            yield from ("-netdev", f"tap,id={backend},fd={{fd:{naming.tap(device_id)}}}")
        virtio = interface.model == device_pb2.INTERFACE_MODEL_VIRTIO
        mtu = interface.mtu_bytes or (tap.mtu_bytes if tap is not None else 0)
        yield from _device(
            _CARDS[interface.model],
            id=naming.interface(device_id),
            bus=family.root_bus,
            addr=_address(interface.slot),
            mac=interface.mac_address,
            netdev=backend,
            host_mtu=mtu if virtio and mtu else None,
            bootindex=interface.boot_order or None,
            # The ROM is there to boot from the network, costs a read and is more code to trust.
            romfile=None if interface.boot_order else "",
        )


def _serials(spec: domain_spec_pb2.DomainSpec, family: Family) -> Iterator[str]:
    for device_id, port in sorted(spec.serials.items()):
        name = naming.console(device_id)
        yield from ("-chardev", f"socket,id={name},fd={{fd:{name}}},server=on,wait=off")
        yield from _device("isa-serial", id=f"serial.{device_id}", chardev=name, index=port.port_number)
    if spec.consoles:
        yield from _device(
            "virtio-serial-pci", id="consoles", bus=family.root_bus, addr=_address(machines.SERIAL_SLOT), max_ports=31
        )
    for device_id, console in sorted(spec.consoles.items(), key=lambda item: item[1].port_number):
        name = naming.console(device_id)
        yield from ("-chardev", f"socket,id={name},fd={{fd:{name}}},server=on,wait=off")
        yield from _device(
            "virtconsole", id=f"console.{device_id}", bus="consoles.0", chardev=name, nr=console.port_number
        )


def _others(spec: domain_spec_pb2.DomainSpec, family: Family) -> Iterator[str]:
    root = family.root_bus
    for device_id, rng in sorted(spec.rngs.items()):
        source = f"source.{device_id}"
        # Out of QEMU's own generator: no file of the host is opened.
        yield from ("-object", _json({"qom-type": "rng-builtin", "id": source}))
        limit = rng.bytes_per_second_max or None
        yield from _device(
            "virtio-rng-pci",
            id=f"rng.{device_id}",
            bus=root,
            addr=_address(rng.slot),
            rng=source,
            max_bytes=limit,
            period=1000 if limit else None,
        )
    for device_id, balloon in sorted(spec.balloons.items()):
        yield from _device(
            "virtio-balloon-pci",
            id=naming.balloon(device_id),
            bus=root,
            addr=_address(balloon.slot),
            free_page_reporting=True if balloon.free_page_reporting else None,
        )
    for device_id, watchdog in sorted(spec.watchdogs.items()):
        yield from _device("i6300esb", id=f"watchdog.{device_id}", bus=root, addr=_address(watchdog.slot))
    for device_id in sorted(spec.panics):
        yield from _device("pvpanic", id=f"panic.{device_id}")

"""What a spec means before any driver sees it: references, defaults, and what holds for every hypervisor."""

from __future__ import annotations

import hashlib
import itertools
import secrets
from collections.abc import Callable, Iterator

from virtfleet.compute.v1 import device_pb2, domain_spec_pb2
from virtfleet.type.v1 import resource_pb2
from virtfleet_service import names
from virtfleet_service.errors import CapabilityMissing, FieldConflict, FieldRequired

DEFAULT_MEMORY_BYTES = 512 * 1024 * 1024
DEFAULT_LOG_BYTES = 256 * 1024
MAC_PREFIX = "52:54:00"

DomainSpec = domain_spec_pb2.DomainSpec

SERVICE_FIELDS = frozenset(
    {"spec.title", "spec.description", "spec.autostart", "spec.deletion_protection", "spec.lifetime"}
)
"""What the service itself heeds: always live."""

_OPTIONS_DRIVER = {"qemu": "qemu", "test": "test"}


_MAC_BITS = 24
_draws = itertools.count(secrets.randbits(_MAC_BITS), secrets.randbits(_MAC_BITS) | 1)


def new_mac() -> str:
    """Return a MAC of the range that QEMU's guests have.

    They begin at random, and none comes twice before all sixteen million came: of a thousand that were each drawn at
    random two would be alike in one of thirty cases.
    """
    drawn = (next(_draws) % (1 << _MAC_BITS)).to_bytes(3, "big")
    return MAC_PREFIX + "".join(f":{byte:02x}" for byte in drawn)


def normalize(spec: DomainSpec, node: str) -> None:
    """Write every reference node-relative, in place.

    Raises:
        ReferenceOtherNode: One names another node.
    """
    for key, disk in spec.disks.items():
        if disk.WhichOneof("source") == "volume":
            disk.volume = names.relative(disk.volume, node, field=f"domain.spec.disks.{key}.volume")
    for key, interface in spec.interfaces.items():
        source = interface.WhichOneof("source")
        if source is not None:
            path = f"domain.spec.interfaces.{key}.{source}"
            setattr(interface, source, names.relative(getattr(interface, source), node, field=path))
    if spec.os.WhichOneof("boot") == "kernel":
        kernel = spec.os.kernel
        for name in ("kernel_volume", "initrd_volume"):
            if kernel.HasField(name):
                path = f"domain.spec.os.kernel.{name}"
                setattr(kernel, name, names.relative(getattr(kernel, name), node, field=path))


def check(spec: DomainSpec) -> None:
    """Hold a spec against what no hypervisor could meet.

    Raises:
        FieldRequired: Something is missing.
        FieldConflict: Two fields exclude each other.
        CapabilityMissing: Nobody can give it yet.
    """
    _check_sizes(spec)
    _check_disks(spec)
    _check_interfaces(spec)
    _check_consoles(spec)
    if spec.lifetime == resource_pb2.LIFETIME_TRANSIENT and spec.autostart > resource_pb2.AUTOSTART_NEVER:
        raise FieldConflict("a transient domain has no autostart", field="domain.spec.autostart")
    if spec.os.WhichOneof("boot") == "kernel" and not spec.os.kernel.HasField("kernel_volume"):
        raise FieldRequired("a kernel boot needs a kernel volume", field="domain.spec.os.kernel.kernel_volume")
    options = spec.WhichOneof("driver_options")
    if options is not None and spec.driver and _OPTIONS_DRIVER[options] != spec.driver:
        raise FieldConflict(
            f"options of driver {options} are given to a domain of driver {spec.driver}",
            field=f"domain.spec.{options}",
            driver=spec.driver,
        )


def _check_sizes(spec: DomainSpec) -> None:
    memory, cpu = spec.memory, spec.cpu
    if memory.HasField("maximum_bytes") and memory.current_bytes > memory.maximum_bytes:
        raise FieldConflict(
            "the current memory is more than the maximum",
            field="domain.spec.memory.current_bytes",
            current_bytes=memory.current_bytes,
            maximum_bytes=memory.maximum_bytes,
        )
    vcpus = cpu.vcpu_count or 1
    maximum = cpu.maximum_vcpu_count or vcpus
    if vcpus > maximum:
        raise FieldConflict(
            "there are more processors than the maximum",
            field="domain.spec.cpu.vcpu_count",
            vcpu_count=vcpus,
            maximum_vcpu_count=maximum,
        )
    if cpu.HasField("topology"):
        topology = cpu.topology
        product = 1
        for count in (topology.socket_count, topology.die_count, topology.core_count, topology.thread_count):
            product *= count or 1
        if product != maximum:
            raise FieldConflict(
                f"the topology has {product} processors, the domain {maximum}",
                field="domain.spec.cpu.topology",
                product=product,
                maximum_vcpu_count=maximum,
            )
    if cpu.mode == domain_spec_pb2.CPU_MODE_CUSTOM and not cpu.HasField("model"):
        raise FieldRequired("the mode CUSTOM needs a model", field="domain.spec.cpu.model")
    if cpu.HasField("model") and cpu.mode not in (
        domain_spec_pb2.CPU_MODE_UNSPECIFIED,
        domain_spec_pb2.CPU_MODE_CUSTOM,
    ):
        mode = domain_spec_pb2.CpuMode.Name(cpu.mode).removeprefix("CPU_MODE_")
        raise FieldConflict(
            f"a model is of the mode CUSTOM alone, not of {mode}", field="domain.spec.cpu.model", mode=mode
        )


def _check_disks(spec: DomainSpec) -> None:
    orders: dict[int, str] = {}
    for key in sorted(spec.disks):
        disk = spec.disks[key]
        path = f"domain.spec.disks.{key}"
        source = disk.WhichOneof("source")
        if source is None:
            raise FieldRequired("a disk needs a source", field=f"{path}.volume")
        if source == "empty" and disk.device != device_pb2.DISK_DEVICE_CDROM:
            raise FieldConflict("only a CD-ROM drive may be empty", field=f"{path}.empty")
        if source == "host_path" and not disk.format:
            raise FieldRequired("a host path needs a format: virtfleet does not guess it", field=f"{path}.format")
        _check_throttle(disk.throttle, f"{path}.throttle")
        _take_order(orders, disk, f"disks.{key}")
    for key in sorted(spec.interfaces):
        _take_order(orders, spec.interfaces[key], f"interfaces.{key}")


def _check_throttle(throttle: device_pb2.Throttle, path: str) -> None:
    for name in ("iops_max", "bytes_per_second_max"):
        if getattr(throttle, name) and (getattr(throttle, f"read_{name}") or getattr(throttle, f"write_{name}")):
            # No hypervisor has both, and which of them would hold cannot be told.
            raise FieldConflict(
                "reads and writes are limited together or each on its own, not both ways", field=f"{path}.{name}"
            )


def _check_interfaces(spec: DomainSpec) -> None:
    for key in sorted(spec.interfaces):
        if spec.interfaces[key].HasField("bandwidth"):
            # Whatever the card is joined to: a limit that nobody heeds is worse than none.
            raise CapabilityMissing(
                "no back end of networks limits the bandwidth of a card",
                field=f"domain.spec.interfaces.{key}.bandwidth",
                capability="port.bandwidth",
            )


def _take_order(orders: dict[int, str], device: device_pb2.Disk | device_pb2.Interface, path: str) -> None:
    if not device.HasField("boot_order"):
        return
    other = orders.setdefault(device.boot_order, path)
    if other != path:
        raise FieldConflict(
            f"{other} and {path} have the same boot order {device.boot_order}",
            field=f"domain.spec.{path}.boot_order",
            boot_order=device.boot_order,
        )


def _check_consoles(spec: DomainSpec) -> None:
    both = set(spec.serials) & set(spec.consoles)
    if both:
        key = min(both)
        raise FieldConflict(
            f"the device id {key} is that of a serial and of a console port",
            field=f"domain.spec.consoles.{key}",
            device_id=key,
        )


def with_defaults(
    spec: DomainSpec, default_driver: str, previous: DomainSpec | None, mac: Callable[[], str] = new_mac
) -> DomainSpec:
    """Return the spec with what the service itself decides; what was decided before stays.

    Args:
        spec: What was asked for.
        default_driver: The driver of a spec that names none.
        previous: The resolved spec of the generation before; None: the domain is new.
        mac: Makes a MAC.
    """
    full = DomainSpec()
    full.CopyFrom(spec)
    before = previous if previous is not None else DomainSpec()
    if not full.HasField("driver"):
        full.driver = before.driver or default_driver
    full.lifetime = full.lifetime or resource_pb2.LIFETIME_PERSISTENT
    full.autostart = full.autostart or resource_pb2.AUTOSTART_NEVER
    exits = full.on_exit
    exits.power_off = exits.power_off or domain_spec_pb2.EXIT_ACTION_STOP
    exits.reboot = exits.reboot or domain_spec_pb2.EXIT_ACTION_RESTART
    exits.crash = exits.crash or domain_spec_pb2.EXIT_ACTION_STOP
    _default_sizes(full)
    _default_devices(full, before, mac)
    return full


def _default_sizes(full: DomainSpec) -> None:
    memory, cpu = full.memory, full.cpu
    if not memory.HasField("maximum_bytes"):
        memory.maximum_bytes = max(DEFAULT_MEMORY_BYTES, memory.current_bytes)
    if not memory.HasField("current_bytes"):
        memory.current_bytes = memory.maximum_bytes
    if not cpu.HasField("vcpu_count"):
        cpu.vcpu_count = 1
    if not cpu.HasField("maximum_vcpu_count"):
        cpu.maximum_vcpu_count = cpu.vcpu_count


def _default_devices(full: DomainSpec, before: DomainSpec, mac: Callable[[], str]) -> None:
    for key, disk in full.disks.items():
        if not disk.HasField("serial_number"):
            disk.serial_number = key[:20]
    for key, card in full.interfaces.items():
        if not card.HasField("mac_address"):
            card.mac_address = (before.interfaces[key].mac_address if key in before.interfaces else "") or mac()
        if not card.HasField("link_up"):
            card.link_up = True
    for serial in full.serials.values():
        if not serial.HasField("log_bytes"):
            serial.log_bytes = DEFAULT_LOG_BYTES
    for console in full.consoles.values():
        if not console.HasField("log_bytes"):
            console.log_bytes = DEFAULT_LOG_BYTES
    _number_ports(full)


def _number_ports(spec: DomainSpec) -> None:
    """Give every serial and console port that has none the lowest free number, in the order of the device ids."""
    _number([spec.serials[key] for key in sorted(spec.serials)])
    _number([spec.consoles[key] for key in sorted(spec.consoles)])


def _number(ports: list[device_pb2.Serial] | list[device_pb2.Console]) -> None:
    taken = {port.port_number for port in ports if port.HasField("port_number")}
    free = (number for number in itertools.count() if number not in taken)
    for port in ports:
        if not port.HasField("port_number"):
            port.port_number = next(free)


def macs(spec: DomainSpec) -> Iterator[tuple[str, str]]:
    """Yield (MAC, device id) of every card of a resolved spec.

    Raises:
        FieldConflict: Two cards have the same.
    """
    seen: dict[str, str] = {}
    for key in sorted(spec.interfaces):
        mac = spec.interfaces[key].mac_address
        other = seen.setdefault(mac, key)
        if other != key:
            raise FieldConflict(
                f"the cards {other} and {key} have the same MAC {mac}",
                field=f"domain.spec.interfaces.{key}.mac_address",
                mac_address=mac,
            )
        yield mac, key


def host_paths(spec: DomainSpec) -> list[str]:
    """Return the host paths that a spec names."""
    return sorted(disk.host_path for disk in spec.disks.values() if disk.WhichOneof("source") == "host_path")


def without_sandbox(spec: DomainSpec) -> bool:
    """Tell whether a spec switches a layer of isolation off."""
    return spec.qemu.sandbox == domain_spec_pb2.QEMU_SANDBOX_OFF


def port_id(domain_id: str, device_id: str) -> str:
    """Return the id of the port that an interface owns: `{domain}-{device id}`, cut and hashed where it is too long."""
    plain = f"{domain_id}-{device_id}"
    if len(plain) <= 63:
        return plain
    return f"{plain[:52].rstrip('-')}-{hashlib.sha256(plain.encode()).hexdigest()[:10]}"

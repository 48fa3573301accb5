"""What is decided for a spec, and that it stays decided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.compute.qemu.cases import DOMAIN, EMULATOR, HOST, MIB, resolved
from virtfleet.compute.v1 import device_pb2, domain_spec_pb2
from virtfleet_compute.drivers.qemu import resolution
from virtfleet_service.errors import (
    CapabilityMissing,
    FieldConflict,
    FieldOutOfRange,
    FieldRequired,
    VirtfleetError,
)

Spec = domain_spec_pb2.DomainSpec
Change = Callable[[Spec], object]

NEWER = replace(
    HOST,
    emulator=replace(
        EMULATOR,
        machines={**EMULATOR.machines, "pc-i440fx-10.0": 255, "pc-q35-10.0": 4096},
        aliases={"pc": "pc-i440fx-10.0", "q35": "pc-q35-10.0"},
    ),
)


def test_alias_is_replaced_and_stays() -> None:
    for asked, expected in (("", "pc-i440fx-7.2"), ("pc", "pc-i440fx-7.2"), ("q35", "pc-q35-7.2")):
        spec = Spec()
        spec.os.machine = asked
        if not asked:
            spec.os.ClearField("machine")
        first = resolved(spec)
        assert first.os.machine == expected
        # A newer QEMU stands behind the same name; the guest keeps its machine.
        assert resolution.resolve(DOMAIN.uid, spec, first, NEWER).os.machine == expected
        assert resolution.resolve(DOMAIN.uid, spec, None, NEWER).os.machine.endswith("-10.0")
    spec.os.machine = "q35"
    pc = resolved(Spec())
    assert resolution.resolve(DOMAIN.uid, spec, pc, HOST).os.machine == "pc-q35-7.2"


def test_resolving_again_changes_nothing() -> None:
    spec = Spec()
    spec.disks["b"].volume = spec.disks["a"].volume = "pools/p/volumes/v"
    spec.interfaces["lan"].SetInParent()
    spec.serials["tty"].SetInParent()
    spec.consoles["hvc"].SetInParent()
    spec.memory.maximum_bytes, spec.memory.current_bytes = 64 * MIB, 32 * MIB
    first = resolved(spec)
    assert resolution.resolve(DOMAIN.uid, spec, first, HOST) == first
    assert resolution.resolve(DOMAIN.uid, first, first, HOST) == first
    assert first.balloons
    assert spec == spec.FromString(spec.SerializeToString())
    assert not spec.os.HasField("machine")


def test_devices_keep_their_places_when_others_come_and_go() -> None:
    spec = Spec()
    for key in ("b", "c"):
        spec.disks[key].volume = "pools/p/volumes/v"
        spec.interfaces[key].SetInParent()
        spec.serials[key].SetInParent()
    first = resolved(spec)
    changed = Spec()
    changed.CopyFrom(spec)
    changed.disks["a"].volume = "pools/p/volumes/v"
    changed.serials["a"].SetInParent()
    del changed.disks["b"]
    second = resolution.resolve(DOMAIN.uid, changed, first, HOST)
    assert second.disks["c"].slot == first.disks["c"].slot
    assert {key: card.slot for key, card in second.interfaces.items()} == {
        key: card.slot for key, card in first.interfaces.items()
    }
    assert second.serials["b"].port_number == first.serials["b"].port_number
    assert second.interfaces["b"].mac_address == first.interfaces["b"].mac_address
    slots = [disk_.slot for disk_ in second.disks.values()] + [card.slot for card in second.interfaces.values()]
    assert len(set(slots)) == len(slots)


@given(st.lists(st.sampled_from("abcdefgh"), unique=True), st.lists(st.sampled_from("abcdefgh"), unique=True))
def test_places_are_unique_whatever_came_before(before: list[str], after: list[str]) -> None:
    old, new = Spec(), Spec()
    for spec, keys in ((old, before), (new, after)):
        for number, key in enumerate(keys):
            disk = spec.disks[key]
            disk.volume = "pools/p/volumes/v"
            disk.bus = device_pb2.DISK_BUS_VIRTIO if number % 2 else device_pb2.DISK_BUS_SCSI
    first = resolved(old)
    second = resolution.resolve(DOMAIN.uid, new, first, HOST)
    places = [(disk.bus, disk.slot) for disk in second.disks.values()]
    assert len(set(places)) == len(places)
    for key, disk in second.disks.items():
        if key in first.disks and first.disks[key].bus == disk.bus:
            assert disk.slot == first.disks[key].slot


def disk(**fields: object) -> Change:
    def change(spec: Spec) -> None:
        made = spec.disks["d"]
        made.volume = "pools/p/volumes/v"
        made.MergeFrom(device_pb2.Disk(**fields))  # type: ignore[arg-type]  # of one row each

    return change


def more_than_maximum(spec: Spec) -> None:
    spec.memory.maximum_bytes, spec.memory.current_bytes = 1 * MIB, 2 * MIB


REFUSED: list[tuple[Change, type[VirtfleetError], str]] = [
    (lambda s: setattr(s.os, "arch", "riscv64"), CapabilityMissing, "os.arch"),
    (lambda s: setattr(s.os, "machine", "microvm"), CapabilityMissing, "os.machine"),
    (lambda s: setattr(s.os, "machine", "pc-i440fx-99.0"), CapabilityMissing, "os.machine"),
    (lambda s: setattr(s.os, "type", domain_spec_pb2.OS_TYPE_CONTAINER), CapabilityMissing, "os.type"),
    (
        lambda s: setattr(s.os.firmware, "type", domain_spec_pb2.FIRMWARE_TYPE_UEFI),
        CapabilityMissing,
        "os.firmware.type",
    ),
    (lambda s: s.os.kernel.SetInParent(), FieldRequired, "os.kernel.kernel_volume"),
    (lambda s: setattr(s.cpu, "model", "Pentium-9"), CapabilityMissing, "cpu.model"),
    (lambda s: setattr(s.cpu, "mode", domain_spec_pb2.CPU_MODE_CUSTOM), FieldRequired, "cpu.model"),
    (lambda s: setattr(s.cpu, "mode", domain_spec_pb2.CPU_MODE_HOST_PASSTHROUGH), CapabilityMissing, "cpu.mode"),
    (lambda s: setattr(s.qemu, "accelerator", "hvf"), CapabilityMissing, "qemu.accelerator"),
    (lambda s: s.cpu.features.add(name="enforce"), CapabilityMissing, "cpu.features[0].name"),
    (lambda s: setattr(s.cpu, "vcpu_count", 256), FieldOutOfRange, "cpu.maximum_vcpu_count"),
    (lambda s: setattr(s.cpu.topology, "core_count", 3), FieldConflict, "cpu.topology"),
    (lambda s: s.disks["d"].SetInParent(), FieldRequired, "disks.d.volume"),
    (lambda s: s.disks["d"].empty.SetInParent(), FieldConflict, "disks.d.empty"),
    (lambda s: setattr(s.disks["d"], "host_path", "/x"), FieldRequired, "disks.d.format"),
    (disk(bus=device_pb2.DISK_BUS_USB), CapabilityMissing, "disks.d.bus"),
    (disk(bus=device_pb2.DISK_BUS_VIRTIO, device=device_pb2.DISK_DEVICE_CDROM), FieldConflict, "disks.d.bus"),
    (disk(io=device_pb2.DISK_IO_NATIVE), FieldConflict, "disks.d.io"),
    (disk(device=device_pb2.DISK_DEVICE_CDROM, read_only=False), FieldConflict, "disks.d.read_only"),
    (disk(bus=device_pb2.DISK_BUS_SATA, read_only=True), FieldConflict, "disks.d.read_only"),
    (disk(slot=1), FieldOutOfRange, "disks.d.slot"),
    (
        disk(throttle=device_pb2.Throttle(iops_max=10**15, read_bytes_per_second_max=10**15 + 1)),
        FieldOutOfRange,
        "disks.d.throttle.read_bytes_per_second_max",
    ),
    (lambda s: setattr(s.interfaces["i"], "queue_count", 4), CapabilityMissing, "interfaces.i.queue_count"),
    (
        lambda s: s.interfaces["i"].MergeFrom(
            device_pb2.Interface(mtu_bytes=9000, model=device_pb2.INTERFACE_MODEL_E1000)
        ),
        CapabilityMissing,
        "interfaces.i.mtu_bytes",
    ),
    (
        lambda s: setattr(s.interfaces["i"], "model", device_pb2.INTERFACE_MODEL_E1000E),
        FieldConflict,
        "interfaces.i.model",
    ),
    (more_than_maximum, FieldConflict, "memory.current_bytes"),
]


@pytest.mark.parametrize(
    ("change", "kind", "field"), REFUSED, ids=[f"{number}-{field}" for number, (_, _, field) in enumerate(REFUSED)]
)
def test_what_cannot_be_met_is_refused_with_its_field(change: Change, kind: type[VirtfleetError], field: str) -> None:
    spec = Spec()
    change(spec)
    with pytest.raises(kind) as refused:
        resolved(spec)
    assert refused.value.field == f"domain.spec.{field}"


def test_ide_is_missing_where_the_machine_has_none() -> None:
    spec = Spec()
    spec.os.machine = "q35"
    disk(bus=device_pb2.DISK_BUS_IDE)(spec)
    with pytest.raises(CapabilityMissing) as refused:
        resolved(spec)
    assert refused.value.metadata["capability"] == "disk.bus.ide"


@pytest.mark.parametrize("text", ["a {fd:qmp} b", "a\0b"])
def test_kernel_arguments_that_somebody_would_change_are_refused(text: str) -> None:
    spec = Spec()
    spec.os.kernel.kernel_volume = "pools/p/volumes/k"
    spec.os.kernel.command_line = text
    with pytest.raises(FieldOutOfRange) as refused:
        resolved(spec)
    assert refused.value.field == "domain.spec.os.kernel.command_line"


def test_two_devices_cannot_have_one_slot() -> None:
    spec = Spec()
    disk(slot=5)(spec)
    spec.interfaces["i"].slot = 5
    with pytest.raises(FieldConflict) as refused:
        resolved(spec)
    assert refused.value.field == "domain.spec.interfaces.i.slot"


def test_largest_processor_stays_as_large_as_it_was() -> None:
    def features(spec: Spec) -> dict[str, bool]:
        return {
            feature.name: feature.policy == domain_spec_pb2.CPU_FEATURE_POLICY_REQUIRE for feature in spec.cpu.features
        }

    larger = replace(HOST, emulator=replace(EMULATOR, maximum_features=frozenset({"avx2", "svm", "avx512f"})))
    first = resolved(Spec())
    assert features(first) == {"avx2": True, "svm": True}
    assert resolution.resolve(DOMAIN.uid, Spec(), first, larger).cpu == first.cpu
    without = Spec()
    without.cpu.features.add(name="svm", policy=domain_spec_pb2.CPU_FEATURE_POLICY_DISABLE)
    second = resolution.resolve(DOMAIN.uid, without, first, larger)
    assert features(second) == {"svm": False, "avx2": True}
    assert features(resolution.resolve(DOMAIN.uid, Spec(), second, larger)) == {"avx2": True, "svm": True}
    beyond = Spec()
    beyond.cpu.features.add(name="avx512f")
    with pytest.raises(CapabilityMissing) as refused:
        resolved(beyond)
    assert refused.value.metadata["capability"] == "cpu.feature.avx512f"
    # Under hardware it is the host's, which only the start knows.
    assert features(resolution.resolve(DOMAIN.uid, Spec(), None, replace(HOST, accelerator="kvm"))) == {}

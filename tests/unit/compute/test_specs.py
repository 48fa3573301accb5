from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtfleet.compute.v1 import device_pb2, domain_spec_pb2
from virtfleet.type.v1 import resource_pb2
from virtfleet_compute import specs
from virtfleet_service import names
from virtfleet_service.errors import CapabilityMissing, FieldConflict, FieldRequired, ReferenceOtherNode, VirtfleetError

DomainSpec = domain_spec_pb2.DomainSpec
IDS = st.from_regex(names.ID, fullmatch=True)
GIB = 1 << 30


def test_references_become_node_relative() -> None:
    spec = DomainSpec()
    spec.disks["root"].volume = "nodes/n1/pools/p/volumes/v"
    spec.interfaces["net0"].network = "nodes/n1/networks/x"
    spec.interfaces["net1"].port = "networks/x/ports/y"
    spec.os.kernel.kernel_volume = "nodes/n1/pools/p/volumes/k"
    specs.normalize(spec, "n1")
    assert spec.disks["root"].volume == "pools/p/volumes/v"
    assert spec.interfaces["net0"].network == "networks/x"
    assert spec.interfaces["net1"].port == "networks/x/ports/y"
    assert spec.os.kernel.kernel_volume == "pools/p/volumes/k"
    assert not spec.os.kernel.HasField("initrd_volume")


def test_a_reference_to_another_node_is_refused_with_its_field() -> None:
    spec = DomainSpec()
    spec.disks["root"].volume = "nodes/n2/pools/p/volumes/v"
    with pytest.raises(ReferenceOtherNode) as refused:
        specs.normalize(spec, "n1")
    assert refused.value.field == "domain.spec.disks.root.volume"


def _memory(spec: DomainSpec) -> None:
    spec.memory.current_bytes, spec.memory.maximum_bytes = 2 * GIB, GIB


def _processors(spec: DomainSpec) -> None:
    spec.cpu.vcpu_count, spec.cpu.maximum_vcpu_count = 4, 2


def _topology(spec: DomainSpec) -> None:
    spec.cpu.vcpu_count, spec.cpu.topology.core_count = 4, 3


def _model(spec: DomainSpec) -> None:
    spec.cpu.mode = domain_spec_pb2.CPU_MODE_CUSTOM


def _source(spec: DomainSpec) -> None:
    spec.disks["root"].SetInParent()


def _empty_disk(spec: DomainSpec) -> None:
    spec.disks["root"].empty.SetInParent()


def _format(spec: DomainSpec) -> None:
    spec.disks["root"].host_path = "/dev/sda"


def _order(spec: DomainSpec) -> None:
    spec.disks["root"].volume = "pools/p/volumes/v"
    spec.disks["root"].boot_order = spec.interfaces["net0"].boot_order = 1


def _throttle_of_operations(spec: DomainSpec) -> None:
    spec.disks["root"].volume = "pools/p/volumes/v"
    spec.disks["root"].throttle.iops_max, spec.disks["root"].throttle.read_iops_max = 100, 50


def _throttle_of_bytes(spec: DomainSpec) -> None:
    spec.disks["root"].volume = "pools/p/volumes/v"
    throttle = spec.disks["root"].throttle
    throttle.bytes_per_second_max, throttle.write_bytes_per_second_max = GIB, GIB


def _twins(spec: DomainSpec) -> None:
    spec.serials["con"].SetInParent()
    spec.consoles["con"].SetInParent()


def _kernel(spec: DomainSpec) -> None:
    spec.os.kernel.command_line = "quiet"


def _options(spec: DomainSpec) -> None:
    spec.driver = "qemu"
    spec.test.SetInParent()


def _model_beside_a_mode(spec: DomainSpec) -> None:
    spec.cpu.mode, spec.cpu.model = domain_spec_pb2.CPU_MODE_MAXIMUM, "qemu64-v1"


def _limits(spec: DomainSpec) -> None:
    spec.interfaces["net0"].port = "networks/x/ports/y"
    spec.interfaces["net0"].bandwidth.inbound.average_bytes_per_second = GIB


def _transient(spec: DomainSpec) -> None:
    spec.lifetime, spec.autostart = resource_pb2.LIFETIME_TRANSIENT, resource_pb2.AUTOSTART_ONCE


@pytest.mark.parametrize(
    ("change", "error", "field"),
    [
        (_model_beside_a_mode, FieldConflict, "cpu.model"),
        (_limits, CapabilityMissing, "interfaces.net0.bandwidth"),
        (_transient, FieldConflict, "autostart"),
        (_memory, FieldConflict, "memory.current_bytes"),
        (_processors, FieldConflict, "cpu.vcpu_count"),
        (_topology, FieldConflict, "cpu.topology"),
        (_model, FieldRequired, "cpu.model"),
        (_source, FieldRequired, "disks.root.volume"),
        (_throttle_of_operations, FieldConflict, "disks.root.throttle.iops_max"),
        (_throttle_of_bytes, FieldConflict, "disks.root.throttle.bytes_per_second_max"),
        (_empty_disk, FieldConflict, "disks.root.empty"),
        (_format, FieldRequired, "disks.root.format"),
        (_order, FieldConflict, "interfaces.net0.boot_order"),
        (_twins, FieldConflict, "consoles.con"),
        (_kernel, FieldRequired, "os.kernel.kernel_volume"),
        (_options, FieldConflict, "test"),
    ],
)
def test_what_no_hypervisor_could_meet(change: object, error: type[VirtfleetError], field: str) -> None:
    spec = DomainSpec()
    assert callable(change)
    change(spec)
    with pytest.raises(error) as refused:
        specs.check(spec)
    assert refused.value.field == f"domain.spec.{field}"


def test_defaults_are_complete_and_stay() -> None:
    spec = DomainSpec()
    spec.interfaces["net0"].SetInParent()
    spec.serials["b"].SetInParent()
    spec.serials["a"].port_number = 1
    before = spec.SerializeToString(deterministic=True)
    first = specs.with_defaults(spec, "test", None)
    assert spec.SerializeToString(deterministic=True) == before
    assert first.driver == "test"
    assert first.memory.current_bytes == first.memory.maximum_bytes == specs.DEFAULT_MEMORY_BYTES
    assert first.cpu.vcpu_count == first.cpu.maximum_vcpu_count == 1
    assert first.serials["b"].port_number == 0
    again = specs.with_defaults(spec, "other", first)
    assert again == first, "a driver and a MAC that were decided stay"


def test_a_given_size_is_never_less_than_asked() -> None:
    spec = DomainSpec()
    spec.memory.current_bytes = 4 * GIB
    assert specs.with_defaults(spec, "test", None).memory.maximum_bytes == 4 * GIB


@given(IDS, IDS)
def test_port_ids_are_ids_and_differ_with_their_parts(domain_id: str, device_id: str) -> None:
    made = specs.port_id(domain_id, device_id)
    assert names.is_id(made) or len(made) == 36
    assert len(made) <= 63
    assert made != specs.port_id(domain_id, device_id[:-1] + ("a" if device_id[-1] != "a" else "b"))


def test_two_cards_of_one_mac() -> None:
    spec = DomainSpec(
        interfaces={
            "net0": device_pb2.Interface(mac_address="52:54:00:00:00:01"),
            "net1": device_pb2.Interface(mac_address="52:54:00:00:00:01"),
        }
    )
    with pytest.raises(FieldConflict) as refused:
        list(specs.macs(spec))
    assert refused.value.field == "domain.spec.interfaces.net1.mac_address"


def test_new_macs_are_of_the_range_and_differ() -> None:
    made = {specs.new_mac() for _ in range(10_000)}
    assert len(made) == 10_000
    assert all(mac.startswith(specs.MAC_PREFIX) and len(mac) == 17 for mac in made)

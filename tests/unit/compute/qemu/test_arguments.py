"""The arguments of QEMU are what is kept in `golden/`, and nothing from outside becomes one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.unit.compute.qemu import cases
from virtfleet.compute.v1 import domain_spec_pb2
from virtfleet_compute.drivers.api import FileConnection
from virtfleet_compute.drivers.qemu import arguments, naming
from virtfleet_service.errors import CapabilityMissing, HypervisorFailed


@pytest.mark.parametrize("name", cases.CASES)
def test_arguments_are_as_kept(name: str) -> None:
    assert cases.text(cases.CASES[name]()) == (cases.GOLDEN / f"{name}.args").read_text()


def test_every_kept_file_has_a_case() -> None:
    assert {path.stem for path in cases.GOLDEN.iterdir()} == set(cases.CASES)


def test_hostile_paths_arrive_as_they_are() -> None:
    invocation = arguments.build(cases.hostile(), "/q", "tcg", sandbox=True)
    nodes = [
        json.loads(word)
        for before, word in zip(invocation.argv, invocation.argv[1:], strict=False)
        if before == "-blockdev"
    ]
    assert {node["filename"] for node in nodes if "filename" in node} == {
        f"/{cases.NASTY}",
        f"/behind {cases.NASTY}",
        'json:{"driver":"nbd"}',
    }
    # The launcher would put a number in the place of this one.
    assert [word for word in invocation.argv if "{fd:" in word] == ["socket,id=qmp,fd={fd:qmp},server=on,wait=off"]
    assert all(len(node["node-name"]) <= 31 for node in nodes)


def test_every_node_names_its_format_and_what_is_behind_it() -> None:
    for case in cases.CASES.values():
        invocation = arguments.build(case(), "/q", "tcg", sandbox=True)
        words = zip(invocation.argv, invocation.argv[1:], strict=False)
        for node in (json.loads(word) for before, word in words if before == "-blockdev"):
            assert node["driver"] in ("file", "raw", "qcow2")
            assert ("backing" in node) == (node["driver"] == "qcow2")


def test_filter_that_is_demanded_and_missing_is_refused() -> None:
    plan = cases.bare()
    plan.spec.qemu.sandbox = domain_spec_pb2.QEMU_SANDBOX_ON
    with pytest.raises(CapabilityMissing) as refused:
        arguments.build(plan, "/q", "tcg", sandbox=False)
    assert refused.value.field == "domain.spec.qemu.sandbox"
    plan.spec.qemu.sandbox = domain_spec_pb2.QEMU_SANDBOX_UNSPECIFIED
    assert "-sandbox" not in arguments.build(plan, "/q", "tcg", sandbox=False).argv


def test_plan_without_what_the_spec_needs_is_refused() -> None:
    with pytest.raises(HypervisorFailed, match="disk root is not attached"):
        arguments.build(replace(cases.kernel(), disks={}), "/q", "tcg", sandbox=True)
    with pytest.raises(HypervisorFailed, match="kernel"):
        arguments.build(replace(cases.kernel(), kernel=None), "/q", "tcg", sandbox=True)
    odd = replace(cases.kernel(), initrd=FileConnection("/{fd:qmp}", "raw"))
    with pytest.raises(HypervisorFailed, match="cannot be given"):
        arguments.build(odd, "/q", "tcg", sandbox=True)


def test_names_are_short_and_never_meet() -> None:
    ids = ["a", "a" * 22, "a" * 23, "a" * 31 + "b", "a" * 32, "a-b-c-d-e-f-g-h-i-j-k-l-m-n-o-p"]
    made = [naming.short(device_id) for device_id in ids]
    assert len(set(made)) == len(ids)
    assert all(len(naming.console(device_id)) <= 32 for device_id in ids)
    assert naming.disk_id("/machine/peripheral/disk.a-b/virtio-backend") == "a-b"
    assert naming.disk_id("disk.a") == "a"
    assert naming.disk_id("ide0-hd0") == ""
    assert naming.uid_of("qemu-x") == "x"
    assert naming.uid_of("lxc-x") is None

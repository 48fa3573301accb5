"""What the driver finds out about QEMU and the accelerators, and that it asks only once."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest

from tests.integration.qemu import running
from tests.integration.qemu.running import QEMU, Node, facts, serial_spec
from virtfleet_compute.drivers.qemu import accelerator, probe
from virtfleet_service.errors import DriverBroken


async def test_emulator_is_asked_once(tmp_path: Path) -> None:
    first = await probe.probe(QEMU, tmp_path)
    assert first.aliases["q35"] in first.machines
    assert first.has_sandbox
    assert {"avx2", "vmx"} <= first.cpu_features
    begun = time.perf_counter()
    assert await probe.probe(QEMU, tmp_path) == first
    assert time.perf_counter() - begun < 0.02
    # Another binary, or a damaged record: asked again.
    record = tmp_path / "emulator.json"
    value = json.loads(record.read_text())
    value["stamp"][2] += 1
    record.write_text(json.dumps(value))
    assert await probe.probe(QEMU, tmp_path) == first
    record.write_text("{")
    assert await probe.probe(QEMU, tmp_path) == first


WITHOUT_SECCOMP = f"""#!/usr/bin/python3 -I
# QEMU where the system call seccomp (317) is refused, as the unit of a service may do.
import ctypes, os, struct, sys

program = struct.pack("HBBI" * 4, 0x20, 0, 0, 0, 0x15, 0, 1, 317, 0x06, 0, 0, 0x00050001, 0x06, 0, 0, 0x7FFF0000)
buffer = ctypes.create_string_buffer(program)
filter = struct.pack("HxxxxxxQ", 4, ctypes.addressof(buffer))
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, filter, 0, 0):
    sys.exit(os.strerror(ctypes.get_errno()))
os.execv({QEMU!r}, [{QEMU!r}, *sys.argv[1:]])
"""


async def test_a_qemu_that_cannot_filter_runs_without(tmp_path: Path) -> None:
    binary = tmp_path / "qemu"
    binary.write_text(WITHOUT_SECCOMP)
    binary.chmod(0o755)
    emulator = await probe.probe(str(binary), tmp_path)
    assert not emulator.has_sandbox
    assert dataclasses.replace(await probe.probe(QEMU, tmp_path), has_sandbox=False, binary=str(binary)) == emulator


async def test_guest_code_is_run_to_the_end() -> None:
    report = await accelerator.try_out(QEMU, "tcg", seconds=10)
    assert report.usable
    assert "ran guest code" in report.reason
    slow = await accelerator.try_out(QEMU, "tcg", seconds=0.01)
    assert not slow.usable
    missing = await accelerator.try_out(QEMU, "no-such-accelerator")
    assert not missing.usable
    assert "no-such-accelerator" in missing.reason


async def test_kvm_is_tried_once_a_boot(tmp_path: Path) -> None:
    emulator = await probe.probe(QEMU, tmp_path)
    kvm, tcg = await accelerator.accelerators(emulator, tmp_path)
    assert (kvm.name, tcg.name, tcg.usable) == ("kvm", "tcg", True)
    assert kvm.reason
    begun = time.perf_counter()
    assert (await accelerator.accelerators(emulator, tmp_path))[0] == kvm
    assert time.perf_counter() - begun < 0.05


async def test_guest_gets_the_accelerator_that_works() -> None:
    async with running.node({"accelerator": ""}) as made:
        driver = await made.enter()
        report = await driver.probe()
        usable = [each.name for each in report.accelerators if each.usable]
        plan = await made.plan(serial_spec(), paused=True)
        await driver.start(plan)
        [process] = await made.launcher.client().list_processes()
        argv = (await made.launcher.client().inspect(process.guest)).argv
        assert argv[argv.index("-accel") + 1] == usable[0]
        await driver.stop(plan.domain)
        if "kvm" not in usable:
            spec = serial_spec()
            spec.qemu.accelerator = "kvm"
            with pytest.raises(DriverBroken, match="kvm cannot be used: "):
                await driver.start(await made.plan(spec))


async def test_report_names_the_layers(node: Node) -> None:
    report = await node.driver.probe()
    layers = {layer.name: layer.enabled for layer in report.isolation_layers}
    assert layers == {"user": True, "seccomp": True, "cgroup": True, "session": True, "no_new_privs": True}
    assert report.archs == ("x86_64",)
    assert report.uses_host_memory
    assert facts(await node.driver.inspect(running.new_domain())) == ("SHUT_OFF", "UNSPECIFIED")

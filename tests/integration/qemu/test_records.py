"""What the driver writes down, on disks that are full, and what it finds of it, damaged."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration.qemu import running
from tests.integration.qemu.running import QEMU, Node, facts, serial_spec
from virtfleet.compute.v1 import domain_spec_pb2
from virtfleet_compute.drivers.api import DomainRef
from virtfleet_compute.drivers.facets import LiveUpdate
from virtfleet_compute.drivers.qemu import accelerator, probe
from virtfleet_service.errors import BackendFailed


@pytest.mark.parametrize(
    "garbage", [b"", b"{", b"[]", b"\xff", b'{"runtime_id": "%s"}', b'{"runtime_id": "%s", "spec": 5}']
)
async def test_damaged_records_cost_no_guest(node: Node, garbage: bytes) -> None:
    plan = await node.plan(serial_spec())
    started = await node.driver.start(plan)
    folder = node.folder / "driver" / plan.domain.uid
    folder.mkdir(exist_ok=True)
    await node.leave()
    for record in ("active", "end"):
        (folder / record).write_bytes(garbage.replace(b"%s", plan.runtime_id.encode()))
    await node.enter()
    found = await node.driver.inspect(plan.domain)
    assert (found.pid, facts(found)[0]) == (started.pid, "RUNNING")
    assert found.active_spec == plan.spec
    assert facts(await node.driver.stop(plan.domain)) == ("SHUT_OFF", "DESTROYED")


@pytest.fixture
async def full(node: Node) -> AsyncIterator[Node]:
    """A node whose driver keeps its records where there is no room any more."""
    plan = await node.plan(balloon())
    await node.driver.start(plan)
    place = node.folder / "driver"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k,mode=700", "tmpfs", place], check=True)
    try:
        with (place / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            file.write(bytes(1 << 20))
        node.heard.clear()
        yield node
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def balloon() -> domain_spec_pb2.DomainSpec:
    spec = serial_spec()
    spec.balloons["b"].SetInParent()
    return spec


async def test_a_guest_is_ended_by_force_on_a_full_disk(full: Node) -> None:
    [guest] = await full.driver.list()
    domain = DomainRef(guest.name, guest.uid)
    assert facts(await full.driver.stop(domain)) == ("SHUT_OFF", "DESTROYED")
    assert not running.alive(guest.pid)


async def test_a_change_that_cannot_be_written_down_is_taken_back(full: Node) -> None:
    [guest] = await full.driver.list()
    domain = DomainRef(guest.name, guest.uid)
    current = guest.active_spec
    assert current is not None
    wanted = domain_spec_pb2.DomainSpec()
    wanted.CopyFrom(current)
    wanted.on_exit.reboot = domain_spec_pb2.EXIT_ACTION_STOP
    live = full.driver.facet(LiveUpdate)  # type: ignore[type-abstract]  # a protocol is what names a facet
    assert live is not None
    with pytest.raises(BackendFailed, match="No space"):
        await live.update_live(domain, current, wanted, ["spec.on_exit.reboot"])
    assert (await full.driver.inspect(domain)).active_spec == current
    await full.driver.stop(domain)


async def test_what_saves_time_is_no_obstacle_where_it_cannot_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    # A state directory that cannot be, as on a full disk, and no room for temporary files.
    nowhere = Path("/proc/nowhere")
    monkeypatch.setattr(tempfile, "tempdir", str(nowhere))
    emulator = await probe.probe(QEMU, nowhere)
    assert emulator.machines
    assert (await accelerator.try_out(QEMU, "tcg", seconds=10)).usable
    assert [report.name for report in await accelerator.accelerators(emulator, nowhere)] == ["kvm", "tcg"]


async def test_a_guest_that_a_boot_of_the_host_has_ended_is_told_as_that(node: Node) -> None:
    plan = await node.plan(serial_spec())
    started = await node.driver.start(plan)
    await node.leave()
    node.launcher.end()
    os.kill(started.pid, signal.SIGKILL)
    # As a run directory is that outlived the boot.
    born = node.launcher.guest_dir(f"qemu-{plan.domain.uid}") / "pid"
    born.write_text(json.dumps(json.loads(born.read_text()) | {"boot_id": "00000000-0000-0000-0000-000000000000"}))
    node.launcher.start()
    await node.enter()
    [found] = await node.driver.list()
    assert (found.uid, facts(found)) == (plan.domain.uid, ("SHUT_OFF", "NODE_REBOOTED"))
    # Nothing of it is in the way of the next run.
    again = await node.driver.start(replace(plan, runtime_id=str(uuid.uuid4())))
    assert facts(again) == ("RUNNING", "BOOTED")
    await node.driver.stop(plan.domain)

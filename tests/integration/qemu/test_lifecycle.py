"""Guests are started, seen, asked and ended; what is true is read from /proc and from QEMU's own log."""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import signal
import time
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from tests.held import containers_naming
from tests.integration.launcher.running import UID
from tests.integration.qemu import running
from tests.integration.qemu.running import (
    FileConnection,
    Node,
    alive,
    facts,
    line,
    serial_spec,
)
from tools import guest_image
from virtfleet.compute.v1 import domain_spec_pb2
from virtfleet_compute.drivers.api import DomainState, EventKind, StartPlan
from virtfleet_compute.drivers.facets import ConsoleEnd, ConsoleEndReason, ConsoleOutput
from virtfleet_service.errors import GuestDidNotComply, WrongState

RUNNING = DomainState.DOMAIN_STATE_RUNNING
PAUSED = DomainState.DOMAIN_STATE_PAUSED
SHUT_OFF = DomainState.DOMAIN_STATE_SHUT_OFF


async def linux(node: Node, image: guest_image.GuestImage) -> StartPlan:
    spec = serial_spec(160)
    spec.os.kernel.kernel_volume = "pools/p/volumes/kernel"
    spec.os.kernel.initrd_volume = "pools/p/volumes/initrd"
    spec.os.kernel.command_line = guest_image.command_line("n0nce")
    files = []
    for source in (image.kernel, image.initrd):
        copy = node.folder / source.name
        if not copy.exists():
            shutil.copyfile(source, copy)
        copy.chmod(0o644)
        files.append(FileConnection(str(copy), "raw"))
    return await node.plan(spec, kernel=files[0], initrd=files[1])


async def test_paused_start_and_stop(node: Node) -> None:
    driver = node.driver
    plan = await node.plan(serial_spec(), paused=True)
    started = await driver.start(plan)
    assert facts(started) == ("PAUSED", "STARTED_PAUSED")
    assert (started.runtime_id, started.run_as_uid, started.name) == (plan.runtime_id, UID, plan.domain.name)
    status = dict(
        text.split(":\t", 1) for text in Path(f"/proc/{started.pid}/status").read_text().splitlines() if ":\t" in text
    )
    assert status["Uid"].split() == status["Gid"].split() == [str(UID)] * 4
    assert (status["Seccomp"], status["NoNewPrivs"], status["CapEff"]) == ("2", "1", "0" * 16)
    assert os.getsid(started.pid) == started.pid
    environment = Path(f"/proc/{started.pid}/environ").read_bytes()
    assert environment == b"GLIBC_TUNABLES=glibc.malloc.hugetlb=1\0"
    # Before its first instruction: no virtual processor has run.
    assert await driver.start(plan) == started
    stopped = await driver.stop(plan.domain)
    assert facts(stopped) == ("SHUT_OFF", "DESTROYED")
    assert not alive(started.pid)
    assert await driver.stop(plan.domain) == stopped
    assert [each.uid for each in await driver.list()] == [plan.domain.uid]
    await driver.undefine(plan.domain)
    assert await driver.list() == []
    assert not list((node.launcher.run / "guests").iterdir())
    assert not list((node.folder / "driver").iterdir())
    states = [event.observation.state for event in node.heard if event.observation is not None]
    assert states[-1] == SHUT_OFF
    assert set(states[:-1]) == {PAUSED}


async def test_of_guests_that_are_gone_the_driver_keeps_nothing_in_memory(node: Node) -> None:
    plan = await node.plan(serial_spec(), paused=True)
    await node.driver.start(plan)
    await node.driver.stop(plan.domain)
    await node.driver.undefine(plan.domain)
    node.heard.clear()
    assert not containers_naming(plan.domain.uid)
    assert not containers_naming(plan.runtime_id)


async def test_linux_boots_talks_and_obeys_the_power_button(node: Node, image: guest_image.GuestImage) -> None:
    driver = node.driver
    plan = await linux(node, image)
    started = await driver.start(plan)
    assert facts(started) == ("RUNNING", "BOOTED")
    console = await running.consoles(driver).open_console(
        plan.domain, "tty", writable=True, force=False, epoch="", offset=0
    )
    await line(console, r"READY [0-9.]+")
    await console.close()
    paused = await driver.suspend(plan.domain)
    assert facts(paused) == ("PAUSED", "USER")
    assert await driver.suspend(plan.domain) == paused
    assert facts(await driver.resume(plan.domain)) == ("RUNNING", "UNPAUSED")
    begun = time.monotonic()
    ended = await driver.shut_down(plan.domain, timeout_seconds=10)
    assert time.monotonic() - begun < 5
    assert facts(ended) == ("SHUT_OFF", "GUEST_SHUTDOWN")
    assert not alive(started.pid)
    assert ended.failure == ""
    assert await driver.shut_down(plan.domain, timeout_seconds=1) == ended


async def test_reboot_goes_on_in_the_same_run(node: Node, image: guest_image.GuestImage) -> None:
    driver = node.driver
    plan = await linux(node, image)
    # Ctrl-alt-del must go on although a reboot that the guest begins would end it.
    plan.spec.on_exit.reboot = domain_spec_pb2.EXIT_ACTION_STOP
    started = await driver.start(plan)
    console = await running.consoles(driver).open_console(
        plan.domain, "tty", writable=True, force=False, epoch="", offset=0
    )
    await line(console, r"READY [0-9.]+")
    rebooted = await driver.reboot(plan.domain, timeout_seconds=10)
    assert (rebooted.pid, rebooted.runtime_id) == (started.pid, started.runtime_id)
    await node.event(EventKind.REBOOTED, plan.domain.uid)
    second = await running.consoles(driver).open_console(
        plan.domain, "tty", writable=False, force=False, epoch="", offset=None
    )
    await line(second, r"READY [0-9.]+")
    await console.close()
    await driver.stop(plan.domain)


async def test_guest_that_is_deaf_did_not_comply(node: Node) -> None:
    driver = node.driver
    plan = await node.plan(serial_spec())
    started = await driver.start(plan)
    with pytest.raises(GuestDidNotComply):
        await driver.shut_down(plan.domain, timeout_seconds=0.3)
    assert alive(started.pid)
    assert (await driver.inspect(plan.domain)).state == RUNNING
    await driver.stop(plan.domain)


async def test_killed_qemu_is_told_and_on_record(node: Node) -> None:
    driver = node.driver
    plan = await node.plan(serial_spec())
    started = await driver.start(plan)
    os.kill(started.pid, signal.SIGKILL)
    told = await node.event(EventKind.STATE_CHANGED, plan.domain.uid, state=SHUT_OFF)
    assert told.observation is not None
    assert facts(told.observation) == ("SHUT_OFF", "HYPERVISOR_DIED")
    assert "signal 9" in told.observation.failure
    await node.leave()
    again = await node.enter()
    [found] = await again.list()
    assert facts(found) == ("SHUT_OFF", "HYPERVISOR_DIED")
    assert found.runtime_id == plan.runtime_id
    with pytest.raises(WrongState):
        await again.suspend(plan.domain)
    # The record of the dead run is no obstacle.
    assert facts(await again.start(replace(plan, runtime_id=str(uuid.uuid4())))) == ("RUNNING", "BOOTED")


async def test_end_while_nobody_listened_has_its_reason(node: Node) -> None:
    plan = await node.plan(serial_spec())
    started = await node.driver.start(plan)
    await node.leave()
    watched = os.pidfd_open(started.pid)
    os.kill(started.pid, signal.SIGTERM)
    await asyncio.to_thread(select.select, [watched], [], [], 10)
    os.close(watched)
    [found] = await (await node.enter()).list()
    assert facts(found) == ("SHUT_OFF", "HYPERVISOR_DIED")
    assert "exit code 0" in found.failure


async def test_next_instance_holds_the_same_guest(node: Node) -> None:
    plan = await node.plan(serial_spec())
    started = await node.driver.start(plan)
    await node.driver.suspend(plan.domain)
    await node.leave()
    driver = await node.enter()
    [found] = await driver.list()
    assert (found.pid, found.runtime_id, found.start_time) == (started.pid, plan.runtime_id, started.start_time)
    assert facts(found) == ("PAUSED", "USER")
    assert found.active_spec == plan.spec
    assert found.name == plan.domain.name
    assert facts(await driver.resume(plan.domain)) == ("RUNNING", "UNPAUSED")
    # A start of the same run is a success, of another replaces it.
    assert (await driver.start(plan)).pid == started.pid
    other = await driver.start(replace(plan, runtime_id=str(uuid.uuid4())))
    assert other.pid != started.pid
    assert not alive(started.pid)


async def test_start_finds_a_guest_that_nobody_told_of(node: Node) -> None:
    plan = await node.plan(serial_spec(), paused=True)
    await node.driver.start(plan)
    await node.leave()
    driver = await node.enter()
    # The service died between start and commit: the same start goes on where it was left.
    started = await driver.start(replace(plan, paused=False))
    assert facts(started) == ("RUNNING", "BOOTED")


async def test_frozen_qemu_is_control_lost_within_two_seconds(node: Node) -> None:
    driver = node.driver
    plan = await node.plan(serial_spec())
    started = await driver.start(plan)
    os.kill(started.pid, signal.SIGSTOP)
    begun = time.monotonic()
    seen = await driver.inspect(plan.domain)
    assert time.monotonic() - begun < 2.5
    assert seen.control_lost
    assert seen.state == RUNNING
    await node.event(EventKind.CONTROL_CHANGED, plan.domain.uid)
    os.kill(started.pid, signal.SIGCONT)
    assert not (await driver.inspect(plan.domain)).control_lost
    os.kill(started.pid, signal.SIGSTOP)
    begun = time.monotonic()
    assert facts(await driver.stop(plan.domain)) == ("SHUT_OFF", "DESTROYED")
    assert time.monotonic() - begun < 1


async def test_launcher_that_dies_takes_no_guest_and_no_event(node: Node) -> None:
    driver = node.driver
    plan = await node.plan(serial_spec())
    started = await driver.start(plan)
    node.launcher.end()
    node.launcher.start()
    assert (await driver.inspect(plan.domain)).pid == started.pid
    assert alive(started.pid)
    assert facts(await driver.stop(plan.domain)) == ("SHUT_OFF", "DESTROYED")


async def test_console_has_one_writer_and_keeps_history(node: Node, image: guest_image.GuestImage) -> None:
    driver = node.driver
    plan = await linux(node, image)
    await driver.start(plan)
    facet = running.consoles(driver)
    first = await facet.open_console(plan.domain, "tty", writable=True, force=False, epoch="", offset=0)
    reading = asyncio.create_task(_items(first))
    watcher = await facet.open_console(plan.domain, "tty", writable=False, force=False, epoch="", offset=0)
    await line(watcher, r"READY [0-9.]+")
    taker = await facet.open_console(plan.domain, "tty", writable=True, force=True, epoch="", offset=None)
    ending = (await asyncio.wait_for(reading, 5))[-1]
    assert isinstance(ending, ConsoleEnd)
    assert ending.reason is ConsoleEndReason.TAKEN_OVER
    with pytest.raises(WrongState):
        await first.write(b"uptime\n")
    await taker.write(b"run echo forty$((40+2))\n")
    await line(taker, "forty42")
    await taker.close()
    await driver.stop(plan.domain)
    log = await facet.read_console_log(plan.domain, "tty", epoch="", offset=0, follow=False)
    items = await _items(log)
    assert b"forty42" in b"".join(item.data for item in items if isinstance(item, ConsoleOutput))
    assert isinstance(items[-1], ConsoleEnd)
    assert items[-1].reason is ConsoleEndReason.END_OF_LOG


async def _items(session: object) -> list[object]:
    return [item async for item in session.output()]  # type: ignore[attr-defined]  # a session

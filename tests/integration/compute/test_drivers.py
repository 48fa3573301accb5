"""Drivers that cannot run when the service starts, and can later; that cannot say what runs; that find another hypervisor."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.integration.compute.rig import PARENT, Client, Process, Refused, Service, State, seconds, service
from tests.integration.compute.test_crashes import cut, forget_boot, running
from tests.integration.compute.test_volumes import request, storage
from tests.integration.launcher.running import UID, Launcher
from virtfleet.compute.v1 import capability_pb2, domain_pb2, domain_spec_pb2, host_pb2
from virtfleet.type.v1 import resource_pb2

QEMU = "/usr/bin/qemu-system-x86_64"
BROKEN, READY = capability_pb2.DRIVER_STATE_BROKEN, capability_pb2.DRIVER_STATE_READY


def failing(method: str, count: int) -> dict[str, Any]:
    """Return the settings of a driver whose method fails so many times."""
    return {"faults": [{"method": method, "reason": "BACKEND_UNREACHABLE", "count": count}]}


async def driver(client: Client, id_: str = "test") -> capability_pb2.Driver:
    found: capability_pb2.Driver = await client.call(
        client.drivers.GetDriver, capability_pb2.GetDriverRequest(name=f"{PARENT}/drivers/{id_}")
    )
    return found


async def until_ready(client: Client, id_: str = "test") -> None:
    async with asyncio.timeout(20):
        while (await driver(client, id_)).status.state != READY:
            await asyncio.sleep(0.1)


@pytest.fixture
async def process(place: Path) -> AsyncIterator[Process]:
    made = Process(place)
    try:
        yield made
    finally:
        await made.kill()


async def again(process: Process, faults: Mapping[str, Any]) -> Client:
    """Start the service again, with a driver that fails at first."""
    process._changes["drivers"] = faults
    return await process.start()


async def test_a_driver_that_can_run_later_is_found_at_the_next_use(place: Path) -> None:
    async with service(place, drivers={"test": failing("probe", 1)}) as node:
        assert (await driver(node)).status.state == BROKEN
        # Not a probe for each of a thousand calls.
        await asyncio.sleep(1.1)
        domain = await node.create("web", start=True)
        assert domain.status.state == State.DOMAIN_STATE_RUNNING
        await until_ready(node)
        # It is listened to.
        spec = domain_spec_pb2.DomainSpec()
        spec.test.power_off_delay.CopyFrom(seconds(0.2))
        await node.create("short", spec=spec, start=True)
        await node.until("short", State.DOMAIN_STATE_SHUT_OFF)
        host = await node.call(node.hosts.GetHost, host_pb2.GetHostRequest(name=f"{PARENT}/host"))
        assert [one.driver for one in host.status.isolation_layers] == ["test"]


async def test_a_driver_that_can_run_later_is_found_without_a_use(place: Path) -> None:
    async with service(place, drivers={"test": failing("probe", 2)}) as node:
        assert (await driver(node)).status.init_error.message
        await until_ready(node)


async def test_guests_of_a_driver_that_cannot_run_are_unknown_and_then_the_same(process: Process) -> None:
    client = await process.start()
    before = await client.create("web", start=True)
    await client.create("idle")
    await client.close()
    await process.kill()
    client = await again(process, failing("probe", 2))
    unknown = await client.get("web")
    assert unknown.status.state == State.DOMAIN_STATE_UNKNOWN
    assert unknown.status.control.state == domain_pb2.CONTROL_STATE_LOST
    after = await client.until("web", State.DOMAIN_STATE_RUNNING, seconds=20)
    assert after.status.runtime_id == before.status.runtime_id
    assert after.status.control.state == domain_pb2.CONTROL_STATE_OK
    assert (await client.get("idle")).status.state == State.DOMAIN_STATE_SHUT_OFF
    # What happens to it now is heard of.
    await client.stop("web")
    assert (await client.get("web")).status.state == State.DOMAIN_STATE_SHUT_OFF
    await client.close()


async def test_a_driver_that_cannot_list_its_guests_has_not_said_that_there_are_none(process: Process) -> None:
    client = await process.start()
    before = await client.create("web", start=True)
    await client.close()
    await process.kill()
    client = await again(process, failing("list", 2))
    assert (await client.get("web")).status.state == State.DOMAIN_STATE_UNKNOWN
    after = await client.until("web", State.DOMAIN_STATE_RUNNING, seconds=20)
    assert after.status.runtime_id == before.status.runtime_id
    await client.close()


async def test_a_cut_start_keeps_its_volumes_until_its_driver_can_say_what_came_of_it(
    place: Path, process: Process
) -> None:
    async with storage(place) as provider:
        client = await process.start()
        domain = await client.do(client.domains.CreateDomain, request("web", "root", start=False), domain_pb2.Domain)
        await client.close()
        await process.kill()
        client = await process.start("compute.start.started")
        await cut(process, client, client.start("web"))
        assert running(place) == {domain.uid}
        client = await again(process, failing("probe", 2))
        # The guest runs, and nobody can say so: its disk is nobody else's to take meanwhile.
        await asyncio.sleep(2)
        assert await provider.held() == {"root"}
        after = await client.until("web", State.DOMAIN_STATE_RUNNING, seconds=20)
        assert [disk.device_id for disk in after.status.disks] == ["root"]
        await asyncio.sleep(1)
        assert await provider.held() == {"root"}
        await client.stop("web")
        assert await provider.held() == set()
        await client.close()


async def test_a_cut_creation_is_undone_when_its_driver_can_run(place: Path, process: Process) -> None:
    async with storage(place) as provider:
        client = await process.start("compute.start.started")
        await cut(process, client, client.call(client.domains.CreateDomain, request("web", "root")))
        assert len(running(place)) == 1
        client = await again(process, failing("probe", 2))
        await asyncio.sleep(2)
        # Its volume is not taken from under the guest.
        assert await provider.names() == ["root"]
        assert await provider.held() == {"root"}
        with pytest.raises(Refused) as refused:
            await client.do(client.domains.CreateDomain, request("web", "root"), domain_pb2.Domain)
        assert refused.value.reason in ("OPERATION_CONFLICT", "DRIVER_BROKEN")
        async with asyncio.timeout(20):
            while running(place) or await provider.names():
                await asyncio.sleep(0.1)
        assert not (await client.list()).domains
        await client.do(client.domains.CreateDomain, request("web", "root"), domain_pb2.Domain)
        await client.close()


@pytest.mark.parametrize("faults", [{}, failing("probe", 2)], ids=["at once", "late"])
async def test_after_a_boot_guests_have_ended_and_autostart_waits_for_the_driver(
    process: Process, faults: Mapping[str, Any]
) -> None:
    client = await process.start()
    spec = domain_spec_pb2.DomainSpec(autostart=resource_pb2.AUTOSTART_ALWAYS)
    await client.create("web", spec=spec, start=True)
    await client.create("idle", spec=spec)
    await client.create("rest", start=True)
    await client.close()
    await process.kill()
    # The boot has ended the guests.
    (process.path / "guests").unlink()
    with closing(sqlite3.connect(process.path / "s" / "compute.db")) as store, store:
        changed = store.execute("UPDATE records SET body = ? WHERE space = 'service' AND key = 'boot_id'", (b"other",))
        assert changed.rowcount == 1
    client = await again(process, faults)
    for id_ in ("idle", "web"):
        await client.until(id_, State.DOMAIN_STATE_RUNNING, seconds=30)
    rest = await client.until("rest", State.DOMAIN_STATE_SHUT_OFF)
    assert rest.status.state_reason == domain_pb2.DOMAIN_STATE_REASON_NODE_REBOOTED
    await client.close()


class Node:
    """A launcher, and a compute service with the QEMU driver, each of which may come late."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.binary = folder / "qemu"
        self.launcher = Launcher(folder)
        self.launcher.flags += ["--executable", str(self.binary)]

    @contextlib.asynccontextmanager
    async def service(self) -> AsyncIterator[Service]:
        async with service(
            self.folder,
            enabled_drivers=("qemu",),
            guest_uid_first=UID,
            guest_uid_count=10,
            launcher_socket=self.launcher.run / "compute.sock",
            drivers={"qemu": {"binary": str(self.binary), "accelerator": "tcg"}},
        ) as made:
            yield made

    def install(self, text: str = f'#!/bin/sh\nexec {QEMU} "$@"\n') -> None:
        fresh = self.folder / "fresh"
        fresh.write_text(text)
        fresh.chmod(0o755)
        fresh.rename(self.binary)


@pytest.fixture
async def real() -> AsyncIterator[Node]:
    folder = Path(tempfile.mkdtemp(prefix="vfq"))
    folder.chmod(0o711)
    node = Node(folder)
    try:
        yield node
    finally:
        await asyncio.to_thread(node.launcher.clean)
        shutil.rmtree(folder)


def small() -> domain_spec_pb2.DomainSpec:
    spec = domain_spec_pb2.DomainSpec()
    spec.memory.maximum_bytes = 16 << 20
    return spec


async def test_qemu_that_is_installed_later_is_found_at_the_next_use(real: Node) -> None:
    real.launcher.start()
    async with real.service() as node:
        with pytest.raises(Refused) as refused:
            await node.create("web", spec=small())
        assert (refused.value.code, refused.value.reason) == (14, "DRIVER_BROKEN")
        assert str(real.binary) in refused.value.metadata["cause"]
        real.install()
        await asyncio.sleep(1.1)
        domain = await node.create("web", spec=small(), start=True)
        assert domain.status.state == State.DOMAIN_STATE_RUNNING
        assert domain.status.resolved_spec.os.machine.startswith("pc-i440fx-")
        await until_ready(node, "qemu")
        # Removed again: told at the next use, and what runs runs on.
        real.binary.unlink()
        with pytest.raises(Refused) as refused:
            await node.create("idle", spec=small())
        assert refused.value.reason == "DRIVER_BROKEN"
        assert (await node.get("web")).status.state == State.DOMAIN_STATE_RUNNING
        await node.stop("web")


async def test_a_launcher_that_comes_late_is_found(real: Node) -> None:
    real.install()
    async with real.service() as node:
        host = await node.call(node.hosts.GetHost, host_pb2.GetHostRequest(name=f"{PARENT}/host"))
        assert list(host.status.isolation_layers) == []
        assert "launcher" in (await driver(node, "qemu")).status.init_error.message
        begun = time.monotonic()
        with pytest.raises(Refused) as refused:
            await node.create("web", spec=small())
        assert refused.value.reason == "DRIVER_BROKEN"
        # Who asks is not held up for as long as the launcher may take to answer.
        assert time.monotonic() - begun < 3
        real.launcher.start()
        await until_ready(node, "qemu")
        host = await node.call(node.hosts.GetHost, host_pb2.GetHostRequest(name=f"{PARENT}/host"))
        layers = {one.name: one.enabled for one in host.status.isolation_layers}
        assert layers["seccomp"]
        assert layers["user"]
        assert all(one.reason for one in host.status.isolation_layers)
        await node.create("web", spec=small(), start=True)
        await node.stop("web")


WITHOUT_SECCOMP = f"""#!/usr/bin/python3 -I
# QEMU where the system call seccomp (317) is refused, so that it knows no -sandbox.
import ctypes, os, struct, sys

program = struct.pack("HBBI" * 4, 0x20, 0, 0, 0, 0x15, 0, 1, 317, 0x06, 0, 0, 0x00050001, 0x06, 0, 0, 0x7FFF0000)
buffer = ctypes.create_string_buffer(program)
filter = struct.pack("HxxxxxxQ", 4, ctypes.addressof(buffer))
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, filter, 0, 0):
    sys.exit(os.strerror(ctypes.get_errno()))
os.execv({QEMU!r}, [{QEMU!r}, *sys.argv[1:]])
"""


async def test_a_qemu_that_takes_the_place_of_another_is_asked_what_it_is(real: Node) -> None:
    real.launcher.start()
    real.install()
    async with real.service() as node:
        first = await node.create("web", spec=small(), start=True)
        await node.stop("web")
        # An upgrade under the running service: the new one lacks what the old one had.
        real.install(WITHOUT_SECCOMP)
        second = await node.start("web")
        assert second.status.state == State.DOMAIN_STATE_RUNNING
        # The guest's hardware is as it was.
        assert second.status.resolved_spec == first.status.resolved_spec
        argv = Path(f"/proc/{second.status.pid}/cmdline").read_text().split("\0")
        assert "-sandbox" not in argv
        await node.stop("web")


@pytest.fixture
async def tight(place: Path) -> AsyncIterator[Path]:
    """A place whose state is on a disk of 4 MiB."""
    (place / "s").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place / "s"], check=True)
    yield place
    subprocess.run(["umount", "--lazy", place / "s"], check=True)


def fill(place: Path) -> Path:
    filler = place / "s" / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


async def test_the_end_of_a_guest_on_a_full_disk_is_recorded_when_there_is_room(tight: Path) -> None:
    async with service(tight) as node:
        spec = domain_spec_pb2.DomainSpec()
        spec.test.power_off_delay.CopyFrom(seconds(1))
        await node.create("web", spec=spec, start=True)
        filler = fill(tight)
        await asyncio.sleep(3)
        assert (await node.get("web")).status.state == State.DOMAIN_STATE_RUNNING
        filler.unlink()
        await node.until("web", State.DOMAIN_STATE_SHUT_OFF)


async def test_autostart_waits_while_the_disk_is_full(tight: Path) -> None:
    spec = domain_spec_pb2.DomainSpec(autostart=resource_pb2.AUTOSTART_ALWAYS)
    async with service(tight) as node:
        for number in range(6):
            await node.create(f"d{number}", spec=spec)
        await forget_boot(node)
    faults = {"test": {"faults": [{"method": "start", "reason": "BACKEND_UNREACHABLE", "count": 6}]}}
    async with service(tight, drivers=faults) as node:
        filler = fill(tight)
        await asyncio.sleep(3)
        filler.unlink()
        for number in range(6):
            await node.until(f"d{number}", State.DOMAIN_STATE_RUNNING, seconds=20)

"""Devices of every kind, asked of QEMU itself; images, taps, counters, live changes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.qemu import running, sectors
from tests.integration.qemu.running import FileConnection, Node, console_text, consoles, facts, serial_spec
from virtfleet.compute.v1 import device_pb2, domain_spec_pb2, stats_pb2
from virtfleet_compute.drivers.api import StartPlan, TapConnection
from virtfleet_compute.drivers.facets import ConsoleSession, LiveUpdate, Stats
from virtfleet_compute.drivers.qemu import naming
from virtfleet_service.errors import QuotaExceeded

MIB = 1024 * 1024
MAC = "52:54:00:12:34:56"


async def ask(node: Node, plan: StartPlan, command: str, arguments: dict[str, object] | None = None) -> Any:
    guest = node.driver._guests.active(plan.domain.uid)
    assert guest is not None
    return await node.driver._guests.ask(guest, command, arguments)


def counters(node: Node) -> Stats:
    found = node.driver.facet(Stats)  # type: ignore[type-abstract]  # a protocol is what names a facet
    assert found is not None
    return found


def image(node: Node, name: str, format_: str, *, backing: Path | None = None, size: str = "8M") -> Path:
    path = node.folder / name
    behind = ["-b", str(backing), "-F", "qcow2"] if backing is not None else []
    subprocess.run(["qemu-img", "create", "-q", "-f", format_, *behind, str(path), size], check=True)
    path.chmod(0o666)
    return path


async def test_as_many_ports_as_a_spec_may_have(node: Node) -> None:
    spec = serial_spec()
    for number in range(1, 4):
        spec.serials[f"tty{number}"].log_bytes = 4096
    for number in range(16):
        spec.consoles[f"hvc{number}"].log_bytes = 4096
    plan = await node.plan(spec)
    assert facts(await node.driver.start(plan)) == ("RUNNING", "BOOTED")
    ports = {device["label"] for device in await ask(node, plan, "query-chardev")}
    assert len([label for label in ports if label.startswith("c.")]) == 20
    assert facts(await node.driver.stop(plan.domain)) == ("SHUT_OFF", "DESTROYED")


async def test_more_readers_than_a_port_has_are_told_so(node: Node) -> None:
    plan = await node.plan(serial_spec())
    await node.driver.start(plan)
    found = consoles(node.driver)
    readers: list[ConsoleSession] = []

    async def fill() -> None:
        while len(readers) < 100:
            readers.append(await found.read_console_log(plan.domain, "tty", epoch="", offset=0, follow=True))

    with pytest.raises(QuotaExceeded) as refused:
        await fill()
    # Whoever comes looks first where the end is, and is two readers for a moment.
    assert len(readers) in (63, 64)
    assert (refused.value.resource, refused.value.metadata["device_id"]) == (plan.domain.name, "tty")
    for reader in readers:
        await reader.close()
    readers.clear()
    async with asyncio.timeout(10):
        while not readers:
            # The launcher hears of those who left one by one.
            with contextlib.suppress(QuotaExceeded):
                readers.append(await found.read_console_log(plan.domain, "tty", epoch="", offset=0, follow=False))
    await readers[0].close()


@pytest.mark.parametrize("machine", ["pc", "q35"])
async def test_every_device_is_there(node: Node, machine: str) -> None:  # noqa: PLR0915  # a list of devices
    spec = serial_spec(64)
    spec.os.machine = machine
    spec.cpu.vcpu_count = 2
    spec.cpu.maximum_vcpu_count = 4
    disks = {}
    buses = [device_pb2.DISK_BUS_VIRTIO, device_pb2.DISK_BUS_SCSI, device_pb2.DISK_BUS_SATA]
    buses += [device_pb2.DISK_BUS_IDE] if machine == "pc" else []
    for number, bus in enumerate(buses):
        for format_ in ("raw", "qcow2"):
            key = f"a-disk-with-quite-a-name-{number}{format_[0]}"
            spec.disks[key].volume = f"pools/p/volumes/{key}"
            spec.disks[key].bus = bus
            disks[key] = FileConnection(str(image(node, key, format_)), format_)
    spec.disks["cd"].empty.SetInParent()
    spec.disks["cd"].device = device_pb2.DISK_DEVICE_CDROM
    spec.disks["cd"].throttle.iops_max = 100
    caches = [device_pb2.DISK_CACHE_NONE, device_pb2.DISK_CACHE_DIRECTSYNC, device_pb2.DISK_CACHE_UNSAFE]
    for number, cache in enumerate(caches):
        key = f"cache{number}"
        spec.disks[key].volume = f"pools/p/volumes/{key}"
        spec.disks[key].cache = cache
        spec.disks[key].io = device_pb2.DISK_IO_NATIVE if number < 2 else device_pb2.DISK_IO_IO_URING
        spec.disks[key].detect_zeroes = True
        spec.disks[key].throttle.iops_max = 100
        spec.disks[key].shareable = number == 2
        disks[key] = FileConnection(str(image(node, key, "raw")), "raw")
    models = [device_pb2.INTERFACE_MODEL_VIRTIO, device_pb2.INTERFACE_MODEL_E1000, device_pb2.INTERFACE_MODEL_RTL8139]
    models += [device_pb2.INTERFACE_MODEL_E1000E] if machine == "q35" else []
    for model in models:
        spec.interfaces[f"lan{model}"].model = model
    spec.interfaces["lan1"].mac_address = MAC
    spec.interfaces["lan1"].link_up = False
    spec.consoles["hvc"].SetInParent()
    spec.consoles["log"].SetInParent()
    spec.rngs["rng"].bytes_per_second_max = 4096
    spec.balloons["balloon"].free_page_reporting = True
    spec.watchdogs["dog"].action = device_pb2.WATCHDOG_ACTION_PAUSE
    spec.panics["panic"].SetInParent()
    spec.memory.current_bytes = 32 * MIB
    plan = await node.plan(spec, paused=True, disks=disks)
    await node.driver.start(plan)
    said = (await node.launcher.client().log(f"qemu-{plan.domain.uid}")).decode().splitlines()
    assert [text for text in said if "has no peer" not in text] == []
    attached = {
        naming.disk(naming.disk_id(block["qdev"])): block["inserted"]
        for block in await ask(node, plan, "query-block")
        if "inserted" in block
    }
    assert set(attached) == {f"disk.{key}" for key in disks}
    assert {key: found["file"] for key, found in attached.items()} == {
        f"disk.{key}": connection.path for key, connection in disks.items()
    }
    assert attached["disk.cache0"]["cache"] == {"no-flush": False, "direct": True, "writeback": True}
    assert attached["disk.cache1"]["cache"] == {"no-flush": False, "direct": True, "writeback": False}
    assert attached["disk.cache2"]["cache"] == {"no-flush": True, "direct": False, "writeback": True}
    assert {key: found["iops"] for key, found in attached.items() if found["iops"]} == {
        f"disk.cache{number}": 100 for number in range(3)
    }
    # Where the spec says they are.
    [bus] = await ask(node, plan, "query-pci")
    slots = {device["qdev_id"]: device["slot"] for device in bus["devices"] if device["qdev_id"]}
    assert {key: slots[f"net.{key}"] for key in plan.spec.interfaces} == {
        key: card.slot for key, card in plan.spec.interfaces.items()
    }
    mac = await ask(node, plan, "qom-get", {"path": "/machine/peripheral/net.lan1", "property": "mac"})
    assert mac == MAC
    status = await ask(node, plan, "query-version")
    assert f"{status['qemu']['major']}." in (await node.driver.probe()).version
    # Paused before the first instruction, every limit stands.
    assert facts(await node.driver.inspect(plan.domain)) == ("PAUSED", "STARTED_PAUSED")
    await node.driver.stop(plan.domain)


async def test_backing_chain_is_what_storage_says(node: Node) -> None:
    """The image's own idea of what is behind it is never looked at."""
    base = image(node, "base.qcow2", "qcow2")
    subprocess.run(["qemu-io", "-c", "write -P 0x5a 0 64k", str(base)], check=True, stdout=subprocess.DEVNULL)
    middle = image(node, "middle.qcow2", "qcow2", backing=base)
    top = image(node, "top.qcow2", "qcow2", backing=middle)
    lying = node.folder / "elsewhere"
    subprocess.run(["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", str(lying), "-F", "raw", str(top)], check=True)
    for path in (base, middle):
        path.chmod(0o444)
    spec = sectors.spec()
    chain = (running.BackingFile(str(middle), "qcow2"), running.BackingFile(str(base), "qcow2"))
    plan = await node.plan(spec, paused=True, disks={"root": FileConnection(str(top), "qcow2", chain)})
    started = await node.driver.start(plan)
    opened = {
        str(link.readlink()): (link.parent.parent / "fdinfo" / link.name).read_text()
        for link in Path(f"/proc/{started.pid}/fd").iterdir()
    }
    flags = {path: int(text.split("flags:\t")[1].split()[0], 8) & os.O_ACCMODE for path, text in opened.items()}
    assert {flags[str(path)] for path in (base, middle)} == {os.O_RDONLY}
    assert flags[str(top)] == os.O_RDWR
    assert str(lying) not in opened
    await node.driver.stop(plan.domain)
    # An image that names a file, of which storage says that there is none: nothing is opened but itself.
    plan = await node.plan(spec, paused=True, disks={"root": FileConnection(str(top), "qcow2")})
    started = await node.driver.start(plan)
    links = {str(link.readlink()) for link in Path(f"/proc/{started.pid}/fd").iterdir()}
    assert not links & {str(base), str(middle), str(lying)}
    await node.driver.stop(plan.domain)


async def test_raw_disk_stays_raw_whatever_the_guest_writes(node: Node) -> None:
    disk = image(node, "inner.qcow2", "qcow2")
    plan = await node.plan(sectors.spec(), paused=True, disks={"root": FileConnection(str(disk), "raw")})
    await node.driver.start(plan)
    [block] = [block for block in await ask(node, plan, "query-block") if "inserted" in block]
    assert block["inserted"]["drv"] == "raw"
    assert block["inserted"]["image"]["virtual-size"] == -(-disk.stat().st_size // 512) * 512
    await node.driver.stop(plan.domain)


async def test_write_error_pauses_the_guest_and_names_the_disk(node: Node) -> None:
    """The image lies on a file system that is far too small for it."""
    small = node.folder / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], check=True)
    try:
        boot, full = node.folder / "boot.raw", small / "full.raw"
        # Write the sector at 0x7c00 to the second disk for ever, a head further each time: xor bx, bx; mov es, bx;
        # mov bx, 0x7c00; mov di, 0; again: inc di; mov ax, di; mov dh, al; mov ax, 0x0301; mov cx, 1; mov dl, 0x81;
        # mov al, 0x3f (sectors in one go); int 0x13; jmp again.
        code = b"\x31\xdb\x8e\xc3\xbb\x00\x7c\xbf\x00\x00\x47\x89\xf8\x88\xc6\xb0\x01\xb4\x03\xb9\x01\x00\xb2\x81\xb0\x3f\xcd\x13"
        code += b"\xeb\xec"
        sectors.write_disk(boot, code)
        full.write_bytes(b"")
        os.truncate(full, 64 * MIB)
        full.chmod(0o666)
        small.chmod(0o777)
        spec = sectors.spec()
        spec.disks["data"].volume = "pools/p/volumes/data"
        spec.disks["root"].boot_order = 1
        disks = {"root": FileConnection(str(boot), "raw"), "data": FileConnection(str(full), "raw")}
        plan = await node.plan(spec, disks=disks)
        await node.driver.start(plan)
        event = await node.event(running.EventKind.IO_ERROR, plan.domain.uid)
        assert (event.device_id, event.cause, event.paused) == ("data", "enospc", True)
        told = await node.event(running.EventKind.STATE_CHANGED, plan.domain.uid, state=running.PAUSED)
        assert told.observation is not None
        assert facts(told.observation) == ("PAUSED", "IO_ERROR")
        assert [(each.device_id, each.error) for each in told.observation.disk_errors] == [("data", "enospc")]
        # The next instance sees it too.
        await node.leave()
        [found] = await (await node.enter()).list()
        assert facts(found) == ("PAUSED", "IO_ERROR")
        assert [(each.device_id, each.error) for each in found.disk_errors] == [("data", "enospc")]
        await node.driver.stop(plan.domain)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


@pytest.fixture
async def networked() -> AsyncIterator[tuple[Node, str, list[str]]]:
    """A node whose launcher lives in a network namespace with a tap."""
    space, tap = f"vfq-{uuid.uuid4().hex[:8]}", "tap0"
    subprocess.run(["ip", "netns", "add", space], check=True)
    inside = ["ip", "netns", "exec", space]
    try:
        subprocess.run([*inside, "ip", "tuntap", "add", "dev", tap, "mode", "tap", "vnet_hdr"], check=True)
        subprocess.run([*inside, "ip", "link", "set", tap, "up"], check=True)
        async with running.node(prefix=inside) as made:
            await made.enter()
            yield made, tap, inside
    finally:
        subprocess.run(["ip", "netns", "delete", space], check=True)


async def test_card_is_on_its_tap_and_counted(networked: tuple[Node, str, list[str]]) -> None:
    node, tap, inside = networked
    spec = serial_spec()
    spec.interfaces["lan"].network = "networks/n"
    spec.interfaces["lan"].boot_order = 1
    spec.interfaces["lan"].mac_address = MAC
    plan = await node.plan(spec, interfaces={"lan": TapConnection(tap, "br0", MAC, 1500, "p")})
    started = await node.driver.start(plan)
    fds = Path(f"/proc/{started.pid}/fdinfo").iterdir()
    assert any(f"iff:\t{tap}\n" in path.read_text() for path in fds)
    facet = counters(node)
    # Its ROM asks for an address.
    async with asyncio.timeout(20):
        while True:
            [answer] = await facet.domain_stats([plan.domain], frozenset({stats_pb2.STATS_GROUP_INTERFACE}))
            [card] = answer.interfaces
            if card.transmitted_packets_count:
                break
            await asyncio.sleep(0.1)
    link = json.loads(subprocess.check_output([*inside, "ip", "-s", "-j", "link", "show", tap]))[0]
    assert card.device_id == "lan"
    assert card.host_device == tap
    assert 0 < card.transmitted_bytes <= link["stats64"]["rx"]["bytes"]
    await node.driver.stop(plan.domain)


async def test_counters_move(node: Node) -> None:
    path = node.folder / "boot.raw"
    sectors.write_disk(path, sectors.say("A\n") + b"\xeb\xfe")
    spec = sectors.spec()
    spec.balloons["balloon"].SetInParent()
    connection = FileConnection(str(path), "raw", capacity_bytes=path.stat().st_size)
    plan = await node.plan(spec, disks={"root": connection})
    started = await node.driver.start(plan)
    await console_text(node, plan.domain, b"A")
    facet = counters(node)
    every = frozenset(stats_pb2.StatsGroup.values())
    gone = running.new_domain()
    first, absent = await facet.domain_stats([plan.domain, gone], every)
    assert absent == stats_pb2.DomainStats()
    [disk] = first.disks
    assert disk.device_id == "root"
    assert disk.reads_count > 0
    assert disk.read_bytes >= 512
    assert disk.capacity_bytes == disk.physical_bytes == path.stat().st_size
    assert first.balloon.current_bytes == first.balloon.maximum_bytes == 16 * MIB
    resident = int(Path(f"/proc/{started.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert abs(first.memory.resident_bytes - resident) < 8 * MIB
    await asyncio.sleep(0.1)
    [second] = await facet.domain_stats([plan.domain], every)
    assert second.cpu.total_time.ToNanoseconds() >= first.cpu.total_time.ToNanoseconds()
    assert second.vcpus[0].total_time.ToNanoseconds() > first.vcpus[0].total_time.ToNanoseconds()
    await node.driver.stop(plan.domain)


async def test_changes_go_live_and_are_there_after_a_restart(node: Node) -> None:
    path = node.folder / "boot.raw"
    sectors.write_disk(path, sectors.POWER_OFF)
    spec = sectors.spec()
    spec.balloons["balloon"].SetInParent()
    spec.interfaces["lan"].SetInParent()
    spec.disks["cd"].empty.SetInParent()
    spec.disks["cd"].device = device_pb2.DISK_DEVICE_CDROM
    plan = await node.plan(spec, paused=True, disks={"root": FileConnection(str(path), "raw")})
    await node.driver.start(plan)
    facet = node.driver.facet(LiveUpdate)  # type: ignore[type-abstract]  # a protocol is what names a facet
    assert facet is not None
    wanted = domain_spec_pb2.DomainSpec()
    wanted.CopyFrom(plan.spec)
    wanted.disks["root"].throttle.bytes_per_second_max = 1 * MIB
    wanted.disks["cd"].throttle.iops_max = 100
    wanted.interfaces["lan"].link_up = False
    wanted.memory.current_bytes = 8 * MIB
    wanted.on_exit.power_off = domain_spec_pb2.EXIT_ACTION_PRESERVE
    wanted.cpu.vcpu_count = 2
    paths = [
        "spec.disks.cd.throttle",
        "spec.disks.root.throttle",
        "spec.interfaces.lan.link_up",
        "spec.memory.current_bytes",
        "spec.on_exit.power_off",
        "spec.cpu.vcpu_count",
    ]
    found = facet.plan_live_update(plan.spec, wanted, paths)
    assert list(found.live) == paths[:5]
    assert [(path_, reason) for path_, reason, _ in found.refused] == [("spec.cpu.vcpu_count", "NEEDS_RESTART")]
    await facet.update_live(plan.domain, plan.spec, wanted, found.live)
    blocks = [block["inserted"] for block in await ask(node, plan, "query-block") if "inserted" in block]
    assert blocks[0]["bps"] == 1 * MIB
    await node.leave()
    [seen] = await (await node.enter()).list()
    assert seen.active_spec is not None
    assert seen.active_spec.disks["root"].throttle.bytes_per_second_max == 1 * MIB
    assert not seen.active_spec.interfaces["lan"].link_up
    assert seen.active_spec.cpu.vcpu_count == 1
    node.heard.clear()
    await node.driver.resume(plan.domain)
    told = await node.event(running.EventKind.STATE_CHANGED, plan.domain.uid, state=running.PAUSED)
    assert told.observation is not None
    assert facts(told.observation) == ("PAUSED", "GUEST_SHUTDOWN")
    await node.driver.stop(plan.domain)

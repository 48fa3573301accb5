"""The small guest does what its description says, in a real QEMU without KVM."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from qemu.qmp import QMPClient

from tools import guest_image

MAC = "52:54:00:ab:cd:ef"
NONCE = "n0nce-1"
# What slirp's DHCP server gives to its first client.
ADDRESS = "10.0.2.15"


@dataclass
class Guest:
    process: asyncio.subprocess.Process
    monitor: QMPClient
    heard: list[str]

    async def line(self, pattern: str, seconds: float = 20) -> re.Match[str]:
        """Wait for a console line that matches as a whole."""
        assert self.process.stdout
        try:
            async with asyncio.timeout(seconds):
                while raw := await self.process.stdout.readline():
                    self.heard.append(raw.decode(errors="replace").strip())
                    if found := re.fullmatch(pattern, self.heard[-1]):
                        return found
        except TimeoutError:
            pytest.fail(f"no line {pattern!r}; the console said:\n" + "\n".join(self.heard))
        pytest.fail(f"console ended without {pattern!r}:\n" + "\n".join(self.heard))

    async def say(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line.encode() + b"\n")
        await self.process.stdin.drain()


@contextlib.asynccontextmanager
async def booted(folder: Path, machine: str) -> AsyncIterator[Guest]:
    image = guest_image.make()
    socket = folder / "qmp"
    arguments = [
        *("-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot", "-m", "160"),
        *("-machine", machine, "-cpu", "qemu64,-x2apic", "-accel", "tcg,tb-size=256"),
        *("-kernel", str(image.kernel), "-initrd", str(image.initrd)),
        *("-append", guest_image.command_line(NONCE)),
        *("-netdev", "user,id=n0,restrict=on", "-device", f"virtio-net-pci,netdev=n0,mac={MAC},romfile="),
        *("-qmp", f"unix:{socket},server=on,wait=on"),
    ]
    process = await asyncio.create_subprocess_exec(
        "qemu-system-x86_64", *arguments, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    monitor = QMPClient("guest")
    try:
        while not socket.exists():
            assert process.returncode is None
            await asyncio.sleep(0.01)
        await monitor.connect(str(socket))
        yield Guest(process, monitor, [])
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        with contextlib.suppress(EOFError):
            await monitor.disconnect()


@pytest.mark.parametrize("machine", ["pc,hpet=off,smm=off,vmport=off", "q35"])
async def test_guest_answers_nonce_and_obeys_power_button(tmp_path: Path, machine: str) -> None:
    async with booted(tmp_path, machine) as guest:
        pending = {guest_image.console_line(NONCE, MAC, ADDRESS), "READY"}
        while pending:
            found = await guest.line(r"(VIRTFLEET \w+|READY)(?: [\d.]+)?")
            pending.remove(found[1])
        await guest.say("uptime")
        first = float((await guest.line(r"UPTIME ([\d.]+)"))[1])
        await guest.say("tick")
        assert float((await guest.line(r"UPTIME ([\d.]+)"))[1]) >= first
        assert float((await guest.line(r"UPTIME ([\d.]+)"))[1]) > first
        await guest.say("tock")
        await guest.say("run ip -4 address show dev eth0")
        await guest.line(rf".*inet {ADDRESS}/24 .*")
        await guest.line("DONE 0")
        start = time.monotonic()
        await guest.monitor.execute("system_powerdown")
        async with asyncio.timeout(5):
            assert await guest.process.wait() == 0
        assert time.monotonic() - start < 3


async def test_deaf_guest_ignores_power_button_and_reboots_on_ctrl_alt_del(tmp_path: Path) -> None:
    async with booted(tmp_path, "pc") as guest:
        await guest.line(r"READY [\d.]+")
        await guest.say("deaf")
        await guest.line("DEAF")
        await guest.monitor.execute("system_powerdown")
        await guest.say("tick")
        for _ in range(3):
            await guest.line(r"UPTIME [\d.]+")
        keys = [{"type": "qcode", "data": key} for key in ("ctrl", "alt", "delete")]
        await guest.monitor.execute("send-key", {"keys": keys})
        async with asyncio.timeout(5):
            # -no-reboot turns the guest's reset into an end.
            assert await guest.process.wait() == 0


def test_image_is_cached_and_deterministic(tmp_path: Path) -> None:
    image = guest_image.make(tmp_path / "one")
    again = guest_image.make(tmp_path / "two")
    assert image.initrd.read_bytes() == again.initrd.read_bytes()
    assert guest_image.make(tmp_path / "one") == image
    assert image.kernel.read_bytes()[:4] == b"\x7fELF"
    assert b"VIRTFLEET" in gzip.decompress(image.initrd.read_bytes())

"""The programs that it is for: QEMU, paused, and dnsmasq under an id of its own; and life without root."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.launcher.running import PROGRAM, PYTHON, SLEEP, UID, Launcher, status
from virtfleet_service.launcher import LauncherClient, LauncherError, Spawn, SpawnConsole, SpawnSocket, SpawnTap

QEMU = "/usr/bin/qemu-system-x86_64"
DNSMASQ = "/usr/sbin/dnsmasq"


async def message(reader: asyncio.StreamReader) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(await reader.readline())
    return value


@contextlib.asynccontextmanager
async def shake_hands(
    launcher: LauncherClient, guest: str
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    line = await launcher.open_socket(guest, "qmp")
    reader, writer = await asyncio.open_unix_connection(sock=line)
    try:
        assert "QMP" in await message(reader)
        writer.write(b'{"execute": "qmp_capabilities"}\n')
        assert await message(reader) == {"return": {}}
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_paused_qemu_shakes_hands_and_outlives_the_launcher(launcher: Launcher, compute: LauncherClient) -> None:
    tap = f"vfl{os.getpid() % 10**6}"
    subprocess.run(["ip", "tuntap", "add", "dev", tap, "mode", "tap", "vnet_hdr"], check=True)
    try:
        arguments = [
            *("-name", "g1", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-S"),
            *("-machine", "pc", "-accel", "tcg", "-m", "64"),
            *("-netdev", "tap,id=n0,fd={fd:n0}", "-device", "virtio-net-pci,netdev=n0,romfile=,mac=52:54:00:00:00:01"),
            *("-chardev", "socket,id=con,fd={fd:con},server=on,wait=off", "-device", "isa-serial,chardev=con"),
            *("-chardev", "socket,id=qmp,fd={fd:qmp},server=on,wait=off", "-mon", "chardev=qmp,mode=control"),
            *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        ]
        process = await compute.spawn(
            Spawn(
                "g1",
                "t",
                [QEMU, *arguments],
                uid=UID,
                sockets=[SpawnSocket("qmp"), SpawnSocket("con")],
                taps=[SpawnTap("n0", tap)],
                consoles=[SpawnConsole("con")],
            )
        )
        async with shake_hands(compute, "g1"):
            facts = status(process)
            assert (facts["Seccomp"], facts["NoNewPrivs"], facts["CapEff"]) == ("2", "1", "0" * 16)
            assert facts["Uid"].split()[0] == str(UID)
            assert f"iff:\t{tap}\n" in Path(f"/proc/{process.pid}/fdinfo/5").read_text()
        launcher.end()
        launcher.start()
        async with shake_hands(compute, "g1") as (reader, writer):
            writer.write(b'{"execute": "query-status"}\n')
            assert (await message(reader))["return"]["status"] == "prelaunch"
            writer.write(b'{"execute": "quit"}\n')
            assert (await compute.wait("g1")).code == 0
    finally:
        subprocess.run(["ip", "link", "delete", tap], check=True)


async def test_qemu_that_ends_at_once_tells_why(compute: LauncherClient) -> None:
    await compute.spawn(Spawn("broken", "t", [QEMU, "-no-such-flag"], uid=UID))
    assert (await compute.wait("broken")).code == 1
    assert b"-no-such-flag: invalid option" in await compute.log("broken")


async def test_dnsmasq_binds_its_ports_under_its_own_user(tmp_path: Path) -> None:
    running = Launcher(tmp_path)
    running.flags += ["--allow-root-helper", DNSMASQ]
    for name in ("net_bind_service", "net_admin", "net_raw"):
        running.flags += ["--ambient-capability", f"{DNSMASQ}={name}"]
    namespace = f"vfl-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", namespace], check=True)
    try:
        subprocess.run(["ip", "-n", namespace, "link", "set", "lo", "up"], check=True)
        subprocess.run(["ip", "-n", namespace, "address", "add", "10.99.0.1/24", "dev", "lo"], check=True)
        inside = ["ip", "netns", "exec", namespace]
        running.prefix = inside
        running.start()
        leases = tmp_path / "leases"
        leases.mkdir()
        os.chown(leases, UID, UID)
        tmp_path.chmod(0o711)
        for directory in tmp_path.parents:
            if str(directory).startswith(str(Path("/tmp"))) and directory != Path("/tmp"):
                directory.chmod(0o711)
        arguments = [
            *(DNSMASQ, "-k", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--log-facility=-", "--pid-file="),
            *("--interface=lo", "--bind-interfaces", "--listen-address=10.99.0.1", f"--dhcp-leasefile={leases}/leases"),
            *("--dhcp-range=10.99.0.10,10.99.0.20", "--host-record=probe.test,10.99.0.77"),
        ]
        client = running.client("network")
        for guest, spawn in {
            "own": Spawn(
                "own", "t", arguments, uid=UID, ambient_capabilities=["net_bind_service", "net_admin", "net_raw"]
            ),
            "root": Spawn("root", "t", [*arguments, "--user=root", "--group=root"], uid=0),
        }.items():
            process = await client.spawn(spawn)
            while b"started" not in (text := await client.log(guest)):
                assert (await client.inspect(guest)).state == "running", text
                await asyncio.sleep(0.02)
            facts = status(process)
            assert facts["Uid"].split() == [str(UID if guest == "own" else 0)] * 4
            if guest == "own":
                assert int(facts["CapEff"], 16) == 1 << 10 | 1 << 12 | 1 << 13
            listening = subprocess.run([*inside, "ss", "-Hlun"], check=True, capture_output=True, text=True).stdout
            assert "10.99.0.1:53" in listening
            assert ":67" in listening
            await client.kill(guest, "TERM")
            assert (await client.wait(guest)).code == 0
    finally:
        await asyncio.to_thread(running.clean)
        subprocess.run(["ip", "netns", "delete", namespace], check=True)


async def test_without_root_it_says_what_is_not_possible(tmp_path: Path) -> None:
    """In a user namespace of one id: no other user, no cgroup, all else as ever."""
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, UID, UID)
    for directory in home.parents:
        if directory.name.startswith("pytest-") or directory == tmp_path:
            directory.chmod(0o711)
    program = home / "virtfleet_launcher"
    shutil.copytree(PROGRAM.parent, program, ignore=shutil.ignore_patterns("__pycache__"))
    running = Launcher(home)
    running.run.mkdir()
    os.chown(running.run, UID, UID)
    running.program = program / "__main__.py"
    running.prefix = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"]
    running.prefix += ["unshare", "--user", "--map-root-user", "--net"]
    running.flags.append("--single-user")
    running.start()
    try:
        client = running.client()
        capabilities = await client.capabilities()
        assert capabilities.single_user
        for layer in ("user", "cgroup", "ambient_capabilities", "memory_limit"):
            assert not capabilities.layers[layer].possible
            assert capabilities.layers[layer].reason
        assert capabilities.layers["no_new_privs"].possible
        process = await client.spawn(Spawn("alone", "t", [SLEEP, "1000"]))
        assert status(process)["Uid"].split() == [str(UID)] * 4
        assert process.cgroup == ""
        assert process.cgroup_reason
        with pytest.raises(LauncherError) as refused:
            await client.spawn(Spawn("other", "t", [SLEEP, "1000"], uid=UID))
        assert refused.value.reason == "UID_REFUSED"
        await client.kill("alone")
        assert (await client.wait("alone")).signal == 9
        assert await client.forget("alone")
    finally:
        await asyncio.to_thread(running.clean)


async def test_settings_that_cannot_be_used_end_it_at_once(tmp_path: Path) -> None:
    for flags, text in (
        ([], b"run_dir: is missing"),
        (["--run-dir", "relative"], b"run_dir"),
        (["--run-dir", str(tmp_path), "--executable", "/bin/../bin/sh"], b"executables"),
        (["--run-dir", str(tmp_path), "--allow-root-helper", "/bin/sh"], b"allow_root_helpers"),
        (["--run-dir", str(tmp_path), "--uids", "0-100"], b"uids"),
        (["--config", str(tmp_path / "missing.toml")], b"config"),
    ):
        process = await asyncio.create_subprocess_exec(PYTHON, "-I", "-S", str(PROGRAM), *flags, stderr=subprocess.PIPE)
        _, told = await process.communicate()
        assert process.returncode == 2
        assert text in told

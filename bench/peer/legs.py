"""Runs libvirtd and its client and hands on what they found."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from bench import stage
from bench.figures import Figure
from bench.peer import pki
from bench.peer.daemon import PORT
from bench.stage import Stage
from tools.paths import ROOT

KEYS = ("peer_start_ms", "peer_list_1000_ms", "peer_fleet_50x100_ms")
_START_SECONDS = 60.0
"""The first start asks every QEMU of the machine what it can do."""
_CLIENT_SECONDS = 240.0


def wanted() -> bool:
    """Tell whether the peer is to be measured too."""
    return os.environ.get("PEER", "") not in ("", "0")


async def leg(on: Stage) -> list[Figure]:
    """Measure libvirt.

    Raises:
        RuntimeError: It is not installed, or does not run.
    """
    missing = [name for name in ("/usr/sbin/libvirtd", "/usr/sbin/virtlogd", "unshare") if shutil.which(name) is None]
    if missing:
        raise RuntimeError(f"{', '.join(missing)} not installed: apt install libvirt-daemon-system python3-libvirt")
    with tempfile.TemporaryDirectory(prefix="virtfleet-peer-") as name:
        folder = Path(name)
        # The users of libvirt's guests pass through.
        folder.chmod(0o755)
        await asyncio.to_thread(pki.make, folder / "pki")
        async with _daemon(folder):
            mib = on.times(int(os.environ.get("BENCH_MIB", "1024")), 64)
            found = await _client(folder, mib, quick=on.quick)
    version = int(found.pop("version")[0])
    note = f"libvirt {version // 1_000_000}.{version // 1000 % 1000}.{version % 1000}"
    return [Figure(key, value, unit, count, note) for key, (value, unit, count) in found.items()]


@asynccontextmanager
async def _daemon(folder: Path) -> AsyncIterator[None]:
    command = ["unshare", "--mount", "--propagation", "private", "/usr/bin/python3"]
    with (folder / "daemon.log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *command,
            str(ROOT / "bench/peer/daemon.py"),
            str(folder),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        await stage.listening(f"127.0.0.1:{PORT}", process, _START_SECONDS)
        yield
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _client(folder: Path, mib: int, *, quick: bool) -> dict[str, tuple[float, str, int]]:
    process = await asyncio.create_subprocess_exec(
        "/usr/bin/python3",
        str(ROOT / "bench/peer/client.py"),
        str(folder),
        str(mib),
        "quick" if quick else "full",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, problems = await asyncio.wait_for(process.communicate(), _CLIENT_SECONDS)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise RuntimeError(f"the client of libvirt failed:\n{problems.decode(errors='replace')}")
    found: dict[str, tuple[float, str, int]] = json.loads(out)
    return found

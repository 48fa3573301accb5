"""An upload through the gateway against a two-hop TLS copy with the same digest and fsync.

Random bytes, so that nothing can be left out or compressed. Both senders read the file once for its digest first.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from google.protobuf import empty_pb2

from bench import samples, stage, tls_copy
from bench.figures import Figure
from bench.stage import Stage
from tools import fleet as development
from tools.paths import ROOT
from virtfleet.storage.v1 import pool_pb2, volume_pb2
from virtfleet_client import AsyncFleet, connect
from virtfleet_client.transfer import upload

KEYS = ("upload_over_tls",)
_MIB = 1 << 20
_SINK_PORT, _RELAY_PORT = 7191, 7192


async def leg(on: Stage) -> list[Figure]:
    """Measure both in turn."""
    fleet = await on.fleet()
    size = on.times(256, 32) * _MIB
    file = fleet.folder / "random.image"
    _fill(file, size)
    ours: list[float] = []
    theirs: list[float] = []
    growth: list[float] = []
    async with _volume(on, fleet, size) as volume, _copy(fleet) as (relay, files):
        for number, order in samples.rounds(("ours", "copy"), on.times(5, 2), on.chance):
            for variant in order:
                if variant == "ours":
                    took, grown = await _upload(fleet, volume, file)
                else:
                    took, grown = await asyncio.to_thread(_send, relay, files, file), 0.0
                if number:
                    (ours if variant == "ours" else theirs).append(took)
                    growth.append(grown)
    file.unlink()
    note = f"{size // _MIB} MiB of random bytes through the gateway; two-hop TLS copy, digest and fsync in both"
    return [
        Figure("upload_over_tls", samples.p50(theirs) / samples.p50(ours), "ratio", len(ours), note),
        Figure("upload_mb_per_second", size / 1e6 / samples.p50(ours), "MB/s", len(ours), "libvirt, one hop: 425-567"),
        Figure("tls_copy_mb_per_second", size / 1e6 / samples.p50(theirs), "MB/s", len(theirs)),
        Figure("upload_growth_mib", max(growth), "MiB", len(ours), "gateway and storage: high-water above before"),
    ]


def _fill(file: Path, size: int) -> None:
    with file.open("wb") as out:
        for _ in range(size // _MIB):
            out.write(os.urandom(_MIB))


async def _upload(fleet: development.Fleet, volume: str, file: Path) -> tuple[float, float]:
    pids = [stage.pid_of(fleet, name) for name in ("gateway", f"{stage.NODE}/storage")]
    for pid in pids:
        # Sets the high-water mark back.
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    before = sum(_status_mib(pid, "VmRSS") for pid in pids)

    def work() -> float:
        with connect(f"tls://{fleet.address}", stage.credentials(fleet)) as connection:
            began = time.perf_counter()
            upload(connection, volume, file)
            return time.perf_counter() - began

    took = await asyncio.to_thread(work)
    return took, sum(_status_mib(pid, "VmHWM") for pid in pids) - before


def _status_mib(pid: int, key: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def _send(relay: str, files: list[str], file: Path) -> float:
    began = time.perf_counter()
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").digest()
    with tls_copy.connect(relay, files) as line:
        if tls_copy.send(line, file) != digest:
            raise RuntimeError("the copy has another digest")
    return time.perf_counter() - began


@asynccontextmanager
async def _volume(on: Stage, fleet: development.Fleet, size: int) -> AsyncIterator[str]:
    gateway: AsyncFleet = await on.connect(fleet)
    parent, pool_id = f"nodes/{stage.NODE}", on.unique("upload")
    pool = pool_pb2.CreatePoolRequest(parent=parent, pool_id=pool_id, start=True)
    pool.pool.spec.dir.SetInParent()
    made = await stage.ready(gateway, await gateway.pools.CreatePool(pool), pool_pb2.Pool)
    request = volume_pb2.CreateVolumeRequest(parent=made.name, volume_id="data")
    request.volume.spec.format = volume_pb2.VOLUME_FORMAT_RAW
    request.volume.spec.capacity_bytes = size
    volume = await stage.ready(gateway, await gateway.volumes.CreateVolume(request), volume_pb2.Volume)
    yield volume.name
    delete = volume_pb2.DeleteVolumeRequest(name=volume.name)
    await stage.ready(gateway, await gateway.volumes.DeleteVolume(delete), empty_pb2.Empty)
    await stage.ready(gateway, await gateway.pools.StopPool(pool_pb2.StopPoolRequest(name=made.name)), pool_pb2.Pool)
    gone = pool_pb2.DeletePoolRequest(name=made.name)
    await stage.ready(gateway, await gateway.pools.DeletePool(gone), empty_pb2.Empty)


@asynccontextmanager
async def _copy(fleet: development.Fleet) -> AsyncIterator[tuple[str, list[str]]]:
    """Run relay and sink: the relay where the gateway is, the sink in the namespace of the node."""
    folder = fleet.folder / stage.NODE
    identity = folder / "state/identity"
    own = [str(identity / name) for name in ("storage.crt", "storage.key", "ca.crt")]
    # The folder of pools: the same file system.
    target = folder / "pools/copy"
    target.mkdir()
    sink = f"{fleet.networks[stage.NODE].address}:{_SINK_PORT}"
    relay = f"{fleet.networks[stage.NODE].outer_address}:{_RELAY_PORT}"
    async with AsyncExitStack() as stack:
        command = [sys.executable, "-m", "bench.tls_copy"]
        first = await stage.in_namespace(fleet, [*command, "sink", sink, str(target), *own], folder / "sink.log")
        stack.push_async_callback(_end, first)
        await stage.listening(sink, first)
        with (folder / "relay.log").open("ab") as log:
            second = await asyncio.create_subprocess_exec(
                *command, "relay", relay, sink, *own, cwd=ROOT, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
            )
        stack.push_async_callback(_end, second)
        await stage.listening(relay, second)
        files = fleet.credentials
        yield relay, [str(files[name]) for name in ("certificate", "key", "ca")]


async def _end(process: asyncio.subprocess.Process) -> None:
    process.kill()
    await process.wait()

"""An upload and a download through the gateway against a two-hop TLS copy with the same digest and fsync.

Random bytes, so that nothing can be left out or compressed. Both senders read the file once for its digest first, both
receivers of a download read theirs once at its end. `BENCH_MIB` sets the size.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf import empty_pb2

from bench import samples, stage, tls_copy
from bench.figures import Figure
from bench.stage import Stage
from tools import fleet as development
from tools.paths import ROOT
from virtfleet.storage.v1 import pool_pb2, volume_pb2
from virtfleet_client import AsyncFleet, connect
from virtfleet_client.sync import Fleet
from virtfleet_client.transfer import download, upload

KEYS = (
    "upload_over_tls",
    "download_over_tls",
    *(f"{way}_{process}_growth_mib" for way in ("upload", "download") for process in ("gateway", "storage")),
)
_MIB = 1 << 20
_SMALL_MIB = 64
_ROUND_SECONDS = 40.0
_SINK_PORT, _RELAY_PORT = 7191, 7192
_VARIANTS = ("upload", "upload copy", "download", "download copy")


@dataclass(slots=True)
class _Memory:
    """Is the high-water mark of each process that a transfer passes, by size and way."""

    pids: dict[str, int]
    marks: dict[tuple[str, str, int], float] = field(default_factory=dict)

    def begin(self) -> None:
        """Set the marks of the kernel back to what is there."""
        for pid in self.pids.values():
            Path(f"/proc/{pid}/clear_refs").write_text("5")

    def note(self, way: str, size_mib: int) -> None:
        """Note the marks at the end of a transfer."""
        for process, pid in self.pids.items():
            place = process, way, size_mib
            self.marks[place] = max(self.marks.get(place, 0.0), _high_mib(pid))


async def leg(on: Stage) -> list[Figure]:
    """Measure both ways and both kinds in turn: a small one first, which warms up and shows what a transfer needs."""
    fleet = await on.fleet()
    large = on.times(int(os.environ.get("BENCH_MIB", "1024")), 128)
    memory = _Memory(
        {"gateway": stage.pid_of(fleet, "gateway"), "storage": stage.pid_of(fleet, f"{stage.NODE}/storage")}
    )
    times: dict[str, list[float]] = {variant: [] for variant in _VARIANTS}
    async with _copy(fleet) as line:
        for size_mib, rounds in ((_SMALL_MIB, 2), (large, on.times(2, 1))):
            file = fleet.folder / "random.image"
            digest = await asyncio.to_thread(_fill, file, size_mib * _MIB)
            async with _volume(on, fleet, size_mib * _MIB) as volume:
                began = time.monotonic()
                for number in range(rounds):
                    if number and time.monotonic() > began + _ROUND_SECONDS:
                        # A slow disk: one round must do.
                        break
                    ways = on.chance.sample(_VARIANTS[:2], 2) + on.chance.sample(_VARIANTS[2:], 2)
                    for variant in ways:
                        memory.begin()
                        took = await _one(fleet, variant, volume, file, digest, line)
                        if variant in ("upload", "download"):
                            memory.note(variant, size_mib)
                        if size_mib == large:
                            times[variant].append(took)
            file.unlink()
    return _figures(times, memory, large)


def _figures(times: dict[str, list[float]], memory: _Memory, large: int) -> list[Figure]:
    found: list[Figure] = []
    for way in ("upload", "download"):
        ours, copy = times[way], times[f"{way} copy"]
        note = f"{large} MiB of random bytes through the gateway; two-hop TLS copy, digest and fsync in both"
        rate = large * _MIB / 1e6
        libvirt = "libvirt, one hop: 425-567" if way == "upload" else "libvirt, one hop: 439-532"
        found += [
            Figure(f"{way}_over_tls", samples.p50(copy) / samples.p50(ours), "ratio", len(ours), note),
            Figure(f"{way}_mb_per_second", rate / samples.p50(ours), "MB/s", len(ours), libvirt),
            Figure(f"tls_copy_{way}_mb_per_second", rate / samples.p50(copy), "MB/s", len(copy)),
        ]
        for process in memory.pids:
            small, high = memory.marks[process, way, _SMALL_MIB], memory.marks[process, way, large]
            growth = f"high-water of {high:.0f} MiB at {large} MiB above {small:.0f} at {_SMALL_MIB}"
            found += [
                Figure(f"{way}_{process}_growth_mib", high - small, "MiB", len(ours), growth),
                Figure(f"{way}_{process}_high_water_mib", high, "MiB", len(ours), "shared pages included"),
            ]
    return found


def _fill(file: Path, size: int) -> bytes:
    digest = hashlib.sha256()
    with file.open("wb") as out:
        for _ in range(size // _MIB):
            piece = os.urandom(_MIB)
            digest.update(piece)
            out.write(piece)
    return digest.digest()


async def _one(
    fleet: development.Fleet, variant: str, volume: str, file: Path, digest: bytes, line: tuple[str, list[str]]
) -> float:
    """Make one transfer; returns its seconds."""
    target = fleet.folder / "fetched.image"

    def up(connection: Fleet) -> None:
        upload(connection, volume, file)

    def down(connection: Fleet) -> None:
        download(connection, volume, target)
        with target.open("rb+") as written:
            if tls_copy.settled(written) != digest:
                raise RuntimeError("what came down is not what went up")

    if variant in ("upload", "download"):
        took = await asyncio.to_thread(_ours, fleet, up if variant == "upload" else down)
    else:
        took = await asyncio.to_thread(_theirs, variant, *line, file, target, digest)
    target.unlink(missing_ok=True)
    return took


def _ours(fleet: development.Fleet, work: Callable[[Fleet], None]) -> float:
    with connect(f"tls://{fleet.address}", stage.credentials(fleet)) as connection:
        began = time.perf_counter()
        work(connection)
        return time.perf_counter() - began


def _theirs(variant: str, relay: str, files: list[str], file: Path, target: Path, digest: bytes) -> float:
    began = time.perf_counter()
    if variant == "upload copy":
        with file.open("rb") as opened:
            hashlib.file_digest(opened, "sha256")
        with tls_copy.connect(relay, files) as line:
            found = tls_copy.send(line, file)
    else:
        with tls_copy.connect(relay, files) as line:
            found = tls_copy.fetch(line, target)
    if found != digest:
        raise RuntimeError("the copy has another digest")
    return time.perf_counter() - began


def _high_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


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

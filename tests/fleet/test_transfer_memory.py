"""Whoever is slow holds the sender back: no process of the fleet keeps what cannot go on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.empty_pb2 import Empty

from tests.fleet.rig import unique
from virtfleet.storage.v1 import pool_pb2, volume_pb2
from virtfleet_client import Fleet

MIB = 1 << 20
STEP_BYTES, STEPS = 64 * MIB, 4
HOLE_BYTES, DATA_BYTES = 512 * MIB, STEPS * STEP_BYTES
KEPT_LIMIT_MIB = 32
"""Far above the windows and batches of one stream, far below what a sender could push in."""
WATCHED_SECONDS = 1.5


class Memory:
    """The high-water marks of the processes that a transfer passes."""

    def __init__(self, run_folder: Path, node: str) -> None:
        files = {"gateway": run_folder / "gateway.pid", "storage": run_folder / node / "storage.pid"}
        self._pids = {name: int(file.read_text()) for name, file in files.items()}
        for pid in self._pids.values():
            # Sets the mark back to what is there.
            Path(f"/proc/{pid}/clear_refs").write_text("5")
        self._before = self._read("VmRSS")

    def _read(self, key: str) -> dict[str, float]:
        lines = {name: Path(f"/proc/{pid}/status").read_text().splitlines() for name, pid in self._pids.items()}
        return {
            name: next(int(line.split()[1]) for line in of if line.startswith(key)) / 1024 for name, of in lines.items()
        }

    def grown(self) -> dict[str, float]:
        """Return by how many MiB each was larger at most than in the beginning."""
        return {name: high - self._before[name] for name, high in self._read("VmHWM").items()}


@pytest.fixture
def volume(fleet: Fleet, nodes: list[str]) -> Iterator[volume_pb2.Volume]:
    """Yield a raw volume, most of it a hole."""
    request = pool_pb2.CreatePoolRequest(parent=nodes[0], pool_id=unique("slow"), start=True)
    request.pool.spec.dir.SetInParent()
    pool = fleet.wait(fleet.pools.CreatePool(request), pool_pb2.Pool)
    wanted = volume_pb2.CreateVolumeRequest(parent=pool.name, volume_id="disk")
    wanted.volume.spec.format = volume_pb2.VOLUME_FORMAT_RAW
    wanted.volume.spec.capacity_bytes = DATA_BYTES
    made = fleet.wait(fleet.volumes.CreateVolume(wanted), volume_pb2.Volume)
    yield made
    fleet.wait(fleet.volumes.DeleteVolume(volume_pb2.DeleteVolumeRequest(name=made.name)), Empty)
    fleet.wait(fleet.pools.StopPool(pool_pb2.StopPoolRequest(name=pool.name)), pool_pb2.Pool)
    fleet.wait(fleet.pools.DeletePool(pool_pb2.DeletePoolRequest(name=pool.name)), Empty)


def test_a_slow_disk_holds_the_sender_back(fleet: Fleet, volume: volume_pb2.Volume, run_folder: Path) -> None:
    memory = Memory(run_folder, volume.name.split("/")[1])
    length = STEPS * (HOLE_BYTES + STEP_BYTES)

    def messages() -> Iterator[volume_pb2.UploadVolumeRequest]:
        yield volume_pb2.UploadVolumeRequest(name=volume.name, start=volume_pb2.UploadStart(length_bytes=length))
        for offset in range(0, length, HOLE_BYTES + STEP_BYTES):
            # Zeros that need not be sent, but must be digested: storage is busy for a while, as if its disk were slow.
            hole = volume_pb2.UploadVolumeRequest()
            hole.chunk.offset, hole.chunk.hole_length = offset, HOLE_BYTES
            yield hole
            for start in range(offset + HOLE_BYTES, offset + HOLE_BYTES + STEP_BYTES, MIB):
                message = volume_pb2.UploadVolumeRequest()
                message.chunk.offset, message.chunk.data = start, data
                yield message

    data = bytes(MIB)
    answer = fleet.volumes.UploadVolume(messages())
    grown = memory.grown()
    assert answer.complete
    assert max(grown.values()) < KEPT_LIMIT_MIB, grown


def test_a_slow_reader_holds_the_volume_back(fleet: Fleet, volume: volume_pb2.Volume, run_folder: Path) -> None:
    with Path(volume.status.path).open("r+b") as file:
        file.writelines(b"d" * MIB for _ in range(DATA_BYTES // MIB))
    memory = Memory(run_folder, volume.name.split("/")[1])
    call = fleet.volumes.DownloadVolume(volume_pb2.DownloadVolumeRequest(name=volume.name))
    for count, _ in enumerate(call):
        if count == 4:
            break
    time.sleep(WATCHED_SECONDS)
    grown = memory.grown()
    call.cancel()
    assert max(grown.values()) < KEPT_LIMIT_MIB, grown

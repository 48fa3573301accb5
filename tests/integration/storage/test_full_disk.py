"""A pool on a file system that fills up: a small tmpfs in the mount namespace of the service's own process."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.storage.rig import MIB, PARENT, Refused, Rig
from virtfleet.storage.v1 import pool_pb2, volume_pb2, watch_pb2

SIZE = 16 * MIB
FULL = ("RESOURCE_EXHAUSTED", "POOL_FULL")


@pytest.fixture
async def small() -> AsyncIterator[Path]:
    with tempfile.TemporaryDirectory(prefix=f"vf-storage-full-{os.getpid()}-") as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", folder], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)


async def test_a_full_disk(node: Rig, small: Path) -> None:
    client = node.client
    place = small / "pool"
    pool = await client.pool("small", target_path=str(place))
    assert pool.status.capacity_bytes == SIZE
    await client.volume("small", "disk", capacity_bytes=MIB)
    old = (place / "disk").read_bytes()

    def clean(*names: str) -> None:
        assert sorted(path.name for path in place.iterdir()) == [".virtfleet", *sorted(names)]
        assert sorted(path.name for path in (place / ".virtfleet").iterdir()) == ["pool"]

    # Uploads.
    with pytest.raises(Refused) as refused:
        await client.upload("pools/small/volumes/disk", os.urandom(20 * MIB))
    assert refused.value.short == FULL
    assert (place / "disk").read_bytes() == old
    clean("disk")
    # Volumes made in advance, of either kind.
    specs: list[dict[str, Any]] = [
        {"format": volume_pb2.VOLUME_FORMAT_RAW, "preallocation": volume_pb2.PREALLOCATION_FULL},
        {"format": volume_pb2.VOLUME_FORMAT_QCOW2, "preallocation": volume_pb2.PREALLOCATION_FALLOC},
    ]
    for spec in specs:
        with pytest.raises(Refused) as refused:
            await client.volume("small", "large", capacity_bytes=20 * MIB, **spec)
        assert refused.value.short == FULL
        clean("disk")
    # A copy that does not fit, found out only while it is made.
    await client.pool("images")
    await client.volume("images", "source", capacity_bytes=20 * MIB)
    await client.upload("pools/images/volumes/source", os.urandom(20 * MIB))
    for format in (volume_pb2.VOLUME_FORMAT_RAW, volume_pb2.VOLUME_FORMAT_QCOW2):
        with pytest.raises(Refused) as refused:
            await client.volume("small", "copy", source="pools/images/volumes/source", format=format)
        assert refused.value.short == FULL
        clean("disk")
    # Growth with room taken at once.
    with pytest.raises(Refused) as refused:
        await client.do(
            client.volumes.ResizeVolume,
            volume_pb2.ResizeVolumeRequest(
                name=f"{PARENT}/pools/small/volumes/disk", capacity_bytes=20 * MIB, allocate=True
            ),
            volume_pb2.Volume,
        )
    assert refused.value.short == FULL
    assert (place / "disk").stat().st_size == MIB
    # Nearly full is told.
    (place / "filler").write_bytes(bytes(SIZE - MIB // 2))
    pool = await client.refresh("small")
    assert [one.type for one in pool.status.conditions] == ["LowSpace"]
    room = os.statvfs(place)
    assert pool.status.available_bytes == room.f_bavail * room.f_frsize
    assert watch_pb2.EVENT_TYPE_LOW_SPACE in [event.type for event in await client.events()]
    (place / "filler").unlink()
    pool = await client.refresh("small")
    assert list(pool.status.conditions) == []
    await client.call(client.pools.StopPool, pool_pb2.StopPoolRequest(name=pool.name))


async def test_an_upload_that_did_not_fit_goes_on_when_there_is_room(node: Rig, small: Path) -> None:
    client = node.client
    place = small / "pool"
    await client.pool("small", target_path=str(place))
    await client.volume("small", "disk")
    (place / "filler").write_bytes(bytes(8 * MIB))
    data = os.urandom(12 * MIB)
    with pytest.raises(Refused) as refused:
        await client.upload("pools/small/volumes/disk", data, upload_id="u1")
    assert refused.value.short == FULL
    (upload,) = (await client.get("pools/small/volumes/disk")).status.uploads
    assert 0 < upload.received_bytes < len(data)
    (place / "filler").unlink()
    answer = await client.upload("pools/small/volumes/disk", data, upload_id="u1", offset=upload.received_bytes)
    assert answer.complete
    assert (place / "disk").read_bytes() == data
    await client.call(client.pools.StopPool, pool_pb2.StopPoolRequest(name=f"{PARENT}/pools/small"))

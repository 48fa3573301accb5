"""A file system that hangs: frozen by the kernel, every change of it waits. What is elsewhere goes on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.storage.rig import MIB, PARENT, Process, Rig
from virtfleet.storage.v1 import pool_pb2
from virtfleet_service.errors import VirtfleetError

GUEST = 23456
DISK = "volumes/disk"


class Place:
    """Is a small ext4 of its own that can be frozen."""

    def __init__(self, base: Path) -> None:
        self.folder = base / "slow"
        self.folder.mkdir()
        image = base / "image"
        image.touch()
        os.truncate(image, 64 * MIB)
        subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", image], check=True)
        subprocess.run(["mount", "-o", "loop,acl", image, self.folder], check=True)
        self.frozen = False

    def freeze(self) -> None:
        subprocess.run(["fsfreeze", "--freeze", self.folder], check=True)
        self.frozen = True

    def thaw(self) -> None:
        if self.frozen:
            subprocess.run(["fsfreeze", "--unfreeze", self.folder], check=True)
            self.frozen = False

    def remove(self) -> None:
        self.thaw()
        subprocess.run(["umount", self.folder], check=True)


@pytest.fixture
async def base() -> AsyncIterator[Path]:
    with tempfile.TemporaryDirectory(prefix=f"vf-storage-{os.getpid()}-") as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)


@pytest.fixture
async def slow(base: Path) -> AsyncIterator[Place]:
    place = Place(base)
    try:
        yield place
    finally:
        place.remove()


async def test_a_pool_that_hangs_holds_up_no_other(base: Path, slow: Place) -> None:
    async with Rig(base).running() as rig:
        client = rig.client
        await client.pool("slow", target_path=str(slow.folder / "pool"))
        await client.pool("quick")
        for pool in ("slow", "quick"):
            for number in range(12):
                await client.volume(pool, f"disk{number}", capacity_bytes=MIB)
        held = [await rig.attach(f"pools/slow/volumes/disk{number}", uid=GUEST + number) for number in range(12)]
        slow.freeze()
        # The ends of guests, more of them than there are threads: each waits for the file system.
        ending = [
            asyncio.create_task(rig.release(f"pools/slow/volumes/disk{number}", one.attachment_id))
            for number, one in enumerate(held)
        ]
        await asyncio.sleep(0.5)
        async with asyncio.timeout(5):
            for number in range(12):
                one = await rig.attach(f"pools/quick/volumes/disk{number}", uid=GUEST)
                await rig.release(f"pools/quick/volumes/disk{number}", one.attachment_id)
            await client.volume("quick", "more", capacity_bytes=MIB)
            await client.refresh("quick")
        assert not any(task.done() for task in ending)
        slow.thaw()
        async with asyncio.timeout(10):
            for task in ending:
                with contextlib.suppress(VirtfleetError):
                    await task
        assert (slow.folder / "pool" / "disk0").stat().st_uid == os.getuid()


async def test_a_pool_that_hangs_does_not_keep_the_service_from_starting(base: Path, slow: Place) -> None:
    async with Rig(base).running() as rig:
        await rig.client.pool("slow", target_path=str(slow.folder / "pool"))
        await rig.client.pool("quick")
        await rig.client.volume("slow", "disk", capacity_bytes=MIB)
    # What a crash left, and the next start removes: there the start would wait.
    (slow.folder / "pool" / ".virtfleet" / "new-left").touch()
    slow.freeze()
    rig = Rig(base)
    process = Process(rig)

    async def state(pool: str) -> int:
        request = pool_pb2.GetPoolRequest(name=f"{PARENT}/pools/{pool}")
        found: pool_pb2.Pool = await rig.client.call(rig.client.pools.GetPool, request)
        return found.status.state

    try:
        await process.start()
        async with rig.clients():
            assert await state("quick") == pool_pb2.POOL_STATE_RUNNING
            assert await state("slow") == pool_pb2.POOL_STATE_INACCESSIBLE
            await rig.client.volume("quick", "disk", capacity_bytes=MIB)
            slow.thaw()
            async with asyncio.timeout(10):
                while await state("slow") != pool_pb2.POOL_STATE_RUNNING:
                    await asyncio.sleep(0.1)
            assert [path.name for path in (slow.folder / "pool" / ".virtfleet").iterdir()] == ["pool"]
            assert [volume.name for volume in await rig.client.volumes_of("slow")] == [f"{PARENT}/pools/slow/{DISK}"]
    finally:
        slow.thaw()
        await process.kill()

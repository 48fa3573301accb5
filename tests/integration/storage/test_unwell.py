"""Pools on a machine that is not well: the store's own disk is full, a file cannot be read, the kernel tells nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.integration.storage.rig import MIB, PARENT, Client, Process, Refused, Rig
from virtfleet.storage.v1 import pool_pb2, volume_pb2


def mounted(folder: Path, *argv: str) -> Callable[[], None]:
    subprocess.run(["mount", *argv, str(folder)], check=True)
    return lambda: subprocess.run(["umount", "--lazy", str(folder)], check=True).check_returncode()


def fill(path: Path) -> None:
    """Take all room that is left."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


async def until(client: Client, pool: str, names: set[str], seconds: float = 10) -> None:
    """Wait until a pool has volumes of exactly these files."""
    async with asyncio.timeout(seconds):
        while {volume.status.path.rpartition("/")[2] for volume in await client.volumes_of(pool)} != names:
            await asyncio.sleep(0.1)


async def test_a_store_whose_disk_was_full_goes_on_watching_pools() -> None:
    with tempfile.TemporaryDirectory(prefix=f"vf-storage-{os.getpid()}-") as folder:
        base = Path(folder)
        base.chmod(0o711)
        (base / "state").mkdir()
        unmount = mounted(base / "state", "-t", "tmpfs", "-o", "size=2m", "tmpfs")
        try:
            async with Rig(base, pools_root=base / "pools").running() as rig:
                await rig.client.pool("images")
                filler = base / "state" / "filler"
                fill(filler)
                found = [base / "pools" / "images" / f"found{number}" for number in range(200)]
                for path in found:
                    path.write_bytes(b"x")
                # Long enough for some looks at what cannot be recorded.
                await asyncio.sleep(3.5)
                assert await rig.client.volumes_of("images") == []
                filler.unlink()
                await until(rig.client, "images", {path.name for path in found})
                await rig.client.volume("images", "disk", capacity_bytes=MIB)
        finally:
            unmount()


async def test_one_file_that_cannot_be_read_costs_no_other(node: Rig) -> None:
    client = node.client
    await client.pool("images")
    await client.volume("images", "bad", capacity_bytes=MIB, format=volume_pb2.VOLUME_FORMAT_QCOW2)
    await client.volume("images", "good", capacity_bytes=MIB)
    pool = node.root / "images"
    # A regular file of one name that opens and then answers EIO, as one on a bad sector does.
    (pool / "unknown").write_bytes(b"x")
    undo = [mounted(pool / name, "--bind", f"/proc/{os.getpid()}/mem") for name in ("bad", "unknown")]
    try:
        await client.refresh("images")
        (pool / "fresh").write_bytes(b"x")
        await until(client, "images", {"bad", "good", "fresh"})
        bad = await client.get("pools/images/volumes/bad")
        assert bad.status.state == volume_pb2.VOLUME_STATE_REFUSED
        assert bad.status.state_reason == "BACKEND_UNREACHABLE"
        assert (await client.get("pools/images/volumes/good")).status.state == volume_pb2.VOLUME_STATE_READY
        await node.attach("pools/images/volumes/good")
    finally:
        for one in undo:
            one()
    await client.refresh("images")
    assert (await client.get("pools/images/volumes/bad")).status.state == volume_pb2.VOLUME_STATE_READY
    await client.get("pools/images/volumes/unknown")


@pytest.fixture
async def deaf() -> AsyncIterator[Rig]:
    """Run the service where the kernel gives nobody a means to hear of changes."""
    none = 'echo 0 > /proc/sys/user/max_inotify_instances && exec "$@"'
    with tempfile.TemporaryDirectory(prefix=f"vf-storage-{os.getpid()}-") as folder:
        Path(folder).chmod(0o711)
        rig = Rig(Path(folder))
        process = Process(rig, prefix=["unshare", "--user", "--map-root-user", "sh", "-c", none, "sh"])
        await process.start()
        try:
            async with rig.clients():
                yield rig
        finally:
            await process.kill()


async def test_without_word_from_the_kernel_changes_are_seen_all_the_same(deaf: Rig) -> None:
    await deaf.client.pool("images")
    await deaf.client.pool("more")
    (deaf.root / "images" / "found").write_bytes(b"x")
    (deaf.root / "more" / "found").write_bytes(b"x")
    await until(deaf.client, "images", {"found"})
    await until(deaf.client, "more", {"found"})
    await deaf.client.volume("images", "disk", capacity_bytes=MIB)


async def test_a_pool_that_was_stopped_does_not_come_back_by_itself(node: Rig) -> None:
    client = node.client
    await client.pool("images")
    place = node.root / "images"
    place.rename(node.root / "away")
    name = f"{PARENT}/pools/images"

    async def state() -> int:
        pool: pool_pb2.Pool = await client.call(client.pools.GetPool, pool_pb2.GetPoolRequest(name=name))
        return pool.status.state

    async with asyncio.timeout(10):
        while await state() != pool_pb2.POOL_STATE_INACCESSIBLE:
            await asyncio.sleep(0.1)
    await client.do(client.pools.StopPool, pool_pb2.StopPoolRequest(name=name), pool_pb2.Pool)
    (node.root / "away").rename(place)
    await asyncio.sleep(2.5)
    assert await state() == pool_pb2.POOL_STATE_INACTIVE
    with pytest.raises(Refused) as refused:
        await client.volume("images", "disk", capacity_bytes=MIB)
    assert refused.value.reason == "WRONG_STATE"

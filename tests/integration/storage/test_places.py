"""What may become of a pool's place: read-only, mounted over, mounted twice, a file system of few words, a file that is gone."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.storage.rig import MIB, PARENT, Client, Process, Refused, Rig
from virtfleet.storage.v1 import pool_pb2, volume_pb2
from virtfleet_service import errors

QCOW2 = volume_pb2.VOLUME_FORMAT_QCOW2


def run(*argv: object) -> None:
    subprocess.run([str(word) for word in argv], check=True)


async def get(client: Client, pool: str) -> pool_pb2.Pool:
    found: pool_pb2.Pool = await client.call(
        client.pools.GetPool, pool_pb2.GetPoolRequest(name=f"{PARENT}/pools/{pool}")
    )
    return found


async def until(client: Client, pool: str, state: int) -> pool_pb2.Pool:
    async with asyncio.timeout(10):
        while (found := await get(client, pool)).status.state != state:
            await asyncio.sleep(0.1)
    return found


@pytest.fixture
async def mount(tmp_path: Path) -> AsyncIterator[Path]:
    place = tmp_path / "mount"
    place.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=64m,mode=711", "tmpfs", place)
    yield place
    run("umount", "--lazy", "--recursive", place)


async def test_a_file_system_that_becomes_read_only_is_told_and_volumes_stay_readable(node: Rig, mount: Path) -> None:
    client = node.client
    await client.pool("images", target_path=str(mount / "pool"))
    await client.volume("images", "disk", capacity_bytes=MIB)
    await client.upload("pools/images/volumes/disk", b"d" * MIB)
    # As ext4 does to itself after an error.
    run("mount", "-o", "remount,ro", mount)
    pool = await until(client, "images", pool_pb2.POOL_STATE_DEGRADED)
    assert pool.status.state_reason == "READ_ONLY"
    assert [one.type for one in pool.status.conditions] == ["ReadOnly"]
    for attempt in (
        client.volume("images", "more", capacity_bytes=MIB),
        client.volume("images", "image", capacity_bytes=MIB, format=QCOW2),
        client.upload("pools/images/volumes/disk", b"e" * MIB),
        client.delete("pools/images/volumes/disk"),
    ):
        with pytest.raises(Refused) as refused:
            await attempt
        # No word of permissions, which would send people to their roles.
        assert (refused.value.code, refused.value.reason) == (9, "WRONG_STATE")
        assert refused.value.metadata["state"] == "READ_ONLY"
    assert (await client.download("pools/images/volumes/disk"))[1] == b"d" * MIB
    run("mount", "-o", "remount,rw", mount)
    pool = await until(client, "images", pool_pb2.POOL_STATE_RUNNING)
    assert list(pool.status.conditions) == []
    await client.volume("images", "more", capacity_bytes=MIB)
    await client.delete("pools/images/volumes/disk")


async def test_a_volume_is_not_given_by_a_path_that_leads_elsewhere(node: Rig, mount: Path) -> None:
    client = node.client
    place = mount / "pool"
    await client.pool("images", target_path=str(place))
    await client.volume("images", "disk", capacity_bytes=MIB)
    run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place)
    (place / "disk").write_bytes(b"somebody else's")
    # At once, before any look has noticed.
    with pytest.raises(errors.BackendUnreachable):
        await node.attach("pools/images/volumes/disk", uid=23456)
    assert (place / "disk").stat().st_uid == 0
    await until(client, "images", pool_pb2.POOL_STATE_INACCESSIBLE)
    run("umount", place)
    await until(client, "images", pool_pb2.POOL_STATE_RUNNING)
    await node.attach("pools/images/volumes/disk")


async def test_a_directory_that_becomes_a_link_is_no_place(node: Rig, tmp_path: Path) -> None:
    client = node.client
    await client.pool("images")
    await client.volume("images", "disk", capacity_bytes=MIB)
    place, away = node.root / "images", tmp_path / "away"
    shutil.copytree(place, away)
    place.rename(node.root / "real")
    place.symlink_to(away)
    with pytest.raises(errors.BackendUnreachable):
        await node.attach("pools/images/volumes/disk", uid=23456)
    await until(client, "images", pool_pb2.POOL_STATE_INACCESSIBLE)
    assert (away / "disk").stat().st_uid == 0
    with pytest.raises(Refused) as refused:
        await client.volume("images", "more", capacity_bytes=MIB)
    assert refused.value.reason == "WRONG_STATE"
    with pytest.raises(Refused) as refused:
        await client.do(client.pools.StartPool, pool_pb2.StartPoolRequest(name=f"{PARENT}/pools/images"), pool_pb2.Pool)
    assert refused.value.reason == "PATH_OUTSIDE_POOL"
    place.unlink()
    (node.root / "real").rename(place)
    await until(client, "images", pool_pb2.POOL_STATE_RUNNING)
    await node.attach("pools/images/volumes/disk")


async def test_one_directory_is_the_place_of_one_pool_under_whatever_path(node: Rig, mount: Path) -> None:
    client = node.client
    (mount / "twin").mkdir()
    await client.pool("images", target_path=str(mount / "pool"))
    await client.volume("images", "disk", capacity_bytes=MIB)
    run("mount", "--bind", mount / "pool", mount / "twin")
    with pytest.raises(Refused) as refused:
        await client.pool("twin", target_path=str(mount / "twin"))
    assert (refused.value.code, refused.value.reason) == (6, "IDENTITY_IN_USE")
    assert refused.value.metadata["holder"] == f"{PARENT}/pools/images"
    assert refused.value.metadata["field"] == "pool.spec.target_path"
    # It is the first one's still, as its next start finds.
    name = f"{PARENT}/pools/images"
    await client.do(client.pools.StopPool, pool_pb2.StopPoolRequest(name=name), pool_pb2.Pool)
    await client.do(client.pools.StartPool, pool_pb2.StartPoolRequest(name=name), pool_pb2.Pool)
    assert len(await client.volumes_of("images")) == 1


async def test_a_volume_whose_file_is_gone_is_not_called_unknown(node: Rig) -> None:
    client = node.client
    await client.pool("images")
    name = "pools/images/volumes/disk"
    for attempt in (
        lambda: client.upload(name, b"x"),
        lambda: client.volume("images", "copy", source=name),
        lambda: client.do(
            client.volumes.ResizeVolume,
            volume_pb2.ResizeVolumeRequest(name=f"{PARENT}/{name}", capacity_bytes=2 * MIB),
            volume_pb2.Volume,
        ),
    ):
        await client.volume("images", "disk", capacity_bytes=MIB)
        (node.root / "images" / "disk").unlink()
        with pytest.raises(Refused) as refused:
            await attempt()
        assert (refused.value.code, refused.value.reason) == (9, "BACKING_MISSING")
        await client.refresh("images")
    await client.volume("images", "disk", capacity_bytes=MIB)
    (node.root / "images" / "disk").unlink()
    with pytest.raises(errors.BackingMissing):
        await node.attach(name)


SHIM = """
#define _GNU_SOURCE
#include <errno.h>
#include <dlfcn.h>
int renameat2(int from, const char *old, int to, const char *new, unsigned int flags) {
    static int (*real)(int, const char *, int, const char *, unsigned int);
    if (flags) { errno = EINVAL; return -1; }
    if (!real) real = dlsym(RTLD_NEXT, "renameat2");
    return real(from, old, to, new, flags);
}
"""


async def test_a_file_system_without_flags_for_renames_keeps_pools_as_well(tmp_path: Path) -> None:
    tmp_path.chmod(0o711)
    source, shim = tmp_path / "shim.c", tmp_path / "shim.so"
    source.write_text(SHIM)
    run("gcc", "-shared", "-fPIC", "-o", shim, source, "-ldl")
    rig = Rig(tmp_path / "n")
    rig.base.mkdir(mode=0o711)
    # As NFS, CephFS and 9p answer.
    process = Process(rig, environment={"LD_PRELOAD": str(shim)})
    await process.start()
    try:
        async with rig.clients():
            client = rig.client
            await client.pool("images")
            pool = rig.root / "images"
            await client.volume("images", "disk", capacity_bytes=MIB)
            image = await client.volume("images", "image", capacity_bytes=MIB, format=QCOW2)
            assert [path.stat().st_nlink for path in (pool / "disk", pool / "image")] == [1, 1]
            (pool / "there").write_bytes(b"there")
            with pytest.raises(Refused) as refused:
                await client.volume("images", "there", capacity_bytes=MIB)
            assert refused.value.reason in ("WOULD_OVERWRITE", "RESOURCE_EXISTS")
            assert (pool / "there").read_bytes() == b"there"
            await client.upload("pools/images/volumes/disk", b"d" * MIB)
            await client.do(client.volumes.WipeVolume, volume_pb2.WipeVolumeRequest(name=image.name), volume_pb2.Volume)
            assert [path.name for path in (pool / ".virtfleet").iterdir()] == ["pool"]
    finally:
        await process.kill()

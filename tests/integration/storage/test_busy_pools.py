"""Pools that are stopped or forgotten while somebody is at work in them, or while a guest's files are out of reach."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import pytest
from google.longrunning import operations_pb2
from google.protobuf import duration_pb2, empty_pb2

from tests.integration.storage.rig import MIB, PARENT, Client, Refused, Rig, chunks, first_message
from virtfleet.storage.v1 import pool_pb2, volume_pb2

NAME = f"{PARENT}/pools/images"
DISK = "pools/images/volumes/disk"
GUEST = 23456


async def stop(client: Client, name: str = NAME) -> pool_pb2.Pool:
    return await client.do(client.pools.StopPool, pool_pb2.StopPoolRequest(name=name), pool_pb2.Pool)


async def delete(client: Client) -> None:
    await client.do(client.pools.DeletePool, pool_pb2.DeletePoolRequest(name=NAME), empty_pb2.Empty)


async def refused_for_work(client: Client, who: str) -> None:
    for end in (stop, delete):
        with pytest.raises(Refused) as refused:
            await end(client)
        assert refused.value.reason == "OPERATION_CONFLICT"
        assert refused.value.metadata["holder"].startswith(who)


async def test_a_pool_is_not_closed_under_an_upload(node: Rig) -> None:
    client = node.client
    await client.pool("images")
    await client.volume("images", "disk", capacity_bytes=MIB)
    data = os.urandom(4 * MIB)
    stream = client.volumes.UploadVolume(timeout=30)
    await stream.write(first_message(DISK, data))
    for message in chunks(data, 0, 2 * MIB, MIB):
        await stream.write(message)
    async with asyncio.timeout(10):
        while len(list((node.root / "images" / ".virtfleet").iterdir())) < 2:
            await asyncio.sleep(0.02)
    await refused_for_work(client, "UploadVolume")
    for message in chunks(data, 2 * MIB, 4 * MIB, MIB):
        await stream.write(message)
    await stream.done_writing()
    assert (await stream).complete
    assert (node.root / "images" / "disk").read_bytes() == data
    await stop(client)


async def test_a_pool_is_not_closed_under_a_volume_in_the_making(node: Rig) -> None:
    client = node.client
    await client.pool("images")
    request = volume_pb2.CreateVolumeRequest(
        parent=NAME,
        volume_id="big",
        volume=volume_pb2.Volume(
            spec=volume_pb2.VolumeSpec(capacity_bytes=512 * MIB, preallocation=volume_pb2.PREALLOCATION_FULL)
        ),
        inline_wait=duration_pb2.Duration(),
    )
    operation = await client.call(client.volumes.CreateVolume, request)
    assert not operation.done
    await refused_for_work(client, "CreateVolume")
    await client.call(client.operations.CancelOperation, operations_pb2.CancelOperationRequest(name=operation.name))
    async with asyncio.timeout(10):
        while True:
            try:
                await stop(client)
                break
            except Refused as refused:
                assert refused.reason == "OPERATION_CONFLICT"  # noqa: PT017
                await asyncio.sleep(0.05)
    assert [path.name for path in (node.root / "images").iterdir()] == [".virtfleet"]
    assert [path.name for path in (node.root / "images" / ".virtfleet").iterdir()] == ["pool"]


async def test_a_reader_of_a_pool_that_is_stopped_is_told_and_leaves_no_open_file(node: Rig) -> None:
    client = node.client
    await client.pool("images")
    await client.volume("images", "disk")
    await client.upload(DISK, os.urandom(32 * MIB))
    stream = client.volumes.DownloadVolume(volume_pb2.DownloadVolumeRequest(name=f"{PARENT}/{DISK}"), timeout=30)
    await stream.read()
    await stop(client)
    stream.cancel()

    def ours() -> list[str]:
        found = []
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.append(str(entry.readlink()))
        return [link for link in found if link.startswith(str(node.root))]

    async with asyncio.timeout(10):
        while ours():
            await asyncio.sleep(0.05)


async def test_the_image_that_a_guest_reads_through_another_pool_stays(node: Rig) -> None:
    client = node.client
    await client.pool("images")
    await client.pool("tops")
    await client.volume("images", "disk", capacity_bytes=MIB)
    await client.volume("tops", "top", backing=volume_pb2.VolumeBacking(volume=DISK))
    attached = await node.attach("pools/tops/volumes/top", uid=GUEST)
    with pytest.raises(Refused) as refused:
        await stop(client)
    assert refused.value.reason == "RESOURCE_IN_USE"
    assert refused.value.metadata["holder"] == f"{PARENT}/domains/web"
    await node.release("pools/tops/volumes/top", attached.attachment_id)
    await stop(client)


async def test_files_of_a_guest_that_ended_while_its_pool_was_away_are_taken_back(node: Rig) -> None:
    client = node.client
    await client.pool("images")
    await client.volume("images", "disk", capacity_bytes=MIB)
    attached = await node.attach(DISK, uid=GUEST)
    place = node.root / "images"
    assert (place / "disk").stat().st_uid == GUEST
    place.rename(node.root / "away")

    async def state() -> int:
        pool: pool_pb2.Pool = await client.call(client.pools.GetPool, pool_pb2.GetPoolRequest(name=NAME))
        return pool.status.state

    async with asyncio.timeout(10):
        while await state() != pool_pb2.POOL_STATE_INACCESSIBLE:
            await asyncio.sleep(0.1)
    await node.release(DISK, attached.attachment_id)
    (node.root / "away").rename(place)
    async with asyncio.timeout(10):
        while await state() != pool_pb2.POOL_STATE_RUNNING or (place / "disk").stat().st_uid == GUEST:
            await asyncio.sleep(0.1)
    assert (place / "disk").stat().st_uid == os.getuid()

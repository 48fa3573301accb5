"""The service is killed between intent, effect and commit, and started again."""

from __future__ import annotations

import asyncio
import mmap
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

import grpc
import pytest
from google.longrunning import operations_pb2
from google.protobuf import field_mask_pb2

from tests.integration.storage.rig import MIB, PARENT, Process, Refused, Rig, chunks, first_message, info, sha256
from tests.integration.storage.test_pools import until_state
from virtfleet.storage.v1 import pool_pb2, volume_pb2
from virtfleet_service import errors

DISK = "pools/images/volumes/disk"
VARIABLE = "VIRTFLEET_FAILPOINT"


@pytest.fixture
async def base() -> AsyncIterator[Rig]:
    with tempfile.TemporaryDirectory(prefix=f"vf-storage-{os.getpid()}-") as folder:
        Path(folder).chmod(0o711)
        yield Rig(Path(folder))


async def prepare(base: Rig) -> None:
    """Make a pool with a volume of known content, with a service that ends in order."""
    process = Process(base)
    await process.start()
    try:
        async with base.clients():
            await base.client.pool("images")
            await base.client.volume("images", "disk", capacity_bytes=MIB)
            await base.client.upload(DISK, b"o" * MIB)
    finally:
        assert await process.stop() == 0


async def killed_at(base: Rig, failpoint: str, act: object) -> None:
    """Start the service with an armed failpoint and have it die in a call."""
    process = Process(base, environment={VARIABLE: failpoint})
    await process.start()
    try:
        async with base.clients():
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await act()  # type: ignore[operator]  # from a table
            assert error.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN)
        assert await asyncio.wait_for(process.process.wait(), 5) == -9
    finally:
        await process.kill()


async def ended(base: Rig) -> list[operations_pb2.Operation]:
    """Return the operations, all of which must have ended."""
    answer = await base.client.call(
        base.client.operations.ListOperations,
        operations_pb2.ListOperationsRequest(name=f"{PARENT}/services/storage"),
    )
    assert all(operation.done for operation in answer.operations)
    return list(answer.operations)


def files(base: Rig) -> list[str]:
    return sorted(path.name for path in (base.root / "images").iterdir())


def staged(base: Rig) -> list[str]:
    return sorted(path.name for path in (base.root / "images" / ".virtfleet").iterdir() if path.name != "pool")


@pytest.mark.parametrize(
    ("failpoint", "made"), [("storage.volume.create.staged", False), ("storage.volume.create.published", True)]
)
async def test_a_volume_is_made_or_not(base: Rig, failpoint: str, made: bool) -> None:  # noqa: FBT001
    await prepare(base)
    request = volume_pb2.CreateVolumeRequest(
        parent=f"{PARENT}/pools/images",
        volume_id="new",
        volume=volume_pb2.Volume(spec=volume_pb2.VolumeSpec(capacity_bytes=MIB, format=volume_pb2.VOLUME_FORMAT_QCOW2)),
    )
    await killed_at(base, failpoint, lambda: base.client.volumes.CreateVolume(request, timeout=10))
    async with base.running():
        failed = [operation.error.code for operation in await ended(base) if operation.HasField("error")]
        assert failed == ([] if made else [10])
        assert files(base) == [".virtfleet", "disk", *(["new"] if made else [])]
        assert staged(base) == []
        names = [volume.name.rpartition("/")[2] for volume in await base.client.volumes_of("images")]
        assert names == ["disk", *(["new"] if made else [])]
        if made:
            volume = await base.client.get("pools/images/volumes/new")
            assert volume.spec.format == volume_pb2.VOLUME_FORMAT_QCOW2
            assert volume.status.state == volume_pb2.VOLUME_STATE_READY
            assert volume.display_name == ""


@pytest.mark.parametrize("touched", [False, True], ids=["left alone", "touched"])
async def test_a_volume_that_was_made_where_nobody_can_look_after_the_crash_is_removed_later(
    base: Rig, *, touched: bool
) -> None:
    await prepare(base)
    request = volume_pb2.CreateVolumeRequest(parent=f"{PARENT}/pools/images", volume_id="new")
    request.volume.spec.capacity_bytes = MIB
    await killed_at(
        base, "storage.volume.create.published", lambda: base.client.volumes.CreateVolume(request, timeout=10)
    )
    away = base.root / "away"
    (base.root / "images").rename(away)
    async with base.running():
        assert [operation.error.code for operation in await ended(base) if operation.HasField("error")] == [10]
        if touched:
            # Somebody has made it his own meanwhile; nobody takes it from him.
            (away / "new").chmod(0o640)
        away.rename(base.root / "images")
        await until_state(base.client, "images", pool_pb2.POOL_STATE_RUNNING)
        refresh = pool_pb2.RefreshPoolRequest(name=f"{PARENT}/pools/images")
        await base.client.do(base.client.pools.RefreshPool, refresh, pool_pb2.Pool)
        left = ["disk", "new"] if touched else ["disk"]
        assert [volume.name.rpartition("/")[2] for volume in await base.client.volumes_of("images")] == left
        assert files(base) == [".virtfleet", *left]
        # What lies there under its name from now on is a volume like any other.
        (base.root / "images" / "new").write_bytes(bytes(MIB))
        await base.client.do(base.client.pools.RefreshPool, refresh, pool_pb2.Pool)
        assert len(await base.client.volumes_of("images")) == 2


async def test_a_deletion_is_finished(base: Rig) -> None:
    await prepare(base)
    request = volume_pb2.DeleteVolumeRequest(name=f"{PARENT}/{DISK}")
    await killed_at(
        base, "storage.volume.delete.removed", lambda: base.client.volumes.DeleteVolume(request, timeout=10)
    )
    async with base.running():
        assert not [operation for operation in await ended(base) if operation.HasField("error")]
        assert await base.client.volumes_of("images") == []
        assert files(base) == [".virtfleet"]


async def test_a_resize_that_happened_is_recorded(base: Rig) -> None:
    await prepare(base)
    request = volume_pb2.ResizeVolumeRequest(name=f"{PARENT}/{DISK}", capacity_bytes=2 * MIB)
    await killed_at(base, "storage.volume.resize.done", lambda: base.client.volumes.ResizeVolume(request, timeout=10))
    async with base.running():
        assert not [operation for operation in await ended(base) if operation.HasField("error")]
        volume = await base.client.get(DISK)
        assert volume.spec.capacity_bytes == volume.status.capacity_bytes == 2 * MIB


@pytest.mark.parametrize("method", ["CreatePool", "UpdatePool"])
@pytest.mark.parametrize("failpoint", ["storage.pool.create.built", "storage.pool.create.done"])
async def test_a_pool_is_not_half_made(base: Rig, failpoint: str, method: str) -> None:
    await prepare(base)
    request: object = pool_pb2.CreatePoolRequest(parent=PARENT, pool_id="fresh", pool=pool_pb2.Pool(), start=True)
    if method == "UpdatePool":
        pool = pool_pb2.Pool(name=f"{PARENT}/pools/fresh")
        pool.spec.dir.SetInParent()
        request = pool_pb2.UpdatePoolRequest(pool=pool, allow_missing=True)
    await killed_at(base, failpoint, lambda: getattr(base.client.pools, method)(request, timeout=10))
    async with base.running():
        assert [operation.error.code for operation in await ended(base) if operation.HasField("error")] == [10]
        assert sorted(path.name for path in base.root.iterdir()) == ["images"]
        await base.client.pool("fresh")


@pytest.mark.parametrize("begun", [[], ["pool.0badcafe"]], ids=["folder", "claim"])
async def test_a_pool_whose_claim_was_cut_leaves_nothing(base: Rig, begun: list[str]) -> None:
    await prepare(base)
    request = pool_pb2.CreatePoolRequest(parent=PARENT, pool_id="fresh", pool=pool_pb2.Pool(), start=True)
    await killed_at(base, "storage.pool.create.built", lambda: base.client.pools.CreatePool(request, timeout=10))
    # A little later.
    folder = base.root / "fresh" / ".virtfleet"
    folder.mkdir(mode=0o700)
    for name in begun:
        (folder / name).touch()
    async with base.running():
        assert [operation.error.code for operation in await ended(base) if operation.HasField("error")] == [10]
        assert sorted(path.name for path in base.root.iterdir()) == ["images"]


@pytest.mark.parametrize("stopped", [True, False])
@pytest.mark.parametrize("left", [["pool"], []], ids=["owned", "nobody's"])
async def test_a_pool_whose_folder_was_half_removed_is_forgotten_with_it(
    base: Rig,
    stopped: bool,  # noqa: FBT001
    left: list[str],
) -> None:
    await prepare(base)
    own = base.root / "images" / ".virtfleet"
    uid = (own / "pool").read_bytes()
    (base.root / "images" / "disk").unlink()

    async def act() -> None:
        if stopped:
            stop = pool_pb2.StopPoolRequest(name=f"{PARENT}/pools/images")
            await base.client.do(base.client.pools.StopPool, stop, pool_pb2.Pool)
        await base.client.pools.DeletePool(pool_pb2.DeletePoolRequest(name=f"{PARENT}/pools/images"), timeout=10)

    await killed_at(base, "storage.pool.delete.retired", act)
    # A little earlier.
    own.mkdir(mode=0o700)
    for name in left:
        (own / name).write_bytes(uid)
    async with base.running():
        assert not [operation for operation in await ended(base) if operation.HasField("error")]
        assert list(base.root.iterdir()) == []


async def test_a_change_of_a_pool_that_is_cut_has_no_effect(base: Rig) -> None:
    await prepare(base)
    pool = pool_pb2.Pool(name=f"{PARENT}/pools/images", labels={"a": "b"})
    request = pool_pb2.UpdatePoolRequest(pool=pool, update_mask=field_mask_pb2.FieldMask(paths=["labels"]))
    await killed_at(base, "operations.worked", lambda: base.client.pools.UpdatePool(request, timeout=10))
    async with base.running():
        assert [operation.error.code for operation in await ended(base) if operation.HasField("error")] == [10]
        [after] = (await base.client.call(base.client.pools.ListPools, pool_pb2.ListPoolsRequest(parent=PARENT))).pools
        assert (after.generation, dict(after.labels)) == (1, {})
        assert files(base) == [".virtfleet", "disk"]


async def test_a_pool_is_forgotten_in_the_end(base: Rig) -> None:
    await prepare(base)
    request = pool_pb2.DeletePoolRequest(name=f"{PARENT}/pools/images")
    await killed_at(base, "storage.pool.delete.retired", lambda: base.client.pools.DeletePool(request, timeout=10))
    async with base.running():
        assert not [operation for operation in await ended(base) if operation.HasField("error")]
        assert files(base) == ["disk"]
        answer = await base.client.call(base.client.pools.ListPools, pool_pb2.ListPoolsRequest(parent=PARENT))
        assert list(answer.pools) == []


@pytest.mark.parametrize("upload_id", ["", "u1"])
@pytest.mark.parametrize(
    ("failpoint", "replaced"), [("storage.upload.intended", False), ("storage.upload.replaced", True)]
)
async def test_an_upload_replaces_all_or_nothing(
    base: Rig,
    failpoint: str,
    replaced: bool,  # noqa: FBT001
    upload_id: str,
) -> None:
    await prepare(base)
    data = os.urandom(3 * MIB)

    async def act() -> None:
        async def messages() -> AsyncIterator[volume_pb2.UploadVolumeRequest]:
            yield first_message(DISK, data, upload_id=upload_id)
            for message in chunks(data, 0, len(data), MIB):
                yield message

        await base.client.volumes.UploadVolume(messages(), timeout=10)

    await killed_at(base, failpoint, act)
    async with base.running():
        volume = await base.client.get(DISK)
        content = (base.root / "images" / "disk").read_bytes()
        if replaced:
            assert content == data
            assert volume.status.digest == sha256(data)
            assert volume.spec.capacity_bytes == len(data)
            assert staged(base) == []
            return
        assert content == b"o" * MIB
        assert volume.status.digest == sha256(b"o" * MIB)
        assert len(staged(base)) == len(volume.status.uploads) == (1 if upload_id else 0)
        answer = await base.client.upload(DISK, data, upload_id=upload_id, offset=0)
        assert answer.complete
        assert staged(base) == []


async def test_an_upload_that_replaced_the_content_and_was_not_answered_is_done_once(base: Rig) -> None:
    """Who asks again with the same request_id is told what came out, although the etag is another by now."""
    await prepare(base)
    data = os.urandom(MIB)
    before: list[volume_pb2.Volume] = []

    async def act() -> None:
        before.append(await base.client.get(DISK))

        async def messages() -> AsyncIterator[volume_pb2.UploadVolumeRequest]:
            yield first_message(DISK, data, request_id="once", etag=before[0].etag)
            for message in chunks(data, 0, len(data), MIB):
                yield message

        await base.client.volumes.UploadVolume(messages(), timeout=10)

    await killed_at(base, "storage.upload.replaced", act)
    async with base.running():
        path = base.root / "images" / "disk"
        assert path.read_bytes() == data
        inode = path.stat().st_ino
        answer = await base.client.upload(DISK, data, request_id="once", etag=before[0].etag)
        assert answer.complete
        assert answer.received_bytes == len(data)
        assert answer.volume.generation == before[0].generation + 1
        assert answer.volume == await base.client.get(DISK)
        assert path.stat().st_ino == inode, "nothing was written a second time"
        with pytest.raises(Refused) as reused:
            await base.client.upload(DISK, data + b"x", request_id="once")
        assert (reused.value.code, reused.value.reason) == (3, "REQUEST_ID_REUSED")
        assert path.read_bytes() == data


async def test_an_upload_is_killed_in_the_middle_and_goes_on(base: Rig) -> None:
    await prepare(base)
    data = os.urandom(160 * MIB)
    process = Process(base)
    await process.start()
    try:
        async with base.clients():
            stream = base.client.volumes.UploadVolume(timeout=60)
            await stream.write(first_message(DISK, data, upload_id="big"))
            for message in chunks(data, 0, 150 * MIB, MIB):
                await stream.write(message)
            async with asyncio.timeout(20):
                while not (uploads := (await base.client.get(DISK)).status.uploads) or not uploads[0].received_bytes:
                    await asyncio.sleep(0.02)
            await process.kill()
            with pytest.raises(grpc.aio.AioRpcError):
                await stream
    finally:
        await process.kill()
    async with base.running():
        (upload,) = (await base.client.get(DISK)).status.uploads
        assert upload.received_bytes >= 64 * MIB
        assert (base.root / "images" / "disk").read_bytes() == b"o" * MIB
        answer = await base.client.upload(DISK, data, upload_id="big", offset=upload.received_bytes)
        assert answer.complete
        assert (base.root / "images" / "disk").read_bytes() == data
        assert staged(base) == []


@pytest.mark.parametrize("failpoint", ["storage.attach.recorded", "storage.release.recorded"])
async def test_access_to_files_follows_the_records(base: Rig, failpoint: str) -> None:
    await prepare(base)
    path = base.root / "images" / "disk"
    domain = "11111111-2222-3333-4444-555555555555"

    async def act() -> None:
        answer = await base.attach(DISK, domain_uid=domain, uid=23456)
        await base.release(DISK, answer.attachment_id)

    process = Process(base, environment={VARIABLE: failpoint})
    await process.start()
    try:
        async with base.clients():
            with pytest.raises(Exception, match=r"peer|storage|socket|reach|connect|UNAVAILABLE|Socket"):
                await act()
    finally:
        await process.kill()
    async with base.running():
        held = (await base.client.get(DISK)).status.attachments
        assert len(held) == (1 if failpoint == "storage.attach.recorded" else 0)
        assert path.stat().st_uid == (23456 if held else os.getuid())
        for one in held:
            await base.release(DISK, one.attachment_id)
        assert path.stat().st_uid == os.getuid()


async def test_a_wipe_that_was_interrupted_is_told(base: Rig) -> None:
    await prepare(base)
    process = Process(base)
    await process.start()
    try:
        async with base.clients():
            await base.client.volume(
                "images", "big", capacity_bytes=1024 * MIB, preallocation=volume_pb2.PREALLOCATION_FULL
            )
            request = volume_pb2.WipeVolumeRequest(name=f"{PARENT}/pools/images/volumes/big")
            request.inline_wait.nanos = 1
            operation = await base.client.call(base.client.volumes.WipeVolume, request)
            assert not operation.done
            await process.kill()
    finally:
        await process.kill()
    async with base.running():
        (failed,) = [one for one in await ended(base) if one.HasField("error")]
        assert failed.name == operation.name
        volume = await base.client.get("pools/images/volumes/big")
        reasons = {one.type for one in volume.status.conditions}
        assert reasons in ({"WipeIncomplete"}, set())
        assert (await info(base.root / "images" / "big", "raw"))["virtual-size"] == 1024 * MIB
        await base.client.delete("pools/images/volumes/big")


async def test_an_image_whose_wipe_was_interrupted_keeps_its_place_and_can_be_wiped_again(base: Rig) -> None:
    await prepare(base)
    name = f"{PARENT}/pools/images/volumes/big"
    image = base.root / "images" / "big"
    pattern = b"\x07" * 4096
    process = Process(base)
    await process.start()
    try:
        async with base.clients():
            await base.client.volume("images", "big", capacity_bytes=512 * MIB, format=volume_pb2.VOLUME_FORMAT_QCOW2)
            await qemu_io("-f", "qcow2", "-c", "write -P 7 0 511M", image)
            inode = image.stat().st_ino
            request = volume_pb2.WipeVolumeRequest(name=name)
            request.inline_wait.nanos = 1
            operation = await base.client.call(base.client.volumes.WipeVolume, request)
            assert not operation.done
            async with asyncio.timeout(20):
                while features(image) != 2:
                    await asyncio.sleep(0.01)
            await process.kill()
    finally:
        await process.kill()
    async with base.running():
        client = base.client
        (failed,) = [one for one in await ended(base) if one.HasField("error")]
        assert "wipe it again" in failed.error.message
        # What is not overwritten yet is where the next wipe finds it, and nowhere else.
        assert image.stat().st_ino == inode
        assert staged(base) == []
        with image.open("rb") as file:
            assert holds(file, pattern)
        volume = await client.get("pools/images/volumes/big")
        assert (volume.status.state, volume.status.state_reason) == (volume_pb2.VOLUME_STATE_REFUSED, "IMAGE_CORRUPT")
        assert "WipeIncomplete" in {one.type for one in volume.status.conditions}
        with pytest.raises(errors.ImageCorrupt):
            await base.attach("pools/images/volumes/big")
        with image.open("rb") as file:
            volume = await client.do(
                client.volumes.WipeVolume, volume_pb2.WipeVolumeRequest(name=name), volume_pb2.Volume
            )
            # The blocks themselves, seen through a descriptor of the file that has no name any more.
            assert not holds(file, pattern)
        assert list(volume.status.conditions) == []
        assert volume.status.state == volume_pb2.VOLUME_STATE_READY
        assert (await info(image, "qcow2"))["virtual-size"] == 512 * MIB
        assert staged(base) == []


def features(image: Path) -> int:
    """Return the incompatible features of an image: 2 is the mark of a corrupt one."""
    with image.open("rb") as file:
        return int.from_bytes(file.read(80)[72:], "big")


def holds(file: BinaryIO, pattern: bytes) -> bool:
    with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        return memory.find(pattern) >= 0


async def qemu_io(*arguments: str | Path) -> None:
    process = await asyncio.create_subprocess_exec("qemu-io", *map(str, arguments), stdout=asyncio.subprocess.DEVNULL)
    assert await process.wait() == 0

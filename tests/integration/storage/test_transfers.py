from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.integration.storage.rig import MIB, PARENT, Refused, Rig, chunks, first_message, sha256
from virtfleet.storage.v1 import volume_pb2

DISK = "pools/images/volumes/disk"


@pytest.fixture
async def pool(node: Rig) -> Path:
    await node.client.pool("images")
    await node.client.volume("images", "disk", capacity_bytes=3 * MIB)
    return node.root / "images"


def staged(pool: Path) -> list[str]:
    return sorted(path.name for path in (pool / ".virtfleet").iterdir() if path.name != "pool")


async def test_an_upload_replaces_the_content(node: Rig, pool: Path) -> None:
    data = os.urandom(5 * MIB + 123)
    before = await node.client.get(DISK)
    answer = await node.client.upload(DISK, data)
    assert answer.complete
    assert (pool / "disk").read_bytes() == data
    volume = answer.volume
    assert volume.status.digest == sha256(data)
    assert volume.status.capacity_bytes == volume.spec.capacity_bytes == len(data)
    assert volume.generation == before.generation + 1
    assert volume.etag != before.etag
    assert (pool / "disk").stat().st_mode & 0o777 == 0o600
    assert staged(pool) == []
    # Somebody else writes: the digest is no longer that of the content.
    with (pool / "disk").open("r+b") as file:
        file.write(b"x")
    await node.client.refresh("images")
    assert (await node.client.get(DISK)).status.digest == ""


async def test_holes_are_not_stored(node: Rig, pool: Path) -> None:
    async def messages() -> AsyncIterator[volume_pb2.UploadVolumeRequest]:
        data = b"a" * 4096 + bytes(128 * MIB) + b"b" * 4096
        yield first_message(DISK, data)
        del data
        for at, content in ((0, b"a" * 4096), (4096, 128 * MIB), (4096 + 128 * MIB, b"b" * 4096)):
            message = volume_pb2.UploadVolumeRequest()
            message.chunk.offset = at
            if isinstance(content, int):
                message.chunk.hole_length = content
            else:
                message.chunk.data = content
            yield message

    answer = await node.client.send(messages())
    assert answer.complete
    facts = (pool / "disk").stat()
    assert facts.st_size == 128 * MIB + 8192
    assert facts.st_blocks * 512 <= 64 * 1024
    start, _, pieces = await node.client.download(DISK, offset_bytes=0, length_bytes=0)
    assert start.length_bytes == facts.st_size
    assert [stored for _, _, stored in pieces] == [True, False, True]


async def test_a_wrong_digest_leaves_the_old_content(node: Rig, pool: Path) -> None:
    data = os.urandom(MIB)
    for upload_id in ("", "again"):
        with pytest.raises(Refused) as refused:
            await node.client.upload(DISK, data, digest=sha256(b"other"), upload_id=upload_id)
        assert refused.value.short == ("DATA_LOSS", "CHECKSUM_MISMATCH")
        assert refused.value.metadata["digest"] == sha256(data)
        assert (pool / "disk").read_bytes() == bytes(3 * MIB)
        assert staged(pool) == []
    assert list((await node.client.get(DISK)).status.uploads) == []


async def test_a_chunk_with_a_wrong_checksum_is_refused(node: Rig, pool: Path) -> None:
    data = os.urandom(MIB)

    async def messages() -> AsyncIterator[volume_pb2.UploadVolumeRequest]:
        yield first_message(DISK, data)
        (message,) = chunks(data, 0, MIB, MIB)
        message.chunk.crc32c ^= 1
        yield message

    with pytest.raises(Refused) as refused:
        await node.client.send(messages())
    assert refused.value.reason == "CHECKSUM_MISMATCH"
    assert staged(pool) == []


@pytest.mark.parametrize(
    ("fields", "code", "reason", "field"),
    [
        ({"stop": MIB}, "INVALID_ARGUMENT", "FIELD_OUT_OF_RANGE", "start.length_bytes"),
        ({"length": MIB}, "INVALID_ARGUMENT", "FIELD_OUT_OF_RANGE", "chunk.offset"),
        ({"offset": MIB}, "OUT_OF_RANGE", "RANGE_BEYOND_END", "chunk.offset"),
        ({"etag": "old"}, "ABORTED", "ETAG_MISMATCH", ""),
        ({"expected_uid": "00000000-0000-4000-8000-000000000000"}, "FAILED_PRECONDITION", "UID_MISMATCH", ""),
        ({"length": 1 << 60, "stop": 0}, "INVALID_ARGUMENT", "FIELD_OUT_OF_RANGE", "start.length_bytes"),
        ({"digest": "md5:1", "stop": 0}, "INVALID_ARGUMENT", "FIELD_OUT_OF_RANGE", "start.digest"),
        ({"upload_id": "../../etc/passwd", "stop": 0}, "INVALID_ARGUMENT", "NAME_MALFORMED", "start.upload_id"),
        ({"chunk": 2 * MIB}, "INVALID_ARGUMENT", "FIELD_OUT_OF_RANGE", "chunk.data"),
    ],
)
async def test_what_does_not_fit_is_refused(
    node: Rig, pool: Path, fields: dict[str, Any], code: str, reason: str, field: str
) -> None:
    before, file = await node.client.get(DISK), (pool / "disk").stat()
    with pytest.raises(Refused) as refused:
        await node.client.upload(DISK, os.urandom(2 * MIB), **fields)
    assert refused.value.short == (code, reason)
    assert refused.value.metadata.get("field", "") == field
    assert (pool / "disk").read_bytes() == bytes(3 * MIB)
    after = (pool / "disk").stat()
    assert (after.st_ino, after.st_mtime_ns) == (file.st_ino, file.st_mtime_ns)
    assert staged(pool) == []
    assert await node.client.get(DISK) == before


async def test_a_cut_stream_without_an_id_leaves_nothing(node: Rig, pool: Path) -> None:
    await cut(node, os.urandom(4 * MIB), upload_id="", after=2 * MIB)
    async with asyncio.timeout(5):
        while staged(pool):
            await asyncio.sleep(0.02)
    assert (pool / "disk").read_bytes() == bytes(3 * MIB)


async def cut(node: Rig, data: bytes, *, upload_id: str, after: int) -> None:
    """Send a part, and go away in the middle."""
    stream = node.client.volumes.UploadVolume(timeout=30)
    await stream.write(first_message(DISK, data, upload_id=upload_id))
    for message in chunks(data, 0, after, MIB):
        await stream.write(message)
    await asyncio.sleep(0.2)
    stream.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stream


async def test_a_cut_upload_goes_on_where_it_was(node: Rig, pool: Path) -> None:
    client = node.client
    data = os.urandom(6 * MIB)
    await cut(node, data, upload_id="u1", after=3 * MIB)
    async with asyncio.timeout(5):
        while not (uploads := (await client.get(DISK)).status.uploads) or not uploads[0].received_bytes:
            await asyncio.sleep(0.02)
    (upload,) = uploads
    assert upload.upload_id == "u1"
    assert upload.received_bytes == 3 * MIB
    assert upload.length_bytes == 6 * MIB
    assert upload.expire_time.seconds - upload.update_time.seconds == 24 * 3600
    assert (pool / "disk").read_bytes() == bytes(3 * MIB)
    # A stream without chunks asks how much there is.
    asked = await client.upload(DISK, data, upload_id="u1", offset=0, stop=0)
    assert (asked.complete, asked.received_bytes) == (False, 3 * MIB)
    with pytest.raises(Refused) as refused:
        await client.upload(DISK, data, upload_id="u1", offset=4 * MIB)
    assert refused.value.reason == "RANGE_BEYOND_END"
    assert refused.value.metadata["received_bytes"] == str(3 * MIB)
    with pytest.raises(Refused) as refused:
        await client.upload(DISK, data + b"x", upload_id="u1", offset=3 * MIB)
    assert refused.value.reason == "FIELD_CONFLICT"
    # A part again, and then the rest.
    answer = await client.upload(DISK, data, upload_id="u1", offset=2 * MIB)
    assert answer.complete
    assert (pool / "disk").read_bytes() == data
    assert list(answer.volume.status.uploads) == []
    assert staged(pool) == []


async def test_an_upload_can_be_paused_and_is_removed_when_nobody_goes_on(node: Rig, pool: Path) -> None:
    client = node.client
    data = os.urandom(2 * MIB)
    answer = await client.upload(DISK, data, upload_id="u1", stop=MIB)
    assert (answer.complete, answer.received_bytes) == (False, MIB)
    assert len(staged(pool)) == 1
    await client.delete(DISK)
    assert staged(pool) == []


async def test_a_client_that_goes_while_its_upload_takes_its_place_leaves_nothing_half_done(
    node: Rig, pool: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The content is the new one, and the upload is over, or the upload can be gone on with where it was."""
    for number in range(60):
        data = os.urandom(MIB)
        stream = node.client.volumes.UploadVolume(timeout=60)
        for message in (first_message(DISK, data, upload_id=f"u{number}"), *chunks(data, 0, MIB, MIB)):
            await stream.write(message)
        await stream.done_writing()
        # At all moments of the end.
        await asyncio.sleep(number / 3000)
        stream.cancel()
        async with asyncio.timeout(10):
            while True:
                # One that is sent wrongly is told so as soon as the first is over.
                with pytest.raises(Refused) as refused:
                    await node.client.upload(DISK, data, digest=sha256(b""))
                if refused.value.reason == "CHECKSUM_MISMATCH":
                    break
                assert refused.value.reason == "OPERATION_CONFLICT"
                await asyncio.sleep(0.01)
        sessions = (await node.client.get(DISK)).status.uploads
        if (pool / "disk").read_bytes() == data:
            assert not sessions
        for session in sessions:
            answer = await node.client.upload(DISK, data, upload_id=session.upload_id, offset=session.received_bytes)
            assert answer.complete
        assert staged(pool) == []
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_client_that_goes_while_its_upload_is_begun_leaves_nothing(node: Rig, pool: Path) -> None:
    for number in range(100):
        stream = node.client.volumes.UploadVolume(timeout=60)
        await stream.write(first_message(DISK, bytes(MIB)))
        # At all moments of the beginning.
        await asyncio.sleep(number / 20_000)
        stream.cancel()
        await asyncio.gather(stream, return_exceptions=True)
    async with asyncio.timeout(5):
        while staged(pool):
            await asyncio.sleep(0.02)
    assert (pool / "disk").read_bytes() == bytes(3 * MIB)


async def test_two_uploads_of_a_volume_exclude_each_other(node: Rig, pool: Path) -> None:
    data = os.urandom(MIB)
    stream = node.client.volumes.UploadVolume(timeout=30)
    await stream.write(first_message(DISK, data))
    await stream.write(chunks(data, 0, MIB // 2, MIB)[0])
    await asyncio.sleep(0.2)
    with pytest.raises(Refused) as refused:
        await node.client.upload(DISK, data)
    assert refused.value.reason == "OPERATION_CONFLICT"
    await stream.write(chunks(data, MIB // 2, MIB, MIB)[0])
    await stream.done_writing()
    assert (await stream).complete
    assert (pool / "disk").read_bytes() == data


async def test_an_attached_volume_takes_no_upload(node: Rig, pool: Path) -> None:
    data = os.urandom(MIB)
    stream = node.client.volumes.UploadVolume(timeout=30)
    await stream.write(first_message(DISK, data, upload_id="u1"))
    await asyncio.sleep(0.2)
    attached = await node.attach(DISK)
    await stream.write(chunks(data, 0, MIB, MIB)[0])
    await stream.done_writing()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stream
    assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    with pytest.raises(Refused) as refused:
        await node.client.upload(DISK, data)
    assert refused.value.reason == "RESOURCE_IN_USE"
    assert refused.value.metadata["holder"] == f"{PARENT}/domains/web"
    assert (pool / "disk").read_bytes() == bytes(3 * MIB)
    await node.release(DISK, attached.attachment_id)
    # All of it had come: it need not be sent again.
    answer = await node.client.upload(DISK, data, upload_id="u1", offset=MIB)
    assert answer.complete
    assert (pool / "disk").read_bytes() == data


async def test_a_repeated_request_id_is_answered_without_a_second_upload(node: Rig, pool: Path) -> None:
    data = os.urandom(MIB)
    first = await node.client.upload(DISK, data, request_id="r1")
    again = await node.client.upload(DISK, data, request_id="r1", stop=0)
    assert again == first
    with pytest.raises(Refused) as refused:
        await node.client.upload(DISK, data + b"x", request_id="r1")
    assert refused.value.reason == "REQUEST_ID_REUSED"
    inode = (pool / "disk").stat().st_ino
    checked = await node.client.upload(DISK, data, validate_only=True, stop=0)
    assert not checked.complete
    assert (pool / "disk").stat().st_ino == inode


@pytest.mark.usefixtures("pool")
async def test_ranges_are_downloaded(node: Rig) -> None:
    client = node.client
    data = os.urandom(3 * MIB + 17)
    volume = (await client.upload(DISK, data)).volume
    for offset, length in ((0, 0), (0, 1), (MIB - 1, 2), (3 * MIB, 0), (3 * MIB, 1 << 40), (len(data), 0)):
        start, found, _ = await client.download(DISK, offset_bytes=offset, length_bytes=length, etag=volume.etag)
        assert found == (data[offset : offset + length] if length else data[offset:])
        assert start.physical_bytes == len(data)
        assert start.length_bytes == len(found)
        assert start.digest == sha256(data)
    for fields, reason in (
        ({"offset_bytes": len(data) + 1}, "RANGE_BEYOND_END"),
        ({"etag": "old"}, "ETAG_MISMATCH"),
        ({"offset_bytes": -1}, "FIELD_OUT_OF_RANGE"),
    ):
        with pytest.raises(Refused) as refused:
            await client.download(DISK, **fields)
        assert refused.value.reason == reason


async def test_a_download_keeps_its_content_while_an_upload_replaces_it(node: Rig, pool: Path) -> None:
    old, new = os.urandom(8 * MIB), os.urandom(8 * MIB)
    await node.client.upload(DISK, old)
    request = volume_pb2.DownloadVolumeRequest(name=f"{PARENT}/{DISK}")
    stream = node.client.volumes.DownloadVolume(request, timeout=30)
    await stream.read()
    found = bytearray((await stream.read()).chunk.data)
    await node.client.upload(DISK, new)
    while (answer := await stream.read()) is not grpc.aio.EOF:
        found += answer.chunk.data
    assert bytes(found) == old
    assert (pool / "disk").read_bytes() == new


async def test_a_client_that_leaves_a_download_leaves_no_open_file(node: Rig, pool: Path) -> None:
    await node.client.upload(DISK, os.urandom(32 * MIB))
    request = volume_pb2.DownloadVolumeRequest(name=f"{PARENT}/{DISK}")
    stream = node.client.volumes.DownloadVolume(request, timeout=30)
    await stream.read()
    stream.cancel()

    def held() -> int:
        links = []
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                links.append(entry.readlink())
        return links.count(pool / "disk")

    async with asyncio.timeout(5):
        while held():
            await asyncio.sleep(0.02)


async def test_an_upload_that_nobody_goes_on_with_expires() -> None:
    with tempfile.TemporaryDirectory(prefix=f"vf-storage-{os.getpid()}-") as base:
        async with Rig(Path(base), upload_retention_seconds=0.5).running() as node:
            await node.client.pool("images")
            await node.client.volume("images", "disk")
            await node.client.upload(DISK, bytes(2 * MIB), upload_id="u1", stop=MIB)
            assert len(staged(node.root / "images")) == 1
            async with asyncio.timeout(10):
                while (await node.client.get(DISK)).status.uploads:
                    await asyncio.sleep(0.05)
            assert staged(node.root / "images") == []

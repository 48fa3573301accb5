"""Volumes to and from files."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from virtfleet.storage.v1 import volume_pb2
from virtfleet_client.errors import BackendUnreachable, NodeUnreachable, Unavailable
from virtfleet_client.sync import Fleet

CHUNK_BYTES = 1 << 20
ATTEMPTS = 5


def upload(
    fleet: Fleet, volume: str, path: Path, *, progress: Callable[[int, int], None] | None = None
) -> volume_pb2.Volume:
    """Replace the content of a volume by that of a file: all of it or nothing, however often the connection breaks.

    Args:
        fleet: The connection.
        volume: `nodes/{node}/pools/{pool}/volumes/{volume}`.
        path: The file.
        progress: Is called with the bytes sent and those in all.

    Raises:
        VirtfleetError: The server refuses, or the connection broke five times.
        OSError: The file cannot be read.
    """
    length = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        start = volume_pb2.UploadStart(length_bytes=length, digest=f"sha256:{digest}", upload_id=uuid.uuid4().hex)
        for attempt in range(1, ATTEMPTS + 1):
            offset = _received(fleet, volume, start.upload_id) if attempt > 1 else 0
            try:
                answer: volume_pb2.UploadVolumeResponse = fleet.volumes.UploadVolume(
                    _messages(volume, start, file, offset, length, progress)
                )
            except (Unavailable, NodeUnreachable, BackendUnreachable):
                if attempt == ATTEMPTS:
                    raise
            else:
                return answer.volume
    raise AssertionError  # the last attempt has returned or raised


def _received(fleet: Fleet, volume: str, upload_id: str) -> int:
    """Return how much of an upload the server has kept."""
    kept = fleet.volumes.GetVolume(volume_pb2.GetVolumeRequest(name=volume), timeout=30)
    return next((part.received_bytes for part in kept.status.uploads if part.upload_id == upload_id), 0)


def _messages(
    volume: str,
    start: volume_pb2.UploadStart,
    file: BinaryIO,
    offset: int,
    length: int,
    progress: Callable[[int, int], None] | None,
) -> Iterator[volume_pb2.UploadVolumeRequest]:
    yield volume_pb2.UploadVolumeRequest(name=volume, start=start, request_id=f"{start.upload_id}-{offset}")
    file.seek(offset)
    while data := file.read(CHUNK_BYTES):
        message = volume_pb2.UploadVolumeRequest()
        message.chunk.offset = offset
        message.chunk.data = data
        yield message
        offset += len(data)
        if progress is not None:
            progress(offset, length)


def download(
    fleet: Fleet, volume: str, path: Path, *, progress: Callable[[int, int], None] | None = None
) -> volume_pb2.DownloadStart:
    """Write the content of a volume into a new file; runs of zeros become holes.

    Args:
        fleet: The connection.
        volume: `nodes/{node}/pools/{pool}/volumes/{volume}`.
        path: The file; it must not exist.
        progress: Is called with the bytes received and those in all.

    Raises:
        VirtfleetError: The server refuses or the connection breaks; the file is removed.
        FileExistsError: The file exists.
    """
    with path.open("xb") as file:
        try:
            start = volume_pb2.DownloadStart()
            for message in fleet.volumes.DownloadVolume(volume_pb2.DownloadVolumeRequest(name=volume)):
                if message.HasField("start"):
                    start.CopyFrom(message.start)
                    file.truncate(start.length_bytes)
                    continue
                end = message.chunk.offset + (len(message.chunk.data) or message.chunk.hole_length)
                if message.chunk.HasField("data"):
                    file.seek(message.chunk.offset - start.offset_bytes)
                    file.write(message.chunk.data)
                if progress is not None:
                    progress(end, start.length_bytes)
        except BaseException:
            path.unlink()
            raise
    return start

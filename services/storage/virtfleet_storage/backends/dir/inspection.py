"""What can be told of a file without letting it decide anything."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import Final

from virtfleet_service.errors import PathOutsidePool, ResourceNotFound, VirtfleetError
from virtfleet_storage.backends.api import QCOW2, RAW, Facts, Format, Header, format_word
from virtfleet_storage.backends.dir import paths, qcow2, staging

ARRIVAL_SECONDS: Final = 10.0
"""So long may a file that somebody copies into a pool be empty. Its first bytes decide what it is, once and for all."""


def look(directory: int, name: str, format: Format | None) -> Facts | None:
    """Look at an entry of a pool's directory; None: it is none that can be a volume.

    A folder, a hidden or unprintable name is passed over, and so is an unknown file that is empty and has just been
    made: taken for raw, it would stay raw whatever is copied into it. A known volume that has become a link or the
    like is told as one that is refused. What an unknown file is taken for is noted beside its data.

    Args:
        directory: The open directory.
        name: The entry.
        format: The format that it is known to have; None: it is not known.
    """
    if not paths.acceptable_name(name):
        return None
    try:
        file = paths.open_file(directory, name)
    except PathOutsidePool as error:
        return unreadable(name, format, error)
    try:
        if format is None and _arriving(file):
            return None
        if format is None:
            format = detect(file)
            # Whoever is given the file may write what he likes into it: it is to be this also for a store that is new.
            with suppress(OSError):
                staging.mark_format(file, format_word(format))
        return facts_of(file, name, format)
    finally:
        os.close(file)


def unreadable(name: str, format: Format | None, error: VirtfleetError) -> Facts | None:
    """Tell of an entry that cannot be read: of a known volume as one that is refused, of others nothing."""
    if format is None:
        return None
    return Facts(name, format, 0, 0, 0, "", "", refusal=error.reason, refusal_message=error.message)


def _arriving(file: int) -> bool:
    status = os.fstat(file)
    return status.st_size == 0 and 0 <= time.time() - status.st_mtime < ARRIVAL_SECONDS


def detect(file: int) -> Format:
    """Return the format of an unknown file: what the service once noted beside it, else by its first bytes."""
    noted = staging.marked_format(file)
    if noted == "raw":
        return RAW
    if noted == "qcow2" or os.pread(file, len(qcow2.MAGIC), 0) == qcow2.MAGIC:
        return QCOW2
    return RAW


def facts_of(file: int, key: str, format: Format) -> Facts:
    """Look at an open file as a volume of a format."""
    status = os.fstat(file)
    if status.st_nlink == 0:
        raise ResourceNotFound(f"file {key!r} has been removed", path=key)
    identity = paths.identity_of(status)
    version = f"{status.st_mtime_ns:x}.{status.st_size:x}"
    allocation, size = status.st_blocks * 512, status.st_size
    if format != QCOW2:
        return Facts(key, format, size, allocation, size, identity, version)
    try:
        header = qcow2.read_header(file, size)
    except qcow2.HeaderError as error:
        message = f"{key} is no qcow2 image: {error}"
        return Facts(
            key, format, 0, allocation, size, identity, version, refusal="IMAGE_CORRUPT", refusal_message=message
        )
    return Facts(
        key,
        format,
        header.virtual_size_bytes,
        allocation,
        size,
        identity,
        version,
        Header(header.backing, header.backing_format, header.cluster_size_bytes, header.version),
        header.refusal,
        header.refusal_message,
    )

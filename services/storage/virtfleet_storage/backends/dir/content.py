"""Reads, copies and overwrites what files hold, without touching what they do not store."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator

from virtfleet_storage.backends.api import Piece, Progress
from virtfleet_storage.backends.dir.staging import ZEROS

PIECE_BYTES = 1 << 20
_FICLONE = 0x40049409
_COPY_BYTES = 16 << 20
_SYNC_BYTES = 256 << 20


class Stopped(Exception):  # no error: somebody asked for it
    """The work was told to stop."""


def extents(descriptor: int, offset: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """Yield (from, to, whether data is stored there) in order, all of the range."""
    at = offset
    while at < end:
        try:
            data = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            data = end
        data = min(data, end)
        if data > at:
            yield at, data, False
        if data >= end:
            return
        hole = min(os.lseek(descriptor, data, os.SEEK_HOLE), end)
        if hole <= data:
            # The file has become shorter meanwhile.
            yield data, end, False
            return
        yield data, hole, True
        at = hole


def pieces(descriptor: int, offset: int, length: int) -> Iterator[Piece]:
    """Read a range as pieces of at most 1 MiB and as holes. Has its own position: several may read one descriptor."""
    for start, end, stored in extents(descriptor, offset, offset + length):
        if not stored:
            yield Piece(start, end - start, None)
            continue
        at = start
        while at < end:
            data = os.pread(descriptor, min(PIECE_BYTES, end - at), at)
            if not data:
                yield Piece(at, end - at, None)
                break
            yield Piece(at, len(data), data)
            at += len(data)


def copy(source: int, target: int, length: int, progress: Progress, stop: threading.Event) -> None:
    """Copy a file's stored extents into an empty one, by reference where the file system can.

    Raises:
        Stopped: `stop` was set.
    """
    os.ftruncate(target, length)
    if os.fstat(source).st_size == length and _clone(source, target):
        progress(length, length)
        return
    for start, end, stored in extents(source, 0, length):
        at = start
        while stored and at < end:
            _check(stop)
            at += _copy_some(source, target, at, min(end - at, _COPY_BYTES)) or end - at
            progress(at, length)
        progress(end, length)


def _clone(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS):
            return False
        raise
    return True


def _copy_some(source: int, target: int, at: int, length: int) -> int:
    try:
        return os.copy_file_range(source, target, length, at, at)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
    data = os.pread(source, min(length, PIECE_BYTES), at)
    return write_all(target, data, at)


def write_all(descriptor: int, data: bytes, at: int) -> int:
    """Write all of the bytes; returns how many."""
    view, written = memoryview(data), 0
    while written < len(data):
        written += os.pwrite(descriptor, view[written:], at + written)
    return written


def overwrite(
    descriptor: int, progress: Progress, stop: threading.Event, *, start: int = 0, end: int | None = None
) -> None:
    """Overwrite all that a file stores with zeros, safe from a power cut. What it does not store stays so.

    Args:
        descriptor: The file.
        progress: Is told how far it is.
        stop: Ends it early.
        start: Where it begins.
        end: Where it ends; None: at the end of the file.

    Raises:
        Stopped: `stop` was set; a part is overwritten.
    """
    size = os.fstat(descriptor).st_size
    size = size if end is None else min(size, end)
    unsynced = 0
    for first, last, stored in list(extents(descriptor, min(start, size), size)):
        at = first
        while stored and at < last:
            _check(stop)
            at += os.pwrite(descriptor, memoryview(ZEROS)[: last - at], at)
            unsynced += len(ZEROS)
            if unsynced >= _SYNC_BYTES:
                os.fdatasync(descriptor)
                unsynced = 0
            progress(at, size)
    os.fsync(descriptor)
    progress(size, size)


def fill(descriptor: int, start: int, end: int, stop: threading.Event) -> None:
    """Take room by writing zeros.

    Raises:
        Stopped: `stop` was set.
    """
    at = start
    while at < end:
        _check(stop)
        at += os.pwrite(descriptor, memoryview(ZEROS)[: end - at], at)


def _check(stop: threading.Event) -> None:
    if stop.is_set():
        raise Stopped


def stoppable(work: Callable[[threading.Event], None]) -> tuple[Callable[[], None], threading.Event]:
    """Return work that runs in a thread, with what stops it."""
    stop = threading.Event()
    return (lambda: work(stop)), stop

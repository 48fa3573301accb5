"""The console ring: a file of fixed size, mapped, that outlives the launcher; readers are cursors into it.

Layout: one page of header, then the ring. The header is 8 bytes of magic, then u64: size, low (oldest byte that is
valid), total (bytes ever written in this run), number of epochs; then pairs (epoch, its first byte), newest last. `low`
moves before the data is overwritten and `total` after it was written, so a kill in between loses bytes but never shows
wrong ones.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from typing import NamedTuple

__all__ = ["Piece", "Ring", "RingError"]

_HEADER = 4096
_MAGIC = b"VFRING01"
_FIXED = struct.Struct("<8sQQQQ")
_LOW_TOTAL = struct.Struct("<QQ")
_LOW_AT = 16
_PAIR = struct.Struct("<QQ")
_MAX_EPOCHS = 128


class RingError(Exception):
    """The file is no ring."""


class Piece(NamedTuple):
    """What a cursor meets next: bytes, or a hole of `skipped` bytes (None: nobody counted them)."""

    epoch: int
    offset: int
    data: bytes = b""
    gap: bool = False
    skipped: int | None = 0


class Ring:
    """One console's ring."""

    def __init__(self, path: str) -> None:
        """Map the ring of an existing file.

        Raises:
            RingError: the file is no ring.
            OSError: it cannot be opened.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            length = os.fstat(descriptor).st_size
            if length <= _HEADER:
                raise RingError(path)
            self._map = mmap.mmap(descriptor, length)
        finally:
            os.close(descriptor)
        magic, self.size, self.low, self.total, count = _FIXED.unpack_from(self._map)
        sound = magic == _MAGIC and length == _HEADER + self.size and count <= _MAX_EPOCHS
        if not sound or not self.low <= self.total <= self.low + self.size:
            self._map.close()
            raise RingError(path)
        self.epochs: list[tuple[int, int]] = [
            _PAIR.unpack_from(self._map, _FIXED.size + index * _PAIR.size) for index in range(count)
        ]

    @classmethod
    def create(cls, path: str, size: int) -> Ring:
        """Make a ring with its first epoch.

        Raises:
            OSError: ENOSPC; the room is taken now, because a mapped page without room kills who writes to it.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, _HEADER + size)
            os.pwrite(descriptor, _FIXED.pack(_MAGIC, size, 0, 0, 0), 0)
        finally:
            os.close(descriptor)
        ring = cls(path)
        ring.begin_epoch()
        return ring

    def begin_epoch(self) -> None:
        """Start an epoch here: whatever came between the last byte and now is lost uncounted."""
        # From the clock, so that an epoch of another run is never taken for one of this run.
        epoch = max(time.time_ns() // 1000, self.epochs[-1][0] + 1 if self.epochs else 1)
        self.epochs = [*self.epochs, (epoch, self.total)][-_MAX_EPOCHS:]
        for index, pair in enumerate(self.epochs):
            _PAIR.pack_into(self._map, _FIXED.size + index * _PAIR.size, *pair)
        _FIXED.pack_into(self._map, 0, _MAGIC, self.size, self.low, self.total, len(self.epochs))

    @property
    def epoch(self) -> int:
        """The epoch that is being written."""
        return self.epochs[-1][0]

    def write(self, data: bytes) -> None:
        """Append bytes; the oldest make room."""
        end = self.total + len(data)
        self.low = max(self.low, end - self.size)
        _LOW_TOTAL.pack_into(self._map, _LOW_AT, min(self.low, self.total), self.total)
        kept = data[-self.size :]
        at = (end - len(kept)) % self.size
        first = min(len(kept), self.size - at)
        self._map[_HEADER + at : _HEADER + at + first] = kept[:first]
        self._map[_HEADER : _HEADER + len(kept) - first] = kept[first:]
        self.total = end
        _LOW_TOTAL.pack_into(self._map, _LOW_AT, self.low, self.total)

    def start_of(self, epoch: int) -> int | None:
        """Return the first byte of an epoch of this run, None where it is of another run or too old."""
        return next((first for number, first in self.epochs if number == epoch), None)

    def end_of(self, epoch: int) -> int:
        """Return the byte after the last of an epoch of this run."""
        index = [number for number, _ in self.epochs].index(epoch)
        return self.epochs[index + 1][1] if index + 1 < len(self.epochs) else self.total

    def knows(self, epoch: int, offset: int) -> bool:
        """Tell whether this place was ever in this run's output."""
        first = self.start_of(epoch)
        return first is not None and first <= offset <= self.end_of(epoch)

    def oldest(self) -> tuple[int, int]:
        """Return the place of the oldest byte."""
        for epoch, first in self.epochs:
            place = max(first, self.low)
            if place < self.end_of(epoch):
                return epoch, place
        return self.epoch, self.total

    def newest(self) -> tuple[int, int]:
        """Return the place where the next byte goes."""
        return self.epoch, self.total

    def next(self, epoch: int, offset: int, limit: int) -> Piece | None:
        """Return what a cursor meets next: at most `limit` bytes, a hole, or None at the end."""
        if not self.knows(epoch, offset):
            return Piece(*self.oldest(), gap=True, skipped=None)
        if offset < self.low:
            there = self.oldest()
            return Piece(*there, gap=True, skipped=there[1] - offset if there[0] == epoch else None)
        end = min(self.end_of(epoch), offset + limit)
        if offset < end:
            return Piece(epoch, offset, self._read(offset, end))
        if epoch == self.epoch:
            return None
        following = self.epochs[[number for number, _ in self.epochs].index(epoch) + 1]
        return Piece(following[0], following[1], gap=True, skipped=None)

    def _read(self, start: int, end: int) -> bytes:
        at, length = start % self.size, end - start
        first = min(length, self.size - at)
        return self._map[_HEADER + at : _HEADER + at + first] + self._map[_HEADER : _HEADER + length - first]

    def close(self) -> None:
        """Unmap it; the file stays."""
        self._map.close()

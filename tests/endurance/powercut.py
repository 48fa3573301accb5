"""A power cut at any moment of a process: what it wrote is replayed from a record, and what it did not sync is dropped.

`powercut.c` records. A cut is a place in the record. Of what was not synced before it, a disk may hold nothing, or any
sectors in any order: both are built. A name in a folder holds only if the folder was synced after it was given.
"""

from __future__ import annotations

import os
import random
import struct
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SECTOR_BYTES = 512
ACKNOWLEDGED = b"a"
_HEADER = struct.Struct("<c3xIQQ")


@dataclass(frozen=True, slots=True)
class Record:
    """Is one thing that was done: see `powercut.c`; `a` is an acknowledgement, its text in `data`."""

    kind: bytes
    path: str
    offset: int
    data: bytes
    """What was written; the new path of a rename."""


def build(folder: Path) -> Path:
    """Compile the recorder."""
    library = folder / "powercut.so"
    source = Path(__file__).with_name("powercut.c")
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(library), str(source), "-ldl"]
    subprocess.run([*command, "-lpthread"], check=True, timeout=60)
    return library


def environment(library: Path, folder: Path, log: Path) -> dict[str, str]:
    """Return the variables with which a process is recorded; the log is made."""
    log.touch()
    return {**os.environ, "LD_PRELOAD": str(library), "POWERCUT_FOLDER": str(folder), "POWERCUT_LOG": str(log)}


class Acknowledgements:
    """Puts what a client was told into the record, in its place among what was done."""

    def __init__(self, log: Path) -> None:
        self._descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def add(self, text: str) -> None:
        """Note that this has been acknowledged."""
        data = text.encode()
        record = _HEADER.pack(ACKNOWLEDGED, 0, 0, len(data)) + data
        assert os.write(self._descriptor, record) == len(record)

    def close(self) -> None:
        """Close the record."""
        os.close(self._descriptor)


def read(log: Path) -> list[Record]:
    """Return the record; a last one that the end of a process has cut is left out."""
    content = log.read_bytes()
    records = []
    at = 0
    while at + _HEADER.size <= len(content):
        kind, path_bytes, offset, size = _HEADER.unpack_from(content, at)
        at += _HEADER.size
        end = at + path_bytes + (size if kind in b"wra" else 0)
        if end > len(content):
            break
        records.append(Record(kind, content[at : at + path_bytes].decode(), offset, content[at + path_bytes : end]))
        at = end
    return records


@dataclass(slots=True)
class _File:
    synced: bytearray = field(default_factory=bytearray)
    pending: list[Record] = field(default_factory=list)

    def sync(self) -> None:
        for record in self.pending:
            _apply(self.synced, record.kind, record.offset, record.data)
        self.pending.clear()

    def torn(self, chance: random.Random) -> bytearray:
        """Return what a disk may hold: of what is pending, any sectors."""
        content = bytearray(self.synced)
        for record in self.pending:
            if record.kind == b"t":
                if chance.random() < 0.5:
                    _apply(content, b"t", record.offset, b"")
                continue
            at = 0
            while at < len(record.data):
                size = min(SECTOR_BYTES - (record.offset + at) % SECTOR_BYTES, len(record.data) - at)
                if chance.random() < 0.5:
                    _apply(content, b"w", record.offset + at, record.data[at : at + size])
                at += size
        return content


def _apply(content: bytearray, kind: bytes, offset: int, data: bytes) -> None:
    if kind == b"t":
        del content[offset:]
    end = offset + len(data)
    if len(content) < end:
        content.extend(bytes(end - len(content)))
    content[offset:end] = data


class Disk:
    """Is a disk on which a record is replayed, step by step."""

    def __init__(self) -> None:
        self._names: dict[str, _File] = {}
        self._durable: dict[str, _File] = {}

    def take(self, record: Record) -> None:
        """Replay a step."""
        if record.kind in b"wt":
            self._names.setdefault(record.path, _File()).pending.append(record)
        elif record.kind == b"u":
            self._names.pop(record.path, None)
        elif record.kind == b"r":
            moved = self._names.pop(record.path, None)
            if moved is not None:
                self._names[record.data.decode()] = moved
        elif record.kind == b"s" and record.path in self._names:
            self._names[record.path].sync()
        elif record.kind == b"s":
            # A folder: the names in it are as they are now.
            inside = {name: file for name, file in self._names.items() if os.path.dirname(name) == record.path}  # noqa: PTH120
            gone = [name for name in self._durable if os.path.dirname(name) == record.path]  # noqa: PTH120
            for name in gone:
                del self._durable[name]
            self._durable |= inside

    def image(self, target: Path, chance: random.Random | None) -> None:
        """Write what is on the disk after a cut now.

        Args:
            target: The folder to write to.
            chance: Chooses which of what is not synced is there; None: nothing of it is.
        """
        names = dict(self._durable)
        if chance is not None:
            for name in sorted(self._names.keys() | self._durable.keys()):
                if self._names.get(name) is not self._durable.get(name) and chance.random() < 0.5:
                    names.pop(name, None)
                    if name in self._names:
                        names[name] = self._names[name]
        for name, file in names.items():
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.synced if chance is None else file.torn(chance))


def cuts(records: Sequence[Record], count: int, chance: random.Random) -> Iterator[tuple[int, list[str], Disk]]:
    """Cut a record at so many places; yields the place, what was acknowledged before it, and the disk."""
    places = set(chance.sample(range(1, len(records) + 1), min(count, len(records))))
    disk = Disk()
    acknowledged: list[str] = []
    for number, record in enumerate(records, start=1):
        if record.kind == ACKNOWLEDGED:
            acknowledged.append(record.data.decode())
        else:
            disk.take(record)
        if number in places:
            yield number, acknowledged, disk

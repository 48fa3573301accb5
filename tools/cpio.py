"""Write archives in the `newc` format of cpio, which the kernel unpacks as its first root file system."""

from __future__ import annotations

import stat
from dataclasses import dataclass, field

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"


@dataclass
class Archive:
    """An archive in the making; the same entries in the same order give the same bytes."""

    _parts: list[bytes] = field(default_factory=list)
    _inode: int = 0

    def _add(self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device, device of a node, length of the name, checksum
        fields = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(encoded), 0)
        header = _MAGIC + b"".join(b"%08X" % number for number in fields)
        for part in (header + encoded, content):
            self._parts.append(part + b"\0" * (-len(part) % 4))

    def directory(self, name: str) -> None:
        """Add a directory; its parent must be there already."""
        self._add(name, stat.S_IFDIR | 0o755)

    def file(self, name: str, content: bytes, *, executable: bool = False) -> None:
        """Add a regular file."""
        self._add(name, stat.S_IFREG | (0o755 if executable else 0o644), content)

    def link(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, name: str, major: int, minor: int) -> None:
        """Add a character device; needs no privilege, it is only a record here."""
        self._add(name, stat.S_IFCHR | 0o600, device=(major, minor))

    def content(self) -> bytes:
        """Return the finished archive."""
        self._add(_TRAILER, 0)
        done = b"".join(self._parts)
        return done + b"\0" * (-len(done) % 512)

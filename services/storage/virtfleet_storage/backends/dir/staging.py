"""Volumes in the making: files in a hidden folder of the pool, so that giving one its place is a rename.

Every such file is found again by its name after a crash and is removed unless somebody says that it is still needed.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass

from virtfleet_service.errors import BackingMissing, ChecksumMismatch, PathOutsidePool, ResourceNotFound, WouldOverwrite
from virtfleet_storage.backends.api import Piece
from virtfleet_storage.backends.dir import paths

FOLDER = ".virtfleet"
"""The folder of the service inside a pool; mode 0700."""

OWNER_FILE = "pool"
"""The file in that folder that holds the uid of the pool."""

FORMAT_ATTRIBUTE = "user.virtfleet.format"
"""Remembers the format beside the data, so that a lost store does not let a guest choose it by what it writes."""

ZEROS = bytes(1 << 20)

_RENAME_NOREPLACE = 1
_UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM, errno.ENOSPC})

_libc = ctypes.CDLL(None, use_errno=True)


def rename(source: tuple[int, str], target: tuple[int, str], flags: int) -> None:
    """Rename with the flags of renameat2, which Python's own call does not have."""
    done = _libc.renameat2(source[0], os.fsencode(source[1]), target[0], os.fsencode(target[1]), flags)
    if done != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def rename_new(source: tuple[int, str], target: tuple[int, str]) -> None:
    """Rename to a name that must be free.

    Raises:
        FileExistsError: It is not.
    """
    try:
        rename(source, target, _RENAME_NOREPLACE)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    else:
        return
    # File systems of the network know no such flag. A second name is refused as well where there is one; whoever
    # dies before the first one is gone leaves it, to be swept away.
    os.link(source[1], target[1], src_dir_fd=source[0], dst_dir_fd=target[0], follow_symlinks=False)
    os.unlink(source[1], dir_fd=source[0])


@dataclass(frozen=True, slots=True)
class StagingArea:
    """Is the folder of the service in one pool. All methods block; they are called in threads.

    Attributes:
        pool: The descriptor of the pool's directory.
        folder: The descriptor of the folder.
    """

    pool: int
    folder: int

    @classmethod
    def open(cls, pool: int) -> StagingArea:
        """Open the folder, and make it if it is missing.

        Raises:
            PathOutsidePool: Something else stands there, or somebody else owns it.
        """
        try:
            os.mkdir(FOLDER, 0o700, dir_fd=pool)
        except FileExistsError:
            pass
        else:
            os.fsync(pool)
        folder = cls._open_existing(pool)
        if folder is None:
            raise BackingMissing(f"folder {FOLDER} vanished", path=FOLDER)
        return cls(pool, folder)

    @classmethod
    def find(cls, pool: int) -> StagingArea | None:
        """Open the folder if it is there."""
        folder = cls._open_existing(pool)
        return None if folder is None else cls(pool, folder)

    @staticmethod
    def _open_existing(pool: int) -> int | None:
        try:
            folder = os.open(FOLDER, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=pool)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise PathOutsidePool(f"{FOLDER} in the pool is a link or no folder", path=FOLDER) from error
            raise
        facts = os.fstat(folder)
        if facts.st_uid != os.geteuid() or stat.S_IMODE(facts.st_mode) & 0o022:
            os.close(folder)
            raise PathOutsidePool(f"others may write to {FOLDER} in the pool", path=FOLDER)
        return folder

    def close(self) -> None:
        """Let go of the folder (not of the pool's directory)."""
        os.close(self.folder)

    def owner(self) -> str:
        """Return the uid of the pool that the place remembers; empty: none."""
        try:
            file = os.open(OWNER_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.folder)
        except FileNotFoundError:
            return ""
        try:
            return os.read(file, 64).decode("ascii", "replace").strip()
        finally:
            os.close(file)

    def claim(self, pool_uid: str) -> None:
        """Let the place remember a pool, safe from a power cut."""
        name = f"{OWNER_FILE}.{secrets.token_hex(4)}"
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=self.folder)
        try:
            os.write(file, f"{pool_uid}\n".encode())
            os.fsync(file)
        finally:
            os.close(file)
        os.rename(name, OWNER_FILE, src_dir_fd=self.folder, dst_dir_fd=self.folder)
        os.fsync(self.folder)

    def make(self, token: str = "") -> StagedFile:
        """Make an empty staged file."""
        token = token or f"new-{secrets.token_hex(16)}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return StagedFile(self, token, os.open(token, flags, 0o600, dir_fd=self.folder))

    def find_file(self, token: str) -> StagedFile | None:
        """Open a staged file again; None if it is gone."""
        try:
            descriptor = os.open(token, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.folder)
        except FileNotFoundError:
            return None
        return StagedFile(self, token, descriptor)

    def sweep(self, keep: frozenset[str]) -> int:
        """Remove all staged files but some; returns how many."""
        removed = 0
        for name in os.listdir(self.folder):  # noqa: PTH208  # a descriptor has no Path
            if name != OWNER_FILE and name not in keep:
                os.unlink(name, dir_fd=self.folder)
                removed += 1
        return removed

    def is_nobodys(self) -> bool:
        """Tell whether the folder holds nothing but what a claim had begun with, or the end of one had left."""
        return all(name.startswith(f"{OWNER_FILE}.") for name in os.listdir(self.folder))  # noqa: PTH208  # see below

    def retire(self) -> None:
        """Remove the folder with all that is in it."""
        # Whose it is goes last: whoever dies in between finds it again by that.
        for name in sorted(os.listdir(self.folder), key=OWNER_FILE.__eq__):  # noqa: PTH208  # a descriptor has no Path
            os.unlink(name, dir_fd=self.folder)
        os.rmdir(FOLDER, dir_fd=self.pool)
        os.fsync(self.pool)


class StagedFile:
    """Is a staged file that is open. All methods block; they are called in threads."""

    def __init__(self, area: StagingArea, token: str, descriptor: int) -> None:
        self.area = area
        self.token = token
        self.descriptor = descriptor
        self.identity = paths.identity_of(os.fstat(descriptor))

    def close(self) -> None:
        """Let go of the file. Repeatable."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def discard(self) -> None:
        """Remove the file, unless it has been given its place (or the name is another file's by now)."""
        try:
            facts = os.stat(self.token, dir_fd=self.area.folder, follow_symlinks=False)
        except FileNotFoundError:
            return
        if paths.identity_of(facts) == self.identity:
            os.unlink(self.token, dir_fd=self.area.folder)

    def mark_format(self, word: str) -> None:
        """Remember the format beside the data, where the file system can."""
        mark_format(self.descriptor, word)

    def publish(self, key: str) -> None:
        """Give the file its place, which must be free, safe from a power cut.

        Raises:
            WouldOverwrite: It is not free.
        """
        os.fsync(self.descriptor)
        try:
            rename_new((self.area.folder, self.token), (self.area.pool, key))
        except FileExistsError as error:
            raise WouldOverwrite(f"there is a file {key!r} in the pool", path=key) from error
        os.fsync(self.area.pool)
        os.fsync(self.area.folder)

    def replace(self, key: str, identity: str) -> None:
        """Put the file in the place of another; owner, mode and remembered format of that one stay.

        Raises:
            BackingMissing: The other is gone or is not the one meant.
        """
        try:
            old = paths.open_file(self.area.pool, key, os.O_RDONLY)
        except ResourceNotFound as error:
            raise BackingMissing(f"file {key!r} is gone", path=key) from error
        try:
            facts = os.fstat(old)
            if paths.identity_of(facts) != identity:
                raise BackingMissing(f"file {key!r} has been replaced by another one", path=key)
            os.fchown(self.descriptor, facts.st_uid, facts.st_gid)
            os.fchmod(self.descriptor, stat.S_IMODE(facts.st_mode))
            word = marked_format(old)
            if word:
                mark_format(self.descriptor, word)
            os.fsync(self.descriptor)
            os.rename(self.token, key, src_dir_fd=self.area.folder, dst_dir_fd=self.area.pool)
        finally:
            os.close(old)
        os.fsync(self.area.pool)
        os.fsync(self.area.folder)


def mark_format(descriptor: int, word: str) -> None:
    """Remember a format beside the data, where the file system can."""
    try:
        os.setxattr(descriptor, FORMAT_ATTRIBUTE, word.encode())
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def marked_format(descriptor: int) -> str:
    """Return the remembered format; empty: none."""
    try:
        return os.getxattr(descriptor, FORMAT_ATTRIBUTE).decode("ascii", "replace")
    except OSError as error:
        if error.errno not in (*_UNSUPPORTED, errno.ENODATA):
            raise
        return ""


class UploadFile:
    """Writes a staged file from its beginning and digests what it writes. All methods block; one thread at a time."""

    def __init__(self, file: StagedFile) -> None:
        self.file = file
        self.position = os.fstat(file.descriptor).st_size
        self._digest = hashlib.sha256()
        self._digested = 0

    def rewind(self, position: int) -> None:
        """Drop what stands behind a position and read again what stands before it, for the digest.

        Raises:
            ChecksumMismatch: Less stands there.
        """
        if position > self.position:
            raise ChecksumMismatch(f"only {self.position} bytes stand, not {position}", received_bytes=self.position)
        os.ftruncate(self.file.descriptor, position)
        if self._digested != position:
            self._digest, self._digested = hashlib.sha256(), 0
            while self._digested < position:
                data = os.pread(self.file.descriptor, min(len(ZEROS), position - self._digested), self._digested)
                self._digest.update(data)
                self._digested += len(data)
        self.position = position

    def write(self, pieces: Sequence[Piece]) -> None:
        """Add pieces that follow each other; `position` says how much stands, also after a failure."""
        for piece in pieces:
            if piece.data is None:
                self._skip(piece.length)
            else:
                self._put(piece.data)

    def _put(self, data: bytes) -> None:
        written, view = 0, memoryview(data)
        try:
            while written < len(data):
                written += os.pwrite(self.file.descriptor, view[written:], self.position + written)
        finally:
            self._digest.update(view[:written])
            self.position += written
            self._digested = self.position

    def _skip(self, length: int) -> None:
        os.ftruncate(self.file.descriptor, self.position + length)
        left = length
        while left:
            step = min(left, len(ZEROS))
            self._digest.update(ZEROS if step == len(ZEROS) else ZEROS[:step])
            left -= step
        self.position += length
        self._digested = self.position

    def digest(self) -> str:
        """Return the digest of all that stands."""
        return f"sha256:{self._digest.hexdigest()}"

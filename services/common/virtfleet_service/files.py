"""Small files, of a person's hand (settings, tokens, seeds) or our own (keys, lists), read within bounds.

So a wrong path costs neither memory nor time.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import IO, TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

LIMIT_BYTES: Final = 1 << 20
"""What such a file may have; those there are have some kilobytes."""


def read(path: Path, limit_bytes: int = LIMIT_BYTES) -> bytes:
    """Return what a file holds.

    Raises:
        OSError: It cannot be read, or (EFBIG) has more than the limit.
    """
    with path.open("rb") as file:
        return read_from(file, str(path), limit_bytes)


def read_kept(path: Path, limit_bytes: int = LIMIT_BYTES) -> bytes:
    """Return what a file holds that a process looks at while it serves; never waits for whoever writes to a pipe.

    Raises:
        OSError: It cannot be read, is a pipe (EINVAL), or (EFBIG) has more than the limit.
    """
    with open(path, "rb", opener=_at_once) as file:  # pathlib knows no opener
        if stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "is a pipe", str(path))
        return read_from(file, str(path), limit_bytes)


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def read_from(file: IO[bytes], name: str, limit_bytes: int = LIMIT_BYTES) -> bytes:
    """Return what is left of a file that is open, or of standard input.

    Raises:
        OSError: It cannot be read, or (EFBIG) has more than the limit.
    """
    content = file.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        raise OSError(errno.EFBIG, f"has more than {limit_bytes >> 20} MiB", name)
    return content


def open_to_others(path: Path) -> bool:
    """Tell whether a file on a disk can be read by anybody but its owner.

    Raises:
        OSError: It cannot be looked at.
    """
    mode = path.stat().st_mode
    return stat.S_ISREG(mode) and bool(mode & (stat.S_IRGRP | stat.S_IROTH))

"""Small files (contexts, certificates): bounded, so that a wrong path costs neither memory nor time."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Final

LIMIT_BYTES: Final = 1 << 20
"""What such a file may have; those there are have some kilobytes."""


def read(path: Path) -> bytes:
    """Return what a file holds.

    Raises:
        OSError: It cannot be read, or (EFBIG) has more than 1 MiB.
    """
    with path.open("rb") as file:
        content = file.read(LIMIT_BYTES + 1)
    if len(content) > LIMIT_BYTES:
        raise OSError(errno.EFBIG, f"has more than {LIMIT_BYTES >> 20} MiB", str(path))
    return content

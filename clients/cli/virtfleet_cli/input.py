"""What a person gives as a file or on standard input: bounded, so that a wrong path costs neither memory nor time."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import Final

LIMIT_BYTES: Final = 16 << 20
"""What an input may have; a resource has some kilobytes."""


class InputError(ValueError):
    """An input cannot be used; the text has its name."""


def read(file: str) -> str:
    """Return what a file says; `-` is standard input.

    Raises:
        InputError: It has more than 16 MiB, or is no UTF-8.
        OSError: It cannot be read.
    """
    data = _standard_input() if file == "-" else _file(file)
    if len(data) > LIMIT_BYTES:
        raise InputError(_too_long(file))
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        message = f"{file}: byte {error.start} is no UTF-8"
        raise InputError(message) from error


def _standard_input() -> bytes:
    # It is None where a caller has closed it.
    if sys.stdin is None:
        message = "-: standard input is closed"
        raise InputError(message)
    return sys.stdin.buffer.read(LIMIT_BYTES + 1)


def _file(name: str) -> bytes:
    with Path(name).open("rb") as file:
        known = os.fstat(file.fileno())
        # A pipe (`<(…)` of a shell) is an input like any other, and tells no size.
        if stat.S_ISREG(known.st_mode) and known.st_size > LIMIT_BYTES:
            raise InputError(_too_long(name))
        return file.read(LIMIT_BYTES + 1)


def _too_long(name: str) -> str:
    return f"{name}: has more than {LIMIT_BYTES >> 20} MiB: that is no file of resources"

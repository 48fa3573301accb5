"""JSON log lines on standard error; a log that cannot be written never stops the launcher."""

from __future__ import annotations

import contextlib
import json
import os
import time

__all__ = ["error", "info", "warning"]


def _write(level: str, message: str, fields: dict[str, object]) -> None:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
    line = json.dumps({"time": stamp + "Z", "level": level, "service": "launcher", "message": message, **fields})
    # The reader may be gone or its pipe broken; there is nobody left to tell.
    with contextlib.suppress(OSError):
        os.write(2, line.encode() + b"\n")


def info(message: str, **fields: object) -> None:
    """Write what happened."""
    _write("info", message, fields)


def warning(message: str, **fields: object) -> None:
    """Write what is weaker than asked for."""
    _write("warning", message, fields)


def error(message: str, **fields: object) -> None:
    """Write what failed."""
    _write("error", message, fields)

"""A clock that a test can move forward: for the process, and for the timers of its event loop."""

from __future__ import annotations

import asyncio
import time

_real_time, _real_time_ns, _real_monotonic = time.time, time.time_ns, time.monotonic


class MovableLoop(asyncio.SelectorEventLoop):
    """Is an event loop whose timers see the moved time."""

    def __init__(self) -> None:
        self.offset_seconds = 0.0
        super().__init__()

    def time(self) -> float:
        """Return the loop's time."""
        return _real_monotonic() + self.offset_seconds

    def advance(self, seconds: float) -> float:
        """Move the time of the whole process forward; returns by how much in all.

        What asks `time.time`, `time.time_ns` or `time.monotonic`, or waits with the loop, sees it at once. TLS does
        not: the end of a certificate stays where it is.
        """
        self.offset_seconds += seconds
        offset = self.offset_seconds
        time.time = lambda: _real_time() + offset
        time.time_ns = lambda: _real_time_ns() + round(offset * 1e9)
        time.monotonic = lambda: _real_monotonic() + offset
        return offset


def real_monotonic() -> float:
    """Return the time that nobody moves."""
    return _real_monotonic()

"""One lock for each thing that is worked on one at a time: a volume, a port, a network."""

from __future__ import annotations

import asyncio
from weakref import WeakValueDictionary


class Locks:
    """Gives everybody who asks for the same thing the same lock, and keeps none that nobody holds or waits for."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def of(self, key: str) -> asyncio.Lock:
        """Return the lock of a thing; it is the thing's as long as the caller, or another, has it in hand."""
        return self._locks.setdefault(key, asyncio.Lock())

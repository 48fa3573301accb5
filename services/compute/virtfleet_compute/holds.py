"""One holder per domain: a verb, an item of a batch, or the clean-up after a guest's end, never two of them at once.

What a driver tells about a held domain is kept until it is let go, and then compared with what the holder has recorded.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from virtfleet_compute.drivers.api import DomainObservation


class Hold:
    """Is the right to change one domain."""

    __slots__ = ("news", "seen", "uid")

    def __init__(self, uid: str) -> None:
        self.uid = uid
        self.seen: DomainObservation | None = None
        """What the holder has recorded; set by it."""
        self.news: DomainObservation | None = None
        """What the driver told meanwhile."""

    @property
    def outdated(self) -> bool:
        """Whether the driver told something that the holder does not know."""
        if self.news is None:
            return False
        if self.seen is None:
            return True
        told, known = self.news, self.seen
        return (told.state, told.reason, told.runtime_id) != (known.state, known.reason, known.runtime_id)


class Holds:
    """Gives out the holds of domains, in the order of asking.

    Args:
        outdated: Is called when a domain is let go of which the driver told something that its holder did not record.
    """

    def __init__(self, outdated: Callable[[str], None]) -> None:
        self._outdated = outdated
        self._held: dict[str, Hold] = {}
        self._waiting: dict[str, list[asyncio.Future[None]]] = {}

    def get(self, uid: str) -> Hold | None:
        """Return the hold of a domain; None: nobody has it."""
        return self._held.get(uid)

    async def acquire(self, uid: str) -> Hold:
        """Take a domain; waits while another has it."""
        while uid in self._held:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(uid, []).append(future)
            try:
                await future
            except asyncio.CancelledError:
                if future.done() and not future.cancelled():
                    self._wake(uid)
                raise
            finally:
                waiting = self._waiting.get(uid, [])
                if future in waiting:
                    waiting.remove(future)
                if not waiting:
                    self._waiting.pop(uid, None)
        hold = self._held[uid] = Hold(uid)
        return hold

    def release(self, hold: Hold) -> None:
        """Let a domain go; a second time is no harm."""
        if self._held.get(hold.uid) is not hold:
            return
        del self._held[hold.uid]
        if hold.outdated:
            self._outdated(hold.uid)
        self._wake(hold.uid)

    @asynccontextmanager
    async def held(self, uid: str) -> AsyncIterator[Hold]:
        """Hold a domain for a block."""
        hold = await self.acquire(uid)
        try:
            yield hold
        finally:
            self.release(hold)

    def _wake(self, uid: str) -> None:
        if uid in self._held:
            return
        for future in self._waiting.get(uid, ()):
            if not future.done():
                future.set_result(None)
                return

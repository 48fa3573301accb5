"""Keeps an eye on the pools: what the kernel tells of, what it does not, and places that come back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from virtfleet_service.errors import BackendUnreachable, VirtfleetError
from virtfleet_service.store import Store
from virtfleet_storage import catalog, lifecycle
from virtfleet_storage.attachments import Attachments
from virtfleet_storage.openings import Openings
from virtfleet_storage.places import Place, Places
from virtfleet_storage.refresh import Refresher
from virtfleet_storage.uploads import Uploads

_log = logging.getLogger(__name__)

SETTLE_SECONDS = 0.2
"""After a first change, how long further ones are waited for: a copy makes hundreds."""

LISTEN_AGAIN_SECONDS = 60.0
"""When the kernel does not tell of changes in a place, how long until it is asked again."""

EXPIRY_SECONDS = 60.0


class Keeper:
    """Owns the background tasks of the service, one per open pool and two for all.

    Args:
        store: The store.
        places: The open pools.
        openings: Opens those that come back.
        refresher: Looks at them.
        uploads: Drops what nobody goes on with.
        attachments: Sets right who may use the files of a pool that was away.
        rescan_seconds: How often each is looked at without a sign.
        expiry_seconds: How often uploads are looked through.
    """

    def __init__(
        self,
        store: Store,
        places: Places,
        openings: Openings,
        refresher: Refresher,
        uploads: Uploads,
        attachments: Attachments,
        *,
        rescan_seconds: float,
        expiry_seconds: float = EXPIRY_SECONDS,
    ) -> None:
        self._store = store
        self._places = places
        self._openings = openings
        self._refresher = refresher
        self._uploads = uploads
        self._attachments = attachments
        self._rescan_seconds = rescan_seconds
        self._expiry_seconds = expiry_seconds

    async def run(self) -> None:
        """Keep an eye on all until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._every(self._rescan_seconds, self._reopen), name="reopen pools")
            tasks.create_task(self._every(self._expiry_seconds, self._uploads.expire), name="expire uploads")
            kept: dict[str, tuple[Place, asyncio.Task[None]]] = {}
            while True:
                self._places.changed.clear()
                present = {place.pool: place for place in self._places.all()}
                for name, (place, task) in list(kept.items()):
                    if present.get(name) is not place or task.done():
                        task.cancel()
                        del kept[name]
                for name, place in present.items():
                    if name not in kept:
                        kept[name] = place, tasks.create_task(self._keep(place), name=f"keep {name}")
                await self._places.changed.wait()

    async def _keep(self, place: Place) -> None:
        """Look at one place whenever it stirs, and now and then; ends when the place is gone."""
        listening = asyncio.create_task(self._listen(place), name=f"listen to {place.pool}")
        try:
            # While the pool could not be reached guests may have ended.
            await _tried(self._attachments.settle(place.pool))
            while self._places.get(place.pool) is place and await self._look(place):
                await _signal(place.stir, self._rescan_seconds)
                if place.stir.is_set():
                    await _signal(asyncio.Event(), SETTLE_SECONDS)
                    place.stir.clear()
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    async def _look(self, place: Place) -> bool:
        """Look at a place; returns whether it is there. A look that could not be recorded is repeated."""
        try:
            await self._refresher.refresh(place)
        except BackendUnreachable as error:
            _log.warning("%s: %s", place.pool, error)
            await self._places.remove(place.pool)
            return False
        except VirtfleetError as error:
            _log.warning("%s is looked at again: %s", place.pool, error)
        except Exception:  # noqa: BLE001  # the boundary of one look: the next one must come
            _log.exception("%s could not be looked at", place.pool)
        return True

    @staticmethod
    async def _listen(place: Place) -> None:
        """Hear of changes. Where the kernel tells of none, the looks now and then find them."""
        while True:
            try:
                async with place.open.changes() as changes:
                    async for _ in changes:
                        place.stir.set()
            except VirtfleetError as error:
                _log.warning("changes of %s are only seen now and then: %s", place.pool, error)
            await _signal(asyncio.Event(), LISTEN_AGAIN_SECONDS)

    async def _reopen(self) -> None:
        """Try again to open what should run and does not."""
        for pool in catalog.pools(self._store.list(catalog.POOL)):
            if pool.status.state == lifecycle.INACCESSIBLE and self._places.get(pool.name) is None:
                await self._openings.try_open(pool.name)

    @staticmethod
    async def _every(seconds: float, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            await _signal(asyncio.Event(), seconds)
            await _tried(work())


async def _tried(work: Awaitable[None]) -> None:
    """Do something that is done again if it fails."""
    try:
        await work
    except VirtfleetError as error:
        _log.warning("what is done now and then waits: %s", error)
    except Exception:  # noqa: BLE001  # the boundary of one turn: the next one must come
        _log.exception("what is done now and then failed")


async def _signal(event: asyncio.Event, seconds: float) -> None:
    """Wait for an event, or for some time."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return

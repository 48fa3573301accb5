"""Opens the places of pools: when somebody asks, when the service starts, and when one that was away comes back."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

from virtfleet.storage.v1 import pool_pb2, watch_pb2
from virtfleet.type.v1 import resource_pb2
from virtfleet_service import resources
from virtfleet_service.errors import BackendFailed, BackendUnreachable, VirtfleetError, WrongState
from virtfleet_service.store import Store
from virtfleet_service.transaction import Transaction
from virtfleet_storage import catalog, lifecycle, refresh
from virtfleet_storage.places import Place, Places
from virtfleet_storage.refresh import Refresher

START_POOL = "virtfleet.storage.v1.PoolService.StartPool"

OPEN_SECONDS = 10.0
"""How long a place may take to answer before what else there is goes on without it."""


class Openings:
    """Opens pools.

    Args:
        store: Where they are recorded.
        places: The open ones.
        refresher: Looks at what was opened.
        root: Where pools lie whose spec names no path.
    """

    def __init__(self, store: Store, places: Places, refresher: Refresher, *, root: Path) -> None:
        self._store = store
        self._places = places
        self._refresher = refresher
        self._root = root
        self._opening: set[str] = set()
        self._tries: set[asyncio.Task[None]] = set()

    async def make_root(self, path: str) -> None:
        """Make the root of pools if a path lies directly in it.

        Raises:
            BackendFailed: The kernel refuses.
        """
        if Path(path).parent != self._root:
            return
        try:
            await asyncio.to_thread(self._make_root)
        except OSError as error:
            raise BackendFailed(
                f"the root of pools {self._root} cannot be made: {error.strerror}", path=self._root, cause=error
            ) from error

    def _make_root(self) -> None:
        # Guests reach their files through it, and list nothing.
        self._root.mkdir(parents=True, exist_ok=True)
        self._root.chmod(0o711)

    async def open(self, name: str, *, build: bool = False, look: bool = True, wanted: bool = True) -> None:
        """Open a pool's place, record that it runs, and find its volumes. Succeeds if it is open.

        Args:
            name: The pool.
            build: Make what is missing, and take the place whatever it remembers.
            look: Find its volumes. Not at start, before what a crash left is settled.
            wanted: Whether somebody asks for it; else it is opened only if it should run.

        Raises:
            BackingMissing: The place is gone, or is another one.
            IdentityInUse: It is the place of another pool by now.
            WrongState: It is not wanted, and was stopped meanwhile.
        """
        place = self._places.get(name)
        if place is not None:
            await self._refresher.refresh(place, exact=True)
            return
        if name in self._opening:
            raise BackendUnreachable(
                f"{name} is being opened already, and its place does not answer", resource=name, retry_delay_seconds=5.0
            )
        self._opening.add(name)
        try:
            await self._open(name, build=build, look=look, wanted=wanted)
        finally:
            self._opening.discard(name)

    async def _open(self, name: str, *, build: bool, look: bool, wanted: bool) -> None:
        pool = catalog.need_pool(self._store, name)
        backend = await self._places.ready_backend_of(pool.spec)
        path, built = pool.status.target_path, False
        if build:
            await self.make_root(path)
            built = await backend.build(path)
        others = {row.uid for row in self._store.list(catalog.POOL)}
        opened = await backend.open(path, pool.uid, claim=build, others=others)
        async with AsyncExitStack() as undo:
            undo.push_async_callback(opened.close)
            usage = await opened.usage()
            await opened.sweep(catalog.staged_tokens(self._store))
            place = Place(name, opened)
            for row in self._store.list(catalog.VOLUME, parent=name):
                volume = catalog.need_volume(self._store, row.name)
                place.formats[catalog.key_of(volume)] = volume.spec.format

            def running(tx: Transaction) -> None:
                current = catalog.need_pool(tx, name)
                fresh = current.status.state == lifecycle.INACTIVE
                if fresh and not wanted:
                    raise WrongState(f"{name} was stopped", resource=name, state="INACTIVE")
                refresh.found(tx, current, usage)
                catalog.put_pool(tx, current, cause=START_POOL)
                if built:
                    catalog.tell(tx, current, watch_pb2.EVENT_TYPE_POOL_BUILT)
                if fresh:
                    catalog.tell(tx, current, watch_pb2.EVENT_TYPE_POOL_STARTED)

            await self._store.write(running)
            undo.pop_all()
        self._places.add(place)
        if look:
            await self._refresher.refresh(place, exact=True)

    async def resume(self, *, booted: bool) -> None:
        """Open at start what should run: all that ran, or, after a boot of the node, what starts by itself."""
        wanting = []
        for pool in catalog.pools(self._store.list(catalog.POOL)):
            ran = pool.status.state not in (lifecycle.INACTIVE, pool_pb2.POOL_STATE_UNSPECIFIED)
            auto = pool.spec.autostart in (resource_pb2.AUTOSTART_ALWAYS, resource_pb2.AUTOSTART_ONCE)
            wanted = auto if booted else ran
            if booted and pool.spec.autostart == resource_pb2.AUTOSTART_ONCE:
                await self._store.write(partial(_start_no_more, name=pool.name))
            if wanted:
                wanting.append(pool.name)
            elif ran:
                await self._store.write(partial(_rest, name=pool.name))
        await asyncio.gather(*(self.try_open(name, look=False, wanted=True) for name in wanting))

    async def try_open(self, name: str, *, look: bool = True, wanted: bool = False) -> bool:
        """Open a pool that should run; record why not if that fails.

        A place that does not answer is left to come by itself: a file system that hangs must not keep the service from
        serving what else there is.
        """
        work = asyncio.create_task(self.open(name, look=look, wanted=wanted), name=f"open {name}")
        self._tries.add(work)
        work.add_done_callback(self._tried)
        done, _ = await asyncio.wait({work}, timeout=OPEN_SECONDS)
        error = work.exception() if done else BackendUnreachable(f"the place of {name} does not answer", resource=name)
        if error is None:
            return True
        if not isinstance(error, VirtfleetError):
            raise error
        failure = error
        if self._places.get(name) is None:
            await self._store.write(lambda tx: _inaccessible(tx, name, failure, wanted=wanted))
        return False

    def _tried(self, work: asyncio.Task[None]) -> None:
        self._tries.discard(work)
        if not work.cancelled():
            # Whoever did not wait for it reads it off the pool's status.
            work.exception()


def _inaccessible(tx: Transaction, name: str, error: VirtfleetError, *, wanted: bool) -> None:
    row = tx.get(name)
    if row is None:
        return
    pool = pool_pb2.Pool.FromString(row.body)
    if pool.status.state == lifecycle.INACTIVE:
        if not wanted:
            return
        pool.status.state = lifecycle.INACCESSIBLE
        catalog.put_pool(tx, pool, cause=catalog.OBSERVED)
    refresh.lost(tx, name, error)


def _rest(tx: Transaction, name: str) -> None:
    pool = catalog.need_pool(tx, name)
    pool.status.state, pool.status.state_reason = lifecycle.INACTIVE, "NODE_BOOTED"
    resources.clear_condition(pool.status.conditions, refresh.INACCESSIBLE)
    catalog.put_pool(tx, pool, cause=catalog.OBSERVED)
    catalog.tell(tx, pool, watch_pb2.EVENT_TYPE_POOL_STOPPED, reason="NODE_BOOTED")


def _start_no_more(tx: Transaction, name: str) -> None:
    pool = catalog.need_pool(tx, name)
    pool.spec.autostart = resource_pb2.AUTOSTART_NEVER
    catalog.touched(pool)
    catalog.put_pool(tx, pool, cause=catalog.OBSERVED)

"""The pools that are open in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from virtfleet.storage.v1 import pool_pb2
from virtfleet_service.errors import CapabilityMissing, DriverBroken, WrongState
from virtfleet_storage.backends.api import Facts, Format, OpenPool, PoolBackend


@dataclass(slots=True)
class Place:
    """Is one open pool.

    Attributes:
        pool: The name of the pool.
        open: The place itself.
        formats: What is known of the formats of its volumes, key → format; never changed by what a file holds.
        facts: What the last look found, key → facts.
        standing: What was last recorded of chain and refusal, key → something to compare.
        restless: The keys of what had changed at the last look.
        refreshing: Held while the place is compared with the store.
        stir: Set when something in the place has changed, or somebody wants it looked at.
    """

    pool: str
    open: OpenPool
    formats: dict[str, Format] = field(default_factory=dict)
    facts: dict[str, Facts] = field(default_factory=dict)
    standing: dict[str, object] = field(default_factory=dict)
    restless: set[str] = field(default_factory=set)
    refreshing: asyncio.Lock = field(default_factory=asyncio.Lock)
    stir: asyncio.Event = field(default_factory=asyncio.Event)

    def forget(self, key: str) -> None:
        """Let go of what is known of a volume that is gone."""
        for known in (self.formats, self.facts, self.standing):
            known.pop(key, None)


class Places:
    """Finds open pools.

    Args:
        backends: The kinds of pools, by name.
    """

    def __init__(self, backends: Mapping[str, PoolBackend]) -> None:
        self.backends = backends
        self._open: dict[str, Place] = {}
        self._loop = asyncio.get_running_loop()
        self.changed = asyncio.Event()
        """Set when a pool is opened or closed."""

    def get(self, pool: str) -> Place | None:
        """Return an open pool; None: it is not open."""
        return self._open.get(pool)

    def need(self, pool: str) -> Place:
        """Return an open pool.

        Raises:
            WrongState: It is not open.
        """
        place = self._open.get(pool)
        if place is None:
            raise WrongState(
                f"{pool} does not run: start it, or see its status for why it is inaccessible",
                resource=pool,
                state="not RUNNING",
            )
        return place

    def all(self) -> list[Place]:
        """Return all open pools."""
        return list(self._open.values())

    def by_path(self, directory: str) -> Place | None:
        """Return the open pool whose place is a path."""
        return next((place for place in self._open.values() if place.open.path == directory), None)

    def add(self, place: Place) -> None:
        """Take in an open pool. May be called in any thread."""
        self._open[place.pool] = place
        self._loop.call_soon_threadsafe(self.changed.set)

    async def remove(self, pool: str) -> None:
        """Let go of a pool. Succeeds if it is not open."""
        place = self._open.pop(pool, None)
        if place is not None:
            self.changed.set()
            async with place.refreshing:
                await place.open.close()

    async def close(self) -> None:
        """Let go of all."""
        for name in list(self._open):
            await self.remove(name)

    def backend_of(self, spec: pool_pb2.PoolSpec) -> PoolBackend:
        """Return the backend that a spec asks for.

        Raises:
            CapabilityMissing: It is not one of this service.
        """
        kind = spec.WhichOneof("backend") or "dir"
        backend = self.backends.get(kind)
        if backend is None:
            raise CapabilityMissing(
                f"pools of kind {kind} are not built into this service",
                field=f"pool.spec.{kind}",
                capability=f"pool.{kind}",
            )
        return backend

    async def ready_backend_of(self, spec: pool_pb2.PoolSpec) -> PoolBackend:
        """Return the backend that a spec asks for, if it can run here now.

        Raises:
            CapabilityMissing: It is not one of this service.
            DriverBroken: It cannot run here.
        """
        backend = self.backend_of(spec)
        reason = (await backend.probe()).reason
        if reason:
            raise DriverBroken(f"pools of kind {backend.kind} cannot run here: {reason}", cause=reason)
        return backend

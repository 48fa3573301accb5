"""Compares a pool with what is there, and makes the store say what is."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from virtfleet.storage.v1 import pool_pb2, watch_pb2
from virtfleet_service import names, resources
from virtfleet_service.errors import BackendUnreachable, VirtfleetError
from virtfleet_service.store import Store
from virtfleet_service.transaction import Transaction
from virtfleet_storage import catalog, chains, observation
from virtfleet_storage.backends.api import Facts, Usage, capabilities
from virtfleet_storage.claims import Claims, Look
from virtfleet_storage.observation import Sighting
from virtfleet_storage.places import Place, Places

_log = logging.getLogger(__name__)

INACCESSIBLE = "Inaccessible"
LOW_SPACE = "LowSpace"
READ_ONLY = "ReadOnly"
READ_ONLY_REASON = "READ_ONLY"

_BATCH = 200
"""How many volumes are written in one transaction: each must stay quick."""

T = TypeVar("T")

_LOW_SHARE = 20
_TOLD_SHARE = 1000


@dataclass(frozen=True, slots=True)
class Refresher:
    """Compares pools with their places; one look at a pool at a time."""

    store: Store
    places: Places
    claims: Claims

    async def refresh(self, place: Place, *, exact: bool = False) -> None:
        """Look at a place and record what is there.

        Args:
            place: The place.
            exact: Record the room to the byte, not only when it has changed by something worth telling.

        Raises:
            BackendUnreachable: The place is gone; it is recorded as that.
        """
        async with place.refreshing:
            with self.claims.look() as look:
                try:
                    usage = await place.open.usage()
                    undone = await self._remove_undone(place, look)
                    found = [facts for facts in await place.open.scan(place.formats) if facts.key not in undone]
                except VirtfleetError as error:
                    # Whatever it is: who cannot look at a place cannot use it.
                    failure = error
                    await self.store.write(lambda tx: lost(tx, place.pool, failure))
                    raise BackendUnreachable(f"{place.pool}: {error.message}", resource=place.pool) from error
                before = place.facts
                try:
                    await self._record(place, {facts.key: facts for facts in found}, look)
                    await self.store.write(lambda tx: self._record_pool(tx, place, usage, exact=exact))
                except BaseException:
                    # What was not recorded has not been seen: the next look must find it again.
                    place.facts = before
                    raise

    async def _remove_undone(self, place: Place, look: Look) -> set[str]:
        """Remove the files of creations that were undone while nobody could reach them; returns what stays for now."""
        row = self.store.get(place.pool)
        if row is None:
            return set()
        pool = pool_pb2.Pool.FromString(row.body)
        left = set()
        for file in catalog.undone(self.store, pool):
            if look.unstable(names.child(place.pool, "volumes", file.key)):
                # Another is being made under its name, and may have been given its inode.
                left.add(file.key)
                continue
            try:
                await place.open.delete(file.key, file.identity, unchanged_since_ns=file.time_ns)
            except VirtfleetError as error:
                _log.warning("%s of %s stays for now: %s", file.key, place.pool, error)
                left.add(file.key)
                continue
            await self.store.write(partial(catalog.delete_undone, pool=pool, key=file.key))
        return left

    async def _record(self, place: Place, found: dict[str, Facts], look: Look) -> None:
        before, place.facts = place.facts, found
        changed = {key for key, facts in found.items() if before.get(key) != facts}
        # A file that a guest was writing at the last look and that is quiet now was perhaps not told.
        quiet = place.restless - changed
        # What is on top of something can change its standing without a change of its own file.
        dependent = {key for key, facts in found.items() if facts.header.backing}
        place.restless = {key for key in changed if key in before}
        sightings = [
            await self._sighting(place, found[key], found, settled=key not in place.restless)
            for key in sorted((changed | quiet | dependent) & found.keys())
        ]
        sightings = [
            one
            for one in sightings
            if one.facts.key in changed | quiet or place.standing.get(one.facts.key) != one.standing
        ]
        for some in _batches(sightings):
            await self.store.write(partial(self._see, place=place, sightings=some, look=look))
        for keys in _batches([key for key in place.formats if key not in found]):
            await self.store.write(partial(self._lose, place=place, keys=keys, look=look))

    async def _sighting(self, place: Place, facts: Facts, found: dict[str, Facts], *, settled: bool) -> Sighting:
        path = f"{place.open.path}/{facts.key}"
        try:
            chains.refuse(facts, path)
            links = await chains.below(self.store, self.places, place, facts, found)
        except VirtfleetError as error:
            return Sighting(facts, refusal=error, settled=settled)
        return Sighting(facts, tuple(links), settled=settled)

    def _see(self, tx: Transaction, place: Place, sightings: Iterable[Sighting], look: Look) -> None:
        if tx.get(place.pool) is None:
            return
        for sighting in sightings:
            key = sighting.facts.key
            path = f"{place.open.path}/{key}"
            volume = catalog.volume_at(tx, path)
            name = volume.name if volume is not None else names.child(place.pool, "volumes", key)
            if look.unstable(name):
                # It is looked at again when whoever works on it is done.
                place.facts.pop(key, None)
                continue
            if volume is None:
                observation.adopt(tx, place.pool, path, sighting)
            elif volume.spec.format != sighting.facts.format:
                place.facts.pop(key, None)
                place.formats[key] = volume.spec.format
                continue
            else:
                observation.see(tx, volume, path, sighting)
            place.formats[key] = sighting.facts.format
            place.standing[key] = sighting.standing

    def _lose(self, tx: Transaction, place: Place, keys: Iterable[str], look: Look) -> None:
        for key in keys:
            volume = catalog.volume_at(tx, f"{place.open.path}/{key}")
            if volume is None:
                place.forget(key)
            elif not look.unstable(volume.name):
                observation.lose(tx, volume)
                place.standing.pop(key, None)
                if tx.get(volume.name) is None:
                    place.forget(key)

    def _record_pool(self, tx: Transaction, place: Place, usage: Usage, *, exact: bool) -> None:
        row = tx.get(place.pool)
        if row is None:
            return
        pool = pool_pb2.Pool.FromString(row.body)
        status = pool.status
        count = len(place.formats)
        told = abs(status.allocation_bytes - usage.allocation_bytes) * _TOLD_SHARE >= usage.capacity_bytes
        if exact or told or status.capacity_bytes != usage.capacity_bytes or status.volume_count != count:
            status.capacity_bytes = usage.capacity_bytes
            status.allocation_bytes = usage.allocation_bytes
            status.available_bytes = usage.available_bytes
            status.volume_count = count
            status.refresh_time.CopyFrom(resources.now())
        found(tx, pool, usage)
        catalog.put_pool(tx, pool, cause=catalog.OBSERVED)


def found(tx: Transaction, pool: pool_pb2.Pool, usage: Usage) -> None:
    """Write into a pool that its place is there, and whether it is nearly full."""
    status = pool.status
    if resources.clear_condition(status.conditions, INACCESSIBLE):
        catalog.tell(tx, pool, watch_pb2.EVENT_TYPE_BACKEND_BACK)
    status.state, status.state_reason = pool_pb2.POOL_STATE_RUNNING, ""
    if usage.read_only:
        status.state, status.state_reason = pool_pb2.POOL_STATE_DEGRADED, READ_ONLY_REASON
        message = "the file system is read-only: volumes can be read, and nothing can be changed"
        resources.set_condition(status.conditions, READ_ONLY, reason=READ_ONLY_REASON, message=message)
    else:
        resources.clear_condition(status.conditions, READ_ONLY)
    low = usage.available_bytes * _LOW_SHARE < usage.capacity_bytes
    if not low:
        resources.clear_condition(status.conditions, LOW_SPACE)
    elif resources.get_condition(status.conditions, LOW_SPACE) is None:
        resources.set_condition(
            status.conditions, LOW_SPACE, reason="POOL_FULL", message="less than a twentieth of the room is left"
        )
        catalog.tell(tx, pool, watch_pb2.EVENT_TYPE_LOW_SPACE)


def lost(tx: Transaction, name: str, error: VirtfleetError) -> None:
    """Record that the place of a pool cannot be reached."""
    row = tx.get(name)
    if row is None:
        return
    pool = pool_pb2.Pool.FromString(row.body)
    status = pool.status
    if status.state == pool_pb2.POOL_STATE_INACTIVE:
        return
    status.state, status.state_reason = pool_pb2.POOL_STATE_INACCESSIBLE, error.reason
    fresh = resources.get_condition(status.conditions, INACCESSIBLE) is None
    resources.set_condition(status.conditions, INACCESSIBLE, reason=error.reason, message=error.message)
    if fresh:
        catalog.tell(tx, pool, watch_pb2.EVENT_TYPE_BACKEND_LOST, reason=error.reason, message=error.message)
    catalog.put_pool(tx, pool, cause=catalog.OBSERVED)


def describe(pool: pool_pb2.Pool, places: Places, path: str) -> None:
    """Write into a pool what follows from its kind and place."""
    backend = places.backend_of(pool.spec)
    pool.status.backend = backend.kind
    pool.status.target_path = path
    pool.status.observed_generation = pool.generation
    del pool.status.capabilities[:]
    pool.status.capabilities.extend(sorted(capabilities(backend.pool_class, backend.formats)))


def _batches(items: list[T]) -> list[list[T]]:
    return [items[at : at + _BATCH] for at in range(0, len(items), _BATCH)]

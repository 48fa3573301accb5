"""What can be done with volumes, bytes of clients aside."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

from google.longrunning import operations_pb2
from google.protobuf import empty_pb2
from google.protobuf.message import Message

from virtfleet.storage.v1 import volume_pb2, watch_pb2
from virtfleet_service import failpoints, names, resources
from virtfleet_service.call import Call
from virtfleet_service.errors import (
    BackendFailed,
    CapabilityMissing,
    ChangeRolledBack,
    FieldConflict,
    IdentityInUse,
    PoolFull,
    ResourceExists,
    ResourceInUse,
    VirtfleetError,
)
from virtfleet_service.operations import Commit, Job, JournalEntry, Operations, plan
from virtfleet_service.store import Store
from virtfleet_service.transaction import Transaction
from virtfleet_storage import catalog, chains, lifecycle, observation, specs
from virtfleet_storage.backends.api import QCOW2, Facts, Plan, copying, resizing, wiping
from virtfleet_storage.chains import Link
from virtfleet_storage.claims import Claims
from virtfleet_storage.observation import Sighting
from virtfleet_storage.places import Place, Places
from virtfleet_storage.work import metadata_of, progress_of, run_claimed

_log = logging.getLogger(__name__)

SERVICE = "virtfleet.storage.v1.VolumeService"
USE = "volumes.use"
WIPE_INCOMPLETE = "WipeIncomplete"

_TAKING_ROOM = (volume_pb2.PREALLOCATION_FALLOC, volume_pb2.PREALLOCATION_FULL)


@dataclass(frozen=True, slots=True)
class _Origin:
    """Is what a new volume comes from: the volume itself, its pool, and the chain below it."""

    volume: volume_pb2.Volume
    place: Place
    chain: tuple[Link, ...]

    @property
    def names(self) -> list[str]:
        """The names of all volumes in it."""
        return [self.volume.name, *(link.volume.name for link in self.chain)]

    def name_in(self, place: Place) -> str:
        """Return how an image of a pool names it."""
        return chains.backing_name(place, self.place, catalog.key_of(self.volume))


class Volumes:
    """Makes, sizes, wipes and deletes volumes."""

    def __init__(self, store: Store, operations: Operations, places: Places, claims: Claims, *, node: str) -> None:
        self._store = store
        self._operations = operations
        self._places = places
        self._claims = claims
        self._node = node

    def find(self, name: str) -> volume_pb2.Volume:
        """Return a volume by name or uid.

        Raises:
            ResourceNotFound: There is none.
        """
        return volume_pb2.Volume.FromString(self._store.find(catalog.VOLUME, name).body)

    def lookup(self, request: volume_pb2.LookupVolumeRequest) -> volume_pb2.Volume | None:
        """Return the volume of a path or key; None: there is none."""
        return catalog.volume_at(self._store, request.path or request.key)

    # Create.

    async def create(self, request: volume_pb2.CreateVolumeRequest, call: Call) -> operations_pb2.Operation:
        """Make a volume."""
        repeated = await self._operations.repeated(call, request)
        if repeated is not None:
            return repeated
        lifecycle.check_pool(catalog.need_pool(self._store, request.parent), "use")
        place = self._places.need(request.parent)
        volume = volume_pb2.Volume()
        volume.CopyFrom(request.volume)
        volume.ClearField("status")
        uid = resources.uid_for(volume)
        id_ = names.check_id(request.volume_id or f"vol-{uid[:8]}", "volume_id")
        resources.create_head(volume, names.child(request.parent, "volumes", id_), call=call, uid=uid)
        source = await self._origin(request.source_volume, "source_volume", call)
        backing = await self._origin(volume.spec.backing.volume, "volume.spec.backing.volume", call)
        if backing is not None:
            volume.spec.backing.volume = names.relative(backing.volume.name, self._node)
        plan_ = specs.plan_of(
            volume.spec,
            source=source.volume if source is not None else None,
            backing=backing.volume if backing is not None else None,
            backing_name="" if backing is None else backing.name_in(place),
        )
        volume.status.path = volume.status.key = f"{place.open.path}/{id_}"
        volume.status.capacity_bytes = plan_.capacity_bytes
        volume.status.observed_generation = volume.generation
        if plan_.preallocation in _TAKING_ROOM:
            await self._refuse_full(place, plan_.capacity_bytes)
        origins = [origin for origin in (source, backing) if origin is not None]
        claim = self._claims.claim(f"CreateVolume of {volume.name}")

        def intent(tx: Transaction) -> str:
            _refuse_taken(tx, volume, origins)
            claim.read(request.parent)
            for origin in origins:
                for name in origin.names:
                    claim.read(catalog.pool_of(name))
                    claim.read(name)
            claim.write(volume.name)
            # Nothing is recorded of it until it is made, and another of its uid may be asked for under another name.
            claim.take(volume.uid)
            return volume.uid

        if request.validate_only:
            await self._store.write(lambda tx: _refuse_taken(tx, volume, origins))
            return plan(volume)

        async def work(job: Job) -> Commit:
            return await self._create(job, place, volume, plan_, source, backing)

        return await run_claimed(
            self._operations, call, request, target=volume.name, claim=claim, intent=intent, work=work
        )

    async def _origin(self, reference: str, field: str, call: Call) -> _Origin | None:
        if not reference:
            return None
        name = names.absolute(reference, self._node, field=field)
        volume = catalog.need_volume(self._store, name)
        lifecycle.check_volume(volume)
        place = self._places.need(catalog.pool_of(name))
        facts = await chains.look(place, volume)
        chains.refuse(facts, name)
        with chains.about(volume.name):
            links = await chains.below(self._store, self._places, place, facts)
        for link in links:
            call.authorize(link.volume.name, USE)
        volume.status.capacity_bytes = facts.capacity_bytes
        return _Origin(volume, place, tuple(links))

    @staticmethod
    async def _refuse_full(place: Place, capacity_bytes: int) -> None:
        usage = await place.open.usage()
        if capacity_bytes > usage.available_bytes:
            raise PoolFull(
                f"{place.pool} has {usage.available_bytes} bytes left; {capacity_bytes} are to be taken at once",
                resource=place.pool,
                available_bytes=usage.available_bytes,
                needed_bytes=capacity_bytes,
            )

    async def _create(
        self,
        job: Job,
        place: Place,
        volume: volume_pb2.Volume,
        plan_: Plan,
        source: _Origin | None,
        backing: _Origin | None,
    ) -> Commit:
        key = catalog.key_of(volume)
        async with AsyncExitStack() as undo:
            if source is None:
                job.progress(phase="making the volume")
                staged = await place.open.create(plan_)
            else:
                job.progress(phase="copying", total_bytes=source.volume.status.allocation_bytes)
                top = chains.top_layer(source.place, catalog.key_of(source.volume), source.volume.spec.format)
                layers = [top, *chains.layers(list(source.chain))]
                staged = await copying(place.open).copy(plan_, layers, progress_of(job))
            undo.push_async_callback(staged.discard)
            undo.push_async_callback(staged.close)
            failpoints.reach("storage.volume.create.staged")
            await job.journal("publish", staged.identity.encode() + b"\n" + volume.SerializeToString())
            job.cancellable = False
            await place.open.publish(staged, key)
            failpoints.reach("storage.volume.create.published")
            undo.push_async_callback(place.open.delete, key, staged.identity)
            facts = await place.open.inspect(key, plan_.format)
            undo.pop_all()
            await staged.close()
        chain = () if backing is None else (_link(backing, plan_), *backing.chain)
        return self._recording(place, volume, Sighting(facts, chain))

    def _recording(self, place: Place, volume: volume_pb2.Volume, sighting: Sighting) -> Commit:
        def commit(tx: Transaction) -> Message:
            catalog.delete_undone(tx, catalog.need_pool(tx, place.pool), sighting.facts.key)
            observation.fill(volume, volume.status.path, sighting)
            catalog.put_volume(tx, volume, cause=f"{SERVICE}.CreateVolume")
            catalog.tell(tx, volume, watch_pb2.EVENT_TYPE_VOLUME_ADDED)
            place.formats[sighting.facts.key] = volume.spec.format
            place.standing[sighting.facts.key] = sighting.standing
            return volume

        return commit

    # Delete.

    async def delete(self, request: volume_pb2.DeleteVolumeRequest, call: Call) -> operations_pb2.Operation:
        """Delete a volume with its data."""
        claim = self._claims.claim(f"DeleteVolume of {request.name}")
        uid = ""

        def check(tx: Transaction) -> str:
            volume = catalog.get_volume(tx, request.name)
            if volume is None and request.allow_missing:
                return ""
            volume = catalog.need_volume(tx, request.name)
            resources.check_preconditions(volume, request.etag, request.expected_uid)
            catalog.refuse_held(tx, volume)
            catalog.refuse_children(tx, volume)
            return volume.uid

        def intent(tx: Transaction) -> str:
            nonlocal uid
            uid = check(tx)
            if uid:
                self._places.need(catalog.pool_of(request.name))
                claim.read(catalog.pool_of(request.name))
                claim.write(request.name)
            return uid

        if request.validate_only:
            await self._store.write(check)
            return plan(empty_pb2.Empty())

        async def work(_job: Job) -> Commit:
            return await self._delete(request.name, uid)

        return await run_claimed(
            self._operations,
            call,
            request,
            target=request.name,
            claim=claim,
            intent=intent,
            work=work,
            cancellable=False,
        )

    async def _delete(self, name: str, uid: str) -> Commit:
        volume = catalog.get_volume(self._store, name)
        if volume is None or volume.uid != uid:
            # None when it was looked for: a file that was found under its name since is another.
            return lambda _tx: empty_pb2.Empty()
        place = self._places.need(catalog.pool_of(name))
        key = catalog.key_of(volume)
        for session in catalog.uploads(self._store, uid):
            staged = await place.open.reopen(session.token)
            if staged is not None:
                await staged.discard()
        await place.open.delete(key)
        failpoints.reach("storage.volume.delete.removed")

        def commit(tx: Transaction) -> Message:
            current = catalog.get_volume(tx, name)
            if current is not None and current.uid == uid:
                catalog.delete_volume(tx, current, cause=f"{SERVICE}.DeleteVolume")
                catalog.tell(tx, current, watch_pb2.EVENT_TYPE_VOLUME_DELETED)
            place.forget(key)
            return empty_pb2.Empty()

        return commit

    # Resize.

    async def resize(self, request: volume_pb2.ResizeVolumeRequest, call: Call) -> operations_pb2.Operation:
        """Change the size of a volume."""
        name = request.name
        claim = self._claims.claim(f"ResizeVolume of {name}")

        def check(tx: Transaction) -> volume_pb2.Volume:
            volume = catalog.need_volume(tx, name)
            resources.check_preconditions(volume, request.etag, request.expected_uid)
            lifecycle.check_volume(volume)
            catalog.refuse_held(tx, volume)
            if specs.rounded(volume.spec.format, request.capacity_bytes) < volume.status.capacity_bytes:
                if not request.allow_shrink:
                    raise FieldConflict(
                        f"{name} has {volume.status.capacity_bytes} bytes: to make it smaller, set `allow_shrink`",
                        field="capacity_bytes",
                        capacity_bytes=volume.status.capacity_bytes,
                    )
                catalog.refuse_children(tx, volume)
            return volume

        def intent(tx: Transaction) -> str:
            volume = check(tx)
            self._places.need(catalog.pool_of(name))
            claim.read(catalog.pool_of(name))
            claim.write(name)
            return volume.uid

        if request.validate_only:
            volume = await self._store.write(check)
            volume.spec.capacity_bytes = specs.rounded(volume.spec.format, request.capacity_bytes)
            return plan(volume)

        async def work(job: Job) -> Commit:
            return await self._resize(job, request)

        return await run_claimed(
            self._operations, call, request, target=name, claim=claim, intent=intent, work=work, cancellable=False
        )

    async def _resize(self, job: Job, request: volume_pb2.ResizeVolumeRequest) -> Commit:
        volume = catalog.need_volume(self._store, request.name)
        place = self._places.need(catalog.pool_of(request.name))
        key, format = catalog.key_of(volume), volume.spec.format
        facts = await chains.look(place, volume)
        chains.refuse(facts, volume.name)
        with chains.about(volume.name):
            links = await chains.below(self._store, self._places, place, facts)
        wanted = specs.rounded(format, request.capacity_bytes)
        if format == QCOW2:
            specs.check_size(wanted, facts.header.cluster_size_bytes, "capacity_bytes")
        if request.allocate and wanted > facts.capacity_bytes:
            await self._refuse_full(place, wanted - facts.capacity_bytes)
        if wanted != facts.capacity_bytes:
            await job.journal("resize", str(wanted).encode())
            shrink = wanted < facts.capacity_bytes
            if shrink and not request.allow_shrink:
                raise FieldConflict(f"{volume.name} has grown meanwhile", field="capacity_bytes")
            await resizing(place.open).resize(
                key, format, wanted, chain=chains.layers(links), shrink=shrink, allocate=request.allocate
            )
            failpoints.reach("storage.volume.resize.done")
        return await self._resized(volume.name, wanted)

    async def _resized(self, name: str, wanted: int) -> Commit:
        volume = catalog.need_volume(self._store, name)
        place = self._places.need(catalog.pool_of(name))
        sighting = await self._sight(volume, place)

        def commit(tx: Transaction) -> Message:
            current = catalog.need_volume(tx, name)
            if current.spec.capacity_bytes != wanted:
                current.spec.capacity_bytes = wanted
                catalog.touched(current)
            current.status.digest = ""
            observation.fill(current, current.status.path, sighting)
            if catalog.put_volume(tx, current, cause=f"{SERVICE}.ResizeVolume"):
                catalog.tell(tx, current, watch_pb2.EVENT_TYPE_VOLUME_CHANGED, reason="RESIZED")
            return current

        return commit

    async def _sight(self, volume: volume_pb2.Volume, place: Place) -> Sighting:
        facts = await chains.look(place, volume)
        try:
            chains.refuse(facts, volume.name)
            return Sighting(facts, tuple(await chains.below(self._store, self._places, place, facts)))
        except VirtfleetError as error:
            return Sighting(facts, refusal=error)

    # Wipe.

    async def wipe(self, request: volume_pb2.WipeVolumeRequest, call: Call) -> operations_pb2.Operation:
        """Overwrite what a volume holds."""
        name = request.name
        if request.algorithm not in (volume_pb2.WIPE_ALGORITHM_UNSPECIFIED, volume_pb2.WIPE_ALGORITHM_ZERO):
            word = volume_pb2.WipeAlgorithm.Name(request.algorithm).removeprefix("WIPE_ALGORITHM_").lower()
            raise CapabilityMissing(
                f"the algorithm {word} is not built: ZERO is", field="algorithm", capability=f"volume.wipe.{word}"
            )
        claim = self._claims.claim(f"WipeVolume of {name}")

        def check(tx: Transaction) -> volume_pb2.Volume:
            volume = catalog.need_volume(tx, name)
            resources.check_preconditions(volume, request.etag, request.expected_uid)
            if not _half_wiped(volume):
                lifecycle.check_volume(volume)
            catalog.refuse_held(tx, volume)
            catalog.refuse_children(tx, volume)
            return volume

        def intent(tx: Transaction) -> str:
            volume = check(tx)
            self._places.need(catalog.pool_of(name))
            claim.read(catalog.pool_of(name))
            claim.write(name)
            return volume.uid

        if request.validate_only:
            return plan(await self._store.write(check))

        async def work(job: Job) -> Commit:
            return await self._wipe(job, name)

        return await run_claimed(self._operations, call, request, target=name, claim=claim, intent=intent, work=work)

    async def _wipe(self, job: Job, name: str) -> Commit:
        volume = catalog.need_volume(self._store, name)
        place = self._places.need(catalog.pool_of(name))
        key, format = catalog.key_of(volume), volume.spec.format
        facts = await chains.look(place, volume)
        if not _half_wiped(volume):
            chains.refuse(facts, name)
        with chains.about(volume.name):
            links = await chains.below(self._store, self._places, place, facts)
        if links:
            volume.spec.backing.format = links[0].facts.format
        volume.status.capacity_bytes = facts.capacity_bytes
        await job.journal("wipe")
        job.on_failure(lambda tx, _error: _wipe_incomplete(tx, name))
        job.progress(phase="overwriting", done_bytes=0, total_bytes=facts.physical_bytes)
        plan_ = specs.plan_again(volume, facts.header.backing)
        await wiping(place.open).wipe(key, format, plan_, progress_of(job))
        sighting = await self._sight(volume, place)

        def commit(tx: Transaction) -> Message:
            current = catalog.need_volume(tx, name)
            resources.clear_condition(current.status.conditions, WIPE_INCOMPLETE)
            current.status.digest = ""
            observation.fill(current, current.status.path, sighting)
            catalog.put_volume(tx, current, cause=f"{SERVICE}.WipeVolume")
            catalog.tell(tx, current, watch_pb2.EVENT_TYPE_VOLUME_CHANGED, reason="WIPED")
            return current

        return commit

    # After a crash.

    def settlers(
        self,
    ) -> Mapping[str, Callable[[operations_pb2.Operation, Sequence[JournalEntry]], Awaitable[Commit]]]:
        """Return what ends the operations that a crash has left, by method."""
        return {
            f"{SERVICE}.CreateVolume": self._settle_create,
            f"{SERVICE}.DeleteVolume": self._settle_delete,
            f"{SERVICE}.ResizeVolume": self._settle_resize,
            f"{SERVICE}.WipeVolume": self._settle_wipe,
        }

    async def _settle_create(self, operation: operations_pb2.Operation, journal: Sequence[JournalEntry]) -> Commit:
        # What is staged has been swept away when the pool was opened; what was published is finished.
        name = metadata_of(operation).target
        for entry in journal:
            identity, _, body = entry.payload.partition(b"\n")
            volume = volume_pb2.Volume.FromString(body)
            pool = catalog.need_pool(self._store, catalog.pool_of(name))
            # Unless it is recorded here it goes with the next look at its place, be it that this one fails.
            undone = catalog.Undone(catalog.key_of(volume), identity.decode(), time.time_ns())
            await self._store.write(partial(catalog.put_undone, pool=pool, file=undone))
            place = self._places.get(pool.name)
            if place is None:
                continue
            try:
                sighting = await self._sight(volume, place)
            except VirtfleetError as error:
                _log.warning("what a crash has left of %s cannot be seen: %s", name, error)
                continue
            if sighting.facts.identity == identity.decode():
                return self._recording(place, volume, sighting)
        raise ChangeRolledBack(f"the service stopped while {name} was made; nothing of it is left", resource=name)

    async def _settle_delete(self, operation: operations_pb2.Operation, _journal: Sequence[JournalEntry]) -> Commit:
        metadata = metadata_of(operation)
        return await self._delete(metadata.target, metadata.target_uid)

    async def _settle_resize(self, operation: operations_pb2.Operation, journal: Sequence[JournalEntry]) -> Commit:
        name = metadata_of(operation).target
        volume = catalog.need_volume(self._store, name)
        place = self._places.need(catalog.pool_of(name))
        sighting = await self._sight(volume, place)
        for entry in journal:
            if sighting.facts.capacity_bytes == int(entry.payload):
                return await self._resized(name, sighting.facts.capacity_bytes)
        raise ChangeRolledBack(f"the service stopped while {name} was resized; it has its old size", resource=name)

    async def _settle_wipe(self, operation: operations_pb2.Operation, journal: Sequence[JournalEntry]) -> Commit:
        name = metadata_of(operation).target
        if not journal:
            raise ChangeRolledBack(f"the service stopped before {name} was wiped", resource=name)
        await self._store.write(lambda tx: _wipe_incomplete(tx, name))
        raise BackendFailed(f"the service stopped while {name} was wiped: wipe it again", resource=name)


def _half_wiped(volume: volume_pb2.Volume) -> bool:
    """Tell whether a wipe of a volume was interrupted: the next one takes what the first has left."""
    return resources.get_condition(volume.status.conditions, WIPE_INCOMPLETE) is not None


def _wipe_incomplete(tx: Transaction, name: str) -> None:
    volume = catalog.get_volume(tx, name)
    if volume is None:
        return
    resources.set_condition(
        volume.status.conditions,
        WIPE_INCOMPLETE,
        reason="INTERRUPTED",
        message="a part is not overwritten: wipe it again",
    )
    volume.status.digest = ""
    catalog.put_volume(tx, volume, cause=f"{SERVICE}.WipeVolume")


def _refuse_taken(tx: Transaction, volume: volume_pb2.Volume, origins: Sequence[_Origin]) -> None:
    """Accept a new volume whose name and file are free, and whose origins nobody writes."""
    if tx.get(volume.name) is not None:
        raise ResourceExists(f"{volume.name} exists", resource=volume.name, name=volume.name)
    same = tx.get_by_uid(catalog.VOLUME, volume.uid)
    if same is not None:
        raise IdentityInUse(
            f"{same.name} has the uid {volume.uid}", field="volume.uid", holder=same.name, uid=volume.uid
        )
    other = catalog.volume_at(tx, volume.status.path)
    if other is not None:
        raise ResourceExists(f"{volume.status.path} is {other.name}", resource=other.name, name=other.name)
    for origin in origins:
        _refuse_written(tx, origin.volume.name)


def _refuse_written(tx: Transaction, name: str) -> None:
    """Accept a volume that nobody may be writing to."""
    volume = catalog.need_volume(tx, name)
    for held in catalog.attachments(tx, volume.uid):
        if held.writes:
            raise ResourceInUse(
                f"{name} is attached for writing to {held.domain or held.domain_uid}: a copy may be half written",
                resource=name,
                holder=held.domain or held.domain_uid,
                attachment_id=held.attachment_id,
            )


def _link(origin: _Origin, plan_: Plan) -> Link:
    status = origin.volume.status
    facts = Facts(
        catalog.key_of(origin.volume),
        plan_.backing_format,
        status.capacity_bytes,
        status.allocation_bytes,
        status.physical_bytes,
        "",
        "",
    )
    return Link(origin.volume, origin.place, facts)

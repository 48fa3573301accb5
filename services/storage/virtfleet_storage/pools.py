"""What can be done with pools."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path

from google.longrunning import operations_pb2
from google.protobuf import empty_pb2
from google.protobuf.message import Message

from virtfleet.storage.v1 import pool_pb2, watch_pb2
from virtfleet.type.v1 import resource_pb2
from virtfleet_service import failpoints, masks, names, requests, resources
from virtfleet_service.authorization import HOST_PATHS
from virtfleet_service.call import Call
from virtfleet_service.errors import (
    ChangeRolledBack,
    FieldConflict,
    FieldOutOfRange,
    IdentityInUse,
    OperationConflict,
    ResourceExists,
    ResourceInUse,
)
from virtfleet_service.operations import Commit, Job, JournalEntry, Operations, Work, plan
from virtfleet_service.store import Store
from virtfleet_service.transaction import Transaction
from virtfleet_storage import catalog, lifecycle, refresh
from virtfleet_storage.openings import Openings
from virtfleet_storage.places import Place, Places
from virtfleet_storage.refresh import Refresher
from virtfleet_storage.work import metadata_of, run_claimed

SERVICE = "virtfleet.storage.v1.PoolService"
IMMUTABLE = ("spec.dir", "spec.target_path")

_NamedRequest = pool_pb2.StopPoolRequest | pool_pb2.DeletePoolRequest
_ATTEMPTS = 5

_NONE = pool_pb2.POOL_BUILD_MODE_NONE
_UNSPECIFIED = pool_pb2.POOL_BUILD_MODE_UNSPECIFIED


class _Stale(Exception):  # no error: the call is decided anew
    """A pool that is applied has been made or deleted since it was looked for."""


class Pools:
    """Defines, starts, stops and forgets pools.

    Args:
        store: Where they are recorded.
        operations: Runs the work.
        places: The open ones.
        openings: Opens the others.
        refresher: Compares them with what is there.
        node: The id of the node.
        root: Where pools lie whose spec names no path.
    """

    def __init__(  # it is where all parts of a pool's life meet
        self,
        store: Store,
        operations: Operations,
        places: Places,
        openings: Openings,
        refresher: Refresher,
        *,
        node: str,
        root: Path,
    ) -> None:
        self._claims = refresher.claims
        self._openings = openings
        self._store = store
        self._operations = operations
        self._places = places
        self._refresher = refresher
        self._node = node
        self._root = root

    def find(self, name: str) -> pool_pb2.Pool:
        """Return a pool by name or uid.

        Raises:
            ResourceNotFound: There is none.
        """
        return pool_pb2.Pool.FromString(self._store.find(catalog.POOL, name).body)

    # Define.

    async def create(
        self, request: pool_pb2.CreatePoolRequest, call: Call, *, sent: Message | None = None
    ) -> operations_pb2.Operation:
        """Define a pool, make its place, and start it if asked.

        Args:
            request: What to make.
            call: The call.
            sent: The request as the client sent it, by which its repetition is known; None: it is this one.

        Raises:
            _Stale: What was sent is an update, and the pool is there.
        """
        pool = pool_pb2.Pool()
        pool.CopyFrom(request.pool)
        pool.ClearField("status")
        uid = resources.uid_for(pool)
        id_ = request.pool_id or f"pool-{uid[:8]}"
        name = names.child(request.parent, "pools", names.check_id(id_, "pool_id"))
        resources.create_head(pool, name, call=call, uid=uid)
        if pool.spec.WhichOneof("backend") is None:
            pool.spec.dir.SetInParent()
        check_lifetime(pool.spec)
        path = self._path_of(pool, id_)
        if pool.spec.HasField("target_path"):
            self._authorize_path(call, name, path)
        await self._places.ready_backend_of(pool.spec)
        refresh.describe(pool, self._places, path)
        pool.status.state = lifecycle.INACTIVE

        def check(tx: Transaction) -> None:
            if sent is not None and tx.get(name) is not None:
                raise _Stale
            self._refuse_taken(tx, pool)

        if request.validate_only:
            await self._store.write(check)
            return plan(pool)

        async def work(job: Job) -> Commit:
            return await self._create(job, pool, build=request.build != _NONE, start=request.start)

        claim = self._claims.claim(f"CreatePool of {name}")

        def intent(tx: Transaction) -> str:
            check(tx)
            # Nothing is recorded of it until it is made, and another of its uid or in its place may be asked for.
            for taken in (uid, path):
                claim.take(taken)
            return uid

        return await run_claimed(
            self._operations, call, sent or request, target=name, claim=claim, intent=intent, work=work
        )

    def _path_of(self, pool: pool_pb2.Pool, id_: str) -> str:
        if not pool.spec.HasField("target_path"):
            return str(self._root / id_)
        path = pool.spec.target_path
        if any(part in ("", ".", "..") for part in path.split("/")[1:]):
            raise FieldOutOfRange(
                "`pool.spec.target_path` must be absolute, without `.`, `..`, double or final slashes",
                field="pool.spec.target_path",
                path=path,
            )
        return path

    def _authorize_path(self, call: Call, name: str, path: str) -> None:
        if Path(path).parent != self._root:
            call.authorize(name, HOST_PATHS)

    def _refuse_taken(self, tx: Transaction, pool: pool_pb2.Pool) -> None:
        if tx.get(pool.name) is not None:
            raise ResourceExists(f"{pool.name} exists", resource=pool.name, name=pool.name)
        same = tx.get_by_uid(catalog.POOL, pool.uid)
        if same is not None:
            raise IdentityInUse(f"{same.name} has the uid {pool.uid}", field="pool.uid", holder=same.name, uid=pool.uid)
        for other in catalog.pools(tx.list(catalog.POOL)):
            if other.status.target_path == pool.status.target_path:
                raise IdentityInUse(
                    f"{pool.status.target_path} is the place of {other.name}",
                    field="pool.spec.target_path",
                    holder=other.name,
                    path=pool.status.target_path,
                )

    async def _create(self, job: Job, pool: pool_pb2.Pool, *, build: bool, start: bool) -> Commit:
        backend = self._places.backend_of(pool.spec)
        path, built = pool.status.target_path, False
        async with AsyncExitStack() as undo:
            job.progress(phase="making the place")
            await job.journal("build", path.encode())
            if build:
                await self._openings.make_root(path)
                built = await backend.build(path)
                if built:
                    undo.push_async_callback(backend.unbuild, path)
            failpoints.reach("storage.pool.create.built")
            others = {row.uid: row.name for row in self._store.list(catalog.POOL)}
            # Pushed before: a claim that fails half-way leaves something too.
            undo.push_async_callback(backend.retire, path, pool.uid)
            try:
                opened = await backend.open(path, pool.uid, claim=True, others=others)
            except IdentityInUse as error:
                raise IdentityInUse(
                    error.message,
                    field="pool.spec.target_path",
                    holder=others.get(error.metadata.get("holder", ""), ""),
                    path=path,
                ) from error
            undo.push_async_callback(opened.close)
            usage = await opened.usage()
            if not start:
                await opened.close()
            undo.pop_all()

        def commit(tx: Transaction) -> Message:
            if start:
                refresh.found(tx, pool, usage)
            _use(pool, usage.capacity_bytes, usage.allocation_bytes, usage.available_bytes)
            catalog.put_pool(tx, pool, cause=f"{SERVICE}.CreatePool")
            catalog.tell(tx, pool, watch_pb2.EVENT_TYPE_POOL_DEFINED)
            if built:
                catalog.tell(tx, pool, watch_pb2.EVENT_TYPE_POOL_BUILT)
            if start:
                catalog.tell(tx, pool, watch_pb2.EVENT_TYPE_POOL_STARTED)
                self._places.add(Place(pool.name, opened))
            return pool

        failpoints.reach("storage.pool.create.done")
        return commit

    # Change.

    async def update(self, request: pool_pb2.UpdatePoolRequest, call: Call) -> operations_pb2.Operation:
        """Change what may change of a pool's definition."""
        repeated = await self._operations.repeated(call, request)
        if repeated is not None:
            return repeated
        name = request.pool.name
        for _ in range(_ATTEMPTS):
            absent = request.allow_missing and self._store.get(name) is None
            with suppress(_Stale):
                return await (self._apply_new(request, call) if absent else self._change(request, call))
        raise OperationConflict(
            f"{name} is made and deleted all the time; read it again and retry", resource=name, retry_delay_seconds=0.5
        )

    async def _apply_new(self, request: pool_pb2.UpdatePoolRequest, call: Call) -> operations_pb2.Operation:
        name = request.pool.name
        call.authorize(name, "pools.create")
        resources.check_absent(request.pool)
        create = pool_pb2.CreatePoolRequest(
            parent=names.parent_of(name),
            pool=request.pool,
            pool_id=names.id_of(name),
            validate_only=request.validate_only,
        )
        return await self.create(create, call, sent=request)

    async def _change(self, request: pool_pb2.UpdatePoolRequest, call: Call) -> operations_pb2.Operation:
        name = request.pool.name
        changed = pool_pb2.Pool()

        def change(tx: Transaction) -> str:
            if request.allow_missing and tx.get(name) is None:
                raise _Stale
            pool = catalog.need_pool(tx, name)
            resources.check_preconditions(pool, request.pool.etag, request.pool.uid)
            lifecycle.check_pool(pool, "update")
            self._refuse_other_kind(pool, request)
            if masks.apply_update(pool, request.pool, request.update_mask, immutable=IMMUTABLE):
                check_lifetime(pool.spec)
                catalog.touched(pool)
            changed.CopyFrom(pool)
            return pool.uid

        if request.validate_only:
            await self._store.write(change)
            return plan(changed)

        async def work(_job: Job) -> Commit:
            def commit(tx: Transaction) -> Message:
                change(tx)
                catalog.put_pool(tx, changed, cause=f"{SERVICE}.UpdatePool")
                return changed

            return commit

        return await self._operations.run(call, request, target=name, intent=change, work=work, cancellable=False)

    @staticmethod
    def _refuse_other_kind(pool: pool_pb2.Pool, request: pool_pb2.UpdatePoolRequest) -> None:
        wanted = request.pool.spec.WhichOneof("backend")
        if wanted and wanted != pool.spec.WhichOneof("backend"):
            raise FieldConflict(
                "the kind of a pool is fixed when it is made", field=f"pool.spec.{wanted}", backend=pool.status.backend
            )

    async def delete(self, request: pool_pb2.DeletePoolRequest, call: Call) -> operations_pb2.Operation:
        """Forget a pool; its data stays."""
        name = request.name

        def check(tx: Transaction) -> str:
            if request.allow_missing and tx.get(name) is None:
                return ""
            pool = catalog.need_pool(tx, name)
            resources.check_preconditions(pool, request.etag, request.expected_uid)
            lifecycle.check_pool(pool, "delete")
            self._refuse_used(tx, name, backing=True)
            return pool.uid

        if request.validate_only:
            await self._store.write(check)
            return plan(empty_pb2.Empty())

        async def work(_job: Job) -> Commit:
            return await self._delete(name)

        return await self._alone(call, request, check, work)

    async def _alone(
        self, call: Call, request: _NamedRequest, check: Callable[[Transaction], str], work: Work
    ) -> operations_pb2.Operation:
        """Run what nobody may be at work in the pool for: its directory is closed."""
        name = request.name
        claim = self._claims.claim(f"{requests.method_name(call).rpartition('.')[2]} of {name}")

        def intent(tx: Transaction) -> str:
            uid = check(tx)
            if uid:
                claim.write(name)
            return uid

        return await run_claimed(
            self._operations, call, request, target=name, claim=claim, intent=intent, work=work, cancellable=False
        )

    async def _delete(self, name: str, *, settling: bool = False) -> Commit:
        row = self._store.get(name)
        if row is not None:
            pool = pool_pb2.Pool.FromString(row.body)
            place = self._places.get(name)
            if place is not None:
                async with place.refreshing:
                    await place.open.retire()
                await self._places.remove(name)
            elif settling or pool.status.state == lifecycle.INACTIVE:
                # One whose own folder was half removed is taken for a place that cannot be used.
                await self._places.backend_of(pool.spec).retire(pool.status.target_path, pool.uid)
            failpoints.reach("storage.pool.delete.retired")
            if Path(pool.status.target_path).parent == self._root:
                # Only an empty one goes: data stays.
                await self._places.backend_of(pool.spec).unbuild(pool.status.target_path)

        def commit(tx: Transaction) -> Message:
            self._forget(tx, name, f"{SERVICE}.DeletePool")
            return empty_pb2.Empty()

        return commit

    def _forget(self, tx: Transaction, name: str, cause: str) -> None:
        row = tx.get(name)
        if row is None:
            return
        pool = pool_pb2.Pool.FromString(row.body)
        for volume_row in tx.list(catalog.VOLUME, parent=name):
            catalog.delete_volume(tx, catalog.need_volume(tx, volume_row.name), cause=cause)
        for file in catalog.undone(tx, pool):
            catalog.delete_undone(tx, pool, file.key)
        tx.delete(name, cause=cause)
        catalog.tell(tx, pool, watch_pb2.EVENT_TYPE_POOL_UNDEFINED)

    def _refuse_used(self, tx: Transaction, name: str, *, backing: bool) -> None:
        for row in tx.list(catalog.VOLUME, parent=name):
            volume = catalog.need_volume(tx, row.name)
            catalog.refuse_held(tx, volume)
            for child in catalog.children(tx, volume.uid):
                if catalog.pool_of(child) != name:
                    if backing:
                        raise ResourceInUse(f"{volume.name} backs {child}", resource=volume.name, holder=child)
                    self._refuse_held_above(tx, child)

    def _refuse_held_above(self, tx: Transaction, name: str) -> None:
        """Refuse to close a pool whose volumes a guest reads through others on top of them, in other pools."""
        seen: set[str] = set()
        above = [name]
        while above:
            volume = catalog.get_volume(tx, above.pop())
            if volume is not None and volume.uid not in seen:
                seen.add(volume.uid)
                catalog.refuse_held(tx, volume)
                above += catalog.children(tx, volume.uid)

    # Start and stop.

    async def start(self, request: pool_pb2.StartPoolRequest, call: Call) -> operations_pb2.Operation:
        """Make a pool ready."""
        name = request.name
        check = self._checker(request.name, request.etag, request.expected_uid, "start")
        if request.validate_only:
            await self._store.write(check)
            return plan(self.find(name))
        build = request.build not in (_NONE, _UNSPECIFIED)

        async def work(job: Job) -> Commit:
            job.progress(phase="opening")
            await self._openings.open(name, build=build)

            def commit(tx: Transaction) -> Message:
                return catalog.need_pool(tx, name)

            return commit

        return await self._operations.run(call, request, target=name, intent=check, work=work, cancellable=False)

    async def stop(self, request: pool_pb2.StopPoolRequest, call: Call) -> operations_pb2.Operation:
        """End the use of a pool."""
        name = request.name
        judge = self._checker(request.name, request.etag, request.expected_uid, "stop")

        def check(tx: Transaction) -> str:
            uid = judge(tx)
            self._refuse_used(tx, name, backing=False)
            return uid

        if request.validate_only:
            await self._store.write(check)
            return plan(self.find(name))

        async def work(_job: Job) -> Commit:
            def commit(tx: Transaction) -> Message:
                self._refuse_used(tx, name, backing=False)
                pool = catalog.need_pool(tx, name)
                if pool.status.state != lifecycle.INACTIVE:
                    pool.status.state, pool.status.state_reason = lifecycle.INACTIVE, ""
                    resources.clear_condition(pool.status.conditions, refresh.INACCESSIBLE)
                    catalog.put_pool(tx, pool, cause=f"{SERVICE}.StopPool")
                    catalog.tell(tx, pool, watch_pb2.EVENT_TYPE_POOL_STOPPED)
                if pool.spec.lifetime == resource_pb2.LIFETIME_TRANSIENT:
                    self._forget(tx, name, f"{SERVICE}.StopPool")
                return pool

            await self._places.remove(name)
            return commit

        return await self._alone(call, request, check, work)

    async def refresh(self, request: pool_pb2.RefreshPoolRequest, call: Call) -> operations_pb2.Operation:
        """Look at a pool's place again."""
        name = request.name
        check = self._checker(request.name, request.etag, request.expected_uid, "refresh")
        if request.validate_only:
            await self._store.write(check)
            return plan(self.find(name))

        async def work(_job: Job) -> Commit:
            await self._refresher.refresh(self._places.need(name), exact=True)

            def commit(tx: Transaction) -> Message:
                pool = catalog.need_pool(tx, name)
                catalog.tell(tx, pool, watch_pb2.EVENT_TYPE_POOL_REFRESHED)
                return pool

            return commit

        return await self._operations.run(call, request, target=name, intent=check, work=work)

    def _checker(self, name: str, etag: str, expected_uid: str, verb: str) -> Callable[[Transaction], str]:
        def check(tx: Transaction) -> str:
            pool = catalog.need_pool(tx, name)
            resources.check_preconditions(pool, etag, expected_uid)
            lifecycle.check_pool(pool, verb)
            return pool.uid

        return check

    # After a crash.

    def settlers(self) -> Mapping[str, Callable[[operations_pb2.Operation, Sequence[JournalEntry]], Awaitable[Commit]]]:
        """Return what ends the operations that a crash has left, by method."""
        return {
            f"{SERVICE}.CreatePool": self._settle_create,
            f"{SERVICE}.UpdatePool": self._settle_update,
            f"{SERVICE}.DeletePool": self._settle_delete,
        }

    async def _settle_create(self, operation: operations_pb2.Operation, journal: Sequence[JournalEntry]) -> Commit:
        metadata = metadata_of(operation)
        for entry in journal:
            path = entry.payload.decode()
            backend = self._places.backends["dir"]
            await backend.retire(path, metadata.target_uid)
            if Path(path).parent == self._root:
                await backend.unbuild(path)
        raise ChangeRolledBack(
            f"the service stopped while {metadata.target} was made; nothing of it is left", resource=metadata.target
        )

    async def _settle_update(self, operation: operations_pb2.Operation, journal: Sequence[JournalEntry]) -> Commit:
        if journal:
            # It was to make a pool that did not exist.
            return await self._settle_create(operation, journal)
        target = metadata_of(operation).target
        raise ChangeRolledBack(f"the service stopped before {target} was changed; it is as it was", resource=target)

    async def _settle_delete(self, operation: operations_pb2.Operation, _journal: Sequence[JournalEntry]) -> Commit:
        metadata = metadata_of(operation)
        return await self._delete(metadata.target, settling=True)


def check_lifetime(spec: pool_pb2.PoolSpec) -> None:
    """Refuse a transient pool that starts by itself: when it could, it is forgotten.

    Raises:
        FieldConflict: It is to be.
    """
    if spec.lifetime == resource_pb2.LIFETIME_TRANSIENT and spec.autostart > resource_pb2.AUTOSTART_NEVER:
        raise FieldConflict("a transient pool has no autostart", field="pool.spec.autostart")


def _use(pool: pool_pb2.Pool, capacity: int, allocation: int, available: int) -> None:
    status = pool.status
    status.capacity_bytes, status.allocation_bytes, status.available_bytes = capacity, allocation, available
    status.refresh_time.CopyFrom(resources.now())

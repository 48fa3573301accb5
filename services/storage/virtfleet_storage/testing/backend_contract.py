"""One named check per promise of `virtfleet_storage.backends.api`.

A kind of pool binds the suite in a few lines: a subclass with two fixtures, `backend` (a `PoolBackend`) and `path`
(where a pool can be made and is not yet). A facet that the kind lacks is not checked, for its report does not claim it.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from virtfleet.storage.v1 import volume_pb2
from virtfleet_service.errors import (
    BackendUnreachable,
    BackingMissing,
    RangeBeyondEnd,
    ResourceNotFound,
    VirtfleetError,
    WouldOverwrite,
)
from virtfleet_storage.backends.api import (
    FACETS,
    QCOW2,
    RAW,
    Copying,
    Downloading,
    Layer,
    OpenPool,
    Piece,
    Plan,
    PoolBackend,
    Resizing,
    Uploading,
    Wiping,
    capabilities,
)

UID = "6f0b2f4e-3a0b-4a83-8a44-1f1c2f6f0a01"
OTHER_UID = "6f0b2f4e-3a0b-4a83-8a44-1f1c2f6f0a02"
MIB = 1 << 20
UPLOAD = "upload-1"


@asynccontextmanager
async def open_pool(backend: PoolBackend, path: str) -> AsyncIterator[OpenPool]:
    """Make a place and open it for a pool."""
    await backend.build(path)
    pool = await backend.open(path, UID, claim=True)
    try:
        yield pool
    finally:
        await pool.close()


async def refused(kind: type[VirtfleetError], work: Callable[[], object]) -> VirtfleetError:
    """Run work that must raise an error of a kind; returns it."""
    try:
        outcome = work()
        if asyncio.iscoroutine(outcome):
            await outcome
    except kind as error:
        return error
    message = f"{kind.__name__} was expected, and nothing was raised"
    raise AssertionError(message)


def expect(holds: object, what: str) -> None:
    """Fail with a sentence unless something holds."""
    if not holds:
        raise AssertionError(what)


async def make(pool: OpenPool, key: str, plan: Plan) -> str:
    """Make and publish a volume; returns its identity."""
    staged = await pool.create(plan)
    await pool.publish(staged, key)
    await staged.close()
    return staged.identity


def told(_done: int, _total: int) -> None:
    """Take progress and do nothing with it."""


class BackendContract:
    """Is the suite; every check begins with an empty path."""

    async def test_probe_says_that_it_can_run(self, backend: PoolBackend) -> None:
        """A backend that is bound to the suite runs."""
        expect((await backend.probe()).reason == "", "the backend cannot run here")

    async def test_capabilities_are_those_of_the_class(self, backend: PoolBackend, path: str) -> None:
        """What is reported is what an open pool can do."""
        reported = capabilities(backend.pool_class, backend.formats)
        async with open_pool(backend, path) as pool:
            for id_, (facet, _) in FACETS.items():
                expect((id_ in reported) == isinstance(pool, facet), f"{id_} is reported wrongly")

    async def test_build_is_idempotent_and_touches_nothing(self, backend: PoolBackend, path: str) -> None:
        """A second build makes nothing and removes nothing."""
        expect(await backend.build(path), "the first build made nothing")
        async with open_pool(backend, path) as pool:
            await make(pool, "disk", Plan(RAW, MIB))
        expect(not await backend.build(path), "the second build says that it made something")
        async with open_pool(backend, path) as pool:
            expect((await pool.inspect("disk", RAW)).capacity_bytes == MIB, "the volume is gone")

    async def test_unbuild_removes_an_empty_place_only(self, backend: PoolBackend, path: str) -> None:
        """Data stays."""
        async with open_pool(backend, path) as pool:
            await make(pool, "disk", Plan(RAW, MIB))
            await pool.retire()
        await backend.unbuild(path)
        async with open_pool(backend, path) as pool:
            expect([facts.key for facts in await pool.scan({})] == ["disk"], "data did not stay")
            await pool.delete("disk")
            await pool.retire()
        await backend.unbuild(path)
        await backend.unbuild(path)
        expect(await backend.build(path), "the empty place stayed")

    async def test_retire_of_a_closed_place_leaves_only_what_is_anothers(self, backend: PoolBackend, path: str) -> None:
        """What is the pool's goes, and the place with it."""
        await backend.retire(path, UID)
        async with open_pool(backend, path) as pool:
            await (await pool.create(Plan(RAW, MIB))).close()
        await backend.retire(path, OTHER_UID)
        await (await backend.open(path, UID, claim=False)).close()
        await backend.retire(path, UID)
        await backend.unbuild(path)
        expect(await backend.build(path), "the place of a pool that was retired stayed")

    async def test_open_knows_its_pool(self, backend: PoolBackend, path: str) -> None:
        """A place that does not know the pool is not opened, unless it is claimed."""
        await refused(BackingMissing, lambda: backend.open(path, UID, claim=False))
        await backend.build(path)
        await refused(BackingMissing, lambda: backend.open(path, UID, claim=False))
        pool = await backend.open(path, UID, claim=True)
        await pool.close()
        await pool.close()
        await refused(BackingMissing, lambda: backend.open(path, OTHER_UID, claim=False))
        await (await backend.open(path, UID, claim=False)).close()

    async def test_a_closed_pool_refuses(self, backend: PoolBackend, path: str) -> None:
        """Nothing is done through a place that is closed."""
        async with open_pool(backend, path) as pool:
            pass
        await refused(BackendUnreachable, pool.usage)

    async def test_usage_adds_up(self, backend: PoolBackend, path: str) -> None:
        """Sizes are sane."""
        async with open_pool(backend, path) as pool:
            usage = await pool.usage()
            expect(0 <= usage.available_bytes <= usage.capacity_bytes, f"sizes do not add up: {usage}")
            expect(0 <= usage.allocation_bytes <= usage.capacity_bytes, f"sizes do not add up: {usage}")

    async def test_what_is_staged_cannot_be_seen(self, backend: PoolBackend, path: str) -> None:
        """A volume in the making is nobody's volume, and can be thrown away twice."""
        async with open_pool(backend, path) as pool:
            for format in backend.formats:
                staged = await pool.create(Plan(format, MIB))
                expect(await pool.scan({}) == [], "a staged volume is seen")
                again = await pool.reopen(staged.token)
                expect(again is not None and again.identity == staged.identity, "it is not found again")
                await staged.discard()
                await staged.discard()
                expect(await pool.reopen(staged.token) is None, "it is still there")

    async def test_publish_keeps_the_identity_and_never_overwrites(self, backend: PoolBackend, path: str) -> None:
        """Of two with one key the first stays."""
        async with open_pool(backend, path) as pool:
            identity = await make(pool, "disk", Plan(RAW, MIB))
            expect((await pool.inspect("disk", RAW)).identity == identity, "the identity has changed")
            staged = await pool.create(Plan(RAW, 2 * MIB))
            await refused(WouldOverwrite, lambda: pool.publish(staged, "disk"))
            expect((await pool.inspect("disk", RAW)).identity == identity, "it was overwritten")
            await staged.discard()

    async def test_each_format_has_the_size_that_was_planned(self, backend: PoolBackend, path: str) -> None:
        """What is made is what was asked for, and is told so by a scan that knows nothing."""
        async with open_pool(backend, path) as pool:
            for format in backend.formats:
                await make(pool, f"disk{format}", Plan(format, 3 * MIB))
            for facts in await pool.scan({}):
                expect(facts.capacity_bytes == 3 * MIB, f"{facts.key} has {facts.capacity_bytes} bytes")
                expect(facts.key == f"disk{facts.format}", f"{facts.key} is taken for {facts.format}")
                expect(not facts.refusal, facts.refusal_message)

    async def test_a_known_format_is_never_told_by_the_data(self, backend: PoolBackend, path: str) -> None:
        """An image that is known as raw stays raw."""
        if QCOW2 not in backend.formats:
            return
        async with open_pool(backend, path) as pool:
            await make(pool, "disk", Plan(QCOW2, MIB))
            (facts,) = await pool.scan({"disk": RAW})
            expect(facts.format == RAW, "the data decided")
            expect(facts.capacity_bytes == facts.physical_bytes, "the header was believed")

    async def test_delete_is_idempotent_and_knows_identities(self, backend: PoolBackend, path: str) -> None:
        """One of another identity is left alone."""
        async with open_pool(backend, path) as pool:
            identity = await make(pool, "disk", Plan(RAW, MIB))
            await pool.delete("disk", "another")
            expect((await pool.inspect("disk", RAW)).identity == identity, "another one was deleted")
            await pool.delete("disk", identity)
            await pool.delete("disk", identity)
            await refused(ResourceNotFound, lambda: pool.inspect("disk", RAW))

    async def test_sweep_keeps_what_is_needed(self, backend: PoolBackend, path: str) -> None:
        """Staged volumes that nobody names go, volumes stay."""
        async with open_pool(backend, path) as pool:
            await make(pool, "disk", Plan(RAW, MIB))
            kept, lost = await pool.create(Plan(RAW, MIB)), await pool.create(Plan(RAW, MIB))
            expect(await pool.sweep(frozenset({kept.token})) == 1, "not exactly one went")
            expect(await pool.reopen(kept.token) is not None, "the wrong one went")
            expect(await pool.reopen(lost.token) is None, "it stayed")
            expect(len(await pool.scan({})) == 1, "a volume went")
            for staged in (kept, lost):
                await staged.close()

    async def test_changes_are_told(self, backend: PoolBackend, path: str) -> None:
        """A new volume stirs."""
        async with open_pool(backend, path) as pool, pool.changes() as changes:
            await make(pool, "disk", Plan(RAW, MIB))
            async with asyncio.timeout(5):
                await anext(aiter(changes))

    async def test_a_cancelled_making_leaves_nothing(self, backend: PoolBackend, path: str) -> None:
        """Cancelled at any moment."""
        async with open_pool(backend, path) as pool:
            plan = Plan(RAW, 64 * MIB, preallocation=volume_pb2.PREALLOCATION_FULL)
            for milliseconds in range(0, 20, 4):
                task = asyncio.create_task(pool.create(plan))
                await asyncio.wait([task], timeout=milliseconds / 1000)
                task.cancel()
                (outcome,) = await asyncio.gather(task, return_exceptions=True)
                if not isinstance(outcome, BaseException):
                    await outcome.discard()
                expect(await pool.sweep(frozenset()) == 0, "something was left")

    async def test_a_copy_has_the_content(self, backend: PoolBackend, path: str) -> None:
        """Facet Copying: the guest sees the same, in any pair of formats."""
        async with open_pool(backend, path) as pool:
            if not (isinstance(pool, Copying) and isinstance(pool, Uploading)):
                return
            data = hashlib.sha256(b"seed").digest() * (MIB // 32)
            await make(pool, "source", Plan(RAW, 0))
            await replace(pool, "source", data)
            layer = Layer(pool, "source", RAW)
            for format in backend.formats:
                for target in backend.formats:
                    first = await pool.copy(Plan(format, 2 * MIB), [layer], told)
                    await pool.publish(first, f"first{format}{target}")
                    middle = Layer(pool, f"first{format}{target}", format)
                    second = await pool.copy(Plan(target, 2 * MIB), [middle], told)
                    await pool.publish(second, f"second{format}{target}")
                    last = Layer(pool, f"second{format}{target}", target)
                    flat = await pool.copy(Plan(RAW, 2 * MIB), [last], told)
                    await pool.publish(flat, f"flat{format}{target}")
                    for staged in (first, second, flat):
                        await staged.close()
                    content = await read(pool, f"flat{format}{target}")
                    expect(content in (None, data + bytes(MIB)), f"{format} to {target}: other content")

    async def test_a_resize_changes_the_size(self, backend: PoolBackend, path: str) -> None:
        """Facet Resizing, up and down."""
        async with open_pool(backend, path) as pool:
            if not isinstance(pool, Resizing):
                return
            for format in backend.formats:
                key = f"disk{format}"
                await make(pool, key, Plan(format, MIB))
                for size in (4 * MIB, 2 * MIB):
                    await pool.resize(key, format, size, chain=(), shrink=size < 4 * MIB, allocate=False)
                    expect((await pool.inspect(key, format)).capacity_bytes == size, "another size")

    async def test_a_wiped_volume_reads_as_zeros(self, backend: PoolBackend, path: str) -> None:
        """Facet Wiping."""
        async with open_pool(backend, path) as pool:
            if not (isinstance(pool, Wiping) and isinstance(pool, Uploading)):
                return
            await make(pool, "disk", Plan(RAW, 0))
            await replace(pool, "disk", b"x" * MIB)
            await pool.wipe("disk", RAW, Plan(RAW, MIB), told)
            expect(await read(pool, "disk") in (None, bytes(MIB)), "not zeros")
            expect(await pool.sweep(frozenset()) == 0, "something was left")

    async def test_an_upload_goes_on_and_replaces(self, backend: PoolBackend, path: str) -> None:
        """Facet Uploading: position, digest, and the old content until the end."""
        async with open_pool(backend, path) as pool:
            if not isinstance(pool, Uploading):
                return
            identity = await make(pool, "disk", Plan(RAW, 10))
            upload = await pool.begin_upload(token=UPLOAD)
            await upload.write([Piece(0, 4, b"abcd"), Piece(4, 4, None)])
            expect((upload.position, await upload.flush()) == (8, 8), "another position")
            await upload.close()
            upload = await pool.begin_upload(token=UPLOAD)
            expect(upload.position == 8, "it does not go on")
            await upload.rewind(6)
            await upload.write([Piece(6, 2, b"yz")])
            wanted = b"abcd\0\0yz"
            expect(upload.digest() == f"sha256:{hashlib.sha256(wanted).hexdigest()}", "another digest")
            expect((await pool.inspect("disk", RAW)).capacity_bytes == 10, "the old content is gone")
            await refused(BackingMissing, lambda: pool.replace(upload, "disk", "another"))
            await pool.replace(upload, "disk", identity)
            await upload.close()
            expect((await pool.inspect("disk", RAW)).capacity_bytes == 8, "the new content is not there")
            expect(await read(pool, "disk") in (None, wanted), "other content")

    async def test_reading_has_bounds(self, backend: PoolBackend, path: str) -> None:
        """Facet Downloading."""
        async with open_pool(backend, path) as pool:
            if not isinstance(pool, Downloading):
                return
            await make(pool, "disk", Plan(RAW, 3 * MIB))
            async with pool.read("disk", MIB, 10 * MIB) as download:
                expect((download.offset, download.length, download.physical_bytes) == (MIB, 2 * MIB, 3 * MIB), "range")
                total = 0
                async for piece in download.pieces:
                    expect(piece.offset == MIB + total, "a gap")
                    total += piece.length
                expect(total == 2 * MIB, "another length")
            await refused(RangeBeyondEnd, pool.read("disk", 4 * MIB, 0).__aenter__)


async def replace(pool: Uploading, key: str, data: bytes) -> None:
    """Give a volume other content."""
    upload = await pool.begin_upload(token=f"upload-{key}")
    await upload.write([Piece(0, len(data), data)])
    identity = (await pool.inspect(key, RAW)).identity  # type: ignore[attr-defined]  # an open pool with the facet
    await pool.replace(upload, key, identity)
    await upload.close()


async def read(pool: OpenPool | Uploading, key: str) -> bytes | None:
    """Return the content of a volume; None: the kind cannot send it."""
    if not isinstance(pool, Downloading):
        return None
    async with pool.read(key, 0, 0) as download:
        return b"".join([piece.data or bytes(piece.length) async for piece in download.pieces])

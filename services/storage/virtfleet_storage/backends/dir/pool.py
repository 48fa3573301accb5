"""A directory in use as a pool."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, aclosing, asynccontextmanager
from typing import TypeVar

from asyncinotify import Inotify, Mask

from virtfleet.storage.v1 import volume_pb2
from virtfleet_service.errors import (
    BackendFailed,
    BackendUnreachable,
    BackingMissing,
    CapabilityMissing,
    ImageCorrupt,
    PathOutsidePool,
    RangeBeyondEnd,
    ResourceNotFound,
)
from virtfleet_storage.backends.api import (
    QCOW2,
    RAW,
    Download,
    Facts,
    Format,
    Grant,
    Layer,
    Piece,
    Plan,
    Progress,
    StagedUpload,
    StagedVolume,
    Usage,
    format_word,
)
from virtfleet_storage.backends.dir import access, content, images, inspection, paths, qcow2, staging
from virtfleet_storage.backends.dir.failures import translate, translated
from virtfleet_storage.backends.dir.staged import DirStaged, DirUpload
from virtfleet_storage.backends.dir.staging import StagingArea

T = TypeVar("T")

_CHANGES = (
    Mask.CREATE
    | Mask.DELETE
    | Mask.MOVED_FROM
    | Mask.MOVED_TO
    | Mask.CLOSE_WRITE
    | Mask.ATTRIB
    | Mask.DELETE_SELF
    | Mask.MOVE_SELF
    | Mask.UNMOUNT
)
_READ_AHEAD = 1


class DirPool:
    """Is an open directory. Blocking work runs in threads; see `OpenPool` for what each method promises."""

    kind = "dir"

    def __init__(self, path: str, area: StagingArea, executor: ThreadPoolExecutor) -> None:
        """Take over an open directory, and the threads that work in it."""
        self.path = path
        self.area = area
        self._executor = executor
        self._closed = False
        self._users = 0
        """How many are at work. The directory is closed behind the last: its number may mean another one then."""

    # The required set.

    async def usage(self) -> Usage:
        """Return the room of the file system."""

        def look() -> Usage:
            self._check_place()
            facts = os.fstatvfs(self.area.pool)
            capacity, free = facts.f_blocks * facts.f_frsize, facts.f_bfree * facts.f_frsize
            read_only = bool(facts.f_flag & os.ST_RDONLY)
            return Usage(capacity, capacity - free, facts.f_bavail * facts.f_frsize, read_only)

        return await self.run(f"looking at {self.path}", look)

    async def scan(self, known: Mapping[str, Format]) -> list[Facts]:
        """Look at all files that can be volumes."""

        def look() -> list[Facts]:
            self._check_place()
            found = []
            for name in sorted(os.listdir(self.area.pool)):  # noqa: PTH208  # a descriptor has no Path
                # In a thread, where its absence between the listing and the look is nobody's error.
                with contextlib.suppress(ResourceNotFound):
                    facts = self._look_at(name, known.get(name))
                    if facts is not None:
                        found.append(facts)
            return found

        return await self.run(f"reading {self.path}", look)

    def _look_at(self, name: str, format: Format | None) -> Facts | None:
        try:
            return inspection.look(self.area.pool, name, format)
        except OSError as error:
            # One bad file is no reason to give up the others.
            return inspection.unreadable(name, format, translate(error, f"looking at {name}"))

    async def inspect(self, key: str, format: Format) -> Facts:
        """Look at one file."""

        def look() -> Facts:
            # The path is what a guest will open.
            self._check_place()
            file = paths.open_file(self.area.pool, key)
            try:
                return inspection.facts_of(file, key, format)
            finally:
                os.close(file)

        return await self.run(f"looking at {key}", look)

    async def create(self, plan: Plan) -> StagedVolume:
        """Make an empty volume, unseen."""
        async with self._staged() as file:
            stop = threading.Event()
            if plan.format == QCOW2:
                await images.create(file.descriptor, plan)
            else:
                await self.run("making a file", lambda: _allocate(file.descriptor, 0, plan, stop), stop)
            return await self._finish(file, plan.format)

    async def reopen(self, token: str) -> StagedVolume | None:
        """Find a staged file again."""
        file = await self.obtain("opening a staged file", lambda: self.area.find_file(token), _let_go)
        return None if file is None else DirStaged(file, self.run)

    async def publish(self, staged: StagedVolume, key: str) -> None:
        """Give a staged file its place."""
        file = _own(staged)
        if not paths.acceptable_name(key):
            raise PathOutsidePool(f"{key!r} is no name of a volume's file", path=key)
        await self.run(f"placing {key}", lambda: file.publish(key))

    async def delete(self, key: str, identity: str = "", *, unchanged_since_ns: int = 0) -> None:
        """Unlink a file."""

        def unlink() -> None:
            if not paths.acceptable_name(key):
                raise PathOutsidePool(f"{key!r} is no name of a volume's file", path=key)
            try:
                facts = os.stat(key, dir_fd=self.area.pool, follow_symlinks=False)
                if identity and paths.identity_of(facts) != identity:
                    return
                if 0 < unchanged_since_ns < facts.st_ctime_ns:
                    return
                os.unlink(key, dir_fd=self.area.pool)
            except FileNotFoundError:
                return
            os.fsync(self.area.pool)

        await self.run(f"removing {key}", unlink)

    async def sweep(self, keep: frozenset[str]) -> int:
        """Remove staged files that nobody needs."""
        return await self.run("removing staged files", lambda: self.area.sweep(keep))

    @asynccontextmanager
    async def changes(self) -> AsyncIterator[AsyncIterator[None]]:
        """Watch the directory by inotify."""
        with translated(f"watching {self.path}"), Inotify() as inotify:
            inotify.add_watch(f"/proc/self/fd/{self.area.pool}", _CHANGES | Mask.ONLYDIR)

            async def told() -> AsyncIterator[None]:
                async for event in inotify:
                    if event.name is None or not str(event.name).startswith("."):
                        yield None

            yield told()

    async def retire(self) -> None:
        """Remove the folder of the service."""
        await self.run("removing the service's own folder", self.area.retire)

    async def close(self) -> None:
        """Close the directory; what is at work in it comes to its end first."""
        if not self._closed:
            self._closed = True
            self._leave(0)

    def _leave(self, count: int = 1) -> None:
        self._users -= count
        if self._closed and not self._users:
            self.area.close()
            os.close(self.area.pool)
            self._executor.shutdown(wait=False)

    # Copying.

    async def copy(self, plan: Plan, chain: Sequence[Layer], progress: Progress) -> StagedVolume:
        """Make a volume with the content of a chain, unseen."""
        async with AsyncExitStack() as stack:
            opened = [await self._open_layer(stack, layer, os.O_RDONLY) for layer in chain]
            file = await stack.enter_async_context(self._staged())
            if [layer.format for layer in chain] == [RAW] and plan.format == RAW:
                stop = threading.Event()
                source, target = opened[0].descriptor, file.descriptor

                def work() -> None:
                    length = os.fstat(source).st_size
                    content.copy(source, target, min(length, plan.capacity_bytes), progress, stop)
                    _allocate(target, length, plan, stop)

                await self.run("copying", work, stop)
            else:
                await self._convert(opened, file.descriptor, plan, progress)
            return await self._finish(file, plan.format)

    async def _convert(self, chain: Sequence[images.OpenImage], target: int, plan: Plan, progress: Progress) -> None:
        expected = sum(os.fstat(image.descriptor).st_blocks * 512 for image in chain)

        async def watch() -> None:
            # The tool tells its progress to a person; the file grows as it goes.
            while True:
                await asyncio.sleep(0.5)
                progress(min(os.fstat(target).st_blocks * 512, expected), max(expected, 1))

        watching = asyncio.create_task(watch())
        try:
            await images.convert(chain, target, plan, plan.capacity_bytes)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        if plan.format == QCOW2:
            current = inspection.facts_of(target, "", QCOW2).capacity_bytes
            if current < plan.capacity_bytes:
                await images.resize(
                    [images.OpenImage(target, QCOW2)], plan.capacity_bytes, shrink=False, allocate=False
                )
        else:
            stop = threading.Event()
            length = os.fstat(target).st_size
            await self.run("taking room", lambda: _allocate(target, length, plan, stop), stop)

    # Resizing.

    async def resize(
        self, key: str, format: Format, capacity_bytes: int, *, chain: Sequence[Layer], shrink: bool, allocate: bool
    ) -> None:
        """Change the size."""
        async with AsyncExitStack() as stack:
            top = await self._open_layer(stack, Layer(self, key, format), os.O_RDWR)
            below = [await self._open_layer(stack, layer, os.O_RDONLY) for layer in chain]
            if format == QCOW2:
                await images.resize([top, *below], capacity_bytes, shrink=shrink, allocate=allocate)
            else:
                before = os.fstat(top.descriptor).st_size

                def change() -> None:
                    if allocate and capacity_bytes > before:
                        os.posix_fallocate(top.descriptor, before, capacity_bytes - before)
                    os.ftruncate(top.descriptor, capacity_bytes)

                await self.run(f"resizing {key}", change)
            await self.run(f"resizing {key}", lambda: os.fsync(top.descriptor))

    # Wiping.

    async def wipe(self, key: str, format: Format, plan: Plan, progress: Progress) -> None:
        """Overwrite what a file stores; an image ends as a new, empty one.

        Until then an image keeps its place and its header, marked as corrupt: whoever is interrupted finds it there, no
        guest gets it, and it can be wiped again.
        """
        async with AsyncExitStack() as stack:
            top = await self._open_layer(stack, Layer(self, key, format), os.O_RDWR)
            stop = threading.Event()
            doing = f"wiping {key}"
            if format != QCOW2:
                await self.run(doing, lambda: content.overwrite(top.descriptor, progress, stop), stop)
                return
            file = await stack.enter_async_context(self._staged())
            await images.create(file.descriptor, plan)
            await self._finish(file, format)
            kept = await self.run(doing, lambda: _marked_corrupt(top.descriptor, key))
            await self.run(doing, lambda: content.overwrite(top.descriptor, progress, stop, start=kept), stop)

            def change_places() -> None:
                file.replace(key, paths.identity_of(os.fstat(top.descriptor)))
                # The old image has no name any more, but its header is still there.
                content.overwrite(top.descriptor, _nobody, threading.Event(), end=kept)

            await self.run(doing, change_places)
            file.close()

    # Uploading.

    async def begin_upload(self, *, token: str) -> StagedUpload:
        """Begin an upload or go on with one."""

        def begin() -> tuple[DirUpload, bool]:
            found = self.area.find_file(token)
            return DirUpload(found or self.area.make(token), self.run), found is None

        def leave(begun: tuple[DirUpload, bool]) -> None:
            upload, is_new = begun
            # What stood before is somebody's to go on with; a new file nobody has heard of.
            if is_new:
                _throw_away(upload.file)
            else:
                upload.file.close()

        upload, _ = await self.obtain("opening an upload", begin, leave)
        return upload

    async def replace(self, staged: StagedUpload, key: str, identity: str) -> None:
        """Put an upload in the place of a file."""
        file = _own(staged)
        await self.run(f"replacing {key}", lambda: file.replace(key, identity))

    # Downloading.

    @asynccontextmanager
    async def read(self, key: str, offset: int, length: int) -> AsyncIterator[Download]:
        """Open a file for reading."""

        def opened() -> tuple[int, int]:
            descriptor = paths.open_file(self.area.pool, key)
            return descriptor, os.fstat(descriptor).st_size

        file, size = await self.obtain(f"opening {key}", opened, lambda pair: os.close(pair[0]))
        self._users += 1
        try:
            if offset > size:
                raise RangeBeyondEnd(
                    f"{key} has {size} bytes; nothing begins at {offset}",
                    field="offset_bytes",
                    offset_bytes=offset,
                    physical_bytes=size,
                )
            length = min(length or size, size - offset)
            async with aclosing(self._pieces(file, offset, length)) as pieces:
                yield Download(offset, length, size, pieces)
        finally:
            os.close(file)
            self._leave()

    async def _pieces(self, file: int, offset: int, length: int) -> AsyncGenerator[Piece, None]:
        source: Iterator[Piece] = content.pieces(file, offset, length)
        # Read one ahead of the sender: the disk and the network work at the same time, in bounded memory.
        reading: asyncio.Future[list[Piece]] = asyncio.ensure_future(self.run("reading", lambda: _some(source)))
        try:
            while batch := await reading:
                reading = asyncio.ensure_future(self.run("reading", lambda: _some(source)))
                for piece in batch:
                    yield piece
        finally:
            # The thread must have let go of the file before it is closed.
            await asyncio.gather(reading, return_exceptions=True)

    # Granting.

    async def present(self, key: str) -> tuple[int, int, int]:
        """Return owner, group and mode of a file."""

        def look() -> tuple[int, int, int]:
            file = paths.open_file(self.area.pool, key)
            try:
                return access.present(file)
            finally:
                os.close(file)

        return await self.run(f"looking at {key}", look)

    async def grant(self, key: str, grants: Sequence[Grant], restore: tuple[int, int, int]) -> None:
        """Give guests access."""

        def change() -> None:
            file = paths.open_file(self.area.pool, key)
            try:
                access.apply(file, grants, restore)
            finally:
                os.close(file)

        await self.run(f"changing who may use {key}", change)

    # Means.

    def _check_place(self) -> None:
        try:
            current = paths.open_directory(self.path)
        except (BackingMissing, PathOutsidePool) as error:
            raise BackendUnreachable(f"directory {self.path} is gone", path=self.path) from error
        try:
            if paths.identity_of(os.fstat(current)) != paths.identity_of(os.fstat(self.area.pool)):
                raise BackendUnreachable(
                    f"directory {self.path} is another one than the pool was started with", path=self.path
                )
        finally:
            os.close(current)

    @asynccontextmanager
    async def _staged(self) -> AsyncIterator[staging.StagedFile]:
        """Make a staged file that goes away unless the block ends well."""
        file = await self.obtain("making a staged file", self.area.make, _throw_away)
        self._users += 1
        with ExitStack() as using, ExitStack() as undo:
            using.callback(self._leave)
            undo.callback(file.close)
            undo.callback(file.discard)
            yield file
            undo.pop_all()

    async def _finish(self, file: staging.StagedFile, format: Format) -> StagedVolume:
        await self.run("finishing a file", lambda: file.mark_format(format_word(format)))
        return DirStaged(file, self.run)

    async def _open_layer(self, stack: AsyncExitStack, layer: Layer, flags: int) -> images.OpenImage:
        pool = layer.pool
        if not isinstance(pool, DirPool):
            raise CapabilityMissing(
                f"a volume of a pool of kind {pool.kind} cannot be read here",
                capability="volume.copy",
                backend=pool.kind,
            )
        file = await pool.obtain(
            f"opening {layer.key}", lambda: paths.open_file(pool.area.pool, layer.key, flags), os.close
        )
        stack.callback(os.close, file)
        return images.OpenImage(file, layer.format)

    async def obtain(self, doing: str, work: Callable[[], T], undo: Callable[[T], object]) -> T:
        """Run work that opens or makes something; what a cancelled caller does not take is undone."""
        obtaining = asyncio.ensure_future(self.run(doing, work))
        try:
            return await asyncio.shield(obtaining)
        except asyncio.CancelledError:
            await asyncio.wait([obtaining])
            if obtaining.exception() is None:
                undo(obtaining.result())
            raise

    async def run(self, doing: str, work: Callable[[], T], stop: threading.Event | None = None) -> T:
        """Run work in a thread. A cancellation waits for its end, so that nobody pulls files away under it."""

        def guarded() -> T:
            with translated(doing):
                return work()

        if self._closed:
            raise BackendUnreachable(f"{self.path} is not open", path=self.path)
        future = asyncio.get_running_loop().run_in_executor(self._executor, guarded)
        self._users += 1
        future.add_done_callback(lambda _: self._leave())
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            if stop is not None:
                stop.set()
            await asyncio.gather(future, return_exceptions=True)
            raise


def _marked_corrupt(descriptor: int, key: str) -> int:
    try:
        return qcow2.mark_corrupt(descriptor)
    except qcow2.HeaderError as error:
        raise ImageCorrupt(f"{key} is no qcow2 image: {error}", path=key) from error


def _nobody(_done_bytes: int, _total_bytes: int) -> None:
    return


def _let_go(file: staging.StagedFile | None) -> None:
    if file is not None:
        file.close()


def _throw_away(file: staging.StagedFile) -> None:
    file.discard()
    file.close()


def _own(staged: StagedVolume) -> staging.StagedFile:
    if not isinstance(staged, DirStaged):
        raise BackendFailed("a staged volume of another kind of pool was given to a directory", token=staged.token)
    return staged.file


def _some(source: Iterator[Piece]) -> list[Piece]:
    found = []
    for piece in source:
        found.append(piece)
        if len(found) == _READ_AHEAD:
            break
    return found


def _allocate(descriptor: int, start: int, plan: Plan, stop: threading.Event) -> None:
    os.ftruncate(descriptor, plan.capacity_bytes)
    if plan.capacity_bytes <= start:
        return
    if plan.preallocation == volume_pb2.PREALLOCATION_FALLOC:
        os.posix_fallocate(descriptor, start, plan.capacity_bytes - start)
    elif plan.preallocation == volume_pb2.PREALLOCATION_FULL:
        content.fill(descriptor, start, plan.capacity_bytes, stop)

"""Pools that are a directory: how one is made, opened, and told from an empty mount point that stands in its place."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Callable, Container
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

from virtfleet_service.errors import BackingMissing, IdentityInUse, VirtfleetError
from virtfleet_storage.backends.api import QCOW2, RAW, Format, OpenPool, Probe
from virtfleet_storage.backends.dir import images, paths
from virtfleet_storage.backends.dir.failures import translated
from virtfleet_storage.backends.dir.pool import DirPool
from virtfleet_storage.backends.dir.staging import StagingArea

_log = logging.getLogger(__name__)

THREADS = 8
"""How many file operations run at a time in one pool; further ones wait."""

POOL_MODE = 0o711
"""Guests reach their files by path, and list nothing."""

T = TypeVar("T")


class DirBackend:
    """Is the kind of pool that is a directory of a mounted file system."""

    kind = "dir"
    display_name = "Directory"
    formats: tuple[Format, ...] = (RAW, QCOW2)
    pool_class: type[OpenPool] = DirPool

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="dir")
        self._tool: tuple[str, int, int] | None = None
        self._version = ""

    async def probe(self) -> Probe:
        """Say what can be done here: a directory serves everywhere, and qcow2 needs qemu-img."""
        try:
            await self._look_at_tool()
        except VirtfleetError as error:
            _log.info("no qcow2 volumes can be made: %s", error)
            return Probe(formats=(RAW,))
        return Probe(version=f"qemu-img {self._version}", formats=self.formats)

    async def _look_at_tool(self) -> None:
        """Ask the tool what it is, unless it is the one that was asked before."""
        path = images.tool()
        try:
            facts = os.stat(path)  # noqa: PTH116  # the text that is run
            found = (path, facts.st_mtime_ns, facts.st_size)
        except FileNotFoundError:
            found = None
        if found is None or found != self._tool:
            self._version, self._tool = await images.version(), found

    async def build(self, path: str) -> bool:
        """Make the directory if it is missing; its parent must be there.

        Raises:
            BackingMissing: The parent is missing.
            PathOutsidePool: A link is on the way.
        """
        return await self._run(lambda: _build(path))

    async def unbuild(self, path: str) -> None:
        """Remove an empty directory. Succeeds if it is gone; leaves one that is not empty."""
        await self._run(lambda: _unbuild(path))

    async def retire(self, path: str, pool_uid: str) -> None:
        """Remove the service's own folder from the directory of a pool that is closed, or was never opened."""
        # Threads of its own: see `open`.
        executor = ThreadPoolExecutor(1, thread_name_prefix="retire")
        try:
            await asyncio.get_running_loop().run_in_executor(executor, _retire, path, pool_uid)
        finally:
            executor.shutdown(wait=False)

    async def open(self, path: str, pool_uid: str, *, claim: bool, others: Container[str] = frozenset()) -> DirPool:
        """Open a directory for a pool.

        Raises:
            BackingMissing: It is missing, or does not know this pool and is not to be claimed.
            IdentityInUse: It is the place of one of the others.
            PathOutsidePool: A link is on the way, or others may write where the service keeps its own files.
        """
        # Of its own: a pool on a file system that hangs must not take the threads of the others.
        executor = ThreadPoolExecutor(THREADS, thread_name_prefix="pool")
        work = asyncio.get_running_loop().run_in_executor(
            executor, lambda: _open(path, pool_uid, claim=claim, others=others)
        )
        try:
            return DirPool(path, await asyncio.shield(work), executor)
        except BaseException:
            work.add_done_callback(_close_area)
            executor.shutdown(wait=False)
            raise

    def close(self) -> None:
        """Let go of the threads."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)


def _build(path: str) -> bool:
    with translated(f"making {path}"):
        parent, name = paths.open_parent(path)
        try:
            os.mkdir(name, POOL_MODE, dir_fd=parent)
            made = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
            try:
                # Whatever the umask is.
                os.fchmod(made, POOL_MODE)
                os.fsync(parent)
            finally:
                os.close(made)
        except FileExistsError:
            os.close(paths.open_directory(path))
            return False
        finally:
            os.close(parent)
        return True


def _unbuild(path: str) -> None:
    with translated(f"removing {path}"):
        try:
            parent, name = paths.open_parent(path)
        except BackingMissing:
            return
        try:
            os.rmdir(name, dir_fd=parent)
            os.fsync(parent)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY, errno.ENOTDIR):
                raise
        finally:
            os.close(parent)


def _open(path: str, pool_uid: str, *, claim: bool, others: Container[str]) -> StagingArea:
    with translated(f"opening {path}"):
        directory = paths.open_directory(path)
        try:
            area = StagingArea.open(directory) if claim else StagingArea.find(directory)
            if area is None:
                raise _strange(path)
            try:
                owner = area.owner()
                if owner != pool_uid:
                    if not claim:
                        raise _strange(path)
                    if owner in others:
                        raise IdentityInUse(
                            f"{path} is the directory of another pool, under another path", holder=owner, path=path
                        )
                    area.claim(pool_uid)
            except BaseException:
                area.close()
                raise
        except BaseException:
            os.close(directory)
            raise
        return area


def _retire(path: str, pool_uid: str) -> None:
    with ExitStack() as stack:
        try:
            with translated(f"opening {path}"):
                directory = paths.open_directory(path)
                stack.callback(os.close, directory)
                area = StagingArea.find(directory)
        except VirtfleetError:
            # It is gone, or others may write to it by now: there is nothing of ours in it.
            return
        if area is None:
            return
        stack.callback(area.close)
        with translated(f"clearing {path}"):
            if area.owner() == pool_uid or area.is_nobodys():
                area.retire()


def _close_area(work: asyncio.Future[StagingArea]) -> None:
    """Close what was opened for somebody who had gone."""
    if not work.cancelled() and work.exception() is None:
        area = work.result()
        area.close()
        os.close(area.pool)


def _strange(path: str) -> BackingMissing:
    return BackingMissing(
        f"{path} is not the directory that the pool was started with: is a file system to be mounted there? "
        "If it is to be used all the same, start the pool with build NO_OVERWRITE",
        path=path,
    )

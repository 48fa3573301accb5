"""Staged files as the service sees them: the blocking work of `staging` in threads."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from virtfleet_storage.backends.api import Facts, Format, Piece
from virtfleet_storage.backends.dir import inspection
from virtfleet_storage.backends.dir.staging import StagedFile, UploadFile

_LARGE_BYTES = 64 << 20


class Runner(Protocol):
    """Runs blocking work in a thread, and turns what the kernel refuses into errors of the API."""

    def __call__(self, doing: str, work: Callable[[], Any]) -> Awaitable[Any]:
        """Run it; `doing` says what it is, for people."""


class DirStaged:
    """Is a staged file; see `StagedVolume`."""

    def __init__(self, file: StagedFile, run: Runner) -> None:
        self.file = file
        self.token = file.token
        self.identity = file.identity
        self._run = run

    async def close(self) -> None:
        """Let go of the file."""
        self.file.close()

    async def discard(self) -> None:
        """Remove the file, unless it has its place by now."""
        self.file.close()
        await self._run("removing a staged file", self.file.discard)


class DirUpload(DirStaged):
    """Is a staged file that is being written; see `StagedUpload`."""

    def __init__(self, file: StagedFile, run: Runner) -> None:
        super().__init__(file, run)
        self._upload = UploadFile(file)

    @property
    def position(self) -> int:
        """How much stands."""
        return self._upload.position

    async def rewind(self, position: int) -> None:
        """Go on from a position."""
        await self._run("reading an upload again", lambda: self._upload.rewind(position))

    async def write(self, pieces: Sequence[Piece]) -> None:
        """Add pieces."""
        await self._run("storing an upload", lambda: self._upload.write(pieces))

    async def flush(self) -> int:
        """Make what stands safe."""
        position, file = self._upload.position, self.file.descriptor

        def sync() -> None:
            os.fdatasync(file)
            if position >= _LARGE_BYTES:
                # A large upload is read again much later if at all; its pages are worth more to the next ones, and
                # memory that the kernel has at hand is several times faster to write than fresh one.
                os.posix_fadvise(file, 0, position, os.POSIX_FADV_DONTNEED)

        await self._run("storing an upload", sync)
        return position

    def digest(self) -> str:
        """Return the digest of what stands."""
        return self._upload.digest()

    async def inspect(self, format: Format) -> Facts:
        """Look at what stands."""
        facts: Facts = await self._run(
            "looking at an upload", lambda: inspection.facts_of(self.file.descriptor, self.token, format)
        )
        return facts

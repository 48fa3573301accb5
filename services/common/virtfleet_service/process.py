"""The one place that starts other programs: argument lists, a deadline, bounded output, a process group, no shell."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from virtfleet_service.errors import BackendFailed, OperationTimedOut

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

OUTPUT_LIMIT_BYTES: Final = 1 << 20
"""How much of each output is kept unless told otherwise; a tool that writes more is read on and its surplus dropped."""

_SHOWN_BYTES: Final = 2000
_TERM_GRACE_SECONDS: Final = 2.0

_ENVIRONMENT: Final[Mapping[str, str]] = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
"""The whole environment of a tool: nothing of ours leaks into it, and its language does not depend on ours."""


@dataclass(frozen=True, slots=True)
class Completed:
    """Is a program that has ended.

    Attributes:
        argv: Its argument list.
        exit_code: 0 and up as it returned it; below 0: the signal that killed it, negated.
        stdout: What it wrote, up to the limit.
        stderr: What it wrote, up to the limit.
        truncated: Whether either was cut.
    """

    argv: tuple[str, ...]
    exit_code: int
    stdout: bytes
    stderr: bytes
    truncated: bool = False

    @property
    def said(self) -> str:
        """The end of what it wrote to stderr (else stdout), as text."""
        return (self.stderr.strip() or self.stdout.strip())[-_SHOWN_BYTES:].decode("utf-8", "replace")

    def check(self) -> Completed:
        """Return itself if the program succeeded.

        Raises:
            BackendFailed: It returned anything but 0.
        """
        if self.exit_code != 0:
            tool = os.path.basename(self.argv[0])  # noqa: PTH119  # the text of an argument, not a path of ours
            end = (
                f"failed with exit code {self.exit_code}"
                if self.exit_code > 0
                else f"was ended by signal {-self.exit_code}"
            )
            raise BackendFailed(
                f"{tool} {end}: {self.said}",
                tool=tool,
                exit_code=self.exit_code,
                said=self.said,
            )
        return self


async def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    timeout_seconds: float,
    input: bytes | None = None,  # noqa: A002  # as subprocess.run calls it
    limit_bytes: int = OUTPUT_LIMIT_BYTES,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
) -> Completed:
    """Run a program to its end.

    The program is the leader of a session of its own. On cancellation and at the deadline the whole group gets SIGTERM,
    and SIGKILL two seconds later; when this function returns or raises, none of the group that kept its group lives.

    Args:
        argv: The program and its arguments; the program by absolute path, or found in the system's own folders.
        timeout_seconds: When it must have ended.
        input: What it reads from stdin, a file; None: nothing.
        limit_bytes: How much of each output is kept.
        env: Added to its environment, which is otherwise `PATH` and `LC_ALL`.
        cwd: Its working directory; None: `/`.
        pass_fds: Descriptors that it inherits.

    Raises:
        BackendFailed: It cannot be started.
        OperationTimedOut: It did not end in time.
    """
    words = tuple(os.fspath(word) for word in argv)
    stdin = asyncio.subprocess.DEVNULL if input is None else _file_of(input)
    try:
        process = await asyncio.create_subprocess_exec(
            *words,
            stdin=stdin,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**_ENVIRONMENT, **(env or {})},
            cwd=cwd or "/",
            start_new_session=True,
            pass_fds=tuple(pass_fds),
        )
    except (OSError, ValueError) as error:
        raise BackendFailed(f"{words[0]} cannot be started: {error}", tool=words[0], cause=error) from error
    finally:
        if input is not None:
            os.close(stdin)
    try:
        async with asyncio.timeout(timeout_seconds):
            stdout, stderr = await asyncio.gather(
                _read(process.stdout, limit_bytes), _read(process.stderr, limit_bytes)
            )
            exit_code = await process.wait()
    except TimeoutError as error:
        await _end(process)
        raise OperationTimedOut(
            f"{words[0]} did not end within {timeout_seconds:g} s", tool=words[0], timeout_seconds=timeout_seconds
        ) from error
    except BaseException:
        # Shielded: whoever cancels must find the group gone, and a second cancellation must not leave it half killed.
        await asyncio.shield(_end(process))
        raise
    return Completed(words, exit_code, stdout[0], stderr[0], truncated=stdout[1] or stderr[1])


async def _read(stream: asyncio.StreamReader | None, limit_bytes: int) -> tuple[bytes, bool]:
    kept = bytearray()
    truncated = False
    while stream is not None and (piece := await stream.read(65536)):
        room = limit_bytes - len(kept)
        truncated = truncated or len(piece) > room
        kept += piece[: max(room, 0)]
    return bytes(kept), truncated


def _file_of(text: bytes) -> int:
    """Return a file in memory that is read from its beginning.

    What the event loop calls a pipe is a socket, which some programs refuse to read from (nft 1.0.9).
    """
    descriptor = os.memfd_create("input")
    with open(descriptor, "wb", closefd=False) as file:
        file.write(text)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


async def _end(process: asyncio.subprocess.Process) -> None:
    _signal_group(process.pid, signal.SIGTERM)
    try:
        async with asyncio.timeout(_TERM_GRACE_SECONDS):
            await process.wait()
    except TimeoutError:
        pass
    # Also after the leader has gone: its children may have stayed.
    _signal_group(process.pid, signal.SIGKILL)
    await process.wait()


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return

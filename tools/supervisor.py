"""Keeps the processes of a development fleet: starts them, starts again what dies, ends them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

STOP_SECONDS = 10.0


@dataclass(slots=True)
class Program:
    """Is one process of the fleet.

    Attributes:
        name: For people: `n1/compute`.
        command: Its argument list.
        pid_file: Holds its process id while it runs.
        log_file: Takes what it prints.
        environment: Its environment.
        restart: Whether it is started again when it ends by itself.
        hurry: Set by whoever does not want to wait until it is.
    """

    name: str
    command: Sequence[str]
    pid_file: Path
    log_file: Path
    environment: Mapping[str, str]
    restart: bool = True
    process: asyncio.subprocess.Process | None = field(default=None)
    starts: int = 0
    hurry: asyncio.Event = field(default_factory=asyncio.Event)


class Supervisor:
    """Runs programs until `stop`; a program that dies is started again after a rising delay.

    Raises:
        RuntimeError: From `start`, if a program cannot be started at all.
    """

    def __init__(self) -> None:
        self.programs: dict[str, Program] = {}
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._stopping = False

    async def start(self, program: Program) -> None:
        """Start a program and watch it from then on."""
        self.programs[program.name] = program
        await self._spawn(program)
        self._watchers[program.name] = asyncio.create_task(self._watch(program), name=program.name)

    async def _spawn(self, program: Program) -> None:
        program.starts += 1
        with program.log_file.open("ab") as log:
            program.process = await asyncio.create_subprocess_exec(
                *program.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(program.environment),
                start_new_session=True,
            )
        program.pid_file.write_text(f"{program.process.pid}\n")

    async def _watch(self, program: Program) -> None:
        delay = 0.2
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            if program.process is None:
                return
            await program.process.wait()
            if self._stopping or not program.restart:
                return
            delay = 0.2 if loop.time() - began > 10 else min(delay * 2, 5.0)
            program.hurry.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await program.hurry.wait()
            await self._spawn(program)

    async def stop(self, name: str) -> None:
        """End one program with SIGTERM, with SIGKILL after ten seconds; it is not started again."""
        watcher = self._watchers.pop(name, None)
        if watcher is not None:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
        program = self.programs.pop(name)
        process = program.process
        if process is not None and process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), STOP_SECONDS)
            except TimeoutError:
                process.kill()
                await process.wait()
        program.pid_file.unlink(missing_ok=True)

    async def stop_all(self) -> None:
        """End all programs, those started last first."""
        self._stopping = True
        for name in reversed(list(self.programs)):
            await self.stop(name)

    def kill(self, name: str) -> int:
        """Send SIGKILL to a program, which is then started again.

        Returns:
            The process id that was killed.
        """
        process = self.programs[name].process
        if process is None:
            raise RuntimeError(f"{name} has not been started")
        os.kill(process.pid, signal.SIGKILL)
        return process.pid

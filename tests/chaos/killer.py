"""Who dies, when and where: decided by a seed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from tests.chaos import truth
from tools import fleet as development
from tools.supervisor import Program
from virtfleet_service.failpoints import VARIABLE

PROCESSES: Final = ("gateway", "compute", "storage", "network", "launcher", "dnsmasq", "guest")
PLACES: Final = ("compute places", "storage places", "network places", "gateway places")
KINDS: Final = (*PROCESSES, *PLACES, "node", "restart")
"""Of deaths: a process of this kind; a service at each of its named places, a part of them a round; all of a node's services
and its launcher at once; all of a fleet one after the other, by SIGTERM as an operator does."""
PARTS: Final = 4
"""In so many rounds a service has died at all of its places."""
_OPERATIONS: Final = ("operations.accepted", "operations.worked", "operations.recorded")
FAILPOINTS: Final = {
    "compute": (
        *_OPERATIONS,
        "compute.create.intent",
        "compute.create.volume",
        "compute.create.ports",
        "compute.create.made",
        "compute.start.intent",
        "compute.start.connected",
        "compute.start.started",
        "compute.update.live",
        "compute.stop.force",
        "compute.stop.ended",
        "compute.delete.stopped",
        "compute.delete.undone",
        "compute.batch.defined",
        "compute.batch.stopped",
        "compute.reconcile.compared",
    ),
    "storage": (
        *_OPERATIONS,
        "storage.pool.create.built",
        "storage.pool.create.done",
        "storage.pool.delete.retired",
        "storage.volume.create.staged",
        "storage.volume.create.published",
        "storage.volume.resize.done",
        "storage.volume.delete.removed",
        "storage.upload.intended",
        "storage.upload.replaced",
        "storage.attach.recorded",
        "storage.release.recorded",
    ),
    "network": (
        *_OPERATIONS,
        "network.create.recorded",
        "network.start.recorded",
        "network.start.done",
        "network.update.recorded",
        "network.stop.recorded",
        "network.stop.done",
        "network.delete.recorded",
        "network.delete.done",
        "port.create.recorded",
        "port.plug.begun",
        "port.plug.done",
        "port.unplug.recorded",
    ),
    "gateway": ("requests.recorded",),
}
"""Between an intent, its effect and its commit; passed by what the writer does."""
_REACH_SECONDS: Final = 12.0


@dataclass(slots=True)
class Killer:
    """Kills processes of a fleet.

    Attributes:
        fleet: Whose.
        chance: Decides.
        killed_guests: The uids of the guests that died by its hand.
    """

    fleet: development.Fleet
    chance: random.Random
    killed_guests: set[str] = field(default_factory=set)

    async def kill(self, kind: str, *, failpoint: bool) -> str:
        """Kill a process of a kind, at a named place if asked to and the kind has any; returns what was done."""
        await asyncio.sleep(self.chance.uniform(0, 0.3))
        if kind == "guest":
            return await self._kill_guest()
        if kind == "dnsmasq":
            daemons = sorted(pid for pids in truth.daemons_of(self.fleet).values() for pid in pids)
            for pid in daemons:
                _kill(pid)
            return f"{len(daemons)} dnsmasq"
        if kind == "node":
            names = [name for name in self.fleet.supervisor.programs if name.startswith("n1/")]
            self.chance.shuffle(names)
            for name in names:
                await self._kill(name)
            return " ".join(names)
        if failpoint and kind in FAILPOINTS:
            point = self.chance.choice(FAILPOINTS[kind])
            reached = await self.kill_at(kind, point, self.chance.randint(1, 3))
            return f"{kind} at {point}" if reached else f"{kind} (did not reach {point})"
        await self._kill(_program(kind))
        return kind

    async def kill_at(self, kind: str, point: str, passage: int = 1) -> bool:
        """Have a service start anew with a place at which it dies, and wait until it has; tells whether it did."""
        program = self.fleet.supervisor.programs[_program(kind)]
        clean = program.environment
        program.environment = {**clean, VARIABLE: f"{point}:{passage}"}
        starts = program.starts
        await self._kill(program.name)
        ends_at = time.monotonic() + _REACH_SECONDS
        while program.starts < starts + 2 and time.monotonic() < ends_at:
            program.hurry.set()
            if program.starts > starts:
                # The one that is to die runs: whoever comes after it is a plain one.
                program.environment = clean
            await asyncio.sleep(0.02)
        program.environment = clean
        reached = program.starts >= starts + 2
        if not reached:
            await self._kill(program.name)
        return reached

    async def restart(self, name: str, change: Callable[[Program], object] = lambda _: None) -> int | None:
        """End a program by SIGTERM and start another in its place; returns with what it ended.

        Args:
            name: The program.
            change: Is called between the end and the next start.
        """
        program = self.fleet.supervisor.programs[name]
        process = program.process
        assert process is not None
        await self.fleet.supervisor.stop(name)
        change(program)
        await self.fleet.supervisor.start(program)
        return process.returncode

    def places(self, kind: str, part: int) -> list[str]:
        """Return a part of a service's named places, in the order of chance."""
        points = list(FAILPOINTS[kind])[part % PARTS :: PARTS]
        self.chance.shuffle(points)
        return points

    async def _kill(self, name: str) -> None:
        """Kill a program; one that the last death has left to be started again a moment later, when it is there."""
        ends_at = time.monotonic() + _REACH_SECONDS
        while True:
            try:
                self.fleet.supervisor.kill(name)
            except ProcessLookupError:
                if time.monotonic() > ends_at:
                    raise
                await asyncio.sleep(0.05)
            else:
                return

    async def _kill_guest(self) -> str:
        ends_at = time.monotonic() + _REACH_SECONDS
        while not (guests := sorted(truth.guests_of(self.fleet).items())):
            if time.monotonic() > ends_at:
                return "no guest"
            await asyncio.sleep(0.01)
        uid, pids = self.chance.choice(guests)
        self.killed_guests.add(uid)
        for pid in pids:
            _kill(pid)
        return f"guest {uid}"


def _program(kind: str) -> str:
    return kind if kind == "gateway" else f"n1/{kind}"


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)

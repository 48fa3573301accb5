"""Who dies, when and where: decided by a seed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from dataclasses import dataclass, field
from typing import Final

from tests.chaos import truth
from tools import fleet as development
from virtfleet_service.failpoints import VARIABLE

KINDS: Final = ("gateway", "compute", "storage", "network", "launcher", "dnsmasq", "guest", "node")
"""Of processes; the last stands for all of a node's services and its launcher at once."""
FAILPOINTS: Final = {
    "compute": (
        "operations.accepted",
        "operations.worked",
        "operations.recorded",
        "compute.create.intent",
        "compute.create.volume",
        "compute.create.ports",
        "compute.create.made",
        "compute.start.intent",
        "compute.start.connected",
        "compute.start.started",
        "compute.stop.force",
        "compute.stop.ended",
        "compute.delete.undone",
    ),
    "storage": (
        "operations.accepted",
        "operations.worked",
        "operations.recorded",
        "storage.volume.create.staged",
        "storage.volume.create.published",
        "storage.volume.resize.done",
        "storage.volume.delete.removed",
        "storage.attach.recorded",
        "storage.release.recorded",
    ),
    "network": (
        "operations.accepted",
        "operations.worked",
        "operations.recorded",
        "network.create.recorded",
        "network.start.recorded",
        "network.start.done",
        "network.update.recorded",
        "network.stop.recorded",
        "network.stop.done",
        "network.delete.recorded",
        "network.delete.done",
        "port.plug.begun",
        "port.plug.done",
        "port.unplug.recorded",
    ),
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
        name = kind if kind == "gateway" else f"n1/{kind}"
        if failpoint and kind in FAILPOINTS:
            return await self._kill_at(name, f"{self.chance.choice(FAILPOINTS[kind])}:{self.chance.randint(1, 3)}")
        await self._kill(name)
        return name

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

    async def _kill_at(self, name: str, point: str) -> str:
        """Have a service start anew with a place at which it dies, and wait until it has."""
        program = self.fleet.supervisor.programs[name]
        clean = program.environment
        program.environment = {**clean, VARIABLE: point}
        await self._kill(name)
        starts = program.starts
        ends_at = time.monotonic() + _REACH_SECONDS
        while program.starts < starts + 2 and time.monotonic() < ends_at:
            if program.starts > starts:
                # The one that is to die runs: whoever comes after it is a plain one.
                program.environment = clean
            await asyncio.sleep(0.02)
        program.environment = clean
        if program.starts < starts + 2:
            await self._kill(name)
            return f"{name} (did not reach {point})"
        return f"{name} at {point}"


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)

"""A fleet at work for a long time, its memory and descriptors drawn: `python -m tests.endurance.soak`.

Guests live and die on a fleet with the usual settings while watchers follow. Every few seconds the private memory and
the open descriptors of each process are read from `/proc`. At the end `docs/soak.svg` is drawn, and the run fails if a
process has grown in its second half, or keeps descriptors that it had not at half-time. `SOAK_SECONDS` (1200) says how
long, `SOAK_CALLERS` (4) how many guests at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field

from bench.stage import credentials, pid_of
from tests.endurance import census, cycles, plot
from tools import fleet as development
from tools.paths import ROOT
from virtfleet.compute.v1 import watch_pb2
from virtfleet_client import AsyncFleet, connect_async

SECONDS = float(os.environ.get("SOAK_SECONDS") or 1200)
CALLERS = int(os.environ.get("SOAK_CALLERS") or 4)
SAMPLE_SECONDS = 5.0
WATCHERS = 4
GROWTH_LIMIT = 0.02
DRAWING = ROOT / "docs/soak.svg"


@dataclass(slots=True)
class Samples:
    """Is what was read, by process: (minutes, value)."""

    memory_mib: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    descriptors: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    processes: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    lives: int = 0
    changes: int = 0

    def take(self, fleet: development.Fleet, minutes: float) -> None:
        """Read the processes of a fleet."""
        for name in fleet.supervisor.programs:
            pid = pid_of(fleet, name)
            self.processes[name].add(pid)
            self.memory_mib[name].append((minutes, census.private_bytes(pid) / census.MIB))
            self.descriptors[name].append((minutes, float(sum(1 for _ in census.descriptors(pid)))))

    def faults(self) -> list[str]:
        """Return what has grown, the last quarter against the third one, and who has begun anew in between.

        Of descriptors the fewest count: more are in use while more guests live, which chance decides at each look; what
        is leaked is never fewer again.
        """
        found = [
            f"{name}: {len(pids)} processes one after the other"
            for name, pids in self.processes.items()
            if len(pids) > 1
        ]
        for what, values, typical in (
            ("memory", self.memory_mib, statistics.median),
            ("descriptors", self.descriptors, min),
        ):
            for name, points in values.items():
                quarter = len(points) // 4
                middle = typical([y for _, y in points[-2 * quarter : -quarter]])
                late = typical([y for _, y in points[-quarter:]])
                if late > middle * (1 + GROWTH_LIMIT):
                    found.append(f"{name}: {what} {middle:.2f}, then {late:.2f}")
        return found


async def soak(seconds: float) -> Samples:
    """Run a fleet for so long."""
    samples = Samples()
    async with development.Fleet.running(development.Plan(driver="qemu,test"), say=print) as fleet:
        address = f"tls://{fleet.address}"
        async with connect_async(address, credentials(fleet)) as connection, cycles.ground(connection) as ground:
            watchers = [asyncio.create_task(_follow(connection, samples)) for _ in range(WATCHERS)]
            began = time.monotonic()
            callers = [asyncio.create_task(_live(ground, samples, began + seconds)) for _ in range(CALLERS)]
            while time.monotonic() < began + seconds:
                await asyncio.to_thread(samples.take, fleet, (time.monotonic() - began) / 60)
                await asyncio.sleep(SAMPLE_SECONDS)
                for task in (*callers, *watchers):
                    if task.done() and time.monotonic() < began + seconds:
                        await task
            await asyncio.gather(*callers)
            for task in watchers:
                task.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)
    return samples


async def _live(ground: cycles.Ground, samples: Samples, ends_at: float) -> None:
    while time.monotonic() < ends_at:
        await ground.lives(1)
        samples.lives += 1


async def _follow(connection: AsyncFleet, samples: Samples) -> None:
    async for answer in connection.watch(watch_pb2.WatchResourcesRequest(parent="nodes/-")):
        samples.changes += len(answer.changes)


def main() -> int:
    """Run, draw and judge; returns the exit code."""
    # Whoever ends it gets a fleet that is gone too, as with Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    samples = asyncio.run(soak(SECONDS))
    heading = (
        f"{SECONDS / 60:.0f} minutes, {samples.lives} guests made, started, stopped and deleted, {WATCHERS} watchers,"
        f" {samples.changes} changes told"
    )
    panels = [
        plot.Panel("private memory, MiB", samples.memory_mib),
        plot.Panel("open descriptors", samples.descriptors),
    ]
    DRAWING.write_text(plot.draw(heading, "minutes", panels))
    print(heading)
    for name, points in samples.memory_mib.items():
        middle = points[len(points) // 2][1]
        print(
            f"{name:12} {points[0][1]:7.2f} MiB at first, {middle:7.2f} at half-time, {points[-1][1]:7.2f} at the end"
        )
    faults = samples.faults()
    print("\n".join(faults) or "nothing has grown")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

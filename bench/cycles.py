"""How many guests eight callers start and destroy in a second, against as many bare spawns and kills."""

from __future__ import annotations

import asyncio
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from bench import bare, guests, samples
from bench.figures import Figure
from bench.stage import Stage
from virtfleet_client import AsyncFleet

CALLERS = 8
KEYS = ("qemu_cycles_over_bare",)


async def leg(on: Stage) -> list[Figure]:
    """Measure cycles of both in turn."""
    direct = await on.connect(await on.fleet(), "compute")
    ours: list[float] = []
    theirs: list[float] = []
    seconds = float(on.times(5, 2))
    async with guests.defined(on, direct, CALLERS) as names:
        with tempfile.TemporaryDirectory(prefix="virtfleet-bare-") as folder, ExitStack() as stack:
            twins = [
                stack.enter_context(await guests.twin(direct, name, Path(folder) / str(index)))
                for index, name in enumerate(names)
            ]
            for number, order in samples.rounds(("ours", "bare"), on.times(3, 1), on.chance):
                for variant in order:
                    if variant == "ours":
                        rate = await _ours(direct, names, seconds)
                    else:
                        rate = await _bare(twins, seconds)
                    if number:
                        (ours if variant == "ours" else theirs).append(rate)
    note = f"{CALLERS} callers, start and destroy"
    return [
        Figure("qemu_cycles_over_bare", samples.p50(ours) / samples.p50(theirs), "ratio", len(ours), note),
        Figure("qemu_cycles", samples.p50(ours), "/s", len(ours), f"{note}; libvirt: 5.95"),
        Figure("qemu_bare_cycles", samples.p50(theirs), "/s", len(theirs), note),
    ]


async def _ours(direct: AsyncFleet, names: list[str], seconds: float) -> float:
    began = time.perf_counter()

    async def caller(name: str) -> int:
        count = 0
        while time.perf_counter() < began + seconds:
            await guests.start(direct, name)
            await guests.stop(direct, name)
            count += 1
        return count

    count = sum(await asyncio.gather(*(caller(name) for name in names)))
    return count / (time.perf_counter() - began)


async def _bare(twins: list[bare.Guest], seconds: float) -> float:
    began = time.perf_counter()

    def caller(guest: bare.Guest) -> int:
        count = 0
        while time.perf_counter() < began + seconds:
            guest.cycle()
            count += 1
        return count

    count = sum(await asyncio.gather(*(asyncio.to_thread(caller, guest) for guest in twins)))
    return count / (time.perf_counter() - began)

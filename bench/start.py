"""What a start costs: StartDomain through the service against a bare spawn with the same arguments.

The guest has a qcow2 disk, a port of a NAT network and a serial console, and starts paused. Ours is timed from the call
to the finished operation: attach the disk, plug the port, spawn under its own user in its own control group with the
seccomp filter, monitor's handshake, commit. Bare is timed from before the spawn to the end of the monitor's handshake,
with disk, tap and sockets made before.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from bench import guests, samples
from bench.figures import Figure
from bench.stage import Stage
from virtfleet_client import AsyncFleet

KEYS = ("qemu_start_over_bare", "destroy_p50_ms")
_PAUSE_SECONDS = 0.05
"""Between measurements. In a tight loop the kernel's grace periods are already under way, and a slow step hides."""


async def leg(on: Stage) -> list[Figure]:
    """Measure starts one at a time."""
    direct = await on.connect(await on.fleet(), "compute")
    async with guests.defined(on, direct, 1) as names:
        return await _measure(on, direct, names[0])


async def _measure(on: Stage, direct: AsyncFleet, name: str) -> list[Figure]:
    ours: list[float] = []
    theirs: list[float] = []
    stops: list[float] = []
    with (
        tempfile.TemporaryDirectory(prefix="virtfleet-bare-") as folder,
        await guests.twin(direct, name, Path(folder) / "guest") as guest,
    ):
        for number, order in samples.rounds(("ours", "bare"), on.times(30, 5), on.chance):
            for variant in order:
                await asyncio.sleep(_PAUSE_SECONDS)
                if variant == "bare":
                    took = await asyncio.to_thread(guest.cycle)
                    ended = None
                else:
                    took = await guests.start(direct, name)
                    await asyncio.sleep(_PAUSE_SECONDS)
                    ended = await guests.stop(direct, name)
                if number:
                    (theirs if ended is None else ours).append(took)
                    stops += [] if ended is None else [ended]
    note = "StartDomain paused, qcow2 disk and NAT port included; interleaved"
    return [
        Figure("qemu_start_over_bare", samples.p50(ours) / samples.p50(theirs), "ratio", len(ours), note),
        Figure("destroy_p50_ms", samples.p50(stops) * 1e3, "ms", len(stops), "StopDomain FORCE; libvirt: 208"),
        Figure("qemu_start_p50_ms", samples.p50(ours) * 1e3, "ms", len(ours), "libvirt: 380"),
        Figure("qemu_start_p90_ms", samples.percentile(ours, 0.9) * 1e3, "ms", len(ours)),
        Figure("qemu_bare_p50_ms", samples.p50(theirs) * 1e3, "ms", len(theirs)),
        Figure("qemu_bare_p90_ms", samples.percentile(theirs, 0.9) * 1e3, "ms", len(theirs)),
    ]

"""How long starts and ends take beside a bare spawn of the same arguments: `python -m tests.integration.qemu.measure [ROUNDS]`."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tests.integration.qemu.running import QEMU, Node, node, serial_spec
from virtfleet_compute.drivers.api import FileConnection, StartPlan
from virtfleet_compute.drivers.qemu import arguments

DISK_MIB = 64


def bare(plan: StartPlan, folder: Path) -> float:
    """Spawn QEMU with the arguments of a plan, shake hands, kill it; return the milliseconds to the handshake."""
    invocation = arguments.build(plan, QEMU, "tcg", sandbox=True)
    listeners = {}
    for item in invocation.sockets:
        path = folder / f"bare-{item.name}"
        path.unlink(missing_ok=True)
        listeners[item.name] = socket.socket(socket.AF_UNIX)
        listeners[item.name].bind(str(path))
        listeners[item.name].listen()
    numbers = {f"{{fd:{name}}}": str(listener.fileno()) for name, listener in listeners.items()}
    argv = [re.sub(r"\{fd:[^}]*\}", lambda found: numbers[found[0]], word) for word in invocation.argv]
    begun = time.perf_counter()
    process = subprocess.Popen(argv, pass_fds=[each.fileno() for each in listeners.values()])
    line = socket.socket(socket.AF_UNIX)
    line.connect(str(folder / "bare-qmp"))
    reader = line.makefile("rb")
    json.loads(reader.readline())
    line.sendall(b'{"execute": "qmp_capabilities"}\n')
    json.loads(reader.readline())
    took = time.perf_counter() - begun
    process.kill()
    process.wait()
    reader.close()
    line.close()
    for listener in listeners.values():
        listener.close()
    return took * 1000


async def started(made: Node, plan: StartPlan) -> tuple[float, float]:
    begun = time.perf_counter()
    await made.driver.start(plan)
    running = time.perf_counter()
    await made.driver.stop(plan.domain)
    ended = time.perf_counter()
    await made.driver.undefine(plan.domain)
    return (running - begun) * 1000, (ended - running) * 1000


async def main(rounds: int) -> None:
    async with node() as made:
        await made.enter()
        image = made.folder / "disk.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, f"{DISK_MIB}M"], check=True)
        image.chmod(0o666)
        spec = serial_spec(160)
        spec.disks["root"].volume = "pools/p/volumes/root"
        disks = {"root": FileConnection(str(image), "qcow2")}
        ours: list[float] = []
        alone: list[float] = []
        ends: list[float] = []
        for _ in range(rounds):
            legs = ["ours", "bare"]
            random.shuffle(legs)
            for leg in legs:
                plan = await made.plan(spec, paused=True, disks=disks)
                if leg == "ours":
                    start, end = await started(made, plan)
                    ours.append(start)
                    ends.append(end)
                else:
                    alone.append(await asyncio.to_thread(bare, plan, made.folder))
                await asyncio.sleep(0.03)
        begin = statistics.median(ours) / statistics.median(alone)
        print(f"start {statistics.median(ours):.1f} ms, bare {statistics.median(alone):.1f} ms: {begin:.2f}")
        print(f"stop {statistics.median(ends):.1f} ms; load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20))

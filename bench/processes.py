"""What each process of a node weighs when idle, and how long it takes from nothing to answering."""

from __future__ import annotations

import asyncio
import time

from bench import samples, stage
from bench.figures import Figure
from bench.machine import private_mib
from bench.stage import Stage
from tools import fleet as development
from virtfleet.fleet.v1 import node_pb2

SERVICES = ("compute", "storage", "network")
KEYS = ("node_private_mib", "gateway_private_mib", "cold_start_ms")
_SETTLE_SECONDS = 1.0
_READY_SECONDS = 30.0


async def leg(on: Stage) -> list[Figure]:
    """Weigh all processes of a fleet that has served nobody yet, then start each anew."""
    fleet = await on.fleet()
    await asyncio.sleep(_SETTLE_SECONDS)
    found = _weights(fleet)
    for name in ("gateway", *(f"{stage.NODE}/{service}" for service in SERVICES)):
        times = [await _cold_start(fleet, name) for _ in range(on.times(5, 2))]
        short = name.rpartition("/")[2]
        found.append(
            Figure(f"{short}_cold_start_ms", samples.p50(times) * 1e3, "ms", len(times), "spawn to first connection")
        )
    await _wait_ready(on, fleet)
    return found


def _weights(fleet: development.Fleet) -> list[Figure]:
    weights = {name: private_mib(stage.pid_of(fleet, f"{stage.NODE}/{name}")) for name in (*SERVICES, "launcher")}
    services = sum(weights[name] for name in SERVICES)
    return [
        Figure("node_private_mib", services, "MiB", 1, "three services, idle; libvirtd: 26 (PSS)"),
        *(Figure(f"{name}_private_mib", weight, "MiB") for name, weight in weights.items()),
        Figure("gateway_private_mib", private_mib(stage.pid_of(fleet, "gateway")), "MiB", 1, "one node"),
    ]


async def _cold_start(fleet: development.Fleet, name: str) -> float:
    """Stop a process and start it again; returns the seconds from the spawn until it takes a connection."""
    program = fleet.supervisor.programs[name]
    await fleet.supervisor.stop(name)
    if name == "gateway":
        address = fleet.address
    else:
        address = f"{fleet.networks[stage.NODE].address}:{development.PORTS[name.rpartition('/')[2]]}"
    began = time.perf_counter()
    await fleet.supervisor.start(program)
    if program.process is None:
        raise RuntimeError(f"{name} does not start")
    await stage.listening(address, program.process)
    return time.perf_counter() - began


async def _wait_ready(on: Stage, fleet: development.Fleet) -> None:
    """Wait until the gateway has all services of the node again."""
    gateway = await on.connect(fleet)
    ends_at = time.monotonic() + _READY_SECONDS
    while True:
        node = await gateway.nodes.GetNode(node_pb2.GetNodeRequest(name=f"nodes/{stage.NODE}"))
        if node.status.state == node_pb2.NODE_STATE_READY:
            return
        if time.monotonic() > ends_at:
            raise RuntimeError(f"{node.name} is {node_pb2.NodeState.Name(node.status.state)} after its restart")
        await asyncio.sleep(0.1)

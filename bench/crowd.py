"""Fifty nodes, each one `virtfleet-node` process in a namespace of its own, that join the gateway of the stage."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
import time
import tomllib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from bench import stage
from tools import devnet, toml
from tools import fleet as development
from tools.paths import ROOT
from virtfleet.fleet.v1 import enrollment_pb2, node_pb2
from virtfleet_client import AsyncFleet
from virtfleet_service.enrollment import JoinToken, join

_STARTED_AT_ONCE = 4
_READY_SECONDS = 120.0


@asynccontextmanager
async def joined(fleet: development.Fleet, gateway: AsyncFleet, count: int) -> AsyncIterator[list[str]]:
    """Run nodes with the driver `test` and wait until the gateway has them; gives their names."""
    settings = tomllib.loads((fleet.folder / "gateway.toml").read_text())
    tag, address_range = secrets.token_hex(3), devnet.free_range(count)
    gate = asyncio.Semaphore(_STARTED_AT_ONCE)
    async with AsyncExitStack() as stack:
        networks = [devnet.NodeNetwork.plan(tag, index, address_range) for index in range(1, count + 1)]
        for network in networks:
            stack.callback(network.remove)
            network.make()
        folder = fleet.folder / "crowd"
        folder.mkdir(exist_ok=True)

        async def start(index: int, network: devnet.NodeNetwork) -> str:
            async with gate:
                node = f"c{index}"
                request = enrollment_pb2.CreateJoinTokenRequest()
                request.join_token.spec.node = f"nodes/{node}"
                token = JoinToken.parse((await gateway.enrollment.CreateJoinToken(request)).token)
                base = folder / f"{tag}-{node}"
                endpoints = {name: f"{network.address}:{port}" for name, port in development.PORTS.items()}
                await join(settings["enrollment_listen"], token, endpoints, base / "identity")
                process = await _spawn(network, node, base)
                stack.push_async_callback(_end, process)
                await stage.listening(endpoints["compute"], process, _READY_SECONDS)
                return f"nodes/{node}"

        names = await asyncio.gather(*(start(index, network) for index, network in enumerate(networks, start=1)))
        await _wait_ready(gateway, set(names))
        yield names


async def _spawn(network: devnet.NodeNetwork, node: str, base: Path) -> asyncio.subprocess.Process:
    settings: dict[str, object] = {
        "node": node,
        "state_dir": str(base / "state"),
        "run_dir": str(base / "run"),
        "identity_dir": str(base / "identity"),
        "drain_seconds": 0.5,
        "compute": {"enabled_drivers": ["test"]},
        "storage": {"pools_root": str(base / "pools")},
        "network": {},
    }
    for name, port in development.PORTS.items():
        table = settings[name]
        assert isinstance(table, dict)
        table["listen"] = f"{network.address}:{port}"
    for part in ("state", "run", "pools"):
        (base / part).mkdir(mode=0o711)
    file = base / "node.toml"
    toml.write(file, settings)
    with (base / "log").open("ab") as log:
        return await asyncio.create_subprocess_exec(
            *network.enter(sys.executable, "-m", "virtfleet_node", "--config", str(file)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={"PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"), "HOME": str(base), "LANG": "C.UTF-8"},
            cwd=ROOT,
            start_new_session=True,
        )


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()


async def _wait_ready(gateway: AsyncFleet, names: set[str]) -> None:
    ends_at = time.monotonic() + _READY_SECONDS
    while True:
        ready = {
            node.name
            async for node in gateway.pages(gateway.nodes.ListNodes, node_pb2.ListNodesRequest())
            if node.status.state == node_pb2.NODE_STATE_READY
        }
        if names <= ready:
            return
        if time.monotonic() > ends_at:
            raise RuntimeError(f"{len(names - ready)} of {len(names)} nodes are not ready")
        await asyncio.sleep(0.2)

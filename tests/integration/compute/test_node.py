"""The services of a node in one process."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

from tests.integration.compute.rig import NODE, PARENT, READY_SECONDS, Client
from virtfleet.common.v1 import admin_pb2, admin_pb2_grpc
from virtfleet.storage.v1 import pool_pb2, pool_pb2_grpc


async def test_two_services_in_one_process_and_an_orderly_end(place: Path) -> None:
    settings = place / "node.toml"
    settings.write_text(
        f'node = "{NODE}"\nstate_dir = "{place / "s"}"\nrun_dir = "{place / "r"}"\ndrain_seconds = 1.0\n'
        '[compute]\nenabled_drivers = ["test"]\n'
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "virtfleet_node", "--settings", str(settings), "--services", "storage,compute"
    )
    compute = Client(place / "r" / "compute" / "admin.sock")
    storage = Client(place / "r" / "storage" / "admin.sock")
    try:
        async with asyncio.timeout(READY_SECONDS):
            await compute.channel.channel_ready()
            await storage.channel.channel_ready()
        await compute.create("web", start=True)
        pools = pool_pb2_grpc.PoolServiceStub(storage.channel)
        request = pool_pb2.CreatePoolRequest(
            parent=PARENT, pool_id="p", pool=pool_pb2.Pool(spec=pool_pb2.PoolSpec(dir=pool_pb2.DirBackend()))
        )
        await storage.do(pools.CreatePool, request, pool_pb2.Pool)
        servers = [
            await client.call(admin_pb2_grpc.AdminServiceStub(client.channel).GetServer, admin_pb2.GetServerRequest())
            for client in (compute, storage)
        ]
        assert [server.name for server in servers] == [
            f"{PARENT}/services/compute",
            f"{PARENT}/services/storage",
        ]
        assert {server.pid for server in servers} == {process.pid}
        assert servers[0].store_id != servers[1].store_id
    finally:
        await compute.close()
        await storage.close()
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(READY_SECONDS):
            code = await process.wait()
    assert code == 0
    assert not list((place / "r").rglob("*.sock"))


async def test_settings_that_cannot_be_used_are_one_line() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "virtfleet_node", "--services", "gateway", stderr=asyncio.subprocess.PIPE
    )
    _, said = await process.communicate()
    assert process.returncode == 2
    assert said.decode().strip() == "services: must be some of storage, network, compute"

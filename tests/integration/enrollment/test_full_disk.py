"""A gateway whose disk is full goes on: it forwards, lists, says who is denied, and tells what it cannot write."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.integration.enrollment.test_join import ENDPOINTS, problem, token
from tests.ports import free_port
from virtfleet.common.v1 import admin_pb2
from virtfleet.fleet.v1 import enrollment_pb2, enrollment_pb2_grpc, node_pb2, node_pb2_grpc
from virtfleet_gateway.app import running
from virtfleet_gateway.authority import Authority, new_request
from virtfleet_gateway.settings import FleetSettings
from virtfleet_service import enrollment


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 4 MiB."""
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)], check=True)
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


async def test_a_gateway_survives_a_full_disk(small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    authority = Authority.create(tmp_path / "authority")
    settings = FleetSettings(
        name="g1",
        state_dir=small / "state",
        run_dir=tmp_path / "run",
        authority_dir=tmp_path / "authority",
        listen=f"127.0.0.1:{free_port()}",
        enrollment_listen=f"127.0.0.1:{free_port()}",
        drain_seconds=0.5,
    )
    key, request = new_request("root")
    issued = authority.issue_user(request, "root", ["admin"], dt.timedelta(hours=1))
    credentials = grpc.ssl_channel_credentials(authority.certificate_pem, key, issued.pem)
    async with running(settings) as app, grpc.aio.secure_channel(settings.listen, credentials) as admin:
        nodes = node_pb2_grpc.NodeServiceStub(admin)
        desk = enrollment_pb2_grpc.EnrollmentServiceStub(admin)
        await enrollment.join(settings.enrollment_listen, await token(admin), ENDPOINTS, tmp_path / "n1")
        with (small / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(4096))
        # Something about the node is new, and cannot be recorded; nor can a certificate that is due.
        app.registry._presences["n1"]["compute"].server = admin_pb2.Server(version="9.9.9")
        app.registry.changed("n1")
        caplog.set_level(logging.ERROR)
        (settings.state_dir / "identity" / "gateway.crt").unlink()
        app.server.refresh()
        await asyncio.sleep(3)
        listed = await nodes.ListNodes(node_pb2.ListNodesRequest(), timeout=5)
        assert [node.name for node in listed.nodes] == ["nodes/n1"]
        assert (await desk.GetTrustBundle(enrollment_pb2.GetTrustBundleRequest(), timeout=5)).ca_certificates
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await nodes.CordonNode(node_pb2.CordonNodeRequest(name="nodes/n1"), timeout=5)
        assert problem(caught.value)[1] in ("BACKEND_FAILED", "BACKEND_UNREACHABLE")
        assert [one for one in caplog.messages if "state of a node cannot be recorded" in one]

        (small / "filler").unlink()
        async with asyncio.timeout(10):
            while True:
                node = node_pb2.Node.FromString(app.store.need("nodes/n1").body)
                if any(service.version == "9.9.9" for service in node.status.services):
                    break
                await asyncio.sleep(0.1)
        assert (await nodes.CordonNode(node_pb2.CordonNodeRequest(name="nodes/n1"), timeout=5)).name == "nodes/n1"

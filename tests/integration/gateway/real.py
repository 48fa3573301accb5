"""A real gateway with real nodes in processes of their own, enrolled by join token, mutual TLS on every hop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from tests.ports import free_port
from virtfleet.fleet.v1 import enrollment_pb2, enrollment_pb2_grpc, node_pb2, node_pb2_grpc
from virtfleet_gateway.app import App, running
from virtfleet_gateway.authority import Authority, new_request
from virtfleet_gateway.settings import FleetSettings
from virtfleet_service.enrollment import JoinToken, join
from virtfleet_service.settings import TelemetrySettings

ROOT = Path(__file__).resolve().parents[3]
SERVICES = ("compute", "storage", "network")


class NodeProcess:
    """One node; can be stopped, frozen, killed and started again."""

    def __init__(self, name: str, state: Path, otlp_endpoint: str = "") -> None:
        self._environment = {**os.environ, "VIRTFLEET_TELEMETRY_OTLP_ENDPOINT": otlp_endpoint}
        self.name = name
        self.state = state
        self.ports = {service: free_port() for service in SERVICES}
        self.process: asyncio.subprocess.Process | None = None
        self.log = state / "log"

    @property
    def endpoints(self) -> dict[str, str]:
        return {service: f"127.0.0.1:{port}" for service, port in self.ports.items()}

    async def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tests.integration.gateway.node_process",
                str(self.state),
                self.name,
                *(str(self.ports[service]) for service in SERVICES),
                cwd=ROOT,
                env=self._environment,
                stdout=log,
                stderr=log,
                stdin=asyncio.subprocess.DEVNULL,
            )

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    async def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        if self.process is None:
            return
        if self.process.returncode is None:
            self.send(signal.SIGCONT)
            self.send(number)
        await self.process.wait()
        self.process = None


class RealFleet:
    def __init__(self, folder: Path, otlp_endpoint: str = "") -> None:
        self.folder = folder
        self._otlp_endpoint = otlp_endpoint
        self.port = free_port()
        self.enrollment_port = free_port()
        self.nodes: dict[str, NodeProcess] = {}
        self.app: App
        self.channel: grpc.aio.Channel
        self._gateway = contextlib.AsyncExitStack()
        Authority.create(folder / "authority")
        self.credentials = self.issue("admin", "admin")

    def issue(self, name: str, *roles: str, seconds: float = 3600) -> grpc.ChannelCredentials:
        authority = Authority.load(self.folder / "authority")
        key, request = new_request(name)
        import datetime as dt

        certificate = authority.issue_user(request, name, roles, dt.timedelta(seconds=seconds))
        return grpc.ssl_channel_credentials(authority.certificate_pem, key, certificate.pem)

    def connect(self, credentials: grpc.ChannelCredentials | None = None) -> grpc.aio.Channel:
        return grpc.aio.secure_channel(
            f"127.0.0.1:{self.port}",
            credentials or self.credentials,
            options=[("grpc.use_local_subchannel_pool", 1), ("grpc.initial_reconnect_backoff_ms", 100)],
        )

    async def start_gateway(self) -> None:
        settings = FleetSettings(
            name="g1",
            state_dir=self.folder / "gateway",
            run_dir=self.folder / "g",
            authority_dir=self.folder / "authority",
            listen=f"127.0.0.1:{self.port}",
            enrollment_listen=f"127.0.0.1:{self.enrollment_port}",
            drain_seconds=1.0,
            telemetry=TelemetrySettings(otlp_endpoint=self._otlp_endpoint),
        )
        self._gateway = contextlib.AsyncExitStack()
        self.app = await self._gateway.enter_async_context(running(settings))
        self.channel = self.connect()

    async def stop_gateway(self) -> None:
        # The gateway first: clients see how it ends.
        await self._gateway.aclose()
        await self.channel.close()

    async def enroll(self, name: str) -> NodeProcess:
        state = self.folder / name
        state.mkdir()
        node = self.nodes[name] = NodeProcess(name, state, self._otlp_endpoint)
        tokens = enrollment_pb2_grpc.EnrollmentServiceStub(self.channel)
        request = enrollment_pb2.CreateJoinTokenRequest()
        request.join_token.spec.node = f"nodes/{name}"
        token = await tokens.CreateJoinToken(request)
        await join(
            f"127.0.0.1:{self.enrollment_port}", JoinToken.parse(token.token), node.endpoints, state / "identity"
        )
        return node

    async def node(self, name: str) -> node_pb2.Node:
        nodes = node_pb2_grpc.NodeServiceStub(self.channel)
        found: node_pb2.Node = await nodes.GetNode(node_pb2.GetNodeRequest(name=f"nodes/{name}"))
        return found

    async def wait_state(self, name: str, state: node_pb2.NodeState.ValueType, seconds: float = 60) -> node_pb2.Node:
        found: node_pb2.Node = await eventually(
            lambda: self.node(name), lambda node: bool(node.status.state == state), seconds
        )
        return found


async def eventually(ask: Callable[[], Any], good: Callable[[Any], bool], seconds: float = 10) -> Any:
    """Ask again until the answer is good; fail with the last one."""
    until = time.monotonic() + seconds
    while True:
        answer = await ask()
        if good(answer):
            return answer
        assert time.monotonic() < until, f"not within {seconds} s: {answer}"
        await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def real_fleet(
    folder: Path, names: tuple[str, ...] = ("n1", "n2"), otlp_endpoint: str = ""
) -> AsyncIterator[RealFleet]:
    fleet = RealFleet(folder, otlp_endpoint)
    await fleet.start_gateway()
    try:
        nodes = [await fleet.enroll(name) for name in names]
        await asyncio.gather(*(node.start() for node in nodes))
        for name in names:
            await fleet.wait_state(name, node_pb2.NODE_STATE_READY)
        yield fleet
    finally:
        await fleet.stop_gateway()
        await asyncio.gather(*(node.end() for node in fleet.nodes.values()))

# ruff: noqa: ARG001, ARG002, ARG004 - behaviours have the signature that grpc calls
"""A real gateway with nodes that answer whatever a test wants: raw bytes, at any time, for any method."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2

from tests.integration.gateway.real import SERVICES
from tests.ports import free_port
from virtfleet.common.v1 import admin_pb2
from virtfleet.compute.v1 import domain_pb2
from virtfleet.compute.v1 import watch_pb2 as compute_watch
from virtfleet.fleet.v1 import node_pb2
from virtfleet.network.v1 import watch_pb2 as network_watch
from virtfleet.storage.v1 import watch_pb2 as storage_watch
from virtfleet_gateway.app import App, running
from virtfleet_gateway.authority import Authority, new_request
from virtfleet_gateway.settings import FleetSettings
from virtfleet_service import resources
from virtfleet_service.tokens import ResumeToken

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
    Behaviour = Callable[[Any, Context], Awaitable[Any]]

WATCH = "/virtfleet.compute.v1.WatchService/WatchResources"
STATS = "/virtfleet.compute.v1.StatsService/BatchGetDomainStats"
GET = "/virtfleet.compute.v1.DomainService/GetDomain"
LIST = "/virtfleet.compute.v1.DomainService/ListDomains"
OPERATIONS = "/google.longrunning.Operations/ListOperations"
SERVER = "/virtfleet.common.v1.AdminService/GetServer"
HEALTH = "/grpc.health.v1.Health/Watch"
CHECK = "/grpc.health.v1.Health/Check"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"

_MESSAGES: dict[str, Any] = {"compute": compute_watch, "storage": storage_watch, "network": network_watch}
_STORE = "5e" * 16
MESSAGE_LIMIT_BYTES = 200 << 20


def domain(name: str, uid: str, **fields: Any) -> domain_pb2.Domain:
    return domain_pb2.Domain(name=name, uid=uid, **fields)


def uid(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012d}"


class Play:
    """Is what a node of good will says of its domains, in order; tests add to it, in any bytes."""

    def __init__(self, *domains: domain_pb2.Domain) -> None:
        self.snapshot = list(domains)
        self.said: list[bytes] = []
        self._news = asyncio.Event()
        self.tokens_asked: list[str] = []

    def token(self) -> str:
        """Return the token after all that has been said."""
        return ResumeToken(_STORE, len(self.said) + 1, 1).encode()

    def say(self, *changes: compute_watch.Change) -> None:
        """Say changes."""
        response = compute_watch.WatchResourcesResponse(changes=changes)
        response.resume_token = ResumeToken(_STORE, len(self.said) + 2, 1).encode()
        self.say_bytes(response.SerializeToString())

    def say_bytes(self, data: bytes) -> None:
        """Say anything."""
        self.said.append(data)
        self._news.set()

    async def watch(self, request: bytes, context: Context) -> None:
        """Answer a watch: from a token on, or with a snapshot."""
        asked = compute_watch.WatchResourcesRequest.FromString(request)
        self.tokens_asked.append(asked.resume_token)
        told = len(self.said)
        if asked.resume_token:
            told = ResumeToken.decode(asked.resume_token).seq - 1
        else:
            response = compute_watch.WatchResourcesResponse(resume_token=self.token())
            for one in self.snapshot:
                response.changes.add().put.domain.CopyFrom(one)
            response.snapshot_end.SetInParent()
            await context.write(response.SerializeToString())
        while True:
            while told < len(self.said):
                told += 1
                await context.write(self.said[told - 1])
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.3):
                    await self._news.wait()
                continue
            token = ResumeToken(_STORE, told + 1, 1).encode()
            quiet = compute_watch.WatchResourcesResponse(resume_token=token)
            quiet.bookmark.SetInParent()
            await context.write(quiet.SerializeToString())


async def quiet(service: str, request: bytes, context: Context) -> None:
    """Answer a watch of a package with nothing in it."""
    messages = _MESSAGES[service]
    token = ResumeToken(_STORE, 1, 1).encode()
    end = messages.WatchResourcesResponse(resume_token=token)
    end.snapshot_end.SetInParent()
    await context.write(end.SerializeToString())
    while True:
        await asyncio.sleep(0.5)
        bookmark = messages.WatchResourcesResponse(resume_token=token)
        bookmark.bookmark.SetInParent()
        await context.write(bookmark.SerializeToString())


class PlayedNode(grpc.GenericRpcHandler):
    """Serves raw bytes: of good will, but for the methods that a test plays itself."""

    def __init__(self, name: str, *domains: domain_pb2.Domain) -> None:
        self.name = name
        self.play = Play(*domains)
        self.behaviours: dict[str, Behaviour] = {}
        self.reset()
        self.server: grpc.aio.Server | None = None
        self.port = free_port()

    def reset(self) -> None:
        """Be of good will again."""
        self.behaviours.clear()
        self.behaviours |= {
            WATCH: self.play.watch,
            "/virtfleet.storage.v1.WatchService/WatchResources": lambda *call: quiet("storage", *call),
            "/virtfleet.network.v1.WatchService/WatchResources": lambda *call: quiet("network", *call),
            SERVER: self._server,
            HEALTH: self._health,
            CHECK: self._check,
            OPERATIONS: _empty,
            STATS: _empty,
            LIST: _empty,
        }

    async def _server(self, request: bytes, context: Context) -> bytes:
        return admin_pb2.Server(
            name=f"nodes/{self.name}/services/compute", boot_id="b", version="1"
        ).SerializeToString()

    async def _health(self, request: bytes, context: Context) -> None:
        serving = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
        await context.write(serving.SerializeToString())
        await asyncio.sleep(3600)

    async def _check(self, request: bytes, context: Context) -> bytes:
        serving = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
        return bytes(serving.SerializeToString())

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        path = details.method
        if path not in self.behaviours:
            return None

        async def behave(request: Any, context: Context) -> Any:
            return await self.behaviours[path](request, context)

        if path == REFLECTION:
            return grpc.stream_stream_rpc_method_handler(behave)
        if path.endswith("/WatchResources") or path == HEALTH:
            return grpc.unary_stream_rpc_method_handler(behave)
        return grpc.unary_unary_rpc_method_handler(behave)

    async def start(self) -> None:
        self.server = grpc.aio.server(
            options=[
                ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
                ("grpc.so_reuseport", 0),
                ("grpc.http2.min_ping_interval_without_data_ms", 1000),
                ("grpc.http2.max_ping_strikes", 0),
            ]
        )
        self.server.add_generic_rpc_handlers((self,))
        self.server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self.server.start()

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.stop(0)
            self.server = None


async def _empty(request: bytes, context: Context) -> bytes:
    return b""


class Stage:
    """A gateway, and the nodes that are played."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nodes: dict[str, PlayedNode] = {}
        self.port = free_port()
        self.app: App
        self.channel: grpc.aio.Channel
        self._gateway = contextlib.AsyncExitStack()
        Authority.create(folder / "authority")
        self.credentials = self.issue("admin", "admin")

    def issue(self, name: str, *roles: str) -> grpc.ChannelCredentials:
        authority = Authority.load(self.folder / "authority")
        key, request = new_request(name)
        certificate = authority.issue_user(request, name, roles, dt.timedelta(hours=1))
        return grpc.ssl_channel_credentials(authority.certificate_pem, key, certificate.pem)

    def connect(self, credentials: grpc.ChannelCredentials | None = None) -> grpc.aio.Channel:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.initial_reconnect_backoff_ms", 100)]
        return grpc.aio.secure_channel(f"127.0.0.1:{self.port}", credentials or self.credentials, options=options)

    async def start_gateway(self) -> None:
        settings = FleetSettings(
            name="g1",
            state_dir=self.folder / "gateway",
            run_dir=self.folder / "g",
            authority_dir=self.folder / "authority",
            listen=f"127.0.0.1:{self.port}",
            drain_seconds=1.0,
        )
        self._gateway = contextlib.AsyncExitStack()
        self.app = await self._gateway.enter_async_context(running(settings, connect=self._open))
        self.channel = self.connect()

    async def stop_gateway(self) -> None:
        await self._gateway.aclose()
        await self.channel.close()

    @staticmethod
    def _open(node: str, service: str, endpoint: str, bulk: bool) -> grpc.aio.Channel:  # noqa: FBT001 - a callback
        # As the gateway's own, but in the clear.
        from virtfleet_gateway.channels import _options

        return grpc.aio.insecure_channel(endpoint, options=_options("", bulk=bulk))

    async def add(self, name: str, *domains: domain_pb2.Domain) -> PlayedNode:
        """Add a node, which serves, and which the gateway knows."""
        played = self.nodes[name] = PlayedNode(name, *domains)
        await played.start()
        node = node_pb2.Node()
        resources.create_head(node, f"nodes/{name}")
        for service in SERVICES:
            node.status.services.add(service=service, endpoint=f"127.0.0.1:{played.port}")
        node.status.state = node_pb2.NODE_STATE_JOINING
        await self.app.store.write(lambda tx: tx.put("node", node, cause="test"))
        return played


@contextlib.asynccontextmanager
async def stage(folder: Path) -> AsyncIterator[Stage]:
    made = Stage(folder)
    await made.start_gateway()
    try:
        yield made
    finally:
        await made.stop_gateway()
        await asyncio.gather(*(node.stop() for node in made.nodes.values()))

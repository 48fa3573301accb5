# ruff: noqa: ARG002 - behaviours have the signature that grpc calls
"""Servers that stand for the services of nodes, and a gate without certificates, to try the forwarder alone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from virtfleet_gateway import wire
from virtfleet_gateway.channels import Channels
from virtfleet_gateway.forward import Forwarder
from virtfleet_gateway.gate import CallerPassport
from virtfleet_gateway.relay import DETAILS_METADATA
from virtfleet_gateway.routing import build_table
from virtfleet_service.authorization import Authorizer
from virtfleet_service.call import Caller
from virtfleet_service.errors import CredentialsInvalid, PermissionMissing, Unauthenticated, VirtfleetError
from virtfleet_service.logs import AuditLog
from virtfleet_service.pipeline import Pipeline
from virtfleet_service.telemetry import Meters

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
    Behaviour = Callable[[Any, Context], Awaitable[Any]]


class OpenPassport:
    def __init__(self, subject: str, forbidden: str = "") -> None:
        self.conveyed = subject.encode()
        self.forbidden = forbidden
        self.denied: Unauthenticated | None = None

    def permit(self, permission: str, name: str, *, checks_name: bool = True) -> None:
        if permission == self.forbidden:
            raise PermissionMissing("no", permission=permission, resource=name)

    def still_good(self, permission: str = "") -> VirtfleetError | None:
        return self.denied


class LimitedPassport(OpenPassport):
    """Is that of an operator of a part of a node, judged as the gateway judges."""

    def __init__(self, subject: str, prefix: str) -> None:
        super().__init__(subject)
        authorizer = Authorizer()
        pipeline = Pipeline(node="", service="gateway", authorizer=authorizer, audit=AuditLog(None), meters=Meters())
        caller = Caller(subject, (f"operator@{prefix}",), "tls")
        self._judge = CallerPassport(caller, None, authorizer, pipeline, b"")

    def permit(self, permission: str, name: str, *, checks_name: bool = True) -> None:
        self._judge.permit(permission, name, checks_name=checks_name)


class OpenGate:
    def __init__(self) -> None:
        self.passport: OpenPassport = OpenPassport("spiffe://virtfleet.dev/user/test")
        self.refusals: list[tuple[str, str]] = []

    def authenticate(self, context: object, conveyed: str | bytes | None = None) -> OpenPassport:
        if conveyed is not None:
            raise CredentialsInvalid("no gateway")
        return self.passport

    def refused(self, method: str, context: object, error: VirtfleetError, *, mutates: bool) -> None:
        del context, mutates
        self.refusals.append((method, error.reason))


class Roster:
    def __init__(self) -> None:
        self.closed: set[str] = set()
        self.known: set[str] = set()

    def cordoned(self, node: str) -> bool:
        return node in self.closed

    def knows_domain(self, name: str) -> bool:
        return name in self.known


class Node(grpc.GenericRpcHandler):
    """Serves raw bytes; the tests set a behaviour for each method."""

    def __init__(self) -> None:
        self.unary: dict[str, Behaviour] = {}
        self.stream: dict[str, Behaviour] = {}
        self.table = build_table()
        self.server: grpc.aio.Server | None = None
        self.port = 0

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        route = self.table.get(details.method)
        if route is None:
            return None
        behaviour = self.unary.get(route.full_name) or self.stream.get(route.full_name)
        if behaviour is None:
            return None
        kind = f"{'stream' if route.client_streaming else 'unary'}_{'stream' if route.server_streaming else 'unary'}"
        handler: grpc.RpcMethodHandler[Any, Any] = getattr(grpc, f"{kind}_rpc_method_handler")(behaviour)
        return handler

    async def start(self, port: int = 0) -> None:
        self.server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", 16 << 20),
                ("grpc.max_send_message_length", 16 << 20),
                ("grpc.so_reuseport", 0),
                ("grpc.http2.min_ping_interval_without_data_ms", 1000),
                ("grpc.http2.max_ping_strikes", 0),
            ]
        )
        self.server.add_generic_rpc_handlers((self,))
        self.port = self.server.add_insecure_port(f"127.0.0.1:{port}")
        await self.server.start()

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.stop(0)
            self.server = None


class Rig:
    """One gateway and two nodes in one process."""

    def __init__(self) -> None:
        self.nodes = {"n1": Node(), "n2": Node()}
        self.gate = OpenGate()
        self.channels = Channels(None, lambda _node, _service: "")
        self.roster = Roster()
        self.forwarder = Forwarder(build_table(), self.channels, self.gate, {}, self.roster)
        self.server = grpc.aio.server(
            options=[("grpc.max_receive_message_length", 16 << 20), ("grpc.max_send_message_length", 16 << 20)]
        )
        self.client: grpc.aio.Channel
        self.port = 0

    def call(self, full_name: str) -> Any:
        service, _, method = full_name.rpartition(".")
        route = build_table()[f"/{service}/{method}"]
        kind = f"{'stream' if route.client_streaming else 'unary'}_{'stream' if route.server_streaming else 'unary'}"
        return getattr(self.client, kind)(route.path)


@contextlib.asynccontextmanager
async def rig() -> AsyncIterator[Rig]:
    made = Rig()
    for node, server in made.nodes.items():
        await server.start()
        endpoint = f"127.0.0.1:{server.port}"
        made.channels.put(node, {"compute": endpoint, "storage": endpoint, "network": endpoint})
    made.server.add_generic_rpc_handlers((made.forwarder,))
    made.port = made.server.add_insecure_port("127.0.0.1:0")
    await made.server.start()
    made.client = grpc.aio.insecure_channel(
        f"127.0.0.1:{made.port}",
        options=[("grpc.max_receive_message_length", 16 << 20), ("grpc.max_send_message_length", 16 << 20)],
    )
    try:
        yield made
    finally:
        await made.client.close()
        await made.server.stop(0)
        await made.channels.close()
        await asyncio.gather(*(server.stop() for server in made.nodes.values()))


def named(name: str, tail: bytes = b"") -> bytes:
    """Return a request whose field 1 is a name, with whatever else it has."""
    return wire.delimited(1, name.encode()) + tail


async def echo(request: bytes, _context: Context) -> bytes:
    """Answer a call with its request."""
    return request


def own_status(code: grpc.StatusCode, reason: str) -> status_pb2.Status:
    status = status_pb2.Status(code=code.value[0], message="the node's own words")
    for detail in (
        error_details_pb2.ErrorInfo(reason=reason, domain="virtfleet.dev", metadata={"state": "RUNNING"}),
        error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=3)),
    ):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def details_of(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    """Return reason, metadata and retry delay of a failed call."""
    found: dict[str, Any] = {"reason": "", "metadata": {}, "retry": None}
    for key, value in error.trailing_metadata() or ():
        if key != DETAILS_METADATA:
            continue
        for detail in status_pb2.Status.FromString(bytes(value) if isinstance(value, bytes) else b"").details:
            info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            if detail.Unpack(info):
                found["reason"], found["metadata"] = info.reason, dict(info.metadata)
            elif detail.Unpack(retry):
                found["retry"] = retry.retry_delay.ToTimedelta().total_seconds()
    return found

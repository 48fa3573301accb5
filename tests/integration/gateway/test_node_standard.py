"""Health and reflection of one node through the gateway, when the node or the caller is not as it should be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from tests.integration.gateway.client import failure
from tests.integration.gateway.nodes import OpenGate, Roster, details_of
from virtfleet_gateway.channels import Channels
from virtfleet_gateway.forward import Forwarder
from virtfleet_gateway.node_standard import NodeStandard
from virtfleet_gateway.routing import build_table
from virtfleet_service.errors import CertificateRevoked

HEALTH = "/grpc.health.v1.Health"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
N1 = (("x-virtfleet-node", "n1"),)
SERVING: bytes = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING).SerializeToString()


class Services(grpc.GenericRpcHandler):
    """Stands for the services of a node: answers health, and what a test says to reflection."""

    def __init__(self) -> None:
        self.reflected: list[bytes] = []
        self.knows = True

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        if details.method == f"{HEALTH}/Check":
            return grpc.unary_unary_rpc_method_handler(self._check)
        return grpc.stream_stream_rpc_method_handler(self._reflect) if details.method == REFLECTION else None

    async def _check(self, _request: bytes, context: Any) -> bytes:
        if not self.knows:
            await context.abort(grpc.StatusCode.NOT_FOUND, "none of that name")
        return SERVING

    async def _reflect(self, _requests: object, context: Any) -> None:
        await context.read()
        for answer in self.reflected:
            await context.write(answer)


class Rig:
    def __init__(self) -> None:
        self.services = Services()
        self.gate = OpenGate()
        self.channels = Channels(None, lambda *_: "")
        forwarder = Forwarder(build_table(), self.channels, self.gate, {}, Roster())
        self.standard = NodeStandard(self.channels, forwarder, self.gate, {})
        self.client: Any = None


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    made = Rig()
    node, gateway = grpc.aio.server(), grpc.aio.server()
    node.add_generic_rpc_handlers((made.services,))
    endpoint = f"127.0.0.1:{node.add_insecure_port('127.0.0.1:0')}"
    made.channels.put("n1", {"compute": endpoint, "storage": endpoint, "network": endpoint})
    gateway.add_generic_rpc_handlers((made.standard,))
    port = gateway.add_insecure_port("127.0.0.1:0")
    await node.start()
    await gateway.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as made.client:
        yield made
    await gateway.stop(0)
    await made.channels.close()
    await node.stop(0)


async def ended(call: Any) -> grpc.aio.AioRpcError:
    async def read() -> None:
        while await call.read() is not grpc.aio.EOF:
            pass

    async with asyncio.timeout(5):
        return await failure(read())


async def test_a_health_watch_waits_for_a_service_that_the_node_does_not_know_yet(rig: Rig) -> None:
    rig.services.knows = False
    call = rig.client.unary_stream(f"{HEALTH}/Watch")(b"", metadata=N1)
    told = [health_pb2.HealthCheckResponse.FromString(await call.read()).status]
    rig.services.knows = True
    async with asyncio.timeout(5):
        told.append(health_pb2.HealthCheckResponse.FromString(await call.read()).status)
    # As the protocol of health says, and as one process of a node does it.
    assert told == [health_pb2.HealthCheckResponse.SERVICE_UNKNOWN, health_pb2.HealthCheckResponse.SERVING]
    call.cancel()


async def test_the_health_watch_of_a_node_ends_with_the_node(rig: Rig) -> None:
    call = rig.client.unary_stream(f"{HEALTH}/Watch")(b"", metadata=N1)
    assert await call.read() == SERVING
    rig.channels.remove("n1")
    assert details_of(await ended(call))["reason"] == "NODE_UNKNOWN"


async def test_a_denied_caller_loses_the_health_watch_of_a_node(rig: Rig) -> None:
    call = rig.client.unary_stream(f"{HEALTH}/Watch")(b"", metadata=N1)
    assert await call.read() == SERVING
    rig.gate.passport.denied = CertificateRevoked("denied")
    error = await ended(call)
    assert (error.code().name, details_of(error)["reason"]) == ("UNAUTHENTICATED", "CERTIFICATE_REVOKED")
    assert rig.gate.refusals == [("grpc.health.v1.Health.Watch", "CERTIFICATE_REVOKED")]


async def test_a_denied_caller_loses_the_reflection_of_a_node(rig: Rig) -> None:
    rig.services.reflected = [reflection_pb2.ServerReflectionResponse().SerializeToString()]
    call = rig.client.stream_stream(REFLECTION)(metadata=N1)
    question = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
    await call.write(question)
    assert await call.read() is not grpc.aio.EOF
    rig.gate.passport.denied = CertificateRevoked("denied")
    assert (await ended(call)).code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_request_that_is_none_has_our_reason(rig: Rig) -> None:
    error = await failure(rig.client.unary_unary(f"{HEALTH}/Check")(b"\xff\xff", metadata=N1))
    assert (error.code().name, details_of(error)["reason"]) == ("INVALID_ARGUMENT", "DOCUMENT_INVALID")


@pytest.mark.parametrize("answers", [[], [b"\xff\xff"]], ids=["no answer", "noise"])
async def test_a_node_that_does_not_reflect_is_told_as_such(rig: Rig, answers: list[bytes]) -> None:
    rig.services.reflected = answers
    call = rig.client.stream_stream(REFLECTION)(metadata=N1)
    await call.write(reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString())
    error = await ended(call)
    assert (error.code().name, details_of(error)["reason"]) == ("UNAVAILABLE", "NODE_UNREACHABLE")

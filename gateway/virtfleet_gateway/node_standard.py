"""Health and reflection of one node through the gateway: the metadata `x-virtfleet-node` says of which.

`n1/compute` is that process itself: the calls are forwarded as bytes. `n1` is the node as a whole: its health is that
of its three services together, and its reflection shows what any of them has.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from virtfleet_gateway.channels import unknown
from virtfleet_gateway.forward import CALLER_METADATA, only_conveyed, only_stated
from virtfleet_gateway.relay import abort, pump, time_left
from virtfleet_gateway.routing import NODE_METADATA, SERVICES, Target, parse_stated
from virtfleet_service.errors import DocumentInvalid, NodeUnknown, NodeUnreachable, VirtfleetError
from virtfleet_service.pipeline import unexpected

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping

    from virtfleet_gateway.channels import Channels, Lane
    from virtfleet_gateway.forward import Forwarder, Gate
    from virtfleet_gateway.relay import Context, Passport

HEALTH: Final = "/grpc.health.v1.Health/"
REFLECTION: Final = ("/grpc.reflection.v1.ServerReflection/", "/grpc.reflection.v1alpha.ServerReflection/")

_RECHECK_SECONDS: Final = 1.0

SERVING: Final = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN: Final = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class NodeStandard(grpc.GenericRpcHandler):
    """Serves health and reflection for calls that name a node in their metadata.

    Args:
        channels: The lanes to the nodes.
        forwarder: Finds lanes.
        gate: Authenticates callers.
        own: The gateway's own handlers.
    """

    def __init__(
        self,
        channels: Channels,
        forwarder: Forwarder,
        gate: Gate,
        own: Mapping[str, grpc.RpcMethodHandler[Any, Any]],
    ) -> None:
        self._channels = channels
        self._forwarder = forwarder
        self._gate = gate
        self._own = own

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Return the handler for a call that names a node; None: it names none, or is neither health nor reflection."""
        path = handler_call_details.method
        if not path.startswith((HEALTH, *REFLECTION)):
            return None
        stated = [value for key, value in handler_call_details.invocation_metadata or () if key == NODE_METADATA]
        if not stated:
            return None
        return self._handler(path, stated)

    def _handler(self, path: str, stated: list[str | bytes]) -> grpc.RpcMethodHandler[Any, Any]:
        unary = path in (f"{HEALTH}Check", f"{HEALTH}List")

        async def handle(request: Any, context: Context) -> Any:  # noqa: ANN401 - grpc's handler
            try:
                return await self._answer(path, stated, request, context)
            except VirtfleetError as error:
                self._gate.refused(path[1:].replace("/", "."), context, error, mutates=False)
                await abort(context, error)
            except grpc.aio.BaseError:
                # How the call has been ended, or that its client has gone.
                raise
            except Exception as error:  # noqa: BLE001  # the boundary: the client learns the log id only
                await abort(context, unexpected(error))

        if unary:
            return grpc.unary_unary_rpc_method_handler(handle)
        if path == f"{HEALTH}Watch":
            return grpc.unary_stream_rpc_method_handler(handle)
        return grpc.stream_stream_rpc_method_handler(handle)

    async def _answer(self, path: str, stated: list[str | bytes], request: Any, context: Context) -> Any:  # noqa: ANN401 - as above
        passport = self._authenticate(context)
        named: str | None = None
        for value in stated:
            named = only_stated(named, value)
        target = parse_stated(named or "")
        if self._channels.node(target.node) is None:
            raise unknown(target.node)
        if target.service:
            return await self._forward(path, target, request, context, passport)
        if path.startswith(HEALTH):
            return await _while_good(passport, self._health(path, target.node, request, context))
        return await _while_good(passport, self._reflection(path, target.node, context))

    def _authenticate(self, context: Context) -> Passport:
        conveyed: str | bytes | None = None
        for key, value in context.invocation_metadata() or ():
            if key == CALLER_METADATA:
                conveyed = only_conveyed(conveyed, value)
        return self._gate.authenticate(context, conveyed)

    async def _forward(
        self,
        path: str,
        target: Target,
        request: Any,  # noqa: ANN401
        context: Context,
        passport: Passport,
    ) -> bytes | None:
        lane = self._forwarder.lane(target, bulk=False)
        if not lane.is_up():
            await lane.up(time_left(context))
        metadata = ((CALLER_METADATA, passport.conveyed),)
        return await pump(lane, path, request, context, metadata, passport, self._forwarder.open_calls)

    # The node as a whole

    def _parts(self, node: str) -> list[str]:
        """Return the services that the node has: it need not have all."""
        there = self._channels.node(node) or {}
        return [part for part in SERVICES if part in there]

    async def _check(self, node: str, service: str, lane_service: str) -> int:
        """Return what a service says of its health; one that says nothing, or what cannot be read, is not well.

        Raises:
            NodeUnknown: It does not know the service that is asked for.
        """
        lane = self._forwarder.lane(Target(node, lane_service), bulk=False)
        try:
            await lane.up(2.0)
            start: Any = lane.callable(f"{HEALTH}Check", client_streaming=False, server_streaming=False)
            request = health_pb2.HealthCheckRequest(service=service).SerializeToString()
            answer: bytes = await start(request, timeout=2.0)
            return int(health_pb2.HealthCheckResponse.FromString(answer).status)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                raise unknown(node, service) from error
            return int(NOT_SERVING)
        except (NodeUnreachable, DecodeError, grpc.aio.BaseError):
            return int(NOT_SERVING)

    async def _health_of(self, node: str, service: str) -> int:
        parts = [part for part in SERVICES if service.startswith(f"virtfleet.{part}.")] or self._parts(node)
        found = await asyncio.gather(*(self._check(node, service, part) for part in parts))
        return int(SERVING) if all(one == SERVING for one in found) else int(NOT_SERVING)

    async def _health(self, path: str, node: str, request: bytes, context: Context) -> bytes | None:
        try:
            service = health_pb2.HealthCheckRequest.FromString(request).service
        except DecodeError as error:
            raise DocumentInvalid("The request is no valid HealthCheckRequest") from error
        if path == f"{HEALTH}Check":
            status = await self._health_of(node, service)
            return bytes(health_pb2.HealthCheckResponse(status=cast("Any", status)).SerializeToString())
        if path == f"{HEALTH}List":
            answer = health_pb2.HealthListResponse()
            parts = self._parts(node)
            states = await asyncio.gather(*(self._check(node, "", part) for part in parts))
            for part, status in zip(parts, states, strict=True):
                answer.statuses[part].status = cast("Any", status)
            return bytes(answer.SerializeToString())
        told = -1
        while True:
            if self._channels.node(node) is None:
                raise unknown(node)
            try:
                status = await self._health_of(node, service)
            except NodeUnknown:
                # It may come to be known: the protocol of health has a watch wait for it.
                status = int(SERVICE_UNKNOWN)
            if status != told:
                told = status
                await context.write(health_pb2.HealthCheckResponse(status=cast("Any", status)).SerializeToString())
            await asyncio.sleep(1.0)
            # The gateway may be about to stop.
            self._authenticate(context)

    async def _reflection(self, path: str, node: str, context: Context) -> None:
        """Answer each question from the first service that can, and the list of services from all of them."""
        lanes = [self._forwarder.lane(Target(node, part), bulk=False) for part in self._parts(node)]
        await asyncio.gather(*(lane.up(time_left(context)) for lane in lanes))
        read: Any = context.read
        while (question := await read()) is not grpc.aio.EOF:
            answers = [await _reflected(lane, path, question, time_left(context)) for lane in lanes]
            await context.write(_merged(answers).SerializeToString())


async def _reflected(
    lane: Lane, path: str, question: bytes, seconds: float | None
) -> reflection_pb2.ServerReflectionResponse:
    """Return what one service answers to a question of reflection.

    Raises:
        NodeUnreachable: It does not answer, or what cannot be read.
    """
    start: Any = lane.callable(path, client_streaming=True, server_streaming=True)
    call = start(timeout=seconds)
    try:
        await call.write(question)
        await call.done_writing()
        answer: Any = await call.read()
        if answer is grpc.aio.EOF:
            raise lane.unreachable(sent=True, cause="it ended the stream without an answer")
        return reflection_pb2.ServerReflectionResponse.FromString(answer)
    except grpc.aio.AioRpcError as error:
        raise lane.unreachable(sent=True, cause=error.details() or error.code().name) from error
    except (DecodeError, grpc.aio.BaseError, asyncio.InvalidStateError) as error:
        raise lane.unreachable(sent=True, cause=str(error)) from error
    finally:
        call.cancel()


async def _while_good(passport: Passport, work: Coroutine[Any, Any, Any]) -> Any:  # noqa: ANN401 - what the work returns
    """Do the work of a call for as long as its caller is believed.

    Raises:
        Unauthenticated: The caller's certificate has ended or been denied meanwhile.
    """
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait((task,), timeout=_RECHECK_SECONDS)
            error = None if task.done() else passport.still_good()
            if error is not None:
                raise error
        return task.result()
    finally:
        task.cancel()
        await asyncio.wait((task,))


def _merged(answers: list[reflection_pb2.ServerReflectionResponse]) -> reflection_pb2.ServerReflectionResponse:
    good = [answer for answer in answers if not answer.HasField("error_response")]
    if not good:
        return answers[0]
    merged = good[0]
    if merged.HasField("list_services_response"):
        names = sorted({service.name for answer in good for service in answer.list_services_response.service})
        del merged.list_services_response.service[:]
        for name in names:
            merged.list_services_response.service.add(name=name)
    return merged

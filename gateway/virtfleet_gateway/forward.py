"""The data plane: node calls pass as bytes, undecoded, unaltered, never repeated.

For each method of the routing table there is one handler of the method's own kind. It authenticates the caller, reads
the one string that says where the call goes, checks the caller's permission for the method and the node, and then
pumps: messages, half close, deadline, cancellation and metadata one way, messages, status, details, initial and
trailing metadata the other way. How a call that is under way is carried, and how it ends, is in `relay.py`.
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol, cast

import grpc
import grpc.aio

from virtfleet_gateway.channels import unknown
from virtfleet_gateway.relay import OpenCalls, abort, one_reply, pump_down, time_left
from virtfleet_gateway.routing import ANY_NODE, NODE_METADATA, OWN, Target, allows_missing, routing_name, target_of
from virtfleet_gateway.upward import Upward
from virtfleet_service import unread
from virtfleet_service.errors import (
    CredentialsInvalid,
    FieldConflict,
    FieldRequired,
    MethodNotImplemented,
    NameMalformed,
    NodeCordoned,
    VirtfleetError,
)
from virtfleet_service.telemetry import Meters

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from virtfleet_gateway.channels import Channels, Lane
    from virtfleet_gateway.relay import Passport
    from virtfleet_gateway.routing import Route
    from virtfleet_service.telemetry import MethodMeter, Span, Tracer

    Context = grpc.aio.ServicerContext[bytes, bytes]
    Metadatum = tuple[str, str | bytes]

CALLER_METADATA: Final = "x-virtfleet-caller-bin"

_HOP_BY_HOP: Final = frozenset(
    {
        "te",
        "content-type",
        "user-agent",
        "grpc-accept-encoding",
        "grpc-encoding",
        "accept-encoding",
        # Only gateways say who calls: a caller's own word is judged by the gate, and never passed on.
        CALLER_METADATA,
        NODE_METADATA,
    }
)

_EOF: Final = grpc.aio.EOF


class Gate(Protocol):
    """Says who calls."""

    def authenticate(self, context: Context, conveyed: str | bytes | None = None) -> Passport:
        """Return the caller of a call.

        Args:
            context: The call.
            conveyed: Whom it says to be made for, in the metadata `x-virtfleet-caller-bin`; None: it says nothing.

        Raises:
            Unauthenticated: The certificate is missing, foreign or denied, or its holder may convey nobody.
        """

    def refused(self, method: str, context: Context, error: VirtfleetError, *, mutates: bool) -> None:
        """Note a refusal in the audit log before it is told."""


class Roster(Protocol):
    """Knows the nodes and their domains."""

    def cordoned(self, node: str) -> bool:
        """Tell whether a node takes no new domains."""

    def knows_domain(self, name: str) -> bool:
        """Tell whether a domain of that name is known, so that a change of it is no creation."""


def only_stated(before: str | None, value: str | bytes) -> str:
    """Return the node that a call states, as its metadata are read one by one.

    Raises:
        FieldConflict: It states two.
    """
    stated = str(value)
    if before is not None and before != stated:
        raise FieldConflict(f"The metadata {NODE_METADATA} say both {before} and {stated}", stated=stated)
    return stated


def only_conveyed(before: str | bytes | None, value: str | bytes) -> str | bytes:
    """Return the caller that a call conveys, as its metadata are read one by one.

    Raises:
        CredentialsInvalid: It conveys two.
    """
    if before is not None:
        raise CredentialsInvalid("the call conveys two callers")
    return value


def _may_travel(value: str | bytes) -> bool:
    """Tell whether gRPC sends a value of metadata: it takes in every text, and sends visible ASCII only.

    A call that has another value is never sent nor answered. A node makes nothing of such a value.
    """
    return isinstance(value, bytes) or (value.isascii() and value.isprintable())


def sorted_metadata(context: Context) -> tuple[list[Metadatum], str | None, str | bytes | None]:
    """Return what of the metadata of a call is sent on, the node that it states, and the caller that it conveys.

    Raises:
        FieldConflict: It states two nodes.
        CredentialsInvalid: It conveys two callers.
    """
    stated: str | None = None
    conveyed: str | bytes | None = None
    metadata: list[Metadatum] = []
    for item in cast("Iterable[Metadatum]", context.invocation_metadata() or ()):
        if item[0] not in _HOP_BY_HOP:
            if _may_travel(item[1]):
                metadata.append(item)
        elif item[0] == NODE_METADATA:
            stated = only_stated(stated, item[1])
        elif item[0] == CALLER_METADATA:
            conveyed = only_conveyed(conveyed, item[1])
    return metadata, stated, conveyed


class Forwarder(grpc.GenericRpcHandler):
    """Serves every method of the routing table.

    Args:
        table: The routes by path.
        channels: The lanes to the nodes.
        gate: Authenticates callers.
        own: Handlers of what the gateway answers itself, by path: its own methods, and node methods with the node `-`.
        roster: Knows which nodes take no new domains.
        meters: Count the calls that pass; None: nobody does.
        tracer: Makes a span of each call that passes; None: nobody looks.
    """

    def __init__(
        self,
        table: Mapping[str, Route],
        channels: Channels,
        gate: Gate,
        own: Mapping[str, grpc.RpcMethodHandler[Any, Any]],
        roster: Roster,
        meters: Meters | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._table = table
        self._channels = channels
        self._gate = gate
        self._own = own
        self._roster = roster
        self._meters = meters or Meters()
        self._tracer = tracer
        self._spans: dict[int, Span] = {}
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any] | None] = {}
        self.open_calls = OpenCalls()
        self.open_unary_calls = OpenCalls()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Return the handler of a method; None for what is not the forwarder's: health, reflection, the unknown."""
        path = handler_call_details.method
        try:
            return self._handlers[path]
        except KeyError:
            route = self._table.get(path)
            if route is None:
                return None
            handler = self._handlers[path] = self._make(route)
            return handler

    def _make(self, route: Route) -> grpc.RpcMethodHandler[Any, Any]:
        own = self._own.get(route.path)
        if route.client_streaming:
            behaviour = self._counted(route, self._streaming(route))
            return (
                grpc.stream_stream_rpc_method_handler(behaviour)
                if route.server_streaming
                else grpc.stream_unary_rpc_method_handler(behaviour)
            )
        if route.server_streaming:
            return grpc.unary_stream_rpc_method_handler(self._counted(route, self._unary_stream(route, own)))
        return grpc.unary_unary_rpc_method_handler(self._unary_unary(route, own))

    def _counted(self, route: Route, behaviour: Any) -> Any:  # noqa: ANN401
        """Count the streams of a method."""
        meter = self._meters.method(route.full_name)

        async def counted(request: object, context: Context) -> Any:  # noqa: ANN401
            started = perf_counter()
            code = "CANCELLED"
            try:
                reply = await behaviour(request, context)
                code = "OK"
                return reply
            except grpc.aio.AbortError:
                code = _code_name(context)
                raise
            finally:
                self._ended(context, meter, code, started)

        return counted

    def _ended(self, context: Context, meter: MethodMeter, code: str, started: float) -> None:
        """Count a call, and end its span if it was passed on and somebody looks."""
        meter.observe(code, perf_counter() - started)
        if self._tracer is not None and (span := self._spans.pop(id(context), None)) is not None:
            span.end(code)

    def _admit(self, route: Route, message: bytes, context: Context) -> tuple[Lane, list[Metadatum], Passport] | None:
        """Decide about a call from its first message; None: the gateway answers it itself.

        Raises:
            VirtfleetError: It is refused.
        """
        metadata, stated, conveyed = sorted_metadata(context)
        passport = self._gate.authenticate(context, conveyed)
        metadata.append((CALLER_METADATA, passport.conveyed))
        name = routing_name(route, message)
        target = target_of(route, name, stated)
        if target is OWN or target.node == ANY_NODE:
            if route.path not in self._own:
                raise _no_fleet_form(route, name)
            return None
        if route.permission:
            passport.permit(route.permission, name, checks_name=route.checks_name)
        lane = self.lane(target, bulk=route.bulk)
        if self._creates(route, name, message) and self._roster.cordoned(target.node):
            raise NodeCordoned(
                f"Node {target.node} is cordoned and takes no new domains",
                resource=f"nodes/{target.node}",
                node=f"nodes/{target.node}",
            )
        if self._tracer is not None:
            self._spans[id(context)] = self._tracer.pass_on(route.full_name, target.node, metadata)
        return lane, metadata, passport

    def _creates(self, route: Route, name: str, message: bytes) -> bool:
        """Tell whether a call would make a domain."""
        if route.applies_domains:
            return allows_missing(message) and not self._roster.knows_domain(name)
        return route.creates_domains

    def lane(self, target: Target, *, bulk: bool) -> Lane:
        """Return the lane to a service of a node.

        Raises:
            NodeUnknown: The fleet has no such node, or the node no such service.
        """
        services = self._channels.node(target.node)
        if services is None:
            raise unknown(target.node)
        channels = services.get(target.service)
        if channels is None:
            raise unknown(target.node, target.service)
        return channels.bulk if bulk else channels.control

    def sweep(self) -> None:
        """Cut off callers whose certificates are no longer believed, and streams that a new policy does not allow."""
        self.open_calls.sweep()
        self.open_unary_calls.sweep()

    async def _refuse(self, route: Route, context: Context, error: VirtfleetError) -> NoReturn:
        self._gate.refused(route.full_name, context, error, mutates=route.mutates)
        await abort(context, error)

    def _unary_unary(self, route: Route, own: grpc.RpcMethodHandler[Any, Any] | None) -> Any:  # noqa: ANN401
        path = route.path

        meter = self._meters.method(path[1:].replace("/", "."))

        async def unary_unary(request: bytes, context: Context) -> bytes:
            started = perf_counter()
            code = "CANCELLED"
            try:
                try:
                    admitted = self._admit(route, request, context)
                    if admitted is None:
                        # The pipeline counts it.
                        code = ""
                        return cast("bytes", await _answer_own(own, request, context))
                    lane, metadata, passport = admitted
                    if not lane.is_up():
                        await lane.up(time_left(context))
                except VirtfleetError as error:
                    await self._refuse(route, context, error)
                start = lane.callable(path, client_streaming=False, server_streaming=False)
                call = start(request, timeout=time_left(context), metadata=metadata)  # type: ignore[arg-type]  # a unary-unary one
                with self.open_unary_calls.entered(call, passport) as cut:
                    reply = await one_reply(call, context, lane, cut)
                code = "OK"
                return reply
            except grpc.aio.AbortError:
                code = code and _code_name(context)
                raise
            finally:
                if code:
                    self._ended(context, meter, code, started)

        return unary_unary

    def _unary_stream(self, route: Route, own: grpc.RpcMethodHandler[Any, Any] | None) -> Any:  # noqa: ANN401
        path = route.path

        async def unary_stream(request: bytes, context: Context) -> None:
            try:
                admitted = self._admit(route, request, context)
                if admitted is None:
                    await _stream_own(own, request, context)
                    return
                lane, metadata, passport = admitted
                if not lane.is_up():
                    await lane.up(time_left(context))
            except VirtfleetError as error:
                await self._refuse(route, context, error)
            start = lane.callable(path, client_streaming=False, server_streaming=True)
            call = start(request, timeout=time_left(context), metadata=metadata)  # type: ignore[arg-type]  # is a unary-stream one
            try:
                with self.open_calls.entered(call, passport, route.permission) as cut:
                    await pump_down(call, context, lane, cut)
            finally:
                call.cancel()

        return unary_stream

    def _streaming(self, route: Route) -> Any:  # noqa: ANN401
        path, server_streaming = route.path, route.server_streaming

        async def streaming(_requests: object, context: Context) -> bytes | None:
            first: Any = await context.read()
            ended = first is _EOF
            try:
                if ended:
                    raise FieldRequired(
                        f"The stream ended before its first message, which carries {route.field_name}",
                        field=route.field_name,
                    )
                admitted = self._admit(route, first, context)
                if admitted is None:
                    raise _no_fleet_form(route, ANY_NODE)
                lane, metadata, passport = admitted
                if not lane.is_up():
                    await lane.up(time_left(context))
            except VirtfleetError as error:
                if not ended:
                    await unread.drop(context, client_reads=server_streaming)
                await self._refuse(route, context, error)
            start = lane.callable(path, client_streaming=True, server_streaming=server_streaming)
            call = start(timeout=time_left(context), metadata=metadata)  # type: ignore[call-arg]  # is a stream one
            up = Upward(context, call, first, client_reads=server_streaming)
            try:
                with self.open_calls.entered(call, passport, route.permission) as cut:
                    if server_streaming:
                        await pump_down(call, context, lane, cut, up)
                        return None
                    return await one_reply(call, context, lane, cut, up)
            finally:
                await up.close()

        return streaming


def _code_name(context: Context) -> str:
    """Return the name of the status with which a call was ended."""
    code: Any = context.code()
    return code.name if isinstance(code, grpc.StatusCode) else _CODE_NAMES.get(code, "UNKNOWN")


_CODE_NAMES: Final = {code.value[0]: code.name for code in grpc.StatusCode}


def _no_fleet_form(route: Route, name: str) -> VirtfleetError:
    if name.startswith(("nodes/-", ANY_NODE)):
        return NameMalformed(
            f"{route.full_name.rpartition('.')[2]} is a call to one node; "
            "`-` is for lists, batch reads, stats, watches and Get by uid",
            field=route.field_name,
            name=name,
        )
    return MethodNotImplemented(f"This gateway does not serve {route.full_name}", method=route.full_name)


async def _answer_own(own: grpc.RpcMethodHandler[Any, Any] | None, request: bytes, context: Context) -> object:
    behaviour = cast("Any", own).unary_unary
    return await behaviour(request, context)


async def _stream_own(own: grpc.RpcMethodHandler[Any, Any] | None, request: bytes, context: Context) -> None:
    answer = cast("Any", own).unary_stream(request, context)
    if hasattr(answer, "__aiter__"):
        async for message in answer:
            await context.write(message)
    else:
        await answer

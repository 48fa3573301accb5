"""The gateway's server: its own methods through the usual pipeline, calls to nodes through the forwarder.

Which of the two answers is decided call by call from the name in it, so the forwarder stands in front of both.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio
from google.longrunning import operations_pb2

from virtfleet_gateway.forward import Forwarder
from virtfleet_gateway.gate import CertificateGate
from virtfleet_gateway.node_standard import NodeStandard
from virtfleet_gateway.routing import Destination
from virtfleet_service.errors import ServiceDraining
from virtfleet_service.methods import facts_of
from virtfleet_service.pipeline import ANONYMOUS
from virtfleet_service.server import STREAM_GRACE_SECONDS, Server

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from google.protobuf.descriptor import ServiceDescriptor

    from virtfleet_gateway.channels import Channels
    from virtfleet_gateway.fleet import Fleet
    from virtfleet_gateway.forward import Roster
    from virtfleet_gateway.routing import Route
    from virtfleet_service.pipeline import Listener
    from virtfleet_service.settings import ServiceSettings

NODE_ROLE: Final = "node"
"""The role of callers with a node's certificate. It gives nothing: they renew certificates and ask for the bundle."""

OPERATIONS: Final[ServiceDescriptor] = operations_pb2.DESCRIPTOR.services_by_name["Operations"]


class GatewayServer(Server):
    """Is a server whose listeners answer for the gateway and forward to nodes.

    Args:
        settings: The settings of the gateway.
        name: The resource name: `gateways/{gateway}`.
        store_id: Returns the id of the store.
        anonymous_listen: Where nodes enrol; empty: nowhere.
        table: The routes by path.
        channels: The lanes to the nodes.
        fleet: The services for all nodes.
        roster: Knows which nodes take no new domains.
    """

    def __init__(
        self,
        settings: ServiceSettings,
        *,
        name: str,
        store_id: Callable[[], str],
        anonymous_listen: str,
        table: Mapping[str, Route],
        channels: Channels,
        fleet: Fleet,
        roster: Roster,
    ) -> None:
        super().__init__(
            settings,
            service="gateway",
            name=name,
            store_id=store_id,
            node_role=NODE_ROLE,
            anonymous_listen=anonymous_listen,
        )
        self._table = table
        self._channels = channels
        self._fleet = fleet
        self._roster = roster
        self._forwarders: list[Forwarder] = []
        for route in table.values():
            self.authorizer.register(facts_of(route.descriptor))
        self.on_drain(self._end_streams)
        fleet.measure(self.telemetry.meters)

    @property
    def identity(self) -> str:
        """The identity in the gateway's certificate; empty: it has none."""
        credentials = self.credentials
        return credentials.identity if credentials is not None else ""

    @property
    def service_names(self) -> list[str]:
        """The full names of the services that reflection shows: those of the gateway and those of nodes."""
        nodes = {
            route.descriptor.containing_service.full_name
            for route in self._table.values()
            if route.destination is not Destination.GATEWAY
        }
        return sorted({*super().service_names, *nodes})

    def new_server(self, listener: Listener) -> grpc.aio.Server:
        """Make the gRPC server of one way in: the forwarder first, then what the gateway answers itself."""
        if listener.kind == ANONYMOUS:
            return super().new_server(listener)
        own = self._own_handlers(listener)
        gate = CertificateGate(self.pipeline, listener, self.authorizer, self.audit, lambda: self.identity)
        forwarder = Forwarder(
            self._table, self._channels, gate, own, self._roster, self.telemetry.meters, self.telemetry.tracer
        )
        standard = NodeStandard(self._channels, forwarder, gate, own)
        self._forwarders.append(forwarder)
        # Registered methods would be taken before the forwarder is asked: it gets their handlers instead.
        services, self._services = self._services, []
        self.forwarder = lambda _: _Both(standard, forwarder, own)
        try:
            return super().new_server(listener)
        finally:
            self._services = services

    def _own_handlers(self, listener: Listener) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """Return the handlers of all that the gateway answers itself, by path."""
        own: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        for service in self._services:
            if service.peer or (service.local and listener.kind != "local"):
                continue
            for facts in service.facts:
                own[facts.path] = self.pipeline.handler(facts, service.implementation, listener)
        services = {
            route.descriptor.containing_service
            for route in self._table.values()
            if route.destination is Destination.NODE
        }
        for descriptor in services:
            implementation, methods = self._fleet.service(descriptor)
            for method in methods:
                facts = facts_of(method)
                own[facts.path] = self.pipeline.handler(facts, implementation, listener)
        return own

    def sweep(self) -> None:
        """Cut off callers whose certificates have been denied, or streams forbidden, from what passes through."""
        for forwarder in self._forwarders:
            forwarder.sweep()

    def _end_streams(self) -> None:
        """At drain: let the streams to nodes run on for as long as the gateway's own, then end them."""
        error = ServiceDraining("the gateway has stopped; call again", retry_delay_seconds=1.0)
        loop = asyncio.get_running_loop()
        for forwarder in self._forwarders:
            loop.call_later(STREAM_GRACE_SECONDS, forwarder.open_calls.end, error)
            # Before gRPC itself ends them with CANCELLED, which no client repeats.
            loop.call_later(self.settings.drain_seconds, forwarder.open_unary_calls.end, error)


class _Both(grpc.GenericRpcHandler):
    """Asks the forwarder first, then what the gateway has beside it."""

    def __init__(
        self,
        standard: NodeStandard,
        forwarder: Forwarder,
        own: Mapping[str, grpc.RpcMethodHandler[Any, Any]],
    ) -> None:
        self._standard = standard
        self._forwarder = forwarder
        self._own = own

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Return the handler of a method."""
        handler = self._forwarder.service(handler_call_details)
        if handler is not None:
            return handler
        return self._standard.service(handler_call_details) or self._own.get(handler_call_details.method)

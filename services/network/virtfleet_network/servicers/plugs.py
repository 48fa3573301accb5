"""PlugService at the gRPC edge: for compute of the same node, on the peer socket alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtfleet.node.v1 import plug_pb2
from virtfleet_service import names

if TYPE_CHECKING:
    from virtfleet_network.ports import Ports
    from virtfleet_service.call import Call

__all__ = ["PlugServicer"]

_USE_NETWORK = "networks.use"


class PlugServicer:
    """Serves `virtfleet.node.v1.PlugService`. The conveyed caller must be allowed to use the network of the port."""

    def __init__(self, ports: Ports) -> None:
        self._ports = ports

    async def reserve_port(self, request: plug_pb2.ReservePortRequest, call: Call) -> plug_pb2.ReservePortResponse:
        """Answer ReservePort."""
        call.authorize(request.parent, _USE_NETWORK)
        return await self._ports.reserve(request)

    async def unreserve_port(
        self, request: plug_pb2.UnreservePortRequest, _call: Call
    ) -> plug_pb2.UnreservePortResponse:
        """Answer UnreservePort."""
        return await self._ports.unreserve(request)

    async def plug_port(self, request: plug_pb2.PlugPortRequest, call: Call) -> plug_pb2.PlugPortResponse:
        """Answer PlugPort."""
        call.authorize(names.parent_of(request.name), _USE_NETWORK)
        return await self._ports.plug(request)

    async def unplug_port(self, request: plug_pb2.UnplugPortRequest, _call: Call) -> plug_pb2.UnplugPortResponse:
        """Answer UnplugPort."""
        return await self._ports.unplug(request)

    async def list_plugs(self, request: plug_pb2.ListPlugsRequest, _call: Call) -> plug_pb2.ListPlugsResponse:
        """Answer ListPlugs."""
        return self._ports.list_plugs(request.parent)

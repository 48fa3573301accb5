"""PortService at the gRPC edge."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtfleet.network.v1 import port_pb2
from virtfleet_network.catalog import Catalog

if TYPE_CHECKING:
    from google.longrunning import operations_pb2

    from virtfleet_network.ports import Ports
    from virtfleet_service.call import Call

__all__ = ["PortServicer"]


class PortServicer:
    """Serves `virtfleet.network.v1.PortService`."""

    def __init__(self, ports: Ports, catalog: Catalog) -> None:
        self._ports = ports
        self._catalog = catalog

    async def list_ports(self, request: port_pb2.ListPortsRequest, call: Call) -> bytes:
        """Answer ListPorts."""
        return self._catalog.list("port", request, port_pb2.ListPortsResponse, call)

    async def get_port(self, request: port_pb2.GetPortRequest, call: Call) -> port_pb2.Port | bytes:
        """Answer GetPort."""
        found: port_pb2.Port | bytes = self._catalog.get("port", request.name, request.view, call)
        return found

    async def create_port(self, request: port_pb2.CreatePortRequest, call: Call) -> operations_pb2.Operation:
        """Answer CreatePort."""
        return await self._ports.create(call, request)

    async def delete_port(self, request: port_pb2.DeletePortRequest, call: Call) -> operations_pb2.Operation:
        """Answer DeletePort."""
        return await self._ports.delete(call, request)

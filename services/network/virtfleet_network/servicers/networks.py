"""NetworkService at the gRPC edge."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtfleet.network.v1 import network_pb2
from virtfleet_network.catalog import Catalog

if TYPE_CHECKING:
    from google.longrunning import operations_pb2

    from virtfleet_network.networks import Networks
    from virtfleet_service.call import Call

__all__ = ["NetworkServicer"]


class NetworkServicer:
    """Serves `virtfleet.network.v1.NetworkService`."""

    def __init__(self, networks: Networks, catalog: Catalog) -> None:
        self._networks = networks
        self._catalog = catalog

    async def list_networks(self, request: network_pb2.ListNetworksRequest, call: Call) -> bytes:
        """Answer ListNetworks."""
        return self._catalog.list("network", request, network_pb2.ListNetworksResponse, call)

    async def get_network(self, request: network_pb2.GetNetworkRequest, call: Call) -> network_pb2.Network | bytes:
        """Answer GetNetwork."""
        found: network_pb2.Network | bytes = self._catalog.get("network", request.name, request.view, call)
        return found

    async def create_network(self, request: network_pb2.CreateNetworkRequest, call: Call) -> operations_pb2.Operation:
        """Answer CreateNetwork."""
        return await self._networks.create(call, request)

    async def update_network(self, request: network_pb2.UpdateNetworkRequest, call: Call) -> operations_pb2.Operation:
        """Answer UpdateNetwork."""
        return await self._networks.update(call, request)

    async def delete_network(self, request: network_pb2.DeleteNetworkRequest, call: Call) -> operations_pb2.Operation:
        """Answer DeleteNetwork."""
        return await self._networks.delete(call, request)

    async def start_network(self, request: network_pb2.StartNetworkRequest, call: Call) -> operations_pb2.Operation:
        """Answer StartNetwork."""
        return await self._networks.start(call, request)

    async def stop_network(self, request: network_pb2.StopNetworkRequest, call: Call) -> operations_pb2.Operation:
        """Answer StopNetwork."""
        return await self._networks.stop(call, request)

    async def list_leases(self, request: network_pb2.ListLeasesRequest, call: Call) -> bytes:
        """Answer ListLeases."""
        return self._catalog.list("lease", request, network_pb2.ListLeasesResponse, call)

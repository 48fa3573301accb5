"""HostService and CapabilityService."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtfleet.compute.v1 import capability_pb2, host_pb2
from virtfleet_compute.hosts import Hosts

if TYPE_CHECKING:
    from virtfleet_service.call import Call


class HostServicer:
    """Serves `virtfleet.compute.v1.HostService`."""

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts

    async def get_host(self, request: host_pb2.GetHostRequest, call: Call) -> host_pb2.Host:
        """Answer GetHost."""
        call.authorize(request.name)
        return self._hosts.get(request.view)


class CapabilityServicer:
    """Serves `virtfleet.compute.v1.CapabilityService`."""

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts

    async def list_drivers(self, request: capability_pb2.ListDriversRequest, call: Call) -> bytes:
        """Answer ListDrivers."""
        return self._hosts.drivers(request, call)

    async def get_driver(self, request: capability_pb2.GetDriverRequest, call: Call) -> bytes:
        """Answer GetDriver."""
        return self._hosts.driver(request, call)

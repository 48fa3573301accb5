"""GuestAgentService."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtfleet.compute.v1 import guest_agent_pb2
from virtfleet_compute.addresses import AddressBook

if TYPE_CHECKING:
    from virtfleet_service.call import Call


class GuestAgentServicer:
    """Serves `virtfleet.compute.v1.GuestAgentService`."""

    def __init__(self, addresses: AddressBook) -> None:
        self._addresses = addresses

    async def list_guest_addresses(
        self, request: guest_agent_pb2.ListGuestAddressesRequest, _call: Call
    ) -> guest_agent_pb2.ListGuestAddressesResponse:
        """Answer ListGuestAddresses."""
        return await self._addresses.known(request)

"""StatsService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from virtfleet.compute.v1 import stats_pb2
from virtfleet_compute.counters import Counters
from virtfleet_compute.hosts import Hosts

if TYPE_CHECKING:
    from virtfleet_service.call import Call


class StatsServicer:
    """Serves `virtfleet.compute.v1.StatsService`."""

    def __init__(self, counters: Counters, hosts: Hosts) -> None:
        self._counters = counters
        self._hosts = hosts

    async def get_domain_stats(self, request: stats_pb2.GetDomainStatsRequest, call: Call) -> stats_pb2.DomainStats:
        """Answer GetDomainStats."""
        return await self._counters.get(request, call)

    async def batch_get_domain_stats(
        self, request: stats_pb2.BatchGetDomainStatsRequest, call: Call
    ) -> stats_pb2.BatchGetDomainStatsResponse:
        """Answer BatchGetDomainStats."""
        return await self._counters.page(request, call)

    def stream_domain_stats(
        self, request: stats_pb2.StreamDomainStatsRequest, call: Call
    ) -> AsyncIterator[stats_pb2.StreamDomainStatsResponse]:
        """Answer StreamDomainStats."""
        return self._counters.stream(request, call)

    async def get_host_stats(self, request: stats_pb2.GetHostStatsRequest, call: Call) -> stats_pb2.HostStats:
        """Answer GetHostStats."""
        call.authorize(request.name)
        return self._hosts.stats()

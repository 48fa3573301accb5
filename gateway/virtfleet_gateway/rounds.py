"""The counters of the domains of all nodes, again and again."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from virtfleet.compute.v1 import stats_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from virtfleet_gateway.lists import FleetReads
    from virtfleet_gateway.shapes import Kind
    from virtfleet_service.call import Call

DEFAULT_INTERVAL_SECONDS: Final = 10.0
PAGE_SIZE: Final = 1000
"""How many domains one message holds at most."""

_PAGE: Final = stats_pb2.DESCRIPTOR.services_by_name["StatsService"].methods_by_name["BatchGetDomainStats"]


class Rounds:
    """Streams counters: in each round all nodes are asked, page by page.

    Args:
        reads: Asks the nodes.
        kind: Domains: how many a node has says how many nodes a page needs.
    """

    def __init__(self, reads: FleetReads, kind: Kind) -> None:
        self._reads = reads
        self._kind = kind

    async def stream(
        self, request: stats_pb2.StreamDomainStatsRequest, call: Call
    ) -> AsyncIterator[stats_pb2.StreamDomainStatsResponse]:
        """Yield rounds; the next one begins an interval after the one before, or when that was taken."""
        interval_seconds = DEFAULT_INTERVAL_SECONDS
        if request.HasField("interval"):
            interval_seconds = request.interval.ToNanoseconds() / 1e9
        loop = asyncio.get_running_loop()
        due = loop.time()
        number = 0
        while True:
            number += 1
            wanted = stats_pb2.BatchGetDomainStatsRequest(
                parent=request.parent,
                filter=request.filter,
                names=request.names,
                groups=request.groups,
                page_size=PAGE_SIZE,
            )
            complete = False
            while not complete:
                answer = await self._reads.list_live(_PAGE, wanted, call, counted=self._kind)
                page = stats_pb2.BatchGetDomainStatsResponse.FromString(answer)
                wanted.page_token = page.next_page_token
                complete = not page.next_page_token
                yield stats_pb2.StreamDomainStatsResponse(
                    stats=page.stats, round_number=number, round_end=complete, unreachable=page.unreachable
                )
            due = max(due + interval_seconds, loop.time())
            await asyncio.sleep(due - loop.time())

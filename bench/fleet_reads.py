"""The state of a fleet in one read: 50 nodes of 100 domains, 100 of them changed just before."""

from __future__ import annotations

import asyncio
import time

from bench import crowd, domains, samples, specs, stage
from bench.figures import Figure
from bench.machine import private_mib
from bench.stage import Stage
from virtfleet.compute.v1 import domain_pb2, stats_pb2
from virtfleet_client import AsyncFleet

KEYS = ("fleet_50x100_ms",)
NODES, DOMAINS = 50, 100
_CHANGED_A_NODE = 2
_STALE_SECONDS = 0.5
"""Between the changes and the read: well below the second that is allowed. Each read is checked to show all changes."""


async def leg(on: Stage) -> list[Figure]:
    """Measure both reads of the whole fleet."""
    fleet = await on.fleet()
    gateway = await on.connect(fleet)
    count = on.times(NODES, 5)
    async with crowd.joined(fleet, gateway, count) as nodes:
        names = [await _define(gateway, node) for node in nodes]
        changed = [name for of_node in names for name in of_node[:_CHANGED_A_NODE]]
        lists: list[float] = []
        stats: list[float] = []
        for number in range(on.times(10, 3) + 1):
            await asyncio.gather(*(domains.touch(gateway, name, number) for name in changed))
            await asyncio.sleep(_STALE_SECONDS)
            began = time.perf_counter()
            pages = await domains.pages_of(gateway, "nodes/-")
            listed = time.perf_counter()
            counted = await _stats(gateway)
            ended = time.perf_counter()
            _check(pages, changed, number, count * DOMAINS, counted)
            if number:
                lists.append(listed - began)
                stats.append(ended - listed)
        weight = private_mib(stage.pid_of(fleet, "gateway"))
    both = [first + second for first, second in zip(lists, stats, strict=True)]
    note = f"{count} nodes of {DOMAINS} domains: list and stats; libvirt: 44 at best, 1,167 as usual"
    return [
        Figure("fleet_50x100_ms", samples.p50(both) * 1e3, "ms", len(both), note),
        Figure("fleet_50x100_list_ms", samples.p50(lists) * 1e3, "ms", len(lists), "ListDomains of nodes/-, all pages"),
        Figure("fleet_50x100_stats_ms", samples.p50(stats) * 1e3, "ms", len(stats), "BatchGetDomainStats of nodes/-"),
        Figure("gateway_50_nodes_private_mib", weight, "MiB", 1, f"{count + 1} nodes, {count * DOMAINS} domains"),
    ]


def _check(
    pages: list[domain_pb2.ListDomainsResponse], changed: list[str], number: int, expected: int, counted: int
) -> None:
    listed = {domain.name: domain for page in pages for domain in page.domains if domain.name.startswith("nodes/c")}
    stale = [name for name in changed if listed[name].labels["round"] != str(number)]
    if len(listed) != expected or counted != expected or stale:
        raise RuntimeError(f"{len(listed)} listed, {counted} counted, {expected} expected; {len(stale)} are stale")


async def _define(gateway: AsyncFleet, node: str) -> list[str]:
    short = node.removeprefix("nodes/")
    requests = [specs.in_memory_domain(short, f"web-{index}") for index in range(DOMAINS)]
    return await domains.define(gateway, requests)


async def _stats(gateway: AsyncFleet) -> int:
    """Read the counters of all domains; returns of how many."""
    request = stats_pb2.BatchGetDomainStatsRequest(parent="nodes/-", page_size=1000)
    count: int = 0
    while True:
        page = await gateway.stats.BatchGetDomainStats(request, timeout=30)
        if page.unreachable:
            raise RuntimeError(f"{len(page.unreachable)} nodes are missing in the stats")
        count += len([one for one in page.stats if one.name.startswith("nodes/c")])
        if not page.next_page_token:
            return count
        request.page_token = page.next_page_token

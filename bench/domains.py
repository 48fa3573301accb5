"""A thousand domains of the driver `test`: defined and started in batches, and listed."""

from __future__ import annotations

import time
from collections.abc import Sequence

from bench import samples, specs, stage
from bench.figures import Figure
from bench.stage import Stage
from virtfleet.compute.v1 import domain_pb2
from virtfleet_client import AsyncFleet

KEYS = ("define_1000_ms", "start_1000_ms", "list_1000_over_codec")
COUNT = 1000
LISTED_BYTES = 4096
_BATCH = 250
"""Requests of 4 kB each, and one message takes 4 MiB."""


async def leg(on: Stage) -> list[Figure]:
    """Measure batches, then lists."""
    gateway = await on.connect(await on.fleet())
    return [*await _batches(on, gateway), *await _lists(on, gateway)]


async def _batches(on: Stage, gateway: AsyncFleet) -> list[Figure]:
    defines: list[float] = []
    starts: list[float] = []
    for number in range(on.times(3, 1) + 1):
        requests = [specs.in_memory_domain(stage.NODE, on.unique("batch")) for _ in range(COUNT)]
        began = time.perf_counter()
        names = await define(gateway, requests)
        defined = time.perf_counter()
        await _start(gateway, names)
        started = time.perf_counter()
        await delete(gateway, names)
        if number:
            defines.append(defined - began)
            starts.append(started - defined)
    note = "one batch through the gateway, driver test"
    return [
        Figure("define_1000_ms", samples.p50(defines) * 1e3, "ms", len(defines), f"{note}; libvirt: 471"),
        Figure("start_1000_ms", samples.p50(starts) * 1e3, "ms", len(starts), f"{note}; libvirt: 741"),
    ]


async def _lists(on: Stage, gateway: AsyncFleet) -> list[Figure]:
    requests = [
        specs.in_memory_domain(stage.NODE, on.unique("listed"), padding_bytes=LISTED_BYTES) for _ in range(COUNT)
    ]
    names: list[str] = []
    for first in range(0, COUNT, _BATCH):
        names += await define(gateway, requests[first : first + _BATCH])
    parents = (f"nodes/{stage.NODE}", "nodes/-")
    times: dict[str, list[float]] = {parent: [] for parent in (*parents, "codec")}
    size = 0
    for number, order in samples.rounds((*parents, "codec"), on.times(15, 4), on.chance):
        pages = await pages_of(gateway, parents[0])
        for variant in order:
            await touch(gateway, names[number % COUNT], number)
            began = time.perf_counter()
            if variant == "codec":
                size = _codec(pages)
            else:
                got = await pages_of(gateway, variant)
                if sum(len(page.domains) for page in got) != COUNT:
                    raise RuntimeError(f"{variant} lists {sum(len(page.domains) for page in got)} domains")
            if number:
                times[variant].append(time.perf_counter() - began)
    await delete(gateway, names)
    one, fleet, codec = (samples.p50(times[variant]) for variant in (*parents, "codec"))
    note = f"{COUNT} domains of {size // COUNT} B through the gateway, one changed before each read"
    return [
        Figure("list_1000_over_codec", one / codec, "ratio", len(times["codec"]), note),
        Figure("list_1000_ms", one * 1e3, "ms", len(times[parents[0]]), "of one node; libvirt: 196, bulk 8.8"),
        Figure("list_1000_fleet_ms", fleet * 1e3, "ms", len(times[parents[1]]), "nodes/-, out of the index"),
        Figure("list_1000_fleet_over_codec", fleet / codec, "ratio", len(times["codec"]), "nodes/-"),
        Figure("list_1000_codec_ms", codec * 1e3, "ms", len(times["codec"]), "encode and decode the same pages"),
    ]


def _codec(pages: Sequence[domain_pb2.ListDomainsResponse]) -> int:
    """Encode and decode pages; returns their size."""
    size = 0
    for page in pages:
        encoded = page.SerializeToString()
        domain_pb2.ListDomainsResponse.FromString(encoded)
        size += len(encoded)
    return size


async def pages_of(gateway: AsyncFleet, parent: str) -> list[domain_pb2.ListDomainsResponse]:
    """Read all pages of a list of domains."""
    request = domain_pb2.ListDomainsRequest(parent=parent, page_size=COUNT)
    pages: list[domain_pb2.ListDomainsResponse] = []
    while not pages or request.page_token:
        page = await gateway.domains.ListDomains(request, timeout=30)
        if page.unreachable:
            raise RuntimeError(f"{len(page.unreachable)} nodes are missing in the list")
        pages.append(page)
        request.page_token = page.next_page_token
    return pages


async def define(gateway: AsyncFleet, requests: Sequence[domain_pb2.CreateDomainRequest]) -> list[str]:
    """Define domains of one node in one batch; returns their names."""
    batch = domain_pb2.BatchCreateDomainsRequest(parent=requests[0].parent, requests=requests)
    batch.inline_wait.FromSeconds(30)
    done = await stage.ready(
        gateway, await gateway.domains.BatchCreateDomains(batch), domain_pb2.BatchCreateDomainsResponse
    )
    return _succeeded(done.results, len(requests))


async def _start(gateway: AsyncFleet, names: Sequence[str]) -> None:
    batch = domain_pb2.BatchStartDomainsRequest(parent=f"nodes/{stage.NODE}")
    batch.inline_wait.FromSeconds(30)
    for name in names:
        batch.requests.add(name=name)
    done = await stage.ready(
        gateway, await gateway.domains.BatchStartDomains(batch), domain_pb2.BatchStartDomainsResponse
    )
    _succeeded(done.results, len(names))


async def delete(gateway: AsyncFleet, names: Sequence[str]) -> None:
    """Delete domains of one node, running ones too."""
    batch = domain_pb2.BatchDeleteDomainsRequest(parent="/".join(names[0].split("/")[:2]))
    batch.inline_wait.FromSeconds(30)
    for name in names:
        batch.requests.add(name=name, stop=True)
    done = await stage.ready(
        gateway, await gateway.domains.BatchDeleteDomains(batch), domain_pb2.BatchDeleteDomainsResponse
    )
    _succeeded(done.results, len(names))


async def touch(gateway: AsyncFleet, name: str, number: int) -> None:
    """Change one label of a domain."""
    request = domain_pb2.UpdateDomainRequest()
    request.domain.name = name
    request.domain.labels["round"] = str(number)
    request.update_mask.paths.append("labels.round")
    operation = await gateway.domains.UpdateDomain(request)
    await stage.ready(gateway, operation, domain_pb2.Domain)


def _succeeded(results: Sequence[domain_pb2.DomainResult], count: int) -> list[str]:
    failed = [result for result in results if result.status.code]
    if failed:
        raise RuntimeError(f"{len(failed)} of {count} failed, the first: {failed[0].status.message}")
    if len(results) != count:
        raise RuntimeError(f"{count} were asked for, {len(results)} answered")
    return [result.name for result in results]

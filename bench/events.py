"""How long an event takes from the call that causes it to a hundred watchers behind the gateway."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from bench import domains, samples, specs, stage
from bench.figures import Figure
from bench.stage import Stage
from virtfleet.compute.v1 import domain_pb2, watch_pb2
from virtfleet_client import AsyncFleet

KEYS = ("event_p50_ms", "event_p99_ms")
WATCHERS = 100
CHANNELS = 10
METHOD = "/virtfleet.compute.v1.WatchService/WatchResources"
_PATIENCE_SECONDS = 20.0


@dataclass(slots=True)
class Board:
    """Is where watchers write when they saw the state of a domain change.

    Attributes:
        marker: The bytes that an event of the awaited kind contains.
        seen: When each watcher saw it.
        complete: Whether all have.
    """

    marker: bytes = b""
    seen: dict[int, float] = field(default_factory=dict)
    complete: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self, watcher: int, message: bytes, arrived: float) -> None:
        """Look at a message that has arrived."""
        if self.marker and self.marker in message and watcher not in self.seen:
            self.seen[watcher] = arrived
            if len(self.seen) == WATCHERS:
                self.complete.set()


async def leg(on: Stage) -> list[Figure]:
    """Measure from the destroy call to each watcher."""
    fleet = await on.fleet()
    direct = await on.connect(fleet, "compute")
    request = specs.in_memory_domain(stage.NODE, on.unique("event"))
    domain = await stage.ready(direct, await direct.domains.CreateDomain(request), domain_pb2.Domain)
    board = Board()
    channels = [stage.bare_channel(fleet, stage.endpoint(fleet)) for _ in range(CHANNELS)]
    watching = watch_pb2.WatchResourcesRequest(
        parent="nodes/-", event_types=[watch_pb2.EVENT_TYPE_DOMAIN_STATE_CHANGED]
    )
    watching.snapshot.SetInParent()
    started = asyncio.Semaphore(0)
    tasks = [
        asyncio.create_task(_watch(channels[index % CHANNELS], watching.SerializeToString(), index, board, started))
        for index in range(WATCHERS)
    ]
    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            for _ in tasks:
                await started.acquire()
        times = await _destroys(on, direct, domain.name, board, tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for channel in channels:
            await channel.close()
        await domains.delete(direct, [domain.name])
    note = (
        f"destroy call to {WATCHERS} watchers behind the gateway, all in the client's one process; libvirt to one: 0.39"
    )
    return [
        Figure("event_p50_ms", samples.p50(times) * 1e3, "ms", len(times), note),
        Figure("event_p99_ms", samples.percentile(times, 0.99) * 1e3, "ms", len(times)),
        Figure("event_first_p50_ms", samples.p50([min(part) for part in _chunks(times)]) * 1e3, "ms"),
    ]


def _chunks(times: list[float]) -> list[list[float]]:
    return [times[first : first + WATCHERS] for first in range(0, len(times), WATCHERS)]


async def _destroys(
    on: Stage, direct: AsyncFleet, name: str, board: Board, tasks: list[asyncio.Task[None]]
) -> list[float]:
    times: list[float] = []
    for number in range(on.times(40, 8) + 1):
        start = domain_pb2.StartDomainRequest(name=name)
        await stage.ready(direct, await direct.domains.StartDomain(start), domain_pb2.Domain)
        await asyncio.sleep(0.1)
        board.seen.clear()
        board.complete.clear()
        board.marker = name.encode()
        began = time.perf_counter()
        stop = domain_pb2.StopDomainRequest(name=name, mode=domain_pb2.STOP_MODE_FORCE)
        await direct.domains.StopDomain(stop)
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                await board.complete.wait()
        except TimeoutError:
            ended = [task for task in tasks if task.done()]
            raise RuntimeError(f"{len(board.seen)} of {WATCHERS} saw it; {len(ended)} watches have ended") from None
        board.marker = b""
        if number:
            times += [arrived - began for arrived in board.seen.values()]
    return times


async def _watch(
    channel: grpc.aio.Channel, request: bytes, watcher: int, board: Board, started: asyncio.Semaphore
) -> None:
    watch: Any = channel.unary_stream(METHOD)
    told = False
    async for message in watch(request):
        board.note(watcher, message, time.perf_counter())
        if not told and watch_pb2.WatchResourcesResponse.FromString(message).HasField("snapshot_end"):
            told = True
            started.release()

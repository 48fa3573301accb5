"""What a call costs: GetDomain at the service against a bare echo of equal bytes, and through the gateway.

One client process and one event loop make all calls, over one connection each, with the same request bytes; the
answers have equal bytes, which is checked. The echo server runs in the node's namespace with the certificate of the
compute service, so that the way there and TLS are the same.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from bench import domains, samples, specs, stage
from bench.figures import Figure
from bench.machine import cpu_seconds
from bench.stage import Stage
from tools import fleet as development
from virtfleet.compute.v1 import domain_pb2
from virtfleet_client.endpoint import Endpoint

METHOD = "/virtfleet.compute.v1.DomainService/GetDomain"
ECHO_PORT = 7190
CALLERS = 32
KEYS = ("direct_over_echo_p50", "gateway_over_direct_p50", "gateway_over_direct_throughput")


@dataclass(slots=True)
class Way:
    """Is one way to the same answer.

    Attributes:
        name: `echo`, `direct` or `gateway`.
        method: Makes the call.
        pids: The processes that a call passes through.
        latencies: Of single calls, in seconds, by round.
        rates: Calls a second of 32 callers, by round.
        cpu: Processor seconds a call while 32 callers call, by process.
    """

    name: str
    method: Any
    pids: Mapping[str, int]
    latencies: list[list[float]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    cpu: dict[str, list[float]] = field(default_factory=dict)

    @property
    def p50(self) -> float:
        """The median of all single calls, in seconds."""
        return samples.p50([value for values in self.latencies for value in values])

    @property
    def round_p50s(self) -> list[float]:
        """The median of each round, in seconds."""
        return [samples.p50(values) for values in self.latencies]


async def leg(on: Stage) -> list[Figure]:
    """Measure the three ways."""
    fleet = await on.fleet()
    domain = await _domain(on, fleet)
    request = domain_pb2.GetDomainRequest(name=domain.name).SerializeToString()
    direct = stage.bare_channel(fleet, stage.endpoint(fleet, "compute"))
    gateway = stage.bare_channel(fleet, stage.endpoint(fleet))
    compute_pid, gateway_pid = stage.pid_of(fleet, "n1/compute"), stage.pid_of(fleet, "gateway")
    async with direct, gateway:
        ask: Any = direct.unary_unary(METHOD)
        reply: bytes = await ask(request)
        async with _echo(fleet, reply) as (place, echo_pid):
            echo = stage.bare_channel(fleet, place)
            async with echo:
                paths = [
                    Way("echo", echo.unary_unary(METHOD), {"server": echo_pid}),
                    Way("direct", direct.unary_unary(METHOD), {"server": compute_pid}),
                    Way("gateway", gateway.unary_unary(METHOD), {"gateway": gateway_pid, "server": compute_pid}),
                ]
                await measure(on, paths, request, reply)
    await domains.delete(await on.connect(fleet), [domain.name])
    return figures(paths, len(reply))


async def measure(on: Stage, paths: list[Way], request: bytes, reply: bytes) -> None:
    """Call all ways in turn, in a new order each round."""
    calls, seconds = on.times(400, 150), on.times(2, 1) * 0.5
    for path in paths:
        if await path.method(request) != reply:
            raise RuntimeError(f"{path.name} answers other bytes")
    for number, order in samples.rounds(paths, on.times(16, 4), on.chance):
        for path in order:
            times = await _single(path.method, request, calls)
            if number:
                path.latencies.append(times)
        for path in order:
            before = {name: cpu_seconds(pid) for name, pid in (*path.pids.items(), ("client", os.getpid()))}
            count, took = await _many(path.method, request, seconds)
            if number:
                path.rates.append(count / took)
                for name, pid in (*path.pids.items(), ("client", os.getpid())):
                    path.cpu.setdefault(name, []).append((cpu_seconds(pid) - before[name]) / count)


async def _single(method: Any, request: bytes, calls: int) -> list[float]:  # noqa: ANN401  # a multicallable of grpc
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        await method(request)
        times.append(time.perf_counter() - began)
    return times


async def _many(method: Any, request: bytes, seconds: float) -> tuple[int, float]:  # noqa: ANN401  # as above
    began = time.perf_counter()
    ends_at = began + seconds

    async def caller() -> int:
        count = 0
        while time.perf_counter() < ends_at:
            await method(request)
            count += 1
        return count

    count = sum(await asyncio.gather(*(caller() for _ in range(CALLERS))))
    return count, time.perf_counter() - began


def figures(paths: list[Way], reply_bytes: int) -> list[Figure]:
    """Return the figures of a measurement."""
    by_name = {path.name: path for path in paths}
    echo, direct, gateway = by_name["echo"], by_name["direct"], by_name["gateway"]
    calls = sum(len(values) for values in direct.latencies)
    found = [
        _ratio("direct_over_echo_p50", direct, echo, calls, f"GetDomain of {reply_bytes} B"),
        _ratio("gateway_over_direct_p50", gateway, direct, calls, f"GetDomain of {reply_bytes} B"),
        Figure(
            "gateway_over_direct_throughput",
            samples.p50(gateway.rates) / samples.p50(direct.rates),
            "ratio",
            len(direct.rates),
            f"{CALLERS} callers; medians of rounds",
        ),
    ]
    for path in paths:
        every = [value for values in path.latencies for value in values]
        found += [
            Figure(f"{path.name}_p50_us", path.p50 * 1e6, "µs", calls),
            Figure(f"{path.name}_p99_us", samples.percentile(every, 0.99) * 1e6, "µs", calls),
            Figure(f"{path.name}_per_second", samples.p50(path.rates), "/s", len(path.rates), f"{CALLERS} callers"),
        ]
        found += [
            Figure(f"{path.name}_{name}_cpu_us", samples.p50(values) * 1e6, "µs", len(values), "processor time a call")
            for name, values in path.cpu.items()
        ]
    return found


def _ratio(key: str, above: Way, below: Way, calls: int, note: str) -> Figure:
    low, high = samples.ratio_spread(above.round_p50s, below.round_p50s)
    return Figure(key, above.p50 / below.p50, "ratio", calls, f"{note}; by rounds {low:.2f} to {high:.2f}")


async def _domain(on: Stage, fleet: development.Fleet) -> domain_pb2.Domain:
    """Make a domain such as people have."""
    connection = await on.connect(fleet)
    request = specs.in_memory_domain(stage.NODE, on.unique("calls"))
    request.start.SetInParent()
    return await stage.ready(connection, await connection.domains.CreateDomain(request), domain_pb2.Domain)


@asynccontextmanager
async def _echo(fleet: development.Fleet, reply: bytes) -> AsyncIterator[tuple[Endpoint, int]]:
    """Run the echo server in the node's namespace; gives its address and process."""
    folder = fleet.folder / stage.NODE
    identity = folder / "state/identity"
    body = folder / "echo.reply"
    body.write_bytes(reply)
    address = f"{fleet.networks[stage.NODE].address}:{ECHO_PORT}"
    files = (str(identity / "compute.crt"), str(identity / "compute.key"), str(identity / "ca.crt"))
    command = [sys.executable, "-m", "bench.echo", address, METHOD, str(body), *files]
    process = await stage.in_namespace(fleet, command, folder / "echo.log")
    try:
        await stage.listening(address, process)
        yield Endpoint.parse(f"tls://{address}?server_name=compute.{stage.NODE}.virtfleet.dev"), process.pid
    finally:
        process.terminate()
        await process.wait()

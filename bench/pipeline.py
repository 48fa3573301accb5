"""GetDomain through the whole pipeline against a bare grpc.aio echo of equal bytes, side by side.

    python -m bench.pipeline [--rounds 8] [--calls 1500] [--profile]

Both servers are processes of their own with mutual TLS and uvloop; one client process calls them in turn, so that
drift of the machine meets both alike. The gate is `direct_over_echo_p50` of 1.4. `--profile` prints where the time of
the pipeline goes.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import multiprocessing
import pstats
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import uvloop

from tests.pki import Issued, Pki
from virtfleet.compute.v1 import domain_pb2
from virtfleet_service.call import Call
from virtfleet_service.server import Server
from virtfleet_service.settings import ServiceSettings, TlsSettings

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

METHOD = "/virtfleet.compute.v1.DomainService/GetDomain"
DOMAIN = domain_pb2.DESCRIPTOR.services_by_name["DomainService"]
BODY_BYTES = 400


def body() -> bytes:
    """Return a serialised domain of about the size that is measured elsewhere."""
    domain = domain_pb2.Domain(name="nodes/n1/domains/web", uid="6ff0a01c-53f3-4c5c-9bb6-0f7bd16c2f1d")
    domain.display_name = "x" * (BODY_BYTES - domain.ByteSize() - 3)
    return domain.SerializeToString()


class Domains:
    """Answers as a service does that holds serialised resources."""

    def __init__(self) -> None:
        self._body = body()

    async def get_domain(self, _request: domain_pb2.GetDomainRequest, _call: Call) -> bytes:
        """Answer GetDomain."""
        return self._body


async def _serve_pipeline(settings: ServiceSettings, ready: Connection) -> None:
    server = Server(settings, service="compute")
    server.add(DOMAIN, Domains())
    async with server:
        ready.send(server.port)
        await asyncio.to_thread(ready.recv)


async def _serve_echo(issued: Issued, authority: bytes, ready: Connection) -> None:
    reply = body()

    async def echo(_request: bytes, _context: object) -> bytes:
        return reply

    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    handler: grpc.RpcMethodHandler[Any, Any] = grpc.unary_unary_rpc_method_handler(echo)
    server.add_registered_method_handlers("virtfleet.compute.v1.DomainService", {"GetDomain": handler})
    credentials = grpc.ssl_server_credentials([(issued.key, issued.certificate)], authority, True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    ready.send(port)
    await asyncio.to_thread(ready.recv)
    await server.stop(0)


def _pipeline_process(settings: ServiceSettings, ready: Connection, profile: bool) -> None:  # noqa: FBT001
    profiler = cProfile.Profile()
    if profile:
        profiler.enable()
    uvloop.run(_serve_pipeline(settings, ready))
    if profile:
        profiler.disable()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def _echo_process(issued: Issued, authority: bytes, ready: Connection) -> None:
    uvloop.run(_serve_echo(issued, authority, ready))


async def _measure(ports: dict[str, int], user: Issued, authority: bytes, rounds: int, calls: int) -> dict[str, float]:
    credentials = grpc.ssl_channel_credentials(authority, user.key, user.certificate)
    request = domain_pb2.GetDomainRequest(name="nodes/n1/domains/web").SerializeToString()
    channels = {name: grpc.aio.secure_channel(f"localhost:{port}", credentials) for name, port in ports.items()}
    times: dict[str, list[float]] = {name: [] for name in ports}
    rates: dict[str, list[float]] = {name: [] for name in ports}
    for number in range(rounds + 1):
        for name, channel in channels.items():
            method: Any = channel.unary_unary(METHOD)
            for _ in range(calls):
                started = time.perf_counter()
                await method(request)
                if number:
                    times[name].append(time.perf_counter() - started)
            started = time.perf_counter()
            await _concurrent(method, request, calls)
            if number:
                rates[name].append(calls / (time.perf_counter() - started))
    for channel in channels.values():
        await channel.close()
    p50 = {name: sorted(values)[len(values) // 2] * 1e6 for name, values in times.items()}
    rate = {name: max(values) for name, values in rates.items()}
    return {
        "echo_p50_us": p50["echo"],
        "direct_p50_us": p50["direct"],
        "direct_over_echo_p50": p50["direct"] / p50["echo"],
        "echo_per_second": rate["echo"],
        "direct_per_second": rate["direct"],
        "direct_over_echo_throughput": rate["direct"] / rate["echo"],
    }


async def _concurrent(method: Any, request: bytes, calls: int) -> None:  # noqa: ANN401  # a callable of grpc
    async def caller() -> None:
        for _ in range(calls // 32):
            await method(request)

    await asyncio.gather(*(caller() for _ in range(32)))


def measure(*, rounds: int = 8, calls: int = 1500, profile: bool = False) -> dict[str, float]:
    """Measure both and return the figures."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        pki = Pki(folder / "pki")
        issued, user = pki.service(), pki.user("alice", "viewer")
        settings = ServiceSettings(
            node="n1",
            state_dir=folder,
            run_dir=folder / "run",
            listen="127.0.0.1:0",
            tls=TlsSettings(certificate_file=issued.certificate_file, key_file=issued.key_file, ca_file=pki.ca_file),
        )
        ends = {"echo": context.Pipe(), "direct": context.Pipe()}
        processes = [
            context.Process(target=_echo_process, args=(issued, pki.pem, ends["echo"][1])),
            context.Process(target=_pipeline_process, args=(settings, ends["direct"][1], profile)),
        ]
        for process in processes:
            process.start()
        try:
            ports = {name: end[0].recv() for name, end in ends.items()}
            return uvloop.run(_measure(ports, user, pki.pem, rounds, calls))
        finally:
            for end in ends.values():
                end[0].send("stop")
            for process in processes:
                process.join(10)
                if process.is_alive():
                    process.kill()


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--calls", type=int, default=1500)
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    for name, value in measure(rounds=given.rounds, calls=given.calls, profile=given.profile).items():
        print(f"{name:30} {value:12.2f}")


if __name__ == "__main__":
    main()

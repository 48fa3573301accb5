"""What legs are measured on: a fleet with one node, every process its own, mutual TLS on every hop.

It is made when the first leg needs it and shared by all.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import grpc
import grpc.aio
from google.longrunning import operations_pb2
from google.protobuf.message import Message

from tools import fleet as development
from tools.paths import ROOT
from virtfleet_client import AsyncFleet, Credentials
from virtfleet_client.endpoint import Endpoint

PATIENCE_SECONDS = 60.0
NODE = "n1"
_Kind = TypeVar("_Kind", bound=Message)


@dataclass(slots=True)
class Stage:
    """Is where a run takes place.

    Attributes:
        quick: Whether few measurements are enough.
        chance: Gives the orders of variants.
    """

    quick: bool
    chance: random.Random
    stack: AsyncExitStack
    _fleet: development.Fleet | None = None
    _failure: str = ""
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def times(self, usual: int, quick: int) -> int:
        """Return how often something is measured in this run."""
        return quick if self.quick else usual

    def unique(self, prefix: str) -> str:
        """Return an id that this run has not used."""
        return f"{prefix}-{next(self._numbers)}"

    async def fleet(self) -> development.Fleet:
        """Return the fleet, made at the first call.

        Raises:
            RuntimeError: It does not come up.
        """
        if self._failure:
            raise RuntimeError(self._failure)
        if self._fleet is None:
            plan = development.Plan(nodes=1, driver="qemu,test")
            try:
                self._fleet = await self.stack.enter_async_context(development.Fleet.running(plan))
            except (RuntimeError, OSError, TimeoutError) as error:
                self._failure = f"the fleet does not come up: {error}"
                raise RuntimeError(self._failure) from error
        return self._fleet

    def log_tails(self) -> str:
        """Return the last lines of every process of the fleet."""
        if self._fleet is None:
            return ""
        return "\n".join(f"--- {name}\n{self._fleet.log_tail(name)}" for name in self._fleet.supervisor.programs)

    async def connect(self, fleet: development.Fleet, service: str = "") -> AsyncFleet:
        """Return a connection to the gateway, or to one service of the first node; closed with the stage."""
        connection = AsyncFleet(endpoint(fleet, service), credentials(fleet))
        self.stack.push_async_callback(connection.close)
        return connection


@asynccontextmanager
async def stage(*, quick: bool, seed: int) -> AsyncIterator[Stage]:
    """Set up a stage; everything on it is taken away at the end."""
    async with AsyncExitStack() as stack:
        yield Stage(quick=quick, chance=random.Random(seed), stack=stack)


def credentials(fleet: development.Fleet) -> Credentials:
    """Return the credentials of the fleet's administrator."""
    files = fleet.credentials
    return Credentials(files["ca"], files["certificate"], files["key"])


def endpoint(fleet: development.Fleet, service: str = "") -> Endpoint:
    """Return the address of the gateway, or of one service of the first node."""
    if not service:
        return Endpoint.parse(f"tls://{fleet.address}")
    address = f"{fleet.networks[NODE].address}:{development.PORTS[service]}"
    return Endpoint.parse(f"tls://{address}?server_name={service}.{NODE}.virtfleet.dev")


def bare_channel(fleet: development.Fleet, place: Endpoint) -> grpc.aio.Channel:
    """Return a channel without interceptors, as the call figures need it."""
    options = [*place.options(), ("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.secure_channel(place.target, credentials(fleet).for_channel(), options=options)


async def ready(fleet: AsyncFleet, operation: operations_pb2.Operation, kind: type[_Kind]) -> _Kind:
    """Wait for an operation; returns its response.

    Raises:
        VirtfleetError: It failed.
    """
    return await fleet.wait(operation, kind, timeout_seconds=PATIENCE_SECONDS)


def pid_of(fleet: development.Fleet, name: str) -> int:
    """Return the process id of a program of the fleet: `gateway`, `n1/compute`."""
    process = fleet.supervisor.programs[name].process
    if process is None:
        raise RuntimeError(f"{name} does not run")
    return process.pid


async def listening(address: str, process: asyncio.subprocess.Process, seconds: float = 30.0) -> None:
    """Wait until something takes connections at `host:port`.

    Raises:
        RuntimeError: The process has ended, or time has run out.
    """
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    ends_at = loop.time() + seconds
    while True:
        try:
            _, writer = await asyncio.open_connection(host, int(port))
        except OSError:
            if process.returncode is not None or loop.time() > ends_at:
                raise RuntimeError(f"nothing listens at {address}") from None
            await asyncio.sleep(0.002)
        else:
            writer.close()
            return


async def in_namespace(fleet: development.Fleet, command: Sequence[str], log: Path) -> asyncio.subprocess.Process:
    """Start a program in the namespace of the first node."""
    with log.open("ab") as out:
        return await asyncio.create_subprocess_exec(
            *fleet.networks[NODE].enter(*command), stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=out, cwd=ROOT
        )

"""A watcher that stops reading costs nobody memory, holds nobody up, and goes on without a gap."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2, field_mask_pb2

from tests.fleet.rig import MIB, domain, pid_of
from virtfleet.compute.v1 import domain_pb2, watch_pb2
from virtfleet.type.v1 import watch_pb2 as type_watch_pb2
from virtfleet_client import Credentials, Fleet
from virtfleet_client.endpoint import Endpoint
from virtfleet_client.errors import VirtfleetError, from_call

WATCH = "/virtfleet.compute.v1.WatchService/WatchResources"
READERS = 8
WRITES = 250
RING_WRITES = 300
"""So many fill the ring of the gateway, which has 16 MiB."""

PAYLOAD = "x" * 60_000
WRITTEN_MIB = WRITES * len(PAYLOAD) // MIB
OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 8 * MIB)]


def private_mib(process: int) -> float:
    """Return the memory that a process shares with nobody, as the kernel counts it."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def begin(channel: grpc.Channel, parent: str, name: str, token: str = "") -> Any:
    """Begin a watch of one domain."""
    request = watch_pb2.WatchResourcesRequest(
        parent=parent, filter=f'name="{name}"', bookmark_interval=duration_pb2.Duration(seconds=1)
    )
    if token:
        request.resume_token = token
    else:
        request.snapshot.CopyFrom(type_watch_pb2.WatchSnapshot())
    stub = channel.unary_stream(
        WATCH, watch_pb2.WatchResourcesRequest.SerializeToString, watch_pb2.WatchResourcesResponse.FromString
    )
    return stub(request, timeout=120)


class Reader:
    """Reads a watch when it is told to, and goes on with its token where it was cut off."""

    def __init__(self, channel: grpc.Channel, parent: str, name: str) -> None:
        self._begin: Callable[[str], Any] = lambda token: begin(channel, parent, name, token)
        self._stream = self._begin("")
        self.token = ""
        self.generations: list[int] = []
        self.reasons: list[str] = []

    def step(self) -> None:
        """Read one message."""
        try:
            answer = next(self._stream)
        except grpc.RpcError as error:
            failed: Any = error
            typed = (
                error
                if isinstance(error, VirtfleetError)
                else from_call(failed.code(), failed.details(), tuple(failed.trailing_metadata() or ()))
            )
            self.reasons.append(typed.reason)
            assert typed.reason == "SLOW_READER", typed
            assert self.token, "it is told where to go on"
            self._stream = self._begin(self.token)
            return
        self.token = answer.resume_token or self.token
        self.generations += [change.put.domain.generation for change in answer.changes if change.HasField("put")]

    def until(self, generation: int) -> None:
        """Read until a generation has come."""
        while not self.generations or self.generations[-1] < generation:
            self.step()

    def close(self) -> None:
        """End it."""
        self._stream.cancel()


@pytest.fixture(params=["the fleet's watch", "a node's watch through the gateway", "direct"])
def way(
    request: pytest.FixtureRequest, environment: dict[str, str], people: dict[str, Credentials], run_folder: Path
) -> Iterator[tuple[Callable[[], grpc.Channel], str]]:
    """Return how to connect, and the parent of the watch."""
    folder = json.loads((run_folder / "fleet.json").read_text())["folder"]
    target = Endpoint.parse(environment["VIRTFLEET_ADDRESS"]).target
    credentials = people["viewer"].for_channel()
    if request.param == "direct":
        yield lambda: grpc.insecure_channel(f"unix:{folder}/n1/run/compute/viewer.sock", OPTIONS), "nodes/n1"
    else:
        parent = "nodes/-" if request.param == "the fleet's watch" else "nodes/n1"
        yield lambda: grpc.secure_channel(target, credentials, OPTIONS), parent


def write(fleet: Fleet, name: str, times: int) -> int:
    """Change a domain again and again; returns the last generation."""
    found = 0
    for number in range(times):
        wanted = domain_pb2.Domain(name=name, annotations={"number": str(number), "payload": PAYLOAD})
        mask = field_mask_pb2.FieldMask(paths=["annotations"])
        operation = fleet.domains.UpdateDomain(domain_pb2.UpdateDomainRequest(domain=wanted, update_mask=mask))
        found = fleet.wait(operation, domain_pb2.Domain).generation
    return found


@pytest.fixture(scope="module")
def written(fleet: Fleet) -> Iterator[str]:
    """Yield a domain that has been changed so often that the rings of the servers are as full as they get."""
    with domain(fleet, "nodes/n1") as made:
        write(fleet, made.name, RING_WRITES)
        yield made.name


def test_a_watcher_that_stops_reading(
    fleet: Fleet, way: tuple[Callable[[], grpc.Channel], str], run_folder: Path, written: str
) -> None:
    connect, parent = way
    processes = {place: pid_of(run_folder, place) for place in ("gateway", "n1/compute")}
    with ExitStack() as stack:
        generation = write(fleet, written, 1)
        readers: list[Reader] = []
        for _ in range(READERS):
            reader = Reader(stack.enter_context(closing(connect())), parent, written)
            stack.callback(reader.close)
            reader.until(generation)
            readers.append(reader)
        before = {place: private_mib(process) for place, process in processes.items()}
        last = write(fleet, written, WRITES)
        for place, process in processes.items():
            grown = private_mib(process) - before[place]
            assert grown < READERS * WRITTEN_MIB / 3, f"{place} keeps {grown} MiB for {READERS} who do not read"
        for reader in readers:
            started = len(reader.generations)
            reader.until(last)
            told = reader.generations[started:]
            assert 1 < len(told) < WRITES, "what was overtaken is left out"
            assert told == sorted(set(told)), "no order turned, nothing twice"
        # They are watchers like any other again.
        after = write(fleet, written, 3)
        for reader in readers:
            reader.until(after)
            assert reader.generations[-3:] == [after - 2, after - 1, after]

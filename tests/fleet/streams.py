"""Streams that a client may leave in the middle: `python -m tests.fleet.streams KIND DOMAIN VOLUME` begins one and stays.

It says `ready` when the stream stands, and waits for its death.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from google.longrunning import operations_pb2
from google.protobuf import duration_pb2
from google.protobuf.message import Message

from virtfleet.common.v1 import operations_pb2 as common_pb2
from virtfleet.compute.v1 import console_pb2, domain_pb2, stats_pb2
from virtfleet.compute.v1 import watch_pb2 as compute_watch
from virtfleet.fleet.v1 import watch_pb2 as fleet_watch
from virtfleet.network.v1 import watch_pb2 as network_watch
from virtfleet.storage.v1 import volume_pb2
from virtfleet.storage.v1 import watch_pb2 as storage_watch
from virtfleet.type.v1 import watch_pb2 as type_watch
from virtfleet_client import Fleet, connect
from virtfleet_client.errors import VirtfleetError
from virtfleet_client.watch import watch_path

MIB = 1 << 20
SERIAL = "tty"
"""The device of the domain that has a console."""


@dataclass(frozen=True, slots=True)
class Target:
    """Is what streams are about: a running domain with a console that takes its time to stop, and a volume of 64 MiB."""

    domain: str
    volume: str

    @property
    def node(self) -> str:
        """The node of both."""
        return "/".join(self.domain.split("/")[:2])


Begin = Callable[[Fleet, Target], object]


def _watch(person: Fleet, request: Message) -> Any:
    """Begin a watch and read its first answer; one that is not begun again by itself."""
    request.snapshot.CopyFrom(type_watch.WatchSnapshot())  # type: ignore[attr-defined]  # of every watch
    stub = person.channel.unary_stream(watch_path(request), request_serializer=type(request).SerializeToString)
    stream = stub(request)
    next(stream)
    return stream


def operations(person: Fleet, target: Target) -> object:
    """Follow the operations of a service."""
    return _watch(person, common_pb2.WatchOperationsRequest(parent=f"{target.node}/services/compute"))


def console(person: Fleet, target: Target) -> object:
    """Write to a console without end, and read of it."""
    opening = console_pb2.OpenConsoleRequest(name=target.domain)
    opening.open.device_id = SERIAL

    def endless() -> Iterator[console_pb2.OpenConsoleRequest]:
        yield opening
        while True:
            time.sleep(0.01)
            yield console_pb2.OpenConsoleRequest(data=b"x")

    stream = person.consoles.OpenConsole(endless())
    for _ in range(3):
        next(stream)
    return stream


def console_log(person: Fleet, target: Target) -> object:
    """Follow what a console has printed."""
    request = console_pb2.ReadConsoleLogRequest(name=target.domain, device_id=SERIAL, follow=True)
    stream = person.consoles.ReadConsoleLog(request)
    next(stream)
    return stream


def stats(person: Fleet, target: Target) -> object:
    """Follow counters."""
    interval = duration_pb2.Duration(nanos=100_000_000)
    stream = person.stats.StreamDomainStats(stats_pb2.StreamDomainStatsRequest(parent=target.node, interval=interval))
    next(stream)
    return stream


def waiting(person: Fleet, target: Target) -> object:
    """Wait for an operation that lasts: no stream, but as long as one."""
    request = domain_pb2.StopDomainRequest(
        name=target.domain,
        mode=domain_pb2.STOP_MODE_GRACEFUL,
        grace_period=duration_pb2.Duration(seconds=600),
        inline_wait=duration_pb2.Duration(nanos=1_000_000),
    )
    operation = person.domains.StopDomain(request)
    wait = operations_pb2.WaitOperationRequest(name=operation.name, timeout=duration_pb2.Duration(seconds=20))
    _beside(lambda: person.operations.WaitOperation(wait))
    time.sleep(0.3)
    return operation


def upload(person: Fleet, target: Target) -> object:
    """Send a part of a volume and stay silent then."""
    sent = threading.Event()

    def pieces() -> Iterator[volume_pb2.UploadVolumeRequest]:
        start = volume_pb2.UploadStart(length_bytes=8 * MIB, digest="sha256:" + "0" * 64)
        yield volume_pb2.UploadVolumeRequest(name=target.volume, start=start)
        for number in range(4):
            piece = volume_pb2.UploadVolumeRequest()
            piece.chunk.offset, piece.chunk.data = number * MIB, bytes([number + 1]) * MIB
            yield piece
        sent.set()
        threading.Event().wait(60)

    _beside(lambda: person.volumes.UploadVolume(pieces()))
    assert sent.wait(20)
    time.sleep(0.3)
    return sent


def _beside(call: Callable[[], object]) -> None:
    """Make a call in a thread of its own; how it ends is nobody's business."""

    def run() -> None:
        with contextlib.suppress(VirtfleetError, ValueError):
            call()

    threading.Thread(target=run, daemon=True).start()


def download(person: Fleet, target: Target) -> object:
    """Read the first message of a volume's content."""
    stream = person.volumes.DownloadVolume(volume_pb2.DownloadVolumeRequest(name=target.volume))
    next(stream)
    return stream


STREAMS: dict[str, tuple[str, Begin]] = {
    "watch of the fleet": (
        "virtfleet.compute.v1.WatchService/WatchResources",
        lambda person, _: _watch(person, compute_watch.WatchResourcesRequest(parent="nodes/-")),
    ),
    "watch of domains": (
        "virtfleet.compute.v1.WatchService/WatchResources",
        lambda person, target: _watch(person, compute_watch.WatchResourcesRequest(parent=target.node)),
    ),
    "watch of volumes": (
        "virtfleet.storage.v1.WatchService/WatchResources",
        lambda person, target: _watch(person, storage_watch.WatchResourcesRequest(parent=target.node)),
    ),
    "watch of networks": (
        "virtfleet.network.v1.WatchService/WatchResources",
        lambda person, target: _watch(person, network_watch.WatchResourcesRequest(parent=target.node)),
    ),
    "watch of the gateway": (
        "virtfleet.fleet.v1.WatchService/WatchResources",
        lambda person, _: _watch(person, fleet_watch.WatchResourcesRequest()),
    ),
    "watch of operations": ("virtfleet.common.v1.OperationService/WatchOperations", operations),
    "console": ("virtfleet.compute.v1.ConsoleService/OpenConsole", console),
    "log of a console": ("virtfleet.compute.v1.ConsoleService/ReadConsoleLog", console_log),
    "stats": ("virtfleet.compute.v1.StatsService/StreamDomainStats", stats),
    "upload": ("virtfleet.storage.v1.VolumeService/UploadVolume", upload),
    "download": ("virtfleet.storage.v1.VolumeService/DownloadVolume", download),
    "waiting for an operation": ("google.longrunning.Operations/WaitOperation", waiting),
}
"""The method of each stream, and how it is begun."""


def main() -> None:
    """Begin a stream and stay."""
    kind, domain, volume = sys.argv[1:]
    with connect() as fleet:
        held = STREAMS[kind][1](fleet, Target(domain, volume))
        print("ready", flush=True)
        time.sleep(600)
        del held


if __name__ == "__main__":
    main()

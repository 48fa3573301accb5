"""A call that is refused while its client still sends: whatever the client, it gets the answer that the server gave."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.fleet.rig import MIB
from virtfleet.compute.v1 import console_pb2
from virtfleet.storage.v1 import volume_pb2
from virtfleet.type.v1 import values_pb2
from virtfleet_client import Credentials
from virtfleet_client.endpoint import Endpoint
from virtfleet_client.errors import from_call

UPLOAD = "/virtfleet.storage.v1.VolumeService/UploadVolume"
CONSOLE = "/virtfleet.compute.v1.ConsoleService/OpenConsole"
PIECE = volume_pb2.UploadVolumeRequest(chunk=values_pb2.DataChunk(data=b"x" * (4 * MIB - 64))).SerializeToString()
OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]


def upload_of(name: str) -> bytes:
    """Return the first message of an upload."""
    start = volume_pb2.UploadStart(length_bytes=1 << 30)
    return volume_pb2.UploadVolumeRequest(name=name, start=start).SerializeToString()


def console_of(name: str) -> bytes:
    """Return the first message of a console."""
    return console_pb2.OpenConsoleRequest(name=name, open=console_pb2.ConsoleOpen(device_id="tty")).SerializeToString()


def messages(first: bytes, seconds: float) -> Iterator[bytes]:
    """Yield a first message and then 4 MiB after 4 MiB, whatever the server says."""
    yield first
    ends_at = time.monotonic() + seconds
    while time.monotonic() < ends_at:
        yield PIECE


class Way:
    """A way to a server, for a client of either kind."""

    def __init__(self, target: str, credentials: grpc.ChannelCredentials | None) -> None:
        self._target = target
        self._credentials = credentials

    def blocking(self, method: str, first: bytes, seconds: float) -> tuple[str, str]:
        """Send with the blocking client."""
        channel = (
            grpc.secure_channel(self._target, self._credentials, OPTIONS)
            if self._credentials
            else grpc.insecure_channel(self._target, OPTIONS)
        )
        with channel:
            kind: Any = channel.stream_unary(method) if method == UPLOAD else channel.stream_stream(method)
            try:
                answer = kind(messages(first, seconds), timeout=20)
                if method != UPLOAD:
                    list(answer)
            except grpc.RpcError as error:
                return outcome(error)
        raise AssertionError("the call is answered")

    def asynchronous(self, method: str, first: bytes, seconds: float) -> tuple[str, str]:
        """Send with the client of asyncio."""
        return asyncio.run(self._asynchronous(method, first, seconds))

    async def _asynchronous(self, method: str, first: bytes, seconds: float) -> tuple[str, str]:
        channel = (
            grpc.aio.secure_channel(self._target, self._credentials, OPTIONS)
            if self._credentials
            else grpc.aio.insecure_channel(self._target, OPTIONS)
        )
        async with channel:
            kind: Any = channel.stream_unary(method) if method == UPLOAD else channel.stream_stream(method)
            call = kind(messages(first, seconds), timeout=20)
            try:
                if method == UPLOAD:
                    await call
                else:
                    await call.read()
            except grpc.aio.AioRpcError as error:
                return outcome(error)
        raise AssertionError("the call is answered")


def outcome(error: Any) -> tuple[str, str]:
    """Return code and reason."""
    typed = from_call(error.code(), error.details(), tuple(error.trailing_metadata() or ()))
    return typed.code().name, typed.reason


@pytest.fixture(scope="module", params=["gateway", "direct"])
def way(
    request: pytest.FixtureRequest, environment: dict[str, str], run_folder: Path, people: dict[str, Credentials]
) -> dict[str, dict[str, Way]]:
    """Return the ways to the first node by role and method: through the gateway, or to its own sockets."""
    found: dict[str, dict[str, Way]] = {}
    folder = json.loads((run_folder / "fleet.json").read_text())["folder"]
    for role in ("viewer", "admin"):
        through = Way(Endpoint.parse(environment["VIRTFLEET_ADDRESS"]).target, people[role].for_channel())
        found[role] = {
            method: Way(f"unix:{folder}/n1/run/{service}/{role}.sock", None) if request.param == "direct" else through
            for method, service in ((UPLOAD, "storage"), (CONSOLE, "compute"))
        }
    return found


NOWHERE = {"gateway": ("NOT_FOUND", "NODE_UNKNOWN"), "direct": ("FAILED_PRECONDITION", "WRONG_NODE")}
VIEWER = {
    "gateway": ("PERMISSION_DENIED", "PERMISSION_MISSING"),
    "direct": ("PERMISSION_DENIED", "READ_ONLY_SOCKET"),
}
NO_VOLUME = {"gateway": ("NOT_FOUND", "RESOURCE_NOT_FOUND"), "direct": ("NOT_FOUND", "RESOURCE_NOT_FOUND")}
MALFORMED = {
    "gateway": ("INVALID_ARGUMENT", "DOCUMENT_INVALID"),
    "direct": ("INVALID_ARGUMENT", "DOCUMENT_INVALID"),
}
CASES = [
    ("viewer", UPLOAD, upload_of("nodes/n1/pools/p/volumes/v"), VIEWER),
    ("viewer", CONSOLE, console_of("nodes/n1/domains/d"), VIEWER),
    ("admin", UPLOAD, upload_of("nodes/n77/pools/p/volumes/v"), NOWHERE),
    ("admin", CONSOLE, console_of("nodes/n77/domains/d"), NOWHERE),
    ("admin", UPLOAD, b"\xff\xff\xff", MALFORMED),
    ("admin", UPLOAD, upload_of("nodes/n1/pools/none/volumes/v"), NO_VOLUME),
    ("admin", CONSOLE, console_of("nodes/n1/domains/none"), NO_VOLUME),
]
NAMES = [
    "upload of a viewer",
    "console of a viewer",
    "upload to nowhere",
    "console of nowhere",
    "no message",
    "upload to no volume",
    "console of no domain",
]


@pytest.mark.parametrize("client", ["blocking", "asynchronous"])
@pytest.mark.parametrize(("role", "method", "first", "wanted"), CASES, ids=NAMES)
def test_a_client_that_goes_on_sending_gets_the_real_status(
    request: pytest.FixtureRequest,
    way: dict[str, dict[str, Way]],
    client: str,
    role: str,
    method: str,
    first: bytes,
    wanted: dict[str, tuple[str, str]],
) -> None:
    place = request.node.callspec.params["way"]
    assert getattr(way[role][method], client)(method, first, 0.3) == wanted[place]


def test_a_client_that_never_stops_is_told_after_a_while(way: dict[str, dict[str, Way]]) -> None:
    began = time.monotonic()
    got = way["admin"][UPLOAD].blocking(UPLOAD, upload_of("nodes/n1/pools/none/volumes/v"), 15)
    assert got == ("NOT_FOUND", "RESOURCE_NOT_FOUND")
    assert time.monotonic() - began < 14, "nobody takes in what nobody wants for as long as it comes"

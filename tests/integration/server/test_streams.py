"""Streams of every kind: errors before, in and after them, and clients that leave in the middle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.integration.server import rig as rigs
from tests.integration.server.rig import Refused, running
from virtfleet.compute.v1 import console_pb2
from virtfleet.storage.v1 import volume_pb2
from virtfleet_service import errors
from virtfleet_service.call import Call
from virtfleet_service.server import Server

VOLUME = "nodes/n1/pools/p/volumes/v"
CONSOLES = console_pb2.DESCRIPTOR.services_by_name["ConsoleService"]
OPEN_CONSOLE = "/virtfleet.compute.v1.ConsoleService/OpenConsole"


def upload(*, name: str = "", data: bytes = b"") -> bytes:
    request = volume_pb2.UploadVolumeRequest(name=name)
    if data:
        request.chunk.data = data
    else:
        request.start.length_bytes = 1000
    return request.SerializeToString()


async def outcome(call: Any) -> Refused:
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return Refused(error)
    raise AssertionError("the stream ended well")


async def result(call: Any) -> Refused:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return Refused(caught.value)


class Echo:
    """Sends back what it gets; fails on a word."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.began = asyncio.Event()

    async def open_console(
        self, requests: AsyncIterator[console_pb2.OpenConsoleRequest], _call: Call
    ) -> AsyncIterator[console_pb2.OpenConsoleResponse]:
        try:
            async for request in requests:
                self.began.set()
                if request.data == b"fail":
                    raise errors.WrongState("it has stopped", resource=request.name, state="STOPPED")
                yield console_pb2.OpenConsoleResponse(data=console_pb2.ConsoleData(data=request.data))
        finally:
            self.ended.set()


async def test_a_download_is_whole_and_its_handler_ends(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        rig.volumes.go_on.set()
        channel = rig.socket("operator")
        call = channel.unary_stream(rigs.DOWNLOAD)(volume_pb2.DownloadVolumeRequest(name=VOLUME).SerializeToString())
        pieces = [volume_pb2.DownloadVolumeResponse.FromString(piece) async for piece in call]
        assert [piece.chunk.data for piece in pieces] == [VOLUME.encode()] * 2
        assert rig.volumes.ended == ["download"]
        await channel.close()


async def test_a_stream_is_refused_before_its_handler_runs(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        channel = rig.socket("operator")
        call = channel.unary_stream(rigs.DOWNLOAD)(volume_pb2.DownloadVolumeRequest(name="x").SerializeToString())
        assert (await outcome(call)).short == ("INVALID_ARGUMENT", "NAME_MALFORMED")
        assert rig.volumes.ended == []
        await channel.close()


async def test_a_client_that_leaves_a_download_ends_its_handler(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        channel = rig.socket("operator")
        call: Any = channel.unary_stream(rigs.DOWNLOAD)(
            volume_pb2.DownloadVolumeRequest(name=VOLUME).SerializeToString()
        )
        await call.read()
        call.cancel()
        await channel.close()
        async with asyncio.timeout(5):
            while rig.server.active_calls_count or not rig.volumes.ended:
                await asyncio.sleep(0.01)


async def test_an_upload_is_routed_and_judged_by_its_first_message(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        channel = rig.socket("operator")
        method: Any = channel.stream_unary(rigs.UPLOAD)
        await method(iter([upload(name=VOLUME), upload(data=b"x" * 1000), upload(data=b"y")]), timeout=20)
        assert rig.volumes.received == 3
        error = await result(method(iter([upload(data=b"x")]), timeout=20))
        assert error.short == ("INVALID_ARGUMENT", "FIELD_REQUIRED")
        error = await result(method(iter([]), timeout=20))
        assert error.short == ("INVALID_ARGUMENT", "FIELD_REQUIRED")
        error = await result(method(iter([upload(name="nodes/n2/pools/p/volumes/v")]), timeout=20))
        assert error.short == ("FAILED_PRECONDITION", "WRONG_NODE")
        await channel.close()
        assert [entry["event"] for entry in rig.audit()][:2] == ["begin", "call"]


async def test_a_viewer_cannot_download(tmp_path: Path) -> None:
    """To look at resources is not to look into disks."""
    async with running(tmp_path) as rig:
        for channel in (rig.socket("viewer"), rig.channel(rig.pki.user("eve", "viewer"))):
            call = channel.unary_stream(rigs.DOWNLOAD)(
                volume_pb2.DownloadVolumeRequest(name=VOLUME).SerializeToString(), timeout=20
            )
            assert (await outcome(call)).short == ("PERMISSION_DENIED", "PERMISSION_MISSING")
            await channel.close()
        assert not rig.volumes.started.is_set()


async def test_a_viewer_cannot_upload(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        channel = rig.socket("viewer")
        method: Any = channel.stream_unary(rigs.UPLOAD)
        error = await result(method(iter([upload(name=VOLUME)]), timeout=20))
        assert error.short == ("PERMISSION_DENIED", "READ_ONLY_SOCKET")
        await channel.close()


async def test_a_later_message_is_checked_too(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        channel = rig.socket("operator")
        method: Any = channel.stream_unary(rigs.UPLOAD)
        unknown = upload(data=b"x") + b"\xa0\x38\x01"
        error = await result(method(iter([upload(name=VOLUME), unknown]), timeout=20))
        assert error.short == ("INVALID_ARGUMENT", "UNKNOWN_FIELD")
        assert error.fields == ["#900"]
        error = await result(method(iter([upload(name=VOLUME), upload(data=b"x" * (5 << 20))]), timeout=20))
        assert error.short == ("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE")
        assert rig.volumes.ended == ["upload", "upload"]
        await channel.close()


async def test_a_client_that_leaves_an_upload_ends_its_handler(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        channel = rig.socket("operator")
        method: Any = channel.stream_unary(rigs.UPLOAD)

        async def requests() -> AsyncIterator[bytes]:
            yield upload(name=VOLUME)
            await asyncio.sleep(30)

        call = method(requests(), timeout=20)
        async with asyncio.timeout(5):
            await rig.volumes.started.wait()
            call.cancel()
            while rig.server.active_calls_count or not rig.volumes.ended:
                await asyncio.sleep(0.01)
        await channel.close()
        assert rig.audit()[-1]["code"] == "CANCELLED"


@pytest.fixture
async def console(tmp_path: Path) -> AsyncIterator[tuple[rigs.Rig, Echo]]:
    rig = rigs.Rig(tmp_path)
    echo = Echo()
    rig.server = Server(rig.settings, service="compute")
    rig.server.add(CONSOLES, echo)
    async with rig.server:
        yield rig, echo


def line(text: bytes, name: str = "") -> bytes:
    request = console_pb2.OpenConsoleRequest(name=name)
    if text:
        request.data = text
    else:
        request.open.device_id = "serial0"
    return request.SerializeToString()


async def test_both_sides_of_a_console_talk_in_turn(console: tuple[rigs.Rig, Echo]) -> None:
    rig, _ = console
    channel = rig.socket("operator")
    call: Any = channel.stream_stream(OPEN_CONSOLE)(timeout=20)
    await call.write(line(b"", "nodes/n1/domains/web"))
    await call.read()
    for text in (b"one", b"two"):
        await call.write(line(text))
        assert console_pb2.OpenConsoleResponse.FromString(await call.read()).data.data == text
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK
    await channel.close()


async def test_an_error_in_the_middle_of_a_console_reaches_the_client(console: tuple[rigs.Rig, Echo]) -> None:
    rig, _ = console
    channel = rig.socket("operator")
    call: Any = channel.stream_stream(OPEN_CONSOLE)(timeout=20)
    await call.write(line(b"", "nodes/n1/domains/web"))
    await call.read()
    await call.write(line(b"fail"))
    error = await outcome(call)
    assert error.short == ("FAILED_PRECONDITION", "WRONG_STATE")
    assert error.metadata["state"] == "STOPPED"
    await channel.close()


async def test_a_client_that_leaves_a_console_ends_its_handler(console: tuple[rigs.Rig, Echo]) -> None:
    rig, echo = console
    channel = rig.socket("operator")
    call: Any = channel.stream_stream(OPEN_CONSOLE)(timeout=20)
    await call.write(line(b"", "nodes/n1/domains/web"))
    await call.read()
    call.cancel()
    async with asyncio.timeout(5):
        await echo.ended.wait()
    await channel.close()


async def test_an_unknown_streaming_method_has_our_reason(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        channel = rig.socket("operator")
        call: Any = channel.stream_stream("/virtfleet.compute.v1.ConsoleService/OpenConsole")(timeout=20)
        assert (await outcome(call)).short == ("UNIMPLEMENTED", "METHOD_NOT_IMPLEMENTED")
        await channel.close()

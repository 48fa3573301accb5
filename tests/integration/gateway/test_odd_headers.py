"""Calls with headers that libraries of other languages send, and that of Python neither sends nor passes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from tests.integration.gateway.nodes import Rig, echo, named, rig

if TYPE_CHECKING:
    from tests.integration.gateway.nodes import Context

GET = "virtfleet.compute.v1.DomainService.GetDomain"


@pytest_asyncio.fixture
async def fleet() -> AsyncIterator[Rig]:
    async with rig() as made:
        yield made


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Return one frame of HTTP/2."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


async def call_by_hand(fleet: Rig, method: str, request: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """Call a method with metadata that the libraries of Python do not send; returns what comes up to the status."""
    service, _, name = method.rpartition(".")
    pairs = (
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", f"/{service}/{name}".encode()),
        (b":authority", b"gateway"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
        *more,
    )
    block = b"".join(b"\0" + bytes([len(key)]) + key + bytes([len(value)]) + value for key, value in pairs)
    body = b"\0" + len(request).to_bytes(4, "big") + request
    reader, writer = await asyncio.open_connection("127.0.0.1", fleet.port)
    try:
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
        writer.write(frame(1, 4, 1, block) + frame(0, 1, 1, body))
        heard = b""
        async with asyncio.timeout(5):
            while b"grpc-status" not in heard:
                heard += await reader.read(4096)
        return heard
    finally:
        writer.close()
        await writer.wait_closed()


OK = b"grpc-status\x010"
"""As the trailers of a call that is answered have it."""


@pytest.mark.parametrize(
    "value",
    [b"a\tb", b"a\nb", b"a\0b", "caf\u00e9".encode(), "\u202e".encode(), b"\x7f"],
    ids=["tab", "line", "NUL", "accent", "right to left", "delete"],
)
async def test_metadata_that_cannot_be_sent_on_stay_behind_and_the_call_passes(fleet: Rig, value: bytes) -> None:
    seen: list[tuple[str, str | bytes]] = []

    async def answer(request: bytes, context: Context) -> bytes:
        seen.extend(context.invocation_metadata() or ())
        return request

    fleet.nodes["n1"].unary[GET] = answer
    request = named("nodes/n1/domains/web")
    heard = await call_by_hand(fleet, GET, request, (b"x-odd", value), (b"x-plain", b"~ and space"))
    assert OK in heard
    assert request in heard
    assert dict(seen)["x-plain"] == "~ and space"
    assert "x-odd" not in dict(seen)


@pytest.mark.parametrize("longest", [b"2562047H", b"99999999H"])
async def test_a_deadline_in_centuries_is_none_that_has_passed(fleet: Rig, longest: bytes) -> None:
    """292 years are what Go and Java send for the longest time that they have."""
    fleet.nodes["n1"].unary[GET] = echo
    heard = await call_by_hand(fleet, GET, named("nodes/n1/domains/web"), (b"grpc-timeout", longest))
    assert OK in heard

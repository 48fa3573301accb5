"""The handshake with a monitor, with the messages of a QEMU at moments that cannot be had on demand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Mapping
from typing import Any

import pytest

from virtfleet_compute.drivers.qemu.monitor import Monitor, MonitorLost

GREETING = {"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}
EVENT = {"event": "NIC_RX_FILTER_CHANGED", "data": {}, "timestamp": {"seconds": 1, "microseconds": 2}}


async def speak(line: socket.socket, *messages: Mapping[str, Any]) -> None:
    """Be a monitor: greet, hear what is asked, say these, and answer whatever else is asked."""
    reader, writer = await asyncio.open_connection(sock=line)
    writer.write(json.dumps(GREETING).encode() + b"\r\n")
    # What is asked comes without an end of line.
    await reader.read(4096)
    for message in messages:
        writer.write(json.dumps(message).encode() + b"\r\n")
    while asked := await reader.read(4096):
        writer.write(json.dumps({"return": {"running": True}, "id": json.loads(asked)["id"]}).encode() + b"\r\n")
    writer.close()


async def test_an_event_in_the_midst_of_the_handshake_is_heard_and_is_no_answer() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    heard: list[str] = []
    speaking = asyncio.create_task(speak(theirs, EVENT, {"return": {}}))
    monitor = await Monitor.connect(
        ours, timeout_seconds=5, on_event=lambda event: heard.append(event["event"]), on_lost=lambda _: None
    )
    assert await monitor.execute("query-status", timeout_seconds=5) == {"running": True}
    assert heard == ["NIC_RX_FILTER_CHANGED"]
    await monitor.close()
    await asyncio.wait_for(speaking, 5)


NONSENSE = {
    "an id that is no name": b'{"return": {}, "id": []}',
    "depth without end": b"[" * 200_000,
    "no text": b"\xff\xfe\x00\x01",
    "no object": b"[]",
    "an error of nobody": b'{"error": 7}',
    "a line without end": b"x" * (11 << 20),
    "an event without a name": b'{"event": ["STOP"], "data": 7}',
}


@pytest.mark.parametrize("what", NONSENSE)
async def test_nonsense_on_the_line_is_told_once_and_the_end_is_in_order(what: str) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    lost = asyncio.Event()

    def hear(event: Mapping[str, Any]) -> None:
        raise TypeError(event)

    async def nonsense() -> None:
        reader, writer = await asyncio.open_connection(sock=theirs)
        writer.write(json.dumps(GREETING).encode() + b"\r\n")
        await reader.read(4096)
        writer.write(b'{"return": {}}\r\n')
        # Once the hand is shaken.
        await reader.read(4096)
        writer.write(NONSENSE[what] + b"\n")
        # It may be hung up on before it has said all.
        with contextlib.suppress(ConnectionError):
            while await reader.read(4096):
                pass
        writer.close()

    speaking = asyncio.create_task(nonsense())
    monitor = await Monitor.connect(ours, timeout_seconds=5, on_event=hear, on_lost=lambda _: lost.set())
    with pytest.raises(MonitorLost) as silent:
        await monitor.execute("query-status", timeout_seconds=5)
    assert len(str(silent.value)) < 800
    await asyncio.wait_for(lost.wait(), 5)
    await monitor.close()
    await asyncio.wait_for(speaking, 5)


async def test_what_is_told_of_a_greeting_has_a_bound() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)

    def speak_at_once() -> None:
        theirs.sendall(b"\x1b" * (3 << 20) + b"\n")
        theirs.close()

    speaking = asyncio.create_task(asyncio.to_thread(speak_at_once))
    with pytest.raises(MonitorLost, match="no greeting") as silent:
        await Monitor.connect(ours, timeout_seconds=5, on_event=lambda _: None, on_lost=lambda _: None)
    assert len(str(silent.value)) < 800
    assert str(silent.value).isprintable()
    await speaking


async def test_a_refused_hand_is_no_greeting() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    speaking = asyncio.create_task(speak(theirs, {"error": {"class": "GenericError", "desc": "no"}}))
    with pytest.raises(MonitorLost, match=r"no greeting: .*Negotiation failed"):
        await Monitor.connect(ours, timeout_seconds=5, on_event=lambda _: None, on_lost=lambda _: None)
    await asyncio.wait_for(speaking, 5)

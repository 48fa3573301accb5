"""The console ring, its readers and its one writer."""

from __future__ import annotations

import asyncio
import os

import pytest

from tests.integration.launcher.running import Launcher, console_guest
from virtfleet_service.launcher import (
    Console,
    ConsoleData,
    ConsoleGap,
    LauncherClient,
    LauncherError,
    LauncherUnavailable,
)


async def read_until(console: Console, needle: bytes) -> bytes:
    text = b""
    async for chunk in console:
        assert isinstance(chunk, ConsoleData), chunk
        text += chunk.data
        if needle in text:
            return text
    raise AssertionError(text)


async def test_first_writer_types_and_others_read(compute: LauncherClient) -> None:
    await compute.spawn(console_guest("echo", "echo"))
    async with await compute.console("echo", write=True) as writer, await compute.console("echo") as reader:
        assert await read_until(writer, b"\n") == b"hello\n"
        with pytest.raises(LauncherError) as refused:
            await compute.console("echo", write=True)
        assert refused.value.reason == "WRITER_BUSY"
        with pytest.raises(LauncherError) as refused:
            await reader.write(b"x")
        assert refused.value.reason == "NOT_WRITER"
        await writer.write(b"abc")
        assert await read_until(reader, b"ABC") == b"hello\nABC"
        await writer.release()
        async with await compute.console("echo", write=True, newest=True) as next_writer:
            await next_writer.write(b"def")
            assert await read_until(next_writer, b"DEF") == b"DEF"
        assert await read_until(writer, b"DEF") == b"ABCDEF"
    with pytest.raises(LauncherError) as refused:
        await compute.open_socket("echo", "con")
    assert refused.value.reason == "CONSOLE_SOCKET"


async def test_reading_goes_on_at_a_place(compute: LauncherClient) -> None:
    await compute.spawn(console_guest("echo", "echo"))
    async with await compute.console("echo", write=True) as console:
        await read_until(console, b"hello\n")
        epoch, offset = console.epoch, console.offset
        await console.write(b"more")
        await read_until(console, b"MORE")
    async with await compute.console("echo", epoch=epoch, offset=offset - 2) as console:
        assert await read_until(console, b"MORE") == b"o\nMORE"
    async with await compute.console("echo", epoch=epoch - 5, offset=1) as console:
        assert await anext(aiter(console)) == ConsoleGap(epoch, 0, None)
    async with await compute.console("echo", follow=False) as console:
        assert [chunk async for chunk in console] == [ConsoleData(epoch, 0, b"hello\nMORE")]


async def test_end_of_the_process_ends_the_console_after_its_last_byte(compute: LauncherClient) -> None:
    await compute.spawn(console_guest("brief", "once"))
    async with await compute.console("brief") as console:
        assert b"".join([chunk.data async for chunk in console if isinstance(chunk, ConsoleData)]) == b"last words"
    await compute.wait("brief")
    async with await compute.console("brief") as console:
        assert b"".join([chunk.data async for chunk in console if isinstance(chunk, ConsoleData)]) == b"last words"
    with pytest.raises(LauncherError) as refused:
        await compute.console("brief", write=True)
    assert refused.value.reason == "NOT_RUNNING"


async def test_slow_reader_is_told_what_it_missed_and_holds_up_nobody(
    launcher: Launcher, compute: LauncherClient
) -> None:
    lines = 400_000
    size = 9 * lines
    await compute.spawn(console_guest("flood", "flood", str(lines // 1000), ring_bytes=65536))
    stuck = await compute.console("flood")
    # Nobody reads `stuck`; the process must still come to its end, and the launcher answer meanwhile.
    await asyncio.wait_for(compute.wait("flood"), 20)
    assert (await compute.inspect("flood")).state == "ended"
    seen = skipped = position = 0
    async for chunk in stuck:
        if isinstance(chunk, ConsoleGap):
            assert chunk.skipped is not None
            skipped += chunk.skipped
            position += chunk.skipped
        else:
            assert chunk.offset == position
            # Every line says where it stands: each byte can be checked.
            first = position // 9
            expected = b"".join(b"%08d\n" % n for n in range(first, first + len(chunk.data) // 9 + 2))
            assert expected[position % 9 :].startswith(chunk.data)
            seen += len(chunk.data)
            position += len(chunk.data)
        assert position == chunk.offset + (len(chunk.data) if isinstance(chunk, ConsoleData) else 0)
    await stuck.close()
    assert skipped > 0
    assert seen + skipped == size
    assert (launcher.guest_dir("flood") / "con.ring").stat().st_size == 65536 + 4096


async def test_reader_that_breaks_the_protocol_is_hung_up_on(compute: LauncherClient) -> None:
    await compute.spawn(console_guest("echo", "echo"))
    epoch, _, line = await compute.attach({"guest": "echo"})
    assert epoch
    line.setblocking(True)
    await asyncio.to_thread(line.sendall, os.urandom(64))
    data = b"x"
    while data:
        try:
            data = await asyncio.to_thread(line.recv, 4096)
        except ConnectionResetError:
            break
    line.close()
    assert (await compute.inspect("echo")).state == "running"


async def test_unknown_console_and_launcher_away(launcher: Launcher, compute: LauncherClient) -> None:
    await compute.spawn(console_guest("echo", "echo"))
    with pytest.raises(LauncherError) as refused:
        await compute.console("echo", console="other")
    assert refused.value.reason == "NO_CONSOLE"
    launcher.end()
    hasty = launcher.client(patience=0.1)
    with pytest.raises(LauncherUnavailable):
        await hasty.list_processes()

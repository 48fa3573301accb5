"""`virtfleet proxy URI`: a unix socket for any transport, for clients of all languages (see `clients/README.md`)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, parse_qsl, unquote, urlsplit

import click

_CHUNK: Final = 256 << 10
_RELAY: Final = (
    "import os,socket,sys,threading\n"
    "s=socket.socket(socket.AF_UNIX);p={path!r}\n"
    "try:s.connect(p)\n"
    "except OSError as e:sys.exit(p+': '+e.strerror)\n"
    "def up():\n"
    " while d:=os.read(0,262144):s.sendall(d)\n"
    " s.shutdown(socket.SHUT_WR)\n"
    "threading.Thread(target=up,daemon=True).start()\n"
    "while d:=s.recv(262144):\n"
    " v=memoryview(d)\n"
    " while v:v=v[os.write(1,v):]\n"
)
"""What runs at the other end of ssh where it cannot forward a socket itself: there is always a Python on a node."""


def command_for(uri: str) -> list[str]:
    """Return the program whose standard input and output are the transport of a URI.

    Raises:
        ClickException: The URI has no form that is known.
    """
    parts = urlsplit(uri)
    if parts.scheme == "command" and parts.path:
        return [unquote(parts.path), *parse_qs(parts.query).get("arg", [])]
    if parts.scheme == "ssh" and parts.hostname:
        host = f"{parts.username}@{parts.hostname}" if parts.username else parts.hostname
        head = ["ssh", "-T", "-o", "BatchMode=yes", *(["-p", str(parts.port)] if parts.port else [])]
        to = dict(parse_qsl(parts.query)).get("to", "")
        if to:
            return [*head, "-W", to, "--", host]
        if len(parts.path) > 1:
            return [*head, "--", host, "exec python3 -c " + _quoted(_RELAY.format(path=unquote(parts.path)))]
    raise click.ClickException(
        f"`{uri}`: ssh://[user@]host/path/of/socket, ssh://[user@]host?to=host:port, or command:program?arg=…"
    )


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


@click.command()
@click.argument("uri")
def proxy(uri: str) -> None:
    """Print the path of a unix socket that leads to URI, and serve it until standard input ends."""
    command = command_for(uri)
    if shutil.which(command[0]) is None:
        raise click.ClickException(f"{command[0]}: there is no such program")
    asyncio.run(_serve(command))


async def _serve(command: list[str]) -> None:
    folder = Path(tempfile.mkdtemp(prefix="virtfleet-proxy-"))
    tasks: set[asyncio.Task[None]] = set()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await _carry(command, reader, writer)

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        server = await asyncio.start_unix_server(take, folder / "socket")
        click.echo(folder / "socket")
        sys.stdout.flush()
        ends = [asyncio.create_task(stop.wait()), asyncio.create_task(_end_of_input())]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _end_of_input() -> None:
    """Wait for the end of standard input, whatever it is: an event loop cannot wait for a file or /dev/null."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def read() -> None:
        # An input that cannot be read, or is none, has ended.
        with contextlib.suppress(OSError):
            while os.read(0, _CHUNK):
                pass
        # The loop may have ended first.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=read, daemon=True).start()
    await ended.wait()


async def _carry(command: list[str], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Carry one connection over a program of its own."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    if process.stdin is None or process.stdout is None or process.stderr is None:
        raise RuntimeError("the pipes are asked for")
    said = asyncio.create_task(process.stderr.read())
    ways = [
        asyncio.create_task(_pass(reader, process.stdin)),
        asyncio.create_task(_pass(process.stdout, writer)),
    ]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        code = await process.wait()
        text = (await said).decode(errors="replace").strip()
        if text and code:
            sys.stderr.write(f"{command[0]}: {text}\n")
        writer.close()


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(_CHUNK):
            writer.write(data)
            await writer.drain()

"""The door of the fleet: the address that clients connect to, in front of the gateway's own.

It passes bytes, TLS and all. What it adds is that connections can be cut, refused, frozen or slow, and that the
address stays while the gateway behind it is another one.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

_CHUNK_BYTES: Final = 256 << 10


class Door:
    """Listens for clients and passes their bytes to the gateway."""

    def __init__(self) -> None:
        self.gateway_port = 0
        self.port = 0
        self.delay_seconds = 0.0
        self._host = "127.0.0.1"
        self._listener: asyncio.Server | None = None
        self._passing = asyncio.Event()
        self._passing.set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def connection_count(self) -> int:
        """How many connections of clients are open."""
        return len(self._tasks)

    async def open(self, host: str, port: int) -> None:
        """Listen. A port of 0 is replaced by a free one, which is kept from then on.

        Raises:
            OSError: The address is taken or not of this host.
        """
        if self._listener is None:
            self._host = host
            self._listener = await asyncio.start_server(self._take, host, port, reuse_address=True, backlog=1024)
            self.port = self._listener.sockets[0].getsockname()[1]

    async def shut(self) -> None:
        """Stop listening and cut all connections."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        await self.cut()

    async def reopen(self) -> None:
        """Listen again at the same address."""
        await self.open(self._host, self.port)

    async def cut(self) -> int:
        """Cut all connections; returns how many there were."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return len(tasks)

    def set(self, *, frozen: bool, delay_seconds: float) -> None:
        """Let connections be as faults have it."""
        self.delay_seconds = delay_seconds
        if frozen:
            self._passing.clear()
        else:
            self._passing.set()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a connection is served by a task")
        self._tasks.add(task)
        inner: asyncio.StreamWriter | None = None
        try:
            inner_reader, inner = await asyncio.open_connection("127.0.0.1", self.gateway_port)
            up = asyncio.ensure_future(self._pass(reader, inner))
            down = asyncio.ensure_future(self._pass(inner_reader, writer))
            try:
                await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                up.cancel()
                down.cancel()
                await asyncio.gather(up, down, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            # Nobody is behind the door, or it was shut: to the client both are a connection that has ended.
            pass
        finally:
            self._tasks.discard(task)
            for one in (writer, inner):
                if one is not None:
                    # Not a polite end: a peer that is gone sends no more bytes.
                    one.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(_CHUNK_BYTES):
                await self._passing.wait()
                if self.delay_seconds:
                    await asyncio.sleep(self.delay_seconds)
                writer.write(data)
                await writer.drain()

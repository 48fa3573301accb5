"""A door in front of a gateway, fake or real: passes bytes, TLS and all, and is where connections go wrong."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, Self, TypeVar

_CHUNK_BYTES = 64 << 10
_PATIENCE_SECONDS = 30.0
_Answer = TypeVar("_Answer")


class Door:
    """Listens at an address of its own while entered.

    A connection that comes while the gateway is being replaced waits at the door, as at a load balancer, so that what a
    client does after a break does not depend on how quickly a process starts.

    Args:
        upstream: The gateway, `host:port`.

    Attributes:
        address: Where clients connect.
        sent_bytes: What clients have sent since answers were held or the door was frozen.
    """

    def __init__(self, upstream: str) -> None:
        host, _, port = upstream.rpartition(":")
        self._upstream = (host, int(port))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="door", daemon=True)
        self._server: asyncio.Server | None = None
        self._port = 0
        self._connections: dict[asyncio.Task[None], asyncio.Event] = {}
        """Each with what holds while it is not stalled."""
        self._up = asyncio.Event()
        self._down = asyncio.Event()
        self._freeze_at: int | None = None
        self.address = ""
        self.sent_bytes = 0

    def __enter__(self) -> Self:
        """Open it."""
        self._thread.start()
        self._do(self._let_pass())
        return self

    def __exit__(self, *_: object) -> None:
        """Shut it."""
        self._do(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def let_pass(self) -> None:
        """Let everything flow, and new connections in."""
        self._do(self._let_pass())

    def hold_answers(self) -> None:
        """Pass on what clients send, and keep back what they are answered."""
        self._do(self._hold(None, up=True))

    def freeze(self, after_sent_bytes: int = 0) -> None:
        """Pass nothing on in either direction any more, once clients have sent so much."""
        self._do(self._hold(after_sent_bytes, up=after_sent_bytes > 0))

    def stall(self) -> None:
        """Have the connections that stand carry nothing any more, without closing them; new ones do."""
        self._do(self._stall())

    def cut(self) -> int:
        """Abort all connections; returns how many there were."""
        return self._do(self._cut())

    def refuse(self) -> None:
        """Abort all connections and refuse new ones."""
        self._do(self._shut())

    @property
    def stands(self) -> bool:
        """Whether anything is kept back; false while a freeze that was announced has not begun."""
        return not self._down.is_set()

    def _do(self, work: Coroutine[Any, Any, _Answer]) -> _Answer:
        done: Future[_Answer] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return done.result(_PATIENCE_SECONDS)

    async def _let_pass(self) -> None:
        self._freeze_at = None
        self._up.set()
        self._down.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._take, "127.0.0.1", self._port, backlog=256)
            self._port = self._server.sockets[0].getsockname()[1]
            self.address = f"127.0.0.1:{self._port}"

    async def _hold(self, freeze_at: int | None, *, up: bool) -> None:
        self.sent_bytes = 0
        self._freeze_at = freeze_at
        if freeze_at is None or not up:
            self._down.clear()
        if not up:
            self._up.clear()

    async def _stall(self) -> None:
        for flowing in self._connections.values():
            flowing.clear()

    async def _shut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._cut()

    async def _cut(self) -> int:
        connections = list(self._connections)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        return len(connections)

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        flowing = asyncio.Event()
        flowing.set()
        connection = asyncio.ensure_future(self._carry(reader, writer, flowing))
        self._connections[connection] = flowing
        connection.add_done_callback(self._connections.pop)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, flowing: asyncio.Event) -> None:
        far: asyncio.StreamWriter | None = None
        try:
            far_reader, far = await self._reach()
            upward = asyncio.ensure_future(self._pump(reader, far, flowing, upward=True))
            downward = asyncio.ensure_future(self._pump(far_reader, writer, flowing, upward=False))
            try:
                await asyncio.wait((upward, downward), return_when=asyncio.FIRST_COMPLETED)
            finally:
                upward.cancel()
                downward.cancel()
                await asyncio.gather(upward, downward, return_exceptions=True)
        finally:
            for end in (writer, far):
                if end is not None:
                    end.transport.abort()

    async def _reach(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        ends_at = self._loop.time() + _PATIENCE_SECONDS
        while True:
            try:
                return await asyncio.open_connection(*self._upstream)
            except OSError:
                if self._loop.time() > ends_at:
                    raise
                await asyncio.sleep(0.02)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, flowing: asyncio.Event, *, upward: bool
    ) -> None:
        gate = self._up if upward else self._down
        while data := await reader.read(_CHUNK_BYTES):
            if upward:
                self.sent_bytes += len(data)
                if self._freeze_at is not None and self.sent_bytes > self._freeze_at:
                    self._up.clear()
                    self._down.clear()
            await gate.wait()
            await flowing.wait()
            writer.write(data)
            await writer.drain()

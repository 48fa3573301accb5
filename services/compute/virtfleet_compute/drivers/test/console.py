"""The consoles of the test driver: a bounded history per port, readers as cursors, a guest that echoes and obeys."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from virtfleet_compute.drivers.facets import (
    ConsoleEnd,
    ConsoleEndReason,
    ConsoleGap,
    ConsoleItem,
    ConsoleOutput,
    ConsolePosition,
)
from virtfleet_service.errors import RangeBeyondEnd, ResourceInUse, WrongState

HISTORY_BYTES = 64 * 1024
PIECE_BYTES = 64 * 1024


class Port:
    """Is one port of one run: what it has put out, who reads, who writes."""

    def __init__(self, device_id: str, epoch: str, command: Callable[[str], None]) -> None:
        self.device_id = device_id
        self.epoch = epoch
        self.ended = False
        self.writer: Session | None = None
        self._command = command
        self._line = bytearray()
        self._history = bytearray()
        self._first = 0
        self._news = asyncio.Event()

    @property
    def end(self) -> int:
        """The offset behind the last byte."""
        return self._first + len(self._history)

    def put_out(self, data: bytes) -> None:
        """Let the guest put out bytes."""
        self._history += data
        excess = len(self._history) - HISTORY_BYTES
        if excess > 0:
            del self._history[:excess]
            self._first += excess
        self.wake()

    def take_in(self, data: bytes) -> None:
        """Give bytes to the guest, which echoes them and obeys whole lines."""
        self.put_out(data)
        self._line += data.replace(b"\r", b"\n")
        *lines, rest = bytes(self._line).split(b"\n")
        self._line[:] = rest[-1024:]
        for line in lines:
            self._command(line.decode(errors="replace").strip())

    def finish(self) -> None:
        """End with the guest; the history stays."""
        self.ended = True
        self.wake()

    def wake(self) -> None:
        """Let all readers look again."""
        self._news.set()
        self._news = asyncio.Event()

    async def news(self) -> None:
        """Wait for something new."""
        await self._news.wait()

    def read(self, offset: int) -> ConsoleItem | None:
        """Return what stands at an offset: bytes, or a gap where they are no longer held; None: nothing yet."""
        if offset < self._first:
            return ConsoleGap(self.epoch, offset, self._first - offset)
        start = offset - self._first
        data = bytes(self._history[start : start + PIECE_BYTES])
        return ConsoleOutput(offset, data) if data else None


class Session:
    """Is one caller's place at a port."""

    def __init__(
        self, port: Port, *, epoch: str, offset: int | None, writable: bool, force: bool = False, follow: bool = True
    ) -> None:
        self._port = port
        self._follow = follow
        self._stale = bool(epoch) and epoch != port.epoch
        self._taken_over = False
        self._closed = False
        self._offset = port.end if offset is None else 0 if self._stale else offset
        if self._offset > port.end:
            raise RangeBeyondEnd(
                f"offset {offset} is behind the end {port.end} of {port.device_id}", offset=offset, end=port.end
            )
        if writable:
            self._become_writer(force=force)
        self.position = ConsolePosition(port.device_id, port.epoch, self._offset, writable)

    def _become_writer(self, *, force: bool) -> None:
        holder = self._port.writer
        if holder is not None:
            if not force:
                raise ResourceInUse(
                    f"another caller writes to {self._port.device_id}; read only, or take it with `force`",
                    device_id=self._port.device_id,
                    holder="another caller",
                )
            holder._taken_over = True  # noqa: SLF001  # the same class
            self._port.wake()
        self._port.writer = self

    async def output(self) -> AsyncIterator[ConsoleItem]:
        """Tell what the port puts out."""
        if self._stale:
            yield ConsoleGap(self._port.epoch, 0, 0)
        while not self._closed:
            if self._taken_over:
                yield ConsoleEnd(ConsoleEndReason.TAKEN_OVER, self._offset)
                return
            item = self._port.read(self._offset)
            if isinstance(item, ConsoleGap):
                self._offset += item.length_bytes
                yield item
            elif isinstance(item, ConsoleOutput):
                self._offset += len(item.data)
                yield item
            elif self._port.ended:
                yield ConsoleEnd(ConsoleEndReason.GUEST_ENDED, self._offset)
                return
            elif not self._follow:
                yield ConsoleEnd(ConsoleEndReason.END_OF_LOG, self._offset)
                return
            else:
                await self._port.news()

    async def write(self, data: bytes) -> None:
        """Give input to the guest."""
        if self._port.writer is not self or self._port.ended:
            raise WrongState(f"this session may not write to {self._port.device_id}", device_id=self._port.device_id)
        self._port.take_in(data)

    async def resize(self, columns: int, rows: int) -> None:
        """Do nothing: the port has no window."""

    async def close(self) -> None:
        """Leave."""
        self._closed = True
        if self._port.writer is self:
            self._port.writer = None
        self._port.wake()

"""Consoles: sessions over the launcher, which is the one client of each port and keeps its history."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from virtfleet_compute.drivers.api import DomainRef
from virtfleet_compute.drivers.facets import (
    ConsoleEnd,
    ConsoleEndReason,
    ConsoleGap,
    ConsoleItem,
    ConsoleOutput,
    ConsolePosition,
    ConsoleSession,
)
from virtfleet_compute.drivers.qemu import failures, naming
from virtfleet_compute.drivers.qemu.guests import Guests
from virtfleet_service import launcher
from virtfleet_service.errors import (
    DeviceNotFound,
    QuotaExceeded,
    RangeBeyondEnd,
    ResourceInUse,
    ResourceNotFound,
    WrongState,
)
from virtfleet_service.launcher import LauncherError

PIECE_BYTES = 64 * 1024
LEAVING_SECONDS = 1.0
LEAVING_PAUSE_SECONDS = 0.005


@dataclass(slots=True)
class _Writers:
    """Knows the one session that may write to each port."""

    of: dict[tuple[str, str], Session] = field(default_factory=dict)


class Session:
    """Is one caller's place at a port."""

    def __init__(
        self,
        console: launcher.Console,
        position: ConsolePosition,
        *,
        key: tuple[str, str],
        writers: _Writers,
        follow: bool,
        stale: bool,
    ) -> None:
        self.position = position
        self._console = console
        self._key = key
        self._writers = writers
        self._follow = follow
        self._stale = stale
        self._taken_over = False
        self._coming: asyncio.Future[launcher.ConsoleData | launcher.ConsoleGap | None] | None = None
        self._leaving = asyncio.Event()

    async def output(self) -> AsyncIterator[ConsoleItem]:
        """Tell what the port puts out."""
        if self._stale:
            yield ConsoleGap(self.position.epoch, self.position.offset, 0)
        offset = self.position.offset
        async for chunk in self._chunks():
            if isinstance(chunk, launcher.ConsoleGap):
                # The launcher tells where output goes on, our callers where it is missing.
                length = chunk.skipped or 0
                yield ConsoleGap(_epoch(chunk.epoch), chunk.offset - length, length)
                offset = chunk.offset
                continue
            for at in range(0, len(chunk.data), PIECE_BYTES):
                yield ConsoleOutput(chunk.offset + at, chunk.data[at : at + PIECE_BYTES])
            offset = chunk.offset + len(chunk.data)
        if self._taken_over:
            reason = ConsoleEndReason.TAKEN_OVER
        else:
            reason = ConsoleEndReason.GUEST_ENDED if self._follow else ConsoleEndReason.END_OF_LOG
        yield ConsoleEnd(reason, offset)

    async def _chunks(self) -> AsyncIterator[launcher.ConsoleData | launcher.ConsoleGap]:
        """Yield what the launcher sends until it ends or the session does.

        The launcher's client takes a line that is closed under it for a launcher that died, and attaches again; so it
        is cancelled first.
        """
        chunks = aiter(self._console)
        leaving = asyncio.create_task(self._leaving.wait())
        try:
            while True:
                coming = self._coming = asyncio.ensure_future(anext(chunks, None))
                try:
                    await asyncio.wait((coming, leaving), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not coming.done():
                        coming.cancel()
                        await asyncio.gather(coming, return_exceptions=True)
                if coming.cancelled():
                    return
                chunk = coming.result()
                if chunk is None:
                    return
                yield chunk
        except LauncherError as error:
            if error.reason != "NOT_FOUND":
                raise failures.of_launcher(error, f"reading {self.position.device_id}") from error
        finally:
            leaving.cancel()
            await self._console.close()

    async def write(self, data: bytes) -> None:
        """Give input to the guest."""
        if self._writers.of.get(self._key) is not self:
            raise WrongState(
                f"this session may not write to {self.position.device_id}", device_id=self.position.device_id
            )
        try:
            await self._console.write(data)
        except LauncherError as error:
            raise WrongState(
                f"{self.position.device_id} takes no input: {error.message}", device_id=self.position.device_id
            ) from error

    async def resize(self, columns: int, rows: int) -> None:
        """Do nothing: the ports have no window."""

    async def take_over(self) -> None:
        """End for another writer."""
        self._taken_over = True
        self._leave()
        # The launcher reads this before it hears of the next writer: one line, one order.
        await self._console.release()

    async def close(self) -> None:
        """Leave."""
        self._leave()
        # Somebody who waits for output closes it himself, once he has been let go.
        if self._coming is None or self._coming.done():
            await self._console.close()

    def _leave(self) -> None:
        self._leaving.set()
        if self._writers.of.get(self._key) is self:
            del self._writers.of[self._key]


class Consoles:
    """Is the driver's Console."""

    def __init__(self, guests: Guests) -> None:
        self._guests = guests
        self._writers = _Writers()

    async def open_console(
        self, domain: DomainRef, device_id: str, *, writable: bool, force: bool, epoch: str, offset: int | None
    ) -> ConsoleSession:
        """Join a port of an active guest."""
        guest = self._guests.active(domain.uid)
        if guest is None:
            raise WrongState(f"{domain.name} has no guest", resource=domain.name, state="SHUT_OFF")
        if device_id not in guest.spec.serials and device_id not in guest.spec.consoles:
            raise DeviceNotFound(
                f"{domain.name} has no serial or console port {device_id}", resource=domain.name, device_id=device_id
            )
        if writable and force:
            holder = self._writers.of.get((domain.uid, device_id))
            if holder is not None:
                await holder.take_over()
        return await self._attach(domain, device_id, epoch, offset, writable=writable, follow=True)

    async def read_console_log(
        self, domain: DomainRef, device_id: str, *, epoch: str, offset: int, follow: bool
    ) -> ConsoleSession:
        """Read the kept output of a port."""
        return await self._attach(domain, device_id, epoch, offset, writable=False, follow=follow)

    async def _attach(
        self, domain: DomainRef, device_id: str, epoch: str, offset: int | None, *, writable: bool, follow: bool
    ) -> Session:
        guest_name, port = naming.guest(domain.uid), naming.console(device_id)
        key = (domain.uid, device_id)
        try:
            present, end = await self._end(guest_name, port)
            stale = bool(epoch) and epoch != _epoch(present)
            if not stale and offset is not None and offset > end:
                raise RangeBeyondEnd(f"offset {offset} is behind the end {end} of {device_id}", offset=offset, end=end)
            # Of another epoch nothing can be told but that it is gone: what follows is the oldest that is held.
            place = {} if stale or offset is None else {"epoch": present, "offset": offset}
            newest = offset is None and not stale
            console = await self._join(key, guest_name, port, place, newest=newest, follow=follow, write=writable)
        except LauncherError as error:
            raise _refused(error, domain, device_id) from error
        session = Session(
            console,
            ConsolePosition(device_id, _epoch(console.epoch), console.offset, writable),
            key=key,
            writers=self._writers,
            follow=follow,
            stale=stale,
        )
        if writable:
            self._writers.of[key] = session
        return session

    async def _join(
        self,
        key: tuple[str, str],
        guest_name: str,
        port: str,
        place: dict[str, int],
        *,
        newest: bool,
        follow: bool,
        write: bool,
    ) -> launcher.Console:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + LEAVING_SECONDS
        while True:
            try:
                return await self._guests.launcher.console(
                    guest_name, console=port, newest=newest, follow=follow, write=write, **place
                )
            except LauncherError as error:
                leaving = error.reason == "WRITER_BUSY" and key not in self._writers.of
                if not leaving or loop.time() > deadline:
                    raise
            # A writer of ours has hung up, on a line of its own; the launcher tells nobody when it has noticed.
            await asyncio.sleep(LEAVING_PAUSE_SECONDS)

    async def _end(self, guest_name: str, port: str) -> tuple[int, int]:
        """Return the present epoch of a port and the offset behind its last byte."""
        console = await self._guests.launcher.console(guest_name, console=port, newest=True, follow=False)
        try:
            return console.epoch, console.offset
        finally:
            await console.close()


def _epoch(number: int) -> str:
    return str(number)


def _refused(error: LauncherError, domain: DomainRef, device_id: str) -> Exception:
    if error.reason in ("NOT_FOUND", "NO_CONSOLE"):
        return ResourceNotFound(
            f"no output of {device_id} of {domain.name} is kept", resource=domain.name, device_id=device_id
        )
    if error.reason == "WRITER_BUSY":
        return ResourceInUse(
            f"another caller writes to {device_id}; read only, or take it with `force`",
            resource=domain.name,
            device_id=device_id,
            holder="another caller",
        )
    if error.reason == "TOO_MANY":
        return QuotaExceeded(
            f"{device_id} of {domain.name} has all the readers that it can have: {error.message}",
            resource=domain.name,
            device_id=device_id,
        )
    if error.reason == "NOT_RUNNING":
        return WrongState(f"{domain.name} has no guest", resource=domain.name, state="SHUT_OFF")
    return failures.of_launcher(error, f"opening {device_id} of {domain.name}")

"""One connection to a QEMU's monitor: the one place that knows `qemu.qmp`.

Its import costs a few milliseconds and MiB, and is left until the first guest.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from virtfleet_compute.drivers.qemu.failures import shown
from virtfleet_service.errors import HypervisorFailed

if TYPE_CHECKING:
    from qemu.qmp import QMPClient
    from qemu.qmp.message import Message

Event = Mapping[str, Any]


class MonitorLost(Exception):
    """Nobody answers at the monitor: the connection broke, or an answer did not come in time.

    Whether a command that was under way has been carried out is unknown: ask, then act.
    """


@functools.cache
def _client_class() -> type[QMPClient]:
    """Return the library's client, mended.

    It makes a text of each message, for a log that nobody reads. And it takes the first message after its hand is held
    out for the answer: QEMU may tell of an event just before, and the handshake failed for that.
    """
    from qemu.qmp import QMPClient
    from qemu.qmp.protocol import Runstate

    class Client(QMPClient):
        async def _do_recv(self) -> Message:
            message = await super()._do_recv()
            while "event" in message and self.runstate is Runstate.CONNECTING:
                await self._on_message(message)
                message = await super()._do_recv()
            return message

        def _cb_outbound(self, msg: Message) -> Message:
            return msg

        def _cb_inbound(self, msg: Message) -> Message:
            return msg

    return Client


class Monitor:
    """Is a connection whose greeting has come; QEMU serves one at a time."""

    def __init__(
        self, client: QMPClient, on_event: Callable[[Event], None], on_lost: Callable[[Monitor], None]
    ) -> None:
        self._client = client
        self._on_event = on_event
        self._on_lost = on_lost
        self._watcher: asyncio.Task[None] | None = None
        self._hanging_up: asyncio.Task[None] | None = None
        self._closing = False

    @classmethod
    async def connect(
        cls,
        line: socket.socket,
        *,
        timeout_seconds: float,
        on_event: Callable[[Event], None],
        on_lost: Callable[[Monitor], None],
    ) -> Monitor:
        """Shake hands over a connected socket, which becomes the monitor's, also on failure.

        Args:
            line: The socket.
            timeout_seconds: How long the greeting may take; one that another client holds up never comes.
            on_event: Is called for every event, in order, from the moment of the greeting on.
            on_lost: Is called once, when the connection breaks by itself.

        Raises:
            MonitorLost: No greeting came, or another than QEMU's.
        """
        # It logs as errors what it raises as well.
        logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)
        client = _client_class()()
        monitor = cls(client, on_event, on_lost)

        # A filter that keeps nothing: the library's queue of events has no bound, nor has its history.
        client.events.event_filter = monitor._take  # of the same class
        try:
            async with asyncio.timeout(timeout_seconds):
                await client.connect(line)
        except TimeoutError:
            line.close()
            raise MonitorLost(f"no greeting in {timeout_seconds:g} s") from None
        # Whoever took a QEMU over sends what the library never thought of: any exception of its own comes of that.
        except Exception as error:
            line.close()
            raise MonitorLost(f"no greeting: {shown(error)}") from error
        except BaseException:
            line.close()
            raise
        monitor._watcher = asyncio.create_task(monitor._watch(), name="qmp")  # of the same class
        return monitor

    def _take(self, event: Message) -> bool:
        self._on_event(event)
        return False

    async def _watch(self) -> None:
        from qemu.qmp.protocol import Runstate

        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        await self._hung_up()
        if not self._closing:
            self._on_lost(self)

    async def _hung_up(self) -> None:
        # Once: the library does not like to be told twice.
        if self._hanging_up is None:
            self._hanging_up = asyncio.create_task(self._hang_up(), name="qmp hang-up")
        await asyncio.shield(self._hanging_up)

    async def _hang_up(self) -> None:
        try:
            await self._client.disconnect()
        # Why it broke, which may be anything that can be sent; that it is gone is all that was wanted.
        except Exception:  # noqa: BLE001
            return

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout_seconds: float
    ) -> Any:  # noqa: ANN401  # JSON
        """Give a command and return what it returns.

        Raises:
            HypervisorFailed: QEMU refused it; nothing happened.
            MonitorLost: No answer came.
        """
        from qemu.qmp import ExecuteError, QMPError

        try:
            async with asyncio.timeout(timeout_seconds):
                return await self._client.execute(command, arguments)
        except ExecuteError as error:
            said = shown(error)
            raise HypervisorFailed(f"QEMU refused {command}: {said}", command=command, said=said) from error
        except TimeoutError:
            raise MonitorLost(f"no answer to {command} in {timeout_seconds:g} s") from None
        except (QMPError, OSError) as error:
            raise MonitorLost(f"the monitor hung up during {command}: {shown(error)}") from error

    async def close(self) -> None:
        """Hang up. The guest notices nothing. May be called again."""
        self._closing = True
        await self._hung_up()
        if self._watcher is not None:
            await self._watcher

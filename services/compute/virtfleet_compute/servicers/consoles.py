"""ConsoleService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from virtfleet.compute.v1 import console_pb2
from virtfleet_compute.consoles import Consoles

if TYPE_CHECKING:
    from virtfleet_service.call import Call


class ConsoleServicer:
    """Serves `virtfleet.compute.v1.ConsoleService`."""

    def __init__(self, consoles: Consoles) -> None:
        self._consoles = consoles

    def open_console(
        self, requests: AsyncIterator[console_pb2.OpenConsoleRequest], call: Call
    ) -> AsyncIterator[console_pb2.OpenConsoleResponse]:
        """Answer OpenConsole."""
        return self._consoles.open(requests, call)

    def read_console_log(
        self, request: console_pb2.ReadConsoleLogRequest, _call: Call
    ) -> AsyncIterator[console_pb2.ReadConsoleLogResponse]:
        """Answer ReadConsoleLog."""
        return self._consoles.read(request)

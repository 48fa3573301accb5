"""What a client still sends when its call has ended already: read and dropped for a moment before it is told.

A call may be answered before its client has sent all: it is refused by its first message, or the disk is full. The
status is on its way at once, but some client libraries (that of asyncio in Python among them) take the message that
they cannot send for the end of the call, and show INTERNAL instead of the status that the server gave. Most clients are
done within a moment, and then every one of them gets the real answer.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Final

import grpc

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

LIMIT_SECONDS: Final = 2.0
"""For so long a client may go on sending; then it is told anyway."""

SILENCE_SECONDS: Final = 0.05
"""A client that also reads while it sends is told when it has sent nothing for so long: it may be waiting for us."""


async def drop(context: Context, *, client_reads: bool) -> None:
    """Read what the client still sends, until it has sent all or the time is over.

    Args:
        context: The call, of which nobody reads any more.
        client_reads: The method streams in both directions.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LIMIT_SECONDS):
            while True:
                async with asyncio.timeout(SILENCE_SECONDS if client_reads else None):
                    if await context.read() is grpc.aio.EOF:
                        return

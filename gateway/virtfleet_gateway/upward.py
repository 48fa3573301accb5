"""One direction of a stream that passes: what the caller sends, to the node, also when the node has answered early."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import grpc

from virtfleet_service import unread

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[bytes, bytes]

_EOF: Final = grpc.aio.EOF


class Upward:
    """Carries the caller's messages and its half close to the node, as a task of its own.

    Args:
        context: The caller's call.
        call: The call to the node.
        first: The caller's first message, which has been read already; EOF: there is none.
        client_reads: The method streams in both directions.
    """

    def __init__(self, context: Context, call: Any, first: Any, *, client_reads: bool) -> None:  # noqa: ANN401
        self._context = context
        self._call = call
        self._client_reads = client_reads
        self._task = asyncio.get_running_loop().create_task(self._run(first))

    async def _run(self, message: Any) -> bool:  # noqa: ANN401
        """Send until the caller has sent all (True) or the node has ended the call (False)."""
        call = self._call
        try:
            await call.wait_for_connection()
            while message is not _EOF:
                if call.done():
                    return False
                # Not `call.write`: where that fails because the node has answered already, it makes the status of the
                # call INTERNAL, and what the node has said is lost.
                await call._cython_call.send_serialized_message(message)  # noqa: SLF001  # see above
                message = await self._context.read()
            await call.done_writing()
        except (grpc.aio.AioRpcError, grpc.aio.InternalError, grpc.aio.UsageError, asyncio.InvalidStateError):
            # The node has ended the call: its status is told by the other direction.
            return False
        return True

    async def settle(self) -> None:
        """The node has ended the call: drop what the caller still sends, for a moment, before it is told."""
        seconds = unread.SILENCE_SECONDS if self._client_reads else unread.LIMIT_SECONDS
        await asyncio.wait((self._task,), timeout=seconds)
        if self._task.done() and not self._task.result():
            await unread.drop(self._context, client_reads=self._client_reads)

    async def close(self) -> None:
        """End both."""
        self._call.cancel()
        self._task.cancel()
        await asyncio.wait((self._task,))

"""Carrying one call that is under way: its messages, its metadata and its end, in both directions.

One message is under way in each direction at a time: HTTP/2 flow control holds the sender back, nothing piles up here.

A node's own status passes unchanged. A failure of the connection under a call that has been sent becomes
UNAVAILABLE NODE_UNREACHABLE with `sent=true` in its metadata: the node may have done what the call asks. Services put
details into every status of their own, so UNAVAILABLE without any trailing metadata is the transport's; so is
CANCELLED, which gRPC gives to calls that wait inside a server when it stops, and RESOURCE_EXHAUSTED, which it gives for
a message or for metadata that are larger than it takes.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol, cast

import grpc
import grpc.aio

from virtfleet_gateway.upward import Upward
from virtfleet_service.errors import MessageTooLarge

if TYPE_CHECKING:
    from virtfleet_gateway.channels import Lane
    from virtfleet_service.errors import VirtfleetError

    Context = grpc.aio.ServicerContext[bytes, bytes]
    Metadatum = tuple[str, str | bytes]

DETAILS_METADATA: Final = "grpc-status-details-bin"

_EOF: Final = grpc.aio.EOF
_OF_THE_TRANSPORT: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)

_LONGEST_SECONDS: Final = 365.0 * 24 * 3600


class Passport(Protocol):
    """Is an authenticated caller with what is sent on about it."""

    @property
    def conveyed(self) -> bytes:
        """The serialised `virtfleet.node.v1.ConveyedCaller`."""

    def permit(self, permission: str, name: str, *, checks_name: bool = True) -> None:
        """Check that the caller holds a permission on the resource that the call names.

        Args:
            permission: What the method needs.
            name: The name in the call.
            checks_name: False: it says nothing of what the call is about, and the caller may hold it on anything.

        Raises:
            PermissionMissing: It does not.
        """

    def still_good(self, permission: str = "") -> VirtfleetError | None:
        """Return why a call of the caller may not go on; None: it may.

        Args:
            permission: What the call needs, if it is a stream; empty: only the certificate is judged.
        """


class OpenCalls:
    """Holds the calls under way, so that a caller whose certificate or permission is taken meanwhile is cut off."""

    def __init__(self) -> None:
        self._calls: dict[grpc.aio.Call, tuple[Passport, str, list[VirtfleetError]]] = {}

    def __len__(self) -> int:
        return len(self._calls)

    @contextlib.contextmanager
    def entered(self, call: grpc.aio.Call, passport: Passport, permission: str = "") -> Any:  # noqa: ANN401
        """Keep a call for the time of the block; the list that it gives holds why the call was cut off, if it was.

        Args:
            call: The call to the node.
            passport: The caller.
            permission: What a stream needs as long as it lasts.
        """
        reasons: list[VirtfleetError] = []
        self._calls[call] = passport, permission, reasons
        try:
            yield reasons
        finally:
            del self._calls[call]

    def end(self, error: VirtfleetError) -> None:
        """End all calls with an error, because the gateway stops."""
        for call, (_, _, reasons) in list(self._calls.items()):
            reasons.append(error)
            call.cancel()

    def sweep(self) -> int:
        """End the calls of callers that are no longer believed or allowed; returns how many. Called every second."""
        ended = 0
        for call, (passport, permission, reasons) in list(self._calls.items()):
            error = passport.still_good(permission)
            if error is not None:
                reasons.append(error)
                call.cancel()
                ended += 1
        return ended


def time_left(context: Context) -> float | None:
    """Return how many seconds a call to a node may take; None: as many as it likes.

    Who means "for ever" sends the longest time that its language has, 292 years in Go and Java. gRPC hands that to us,
    and takes it back for a moment in the past.
    """
    left = cast("float | None", context.time_remaining())
    return left if left is None else min(left, _LONGEST_SECONDS)


def is_cancelled() -> bool:
    """Tell whether the present task itself is being cancelled, and not only a call that it waits for."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


async def abort(context: Context, error: VirtfleetError) -> NoReturn:
    """End a call with an error of the gateway's own."""
    status = error.to_status()
    await context.abort(error.code, status.message, ((DETAILS_METADATA, status.SerializeToString()),))


async def pump_down(
    call: Any,  # noqa: ANN401
    context: Context,
    lane: Lane,
    cut: list[VirtfleetError],
    up: Upward | None = None,
) -> None:
    """Carry the node's headers, messages and status to the caller."""
    try:
        initial = await call.initial_metadata()
        await context.send_initial_metadata(tuple(initial))
        while (message := await call.read()) is not _EOF:
            await context.write(message)
        code = await call.code()
        trailing = await call.trailing_metadata()
        if code is grpc.StatusCode.OK:
            if trailing:
                context.set_trailing_metadata(tuple(trailing))
            return
        error = grpc.aio.AioRpcError(code, initial, trailing, await call.details())
    except grpc.aio.AioRpcError as failure:
        error = failure
    except asyncio.CancelledError:
        if not cut and is_cancelled():
            raise
        await abort(context, cut[0] if cut else given_up(lane))
    if cut:
        await abort(context, cut[0])
    if up is not None:
        await up.settle()
    await pass_failure(context, lane, error)


async def one_reply(
    call: Any,  # noqa: ANN401
    context: Context,
    lane: Lane,
    cut: list[VirtfleetError],
    up: Upward | None = None,
) -> bytes:
    """Return the node's one answer, with its headers and trailers told to the caller, or end the call as it ended."""
    try:
        reply: bytes = await call
        if up is not None:
            await up.settle()
        initial = await call.initial_metadata()
        if initial:
            await context.send_initial_metadata(tuple(initial))
        trailing = await call.trailing_metadata()
        if trailing:
            context.set_trailing_metadata(tuple(trailing))
        return reply
    except grpc.aio.AioRpcError as failure:
        error = failure
    except asyncio.CancelledError:
        if not cut and is_cancelled():
            raise
        await abort(context, cut[0] if cut else given_up(lane))
    if cut:
        await abort(context, cut[0])
    if up is not None:
        await up.settle()
    return await pass_failure(context, lane, error)


def given_up(lane: Lane) -> VirtfleetError:
    """Return the error for a call that ended with its lane: the node has been removed, or is elsewhere now."""
    return lane.unreachable(sent=True, cause="its connection was given up")


async def pass_failure(context: Context, lane: Lane, error: grpc.aio.AioRpcError) -> NoReturn:
    """End the caller's call as the node's ended."""
    trailing = tuple(error.trailing_metadata() or ())
    if not trailing:
        if error.code() in _OF_THE_TRANSPORT:
            await abort(context, lane.unreachable(sent=True, cause=error.details() or ""))
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            await abort(context, _too_large(lane, error.details() or ""))
    await context.abort(error.code(), error.details() or "", cast("Any", trailing))


def _too_large(lane: Lane, cause: str) -> MessageTooLarge:
    """Return the error for what the transport itself refuses to carry: a message, or the metadata of an answer."""
    return MessageTooLarge(
        f"Between the gateway and service {lane.service} of node {lane.node} something is too large: {cause}",
        node=f"nodes/{lane.node}",
        service=lane.service,
        cause=cause,
    )


async def pump(
    lane: Lane,
    path: str,
    request: Any,  # noqa: ANN401
    context: Context,
    metadata: tuple[Metadatum, ...],
    passport: Passport,
    open_calls: OpenCalls,
) -> bytes | None:
    """Carry a call of health or reflection to one service of a node.

    Args:
        lane: The lane to it.
        path: The path of the method.
        request: The one request, or, for a client stream, grpc's iterator.
        context: The call.
        metadata: What is sent on.
        passport: The caller.
        open_calls: Cuts callers off.
    """
    client_streaming = not isinstance(request, bytes)
    start: Any = lane.callable(path, client_streaming=client_streaming, server_streaming=_answers_streaming(path))
    remaining = time_left(context)
    call = (
        start(timeout=remaining, metadata=metadata)
        if client_streaming
        else start(request, timeout=remaining, metadata=metadata)
    )
    up = Upward(context, call, await context.read(), client_reads=True) if client_streaming else None
    try:
        with open_calls.entered(call, passport) as cut:
            if not _answers_streaming(path):
                return await one_reply(call, context, lane, cut)
            await pump_down(call, context, lane, cut, up)
            return None
    finally:
        call.cancel()
        if up is not None:
            await up.close()


def _answers_streaming(path: str) -> bool:
    return path.endswith(("/Watch", "/ServerReflectionInfo"))

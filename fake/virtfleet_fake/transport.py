"""Calls from the gateway to a node in the same process: grpc.aio's interfaces over queues, where faults can strike.

The gateway sees a channel with its states and calls with their messages and trailers; the node sees a servicer
context. In between a `Link` stands for the network: it can freeze, be slow, be cut, and fail calls.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, NoReturn, cast

import grpc
import grpc.aio

from virtfleet_service.call import CALLER_KEY

_EOF: Final = grpc.aio.EOF
_QUEUE_MESSAGES: Final = 8
"""How many messages are under way in one direction: the window of flow control."""

PING_SECONDS: Final = 4.5
"""How long the pings of a real connection take to notice a peer that is frozen."""

Interceptor = Callable[[str], "CallFailure | None"]
"""Says, for the path of a method, how the call fails; None: it does not."""


class CallFailure:
    """Is how one call fails.

    Args:
        code: Its status.
        details: The text of the status.
        trailing: Its trailers.
        after_effect: Whether the node has done what the call asks.
    """

    def __init__(
        self, code: grpc.StatusCode, details: str, trailing: tuple[tuple[str, bytes], ...], *, after_effect: bool
    ) -> None:
        self.code = code
        self.details = details
        self.trailing = trailing
        self.after_effect = after_effect


class Link:
    """Stands for the network between the gateway and one node.

    Args:
        own_caller: Conveys the gateway itself, for what it asks of its own accord.
    """

    def __init__(self, own_caller: bytes) -> None:
        self.own_caller = own_caller
        self.find: Callable[[str], grpc.RpcMethodHandler[Any, Any] | None] = lambda _: None
        self.delay_seconds = 0.0
        self.interceptor: Interceptor | None = None
        self.calls: set[InProcessCall] = set()
        self._up = True
        self._moving = asyncio.Event()
        self._moving.set()
        self._watchers: set[asyncio.Future[None]] = set()
        self._ping: asyncio.TimerHandle | None = None

    @property
    def state(self) -> grpc.ChannelConnectivity:
        """The state that channels over the link have."""
        return grpc.ChannelConnectivity.READY if self._up else grpc.ChannelConnectivity.TRANSIENT_FAILURE

    async def state_changed(self, last: grpc.ChannelConnectivity) -> None:
        """Return when the state is another one."""
        while self.state is last:
            watcher = asyncio.get_running_loop().create_future()
            self._watchers.add(watcher)
            try:
                await watcher
            finally:
                self._watchers.discard(watcher)

    def set(self, *, up: bool, frozen: bool, delay_seconds: float) -> None:
        """Let the link be as faults have it."""
        self.delay_seconds = delay_seconds
        if frozen:
            if self._moving.is_set():
                self._moving.clear()
                self._ping = asyncio.get_running_loop().call_later(PING_SECONDS, self._notice)
        else:
            self._moving.set()
            if self._ping is not None:
                self._ping.cancel()
                self._ping = None
        self._switch(up=up)
        if not up:
            self.cut("the connection was closed")

    def _notice(self) -> None:
        """Give the connection up, as pings that are not answered make a channel do."""
        self._ping = None
        self._switch(up=False)
        self.cut("keepalive: no answer to a ping")

    def _switch(self, *, up: bool) -> None:
        if up != self._up:
            self._up = up
            for watcher in self._watchers:
                if not watcher.done():
                    watcher.set_result(None)

    def cut(self, why: str) -> None:
        """End all calls, as the loss of their connection does."""
        for call in list(self.calls):
            call.lose(why)

    async def carry(self) -> None:
        """Take as long as one message takes."""
        if self.delay_seconds:
            await asyncio.sleep(self.delay_seconds)
        await self._moving.wait()


class InProcessChannel:
    """Is what the gateway has in the place of a connection."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:  # noqa: FBT001, FBT002 - grpc's own
        """Return the state of the connection."""
        del try_to_connect
        return self._link.state

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Return when the state is another one."""
        await self._link.state_changed(last_observed_state)

    def unary_unary(self, method: str, **_: object) -> Callable[..., InProcessCall]:
        """Return what starts calls of a method."""
        return self._starter(method)

    def unary_stream(self, method: str, **_: object) -> Callable[..., InProcessCall]:
        """Return what starts calls of a method."""
        return self._starter(method)

    def stream_unary(self, method: str, **_: object) -> Callable[..., InProcessCall]:
        """Return what starts calls of a method."""
        return self._starter(method)

    def stream_stream(self, method: str, **_: object) -> Callable[..., InProcessCall]:
        """Return what starts calls of a method."""
        return self._starter(method)

    def _starter(self, method: str) -> Callable[..., InProcessCall]:
        link = self._link

        def start(request: bytes | None = None, *, timeout: float | None = None, metadata: Any = ()) -> InProcessCall:  # noqa: ANN401 - grpc's own
            return InProcessCall(link, method, request, timeout, tuple(metadata or ()))

        return start

    async def close(self, grace: float | None = None) -> None:
        """Let go of the connection; its calls go on as long as they are allowed to."""
        del grace


class InProcessCall:
    """Is one call, seen from the gateway."""

    def __init__(
        self,
        link: Link,
        path: str,
        request: bytes | None,
        timeout_seconds: float | None,
        metadata: tuple[tuple[str, str | bytes], ...],
    ) -> None:
        loop = asyncio.get_running_loop()
        self._link = link
        self._up: asyncio.Queue[Any] = asyncio.Queue(_QUEUE_MESSAGES)
        self._down: asyncio.Queue[Any] = asyncio.Queue(_QUEUE_MESSAGES)
        self._initial: asyncio.Future[tuple[Any, ...]] = loop.create_future()
        self._ended: asyncio.Future[tuple[grpc.StatusCode, str, tuple[Any, ...]]] = loop.create_future()
        self._reply: bytes | None = None
        if all(key != CALLER_KEY for key, _ in metadata):
            metadata = (*metadata, (CALLER_KEY, link.own_caller))
        self._context = _Context(self, path, metadata, timeout_seconds)
        self._task = loop.create_task(self._run(path, request, timeout_seconds))
        link.calls.add(self)

    # The node's side.

    async def _run(self, path: str, request: bytes | None, timeout_seconds: float | None) -> None:
        context = self._context
        try:
            async with asyncio.timeout(timeout_seconds):
                if self._link.state is not grpc.ChannelConnectivity.READY:
                    self._end(grpc.StatusCode.UNAVAILABLE, "the connection is down", ())
                    return
                failure = self._link.interceptor(path) if self._link.interceptor is not None else None
                await self._link.carry()
                if failure is None or failure.after_effect:
                    self._reply = await self._serve(path, request)
                    await self._link.carry()
                if failure is not None:
                    self._end(failure.code, failure.details, failure.trailing)
                else:
                    self._end(grpc.StatusCode.OK, "", context.trailing)
        except TimeoutError:
            self._end(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", ())
        except grpc.aio.AbortError:
            await self._link.carry()
            self._end(context.status, context.status_text, context.trailing)
        except asyncio.CancelledError:
            self._end(grpc.StatusCode.CANCELLED, "the call was cancelled", ())
            raise
        except Exception as error:  # noqa: BLE001 - what a transport does with a handler that fails
            self._end(grpc.StatusCode.UNKNOWN, f"{type(error).__name__}: {error}", ())
        finally:
            self._link.calls.discard(self)

    async def _serve(self, path: str, request: bytes | None) -> bytes | None:
        handler = cast("Any", self._link.find(path))
        if handler is None:
            await self._context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        given = self._context if handler.request_streaming else request
        if handler.response_streaming:
            behaviour = handler.stream_stream if handler.request_streaming else handler.unary_stream
            await behaviour(given, self._context)
            return None
        behaviour = handler.stream_unary if handler.request_streaming else handler.unary_unary
        reply: bytes | None = await behaviour(given, self._context)
        return reply

    def _end(self, code: grpc.StatusCode, details: str, trailing: tuple[Any, ...]) -> None:
        if not self._ended.done():
            self._ended.set_result((code, details, trailing))
        self.begin(())

    def begin(self, metadata: tuple[Any, ...]) -> None:
        """Send headers, if none were sent yet."""
        if not self._initial.done():
            self._initial.set_result(metadata)

    def lose(self, why: str) -> None:
        """End the call because its connection is gone."""
        self._end(grpc.StatusCode.UNAVAILABLE, why, ())
        self._task.cancel()

    async def give(self, message: bytes) -> None:
        """Send a message of the node."""
        self.begin(())
        await self._link.carry()
        await self._down.put(message)

    async def take(self) -> Any:  # noqa: ANN401 - bytes, or grpc's end of a stream
        """Receive a message of the gateway."""
        message = await self._up.get()
        await self._link.carry()
        return message

    # The gateway's side.

    def __await__(self) -> Any:  # noqa: ANN401 - as grpc's calls
        """Wait for the one reply."""
        return self._one().__await__()

    async def _one(self) -> bytes:
        try:
            code, details, trailing = await asyncio.shield(self._ended)
        except asyncio.CancelledError:
            self.cancel()
            raise
        if code is not grpc.StatusCode.OK or self._reply is None:
            raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details)
        return self._reply

    async def read(self) -> Any:  # noqa: ANN401 - bytes, or grpc's end of a stream
        """Return the next message; the end of the stream when there is none."""
        while True:
            if not self._down.empty():
                return self._down.get_nowait()
            if self._ended.done():
                code, details, trailing = self._ended.result()
                if code is grpc.StatusCode.OK:
                    return _EOF
                raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details)
            getter = asyncio.ensure_future(self._down.get())
            try:
                await asyncio.wait(_all(getter, self._ended), return_when=asyncio.FIRST_COMPLETED)
                if getter.done():
                    return getter.result()
            finally:
                getter.cancel()

    async def write(self, message: Any) -> None:  # noqa: ANN401 - bytes, or grpc's end of a stream
        """Send a message.

        Raises:
            asyncio.InvalidStateError: The call has ended.
        """
        if self._ended.done():
            raise asyncio.InvalidStateError("the call has ended")
        putter = asyncio.ensure_future(self._up.put(message))
        try:
            await asyncio.wait(_all(putter, self._ended), return_when=asyncio.FIRST_COMPLETED)
            if not putter.done():
                raise asyncio.InvalidStateError("the call has ended")
        finally:
            putter.cancel()

    async def wait_for_connection(self) -> None:
        """Return when the connection stands, or the call has ended."""

    @property
    def _cython_call(self) -> InProcessCall:
        """The part of grpc.aio's calls below `write`, which the gateway sends by (`virtfleet_gateway.upward`)."""
        return self

    async def send_serialized_message(self, message: bytes) -> None:
        """Send a message."""
        await self.write(message)

    async def done_writing(self) -> None:
        """Send the end of the stream."""
        await self.write(_EOF)

    async def initial_metadata(self) -> tuple[Any, ...]:
        """Return the headers."""
        return await asyncio.shield(self._initial)

    async def trailing_metadata(self) -> tuple[Any, ...]:
        """Return the trailers."""
        return (await asyncio.shield(self._ended))[2]

    async def code(self) -> grpc.StatusCode:
        """Return the status."""
        return (await asyncio.shield(self._ended))[0]

    async def details(self) -> str:
        """Return the text of the status."""
        return (await asyncio.shield(self._ended))[1]

    def done(self) -> bool:
        """Tell whether the call has ended."""
        return self._ended.done()

    def cancel(self) -> bool:
        """End the call; False: it has ended."""
        if self._ended.done():
            return False
        self._end(grpc.StatusCode.CANCELLED, "Locally cancelled by application!", ())
        self._task.cancel()
        return True


def _all(*futures: asyncio.Future[Any]) -> list[asyncio.Future[Any]]:
    return list(futures)


class _Context:
    """Is one call, seen from the node: what handlers use of `grpc.aio.ServicerContext`."""

    def __init__(
        self,
        call: InProcessCall,
        path: str,
        metadata: tuple[tuple[str, str | bytes], ...],
        timeout_seconds: float | None,
    ) -> None:
        self._call = call
        self._path = path
        self._metadata = metadata
        self._deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        self.status = grpc.StatusCode.OK
        self.status_text = ""
        self.trailing: tuple[Any, ...] = ()

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return self._metadata

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}

    def peer(self) -> str:
        return "in-process"

    def time_remaining(self) -> float | None:
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)

    async def send_initial_metadata(self, metadata: tuple[Any, ...]) -> None:
        self._call.begin(tuple(metadata))

    def set_trailing_metadata(self, metadata: tuple[Any, ...]) -> None:
        self.trailing = tuple(metadata)

    def set_code(self, code: grpc.StatusCode) -> None:
        self.status = code

    def set_details(self, details: str) -> None:
        self.status_text = details

    def code(self) -> grpc.StatusCode:
        return self.status

    async def read(self) -> Any:  # noqa: ANN401 - bytes, or grpc's end of a stream
        return await self._call.take()

    async def write(self, message: bytes) -> None:
        await self._call.give(message)

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: tuple[Any, ...] = ()
    ) -> NoReturn:
        self.status, self.status_text, self.trailing = code, details, tuple(trailing_metadata)
        raise grpc.aio.AbortError(details)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._messages()

    async def _messages(self) -> AsyncIterator[bytes]:
        while (message := await self._call.take()) is not _EOF:
            yield message

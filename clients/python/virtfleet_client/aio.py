"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
from google.longrunning import operations_pb2
from google.protobuf import duration_pb2

from virtfleet_client import calls, operations
from virtfleet_client.contexts import locate
from virtfleet_client.endpoint import Credentials, Endpoint
from virtfleet_client.errors import DeadlineExceeded, ResumeTokenCompacted, SlowReader, VirtfleetError, from_call
from virtfleet_client.pages import Pages
from virtfleet_client.services import Services
from virtfleet_client.transport import Source, Starter, Switch
from virtfleet_client.watch import Resumption, watch_path

if TYPE_CHECKING:
    from collections.abc import Callable

    from google.protobuf.message import Message

    from virtfleet_client.operations import Progress, Result


def typed(failure: grpc.aio.AioRpcError) -> VirtfleetError:
    """Return the typed exception for a failure of a stream; unary calls raise it by themselves."""
    return from_call(failure.code(), failure.details(), tuple(failure.trailing_metadata() or ()))


class _UnaryCalls(grpc.aio.UnaryUnaryClientInterceptor):
    """Sets request ids, repeats what is safe, and turns failures into typed exceptions."""

    def __init__(self, source: Source) -> None:
        self._source = source

    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:  # noqa: ANN401  # gRPC's own types
        method = details.method.decode() if isinstance(details.method, bytes) else details.method
        request, repeatable = calls.prepare(method, request)
        loop = asyncio.get_running_loop()
        ends_at = None if details.timeout is None else loop.time() + details.timeout
        attempt = 0
        while True:
            attempt += 1
            if ends_at is not None:
                details = details._replace(timeout=max(0.0, ends_at - loop.time()))
            try:
                call = await continuation(details, request)
                await call
            except grpc.aio.AioRpcError as failure:
                error = self._source.explained(typed(failure))
                if not (repeatable and calls.is_lost(error) and attempt < calls.ATTEMPTS):
                    raise error from failure
                delay = calls.delay_seconds(attempt, error.retry_delay_seconds)
                if ends_at is not None and loop.time() + delay >= ends_at:
                    raise error from failure
                await asyncio.sleep(delay)
            else:
                return call


class AsyncFleet(Services):
    """Is a connection to a gateway or to a node, with an asyncio stub for each service (`domains`, `volumes`, …).

    Unary calls raise a `VirtfleetError` on failure, send a request_id with each mutation, and are repeated where they
    were lost and that cannot have a second effect. Streams raise `grpc.aio.AioRpcError`; `typed` names its reason.
    """

    def __init__(self, endpoint: Endpoint, credentials: Credentials | None = None) -> None:
        self._bare: list[grpc.aio.Channel] = []
        self._source = Source(endpoint, credentials)
        super().__init__(_SwitchedChannel(Switch(self._source, self._open, lambda _: None)))

    def _open(self, target: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
        options, interceptors = self._source.endpoint.options(), [_UnaryCalls(self._source)]
        if credentials is not None:
            channel = grpc.aio.secure_channel(target, credentials, options=options, interceptors=interceptors)
        else:
            channel = grpc.aio.insecure_channel(target, options=options, interceptors=interceptors)
        self._bare.append(channel)
        return channel

    async def close(self) -> None:
        """End all calls and connections."""
        for channel in self._bare:
            await channel.close()
        await asyncio.to_thread(self._source.close)

    async def wait(
        self,
        operation: operations_pb2.Operation,
        kind: type[Result],
        *,
        progress: Progress | None = None,
        timeout_seconds: float | None = None,
    ) -> Result:
        """Wait until an operation ends and return its response; arguments and errors are those of `Fleet.wait`."""
        loop = asyncio.get_running_loop()
        ends_at = None if timeout_seconds is None else loop.time() + timeout_seconds
        failures = 0
        while not operation.done:
            if progress is not None:
                progress(operations.metadata_of(operation))
            left = operations.WAIT_SECONDS if ends_at is None else min(operations.WAIT_SECONDS, ends_at - loop.time())
            if left <= 0:
                raise operations.not_ended(operation, timeout_seconds)
            patience = duration_pb2.Duration()
            patience.FromNanoseconds(int(min(left, 0.5 if progress else left) * 1e9))
            look = operations_pb2.WaitOperationRequest(name=operation.name, timeout=patience)
            limit = left + operations.GRACE_SECONDS
            if ends_at is not None:
                limit = min(limit, max(ends_at - loop.time(), 0.0))
            try:
                operation = await self.operations.WaitOperation(look, timeout=limit)
            except VirtfleetError as obstacle:
                if not (calls.is_lost(obstacle) or isinstance(obstacle, DeadlineExceeded)):
                    raise
                failures += 1
                delay = calls.delay_seconds(failures, obstacle.retry_delay_seconds)
                if ends_at is not None and loop.time() + delay >= ends_at:
                    raise operations.not_ended(operation, timeout_seconds) from obstacle
                await asyncio.sleep(delay)
            else:
                failures = 0
        if progress is not None:
            progress(operations.metadata_of(operation))
        return operations.result_of(operation, kind)

    async def pages(
        self, method: Callable[..., Any], request: Message, *, timeout_seconds: float = 30.0
    ) -> AsyncIterator[Any]:
        """Yield every resource of a list, page by page; arguments and errors are those of `Fleet.pages`."""
        pages = Pages(request)
        while True:
            answer = await method(pages.request, timeout=timeout_seconds)
            for resource in pages.items(answer):
                yield resource
            if not pages.goes_on(answer):
                return

    def watch(self, request: Message, *, resnapshot: bool = False) -> AsyncIterator[Any]:
        """Yield the answers of a watch for ever; arguments and errors are those of `Fleet.watch`."""
        return self.follow(request, resnapshot=resnapshot)

    async def follow(
        self,
        request: Message,
        *,
        resnapshot: bool = False,
        on_snapshot: Callable[[], object] | None = None,
        on_connection: Callable[[bool], object] | None = None,
        on_obstacle: Callable[[VirtfleetError], object] | None = None,
    ) -> AsyncIterator[Any]:
        """Yield like `watch`; the functions are called as those of `Fleet.follow`."""
        connected = False
        resumption = Resumption(request)
        call = self.channel.unary_stream(
            watch_path(request),
            request_serializer=type(request).SerializeToString,
            response_deserializer=resumption.response_class.FromString,
        )
        while True:
            if on_snapshot is not None and resumption.in_snapshot:
                on_snapshot()
            stream = call(resumption.request)
            try:
                async for answer in stream:
                    resumption.note(answer)
                    if not connected and on_connection is not None:
                        on_connection(True)
                    connected = True
                    yield answer
            except grpc.aio.AioRpcError as failure:
                error = self._source.explained(typed(failure))
                if isinstance(error, ResumeTokenCompacted) and resnapshot:
                    resumption.forget()
                elif not (calls.is_cut(error) or isinstance(error, SlowReader)):
                    raise error from failure
                elif on_obstacle is not None:
                    on_obstacle(error)
            finally:
                stream.cancel()
            if connected and on_connection is not None:
                on_connection(False)
            connected = False
            await asyncio.sleep(resumption.delay_seconds())


class _UpwardStarter:
    """Starts calls of a method that takes a stream; what is written by hand is left as it is."""

    def __init__(self, path: str, starter: Starter) -> None:
        self._path = path
        self._starter = starter

    def __call__(self, request_iterator: Any = None, **keywords: Any) -> Any:  # noqa: ANN401  # gRPC's own
        if request_iterator is not None:
            request_iterator = calls.prepare_first_async(self._path, request_iterator)
        return self._starter(request_iterator, **keywords)


class _SwitchedChannel:
    """Is what stubs are made on: each call begins on the channel of its moment."""

    def __init__(self, switch: Switch) -> None:
        self._switch = switch

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # gRPC's own
        if name in ("unary_unary", "unary_stream"):
            return lambda *arguments, **keywords: self._switch.starter(name, *arguments, **keywords)
        if name in ("stream_unary", "stream_stream"):
            return lambda path, *arguments, **keywords: _UpwardStarter(
                path, self._switch.starter(name, path, *arguments, **keywords)
            )
        return getattr(self._switch.channel(), name)


@asynccontextmanager
async def connect_async(
    uri: str = "", credentials: Credentials | None = None, *, context: str = ""
) -> AsyncIterator[AsyncFleet]:
    """Open a connection for the length of an `async with` block; arguments and errors are those of `connect`."""
    found = locate(uri, context, credentials)
    fleet = AsyncFleet(Endpoint.parse(found.address), found.credentials)
    try:
        yield fleet
    finally:
        await fleet.close()

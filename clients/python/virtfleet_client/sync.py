"""The client for programs with threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self, TypeVar

import grpc
from google.longrunning import operations_pb2
from google.protobuf import duration_pb2

from virtfleet_client import calls, operations
from virtfleet_client.contexts import locate
from virtfleet_client.endpoint import Credentials, Endpoint
from virtfleet_client.errors import DeadlineExceeded, ResumeTokenCompacted, SlowReader, VirtfleetError, from_call
from virtfleet_client.pages import Pages
from virtfleet_client.services import Services
from virtfleet_client.transport import Source, Switch
from virtfleet_client.watch import Resumption, watch_path

if TYPE_CHECKING:
    from collections.abc import Callable

    from google.protobuf.message import Message

    from virtfleet_client.operations import Progress, Result

Item = TypeVar("Item")


def _typed(call: Any, source: Source) -> VirtfleetError:  # noqa: ANN401  # gRPC's own types
    """Return the typed exception for a call that failed."""
    return source.explained(from_call(call.code(), call.details(), call.trailing_metadata()))


class _Calls(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Sets request ids, repeats what is safe, and turns failures into typed exceptions."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:  # noqa: ANN401  # gRPC's own types
        request, repeatable = calls.prepare(details.method, request)
        ends_at = None if details.timeout is None else time.monotonic() + details.timeout
        attempt = 0
        while True:
            attempt += 1
            if ends_at is not None:
                details = details._replace(timeout=max(0.0, ends_at - time.monotonic()))
            call = continuation(details, request)
            failure = call.exception()
            if failure is None:
                return call
            error = _typed(call, self._source)
            if not (repeatable and calls.is_lost(error) and attempt < calls.ATTEMPTS):
                raise error from failure
            delay = calls.delay_seconds(attempt, error.retry_delay_seconds)
            if ends_at is not None and time.monotonic() + delay >= ends_at:
                raise error from failure
            time.sleep(delay)

    def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:  # noqa: ANN401  # as above
        return _Stream(continuation(details, request), self._source)

    def intercept_stream_unary(self, continuation: Any, details: Any, requests: Any) -> Any:  # noqa: ANN401  # as above
        call = continuation(details, calls.prepare_first(details.method, requests))
        failure = call.exception()
        if failure is not None:
            raise _typed(call, self._source) from failure
        return call

    def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:  # noqa: ANN401  # as above
        return _Stream(continuation(details, calls.prepare_first(details.method, requests)), self._source)


class _Stream:
    """Is a stream of answers whose end is a typed exception."""

    def __init__(self, call: Any, source: Source) -> None:  # noqa: ANN401  # as above
        self._call = call
        self._source = source

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:  # noqa: ANN401  # as above
        try:
            return next(self._call)
        except grpc.RpcError as failure:
            raise _typed(self._call, self._source) from failure

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # code(), cancel(), trailing_metadata() … are the call's own
        return getattr(self._call, name)


class Fleet(Services):
    """Is a connection to a gateway or to a node, with a stub for each service (`domains`, `volumes`, …).

    Every call of the stubs raises a `VirtfleetError` on failure, sends a request_id with each mutation, and is repeated
    after a loss where that cannot have a second effect. Threads may share it.
    """

    def __init__(self, endpoint: Endpoint, credentials: Credentials | None = None) -> None:
        self._bare: list[grpc.Channel] = []
        self._source = Source(endpoint, credentials)
        super().__init__(_SwitchedChannel(Switch(self._source, self._open, lambda _: None)))

    def _open(self, target: str, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
        options = self._source.endpoint.options()
        if credentials is not None:
            bare = grpc.secure_channel(target, credentials, options=options)
        else:
            bare = grpc.insecure_channel(target, options=options)
        # The old ones stay until the end: calls may run on them, and idle they cost nothing.
        self._bare.append(bare)
        return grpc.intercept_channel(bare, _Calls(self._source))

    def close(self) -> None:
        """End all calls and connections."""
        for channel in self._bare:
            channel.close()
        self._source.close()

    def wait(
        self,
        operation: operations_pb2.Operation,
        kind: type[Result],
        *,
        progress: Progress | None = None,
        timeout_seconds: float | None = None,
    ) -> Result:
        """Wait until an operation ends and return its response.

        Lost connections, restarted gateways and nodes that are away do not end the wait.

        Args:
            operation: What the mutation returned.
            kind: The message class of the response.
            progress: Is called with the metadata after every look.
            timeout_seconds: How long to wait; None: for ever. The operation goes on after it.

        Raises:
            VirtfleetError: The operation failed, or a look at it is refused.
            TimeoutError: It has not ended in time.
        """
        return operations.result_of(self.finish(operation, progress=progress, timeout_seconds=timeout_seconds), kind)

    def finish(
        self,
        operation: operations_pb2.Operation,
        *,
        progress: Progress | None = None,
        timeout_seconds: float | None = None,
    ) -> operations_pb2.Operation:
        """Wait until an operation ends and return it, with its response or its error.

        Lost connections, restarted gateways and nodes that are away do not end the wait.

        Args:
            operation: What the mutation returned.
            progress: Is called with the metadata after every look.
            timeout_seconds: How long to wait; None: for ever. The operation goes on after it.

        Raises:
            VirtfleetError: A look at it is refused.
            TimeoutError: It has not ended in time.
        """
        ends_at = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        failures = 0
        while not operation.done:
            if progress is not None:
                progress(operations.metadata_of(operation))
            left = (
                operations.WAIT_SECONDS if ends_at is None else min(operations.WAIT_SECONDS, ends_at - time.monotonic())
            )
            if left <= 0:
                raise operations.not_ended(operation, timeout_seconds)
            # With progress asked for, look often enough for a person.
            patience = duration_pb2.Duration()
            patience.FromNanoseconds(int(min(left, 0.5 if progress else left) * 1e9))
            look = operations_pb2.WaitOperationRequest(name=operation.name, timeout=patience)
            limit = left + operations.GRACE_SECONDS
            if ends_at is not None:
                limit = min(limit, max(ends_at - time.monotonic(), 0.0))
            try:
                operation = self.operations.WaitOperation(look, timeout=limit)
            except VirtfleetError as obstacle:
                if not (calls.is_lost(obstacle) or isinstance(obstacle, DeadlineExceeded)):
                    raise
                failures += 1
                delay = calls.delay_seconds(failures, obstacle.retry_delay_seconds)
                if ends_at is not None and time.monotonic() + delay >= ends_at:
                    raise operations.not_ended(operation, timeout_seconds) from obstacle
                time.sleep(delay)
            else:
                failures = 0
        if progress is not None:
            progress(operations.metadata_of(operation))
        return operation

    def pages(self, method: Callable[..., Any], request: Message, *, timeout_seconds: float = 30.0) -> Iterator[Any]:
        """Yield every resource of a list, page by page.

        Args:
            method: A list method of a stub: `fleet.domains.ListDomains`.
            request: Its request; `page_token` in it is where to begin.
            timeout_seconds: For each page.

        Raises:
            PartialList: At the end: the parts of some nodes were missing. Not with `allow_stale` in the request.
            VirtfleetError: A page failed.
        """
        pages = Pages(request)
        while True:
            answer = method(pages.request, timeout=timeout_seconds)
            yield from pages.items(answer)
            if not pages.goes_on(answer):
                return

    def watch(self, request: Message, *, resnapshot: bool = False) -> Following:
        """Yield the answers of a watch for ever, resuming by token over lost connections and restarts.

        Args:
            request: A `WatchResourcesRequest` of compute, storage, network or fleet, or a `WatchOperationsRequest`.
            resnapshot: Begin again with a snapshot when the history no longer reaches back to the token; resources that
                do not occur in it are gone. Otherwise that raises `ResumeTokenCompacted`.

        Raises:
            ResumeTokenCompacted: As above.
            VirtfleetError: The watch is refused.
        """
        return self.follow(request, resnapshot=resnapshot)

    def follow(
        self,
        request: Message,
        *,
        resnapshot: bool = False,
        on_snapshot: Callable[[], object] | None = None,
        on_connection: Callable[[bool], object] | None = None,
        on_obstacle: Callable[[VirtfleetError], object] | None = None,
    ) -> Following:
        """Return a watch like `watch`.

        `on_snapshot` is called before each stream that begins with a snapshot, `on_connection` when a stream has its
        first answer (True) and when it breaks (False), `on_obstacle` with each error after which it is tried again.
        """
        resumption = Resumption(request)
        call = self.channel.unary_stream(
            watch_path(request),
            request_serializer=type(request).SerializeToString,
            response_deserializer=resumption.response_class.FromString,
        )
        return Following(
            call,
            resumption,
            resnapshot=resnapshot,
            on_snapshot=on_snapshot,
            on_connection=on_connection,
            on_obstacle=on_obstacle,
        )


class Following(Iterator[Any]):
    """Is a watch that goes on over every break. Another thread may close it."""

    def __init__(
        self,
        start: Callable[..., Any],
        resumption: Resumption,
        *,
        resnapshot: bool,
        on_snapshot: Callable[[], object] | None,
        on_connection: Callable[[bool], object] | None,
        on_obstacle: Callable[[VirtfleetError], object] | None,
    ) -> None:
        self._on_connection = on_connection
        self._on_obstacle = on_obstacle
        self._connected = False
        self._start = start
        self._resumption = resumption
        self._resnapshot = resnapshot
        self._on_snapshot = on_snapshot
        self._stream: Any = None
        self._closed = threading.Event()

    def __next__(self) -> Any:  # noqa: ANN401  # one of the response classes
        """Return the next answer.

        Raises:
            ResumeTokenCompacted: The history no longer reaches back to the token.
            VirtfleetError: The watch is refused.
        """
        while not self._closed.is_set():
            try:
                answer = self._next()
            except ResumeTokenCompacted:
                if not self._resnapshot:
                    raise
                self._resumption.forget()
            except VirtfleetError:
                if not self._closed.is_set():
                    raise
            else:
                if answer is not None:
                    return answer
            self._stream = None
            self._tell(connected=False)
            self._closed.wait(self._resumption.delay_seconds())
        raise StopIteration

    def _next(self) -> Any:  # noqa: ANN401  # one of the response classes
        """Return the next answer of the stream, made first where there is none; None: it has broken."""
        if self._stream is None:
            if self._on_snapshot is not None and self._resumption.in_snapshot:
                self._on_snapshot()
            self._stream = self._start(self._resumption.request)
        try:
            answer = next(self._stream)
        except StopIteration:
            return None  # what the token is for
        except VirtfleetError as error:
            if not (calls.is_cut(error) or isinstance(error, SlowReader)):
                raise
            if self._on_obstacle is not None:
                self._on_obstacle(error)
            return None
        self._resumption.note(answer)
        self._tell(connected=True)
        return answer

    def _tell(self, *, connected: bool) -> None:
        if connected != self._connected:
            self._connected = connected
            if self._on_connection is not None:
                self._on_connection(connected)

    def close(self) -> None:
        """End the watch."""
        self._closed.set()
        stream = self._stream
        if stream is not None:
            stream.cancel()

    def __del__(self) -> None:
        """End the stream of a watch that nobody reads any more."""
        self.close()


class _SwitchedChannel(grpc.Channel):
    """Is what stubs are made on: each call begins on the channel of its moment."""

    def __init__(self, switch: Switch) -> None:
        self._switch = switch

    def unary_unary(self, *arguments: Any, **keywords: Any) -> Any:  # noqa: ANN401  # gRPC's own
        return self._switch.starter("unary_unary", *arguments, **keywords)

    def unary_stream(self, *arguments: Any, **keywords: Any) -> Any:  # noqa: ANN401  # gRPC's own
        return self._switch.starter("unary_stream", *arguments, **keywords)

    def stream_unary(self, *arguments: Any, **keywords: Any) -> Any:  # noqa: ANN401  # gRPC's own
        return self._switch.starter("stream_unary", *arguments, **keywords)

    def stream_stream(self, *arguments: Any, **keywords: Any) -> Any:  # noqa: ANN401  # gRPC's own
        return self._switch.starter("stream_stream", *arguments, **keywords)

    def subscribe(self, callback: Any, try_to_connect: bool | None = False) -> None:  # noqa: ANN401, FBT001, FBT002  # gRPC's own
        self._switch.channel().subscribe(callback, try_to_connect=try_to_connect)

    def unsubscribe(self, callback: Any) -> None:  # noqa: ANN401  # gRPC's own
        self._switch.channel().unsubscribe(callback)

    def close(self) -> None:
        """Do nothing: `Fleet.close` closes what there is."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None


@contextmanager
def connect(uri: str = "", credentials: Credentials | None = None, *, context: str = "") -> Iterator[Fleet]:
    """Open a connection for the length of a `with` block.

    Args:
        uri: `tls://host:port`, `unix:///path`, `ssh://…`, `command:…`; empty: what `context`, the environment or the
            context file says (`contexts.locate`).
        credentials: For TLS; None: those of the environment or the context.
        context: The name of a context.

    Raises:
        ValueError: The URI is none, credentials are missing, or nothing says where the fleet is.
    """
    found = locate(uri, context, credentials)
    fleet = Fleet(Endpoint.parse(found.address), found.credentials)
    try:
        yield fleet
    finally:
        fleet.close()

"""The client for programs with threads."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from google.longrunning import operations_pb2
from google.protobuf import duration_pb2

from virtfleet_client import calls, operations
from virtfleet_client.endpoint import Credentials, Endpoint
from virtfleet_client.errors import ResumeTokenCompacted, SlowReader, Unavailable, from_call
from virtfleet_client.services import Services
from virtfleet_client.watch import Resumption, watch_path

if TYPE_CHECKING:
    from collections.abc import Callable

    from google.protobuf.message import Message

    from virtfleet_client.operations import Progress, Result

Item = TypeVar("Item")


class _Calls(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Sets request ids, repeats what is safe, and turns failures into typed exceptions."""

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
            error = from_call(call.code(), call.details(), call.trailing_metadata())
            if not (repeatable and isinstance(error, Unavailable) and attempt < calls.ATTEMPTS):
                raise error from failure
            delay = calls.delay_seconds(attempt, error.retry_delay_seconds)
            if ends_at is not None and time.monotonic() + delay >= ends_at:
                raise error from failure
            time.sleep(delay)

    def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:  # noqa: ANN401  # as above
        return _Stream(continuation(details, request))

    def intercept_stream_unary(self, continuation: Any, details: Any, requests: Any) -> Any:  # noqa: ANN401  # as above
        call = continuation(details, requests)
        failure = call.exception()
        if failure is not None:
            raise from_call(call.code(), call.details(), call.trailing_metadata()) from failure
        return call

    def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:  # noqa: ANN401  # as above
        return _Stream(continuation(details, requests))


class _Stream:
    """Is a stream of answers whose end is a typed exception."""

    def __init__(self, call: Any) -> None:  # noqa: ANN401  # as above
        self._call = call

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:  # noqa: ANN401  # as above
        try:
            return next(self._call)
        except grpc.RpcError as failure:
            raise from_call(self._call.code(), self._call.details(), self._call.trailing_metadata()) from failure

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # code(), cancel(), trailing_metadata() … are the call's own
        return getattr(self._call, name)


class Fleet(Services):
    """Is a connection to a gateway or to a node, with a stub for each service (`domains`, `volumes`, …).

    Every call of the stubs raises a `VirtfleetError` on failure, sends a request_id with each mutation, and is repeated
    after UNAVAILABLE where that cannot have a second effect. Threads may share it.
    """

    def __init__(self, endpoint: Endpoint, credentials: Credentials | None = None) -> None:
        if endpoint.secure:
            if credentials is None:
                message = f"{endpoint.target} demands mutual TLS: give credentials"
                raise ValueError(message)
            channel = grpc.secure_channel(endpoint.target, credentials.for_channel(), options=endpoint.options())
        else:
            channel = grpc.insecure_channel(endpoint.target, options=endpoint.options())
        self._bare = channel
        super().__init__(grpc.intercept_channel(channel, _Calls()))

    def close(self) -> None:
        """End all calls and the connection."""
        self._bare.close()

    def wait(
        self,
        operation: operations_pb2.Operation,
        kind: type[Result],
        *,
        progress: Progress | None = None,
        timeout_seconds: float | None = None,
    ) -> Result:
        """Wait until an operation ends and return its response.

        Args:
            operation: What the mutation returned.
            kind: The message class of the response.
            progress: Is called with the metadata after every look.
            timeout_seconds: How long to wait; None: for ever. The operation goes on after it.

        Raises:
            VirtfleetError: The operation failed, or a look at it did.
            TimeoutError: It has not ended in time.
        """
        ends_at = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while not operation.done:
            if progress is not None:
                progress(operations.metadata_of(operation))
            left = (
                operations.WAIT_SECONDS if ends_at is None else min(operations.WAIT_SECONDS, ends_at - time.monotonic())
            )
            if left <= 0:
                message = f"{operation.name} has not ended within {timeout_seconds} s; it goes on"
                raise TimeoutError(message)
            # With progress asked for, look often enough for a person.
            patience = duration_pb2.Duration()
            patience.FromNanoseconds(int(min(left, 0.5 if progress else left) * 1e9))
            operation = self.operations.WaitOperation(
                operations_pb2.WaitOperationRequest(name=operation.name, timeout=patience), timeout=left + 10
            )
        if progress is not None:
            progress(operations.metadata_of(operation))
        return operations.result_of(operation, kind)

    def pages(self, method: Callable[..., Any], request: Message, *, timeout_seconds: float = 30.0) -> Iterator[Any]:
        """Yield every resource of a list, page by page.

        Args:
            method: A list method of a stub: `fleet.domains.ListDomains`.
            request: Its request; `page_token` in it is where to begin.
            timeout_seconds: For each page.

        Raises:
            VirtfleetError: A page failed.
        """
        request = type(request).FromString(request.SerializeToString())
        while True:
            answer = method(request, timeout=timeout_seconds)
            yield from getattr(answer, answer.DESCRIPTOR.fields_by_number[1].name)
            if not answer.next_page_token:
                return
            request.page_token = answer.next_page_token  # type: ignore[attr-defined]  # every list request has it

    def watch(self, request: Message, *, resnapshot: bool = False) -> Iterator[Any]:
        """Yield the answers of a watch for ever, resuming by token over lost connections and restarts.

        Args:
            request: A `WatchResourcesRequest` of compute, storage, network or fleet, or a `WatchOperationsRequest`.
            resnapshot: Begin again with a snapshot when the history no longer reaches back to the token; resources that
                do not occur in it are gone. Otherwise that raises `ResumeTokenCompacted`.

        Raises:
            ResumeTokenCompacted: As above.
            VirtfleetError: The watch is refused.
        """
        resumption = Resumption(request)
        call = self.channel.unary_stream(
            watch_path(request),
            request_serializer=type(request).SerializeToString,
            response_deserializer=resumption.response_class.FromString,
        )
        while True:
            stream = call(resumption.request, wait_for_ready=True)
            try:
                for answer in stream:
                    resumption.note(answer)
                    yield answer
            except (Unavailable, SlowReader):
                pass  # what the token is for
            except ResumeTokenCompacted:
                if not resnapshot:
                    raise
                resumption.forget()
            finally:
                stream.cancel()
            time.sleep(resumption.delay_seconds())


@contextmanager
def connect(uri: str | None = None, credentials: Credentials | None = None) -> Iterator[Fleet]:
    """Open a connection for the length of a `with` block.

    Args:
        uri: `tls://host:port` or `unix:///path`; None: `VIRTFLEET_ADDRESS`, with `VIRTFLEET_{CA,CERT,KEY}_FILE` for
        TLS.
        credentials: For TLS.

    Raises:
        ValueError: The URI is none, or credentials are missing.
    """
    endpoint = Endpoint.from_environment() if uri is None else Endpoint.parse(uri)
    if endpoint.secure and credentials is None:
        credentials = Credentials.from_environment()
    fleet = Fleet(endpoint, credentials)
    try:
        yield fleet
    finally:
        fleet.close()

"""Calls to other services of the same node, over their peer sockets, on behalf of a caller."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from virtfleet_service import errors
from virtfleet_service.authorization import SERVICE
from virtfleet_service.call import CALLER_KEY, Caller
from virtfleet_service.errors import VirtfleetError
from virtfleet_service.identity import encode_caller

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from types import TracebackType

    from google.protobuf.descriptor import Descriptor

    from virtfleet_service.call import Call

ResponseT = TypeVar("ResponseT", bound=Message)

PACKAGE: Final = "virtfleet.node.v1"

TIMEOUT_SECONDS: Final = 60.0
"""The deadline of a call that has none from its caller: a hung service must not hang its peers."""

_OPTIONS: Final = (
    # A peer that comes back is found within a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
)

_BY_CODE: Final[Mapping[grpc.StatusCode, type[VirtfleetError]]] = {
    kind.code: kind for kind in reversed(VirtfleetError.__subclasses__())
}

_WITHOUT_DETAILS: Final[Mapping[grpc.StatusCode, type[VirtfleetError]]] = {
    grpc.StatusCode.UNAVAILABLE: errors.BackendUnreachable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.OperationTimedOut,
    grpc.StatusCode.CANCELLED: errors.OperationCancelled,
    grpc.StatusCode.UNIMPLEMENTED: errors.MethodNotImplemented,
    grpc.StatusCode.UNAUTHENTICATED: errors.CredentialsInvalid,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionMissing,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.MessageTooLarge,
}
"""What a code means that comes from gRPC itself, without our details."""


def nowhere(_path: str) -> str:
    """Say that a field of a request between services is none of the client's."""
    return ""


def error_from_status(status: status_pb2.Status) -> VirtfleetError:
    """Return the error that a `google.rpc.Status` tells of, as an object of its own class.

    A reason that this release does not know keeps its code and its reason.
    """
    info = error_details_pb2.ErrorInfo()
    bad = error_details_pb2.BadRequest()
    failure = error_details_pb2.PreconditionFailure()
    about = error_details_pb2.ResourceInfo()
    retry = error_details_pb2.RetryInfo()
    delay: float | None = None
    for detail in status.details:
        for kind in (info, bad, failure, about, retry):
            if detail.Is(cast("Descriptor", kind.DESCRIPTOR)):
                detail.Unpack(kind)
                if kind is retry:
                    delay = retry.retry_delay.ToNanoseconds() / 1e9
    code = next((code for code in grpc.StatusCode if code.value[0] == status.code), grpc.StatusCode.UNKNOWN)
    kind_: type[VirtfleetError] | None = errors.BY_REASON.get(info.reason)
    known = kind_ is not None and kind_.code is code
    if kind_ is None or not known:
        kind_ = _WITHOUT_DETAILS.get(code) if not info.reason else None
        kind_ = kind_ or _BY_CODE.get(code, errors.Unexpected)
    metadata = dict(info.metadata)
    field, resource = metadata.pop("field", ""), metadata.pop("resource", about.resource_name)
    violations = [(violation.field, violation.description) for violation in bad.field_violations]
    violations += [
        (violation.subject, violation.description) for violation in failure.violations if violation.subject != resource
    ]
    error = kind_(status.message, field=field, resource=resource, retry_delay_seconds=delay, violations=violations)
    error.metadata = metadata
    if info.reason and not known:
        # Of this object alone: a newer server's reason, passed on as it came.
        error.reason = info.reason  # type: ignore[misc]  # a class variable for all that are made here
    return error


def errors_from_rpc(error: grpc.aio.AioRpcError) -> VirtfleetError:
    """Return the error that a failed call tells of, as an object of its own class."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            try:
                return error_from_status(status_pb2.Status.FromString(value))
            except DecodeError:
                break
    number: int = error.code().value[0]
    return error_from_status(status_pb2.Status(code=number, message=error.details() or error.code().name))


class Peer:
    """Calls one service of the same node over its peer socket. Made in a running event loop; close it.

    Args:
        path: The socket: `{run_dir}/storage/peer.sock`.
        service: The service that calls: `compute`; it is the caller where no other is.
        node: The node.
        outgoing: Returns metadata that continue a trace.
    """

    def __init__(
        self,
        path: Path,
        *,
        service: str,
        node: str = "",
        outgoing: Callable[[], list[tuple[str, str]]] | None = None,
    ) -> None:
        self._path = path
        self._channel: grpc.aio.Channel | None = None
        self._methods: dict[str, Any] = {}
        self._outgoing = outgoing
        self._self = Caller(f"service:{node}/{service}", (SERVICE,))

    async def __aenter__(self) -> Self:
        """Return itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the channel."""
        await self.close()

    @property
    def has_socket(self) -> bool:
        """Whether the peer's socket is there; while it is not, no call is worth the trouble."""
        return self._path.exists()

    async def close(self) -> None:
        """Close the channel; running calls end."""
        if self._channel is not None:
            await self._channel.close()

    async def call(
        self,
        method: str,
        request: Message,
        response_type: type[ResponseT],
        call: Call | None = None,
        *,
        timeout_seconds: float = TIMEOUT_SECONDS,
        place: Callable[[str], str] = nowhere,
    ) -> ResponseT:
        """Call a method of `virtfleet.node.v1` and return its answer.

        Conveys the caller of `call`, and what remains of its deadline unless it is an operation, whose work outlives
        the caller. Cancellation cancels the call at the peer.

        Args:
            method: `AttachmentService.AttachVolume`, or in full one of another package that the peer serves on its peer
                socket too: `virtfleet.storage.v1.VolumeService.CreateVolume`.
            request: The request.
            response_type: The class of the answer.
            call: On whose behalf; None: the service for itself.
            timeout_seconds: The deadline at most.
            place: Says where a field of `request` stands in the request of the client, for errors.

        Raises:
            BackendUnreachable: The peer does not answer at all.
            OperationTimedOut: It did not answer in time.
            VirtfleetError: What the peer itself answered, as an object of its own class.
        """
        caller = self._self if call is None else call.caller
        left = None if call is None or call.method.is_operation else call.remaining()
        timeout = timeout_seconds if left is None else min(left, timeout_seconds)
        unary = self._methods.get(method)
        if unary is None:
            if not self.has_socket:
                # Nobody has listened there yet: what a call would find out, without a connection that keeps trying.
                raise self._silent()
            if self._channel is None:
                self._channel = grpc.aio.insecure_channel(f"unix:{self._path}", options=_OPTIONS)
            service, _, name = method.rpartition(".")
            if "." not in service:
                service = f"{PACKAGE}.{service}"
            unary = self._methods[method] = self._channel.unary_unary(f"/{service}/{name}")
        metadata: list[tuple[str, str | bytes]] = [(CALLER_KEY, encode_caller(caller))]
        if self._outgoing is not None:
            metadata += self._outgoing()
        try:
            encoded = await unary(request.SerializeToString(), timeout=timeout, metadata=tuple(metadata))
        except grpc.aio.AioRpcError as error:
            failure = errors_from_rpc(error).rebased(place)
            if type(failure) is errors.BackendUnreachable and not failure.metadata:
                failure = self._silent()
            raise failure from error
        return response_type.FromString(encoded)

    def _silent(self) -> errors.BackendUnreachable:
        peer = self._path.parent.name
        return errors.BackendUnreachable(
            f"the {peer} service of this node does not answer", retry_delay_seconds=1, peer=peer
        )

"""The errors of virtfleet as exceptions, one class a reason.

Catch a class (`WrongState`), a whole code (`FailedPrecondition`), or all (`VirtfleetError`). Every one is a
`grpc.RpcError` too.
A reason that this release does not know becomes the class of its code; read `reason` then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import grpc
from google.rpc import code_pb2, error_details_pb2, status_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

DOMAIN = "virtfleet.dev"
_DETAILS_KEY = "grpc-status-details-bin"


class VirtfleetError(grpc.RpcError):
    """Is a call or an operation that failed.

    Attributes:
        status: The whole `google.rpc.Status`.
        reason: The stable reason; empty if the error is not one of virtfleet's own (a transport failure, say).
        metadata: Every variable of the message.
        fields: The paths of the fields at fault.
        retry_delay_seconds: When a repetition may succeed; None: not said.
    """

    grpc_code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(self, status: status_pb2.Status) -> None:
        super().__init__(status.message)
        self.status = status
        self.reason = ""
        self.metadata: Mapping[str, str] = {}
        self.fields: tuple[str, ...] = ()
        self.retry_delay_seconds: float | None = None
        for detail in status.details:
            info = error_details_pb2.ErrorInfo()
            bad = error_details_pb2.BadRequest()
            failure = error_details_pb2.PreconditionFailure()
            retry = error_details_pb2.RetryInfo()
            if detail.Unpack(info) and info.domain == DOMAIN:
                self.reason, self.metadata = info.reason, dict(info.metadata)
            elif detail.Unpack(bad):
                self.fields += tuple(violation.field for violation in bad.field_violations)
            elif detail.Unpack(failure):
                # Some name the resource that is in the wrong state, which is no field, and some nothing.
                subjects = (one.subject for one in failure.violations)
                self.fields += tuple(subject for subject in subjects if subject and "/" not in subject)
            elif detail.Unpack(retry):
                self.retry_delay_seconds = retry.retry_delay.ToTimedelta().total_seconds()

    def code(self) -> grpc.StatusCode:
        """Return the gRPC code."""
        return _CODES.get(self.status.code, grpc.StatusCode.UNKNOWN)

    def details(self) -> str:
        """Return the sentence for people."""
        return self.status.message

    def __str__(self) -> str:
        return (
            f"{self.code().name} {self.reason}: {self.status.message}"
            if self.reason
            else f"{self.code().name}: {self.status.message}"
        )


_CODES: Mapping[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


class InvalidArgument(VirtfleetError):
    """The request is wrong in itself; no state would make it right."""

    grpc_code = grpc.StatusCode.INVALID_ARGUMENT


class NameMalformed(InvalidArgument):
    """A resource name or id does not have the form that its kind demands."""


class FieldRequired(InvalidArgument):
    """A field that the method needs is unset."""


class FieldOutOfRange(InvalidArgument):
    """A field holds a value that is not allowed."""


class FieldConflict(InvalidArgument):
    """Two fields exclude each other, or one may not be changed after creation."""


class MaskPathUnknown(InvalidArgument):
    """An update mask names a field that does not exist or may not be written."""


class FilterSyntax(InvalidArgument):
    """A filter does not parse, or names a field that cannot be filtered on."""


class PageTokenInvalid(InvalidArgument):
    """A page or resume token is not one of this list or watch."""


class DocumentInvalid(InvalidArgument):
    """A document (XML, CSR) is refused."""


class ReferenceOtherNode(InvalidArgument):
    """A spec refers to a resource of another node."""


class RequestIdReused(InvalidArgument):
    """The request_id has been used by the same caller for another request."""


class UnknownField(InvalidArgument):
    """A mutation carries a field or an enum number that this server does not know."""


class NotFound(VirtfleetError):
    """Something that the call names does not exist."""

    grpc_code = grpc.StatusCode.NOT_FOUND


class ResourceNotFound(NotFound):
    """The resource does not exist."""


class ResourceMoved(NotFound):
    """The resource lives under another name now: metadata `new_name`."""


class NodeUnknown(NotFound):
    """The gateway has no node of that name."""


class DeviceNotFound(NotFound):
    """The domain has no device of that id."""


class AlreadyExists(VirtfleetError):
    """Something that is to be made exists."""

    grpc_code = grpc.StatusCode.ALREADY_EXISTS


class ResourceExists(AlreadyExists):
    """A resource of that name exists."""


class IdentityInUse(AlreadyExists):
    """A uid, MAC or address is taken: metadata `holder`."""


class FailedPrecondition(VirtfleetError):
    """The state of something forbids the call now."""

    grpc_code = grpc.StatusCode.FAILED_PRECONDITION


class WrongState(FailedPrecondition):
    """The target is in a state in which the call means nothing: metadata `state`."""


class NotLiveUpdatable(FailedPrecondition):
    """A change cannot be made to the running guest; the paths are the violations."""


class ResourceInUse(FailedPrecondition):
    """The target is held: metadata `holder`."""


class HasChildren(FailedPrecondition):
    """The target has children that must go first."""


class WrongNode(FailedPrecondition):
    """The name is of another node than this one."""


class NodeCordoned(FailedPrecondition):
    """The node takes no new resources."""


class BackingMissing(FailedPrecondition):
    """A file or volume that the target is built on is gone."""


class WouldOverwrite(FailedPrecondition):
    """There is data where something new is to be made."""


class SubnetOverlap(FailedPrecondition):
    """A subnet overlaps one of the node: metadata `holder`."""


class AmbiguousName(FailedPrecondition):
    """Several resources answer to that id: metadata `names`."""


class UidMismatch(FailedPrecondition):
    """The name is now that of another resource than the caller meant."""


class NotCancellable(FailedPrecondition):
    """The operation cannot be cancelled at this moment."""


class DeletionProtected(FailedPrecondition):
    """The resource is protected: clear `spec.deletion_protection` first."""


class Aborted(VirtfleetError):
    """Another call came first; read again and retry."""

    grpc_code = grpc.StatusCode.ABORTED


class EtagMismatch(Aborted):
    """The resource has changed since the caller read it."""


class OperationConflict(Aborted):
    """An operation on the target runs: metadata `operation`."""


class ChangeRolledBack(Aborted):
    """The change has been undone."""


class OutOfRange(VirtfleetError):
    """A position is outside of what exists."""

    grpc_code = grpc.StatusCode.OUT_OF_RANGE


class ResumeTokenCompacted(OutOfRange):
    """The history from that token on is no longer held; begin with a snapshot."""


class RangeBeyondEnd(OutOfRange):
    """The range begins behind the end of the data."""


class ResourceExhausted(VirtfleetError):
    """Something is full."""

    grpc_code = grpc.StatusCode.RESOURCE_EXHAUSTED


class PoolFull(ResourceExhausted):
    """The pool has no room for it."""


class NodeMemoryShort(ResourceExhausted):
    """The node has not enough free memory."""


class AddressesExhausted(ResourceExhausted):
    """The network has no free address."""


class QuotaExceeded(ResourceExhausted):
    """A limit of the settings is reached."""


class RateLimited(ResourceExhausted):
    """The caller is too fast."""


class SlowReader(ResourceExhausted):
    """The reader of a stream is too slow; resume with the last token."""


class MessageTooLarge(ResourceExhausted):
    """The message is larger than the server takes."""


class PermissionDenied(VirtfleetError):
    """The caller may not do that."""

    grpc_code = grpc.StatusCode.PERMISSION_DENIED


class PermissionMissing(PermissionDenied):
    """No role of the caller gives the permission on the resource: metadata `permission`."""


class ReadOnlySocket(PermissionDenied):
    """The local socket is one of a role without that permission."""


class PathOutsidePool(PermissionDenied):
    """A path leaves its pool."""


class Unauthenticated(VirtfleetError):
    """The server does not know who calls."""

    grpc_code = grpc.StatusCode.UNAUTHENTICATED


class CredentialsInvalid(Unauthenticated):
    """The caller has no credentials that this server accepts."""


class CertificateRevoked(Unauthenticated):
    """The certificate of the caller is on the denial list."""


class JoinTokenInvalid(Unauthenticated):
    """The join token is unknown, used, expired, or of another node."""


class Unimplemented(VirtfleetError):
    """The server cannot do that at all."""

    grpc_code = grpc.StatusCode.UNIMPLEMENTED


class CapabilityMissing(Unimplemented):
    """The driver or back end lacks the ability: metadata `capability`."""


class MethodNotImplemented(Unimplemented):
    """The method is not built, or not known to this release."""


class Unavailable(VirtfleetError):
    """Something is away; retry later."""

    grpc_code = grpc.StatusCode.UNAVAILABLE


class NodeUnreachable(Unavailable):
    """The node does not answer."""


class ServiceDraining(Unavailable):
    """The server is about to stop."""


class BackendUnreachable(Unavailable):
    """A service, file system or host behind the server does not answer."""


class DriverBroken(Unavailable):
    """The driver cannot run: metadata `cause`."""


class DeadlineExceeded(VirtfleetError):
    """The time was not enough."""

    grpc_code = grpc.StatusCode.DEADLINE_EXCEEDED


class GuestDidNotComply(DeadlineExceeded):
    """The guest did not do what it was asked to in time."""


class OperationTimedOut(DeadlineExceeded):
    """A step took longer than it may."""


class Cancelled(VirtfleetError):
    """The work was cancelled by a caller."""

    grpc_code = grpc.StatusCode.CANCELLED


class OperationCancelled(Cancelled):
    """CancelOperation ended the operation; its effects are undone, but for what had ended of a batch."""


class Internal(VirtfleetError):
    """Something failed that should not."""

    grpc_code = grpc.StatusCode.INTERNAL


class HypervisorFailed(Internal):
    """The hypervisor refused or died; the message holds the redacted end of what it said."""


class BackendFailed(Internal):
    """A tool or the kernel refused; the message holds what it said."""


class Unexpected(Internal):
    """A fault of virtfleet; metadata `log_id` finds it in the log."""


class DataLoss(VirtfleetError):
    """Data is damaged."""

    grpc_code = grpc.StatusCode.DATA_LOSS


class ImageCorrupt(DataLoss):
    """An image does not parse or its check fails."""


class ChecksumMismatch(DataLoss):
    """Data does not have the digest that was promised."""


def _reason(name: str) -> str:
    return "".join(f"_{letter}" if letter.isupper() and index else letter for index, letter in enumerate(name)).upper()


_BY_CODE: Mapping[grpc.StatusCode, type[VirtfleetError]] = {
    branch.grpc_code: branch for branch in VirtfleetError.__subclasses__()
}
_BY_REASON: Mapping[str, type[VirtfleetError]] = {
    _reason(leaf.__name__): leaf for branch in VirtfleetError.__subclasses__() for leaf in branch.__subclasses__()
}


def from_status(status: status_pb2.Status) -> VirtfleetError:
    """Return the exception for a status, as operations and batch items carry it."""
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == DOMAIN:
            known = _BY_REASON.get(info.reason)
            if known is not None and known.grpc_code is code:
                return known(status)
    return _BY_CODE.get(code, VirtfleetError)(status)


def from_call(
    code: grpc.StatusCode, details: str | None, trailers: Iterable[tuple[str, str | bytes]] | None
) -> VirtfleetError:
    """Return the exception for a call that ended with `code`.

    Args:
        code: The code of the call.
        details: Its text.
        trailers: Its trailing metadata, in which servers send the details.
    """
    for key, value in trailers or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            status = status_pb2.Status()
            status.MergeFromString(value)
            return from_status(status)
    number: int = code.value[0]
    return from_status(status_pb2.Status(code=number or code_pb2.UNKNOWN, message=details or ""))

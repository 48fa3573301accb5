"""The errors of virtfleet: one tree, one stable reason a class.

    VirtfleetError
    ├── InvalidArgument      NameMalformed FieldRequired FieldOutOfRange FieldConflict MaskPathUnknown FilterSyntax
    │                        PageTokenInvalid DocumentInvalid ReferenceOtherNode RequestIdReused UnknownField
    ├── NotFound             ResourceNotFound ResourceMoved NodeUnknown DeviceNotFound
    ├── AlreadyExists        ResourceExists IdentityInUse
    ├── FailedPrecondition   WrongState NotLiveUpdatable ResourceInUse HasChildren WrongNode NodeCordoned BackingMissing
    │                        WouldOverwrite SubnetOverlap AmbiguousName UidMismatch NotCancellable DeletionProtected
    ├── Aborted              EtagMismatch OperationConflict ChangeRolledBack
    ├── OutOfRange           ResumeTokenCompacted RangeBeyondEnd
    ├── ResourceExhausted    PoolFull NodeMemoryShort AddressesExhausted QuotaExceeded RateLimited SlowReader
    MessageTooLarge
    ├── PermissionDenied     PermissionMissing ReadOnlySocket PathOutsidePool
    ├── Unauthenticated      CredentialsInvalid CertificateRevoked JoinTokenInvalid
    ├── Unimplemented        CapabilityMissing MethodNotImplemented
    ├── Unavailable          NodeUnreachable ServiceDraining BackendUnreachable DriverBroken
    ├── DeadlineExceeded     GuestDidNotComply OperationTimedOut
    ├── Cancelled            OperationCancelled
    ├── Internal             HypervisorFailed BackendFailed Unexpected
    └── DataLoss             ImageCorrupt ChecksumMismatch

A class fixes code and reason. The variables of the message are given by keyword, appear in the message, and travel in
`ErrorInfo.metadata`, so that no caller ever parses text. Branch on classes and reasons, never on messages.
"""

from __future__ import annotations

import copy
import string
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import quote

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Self

    from google.protobuf.message import Message

DOMAIN = "virtfleet.dev"
"""The `ErrorInfo.domain` of every error of virtfleet."""

METADATA_VALUE_LIMIT_CHARACTERS = 1000
"""A longer variable is cut."""

TRAILERS_LIMIT_BYTES = 7_600
"""No caller's input can make the trailers larger than clients accept: 8 KiB, names and sizes of the fields included."""

_PLAIN = string.printable.strip().replace("%", "") + " "
"""What gRPC leaves as it is in the message of a status."""

_SHORTER = ((32, 1000), (16, 500), (8, 250), (4, 120), (1, 60))
"""What is kept of an error until its trailers are small enough: how many violations, how many characters of a text."""


class VirtfleetError(Exception):
    """Is an error that a caller may see.

    Args:
        message: A sentence for people: what, where, who holds it, what to do.
        field: The path of the field that is at fault, if one is, from the request message as the client sent it:
            `domain.spec.disks.root.bus`, `requests[2].name`. Keys of maps stand as in update masks.
        resource: The resource that is at fault, if it is not the target of the call.
        retry_delay_seconds: When a repetition may succeed; sets `RetryInfo`.
        metadata: Every variable of the message, by keyword; values become strings.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    reason: ClassVar[str] = "UNEXPECTED"
    final: ClassVar[bool] = True
    """Whether the same call can be expected to fail in the same way again, so that `request_id` may remember it."""

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        resource: str = "",
        retry_delay_seconds: float | None = None,
        violations: Sequence[tuple[str, str]] = (),
        **metadata: object,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.resource = resource
        self.retry_delay_seconds = retry_delay_seconds
        self.violations: tuple[tuple[str, str], ...] = tuple(violations) or (((field, message),) if field else ())
        self.metadata: Mapping[str, str] = {key: _cut(str(value)) for key, value in metadata.items()}

    def rebased(self, place: Callable[[str], str]) -> Self:
        """Return the error as it is in another request.

        Args:
            place: Returns where a field stands in that request; empty: nowhere.
        """
        moved = copy.copy(self)
        moved.field = place(self.field) if self.field else ""
        found = [(place(path), description) for path, description in self.violations]
        moved.violations = tuple(one for one in found if one[0])
        return moved

    def details(self, violations: int = 32, characters: int = METADATA_VALUE_LIMIT_CHARACTERS) -> list[Message]:
        """Return the `google.rpc` details, `ErrorInfo` first.

        Args:
            violations: So many of them at most.
            characters: So long may a text be.
        """

        def cut(text: str) -> str:
            return _cut(text, characters)

        metadata = {key: cut(value) for key, value in self.metadata.items()}
        if self.field:
            metadata.setdefault("field", cut(self.field))
        if self.resource:
            metadata.setdefault("resource", cut(self.resource))
        details: list[Message] = [error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=metadata)]
        if self.violations and self.code is grpc.StatusCode.INVALID_ARGUMENT:
            bad = error_details_pb2.BadRequest()
            for path, description in self.violations[:violations]:
                bad.field_violations.add(field=cut(path), description=cut(description), reason=self.reason)
            details.append(bad)
        if self.code is grpc.StatusCode.FAILED_PRECONDITION:
            failure = error_details_pb2.PreconditionFailure()
            for path, description in self.violations[:violations] or ((self.resource, self.message),):
                failure.violations.add(type=self.reason, subject=cut(path), description=cut(description))
            details.append(failure)
        if self.resource:
            details.append(
                error_details_pb2.ResourceInfo(
                    resource_type=_kind(self.resource),
                    resource_name=cut(self.resource),
                    description=cut(self.message),
                )
            )
        if self.retry_delay_seconds is not None:
            delay = duration_pb2.Duration()
            delay.FromNanoseconds(int(self.retry_delay_seconds * 1e9))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        return details

    def to_status(self) -> status_pb2.Status:
        """Return the error as `google.rpc.Status`, as it stands in operations and in the trailers of a call."""
        for violations, characters in _SHORTER:
            status = self._status(violations, characters)
            if _in_trailers(status) <= TRAILERS_LIMIT_BYTES:
                break
        return status

    def _status(self, violations: int, characters: int) -> status_pb2.Status:
        number: int = self.code.value[0]
        status = status_pb2.Status(code=number, message=_cut(self.message, characters))
        for detail in self.details(violations, characters):
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        return status


def _in_trailers(status: status_pb2.Status) -> int:
    """Return how many bytes a status takes there: its message in percent-encoding, all of it in base64."""
    return len(quote(status.message, safe=_PLAIN)) + -(-status.ByteSize() // 3) * 4


def _cut(text: str, characters: int = METADATA_VALUE_LIMIT_CHARACTERS) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"


def _kind(name: str) -> str:
    """Return the collection of a resource name: `nodes/n1/domains/web` is one of `domains`."""
    parts = name.split("/")
    return parts[-2] if len(parts) >= 2 else ""


class InvalidArgument(VirtfleetError):
    """The request is wrong in itself; no state would make it right."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    final = True


class NameMalformed(InvalidArgument):
    """A resource name or id does not have the form that its kind demands."""

    reason = "NAME_MALFORMED"


class FieldRequired(InvalidArgument):
    """A field that the method needs is unset."""

    reason = "FIELD_REQUIRED"


class FieldOutOfRange(InvalidArgument):
    """A field holds a value that is not allowed."""

    reason = "FIELD_OUT_OF_RANGE"


class FieldConflict(InvalidArgument):
    """Two fields exclude each other, or one may not be changed after creation."""

    reason = "FIELD_CONFLICT"


class MaskPathUnknown(InvalidArgument):
    """An update mask names a field that does not exist or may not be written."""

    reason = "MASK_PATH_UNKNOWN"


class FilterSyntax(InvalidArgument):
    """A filter does not parse, or names a field that cannot be filtered on."""

    reason = "FILTER_SYNTAX"


class PageTokenInvalid(InvalidArgument):
    """A page or resume token is not one of this list or watch."""

    reason = "PAGE_TOKEN_INVALID"


class DocumentInvalid(InvalidArgument):
    """A document (XML, CSR) is refused."""

    reason = "DOCUMENT_INVALID"


class ReferenceOtherNode(InvalidArgument):
    """A spec refers to a resource of another node."""

    reason = "REFERENCE_OTHER_NODE"


class RequestIdReused(InvalidArgument):
    """The request_id has been used by the same caller for another request."""

    reason = "REQUEST_ID_REUSED"


class UnknownField(InvalidArgument):
    """A mutation carries a field or an enum number that this server does not know."""

    reason = "UNKNOWN_FIELD"


class NotFound(VirtfleetError):
    """Something that the call names does not exist."""

    code = grpc.StatusCode.NOT_FOUND
    final = True


class ResourceNotFound(NotFound):
    """The resource does not exist."""

    reason = "RESOURCE_NOT_FOUND"


class ResourceMoved(NotFound):
    """The resource lives under another name now: metadata `new_name`."""

    reason = "RESOURCE_MOVED"


class NodeUnknown(NotFound):
    """The gateway has no node of that name."""

    reason = "NODE_UNKNOWN"


class DeviceNotFound(NotFound):
    """The domain has no device of that id."""

    reason = "DEVICE_NOT_FOUND"


class AlreadyExists(VirtfleetError):
    """Something that is to be made exists."""

    code = grpc.StatusCode.ALREADY_EXISTS
    final = True


class ResourceExists(AlreadyExists):
    """A resource of that name exists."""

    reason = "RESOURCE_EXISTS"


class IdentityInUse(AlreadyExists):
    """A uid, MAC or address is taken: metadata `holder`."""

    reason = "IDENTITY_IN_USE"


class FailedPrecondition(VirtfleetError):
    """The state of something forbids the call now."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    final = True


class WrongState(FailedPrecondition):
    """The target is in a state in which the call means nothing: metadata `state`."""

    reason = "WRONG_STATE"


class NotLiveUpdatable(FailedPrecondition):
    """A change cannot be made to the running guest; the paths are the violations."""

    reason = "NOT_LIVE_UPDATABLE"


class ResourceInUse(FailedPrecondition):
    """The target is held: metadata `holder`."""

    reason = "RESOURCE_IN_USE"


class HasChildren(FailedPrecondition):
    """The target has children that must go first: metadata `holder` is one."""

    reason = "HAS_CHILDREN"


class WrongNode(FailedPrecondition):
    """The name is of another node than this one."""

    reason = "WRONG_NODE"


class NodeCordoned(FailedPrecondition):
    """The node takes no new resources."""

    reason = "NODE_CORDONED"


class BackingMissing(FailedPrecondition):
    """A file or volume that the target is built on is gone."""

    reason = "BACKING_MISSING"


class WouldOverwrite(FailedPrecondition):
    """There is data where something new is to be made."""

    reason = "WOULD_OVERWRITE"


class SubnetOverlap(FailedPrecondition):
    """A subnet overlaps one of the node: metadata `holder`."""

    reason = "SUBNET_OVERLAP"


class AmbiguousName(FailedPrecondition):
    """Several resources answer to that id: metadata `names`."""

    reason = "AMBIGUOUS_NAME"


class UidMismatch(FailedPrecondition):
    """The name is now that of another resource than the caller meant."""

    reason = "UID_MISMATCH"


class NotCancellable(FailedPrecondition):
    """The operation cannot be cancelled at this moment."""

    reason = "NOT_CANCELLABLE"


class DeletionProtected(FailedPrecondition):
    """The resource is protected: clear `spec.deletion_protection` first."""

    reason = "DELETION_PROTECTED"


class Aborted(VirtfleetError):
    """Another call came first; read again and retry."""

    code = grpc.StatusCode.ABORTED
    final = False


class EtagMismatch(Aborted):
    """The resource has changed since the caller read it."""

    reason = "ETAG_MISMATCH"


class OperationConflict(Aborted):
    """An operation on the target runs: metadata `operation`."""

    reason = "OPERATION_CONFLICT"


class ChangeRolledBack(Aborted):
    """The change has been undone."""

    reason = "CHANGE_ROLLED_BACK"


class OutOfRange(VirtfleetError):
    """A position is outside of what exists."""

    code = grpc.StatusCode.OUT_OF_RANGE
    final = True


class ResumeTokenCompacted(OutOfRange):
    """The history from that token on is no longer held; begin with a snapshot."""

    reason = "RESUME_TOKEN_COMPACTED"


class RangeBeyondEnd(OutOfRange):
    """The range begins behind the end of the data."""

    reason = "RANGE_BEYOND_END"


class ResourceExhausted(VirtfleetError):
    """Something is full."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    final = False


class PoolFull(ResourceExhausted):
    """The pool has no room for it."""

    reason = "POOL_FULL"


class NodeMemoryShort(ResourceExhausted):
    """The node has not enough free memory."""

    reason = "NODE_MEMORY_SHORT"


class AddressesExhausted(ResourceExhausted):
    """The network has no free address."""

    reason = "ADDRESSES_EXHAUSTED"


class QuotaExceeded(ResourceExhausted):
    """A limit of the settings is reached: metadata `limit`."""

    reason = "QUOTA_EXCEEDED"


class RateLimited(ResourceExhausted):
    """The caller is too fast."""

    reason = "RATE_LIMITED"


class SlowReader(ResourceExhausted):
    """The reader of a stream is too slow; resume with the last token."""

    reason = "SLOW_READER"


class MessageTooLarge(ResourceExhausted):
    """The message is larger than the server takes."""

    reason = "MESSAGE_TOO_LARGE"


class PermissionDenied(VirtfleetError):
    """The caller may not do that."""

    code = grpc.StatusCode.PERMISSION_DENIED
    final = True


class PermissionMissing(PermissionDenied):
    """No role of the caller gives the permission on the resource: metadata `permission`."""

    reason = "PERMISSION_MISSING"


class ReadOnlySocket(PermissionDenied):
    """The local socket is one of a role without that permission."""

    reason = "READ_ONLY_SOCKET"


class PathOutsidePool(PermissionDenied):
    """A path leaves its pool."""

    reason = "PATH_OUTSIDE_POOL"


class Unauthenticated(VirtfleetError):
    """The server does not know who calls."""

    code = grpc.StatusCode.UNAUTHENTICATED
    final = True


class CredentialsInvalid(Unauthenticated):
    """The caller has no credentials that this server accepts."""

    reason = "CREDENTIALS_INVALID"


class CertificateRevoked(Unauthenticated):
    """The certificate of the caller is on the denial list."""

    reason = "CERTIFICATE_REVOKED"


class JoinTokenInvalid(Unauthenticated):
    """The join token is unknown, used, expired, or of another node."""

    reason = "JOIN_TOKEN_INVALID"


class Unimplemented(VirtfleetError):
    """The server cannot do that at all."""

    code = grpc.StatusCode.UNIMPLEMENTED
    final = True


class CapabilityMissing(Unimplemented):
    """The driver or back end lacks the ability: metadata `capability`."""

    reason = "CAPABILITY_MISSING"


class MethodNotImplemented(Unimplemented):
    """The method is not built, or not known to this release."""

    reason = "METHOD_NOT_IMPLEMENTED"


class Unavailable(VirtfleetError):
    """Something is away; retry later."""

    code = grpc.StatusCode.UNAVAILABLE
    final = False


class NodeUnreachable(Unavailable):
    """The node does not answer."""

    reason = "NODE_UNREACHABLE"


class ServiceDraining(Unavailable):
    """The server is about to stop."""

    reason = "SERVICE_DRAINING"


class BackendUnreachable(Unavailable):
    """A service, file system or host behind the server does not answer."""

    reason = "BACKEND_UNREACHABLE"


class DriverBroken(Unavailable):
    """The driver cannot run: metadata `cause`."""

    reason = "DRIVER_BROKEN"


class DeadlineExceeded(VirtfleetError):
    """The time was not enough."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    final = False


class GuestDidNotComply(DeadlineExceeded):
    """The guest did not do what it was asked to in time."""

    reason = "GUEST_DID_NOT_COMPLY"


class OperationTimedOut(DeadlineExceeded):
    """A step took longer than it may."""

    reason = "OPERATION_TIMED_OUT"


class Cancelled(VirtfleetError):
    """The work was cancelled by a caller."""

    code = grpc.StatusCode.CANCELLED
    final = True


class OperationCancelled(Cancelled):
    """CancelOperation ended the operation; its effects are undone, but for what had ended of a batch."""

    reason = "OPERATION_CANCELLED"


class Internal(VirtfleetError):
    """Something failed that should not."""

    code = grpc.StatusCode.INTERNAL
    final = False


class HypervisorFailed(Internal):
    """The hypervisor refused or died; the message holds the redacted end of what it said."""

    reason = "HYPERVISOR_FAILED"


class BackendFailed(Internal):
    """A tool or the kernel refused; the message holds what it said."""

    reason = "BACKEND_FAILED"


class Unexpected(Internal):
    """A fault of virtfleet; metadata `log_id` finds it in the log."""

    reason = "UNEXPECTED"


class DataLoss(VirtfleetError):
    """Data is damaged."""

    code = grpc.StatusCode.DATA_LOSS
    final = True


class ImageCorrupt(DataLoss):
    """An image does not parse or its check fails."""

    reason = "IMAGE_CORRUPT"


class ChecksumMismatch(DataLoss):
    """Data does not have the digest that was promised."""

    reason = "CHECKSUM_MISMATCH"


def _leaves(root: type[VirtfleetError]) -> list[type[VirtfleetError]]:
    children = root.__subclasses__()
    return [leaf for child in children for leaf in _leaves(child)] if children else [root]


BY_REASON: Mapping[str, type[VirtfleetError]] = {leaf.reason: leaf for leaf in _leaves(VirtfleetError)}
"""Every class that is sent, by its reason; documentation and tests read the catalogue from here."""

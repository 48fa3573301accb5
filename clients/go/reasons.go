// Code generated from the protos by tools/go_services.py. DO NOT EDIT.

package virtfleet

import "google.golang.org/grpc/codes"

// Reasons of INVALID_ARGUMENT.
const (
	// ErrNameMalformed: a resource name or id does not have the form that its kind demands.
	ErrNameMalformed Reason = "NAME_MALFORMED"
	// ErrFieldRequired: a field that the method needs is unset.
	ErrFieldRequired Reason = "FIELD_REQUIRED"
	// ErrFieldOutOfRange: a field holds a value that is not allowed.
	ErrFieldOutOfRange Reason = "FIELD_OUT_OF_RANGE"
	// ErrFieldConflict: two fields exclude each other, or one may not be changed after creation.
	ErrFieldConflict Reason = "FIELD_CONFLICT"
	// ErrMaskPathUnknown: an update mask names a field that does not exist or may not be written.
	ErrMaskPathUnknown Reason = "MASK_PATH_UNKNOWN"
	// ErrFilterSyntax: a filter does not parse, or names a field that cannot be filtered on.
	ErrFilterSyntax Reason = "FILTER_SYNTAX"
	// ErrPageTokenInvalid: a page or resume token is not one of this list or watch.
	ErrPageTokenInvalid Reason = "PAGE_TOKEN_INVALID"
	// ErrDocumentInvalid: a document (XML, CSR) is refused.
	ErrDocumentInvalid Reason = "DOCUMENT_INVALID"
	// ErrReferenceOtherNode: a spec refers to a resource of another node.
	ErrReferenceOtherNode Reason = "REFERENCE_OTHER_NODE"
	// ErrRequestIDReused: the request_id has been used by the same caller for another request.
	ErrRequestIDReused Reason = "REQUEST_ID_REUSED"
	// ErrUnknownField: a mutation carries a field or an enum number that this server does not know.
	ErrUnknownField Reason = "UNKNOWN_FIELD"
)

// Reasons of NOT_FOUND.
const (
	// ErrResourceNotFound: the resource does not exist.
	ErrResourceNotFound Reason = "RESOURCE_NOT_FOUND"
	// ErrResourceMoved: the resource lives under another name now: metadata `new_name`.
	ErrResourceMoved Reason = "RESOURCE_MOVED"
	// ErrNodeUnknown: the gateway has no node of that name.
	ErrNodeUnknown Reason = "NODE_UNKNOWN"
	// ErrDeviceNotFound: the domain has no device of that id.
	ErrDeviceNotFound Reason = "DEVICE_NOT_FOUND"
)

// Reasons of ALREADY_EXISTS.
const (
	// ErrResourceExists: a resource of that name exists.
	ErrResourceExists Reason = "RESOURCE_EXISTS"
	// ErrIdentityInUse: a uid, MAC or address is taken: metadata `holder`.
	ErrIdentityInUse Reason = "IDENTITY_IN_USE"
)

// Reasons of FAILED_PRECONDITION.
const (
	// ErrWrongState: the target is in a state in which the call means nothing: metadata `state`.
	ErrWrongState Reason = "WRONG_STATE"
	// ErrNotLiveUpdatable: a change cannot be made to the running guest; the paths are the violations.
	ErrNotLiveUpdatable Reason = "NOT_LIVE_UPDATABLE"
	// ErrResourceInUse: the target is held: metadata `holder`.
	ErrResourceInUse Reason = "RESOURCE_IN_USE"
	// ErrHasChildren: the target has children that must go first: metadata `holder` is one.
	ErrHasChildren Reason = "HAS_CHILDREN"
	// ErrWrongNode: the name is of another node than this one.
	ErrWrongNode Reason = "WRONG_NODE"
	// ErrNodeCordoned: the node takes no new resources.
	ErrNodeCordoned Reason = "NODE_CORDONED"
	// ErrBackingMissing: a file or volume that the target is built on is gone.
	ErrBackingMissing Reason = "BACKING_MISSING"
	// ErrWouldOverwrite: there is data where something new is to be made.
	ErrWouldOverwrite Reason = "WOULD_OVERWRITE"
	// ErrSubnetOverlap: a subnet overlaps one of the node: metadata `holder`.
	ErrSubnetOverlap Reason = "SUBNET_OVERLAP"
	// ErrAmbiguousName: several resources answer to that id: metadata `names`.
	ErrAmbiguousName Reason = "AMBIGUOUS_NAME"
	// ErrUIDMismatch: the name is now that of another resource than the caller meant.
	ErrUIDMismatch Reason = "UID_MISMATCH"
	// ErrNotCancellable: the operation cannot be cancelled at this moment.
	ErrNotCancellable Reason = "NOT_CANCELLABLE"
	// ErrDeletionProtected: the resource is protected: clear `spec.deletion_protection` first.
	ErrDeletionProtected Reason = "DELETION_PROTECTED"
)

// Reasons of ABORTED.
const (
	// ErrEtagMismatch: the resource has changed since the caller read it.
	ErrEtagMismatch Reason = "ETAG_MISMATCH"
	// ErrOperationConflict: an operation on the target runs: metadata `operation`.
	ErrOperationConflict Reason = "OPERATION_CONFLICT"
	// ErrChangeRolledBack: the change has been undone.
	ErrChangeRolledBack Reason = "CHANGE_ROLLED_BACK"
)

// Reasons of OUT_OF_RANGE.
const (
	// ErrResumeTokenCompacted: the history from that token on is no longer held; begin with a snapshot.
	ErrResumeTokenCompacted Reason = "RESUME_TOKEN_COMPACTED"
	// ErrRangeBeyondEnd: the range begins behind the end of the data.
	ErrRangeBeyondEnd Reason = "RANGE_BEYOND_END"
)

// Reasons of RESOURCE_EXHAUSTED.
const (
	// ErrPoolFull: the pool has no room for it.
	ErrPoolFull Reason = "POOL_FULL"
	// ErrNodeMemoryShort: the node has not enough free memory.
	ErrNodeMemoryShort Reason = "NODE_MEMORY_SHORT"
	// ErrAddressesExhausted: the network has no free address.
	ErrAddressesExhausted Reason = "ADDRESSES_EXHAUSTED"
	// ErrQuotaExceeded: a limit of the settings is reached: metadata `limit`.
	ErrQuotaExceeded Reason = "QUOTA_EXCEEDED"
	// ErrRateLimited: the caller is too fast.
	ErrRateLimited Reason = "RATE_LIMITED"
	// ErrSlowReader: the reader of a stream is too slow; resume with the last token.
	ErrSlowReader Reason = "SLOW_READER"
	// ErrMessageTooLarge: the message is larger than the server takes.
	ErrMessageTooLarge Reason = "MESSAGE_TOO_LARGE"
)

// Reasons of PERMISSION_DENIED.
const (
	// ErrPermissionMissing: no role of the caller gives the permission on the resource: metadata `permission`.
	ErrPermissionMissing Reason = "PERMISSION_MISSING"
	// ErrReadOnlySocket: the local socket is one of a role without that permission.
	ErrReadOnlySocket Reason = "READ_ONLY_SOCKET"
	// ErrPathOutsidePool: a path leaves its pool.
	ErrPathOutsidePool Reason = "PATH_OUTSIDE_POOL"
)

// Reasons of UNAUTHENTICATED.
const (
	// ErrCredentialsInvalid: the caller has no credentials that this server accepts.
	ErrCredentialsInvalid Reason = "CREDENTIALS_INVALID"
	// ErrCertificateRevoked: the certificate of the caller is on the denial list.
	ErrCertificateRevoked Reason = "CERTIFICATE_REVOKED"
	// ErrJoinTokenInvalid: the join token is unknown, used, expired, or of another node.
	ErrJoinTokenInvalid Reason = "JOIN_TOKEN_INVALID"
)

// Reasons of UNIMPLEMENTED.
const (
	// ErrCapabilityMissing: the driver or back end lacks the ability: metadata `capability`.
	ErrCapabilityMissing Reason = "CAPABILITY_MISSING"
	// ErrMethodNotImplemented: the method is not built, or not known to this release.
	ErrMethodNotImplemented Reason = "METHOD_NOT_IMPLEMENTED"
)

// Reasons of UNAVAILABLE.
const (
	// ErrNodeUnreachable: the node does not answer.
	ErrNodeUnreachable Reason = "NODE_UNREACHABLE"
	// ErrServiceDraining: the server is about to stop.
	ErrServiceDraining Reason = "SERVICE_DRAINING"
	// ErrBackendUnreachable: a service, file system or host behind the server does not answer.
	ErrBackendUnreachable Reason = "BACKEND_UNREACHABLE"
	// ErrDriverBroken: the driver cannot run: metadata `cause`.
	ErrDriverBroken Reason = "DRIVER_BROKEN"
)

// Reasons of DEADLINE_EXCEEDED.
const (
	// ErrGuestDidNotComply: the guest did not do what it was asked to in time.
	ErrGuestDidNotComply Reason = "GUEST_DID_NOT_COMPLY"
	// ErrOperationTimedOut: a step took longer than it may.
	ErrOperationTimedOut Reason = "OPERATION_TIMED_OUT"
)

// Reasons of CANCELLED.
const (
	// ErrOperationCancelled: cancelOperation ended the operation; its effects are undone, but for what had ended of a batch.
	ErrOperationCancelled Reason = "OPERATION_CANCELLED"
)

// Reasons of INTERNAL.
const (
	// ErrHypervisorFailed: the hypervisor refused or died; the message holds the redacted end of what it said.
	ErrHypervisorFailed Reason = "HYPERVISOR_FAILED"
	// ErrBackendFailed: a tool or the kernel refused; the message holds what it said.
	ErrBackendFailed Reason = "BACKEND_FAILED"
	// ErrUnexpected: a fault of virtfleet; metadata `log_id` finds it in the log.
	ErrUnexpected Reason = "UNEXPECTED"
)

// Reasons of DATA_LOSS.
const (
	// ErrImageCorrupt: an image does not parse or its check fails.
	ErrImageCorrupt Reason = "IMAGE_CORRUPT"
	// ErrChecksumMismatch: data does not have the digest that was promised.
	ErrChecksumMismatch Reason = "CHECKSUM_MISMATCH"
)

var codesOfReasons = map[Reason]codes.Code{
	ErrNameMalformed:        codes.InvalidArgument,
	ErrFieldRequired:        codes.InvalidArgument,
	ErrFieldOutOfRange:      codes.InvalidArgument,
	ErrFieldConflict:        codes.InvalidArgument,
	ErrMaskPathUnknown:      codes.InvalidArgument,
	ErrFilterSyntax:         codes.InvalidArgument,
	ErrPageTokenInvalid:     codes.InvalidArgument,
	ErrDocumentInvalid:      codes.InvalidArgument,
	ErrReferenceOtherNode:   codes.InvalidArgument,
	ErrRequestIDReused:      codes.InvalidArgument,
	ErrUnknownField:         codes.InvalidArgument,
	ErrResourceNotFound:     codes.NotFound,
	ErrResourceMoved:        codes.NotFound,
	ErrNodeUnknown:          codes.NotFound,
	ErrDeviceNotFound:       codes.NotFound,
	ErrResourceExists:       codes.AlreadyExists,
	ErrIdentityInUse:        codes.AlreadyExists,
	ErrWrongState:           codes.FailedPrecondition,
	ErrNotLiveUpdatable:     codes.FailedPrecondition,
	ErrResourceInUse:        codes.FailedPrecondition,
	ErrHasChildren:          codes.FailedPrecondition,
	ErrWrongNode:            codes.FailedPrecondition,
	ErrNodeCordoned:         codes.FailedPrecondition,
	ErrBackingMissing:       codes.FailedPrecondition,
	ErrWouldOverwrite:       codes.FailedPrecondition,
	ErrSubnetOverlap:        codes.FailedPrecondition,
	ErrAmbiguousName:        codes.FailedPrecondition,
	ErrUIDMismatch:          codes.FailedPrecondition,
	ErrNotCancellable:       codes.FailedPrecondition,
	ErrDeletionProtected:    codes.FailedPrecondition,
	ErrEtagMismatch:         codes.Aborted,
	ErrOperationConflict:    codes.Aborted,
	ErrChangeRolledBack:     codes.Aborted,
	ErrResumeTokenCompacted: codes.OutOfRange,
	ErrRangeBeyondEnd:       codes.OutOfRange,
	ErrPoolFull:             codes.ResourceExhausted,
	ErrNodeMemoryShort:      codes.ResourceExhausted,
	ErrAddressesExhausted:   codes.ResourceExhausted,
	ErrQuotaExceeded:        codes.ResourceExhausted,
	ErrRateLimited:          codes.ResourceExhausted,
	ErrSlowReader:           codes.ResourceExhausted,
	ErrMessageTooLarge:      codes.ResourceExhausted,
	ErrPermissionMissing:    codes.PermissionDenied,
	ErrReadOnlySocket:       codes.PermissionDenied,
	ErrPathOutsidePool:      codes.PermissionDenied,
	ErrCredentialsInvalid:   codes.Unauthenticated,
	ErrCertificateRevoked:   codes.Unauthenticated,
	ErrJoinTokenInvalid:     codes.Unauthenticated,
	ErrCapabilityMissing:    codes.Unimplemented,
	ErrMethodNotImplemented: codes.Unimplemented,
	ErrNodeUnreachable:      codes.Unavailable,
	ErrServiceDraining:      codes.Unavailable,
	ErrBackendUnreachable:   codes.Unavailable,
	ErrDriverBroken:         codes.Unavailable,
	ErrGuestDidNotComply:    codes.DeadlineExceeded,
	ErrOperationTimedOut:    codes.DeadlineExceeded,
	ErrOperationCancelled:   codes.Canceled,
	ErrHypervisorFailed:     codes.Internal,
	ErrBackendFailed:        codes.Internal,
	ErrUnexpected:           codes.Internal,
	ErrImageCorrupt:         codes.DataLoss,
	ErrChecksumMismatch:     codes.DataLoss,
}

package virtfleet

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// ErrorDomain is the domain in the ErrorInfo of every error of virtfleet.
const ErrorDomain = "virtfleet.dev"

// Reason is the stable cause of an error of virtfleet, such as [ErrWrongState]. A Reason is itself an error, so that
//
//	errors.Is(err, virtfleet.ErrWrongState)
//
// holds for every error with that reason. A reason that this release does not know is kept as it came.
type Reason string

// Error returns the reason as the API writes it: WRONG_STATE.
func (r Reason) Error() string { return string(r) }

// Code returns the code that errors of this reason have; Unknown for a reason that this release does not know.
func (r Reason) Code() codes.Code {
	if code, known := codesOfReasons[r]; known {
		return code
	}
	return codes.Unknown
}

// Code is a whole class of errors, such as [ErrUnavailable]: errors.Is holds for every error with that code, whatever its reason.
type Code codes.Code

// The codes of gRPC, for errors.Is.
const (
	ErrCancelled          = Code(codes.Canceled)
	ErrUnknown            = Code(codes.Unknown)
	ErrInvalidArgument    = Code(codes.InvalidArgument)
	ErrDeadlineExceeded   = Code(codes.DeadlineExceeded)
	ErrNotFound           = Code(codes.NotFound)
	ErrAlreadyExists      = Code(codes.AlreadyExists)
	ErrPermissionDenied   = Code(codes.PermissionDenied)
	ErrResourceExhausted  = Code(codes.ResourceExhausted)
	ErrFailedPrecondition = Code(codes.FailedPrecondition)
	ErrAborted            = Code(codes.Aborted)
	ErrOutOfRange         = Code(codes.OutOfRange)
	ErrUnimplemented      = Code(codes.Unimplemented)
	ErrInternal           = Code(codes.Internal)
	ErrUnavailable        = Code(codes.Unavailable)
	ErrDataLoss           = Code(codes.DataLoss)
	ErrUnauthenticated    = Code(codes.Unauthenticated)
)

// Error returns the name of the code.
func (c Code) Error() string { return codes.Code(c).String() }

// Field is one field of a request that is at fault.
type Field struct {
	// Path is the path below the request, as a field mask writes it: domain.spec.memory.maximum_bytes.
	Path string
	// Description is a sentence for people.
	Description string
}

// Error is a call or an operation that failed. Get at it with errors.As, or with [FromError].
//
// It is also what errors.Is compares with a [Reason], a [Code], [context.Canceled] and [context.DeadlineExceeded].
type Error struct {
	// Code is the code of gRPC.
	Code codes.Code
	// Reason is the stable cause; empty if the error is none of virtfleet's own, such as a lost connection.
	Reason Reason
	// Message is a sentence for people. Never branch on it.
	Message string
	// Metadata holds every variable of the message.
	Metadata map[string]string
	// Fields are the fields at fault.
	Fields []Field
	// Resource is the resource at fault, where it is not the target of the call.
	Resource string
	// Holder is who holds what the call wanted (RESOURCE_IN_USE, IDENTITY_IN_USE, SUBNET_OVERLAP).
	Holder string
	// Operation is the operation that is in the way (OPERATION_CONFLICT).
	Operation string
	// NewName is where the resource lives now (RESOURCE_MOVED).
	NewName string
	// RetryDelay is the pause that the server asks for; 0: it asks for none.
	RetryDelay time.Duration

	status *statuspb.Status
}

// FromError returns the typed error for what a call returned; nil for nil. Errors of calls through a [Client] already are of this
// type, possibly wrapped; this is for errors of streams and stubs on other connections.
func FromError(err error) *Error {
	if err == nil {
		return nil
	}
	var typed *Error
	if errors.As(err, &typed) {
		return typed
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return FromStatus(status.FromContextError(err).Proto())
	}
	return FromStatus(status.Convert(err).Proto())
}

// FromStatus returns the error for a status, as operations, batches and watches carry it; nil for nil and for OK.
func FromStatus(from *statuspb.Status) *Error {
	if from.GetCode() == int32(codes.OK) {
		return nil
	}
	found := &Error{Code: codes.Code(from.GetCode()), Message: from.GetMessage(), status: from}
	for _, detail := range from.GetDetails() {
		message, err := detail.UnmarshalNew()
		if err != nil {
			continue // of a kind that this release does not know; Status still holds it
		}
		found.take(message)
	}
	return found
}

func (e *Error) take(detail any) {
	switch detail := detail.(type) {
	case *errdetails.ErrorInfo:
		if detail.GetDomain() != ErrorDomain {
			return
		}
		e.Reason = Reason(detail.GetReason())
		e.Metadata = detail.GetMetadata()
		e.Holder = e.Metadata["holder"]
		e.Operation = e.Metadata["operation"]
		e.NewName = e.Metadata["new_name"]
	case *errdetails.BadRequest:
		for _, violation := range detail.GetFieldViolations() {
			e.Fields = append(e.Fields, Field{violation.GetField(), violation.GetDescription()})
		}
	case *errdetails.PreconditionFailure:
		for _, violation := range detail.GetViolations() {
			// The subject is a path below the request, or the resource.
			if subject := violation.GetSubject(); subject != "" && !strings.Contains(subject, "/") {
				e.Fields = append(e.Fields, Field{subject, violation.GetDescription()})
			}
		}
	case *errdetails.ResourceInfo:
		e.Resource = detail.GetResourceName()
	case *errdetails.RetryInfo:
		e.RetryDelay = detail.GetRetryDelay().AsDuration()
	}
}

// Error returns code, reason and message.
func (e *Error) Error() string {
	if e.Reason == "" {
		return fmt.Sprintf("%v: %s", e.Code, e.Message)
	}
	return fmt.Sprintf("%v %s: %s", e.Code, e.Reason, e.Message)
}

// Is reports whether the error has the reason or the code that target is.
func (e *Error) Is(target error) bool {
	switch target := target.(type) {
	case Reason:
		return e.Reason == target
	case Code:
		return e.Code == codes.Code(target)
	}
	return target == context.Canceled && e.Code == codes.Canceled && e.Reason == "" ||
		target == context.DeadlineExceeded && e.Code == codes.DeadlineExceeded && e.Reason == ""
}

// GRPCStatus returns the error as gRPC's status package knows it.
func (e *Error) GRPCStatus() *status.Status { return status.FromProto(e.status) }

// Status returns the whole status with all details.
func (e *Error) Status() *statuspb.Status { return e.status }

// HasReason reports whether the error has a reason; a nil error has none.
func (e *Error) HasReason(reason Reason) bool { return e != nil && e.Reason == reason }

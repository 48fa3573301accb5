package virtfleet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func timeOf(seconds float64) time.Duration { return time.Duration(seconds * float64(time.Second)) }

func TestAnErrorIsItsReasonAndItsCode(t *testing.T) {
	err := error(FromError(failure(t, ErrWrongState, map[string]string{"state": "RUNNING"})))
	wrapped := fmt.Errorf("while starting: %w", err)
	for _, target := range []error{ErrWrongState, ErrFailedPrecondition} {
		if !errors.Is(wrapped, target) {
			t.Errorf("%v is not %v", wrapped, target)
		}
	}
	for _, target := range []error{ErrEtagMismatch, ErrAborted, context.Canceled, context.DeadlineExceeded, io.EOF} {
		if errors.Is(wrapped, target) {
			t.Errorf("%v is %v", wrapped, target)
		}
	}
	var typed *Error
	if !errors.As(wrapped, &typed) || typed.Metadata["state"] != "RUNNING" || typed.Message != "a sentence" {
		t.Errorf("%+v", typed)
	}
	if text := typed.Error(); text != "FailedPrecondition WRONG_STATE: a sentence" {
		t.Error(text)
	}
	if status.Code(wrapped) != codes.FailedPrecondition || len(typed.Status().GetDetails()) != 1 {
		t.Errorf("gRPC sees %v, details %v", status.Code(wrapped), typed.Status().GetDetails())
	}
}

func TestDetailsAreValues(t *testing.T) {
	err := FromError(failure(t, ErrIdentityInUse, map[string]string{"holder": "nodes/n1/domains/web"},
		&errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{
			{Field: "domain.spec.interfaces.lan.mac_address", Description: "taken"},
		}},
		&errdetails.ResourceInfo{ResourceName: "nodes/n1/domains/web"}, retryAfter(1.5)))
	if err.Holder != "nodes/n1/domains/web" || err.Resource != err.Holder || err.RetryDelay != 1500*time.Millisecond {
		t.Errorf("%+v", err)
	}
	if !slices.Equal(err.Fields, []Field{{"domain.spec.interfaces.lan.mac_address", "taken"}}) {
		t.Errorf("%+v", err.Fields)
	}
	err = FromError(failure(t, ErrNotLiveUpdatable, nil, &errdetails.PreconditionFailure{
		Violations: []*errdetails.PreconditionFailure_Violation{
			{Type: "NOT_LIVE_UPDATABLE", Subject: "spec.cpu.vcpu_count", Description: "needs a restart"},
			{Type: "NOT_LIVE_UPDATABLE", Subject: "nodes/n1/domains/web"}, {Type: "NOT_LIVE_UPDATABLE"},
		},
	}))
	if !slices.Equal(err.Fields, []Field{{"spec.cpu.vcpu_count", "needs a restart"}}) {
		t.Errorf("%+v", err.Fields)
	}
	if moved := FromError(failure(t, ErrResourceMoved, map[string]string{"new_name": "nodes/n2/domains/web"})); moved.NewName !=
		"nodes/n2/domains/web" {
		t.Errorf("%+v", moved)
	}
	if busy := FromError(failure(t, ErrOperationConflict, map[string]string{"operation": "nodes/n1/x"})); busy.Operation != "nodes/n1/x" {
		t.Errorf("%+v", busy)
	}
}

func TestErrorsThatAreNotOurs(t *testing.T) {
	if FromError(nil) != nil || FromStatus(nil) != nil {
		t.Error("no error is an error")
	}
	lost := FromError(status.Error(codes.Unavailable, "connection lost"))
	if lost.Reason != "" || !errors.Is(lost, ErrUnavailable) {
		t.Errorf("%+v", lost)
	}
	for _, ended := range []error{context.Canceled, context.DeadlineExceeded} {
		if !errors.Is(FromError(ended), ended) {
			t.Errorf("%v is lost", ended)
		}
	}
	foreign, err := status.New(codes.Aborted, "x").WithDetails(&errdetails.ErrorInfo{Reason: "WRONG_STATE", Domain: "elsewhere.example"})
	if err != nil {
		t.Fatal(err)
	}
	if found := FromError(foreign.Err()); found.Reason != "" {
		t.Errorf("the reason of another domain: %+v", found)
	}
	unknown := FromError(failure(t, Reason("OF_A_LATER_RELEASE"), nil))
	if unknown.Reason != "OF_A_LATER_RELEASE" || unknown.Code != codes.Unknown {
		t.Errorf("%+v", unknown)
	}
}

func TestEveryReasonHasACodeAndNoNameTwice(t *testing.T) {
	if len(codesOfReasons) < 60 {
		t.Errorf("only %d reasons", len(codesOfReasons))
	}
	for reason := range codesOfReasons {
		if reason.Code() == codes.Unknown || reason.Code() == codes.OK || reason.Error() != string(reason) {
			t.Errorf("%s: %v", reason, reason.Code())
		}
	}
}

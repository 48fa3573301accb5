package virtfleet

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	computev1 "virtfleet.dev/go/compute/v1"
	typev1 "virtfleet.dev/go/type/v1"
)

func packed(t *testing.T, message proto.Message) *anypb.Any {
	t.Helper()
	found, err := anypb.New(message)
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func ended(t *testing.T, result proto.Message) *longrunningpb.Operation {
	t.Helper()
	return &longrunningpb.Operation{
		Name: "operations/x", Done: true, Metadata: packed(t, &typev1.OperationMetadata{Phase: "done"}),
		Result: &longrunningpb.Operation_Response{Response: packed(t, result)},
	}
}

func TestWaitOutlastsWhatIsInTheWay(t *testing.T) {
	server := startPeer(t, func(number int, request proto.Message, stream grpc.ServerStream) error {
		if _, starts := request.(*computev1.StartDomainRequest); starts {
			return stream.SendMsg(&longrunningpb.Operation{Name: "operations/x"})
		}
		switch {
		case number <= 1+2*Attempts:
			return status.Error(codes.Unavailable, "no gateway")
		case number == 2+2*Attempts:
			running := &typev1.OperationMetadata{Phase: "attaching disks", ProgressRatio: 0.5}
			return stream.SendMsg(&longrunningpb.Operation{Name: "operations/x", Metadata: packed(t, running)})
		default:
			return stream.SendMsg(ended(t, &computev1.Domain{Name: "nodes/n1/domains/web"}))
		}
	})
	operation, err := server.dial(t).Domains.StartDomain(t.Context(), &computev1.StartDomainRequest{})
	if err != nil || operation.Done() {
		t.Fatal(operation, err)
	}
	var phases []string
	domain, err := operation.Wait(t.Context(), WithProgress(func(metadata *typev1.OperationMetadata) {
		phases = append(phases, metadata.GetPhase())
	}))
	if err != nil || domain.GetName() != "nodes/n1/domains/web" || !operation.Done() {
		t.Fatal(domain, err)
	}
	if text := strings.Join(phases, ","); !strings.HasSuffix(text, ",attaching disks,done") {
		t.Error(text)
	}
	if wait := server.requests()[1].(*longrunningpb.WaitOperationRequest); wait.GetTimeout().AsDuration() != progressInterval {
		t.Error(wait)
	}
}

func TestAnOperationThatFailsIsATypedError(t *testing.T) {
	server := startPeer(t, func(_ int, _ proto.Message, stream grpc.ServerStream) error {
		failed := failureStatus(t, ErrNodeMemoryShort, nil)
		return stream.SendMsg(&longrunningpb.Operation{Done: true, Result: &longrunningpb.Operation_Error{Error: failed}})
	})
	operation, err := server.dial(t).Domains.StartDomain(t.Context(), &computev1.StartDomainRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if domain, err := operation.Wait(t.Context()); domain != nil || !errors.Is(err, ErrNodeMemoryShort) {
		t.Error(domain, err)
	}
}

func TestTheEndOfTheContextEndsTheWaitAlone(t *testing.T) {
	server := startPeer(t, func(_ int, _ proto.Message, stream grpc.ServerStream) error {
		<-stream.Context().Done()
		return stream.Context().Err()
	})
	operation := OperationNamed[*computev1.Domain](server.dial(t), "nodes/n1/services/compute/operations/x")
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err := operation.Wait(ctx)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "operations/x has not ended and goes on") {
		t.Error(err)
	}
	lost := startPeer(t, func(int, proto.Message, grpc.ServerStream) error { return failure(t, ErrNodeUnreachable, nil) })
	ctx, cancel = context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_, err = OperationNamed[*computev1.Domain](lost.dial(t), "operations/x").Wait(ctx)
	if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, ErrNodeUnreachable) {
		t.Error(err)
	}
}

func TestAnOperationThatIsGoneEndsTheWait(t *testing.T) {
	server := startPeer(t, func(int, proto.Message, grpc.ServerStream) error { return failure(t, ErrResourceNotFound, nil) })
	if _, err := OperationNamed[*emptypb.Empty](server.dial(t), "operations/x").Wait(t.Context()); !errors.Is(err, ErrResourceNotFound) {
		t.Error(err)
	}
}

func TestAResultOfAnotherKindIsAnError(t *testing.T) {
	server := startPeer(t, func(_ int, _ proto.Message, stream grpc.ServerStream) error {
		return stream.SendMsg(ended(t, &emptypb.Empty{}))
	})
	client := server.dial(t)
	if _, err := OperationNamed[*computev1.Domain](client, "operations/x").Wait(t.Context()); err == nil {
		t.Error("it is taken")
	}
	operation := OperationNamed[*emptypb.Empty](client, "operations/x")
	if err := operation.Refresh(t.Context()); err != nil || !operation.Done() || operation.Metadata().GetPhase() != "done" {
		t.Error(operation, err)
	}
}

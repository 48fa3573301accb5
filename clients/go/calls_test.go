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
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	commonv1 "virtfleet.dev/go/common/v1"
	computev1 "virtfleet.dev/go/compute/v1"
	storagev1 "virtfleet.dev/go/storage/v1"
	typev1 "virtfleet.dev/go/type/v1"
)

func TestEffectsAreReadFromTheDescriptors(t *testing.T) {
	for path, effect := range map[string]typev1.Effect{
		"/virtfleet.compute.v1.DomainService/ListDomains": typev1.Effect_EFFECT_NONE,
		"/virtfleet.compute.v1.DomainService/StartDomain": typev1.Effect_EFFECT_BACKEND,
		"/virtfleet.fleet.v1.NodeService/CordonNode":      typev1.Effect_EFFECT_RECORD,
		"/google.longrunning.Operations/WaitOperation":    typev1.Effect_EFFECT_NONE,
		"/google.longrunning.Operations/CancelOperation":  typev1.Effect_EFFECT_UNSPECIFIED,
		"/grpc.health.v1.Health/Check":                    typev1.Effect_EFFECT_NONE,
		"/nowhere.v1.Nothing/SetAll":                      typev1.Effect_EFFECT_UNSPECIFIED,
	} {
		if found := effectOf(path); found != effect {
			t.Errorf("%s: %v instead of %v", path, found, effect)
		}
	}
}

func TestEveryMutationGetsARequestIDAndIsNotChanged(t *testing.T) {
	mutations := 0
	protoregistry.GlobalFiles.RangeFiles(func(file protoreflect.FileDescriptor) bool {
		if !strings.HasPrefix(string(file.Package()), "virtfleet.") {
			return true
		}
		for service := range file.Services().Len() {
			for index := range file.Services().Get(service).Methods().Len() {
				method := file.Services().Get(service).Methods().Get(index)
				kind, err := protoregistry.GlobalTypes.FindMessageByName(method.Input().FullName())
				if err != nil {
					t.Fatal(err)
				}
				request := kind.New().Interface()
				path := "/" + string(method.Parent().FullName()) + "/" + string(method.Name())
				sent, repeatable := prepare(path, request)
				field := method.Input().Fields().ByName("request_id")
				if effectOf(path) == typev1.Effect_EFFECT_NONE {
					if sent != any(request) || !repeatable {
						t.Errorf("%s: a read is not sent as it is", path)
					}
					continue
				}
				mutations++
				if field == nil {
					if repeatable {
						t.Errorf("%s is repeated without a request_id", path)
					}
					continue
				}
				if id := sent.(proto.Message).ProtoReflect().Get(field).String(); len(id) != 36 || !repeatable {
					t.Errorf("%s: request_id %q", path, id)
				}
				if request.ProtoReflect().Has(field) {
					t.Errorf("%s: the caller's message has changed", path)
				}
			}
		}
		return true
	})
	if mutations < 40 {
		t.Errorf("only %d mutations", mutations)
	}
}

func TestACallIsRepeatedWithTheSameRequestID(t *testing.T) {
	server := startPeer(t, func(number int, _ proto.Message, stream grpc.ServerStream) error {
		if number < Attempts {
			return failure(t, ErrServiceDraining, nil)
		}
		return stream.SendMsg(&longrunningpb.Operation{Name: "operations/x"})
	})
	request := &computev1.StartDomainRequest{Name: "nodes/n1/domains/web"}
	operation, err := server.dial(t).Domains.StartDomain(t.Context(), request)
	if err != nil || operation.Name() != "operations/x" {
		t.Fatal(operation, err)
	}
	asked := server.requests()
	ids := map[string]bool{}
	for _, one := range asked {
		ids[one.(*computev1.StartDomainRequest).GetRequestId()] = true
	}
	if len(asked) != Attempts || len(ids) != 1 || ids[""] {
		t.Errorf("%d calls with the ids %v", len(asked), ids)
	}
	if request.GetRequestId() != "" {
		t.Error("the caller's message has changed")
	}
}

func TestACallThatAStoppingServerNeverTookIsRepeated(t *testing.T) {
	server := startPeer(t, func(number int, _ proto.Message, stream grpc.ServerStream) error {
		if number == 1 {
			return status.Error(codes.Canceled, "CANCELLED") // gRPC's own: no reason
		}
		return stream.SendMsg(&longrunningpb.Operation{Name: "operations/x"})
	})
	if err := start(t.Context(), server.dial(t)); err != nil {
		t.Fatal(err)
	}
	asked := server.requests()
	first, second := asked[0].(*computev1.StartDomainRequest), asked[1].(*computev1.StartDomainRequest)
	if len(asked) != 2 || first.GetRequestId() == "" || first.GetRequestId() != second.GetRequestId() {
		t.Errorf("asked %v", asked)
	}
}

func TestTheRequestIDOfTheCallerStays(t *testing.T) {
	server := startPeer(t, func(_ int, _ proto.Message, stream grpc.ServerStream) error {
		return stream.SendMsg(&longrunningpb.Operation{})
	})
	client := server.dial(t)
	if _, err := client.Domains.StartDomain(t.Context(), &computev1.StartDomainRequest{RequestId: "mine"}); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Domains.StartDomain(t.Context(), &computev1.StartDomainRequest{}); err != nil {
		t.Fatal(err)
	}
	asked := server.requests()
	if id := asked[0].(*computev1.StartDomainRequest).GetRequestId(); id != "mine" {
		t.Error(id)
	}
}

func TestWhatIsNotRepeated(t *testing.T) {
	for name, one := range map[string]struct {
		failure error
		call    func(context.Context, *Client) error
		calls   int
	}{
		"another code than UNAVAILABLE": {failure(t, ErrUnexpected, nil), start, 1},
		"a conflict":                    {failure(t, ErrOperationConflict, nil), start, 1},
		"a full pool":                   {failure(t, ErrPoolFull, nil, retryAfter(0.01)), start, 1},
		"a mutation without request_id": {status.Error(codes.Unavailable, ""), cancelOperation, 1},
		"a stream":                      {status.Error(codes.Unavailable, ""), download, 1},
		"a read, more often than often": {status.Error(codes.Unavailable, ""), get, Attempts},
	} {
		t.Run(name, func(t *testing.T) {
			server := startPeer(t, func(int, proto.Message, grpc.ServerStream) error { return one.failure })
			err := one.call(t.Context(), server.dial(t))
			var typed *Error
			if !errors.As(err, &typed) || typed.Code != status.Code(one.failure) {
				t.Errorf("fails with %v", err)
			}
			if calls := len(server.requests()); calls != one.calls {
				t.Errorf("%d calls", calls)
			}
		})
	}
}

func start(ctx context.Context, client *Client) error {
	_, err := client.Domains.StartDomain(ctx, &computev1.StartDomainRequest{})
	return err
}

func get(ctx context.Context, client *Client) error {
	_, err := client.Domains.GetDomain(ctx, &computev1.GetDomainRequest{})
	return err
}

func cancelOperation(ctx context.Context, client *Client) error {
	return OperationNamed[*computev1.Domain](client, "operations/x").Cancel(ctx)
}

func download(ctx context.Context, client *Client) error {
	stream, err := client.Volumes.DownloadVolume(ctx, &storagev1.DownloadVolumeRequest{})
	if err != nil {
		return err
	}
	_, err = stream.Recv()
	return err
}

func TestNoPauseRunsBeyondTheDeadline(t *testing.T) {
	server := startPeer(t, func(int, proto.Message, grpc.ServerStream) error {
		return failure(t, ErrNodeUnreachable, nil, retryAfter(30))
	})
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	// The pause that is asked for is 30 s, of which 3 are granted: more than there is.
	err := get(ctx, server.dial(t))
	if !errors.Is(err, ErrNodeUnreachable) || ctx.Err() != nil || len(server.requests()) != 1 {
		t.Errorf("%v after %d calls; the deadline: %v", err, len(server.requests()), ctx.Err())
	}
}

func TestPausesGrowAndAreBounded(t *testing.T) {
	for attempt, longest := range map[int]time.Duration{1: 100, 2: 200, 3: 400, 5: 1600, 6: 3000, 90: 3000} {
		for range 50 {
			if pause := delay(attempt, 0); pause < longest*time.Millisecond/2 || pause > longest*time.Millisecond {
				t.Errorf("attempt %d: %v", attempt, pause)
			}
		}
	}
	if pause := delay(1, time.Second); pause != time.Second {
		t.Error(pause)
	}
	if pause := delay(1, time.Hour); pause != longestDelay {
		t.Error(pause)
	}
}

func TestACallMayNameItsNode(t *testing.T) {
	server := startPeer(t, func(_ int, _ proto.Message, stream grpc.ServerStream) error {
		received, _ := metadata.FromIncomingContext(stream.Context())
		return stream.SendMsg(&commonv1.WhoAmIResponse{Subject: strings.Join(received.Get("x-virtfleet-node"), ",")})
	})
	answer, err := server.dial(t).Access.WhoAmI(ToNode(t.Context(), "n1/compute"), &commonv1.WhoAmIRequest{})
	if err != nil || answer.GetSubject() != "n1/compute" {
		t.Error(answer, err)
	}
}

func TestTheFirstMessageOfAnUploadCarriesARequestID(t *testing.T) {
	server := startPeer(t, func(_ int, _ proto.Message, stream grpc.ServerStream) error {
		return stream.SendMsg(&storagev1.UploadVolumeResponse{})
	})
	stream, err := server.dial(t).Volumes.UploadVolume(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&storagev1.UploadVolumeRequest{Name: "nodes/n1/pools/p/volumes/v"}); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.CloseAndRecv(); err != nil {
		t.Fatal(err)
	}
	if id := server.requests()[0].(*storagev1.UploadVolumeRequest).GetRequestId(); len(id) != 36 {
		t.Errorf("request_id %q", id)
	}
}

package virtfleet

import (
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
)

// peer is a server that answers as a test says, and remembers what it was asked.
type peer struct {
	address string
	mutex   sync.Mutex
	asked   []proto.Message
	answer  func(number int, request proto.Message, stream grpc.ServerStream) error
}

// startPeer starts a server; answer gets each call with its number, from 1.
func startPeer(t *testing.T, answer func(number int, request proto.Message, stream grpc.ServerStream) error) *peer {
	t.Helper()
	found := &peer{address: "unix://" + filepath.Join(t.TempDir(), "peer"), answer: answer}
	found.serve(t)
	return found
}

func (p *peer) serve(t *testing.T, options ...grpc.ServerOption) (stop func()) {
	t.Helper()
	listener, err := net.Listen("unix", strings.TrimPrefix(p.address, "unix://"))
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(append(options, grpc.UnknownServiceHandler(p.handle))...)
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)
	return server.Stop
}

func (p *peer) handle(_ any, stream grpc.ServerStream) error {
	path, _ := grpc.MethodFromServerStream(stream)
	name := protoreflect.FullName(strings.ReplaceAll(strings.TrimPrefix(path, "/"), "/", "."))
	descriptor, err := protoregistry.GlobalFiles.FindDescriptorByName(name)
	if err != nil {
		return status.Error(codes.Unimplemented, err.Error())
	}
	kind, err := protoregistry.GlobalTypes.FindMessageByName(descriptor.(protoreflect.MethodDescriptor).Input().FullName())
	if err != nil {
		return err
	}
	request := kind.New().Interface()
	if err := stream.RecvMsg(request); err != nil {
		return err
	}
	p.mutex.Lock()
	p.asked = append(p.asked, request)
	number := len(p.asked)
	p.mutex.Unlock()
	return p.answer(number, request, stream)
}

func (p *peer) requests() []proto.Message {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return append([]proto.Message(nil), p.asked...)
}

func (p *peer) dial(t *testing.T) *Client {
	t.Helper()
	client, err := Dial(t.Context(), WithAddress(p.address))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// failure returns an error as servers of virtfleet send it.
func failure(t *testing.T, reason Reason, metadata map[string]string, more ...proto.Message) error {
	t.Helper()
	return status.ErrorProto(failureStatus(t, reason, metadata, more...))
}

func failureStatus(t *testing.T, reason Reason, metadata map[string]string, more ...proto.Message) *statuspb.Status {
	t.Helper()
	found := &statuspb.Status{Code: int32(reason.Code()), Message: "a sentence"}
	info := &errdetails.ErrorInfo{Reason: string(reason), Domain: ErrorDomain, Metadata: metadata}
	for _, detail := range append([]proto.Message{info}, more...) {
		packed, err := anypb.New(detail)
		if err != nil {
			t.Fatal(err)
		}
		found.Details = append(found.Details, packed)
	}
	return found
}

func retryAfter(seconds float64) proto.Message {
	return &errdetails.RetryInfo{RetryDelay: durationpb.New(timeOf(seconds))}
}

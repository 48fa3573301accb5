package virtfleet

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	typev1 "virtfleet.dev/go/type/v1"
)

// Attempts is how often a call that is safe to repeat is made in all.
const Attempts = 4

const (
	firstDelay   = 100 * time.Millisecond
	longestDelay = 3 * time.Second
	nodeKey      = "x-virtfleet-node"
)

// ToNode returns a context whose calls name a node or one service of it, for calls whose request names none: the health and the
// reflection of n1 or n1/compute through a gateway.
func ToNode(ctx context.Context, node string) context.Context {
	return metadata.AppendToOutgoingContext(ctx, nodeKey, node)
}

var effects sync.Map // from the path of a method to its effect

// effectOf returns what a method changes; EFFECT_UNSPECIFIED where nothing says so.
func effectOf(path string) typev1.Effect {
	if effect, known := effects.Load(path); known {
		return effect.(typev1.Effect)
	}
	effect := declaredEffect(path)
	effects.Store(path, effect)
	return effect
}

func declaredEffect(path string) typev1.Effect {
	full := protoreflect.FullName(strings.ReplaceAll(strings.TrimPrefix(path, "/"), "/", "."))
	descriptor, err := protoregistry.GlobalFiles.FindDescriptorByName(full)
	if err == nil && proto.HasExtension(descriptor.Options(), typev1.E_Method) {
		return proto.GetExtension(descriptor.Options(), typev1.E_Method).(*typev1.MethodRule).GetEffect()
	}
	// The standard services have no rule of ours: their reads are named as such, everything else is never repeated.
	for _, read := range []string{"Get", "List", "Wait", "Check"} {
		if strings.HasPrefix(string(full.Name()), read) {
			return typev1.Effect_EFFECT_NONE
		}
	}
	return typev1.Effect_EFFECT_UNSPECIFIED
}

// prepare gives a mutation its request_id if the caller has not. It returns what is sent, and whether that may be repeated.
// The caller's message stays as it is: sent a second time it is a second call, not a repetition of the first.
func prepare(path string, request any) (any, bool) {
	if effectOf(path) == typev1.Effect_EFFECT_NONE {
		return request, true
	}
	message, ok := request.(proto.Message)
	if !ok {
		return request, false
	}
	reflected := message.ProtoReflect()
	field := reflected.Descriptor().Fields().ByName("request_id")
	if field == nil {
		return request, false
	}
	if reflected.Get(field).String() == "" {
		message = proto.Clone(message)
		message.ProtoReflect().Set(field, protoreflect.ValueOfString(newUUID()))
	}
	return message, true
}

// delay returns how long to wait before repetition number attempt; asked is what the server asks for.
func delay(attempt int, asked time.Duration) time.Duration {
	longest := min(firstDelay<<min(attempt-1, 10), longestDelay)
	jittered := time.Duration(float64(longest) * (0.5 + rand.Float64()/2))
	return max(jittered, min(asked, longestDelay))
}

// lost reports whether a call was lost on its way, so that nobody knows how far it came. Every server of virtfleet gives a reason
// with CANCELLED. Without one it comes from gRPC itself: it ends so what still waits for a handler when a server stops.
func lost(failure *Error) bool {
	return failure.Code == codes.Unavailable || failure.Code == codes.Canceled && failure.Reason == ""
}

// sleep waits, or until the context ends.
func sleep(ctx context.Context, duration time.Duration) error {
	timer := time.NewTimer(duration)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
		return nil
	}
}

func interceptUnary(
	ctx context.Context, method string, request, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker,
	options ...grpc.CallOption,
) error {
	request, repeatable := prepare(method, request)
	for attempt := 1; ; attempt++ {
		err := invoke(ctx, method, request, reply, conn, options...)
		if err == nil {
			return nil
		}
		failure := FromError(err)
		if !repeatable || !lost(failure) || ctx.Err() != nil || attempt == Attempts {
			return failure
		}
		pause := delay(attempt, failure.RetryDelay)
		if deadline, limited := ctx.Deadline(); limited && time.Until(deadline) <= pause {
			return failure
		}
		if sleep(ctx, pause) != nil {
			return failure
		}
	}
}

func interceptStream(
	ctx context.Context, description *grpc.StreamDesc, conn *grpc.ClientConn, method string, open grpc.Streamer,
	options ...grpc.CallOption,
) (grpc.ClientStream, error) {
	stream, err := open(ctx, description, conn, method, options...)
	if err != nil {
		return nil, FromError(err)
	}
	return &typedStream{ClientStream: stream, method: method}, nil
}

// typedStream is a stream whose failures are typed, and whose first message carries a request_id where it should.
type typedStream struct {
	grpc.ClientStream
	method string
	begun  bool
}

// SendMsg is part of grpc.ClientStream.
func (s *typedStream) SendMsg(message any) error {
	if !s.begun {
		s.begun = true
		message, _ = prepare(s.method, message)
	}
	return streamError(s.ClientStream.SendMsg(message))
}

// RecvMsg is part of grpc.ClientStream.
func (s *typedStream) RecvMsg(message any) error {
	return streamError(s.ClientStream.RecvMsg(message))
}

func streamError(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	return FromError(err)
}

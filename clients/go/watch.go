package virtfleet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	typev1 "virtfleet.dev/go/type/v1"
)

// WatchAnswer is what every watch answers.
type WatchAnswer interface {
	proto.Message
	GetResumeToken() string
	GetBookmark() *typev1.WatchBookmark
	GetSnapshotEnd() *typev1.WatchSnapshotEnd
}

// FollowOption changes how a watch is followed.
type FollowOption func(*followPlan)

type followPlan struct {
	resnapshot bool
	begin      func(snapshot bool)
	lost       func(error)
}

// Resnapshot has a watch begin again with a snapshot when the history no longer reaches back to its token. What does not occur in
// that snapshot is gone. Otherwise the watch ends with ErrResumeTokenCompacted.
func Resnapshot() FollowOption {
	return func(plan *followPlan) { plan.resnapshot = true }
}

// OnBegin has a function called before the answers of each stream: the first, and those after breaks. With snapshot the stream begins
// with all that exists; without, it goes on where the last one ended.
func OnBegin(begin func(snapshot bool)) FollowOption {
	return func(plan *followPlan) { plan.begin = begin }
}

// OnLost has a function called with the cause when a stream breaks that will be resumed.
func OnLost(lost func(error)) FollowOption {
	return func(plan *followPlan) { plan.lost = lost }
}

// Follow yields the answers of a watch for ever, resuming by token over lost connections, restarted gateways, drains and slow
// reading. It is what the followers of the services (FollowResources) are made of. The first error is the last that is yielded:
// ctx has ended, or the watch is refused. If something stood in the way when ctx ended, such as a host that is not reached, the error
// holds that too. The request stays as it is.
func Follow[Request proto.Message, A any, Answer interface {
	*A
	WatchAnswer
}](
	ctx context.Context,
	watch func(context.Context, Request, ...grpc.CallOption) (grpc.ServerStreamingClient[A], error),
	request Request,
	options ...FollowOption,
) iter.Seq2[Answer, error] {
	plan := followPlan{begin: func(bool) {}, lost: func(error) {}}
	for _, option := range options {
		option(&plan)
	}
	return func(yield func(Answer, error) bool) {
		// Ends the stream that is open when the loop over this is left.
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		place := newResumption(request)
		var obstacle error
		for failures := 0; ; {
			answered := false
			err := readStream(ctx, watch, place.request.(Request), func(answer Answer) bool {
				if !answered {
					answered, obstacle = true, nil
					plan.begin(place.inSnapshot)
				}
				place.note(answer)
				return yield(answer, nil)
			})
			switch {
			case err == nil: // the loop over this has been left
				return
			case ctx.Err() != nil:
				yield(nil, endOf(ctx, obstacle))
				return
			case errors.Is(err, io.EOF), errors.Is(err, ErrUnavailable), errors.Is(err, ErrSlowReader), ofTransport(err):
				// What the token is for.
			case errors.Is(err, ErrResumeTokenCompacted) && plan.resnapshot:
				place.forget()
			default:
				yield(nil, err)
				return
			}
			plan.lost(err)
			if answered {
				failures = 0
				continue
			}
			failures++
			obstacle = err
			if sleep(ctx, delay(failures, FromError(err).RetryDelay)) != nil {
				yield(nil, endOf(ctx, obstacle))
				return
			}
		}
	}
}

// endOf returns the cause of a context that has ended, with what stood in the way of the watch when it did.
func endOf(ctx context.Context, obstacle error) error {
	if obstacle == nil {
		return context.Cause(ctx)
	}
	return fmt.Errorf("%w: %w", context.Cause(ctx), obstacle)
}

// ofTransport reports whether a stream was cut by what carries it. Errors of virtfleet itself with these codes have a reason.
func ofTransport(err error) bool {
	failure := FromError(err)
	return failure.Reason == "" && (failure.Code == codes.Internal || failure.Code == codes.Canceled)
}

// readStream opens one stream and gives each answer away; nil when give does not want more, io.EOF at the end of the stream.
func readStream[Request proto.Message, A any, Answer interface {
	*A
	WatchAnswer
}](
	ctx context.Context,
	watch func(context.Context, Request, ...grpc.CallOption) (grpc.ServerStreamingClient[A], error),
	request Request,
	give func(Answer) bool,
) error {
	stream, err := watch(ctx, request)
	if err != nil {
		return FromError(err)
	}
	for {
		answer, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return io.EOF
		}
		if err != nil {
			return FromError(err)
		}
		if !give(answer) {
			return nil
		}
	}
}

// resumption is where a watch stands, so that it can go on after any break.
type resumption struct {
	request    proto.Message
	inSnapshot bool
}

func newResumption(request proto.Message) *resumption {
	copied := proto.Clone(request)
	begun := copied.ProtoReflect().WhichOneof(startOf(copied))
	return &resumption{request: copied, inSnapshot: begun == nil || begun.Name() != "resume_token"}
}

func startOf(request proto.Message) protoreflect.OneofDescriptor {
	return request.ProtoReflect().Descriptor().Oneofs().ByName("start")
}

// note takes the token of an answer, except inside a snapshot: a broken snapshot begins again.
func (r *resumption) note(answer WatchAnswer) {
	if answer.GetSnapshotEnd() != nil {
		r.inSnapshot = false
	}
	if token := answer.GetResumeToken(); token != "" && !r.inSnapshot {
		reflected := r.request.ProtoReflect()
		reflected.Set(reflected.Descriptor().Fields().ByName("resume_token"), protoreflect.ValueOfString(token))
	}
}

// forget makes the next stream begin with a snapshot.
func (r *resumption) forget() {
	reflected := r.request.ProtoReflect()
	field := reflected.Descriptor().Fields().ByName("snapshot")
	reflected.Set(field, reflected.NewField(field))
	r.inSnapshot = true
}

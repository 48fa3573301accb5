package virtfleet

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	computev1 "virtfleet.dev/go/compute/v1"
	typev1 "virtfleet.dev/go/type/v1"
)

type answer = computev1.WatchResourcesResponse

func within(token string) *answer { return &answer{ResumeToken: token} }

func snapshotEnd(token string) *answer {
	return &answer{ResumeToken: token, Marker: &computev1.WatchResourcesResponse_SnapshotEnd{SnapshotEnd: &typev1.WatchSnapshotEnd{}}}
}

func bookmark(token string) *answer {
	return &answer{ResumeToken: token, Marker: &computev1.WatchResourcesResponse_Bookmark{Bookmark: &typev1.WatchBookmark{}}}
}

// stream is what one call of a watch gets.
type stream struct {
	answers []*answer
	end     error
}

func script(t *testing.T, streams ...stream) *peer {
	t.Helper()
	return startPeer(t, func(number int, _ proto.Message, out grpc.ServerStream) error {
		one := streams[min(number, len(streams))-1]
		for _, answer := range one.answers {
			if err := out.SendMsg(answer); err != nil {
				return err
			}
		}
		return one.end
	})
}

// starts returns where each call began.
func starts(server *peer) string {
	var found []string
	for _, request := range server.requests() {
		if token := request.(*computev1.WatchResourcesRequest).GetResumeToken(); token != "" {
			found = append(found, token)
		} else {
			found = append(found, "snapshot")
		}
	}
	return strings.Join(found, " ")
}

func TestAWatchGoesOnByItsTokenAfterEveryBreak(t *testing.T) {
	server := script(t,
		stream{[]*answer{within("a"), snapshotEnd("b"), bookmark("c")}, failure(t, ErrSlowReader, nil)},
		stream{nil, failure(t, ErrServiceDraining, nil)},
		stream{[]*answer{bookmark("d")}, nil},                                               // a drain: the stream ends in good order
		stream{[]*answer{bookmark("e")}, status.Error(codes.Internal, "cut in the middle")}, // by a proxy in between
		stream{[]*answer{bookmark("f")}, failure(t, ErrUnexpected, nil)},
	)
	request := &computev1.WatchResourcesRequest{Parent: "nodes/-"}
	var told []string
	var last error
	options := []FollowOption{
		OnBegin(func(snapshot bool) { told = append(told, fmt.Sprint("begin ", snapshot)) }),
		OnLost(func(err error) { told = append(told, "lost") }),
	}
	for answer, err := range server.dial(t).ComputeWatch.FollowResources(t.Context(), request, options...) {
		if last = err; err == nil {
			told = append(told, answer.GetResumeToken())
		}
	}
	if !errors.Is(last, ErrUnexpected) {
		t.Error(last)
	}
	if text := starts(server); text != "snapshot c c d e" {
		t.Error(text)
	}
	if text := strings.Join(told, ","); text != "begin true,a,b,c,lost,lost,begin false,d,lost,begin false,e,lost,begin false,f" {
		t.Error(text)
	}
	if request.GetStart() != nil {
		t.Error("the request of the caller has changed")
	}
}

func TestABrokenSnapshotBeginsAgain(t *testing.T) {
	server := script(t,
		stream{[]*answer{within("a"), within("a")}, failure(t, ErrServiceDraining, nil)},
		stream{[]*answer{within("a"), snapshotEnd("b")}, failure(t, ErrServiceDraining, nil)},
		stream{nil, failure(t, ErrPermissionMissing, nil)},
	)
	for range server.dial(t).ComputeWatch.FollowResources(t.Context(), &computev1.WatchResourcesRequest{}) {
	}
	if text := starts(server); text != "snapshot snapshot b" {
		t.Error(text)
	}
}

func TestACompactedTokenEndsTheWatchUnlessASnapshotWillDo(t *testing.T) {
	compacted := stream{nil, failure(t, ErrResumeTokenCompacted, nil)}
	refused := stream{nil, failure(t, ErrPermissionMissing, nil)}
	begin := &computev1.WatchResourcesRequest{Start: &computev1.WatchResourcesRequest_ResumeToken{ResumeToken: "old"}}
	var last error
	server := script(t, compacted)
	for _, last = range server.dial(t).ComputeWatch.FollowResources(t.Context(), begin) {
	}
	if !errors.Is(last, ErrResumeTokenCompacted) || starts(server) != "old" {
		t.Error(last, starts(server))
	}
	server = script(t, compacted, stream{[]*answer{within("x"), snapshotEnd("new")}, nil}, refused)
	for _, last = range server.dial(t).ComputeWatch.FollowResources(t.Context(), begin, Resnapshot()) {
	}
	if !errors.Is(last, ErrPermissionMissing) || starts(server) != "old snapshot new" {
		t.Error(last, starts(server))
	}
}

func TestALeftLoopEndsItsStream(t *testing.T) {
	ended := make(chan struct{})
	server := startPeer(t, func(_ int, _ proto.Message, out grpc.ServerStream) error {
		if err := out.SendMsg(bookmark("a")); err != nil {
			return err
		}
		<-out.Context().Done()
		close(ended)
		return nil
	})
	for range server.dial(t).ComputeWatch.FollowResources(t.Context(), &computev1.WatchResourcesRequest{}) {
		break
	}
	<-ended
}

func TestTheEndOfTheContextIsTheEndOfAWatch(t *testing.T) {
	server := startPeer(t, func(_ int, _ proto.Message, out grpc.ServerStream) error {
		if err := out.SendMsg(bookmark("a")); err != nil {
			return err
		}
		<-out.Context().Done()
		return nil
	})
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	why := errors.New("enough")
	var last error
	for _, err := range server.dial(t).ComputeWatch.FollowResources(ctx, &computev1.WatchResourcesRequest{}) {
		last = err
		cancel(why)
	}
	if !errors.Is(last, why) {
		t.Error(last)
	}
}

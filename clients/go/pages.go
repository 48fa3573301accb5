package virtfleet

import (
	"context"
	"fmt"
	"iter"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	typev1 "virtfleet.dev/go/type/v1"
)

// PartialError is the last that an iterator over pages yields when the parts of some nodes were missing or as last seen. Everything
// that was yielded before it is good.
type PartialError struct {
	// Failures names the nodes, and why.
	Failures []*typev1.NodeFailure
}

// Error names the nodes.
func (e *PartialError) Error() string {
	nodes := make([]string, len(e.Failures))
	for index, failure := range e.Failures {
		nodes[index] = failure.GetNode()
	}
	return fmt.Sprintf("the list is not whole: nothing new of %s: %v", strings.Join(nodes, ", "), e.Unwrap())
}

// Unwrap returns why the part of the first of the nodes is missing.
func (e *PartialError) Unwrap() error {
	if found := FromStatus(e.Failures[0].GetStatus()); found != nil {
		return found
	}
	return nil
}

// Page is the answer of a list.
type Page interface {
	proto.Message
	GetNextPageToken() string
}

// Pages yields every item of a list, page by page. It is what the iterators of the services (AllDomains) are made of, and serves for
// lists of other stubs: method is a list method, items the getter of the items in its answer.
//
// The request stays as it is; a page_token in it is where to begin. The first error is the last that is yielded. A
// [*PartialError] comes last when nodes were missing, unless the request has allow_stale.
func Pages[Request proto.Message, Answer Page, Item any](
	ctx context.Context,
	method func(context.Context, Request, ...grpc.CallOption) (Answer, error),
	items func(Answer) []Item,
	request Request,
	options ...grpc.CallOption,
) iter.Seq2[Item, error] {
	return pages(ctx, true, method, items, request, options...)
}

func pages[Request proto.Message, Answer Page, Item any](
	ctx context.Context,
	tellsMissing bool,
	method func(context.Context, Request, ...grpc.CallOption) (Answer, error),
	items func(Answer) []Item,
	request Request,
	options ...grpc.CallOption,
) iter.Seq2[Item, error] {
	return func(yield func(Item, error) bool) {
		var none Item
		missing := map[string]*typev1.NodeFailure{}
		var order []string
		next := proto.CloneOf(request)
		fields := next.ProtoReflect().Descriptor().Fields()
		token := fields.ByName("page_token")
		if stale := fields.ByName("allow_stale"); stale != nil && next.ProtoReflect().Get(stale).Bool() {
			tellsMissing = false // the caller has said that what was last seen will do
		}
		for {
			page, err := method(ctx, next, options...)
			if err != nil {
				yield(none, err)
				return
			}
			for _, item := range items(page) {
				if !yield(item, nil) {
					return
				}
			}
			if told, ok := any(page).(interface {
				GetUnreachable() []*typev1.NodeFailure
			}); ok && tellsMissing {
				for _, failure := range told.GetUnreachable() {
					if missing[failure.GetNode()] == nil {
						order = append(order, failure.GetNode())
					}
					missing[failure.GetNode()] = failure
				}
			}
			if page.GetNextPageToken() == "" {
				break
			}
			next = proto.CloneOf(next)
			next.ProtoReflect().Set(token, protoreflect.ValueOfString(page.GetNextPageToken()))
		}
		if len(order) > 0 {
			partial := &PartialError{}
			for _, node := range order {
				partial.Failures = append(partial.Failures, missing[node])
			}
			yield(none, partial)
		}
	}
}

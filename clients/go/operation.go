package virtfleet

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	typev1 "virtfleet.dev/go/type/v1"
)

const (
	// waitLimit is how long one call may hang: short enough that a proxy with a minute's patience never cuts it.
	waitLimit = 20 * time.Second
	// progressInterval is how often a person wants to see progress.
	progressInterval = 500 * time.Millisecond
	waitGrace        = 10 * time.Second
)

// Operation is a piece of work of the fleet that a mutation has started, with the result T. It goes on whatever becomes of the
// client; [OperationNamed] finds it again. Goroutines may share it.
type Operation[T proto.Message] struct {
	client *Client
	mutex  sync.Mutex
	last   *longrunningpb.Operation
}

// OperationNamed returns the operation of that name, as [Operation.Name] gave it, perhaps in an earlier life of the program. It makes
// no call.
func OperationNamed[T proto.Message](client *Client, name string) *Operation[T] {
	return &Operation[T]{client: client, last: &longrunningpb.Operation{Name: name}}
}

func started[T proto.Message](client *Client, operation *longrunningpb.Operation, err error) (*Operation[T], error) {
	if err != nil {
		return nil, err
	}
	return &Operation[T]{client: client, last: operation}, nil
}

// Proto returns the operation as it was when last looked at.
func (o *Operation[T]) Proto() *longrunningpb.Operation {
	o.mutex.Lock()
	defer o.mutex.Unlock()
	return o.last
}

// Name returns its name: nodes/n1/services/compute/operations/….
func (o *Operation[T]) Name() string { return o.Proto().GetName() }

// Done reports whether it had ended when last looked at. Quick work is done in the first answer.
func (o *Operation[T]) Done() bool { return o.Proto().GetDone() }

// Metadata returns what it was about, and how far it was, when last looked at.
func (o *Operation[T]) Metadata() *typev1.OperationMetadata { return OperationMetadata(o.Proto()) }

// OperationMetadata returns the typed metadata of an operation; empty if it has none.
func OperationMetadata(operation *longrunningpb.Operation) *typev1.OperationMetadata {
	metadata := &typev1.OperationMetadata{}
	if operation.GetMetadata().MessageIs(metadata) {
		if operation.GetMetadata().UnmarshalTo(metadata) != nil {
			return &typev1.OperationMetadata{}
		}
	}
	return metadata
}

// WaitOption changes what [Operation.Wait] does.
type WaitOption func(*waitPlan)

type waitPlan struct {
	progress func(*typev1.OperationMetadata)
}

// WithProgress has a function called with the metadata at each look, twice a second or so, and at the end.
func WithProgress(progress func(*typev1.OperationMetadata)) WaitOption {
	return func(plan *waitPlan) { plan.progress = progress }
}

// Wait waits until the operation ends and returns its result, or the [*Error] that it failed with.
//
// Lost connections, restarted gateways and nodes that are away do not end the wait; only ctx does. The operation goes on then:
// the error holds the cause of ctx and what was in the way last.
func (o *Operation[T]) Wait(ctx context.Context, options ...WaitOption) (T, error) {
	plan := waitPlan{}
	for _, option := range options {
		option(&plan)
	}
	interval := waitLimit
	if plan.progress != nil {
		interval = progressInterval
	}
	var obstacle error
	for failures := 0; ; {
		operation := o.Proto()
		if plan.progress != nil {
			plan.progress(OperationMetadata(operation))
		}
		if operation.GetDone() {
			return resultOf[T](operation)
		}
		if ctx.Err() != nil {
			return *new(T), goesOn(operation.GetName(), ctx, obstacle)
		}
		err := o.look(ctx, interval)
		switch {
		case err == nil:
			obstacle, failures = nil, 0
		case lost(FromError(err)) && ctx.Err() == nil, errors.Is(err, context.DeadlineExceeded):
			// A look that is not answered in its time, or in what ctx leaves, is as good as a lost connection.
			obstacle = err
			failures++
			if sleep(ctx, delay(failures, FromError(err).RetryDelay)) != nil {
				return *new(T), goesOn(operation.GetName(), ctx, obstacle)
			}
		case ctx.Err() != nil:
			return *new(T), goesOn(operation.GetName(), ctx, obstacle)
		default:
			return *new(T), err
		}
	}
}

func goesOn(name string, ctx context.Context, obstacle error) error {
	if obstacle != nil {
		return fmt.Errorf("%s has not ended and goes on: %w: %w", name, context.Cause(ctx), obstacle)
	}
	return fmt.Errorf("%s has not ended and goes on: %w", name, context.Cause(ctx))
}

// look waits at the server for the end, for no longer than limit.
func (o *Operation[T]) look(ctx context.Context, limit time.Duration) error {
	if deadline, limited := ctx.Deadline(); limited {
		limit = max(min(limit, time.Until(deadline)), 0)
	}
	ctx, cancel := context.WithTimeout(ctx, limit+waitGrace)
	defer cancel()
	operation, err := o.client.Operations.WaitOperation(ctx, &longrunningpb.WaitOperationRequest{
		Name: o.Name(), Timeout: durationpb.New(limit),
	})
	if err != nil {
		return err
	}
	o.mutex.Lock()
	defer o.mutex.Unlock()
	o.last = operation
	return nil
}

// Refresh looks at the operation once, without waiting.
func (o *Operation[T]) Refresh(ctx context.Context) error { return o.look(ctx, 0) }

// Cancel asks for the end of the operation and the undoing of its effects. It returns when that has been heard: [Operation.Wait]
// then fails with ErrOperationCancelled, or succeeds if the end came first. ErrNotCancellable: not at this moment.
func (o *Operation[T]) Cancel(ctx context.Context) error {
	_, err := o.client.Operations.CancelOperation(ctx, &longrunningpb.CancelOperationRequest{Name: o.Name()})
	return err
}

func resultOf[T proto.Message](operation *longrunningpb.Operation) (T, error) {
	var none T
	if failure := operation.GetError(); failure != nil {
		return none, FromStatus(failure)
	}
	message, err := operation.GetResponse().UnmarshalNew()
	if err != nil {
		return none, fmt.Errorf("%s: %w", operation.GetName(), err)
	}
	result, ok := message.(T)
	if !ok {
		return none, fmt.Errorf("%s answers %T, not %T", operation.GetName(), message, none)
	}
	return result, nil
}

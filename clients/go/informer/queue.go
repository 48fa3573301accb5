package informer

import (
	"context"
	"sync"
	"time"
)

const (
	firstRetry   = 10 * time.Millisecond
	longestRetry = time.Minute
)

// Queue is a queue of work for the keys of resources. A key that is added while it waits is in it once; one that is added while it is
// worked on comes again afterwards, so that no two workers ever have the same key and no change is missed. Goroutines may share it.
type Queue[K comparable] struct {
	mutex    sync.Mutex
	news     chan struct{} // closed and replaced when something comes
	order    []K
	waiting  map[K]struct{}
	working  map[K]struct{}
	failures map[K]int
	later    map[K]alarm
	closed   bool
	first    time.Duration
	longest  time.Duration
}

type alarm struct {
	at    time.Time
	timer *time.Timer
}

// QueueOption changes how a queue behaves.
type QueueOption func(first, longest *time.Duration)

// Backoff sets how long a key waits after its first failure, doubled with each further one, and how long at most. Without it these
// are 10 milliseconds and one minute.
func Backoff(first, longest time.Duration) QueueOption {
	return func(f, l *time.Duration) { *f, *l = first, longest }
}

// NewQueue returns an empty queue.
func NewQueue[K comparable](options ...QueueOption) *Queue[K] {
	queue := &Queue[K]{
		news:     make(chan struct{}),
		waiting:  map[K]struct{}{},
		working:  map[K]struct{}{},
		failures: map[K]int{},
		later:    map[K]alarm{},
		first:    firstRetry,
		longest:  longestRetry,
	}
	for _, option := range options {
		option(&queue.first, &queue.longest)
	}
	return queue
}

// Add puts a key at the end, unless it waits already.
func (q *Queue[K]) Add(key K) {
	q.mutex.Lock()
	defer q.mutex.Unlock()
	if _, waits := q.waiting[key]; waits || q.closed {
		return
	}
	q.waiting[key] = struct{}{}
	if _, works := q.working[key]; works {
		return // Done puts it at the end
	}
	q.order = append(q.order, key)
	q.wake()
}

// AddAfter adds a key when a time has gone by. Of several times that are set for a key, the earliest to come holds.
func (q *Queue[K]) AddAfter(key K, pause time.Duration) {
	if pause <= 0 {
		q.Add(key)
		return
	}
	q.mutex.Lock()
	defer q.mutex.Unlock()
	at := time.Now().Add(pause)
	known, set := q.later[key]
	if q.closed || set && !at.Before(known.at) {
		return
	}
	if set {
		known.timer.Stop()
	}
	q.later[key] = alarm{at, time.AfterFunc(pause, func() {
		q.mutex.Lock()
		// One that could not be stopped any more must not take away its successor.
		if q.later[key].at.Equal(at) {
			delete(q.later, key)
		}
		q.mutex.Unlock()
		q.Add(key)
	})}
}

// Retry adds a key after a pause that grows with each of its failures since the last [Queue.Forget].
func (q *Queue[K]) Retry(key K) {
	q.mutex.Lock()
	pause := q.longest
	if failures := q.failures[key]; failures < 32 {
		pause = min(q.first<<failures, q.longest)
	}
	q.failures[key]++
	q.mutex.Unlock()
	q.AddAfter(key, pause)
}

// Forget makes the next failure of a key its first.
func (q *Queue[K]) Forget(key K) {
	q.mutex.Lock()
	defer q.mutex.Unlock()
	delete(q.failures, key)
}

// Get takes the first key, waiting for one; false when ctx has ended or the queue is closed. [Queue.Done] must follow.
func (q *Queue[K]) Get(ctx context.Context) (K, bool) {
	for {
		q.mutex.Lock()
		if len(q.order) > 0 && !q.closed && ctx.Err() == nil {
			key := q.order[0]
			q.order = q.order[1:]
			delete(q.waiting, key)
			q.working[key] = struct{}{}
			q.mutex.Unlock()
			return key, true
		}
		news, closed := q.news, q.closed
		q.mutex.Unlock()
		if closed {
			return *new(K), false
		}
		select {
		case <-ctx.Done():
			return *new(K), false
		case <-news:
		}
	}
}

// Done says that the work on a key has ended. If it was added in between, it comes again.
func (q *Queue[K]) Done(key K) {
	q.mutex.Lock()
	defer q.mutex.Unlock()
	delete(q.working, key)
	if _, waits := q.waiting[key]; waits && !q.closed {
		q.order = append(q.order, key)
		q.wake()
	}
}

// Len returns how many keys wait to be taken now.
func (q *Queue[K]) Len() int {
	q.mutex.Lock()
	defer q.mutex.Unlock()
	return len(q.order)
}

// Close ends the queue: nothing more is added or given out.
func (q *Queue[K]) Close() {
	q.mutex.Lock()
	defer q.mutex.Unlock()
	q.closed = true
	for _, waiting := range q.later {
		waiting.timer.Stop()
	}
	clear(q.later)
	q.wake()
}

func (q *Queue[K]) wake() {
	close(q.news)
	q.news = make(chan struct{})
}

// Run works with a number of workers until ctx ends, and returns when all have ended. A key whose work fails is tried again, after a
// pause that grows.
func (q *Queue[K]) Run(ctx context.Context, workers int, work func(ctx context.Context, key K) error) {
	var group sync.WaitGroup
	for range workers {
		group.Go(func() {
			for {
				key, ok := q.Get(ctx)
				if !ok {
					return
				}
				if err := work(ctx, key); err != nil && ctx.Err() == nil {
					q.Retry(key)
				} else {
					q.Forget(key)
				}
				q.Done(key)
			}
		})
	}
	group.Wait()
}

// Enqueue returns a handler that adds the keys of a resource whenever it is new, changed, moved or gone: before and after.
func Enqueue[T Resource, K comparable](queue *Queue[K], keys func(resource T) []K) Handler[T] {
	add := func(resource T) {
		for _, key := range keys(resource) {
			queue.Add(key)
		}
	}
	both := func(before, after T) { add(before); add(after) }
	return Handler[T]{Added: add, Changed: both, Moved: both, Deleted: add}
}

// EnqueueUIDs returns a handler that adds the uid of a resource whenever it is new, changed, moved or gone.
func EnqueueUIDs[T Resource](queue *Queue[string]) Handler[T] {
	return Enqueue(queue, func(resource T) []string { return []string{resource.GetUid()} })
}

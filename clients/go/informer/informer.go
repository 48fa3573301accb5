package informer

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"sync"
	"time"

	virtfleet "virtfleet.dev/go"
	typev1 "virtfleet.dev/go/type/v1"
)

// Handler is told of changes, in order, by the goroutine of [Informer.Run]: it must not block. Each function may be nil. The objects
// are shared by all handlers and not to be changed.
type Handler[T Resource] struct {
	// Added tells of a resource that was not known.
	Added func(resource T)
	// Changed tells of a resource that is not as it was.
	Changed func(before, after T)
	// Moved tells of a resource that has come to another node, or has another name: it is still the same object.
	Moved func(before, after T)
	// Deleted tells of a resource that is gone, as it was last.
	Deleted func(last T)
	// Synced tells that all that exists is known: once after the start, and after each new snapshot.
	Synced func()
	// SourceChanged tells that the part of a node is live, stale, being read anew, or lost.
	SourceChanged func(source *typev1.WatchSourceStatus)
	// ConnectionChanged tells that the watch stands (nil), or that it is broken and is being resumed.
	ConnectionChanged func(broken error)
}

// Informer keeps the resources of one kind. Goroutines may share it. Make one with [Domains], [Volumes], [Pools], [Networks], [Ports]
// or [Nodes].
type Informer[T Resource] struct {
	follow   func(ctx context.Context, options ...virtfleet.FollowOption) iter.Seq2[*news[T], error]
	handlers []Handler[T]

	mutex     sync.RWMutex
	objects   *store[T]
	sources   map[string]*typev1.WatchSourceStatus
	connected bool
	obstacle  error
	heard     time.Time
	synced    chan struct{}
	isSynced  bool
	running   bool
	statistic Statistics

	// Of the goroutine of Run alone: the uids that occurred in the snapshot that is being read, of all and of single nodes.
	snapshot map[string]struct{}
	resyncs  map[string]map[string]struct{}
}

// Statistics counts what an informer has been told.
type Statistics struct {
	// Changes is the number of changes of resources.
	Changes int64
	// Snapshots is the number of streams that began with a snapshot of all.
	Snapshots int64
	// Resumptions is the number of streams that went on from a token.
	Resumptions int64
	// Resyncs is the number of times that a single node was read anew.
	Resyncs int64
}

func newInformer[T Resource](
	plan plan, follow func(context.Context, ...virtfleet.FollowOption) iter.Seq2[*news[T], error],
) *Informer[T] {
	found := &Informer[T]{
		follow:  follow,
		objects: newStore[T](plan.decoded),
		sources: map[string]*typev1.WatchSourceStatus{},
		synced:  make(chan struct{}),
		resyncs: map[string]map[string]struct{}{},
	}
	found.objects.addIndex(Label, byLabel[T])
	return found
}

// Index adds an index of one's own; see [Informer.By]. Only before [Informer.Run].
func (i *Informer[T]) Index(name string, values IndexFunc[T]) {
	i.mutex.Lock()
	defer i.mutex.Unlock()
	i.mustNotRun()
	i.objects.addIndex(name, values)
}

// Handle adds a handler. Only before [Informer.Run].
func (i *Informer[T]) Handle(handler Handler[T]) {
	i.mutex.Lock()
	defer i.mutex.Unlock()
	i.mustNotRun()
	i.handlers = append(i.handlers, handler)
}

func (i *Informer[T]) mustNotRun() {
	if i.running {
		panic("informer: indexes and handlers are added before Run")
	}
}

// Run follows the watch until ctx ends, which it returns nil for, or until the watch is refused. What it has learned stays and can
// be read; it is not fresh any more.
func (i *Informer[T]) Run(ctx context.Context) error {
	i.mutex.Lock()
	if i.running {
		i.mutex.Unlock()
		return errors.New("informer: it runs already, or has run")
	}
	i.running = true
	i.mutex.Unlock()
	for answer, err := range i.follow(
		ctx, virtfleet.Resnapshot(), virtfleet.OnBegin(i.begin), virtfleet.OnLost(i.connection),
	) {
		if err != nil {
			i.connection(err)
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		i.take(answer)
	}
	return nil
}

// WaitSynced returns when all that exists is known, or, when ctx ends, with its cause and with what stands in the way.
func (i *Informer[T]) WaitSynced(ctx context.Context) error {
	select {
	case <-i.synced:
		return nil
	case <-ctx.Done():
	}
	i.mutex.RLock()
	defer i.mutex.RUnlock()
	switch {
	case i.obstacle == nil:
		return context.Cause(ctx)
	case errors.Is(i.obstacle, context.Cause(ctx)): // of the same context, with what was in the way
		return i.obstacle
	}
	return fmt.Errorf("%w: %w", context.Cause(ctx), i.obstacle)
}

// Synced reports whether all that existed at the start is known.
func (i *Informer[T]) Synced() bool {
	i.mutex.RLock()
	defer i.mutex.RUnlock()
	return i.isSynced
}

// Connected reports whether the watch stands. While it does not, everything is as last seen.
func (i *Informer[T]) Connected() bool {
	i.mutex.RLock()
	defer i.mutex.RUnlock()
	return i.connected
}

// LastHeard returns when the watch last said anything. It says something at least every 10 seconds.
func (i *Informer[T]) LastHeard() time.Time {
	i.mutex.RLock()
	defer i.mutex.RUnlock()
	return i.heard
}

// Source returns how the part of a node (nodes/{node}) stands. A node that nothing was told of is live.
func (i *Informer[T]) Source(node string) *typev1.WatchSourceStatus {
	i.mutex.RLock()
	defer i.mutex.RUnlock()
	if status := i.sources[node]; status != nil {
		return status
	}
	return &typev1.WatchSourceStatus{Node: node, State: typev1.SourceState_SOURCE_STATE_LIVE}
}

// Sources returns how the parts of all nodes stand that something was told of.
func (i *Informer[T]) Sources() map[string]*typev1.WatchSourceStatus {
	i.mutex.RLock()
	defer i.mutex.RUnlock()
	return maps.Clone(i.sources)
}

// Statistics returns what has been told so far.
func (i *Informer[T]) Statistics() Statistics {
	i.mutex.RLock()
	defer i.mutex.RUnlock()
	return i.statistic
}

// Get returns the resource with a uid. The object is the caller's own (with [Decoded]: everybody's, not to be changed).
func (i *Informer[T]) Get(uid string) (T, bool) {
	i.mutex.RLock()
	defer i.mutex.RUnlock()
	return i.objects.get(i.objects.byUID[uid])
}

// ByName returns the resource of a name: nodes/n1/domains/web.
func (i *Informer[T]) ByName(name string) (T, bool) {
	i.mutex.RLock()
	defer i.mutex.RUnlock()
	return i.objects.get(i.objects.byName[name])
}

// By returns the resources that have a value in an index: By(informer.Label, "app=web"). The order is by name.
func (i *Informer[T]) By(index, value string) []T {
	i.mutex.RLock()
	defer i.mutex.RUnlock()
	return i.objects.decodeAll(i.objects.find(index, value))
}

// CountBy returns how many resources have a value in an index, without decoding them.
func (i *Informer[T]) CountBy(index, value string) int {
	i.mutex.RLock()
	defer i.mutex.RUnlock()
	return i.objects.count(index, value)
}

// All yields every resource, as it is at the moment of its turn.
func (i *Informer[T]) All() iter.Seq[T] {
	return func(yield func(T) bool) {
		i.mutex.RLock()
		uids := make([]string, 0, len(i.objects.byUID))
		for uid := range i.objects.byUID {
			uids = append(uids, uid)
		}
		i.mutex.RUnlock()
		for _, uid := range uids {
			if found, known := i.Get(uid); known && !yield(found) {
				return
			}
		}
	}
}

// Len returns how many resources there are.
func (i *Informer[T]) Len() int {
	i.mutex.RLock()
	defer i.mutex.RUnlock()
	return len(i.objects.byUID)
}

// What the watch tells.

func (i *Informer[T]) begin(snapshot bool) {
	i.mutex.Lock()
	if snapshot {
		i.statistic.Snapshots++
	} else {
		i.statistic.Resumptions++
	}
	i.mutex.Unlock()
	// A part that was being read when the stream broke is read anew.
	i.snapshot = nil
	clear(i.resyncs)
	if snapshot {
		i.snapshot = map[string]struct{}{}
	}
	i.connection(nil)
}

func (i *Informer[T]) connection(broken error) {
	i.mutex.Lock()
	changed := i.connected != (broken == nil)
	i.connected, i.obstacle = broken == nil, broken
	i.mutex.Unlock()
	if !changed {
		return
	}
	for _, handler := range i.handlers {
		if handler.ConnectionChanged != nil {
			handler.ConnectionChanged(broken)
		}
	}
}

func (i *Informer[T]) take(answer *news[T]) {
	var told []func()
	i.mutex.Lock()
	i.heard = time.Now()
	for index := range answer.changes {
		change := &answer.changes[index]
		i.statistic.Changes++
		switch {
		case change.isPut:
			told = i.put(change.put, told)
		case change.deleted != nil:
			told = i.delete(change.deleted, told)
		case change.moved != nil:
			told = i.move(change.moved.GetUid(), change.moved.GetNewName(), told)
		case change.movedIn != nil:
			told = i.move(change.movedIn.GetUid(), change.movedIn.GetName(), told)
		case change.movedOut != nil:
			// Of a watch of one node: what has left it is gone for this watch.
			told = i.drop(i.objects.byUID[change.movedOut.GetUid()], told)
		}
	}
	if answer.snapshotEnd {
		told = i.endSnapshot(told)
	}
	if answer.source != nil {
		told = i.sourceStatus(answer.source, told)
	}
	i.mutex.Unlock()
	for _, tell := range told {
		tell()
	}
}

func (i *Informer[T]) put(resource T, told []func()) []func() {
	uid, name := resource.GetUid(), resource.GetName()
	if i.snapshot != nil {
		i.snapshot[uid] = struct{}{}
	}
	if seen := i.resyncs[nodeOf(name)]; seen != nil {
		seen[uid] = struct{}{}
	}
	// A slow reader is told of a name only how it is last: the deletion of its predecessor may be left out.
	if holder := i.objects.byName[name]; holder != nil && holder.uid != uid {
		told = i.drop(holder, told)
	}
	packed := i.objects.pack(resource)
	before := i.objects.byUID[uid]
	if before == nil {
		i.objects.put(&entry[T]{}, resource, packed)
		return i.tell(told, func(handler Handler[T]) func() { return one(handler.Added, resource) })
	}
	if i.objects.same(before, resource, packed) {
		return told
	}
	old, moved := i.before(before), before.name != name
	i.objects.put(before, resource, packed)
	return i.tell(told, func(handler Handler[T]) func() {
		if moved {
			return two(handler.Moved, old, resource)
		}
		return two(handler.Changed, old, resource)
	})
}

func (i *Informer[T]) delete(deleted *typev1.ResourceDelete, told []func()) []func() {
	found := i.objects.byUID[deleted.GetUid()]
	if found == nil || found.name != deleted.GetName() {
		return told // unknown, or it lives under another name by now
	}
	return i.drop(found, told)
}

func (i *Informer[T]) drop(found *entry[T], told []func()) []func() {
	if found == nil {
		return told
	}
	last := i.before(found)
	i.objects.remove(found)
	return i.tell(told, func(handler Handler[T]) func() { return one(handler.Deleted, last) })
}

// move gives a resource its new name at once; what else has changed is told by the put that follows.
func (i *Informer[T]) move(uid, name string, told []func()) []func() {
	found := i.objects.byUID[uid]
	if found == nil || found.name == name {
		return told
	}
	return i.put(renamed(i.objects.decode(found), name), told)
}

// endSnapshot drops what the snapshot did not hold.
func (i *Informer[T]) endSnapshot(told []func()) []func() {
	for uid, found := range i.objects.byUID {
		if _, seen := i.snapshot[uid]; !seen {
			told = i.drop(found, told)
		}
	}
	i.snapshot = nil
	if !i.isSynced {
		i.isSynced = true
		told = append(told, func() { close(i.synced) })
	}
	return i.tell(told, func(handler Handler[T]) func() { return handler.Synced })
}

// sourceStatus takes how the part of a node stands, and ends the reading anew of that part.
func (i *Informer[T]) sourceStatus(status *typev1.WatchSourceStatus, told []func()) []func() {
	node := status.GetNode()
	removed := status.GetState() == typev1.SourceState_SOURCE_STATE_LOST &&
		virtfleet.FromStatus(status.GetStatus()).HasReason(virtfleet.ErrNodeUnknown)
	switch {
	case status.GetState() == typev1.SourceState_SOURCE_STATE_RESYNCING:
		i.statistic.Resyncs++
		i.resyncs[node] = map[string]struct{}{}
	case removed:
		delete(i.resyncs, node)
		told = i.dropNode(node, nil, told)
	case i.resyncs[node] != nil:
		told = i.dropNode(node, i.resyncs[node], told)
		delete(i.resyncs, node)
	}
	if removed {
		delete(i.sources, node)
	} else {
		i.sources[node] = status
	}
	return i.tell(told, func(handler Handler[T]) func() { return one(handler.SourceChanged, status) })
}

// dropNode drops all of a node but what is in kept.
func (i *Informer[T]) dropNode(node string, kept map[string]struct{}, told []func()) []func() {
	for _, found := range i.objects.find(Node, node) {
		if _, seen := kept[found.uid]; !seen {
			told = i.drop(found, told)
		}
	}
	return told
}

// before returns an object as it is known, if a handler may want that.
func (i *Informer[T]) before(found *entry[T]) T {
	for _, handler := range i.handlers {
		if handler.Changed != nil || handler.Moved != nil || handler.Deleted != nil {
			return i.objects.decode(found)
		}
	}
	return *new(T)
}

func (i *Informer[T]) tell(told []func(), how func(Handler[T]) func()) []func() {
	for _, handler := range i.handlers {
		if call := how(handler); call != nil {
			told = append(told, call)
		}
	}
	return told
}

func one[A any](call func(A), a A) func() {
	if call == nil {
		return nil
	}
	return func() { call(a) }
}

func two[A any](call func(A, A), a, b A) func() {
	if call == nil {
		return nil
	}
	return func() { call(a, b) }
}

package main

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"time"

	virtfleet "virtfleet.dev/go"
	computev1 "virtfleet.dev/go/compute/v1"
	"virtfleet.dev/go/informer"
	typev1 "virtfleet.dev/go/type/v1"
)

const syncLimit = 30 * time.Second

// gate stops a reader at its next change while it is held.
type gate struct {
	mutex  sync.Mutex
	free   chan struct{} // closed while it is open
	stands bool
}

func newGate() *gate {
	open := make(chan struct{})
	close(open)
	return &gate{free: open}
}

func (g *gate) hold() {
	g.mutex.Lock()
	defer g.mutex.Unlock()
	select {
	case <-g.free:
		g.free = make(chan struct{})
	default:
	}
}

func (g *gate) release() {
	g.mutex.Lock()
	defer g.mutex.Unlock()
	select {
	case <-g.free:
	default:
		close(g.free)
	}
}

func (g *gate) pass() {
	g.mutex.Lock()
	free := g.free
	select {
	case <-free:
		g.mutex.Unlock()
		return
	default:
	}
	g.stands = true
	g.mutex.Unlock()
	<-free
	g.mutex.Lock()
	g.stands = false
	g.mutex.Unlock()
}

func (g *gate) held() bool {
	g.mutex.Lock()
	defer g.mutex.Unlock()
	return g.stands
}

// stream answers the requests about watches, informers and consoles.
func (a *agent) stream(ctx context.Context, asked *request) (any, error) {
	switch asked.Do {
	case "watch":
		keep(a, a.watches, asked.As, watch(ctx, a.client, asked))
		return empty{}, nil
	case "informer":
		return a.informer(ctx, asked)
	case "console":
		return a.console(ctx, asked)
	}
	a.mutex.Lock()
	watched, informed, console := a.watches[asked.As], a.informers[asked.As], a.consoles[asked.As]
	a.mutex.Unlock()
	switch {
	case asked.Do == "watched" && watched != nil:
		return watched.told(asked.Name), nil
	case asked.Do == "informed" && informed != nil:
		return informed.told(asked), nil
	case asked.Do == "hold" && watched != nil:
		watched.gate.hold()
	case asked.Do == "hold" && informed != nil:
		informed.gate.hold()
	case asked.Do == "release" && watched != nil:
		watched.gate.release()
	case asked.Do == "release" && informed != nil:
		informed.gate.release()
	case asked.Do == "console_write" && console != nil:
		return empty{}, console.stream.Send(&computev1.OpenConsoleRequest{
			Action: &computev1.OpenConsoleRequest_Data{Data: []byte(asked.Text)},
		})
	case asked.Do == "console_read" && console != nil:
		return console.told(), nil
	default:
		return nil, unknown(asked)
	}
	return empty{}, nil
}

// keep remembers what runs under a label.
func keep[T any](a *agent, under map[string]T, label string, one T) {
	a.mutex.Lock()
	defer a.mutex.Unlock()
	under[label] = one
}

type last struct {
	DisplayName string `json:"display_name"`
	Deleted     bool   `json:"deleted"`
	Generation  int64  `json:"generation"`
}

// watched is what a watch has told.
type watched struct {
	gate *gate
	done chan struct{}

	mutex        sync.Mutex
	changes      int
	snapshotEnds int
	backwards    int
	ended        bool
	failure      *failure
	last         map[string]*last
	generations  map[string]int64
}

func watch(ctx context.Context, client *virtfleet.Client, asked *request) *watched {
	w := &watched{gate: newGate(), done: make(chan struct{}), last: map[string]*last{}, generations: map[string]int64{}}
	var options []virtfleet.FollowOption
	if asked.Resnapshot {
		options = append(options, virtfleet.Resnapshot())
	}
	wanted := &computev1.WatchResourcesRequest{
		Parent:        asked.Parent,
		ResourceTypes: []computev1.ResourceType{computev1.ResourceType_RESOURCE_TYPE_DOMAIN},
		Start:         &computev1.WatchResourcesRequest_Snapshot{Snapshot: &typev1.WatchSnapshot{}},
	}
	go func() {
		defer close(w.done)
		for told, err := range client.ComputeWatch.FollowResources(ctx, wanted, options...) {
			if err != nil {
				w.finish(err)
				return
			}
			if len(told.GetChanges()) > 0 {
				w.gate.pass()
			}
			w.take(told)
		}
		w.finish(nil)
	}()
	return w
}

func (w *watched) finish(err error) {
	w.mutex.Lock()
	defer w.mutex.Unlock()
	w.ended = true
	if err != nil {
		w.failure = failureOf(err)
	}
}

func (w *watched) take(told *computev1.WatchResourcesResponse) {
	w.mutex.Lock()
	defer w.mutex.Unlock()
	for _, change := range told.GetChanges() {
		w.changes++
		if domain := change.GetPut().GetDomain(); domain != nil {
			if domain.GetGeneration() < w.generations[domain.GetUid()] {
				w.backwards++
			}
			w.generations[domain.GetUid()] = domain.GetGeneration()
			w.last[domain.GetName()] = &last{DisplayName: domain.GetDisplayName(), Generation: domain.GetGeneration()}
		} else if deleted := change.GetDelete(); deleted != nil {
			w.last[deleted.GetName()] = &last{Deleted: true}
		}
	}
	if told.GetSnapshotEnd() != nil {
		w.snapshotEnds++
	}
}

func (w *watched) told(name string) any {
	w.mutex.Lock()
	defer w.mutex.Unlock()
	return map[string]any{
		"changes": w.changes, "snapshot_ends": w.snapshotEnds, "held": w.gate.held(), "ended": w.ended, "error": w.failure,
		"backwards": w.backwards, "last": w.last[name],
	}
}

type counts struct {
	Added   int `json:"added"`
	Changed int `json:"changed"`
	Moved   int `json:"moved"`
	Deleted int `json:"deleted"`
}

// informed is an informer with what its handler was told.
type informed struct {
	domains *informer.Informer[*computev1.Domain]
	gate    *gate
	done    chan struct{}

	mutex  sync.Mutex
	counts map[string]*counts
}

func (i *informed) count(domain *computev1.Domain, add func(*counts)) {
	i.gate.pass()
	i.mutex.Lock()
	defer i.mutex.Unlock()
	found := i.counts[domain.GetUid()]
	if found == nil {
		found = &counts{}
		i.counts[domain.GetUid()] = found
	}
	add(found)
}

func (a *agent) informer(ctx context.Context, asked *request) (any, error) {
	i := &informed{
		domains: informer.Domains(a.client, informer.Parent(asked.Parent)), gate: newGate(), done: make(chan struct{}),
		counts: map[string]*counts{},
	}
	i.domains.Handle(informer.Handler[*computev1.Domain]{
		Added:   func(d *computev1.Domain) { i.count(d, func(c *counts) { c.Added++ }) },
		Changed: func(_, d *computev1.Domain) { i.count(d, func(c *counts) { c.Changed++ }) },
		Moved:   func(_, d *computev1.Domain) { i.count(d, func(c *counts) { c.Moved++ }) },
		Deleted: func(d *computev1.Domain) { i.count(d, func(c *counts) { c.Deleted++ }) },
	})
	keep(a, a.informers, asked.As, i)
	refused := make(chan error, 1)
	go func() {
		defer close(i.done)
		refused <- i.domains.Run(ctx)
	}()
	limit := syncLimit
	if asked.DeadlineS > 0 {
		limit = seconds(asked.DeadlineS)
	}
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	synced := make(chan error, 1)
	go func() { synced <- i.domains.WaitSynced(limited) }()
	select {
	case err := <-refused:
		if err != nil {
			return nil, err
		}
	case err := <-synced:
		if err != nil {
			return nil, err
		}
	}
	return map[string]int{"count": i.domains.Len()}, nil
}

func (i *informed) told(asked *request) any {
	domain, known := i.domains.Get(asked.UID)
	state := ""
	if known {
		state = stateOf(domain)
	}
	i.mutex.Lock()
	defer i.mutex.Unlock()
	found := i.counts[asked.UID]
	if found == nil {
		found = &counts{}
	}
	return map[string]any{
		"count": i.domains.Len(), "connected": i.domains.Connected(), "held": i.gate.held(),
		"source": strings.TrimPrefix(i.domains.Source(asked.Node).GetState().String(), "SOURCE_STATE_"),
		"known":  known, "name": domain.GetName(), "display_name": domain.GetDisplayName(), "state": state,
		"told": *found,
	}
}

type consoleStream interface {
	Send(*computev1.OpenConsoleRequest) error
	Recv() (*computev1.OpenConsoleResponse, error)
}

// console is what a console has said.
type console struct {
	stream consoleStream
	done   chan struct{}

	mutex      sync.Mutex
	text       []byte
	epoch      string
	nextOffset int64
	gap        int64
	ended      bool
	closed     string
	failure    *failure
}

func (a *agent) console(ctx context.Context, asked *request) (any, error) {
	stream, err := a.client.Consoles.OpenConsole(ctx)
	if err != nil {
		return nil, err
	}
	open := &computev1.ConsoleOpen{
		Mode: computev1.ConsoleMode_CONSOLE_MODE_READ_WRITE, Force: asked.Force == nil || *asked.Force, Epoch: asked.Epoch,
		Offset: &asked.Offset,
	}
	err = stream.Send(&computev1.OpenConsoleRequest{
		Name: asked.Name, Action: &computev1.OpenConsoleRequest_Open{Open: open},
	})
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	told, err := stream.Recv()
	if err != nil {
		return nil, err
	}
	opened := told.GetOpened()
	c := &console{stream: stream, done: make(chan struct{}), epoch: opened.GetEpoch(), nextOffset: opened.GetOffset()}
	keep(a, a.consoles, asked.As, c)
	go c.read()
	return map[string]any{"epoch": opened.GetEpoch(), "offset": opened.GetOffset(), "writable": opened.GetWritable()}, nil
}

func (c *console) read() {
	defer close(c.done)
	for {
		told, err := c.stream.Recv()
		c.mutex.Lock()
		if err != nil {
			c.ended = true
			if !errors.Is(err, io.EOF) {
				c.failure = failureOf(err)
			}
			c.mutex.Unlock()
			return
		}
		switch event := told.GetEvent().(type) {
		case *computev1.OpenConsoleResponse_Data:
			c.text = append(c.text, event.Data.GetData()...)
			c.nextOffset = event.Data.GetOffset() + int64(len(event.Data.GetData()))
		case *computev1.OpenConsoleResponse_Gap:
			c.gap += event.Gap.GetLengthBytes()
			c.nextOffset = event.Gap.GetOffset() + event.Gap.GetLengthBytes()
		case *computev1.OpenConsoleResponse_Closed:
			c.closed = strings.TrimPrefix(event.Closed.GetReason().String(), "CONSOLE_CLOSE_REASON_")
		}
		c.mutex.Unlock()
	}
}

func (c *console) told() any {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	return map[string]any{
		"text": strings.ToValidUTF8(string(c.text), "\uFFFD"), "epoch": c.epoch, "next_offset": c.nextOffset, "gap": c.gap,
		"ended": c.ended, "closed": c.closed, "error": c.failure,
	}
}

//go:build fleet

package fleettest

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	virtfleet "virtfleet.dev/go"
	computev1 "virtfleet.dev/go/compute/v1"
	"virtfleet.dev/go/informer"
	typev1 "virtfleet.dev/go/type/v1"
	"virtfleet.dev/go/virtfleettest"
)

// running is an informer that runs, with what it was told of sources and moves.
type running struct {
	*informer.Informer[*computev1.Domain]
	mutex sync.Mutex
	told  []string
}

func (r *running) say(text string) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	r.told = append(r.told, text)
}

func (r *running) heard(text string) bool {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	return slices.Contains(r.told, text)
}

func run(t *testing.T, client *virtfleet.Client, options ...informer.Option) *running {
	t.Helper()
	r := &running{Informer: informer.Domains(client, options...)}
	r.Handle(informer.Handler[*computev1.Domain]{
		SourceChanged: func(s *typev1.WatchSourceStatus) {
			r.say(s.GetNode() + " " + strings.TrimPrefix(s.GetState().String(), "SOURCE_STATE_"))
		},
		Moved:   func(a, b *computev1.Domain) { r.say("moved " + a.GetName() + " " + b.GetName()) },
		Deleted: func(d *computev1.Domain) { r.say("deleted " + d.GetName()) },
		Added:   func(d *computev1.Domain) { r.say("added " + d.GetName()) },
	})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("the informer ends with %v", err)
		}
	})
	limited, stop := context.WithTimeout(ctx, patience)
	defer stop()
	if err := r.WaitSynced(limited); err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *running) knows(name string) func() bool {
	return func() bool { _, known := r.ByName(name); return known }
}

func TestAnInformerOutlivesItsGatewayWithoutAList(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(world, *testing.T){"killed": world.killGateway, "drained": world.drainGateway} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			eachWorld(t, func(t *testing.T, w world) {
				sent := &census{}
				others, own := w.dial(t), w.dial(t, sent.option())
				domains := run(t, own)
				before := made(t, others, "nodes/n1")
				until(t, "a new domain is known", domains.knows(before.GetName()))
				for round := range int64(2) {
					end(w, t)
					until(t, "another gateway serves", func() bool { return whole(t.Context(), others) })
					after := made(t, others, "nodes/n2")
					until(t, "a domain that was made afterwards is known", domains.knows(after.GetName()))
					if err := remove(t.Context(), others, after.GetName()); err != nil {
						t.Fatal(err)
					}
					until(t, "its end is known", func() bool { return !domains.knows(after.GetName())() })
					if resumed := domains.Statistics().Resumptions; resumed < round+1 {
						t.Errorf("resumed %d times", resumed)
					}
				}
				if !domains.knows(before.GetName())() || domains.heard("deleted "+before.GetName()) {
					t.Error("what has not changed was forgotten")
				}
				if fresh, lists := sent.fresh.Load(), sent.lists.Load(); fresh != 1 || lists != 0 || domains.Statistics().Snapshots != 1 {
					t.Errorf("%d watches began with a snapshot, %d lists were sent", fresh, lists)
				}
				if fake, ok := w.(fakeWorld); ok {
					// What the gateway itself has counted.
					if fresh, resumed := fake.Watches(t); fresh != 1 || resumed < 2 {
						t.Errorf("the gateway got %d fresh watches and %d from a token", fresh, resumed)
					}
				}
			})
		})
	}
}

func TestANodeThatIsAwayIsToldAndKept(t *testing.T) {
	t.Parallel()
	eachWorld(t, func(t *testing.T, w world) {
		client := w.dial(t)
		domains := run(t, client)
		domain := made(t, client, "nodes/n2")
		until(t, "it is known", domains.knows(domain.GetName()))
		thaw := w.freeze(t, "nodes/n2")
		until(t, "the node is told as stale", func() bool { return domains.heard("nodes/n2 STALE") })
		if !domains.knows(domain.GetName())() || domains.Source("nodes/n2").GetState() == typev1.SourceState_SOURCE_STATE_LIVE {
			t.Error("what was last seen is not kept, or is taken for fresh")
		}
		if state := domains.Source("nodes/n1").GetState(); state != typev1.SourceState_SOURCE_STATE_LIVE {
			t.Errorf("the other node is %v", state)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		_, err := client.Domains.GetDomain(ctx, &computev1.GetDomainRequest{Name: domain.GetName()})
		if !errors.Is(err, virtfleet.ErrNodeUnreachable) && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a call to a node that is away: %v", err)
		}
		var partial *virtfleet.PartialError
		for _, err = range client.Domains.AllDomains(t.Context(), &computev1.ListDomainsRequest{Parent: "nodes/-"}) {
		}
		if !errors.As(err, &partial) || partial.Failures[0].GetNode() != "nodes/n2" {
			t.Errorf("a list that is not whole: %v", err)
		}
		thaw()
		until(t, "the node is live again", func() bool {
			return domains.Source("nodes/n2").GetState() == typev1.SourceState_SOURCE_STATE_LIVE
		})
		if domains.heard("deleted " + domain.GetName()) {
			t.Error("a domain of it was told as deleted")
		}
	})
}

func TestALogThatDoesNotReachBackIsReadAnewForThatNodeAlone(t *testing.T) {
	t.Parallel()
	fleet := virtfleettest.Start(t, virtfleettest.Nodes(2))
	client := fleet.Dial(t)
	domains := run(t, client)
	kept, deleted := made(t, client, "nodes/n1"), made(t, client, "nodes/n1")
	until(t, "both are known", func() bool { return domains.knows(kept.GetName())() && domains.knows(deleted.GetName())() })
	request := &computev1.WatchResourcesRequest{Parent: "nodes/-"}
	for answer, err := range client.ComputeWatch.FollowResources(t.Context(), request) {
		if err != nil {
			t.Fatal(err)
		}
		if answer.GetSnapshotEnd() != nil {
			request.Start = &computev1.WatchResourcesRequest_ResumeToken{ResumeToken: answer.GetResumeToken()}
			break
		}
	}
	if err := remove(t.Context(), client, deleted.GetName()); err != nil {
		t.Fatal(err)
	}
	fleet.CompactLogs(t, "nodes/n1")
	fleet.KillGateway(t, 0)
	until(t, "the end of one is known", func() bool { return !domains.knows(deleted.GetName())() })
	until(t, "the informer goes on", func() bool { return domains.Statistics().Resumptions > 0 && domains.Connected() })
	if !domains.knows(kept.GetName())() || domains.heard("deleted "+kept.GetName()) || domains.Statistics().Snapshots != 1 {
		t.Errorf("%+v", domains.Statistics())
	}
	// Who comes with the token of before is told that the node is read anew, and all of it.
	var told []string
	for answer, err := range client.ComputeWatch.FollowResources(t.Context(), request) {
		if err != nil {
			t.Fatal(err)
		}
		for _, change := range answer.GetChanges() {
			told = append(told, change.GetPut().GetDomain().GetName())
		}
		if status := answer.GetSourceStatus(); status.GetNode() == "nodes/n1" {
			told = append(told, status.GetState().String())
			if status.GetState() == typev1.SourceState_SOURCE_STATE_LIVE {
				break
			}
		}
	}
	first, last := slices.Index(told, "SOURCE_STATE_RESYNCING"), slices.Index(told, "SOURCE_STATE_LIVE")
	if first < 0 || last < 0 || !slices.Contains(told[first:last], kept.GetName()) || slices.Contains(told[first:last], deleted.GetName()) {
		t.Error(told)
	}
	// At the node itself the token is refused, and an informer of one node begins anew.
	one := run(t, client, informer.Parent("nodes/n1"))
	fleet.CompactLogs(t, "nodes/n1")
	fleet.CutConnections(t)
	until(t, "it goes on", func() bool { s := one.Statistics(); return s.Resumptions+s.Snapshots > 1 && one.Connected() })
	if !one.knows(kept.GetName())() || one.heard("deleted "+kept.GetName()) || one.Len() != 1 {
		t.Errorf("%+v", one.Statistics())
	}
}

func TestWhatMovesStaysOneObject(t *testing.T) {
	t.Parallel()
	fleet := virtfleettest.Start(t, virtfleettest.Nodes(2))
	client := fleet.Dial(t)
	domains := run(t, client)
	domain := made(t, client, "nodes/n1")
	until(t, "it is known", domains.knows(domain.GetName()))
	moved := fleet.MoveDomain(t, domain.GetName(), "n2")
	until(t, "it is known under its new name", domains.knows(moved))
	until(t, "the move is told", func() bool { return domains.heard("moved " + domain.GetName() + " " + moved) })
	found, known := domains.Get(domain.GetUid())
	if !known || found.GetName() != moved || domains.Len() != 1 || domains.heard("deleted "+domain.GetName()) || domains.heard("added "+moved) {
		t.Error(found, domains.told)
	}
	_, err := client.Domains.GetDomain(t.Context(), &computev1.GetDomainRequest{Name: domain.GetName()})
	var typed *virtfleet.Error
	if !errors.Is(err, virtfleet.ErrResourceMoved) || !errors.As(err, &typed) || typed.NewName != moved {
		t.Errorf("%+v", err)
	}
	if err := remove(t.Context(), client, moved); err != nil {
		t.Fatal(err)
	}
}

func TestTenThousandDomainsAndASlowReader(t *testing.T) {
	const nodes, each = 10, 1000
	fleet := virtfleettest.Start(t, virtfleettest.Nodes(nodes), virtfleettest.Domains(each))
	client := fleet.Dial(t)
	until(t, "the pages hold them all", func() bool {
		names := map[string]bool{}
		request := &computev1.ListDomainsRequest{Parent: "nodes/-", View: typev1.ResourceView_RESOURCE_VIEW_BASIC}
		for domain, err := range client.Domains.AllDomains(t.Context(), request) {
			if err != nil {
				t.Log(err) // on a crowded machine a node may be out of reach for a moment
				return false
			}
			names[domain.GetName()] = true
		}
		return len(names) == nodes*each
	})
	// A handler that blocks is the slowest reader that there is.
	blocked, release := make(chan struct{}), make(chan struct{})
	slow := informer.Domains(fleet.Dial(t))
	var once sync.Once
	slow.Handle(informer.Handler[*computev1.Domain]{Changed: func(_, _ *computev1.Domain) {
		once.Do(func() { close(blocked); <-release })
	}})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- slow.Run(ctx) }()
	quick := run(t, client)
	if err := slow.WaitSynced(t.Context()); err != nil {
		t.Fatal(err)
	}
	until(t, "both informers know them all", func() bool {
		return quick.Len() == nodes*each && slow.Len() == nodes*each && quick.CountBy(informer.Node, "nodes/n3") == each
	})
	var all []string
	for _, domain := range quick.By(informer.Node, "nodes/n1") {
		all = append(all, domain.GetName())
	}
	for round := range 4 {
		batch(t, client, all, round%2 == 0)
	}
	<-blocked
	if err := remove(t.Context(), client, all[0]); err != nil {
		t.Fatal(err)
	}
	state := func(domains *informer.Informer[*computev1.Domain]) string {
		var states []string
		for domain := range domains.All() {
			states = append(states, domain.GetName()+" "+domain.GetStatus().GetRuntimeId()+domain.GetStatus().GetState().String())
		}
		slices.Sort(states)
		return strings.Join(states, "\n")
	}
	until(t, "the quick reader knows the end of one", func() bool { return !quick.knows(all[0])() })
	if _, known := slow.ByName(all[0]); !known {
		t.Error("the slow reader is not slow")
	}
	close(release)
	until(t, "the slow reader knows the end of one", func() bool { _, known := slow.ByName(all[0]); return !known })
	until(t, "both know the same", func() bool { return state(quick.Informer) == state(slow) })
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// batch stops or starts many domains of one node.
func batch(t *testing.T, client *virtfleet.Client, names []string, stop bool) {
	t.Helper()
	node := names[0][:strings.Index(names[0], "/domains/")]
	var results []*computev1.DomainResult
	if stop {
		request := &computev1.BatchStopDomainsRequest{Parent: node}
		for _, name := range names {
			request.Requests = append(request.Requests, &computev1.StopDomainRequest{Name: name, Mode: computev1.StopMode_STOP_MODE_FORCE})
		}
		operation, err := client.Domains.BatchStopDomains(t.Context(), request)
		if err != nil {
			t.Fatal(err)
		}
		answer, err := operation.Wait(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		results = answer.GetResults()
	} else {
		request := &computev1.BatchStartDomainsRequest{Parent: node}
		for _, name := range names {
			request.Requests = append(request.Requests, &computev1.StartDomainRequest{Name: name})
		}
		operation, err := client.Domains.BatchStartDomains(t.Context(), request)
		if err != nil {
			t.Fatal(err)
		}
		answer, err := operation.Wait(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		results = answer.GetResults()
	}
	for _, result := range results {
		if err := virtfleet.FromStatus(result.GetStatus()); err != nil {
			t.Fatal(result.GetName(), err)
		}
	}
}

package informer

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"testing"

	virtfleet "virtfleet.dev/go"
	computev1 "virtfleet.dev/go/compute/v1"
	typev1 "virtfleet.dev/go/type/v1"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/types/known/anypb"
)

type domains = Informer[*computev1.Domain]

// told is an informer that is told what a test says, with what its handlers were told.
type told struct {
	*domains
	heard []string
}

func newTold(options ...Option) *told {
	found := &told{domains: Domains(nil, options...)}
	say := func(format string, arguments ...any) {
		found.heard = append(found.heard, fmt.Sprintf(format, arguments...))
	}
	found.Handle(Handler[*computev1.Domain]{
		Added: func(d *computev1.Domain) { say("added %s", d.GetName()) },
		Changed: func(a, b *computev1.Domain) {
			say("changed %s %s to %s", b.GetName(), a.GetDisplayName(), b.GetDisplayName())
		},
		Moved:   func(a, b *computev1.Domain) { say("moved %s to %s", a.GetName(), b.GetName()) },
		Deleted: func(d *computev1.Domain) { say("deleted %s", d.GetName()) },
		Synced:  func() { say("synced") },
		SourceChanged: func(s *typev1.WatchSourceStatus) {
			say("%s %s", s.GetNode(), strings.TrimPrefix(s.GetState().String(), "SOURCE_STATE_"))
		},
	})
	return found
}

func (d *told) expect(t *testing.T, wanted ...string) {
	t.Helper()
	slices.Sort(d.heard)
	slices.Sort(wanted)
	if !slices.Equal(d.heard, wanted) {
		t.Errorf("told %q instead of %q", d.heard, wanted)
	}
	d.heard = nil
}

func (d *told) names() string {
	var names []string
	for domain := range d.All() {
		names = append(names, domain.GetName())
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}

func put(uid, name string, edits ...func(*computev1.Domain)) change[*computev1.Domain] {
	domain := &computev1.Domain{Uid: uid, Name: name}
	for _, edit := range edits {
		edit(domain)
	}
	return change[*computev1.Domain]{isPut: true, put: domain}
}

func titled(text string) func(*computev1.Domain) {
	return func(domain *computev1.Domain) { domain.DisplayName = text }
}

func gone(uid, name string) change[*computev1.Domain] {
	return change[*computev1.Domain]{deleted: &typev1.ResourceDelete{Uid: uid, Name: name}}
}

func (d *told) tell(changes ...change[*computev1.Domain]) {
	d.take(&news[*computev1.Domain]{changes: changes})
}

func (d *told) end() { d.take(&news[*computev1.Domain]{snapshotEnd: true}) }

func (d *told) sourceIs(node string, state typev1.SourceState, reason virtfleet.Reason) {
	status := &typev1.WatchSourceStatus{Node: node, State: state}
	if reason != "" {
		info, err := anypb.New(&errdetails.ErrorInfo{Reason: string(reason), Domain: virtfleet.ErrorDomain})
		if err != nil {
			panic(err)
		}
		status.Status = &statuspb.Status{Code: int32(reason.Code()), Details: []*anypb.Any{info}}
	}
	d.take(&news[*computev1.Domain]{source: status})
}

const (
	live      = typev1.SourceState_SOURCE_STATE_LIVE
	stale     = typev1.SourceState_SOURCE_STATE_STALE
	resyncing = typev1.SourceState_SOURCE_STATE_RESYNCING
	lost      = typev1.SourceState_SOURCE_STATE_LOST
)

func TestChangesAreTaken(t *testing.T) {
	for name, options := range map[string][]Option{"packed": nil, "decoded": {Decoded()}} {
		t.Run(name, func(t *testing.T) {
			d := newTold(options...)
			d.begin(true)
			d.tell(put("1", "nodes/n1/domains/a", titled("x")), put("2", "nodes/n2/domains/b"))
			if d.Synced() {
				t.Error("synced within the snapshot")
			}
			d.end()
			d.expect(t, "added nodes/n1/domains/a", "added nodes/n2/domains/b", "synced")
			d.tell(put("1", "nodes/n1/domains/a", titled("y")), put("1", "nodes/n1/domains/a", titled("y")))
			d.expect(t, "changed nodes/n1/domains/a x to y")
			d.tell(gone("2", "nodes/n2/domains/b"), gone("2", "nodes/n2/domains/b"), gone("9", "nodes/n2/domains/z"))
			d.expect(t, "deleted nodes/n2/domains/b")
			if found, known := d.ByName("nodes/n1/domains/a"); !known || found.GetDisplayName() != "y" || !d.Synced() || d.Len() != 1 {
				t.Error(found, known)
			}
			if _, known := d.Get("2"); known {
				t.Error("what is deleted is known")
			}
		})
	}
}

func TestReadersGetTheirOwn(t *testing.T) {
	d := newTold()
	d.tell(put("1", "nodes/n1/domains/a", titled("x")))
	mine, _ := d.Get("1")
	mine.DisplayName = "spoilt"
	if other, _ := d.Get("1"); other.GetDisplayName() != "x" {
		t.Error(other)
	}
}

func TestANewSnapshotDropsWhatIsNotInIt(t *testing.T) {
	d := newTold()
	d.begin(true)
	d.tell(put("1", "nodes/n1/domains/a"), put("2", "nodes/n1/domains/b"))
	d.end()
	d.heard = nil
	d.begin(true)
	d.tell(put("1", "nodes/n1/domains/a"))
	d.begin(true) // it broke, and begins again
	d.tell(put("2", "nodes/n1/domains/b"), put("3", "nodes/n1/domains/c"))
	d.end()
	d.expect(t, "added nodes/n1/domains/c", "deleted nodes/n1/domains/a", "synced")
	d.begin(false) // it goes on: nothing is dropped
	d.tell(put("4", "nodes/n1/domains/d"))
	d.expect(t, "added nodes/n1/domains/d")
	if s := d.Statistics(); s.Snapshots != 3 || s.Resumptions != 1 {
		t.Errorf("%+v", s)
	}
}

func TestANodeThatIsReadAnewLosesWhatIsNotTold(t *testing.T) {
	d := newTold()
	d.tell(put("1", "nodes/n1/domains/a"), put("2", "nodes/n1/domains/b"), put("3", "nodes/n2/domains/c"))
	d.heard = nil
	d.sourceIs("nodes/n1", stale, virtfleet.ErrNodeUnreachable)
	d.expect(t, "nodes/n1 STALE")
	if d.names() != "nodes/n1/domains/a nodes/n1/domains/b nodes/n2/domains/c" || d.Source("nodes/n1").GetState() != stale {
		t.Error(d.names(), d.Sources())
	}
	d.sourceIs("nodes/n1", resyncing, "")
	d.tell(put("2", "nodes/n1/domains/b"), put("4", "nodes/n2/domains/d"))
	d.sourceIs("nodes/n1", live, "")
	d.expect(t, "nodes/n1 RESYNCING", "nodes/n1 LIVE", "added nodes/n2/domains/d", "deleted nodes/n1/domains/a")
	if d.Source("nodes/n1").GetState() != live || d.Source("nodes/n9").GetState() != live || d.Statistics().Resyncs != 1 {
		t.Error(d.Sources(), d.Statistics())
	}
	// A stream that breaks in the middle drops nothing; the node is read anew after it.
	d.sourceIs("nodes/n2", resyncing, "")
	d.begin(false)
	d.sourceIs("nodes/n2", live, "")
	if d.names() != "nodes/n1/domains/b nodes/n2/domains/c nodes/n2/domains/d" {
		t.Error(d.names())
	}
}

func TestANodeThatIsLostIsKeptAndOneThatIsRemovedIsNot(t *testing.T) {
	d := newTold()
	d.tell(put("1", "nodes/n1/domains/a"), put("2", "nodes/n2/domains/b"))
	d.heard = nil
	d.sourceIs("nodes/n1", lost, virtfleet.ErrNodeUnreachable)
	if d.names() != "nodes/n1/domains/a nodes/n2/domains/b" || d.Source("nodes/n1").GetState() != lost {
		t.Error(d.names())
	}
	d.sourceIs("nodes/n1", lost, virtfleet.ErrNodeUnknown)
	d.expect(t, "nodes/n1 LOST", "nodes/n1 LOST", "deleted nodes/n1/domains/a")
}

func TestWhatMovesStaysOneObject(t *testing.T) {
	moved := change[*computev1.Domain]{moved: &typev1.ResourceMoved{
		Uid: "1", OldName: "nodes/n1/domains/a", NewName: "nodes/n2/domains/a",
	}}
	in := change[*computev1.Domain]{movedIn: &typev1.ResourceMovedIn{
		Uid: "1", OldName: "nodes/n1/domains/a", Name: "nodes/n2/domains/a",
	}}
	arrived := put("1", "nodes/n2/domains/a")
	left := gone("1", "nodes/n1/domains/a") // of its old name: it says nothing of the new one
	for name, changes := range map[string][]change[*computev1.Domain]{
		"moved, then put": {moved, arrived, left}, "put first": {arrived, moved}, "moved in": {in, arrived}, "put alone": {arrived},
	} {
		t.Run(name, func(t *testing.T) {
			d := newTold()
			d.tell(put("1", "nodes/n1/domains/a"))
			d.heard = nil
			d.tell(changes...)
			d.expect(t, "moved nodes/n1/domains/a to nodes/n2/domains/a")
			if d.names() != "nodes/n2/domains/a" || d.CountBy(Node, "nodes/n1") != 0 || d.CountBy(Node, "nodes/n2") != 1 {
				t.Error(d.names())
			}
			if _, known := d.ByName("nodes/n1/domains/a"); known {
				t.Error("it is known under its old name")
			}
		})
	}
}

func TestANameUnderAnotherUIDMeansThatTheOldOneIsGone(t *testing.T) {
	d := newTold()
	d.tell(put("1", "nodes/n1/domains/a"))
	d.heard = nil
	d.tell(put("2", "nodes/n1/domains/a"))
	d.expect(t, "deleted nodes/n1/domains/a", "added nodes/n1/domains/a")
	d.tell(gone("1", "nodes/n1/domains/a")) // late, and of the old one
	d.expect(t)
	if found, known := d.ByName("nodes/n1/domains/a"); !known || found.GetUid() != "2" || d.Len() != 1 {
		t.Error(found, known)
	}
}

func TestIndexes(t *testing.T) {
	volume, mac, given := "pools/p/volumes/v", "06:00:00:00:00:01", "06:00:00:00:00:02"
	full := func(domain *computev1.Domain) {
		domain.Labels = map[string]string{"app": "web", "tier": "1"}
		domain.Spec = &computev1.DomainSpec{
			Disks:      map[string]*computev1.Disk{"root": {Source: &computev1.Disk_Volume{Volume: volume}}},
			Interfaces: map[string]*computev1.Interface{"lan": {MacAddress: &mac}},
		}
		domain.Status = &computev1.DomainStatus{
			Interfaces: []*computev1.InterfaceStatus{{MacAddress: mac}, {MacAddress: given}},
			Addresses:  []*computev1.GuestAddress{{Address: "10.0.0.7"}},
		}
	}
	d := newTold()
	d.Index("first letter", func(domain *computev1.Domain) []string { return []string{domain.GetDisplayName()[:1]} })
	d.tell(put("1", "nodes/n1/domains/a", full, titled("x")), put("2", "nodes/n1/domains/b", titled("x"), func(domain *computev1.Domain) {
		domain.Labels = map[string]string{"app": "web"}
	}))
	for index, values := range map[string]map[string]int{
		Node: {"nodes/n1": 2, "nodes/n2": 0}, Label: {"app=web": 2, "tier=1": 1, "tier=2": 0},
		Volume: {"nodes/n1/pools/p/volumes/v": 1}, MAC: {mac: 1, given: 1}, Address: {"10.0.0.7": 1}, "first letter": {"x": 2},
	} {
		for value, count := range values {
			if found := d.By(index, value); len(found) != count || d.CountBy(index, value) != count {
				t.Errorf("%s %s: %d", index, value, len(found))
			}
		}
	}
	if both := d.By(Label, "app=web"); both[0].GetUid() != "1" || both[1].GetUid() != "2" {
		t.Error("not by name")
	}
	d.tell(put("1", "nodes/n1/domains/a", titled("y")))
	for index, value := range map[string]string{
		Label: "tier=1", Volume: "nodes/n1/pools/p/volumes/v", MAC: mac, Address: "10.0.0.7",
	} {
		if d.CountBy(index, value) != 0 {
			t.Errorf("%s %s is found after it has changed", index, value)
		}
	}
	d.tell(gone("1", "nodes/n1/domains/a"), gone("2", "nodes/n1/domains/b"))
	for _, index := range d.objects.indexes {
		if len(index.buckets) != 0 {
			t.Errorf("%s keeps %d values of nothing", index.name, len(index.buckets))
		}
	}
}

func TestRunEndsWithItsContextOrWhenRefused(t *testing.T) {
	follow := func(ctx context.Context, options ...virtfleet.FollowOption) iter.Seq2[*news[*computev1.Domain], error] {
		return func(yield func(*news[*computev1.Domain], error) bool) {
			if yield(&news[*computev1.Domain]{snapshotEnd: true}, nil) {
				<-ctx.Done()
				yield(nil, context.Cause(ctx))
			}
		}
	}
	d := newInformer(plan{}, follow)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- d.Run(ctx) }()
	if err := d.WaitSynced(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := d.Run(ctx); err == nil {
		t.Error("it runs twice")
	}
	cancel()
	if err := <-ended; err != nil || d.Connected() {
		t.Error(err, d.Connected())
	}
	refused := newInformer(plan{}, func(context.Context, ...virtfleet.FollowOption) iter.Seq2[*news[*computev1.Domain], error] {
		return func(yield func(*news[*computev1.Domain], error) bool) { yield(nil, virtfleet.ErrPermissionMissing) }
	})
	if err := refused.Run(t.Context()); !errors.Is(err, virtfleet.ErrPermissionMissing) {
		t.Error(err)
	}
	if err := refused.WaitSynced(ctx); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestWaitSyncedSaysWhatStandsInTheWay(t *testing.T) {
	d := newInformer(plan{}, func(context.Context, ...virtfleet.FollowOption) iter.Seq2[*news[*computev1.Domain], error] {
		return func(func(*news[*computev1.Domain], error) bool) {}
	})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := d.WaitSynced(ctx); err != context.Canceled { //nolint:errorlint // it is nothing but that
		t.Error(err)
	}
	d.connection(virtfleet.ErrNodeUnreachable)
	if err := d.WaitSynced(ctx); !errors.Is(err, context.Canceled) || !errors.Is(err, virtfleet.ErrNodeUnreachable) {
		t.Error(err)
	}
	d.connection(nil)
	if err := d.WaitSynced(ctx); errors.Is(err, virtfleet.ErrNodeUnreachable) {
		t.Error("what stood in the way is kept", err)
	}
}

func TestNames(t *testing.T) {
	for name, wanted := range map[string]string{"nodes/n1/domains/a": "nodes/n1", "nodes/n1": "nodes/n1", "": "", "x": "x"} {
		if found := nodeOf(name); found != wanted {
			t.Errorf("%s: %s", name, found)
		}
	}
	if found := parentOf("nodes/n1/pools/p/volumes/v"); found != "nodes/n1/pools/p" {
		t.Error(found)
	}
}

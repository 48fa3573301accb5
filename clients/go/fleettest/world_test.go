//go:build fleet

// Package fleettest tests the client against fleets: a fake one that it starts itself, and the real one of the environment
// (VIRTFLEET_ADDRESS and the files beside it, VIRTFLEET_NODES, and VIRTFLEET_RUN with the pid files of its processes).
package fleettest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	virtfleet "virtfleet.dev/go"
	computev1 "virtfleet.dev/go/compute/v1"
	fakev1 "virtfleet.dev/go/fake/v1"
	fleetv1 "virtfleet.dev/go/fleet/v1"
	"virtfleet.dev/go/virtfleettest"
)

const patience = 60 * time.Second

// world is a fleet with two nodes, and what can be done to it.
type world interface {
	dial(t *testing.T, options ...virtfleet.Option) *virtfleet.Client
	// killGateway ends the gateway by SIGKILL; another takes its place.
	killGateway(t *testing.T)
	// drainGateway ends it in good order; another takes its place.
	drainGateway(t *testing.T)
	// freeze stops a node without closing anything, and returns what lets it go on.
	freeze(t *testing.T, node string) (thaw func())
}

// eachWorld runs a test in the fake fleet and in the real one.
func eachWorld(t *testing.T, test func(t *testing.T, w world)) {
	t.Run("fake", func(t *testing.T) { test(t, fakeWorld{virtfleettest.Start(t, virtfleettest.Nodes(2))}) })
	t.Run("real", func(t *testing.T) { test(t, newRealWorld(t)) })
}

type fakeWorld struct{ *virtfleettest.Fleet }

func (w fakeWorld) dial(t *testing.T, options ...virtfleet.Option) *virtfleet.Client {
	return w.Dial(t, options...)
}

func (w fakeWorld) killGateway(t *testing.T) { w.KillGateway(t, 200*time.Millisecond) }

func (w fakeWorld) drainGateway(t *testing.T) { w.DrainGateway(t, 200*time.Millisecond) }

func (w fakeWorld) freeze(t *testing.T, node string) func() {
	return w.Inject(t, node, &fakev1.Fault{Kind: &fakev1.Fault_Freeze{Freeze: &fakev1.Freeze{}}})
}

type realWorld struct{ run string }

// oneAtATime is held by the test that does something to the real fleet. Fake fleets are each test's own.
var oneAtATime sync.Mutex

func newRealWorld(t *testing.T) realWorld {
	run := os.Getenv("VIRTFLEET_RUN")
	if run == "" || os.Getenv("VIRTFLEET_ADDRESS") == "" {
		t.Fatal("no fleet: VIRTFLEET_ADDRESS and VIRTFLEET_RUN name it; `python -m pytest tests/clients/test_go.py` starts one")
	}
	w := realWorld{run}
	oneAtATime.Lock()
	t.Cleanup(oneAtATime.Unlock)
	t.Cleanup(func() {
		// Ended contexts must not reach what leaves the fleet whole.
		client, err := virtfleet.Dial(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = client.Close() }()
		until(t, "the fleet is whole again", func() bool { return whole(context.Background(), client) })
	})
	return w
}

func (w realWorld) dial(t *testing.T, options ...virtfleet.Option) *virtfleet.Client {
	t.Helper()
	client, err := virtfleet.Dial(t.Context(), options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	return client
}

func (w realWorld) pid(t *testing.T, place string) int {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(w.run, place+".pid"))
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return 0
	}
	return pid
}

func (w realWorld) replace(t *testing.T, place string, signal syscall.Signal) {
	t.Helper()
	before := w.pid(t, place)
	if err := syscall.Kill(before, signal); err != nil {
		t.Fatal(err)
	}
	until(t, "another "+place+" runs", func() bool { after := w.pid(t, place); return after != 0 && after != before })
}

func (w realWorld) killGateway(t *testing.T) { w.replace(t, "gateway", syscall.SIGKILL) }

func (w realWorld) drainGateway(t *testing.T) { w.replace(t, "gateway", syscall.SIGTERM) }

func (w realWorld) freeze(t *testing.T, node string) func() {
	t.Helper()
	var stopped []int
	for _, service := range []string{"compute", "storage", "network"} {
		pid := w.pid(t, strings.TrimPrefix(node, "nodes/")+"/"+service)
		if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		stopped = append(stopped, pid)
	}
	thawed := false
	thaw := func() {
		if !thawed {
			thawed = true
			for _, pid := range stopped {
				_ = syscall.Kill(pid, syscall.SIGCONT)
			}
		}
	}
	t.Cleanup(thaw)
	return thaw
}

// whole reports whether all nodes are ready and their parts are in the lists.
func whole(ctx context.Context, client *virtfleet.Client) bool {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	ready := 0
	for node, err := range client.Nodes.AllNodes(ctx, &fleetv1.ListNodesRequest{}) {
		if err != nil || node.GetStatus().GetState() != fleetv1.NodeState_NODE_STATE_READY {
			return false
		}
		ready++
	}
	for _, err := range client.Domains.AllDomains(ctx, &computev1.ListDomainsRequest{Parent: "nodes/-"}) {
		if err != nil {
			return false
		}
	}
	return ready >= 2
}

// until looks again and again until something holds.
func until(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for ends := time.Now().Add(patience); !holds(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(ends) {
			t.Fatalf("%s: not within %v", what, patience)
		}
	}
}

var last atomic.Int64

// unique returns an id that no other test has.
func unique() string { return fmt.Sprintf("go-%d-%d", time.Now().UnixNano(), last.Add(1)) }

func small() *computev1.DomainSpec {
	driver, memory := "test", int64(64<<20)
	return &computev1.DomainSpec{Driver: &driver, Memory: &computev1.Memory{MaximumBytes: &memory}}
}

func create(ctx context.Context, client *virtfleet.Client, node, id string, spec *computev1.DomainSpec) (*computev1.Domain, error) {
	operation, err := client.Domains.CreateDomain(ctx, &computev1.CreateDomainRequest{
		Parent: node, DomainId: id, Domain: &computev1.Domain{Spec: spec},
	})
	if err != nil {
		return nil, err
	}
	return operation.Wait(ctx)
}

func remove(ctx context.Context, client *virtfleet.Client, name string) error {
	operation, err := client.Domains.DeleteDomain(ctx, &computev1.DeleteDomainRequest{Name: name, Stop: true, AllowMissing: true})
	if err != nil {
		return err
	}
	_, err = operation.Wait(ctx)
	return err
}

// made makes a domain that is deleted with the test.
func made(t *testing.T, client *virtfleet.Client, node string) *computev1.Domain {
	t.Helper()
	domain, err := create(t.Context(), client, node, unique(), small())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := remove(ctx, client, domain.GetName()); err != nil {
			t.Error(err)
		}
	})
	return domain
}

// census counts what a client sends, next to the wire: lists, watches from a snapshot and watches from a token.
type census struct {
	lists, fresh, resumed atomic.Int64
}

func (c *census) option() virtfleet.Option {
	return virtfleet.WithGRPC(
		grpc.WithChainUnaryInterceptor(func(
			ctx context.Context, method string, request, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker,
			options ...grpc.CallOption,
		) error {
			if strings.Contains(method, "/List") {
				c.lists.Add(1)
			}
			return invoke(ctx, method, request, reply, conn, options...)
		}),
		grpc.WithChainStreamInterceptor(func(
			ctx context.Context, description *grpc.StreamDesc, conn *grpc.ClientConn, method string, open grpc.Streamer,
			options ...grpc.CallOption,
		) (grpc.ClientStream, error) {
			stream, err := open(ctx, description, conn, method, options...)
			if err != nil || !strings.HasSuffix(method, "/WatchResources") {
				return stream, err
			}
			return &countedStream{stream, c}, nil
		}),
	)
}

type countedStream struct {
	grpc.ClientStream
	census *census
}

func (s *countedStream) SendMsg(message any) error {
	reflected := message.(proto.Message).ProtoReflect()
	token := reflected.Descriptor().Fields().ByName(protoreflect.Name("resume_token"))
	if reflected.Get(token).String() != "" {
		s.census.resumed.Add(1)
	} else {
		s.census.fresh.Add(1)
	}
	return s.ClientStream.SendMsg(message)
}

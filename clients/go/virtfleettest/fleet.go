// Package virtfleettest starts a fake fleet for the tests of a program: one process with a real gateway and real compute code over a
// driver in memory, whose faults and time the test steers.
//
//	func TestController(t *testing.T) {
//		fleet := virtfleettest.Start(t, virtfleettest.Nodes(3), virtfleettest.Domains(10))
//		client := fleet.Dial(t)
//		…
//		fleet.KillGateway(t, time.Second)
//	}
//
// The program is `virtfleet fake`; VIRTFLEET_FAKE_COMMAND names another (words separated by blanks).
package virtfleettest

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/durationpb"

	virtfleet "virtfleet.dev/go"
	fakev1 "virtfleet.dev/go/fake/v1"
)

const (
	startTimeout   = 3 * time.Minute // two seconds on an idle machine; many tests at once may crowd it
	endTimeout     = 20 * time.Second
	controlTimeout = 30 * time.Second
)

// Fleet is a fake fleet that runs. It ends with the test.
type Fleet struct {
	// Address is the gateway, host:port, for mutual TLS.
	Address string `json:"address"`
	// CAFile, CertFile and KeyFile are those of an administrator.
	CAFile   string `json:"ca_file"`
	CertFile string `json:"cert_file"`
	KeyFile  string `json:"key_file"`
	// ControlAddress serves Control, in the clear.
	ControlAddress string `json:"control_address"`
	// Control steers the fleet; the methods of Fleet are short forms of what is needed most.
	Control fakev1.FakeServiceClient `json:"-"`
}

// Option changes the fleet that is started.
type Option func() []string

// Nodes sets how many nodes there are: n1, n2 and so on. Without it there is one.
func Nodes(count int) Option {
	return func() []string { return []string{"--nodes", strconv.Itoa(count)} }
}

// Domains sets how many running domains each node has from the start. Without it there are none.
func Domains(count int) Option {
	return func() []string { return []string{"--domains", strconv.Itoa(count)} }
}

// SeedFile names a file with the domains of each node.
func SeedFile(path string) Option {
	return func() []string { return []string{"--seed-file", path} }
}

// Fault puts a fault in force from the start: n7=freeze, n9=latency:300ms.
func Fault(text string) Option {
	return func() []string { return []string{"--fault", text} }
}

// Start starts a fake fleet and waits until all of its nodes are ready. It fails the test if that does not come about.
func Start(t testing.TB, options ...Option) *Fleet {
	t.Helper()
	words := strings.Fields(os.Getenv("VIRTFLEET_FAKE_COMMAND"))
	if len(words) == 0 {
		words = []string{"virtfleet", "fake"}
	}
	words = append(words, "--until-eof")
	for _, option := range options {
		words = append(words, option()...)
	}
	command := exec.Command(words[0], words[1:]...)
	input, err := command.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	output, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	said := &speech{}
	command.Stderr = said
	if err := command.Start(); err != nil {
		t.Fatalf("no fake fleet: %v (VIRTFLEET_FAKE_COMMAND names the program)", err)
	}
	line := make(chan string, 1)
	ended := make(chan error, 1)
	go func() {
		reader := bufio.NewReader(output)
		text, _ := reader.ReadString('\n')
		line <- text
		_, _ = io.Copy(io.Discard, reader) // a full pipe must not stop it
		ended <- command.Wait()
	}()
	t.Cleanup(func() {
		_ = input.Close()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("the fake fleet ended with %v: %s", err, said)
			}
		case <-time.After(endTimeout):
			_ = command.Process.Kill()
			t.Errorf("the fake fleet has not ended within %v: %s", endTimeout, said)
		}
	})
	fleet := &Fleet{}
	select {
	case text := <-line:
		if err := json.Unmarshal([]byte(text), fleet); err != nil {
			t.Fatalf("%s does not say where the fake fleet is: %q: %v: %s", words[0], text, err, said)
		}
	case <-time.After(startTimeout):
		t.Fatalf("the fake fleet is not ready within %v: %s", startTimeout, said)
	}
	conn, err := grpc.NewClient(fleet.ControlAddress, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	fleet.Control = fakev1.NewFakeServiceClient(conn)
	return fleet
}

// Environment returns the variables by which another program finds the fleet: VIRTFLEET_ADDRESS and the files beside it.
func (f *Fleet) Environment() []string {
	return []string{
		"VIRTFLEET_ADDRESS=" + f.Address, "VIRTFLEET_CA_FILE=" + f.CAFile,
		"VIRTFLEET_CERT_FILE=" + f.CertFile, "VIRTFLEET_KEY_FILE=" + f.KeyFile,
	}
}

// Dial returns a client of an administrator. It is closed with the test.
func (f *Fleet) Dial(t testing.TB, options ...virtfleet.Option) *virtfleet.Client {
	t.Helper()
	options = append([]virtfleet.Option{
		virtfleet.WithAddress(f.Address),
		virtfleet.WithCredentials(virtfleet.Credentials{CAFile: f.CAFile, CertFile: f.CertFile, KeyFile: f.KeyFile}),
	}, options...)
	client, err := virtfleet.Dial(t.Context(), options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// Inject puts a fault in force on a node (nodes/{node}); an empty node: on the connections of clients. It returns what ends it.
func (f *Fleet) Inject(t testing.TB, node string, fault *fakev1.Fault) (end func()) {
	t.Helper()
	answer := steer(t, f.Control.InjectFault, &fakev1.InjectFaultRequest{Name: node, Fault: fault})
	return func() {
		t.Helper()
		steer(t, f.Control.ClearFaults, &fakev1.ClearFaultsRequest{Name: node, FaultId: answer.GetFaultId()})
	}
}

// Away cuts a node (nodes/{node}) off: connections to it are cut and refused. It returns what brings the node back.
func (f *Fleet) Away(t testing.TB, node string) (back func()) {
	t.Helper()
	return f.Inject(t, node, &fakev1.Fault{Kind: &fakev1.Fault_Away{Away: &fakev1.Away{}}})
}

// Freeze stops a node (nodes/{node}), or with an empty name the connections of clients, without closing anything. It returns what
// lets it go on.
func (f *Fleet) Freeze(t testing.TB, node string) (thaw func()) {
	t.Helper()
	return f.Inject(t, node, &fakev1.Fault{Kind: &fakev1.Fault_Freeze{Freeze: &fakev1.Freeze{}}})
}

// CutConnections cuts all connections of clients, in the middle of their calls.
func (f *Fleet) CutConnections(t testing.TB) {
	t.Helper()
	steer(t, f.Control.CutConnections, &fakev1.CutConnectionsRequest{})
}

// KillGateway ends the gateway as SIGKILL does and starts it again after a pause.
func (f *Fleet) KillGateway(t testing.TB, pause time.Duration) {
	t.Helper()
	steer(t, f.Control.RestartGateway, &fakev1.RestartGatewayRequest{Pause: durationpb.New(pause)})
}

// DrainGateway ends the gateway in good order and starts it again after a pause.
func (f *Fleet) DrainGateway(t testing.TB, pause time.Duration) {
	t.Helper()
	steer(t, f.Control.RestartGateway, &fakev1.RestartGatewayRequest{Pause: durationpb.New(pause), Drain: true})
}

// CompactLogs makes the resume tokens of a node (nodes/{node}), or with an empty name of all nodes, too old.
func (f *Fleet) CompactLogs(t testing.TB, node string) {
	t.Helper()
	steer(t, f.Control.CompactLogs, &fakev1.CompactLogsRequest{Name: node})
}

// MoveDomain moves a domain to the node with an id, as a migration does, and returns its new name.
func (f *Fleet) MoveDomain(t testing.TB, name, node string) string {
	t.Helper()
	return steer(t, f.Control.MoveDomain, &fakev1.MoveDomainRequest{Name: name, TargetNode: node}).GetNewName()
}

// AdvanceTime moves the time of the whole fleet forward.
func (f *Fleet) AdvanceTime(t testing.TB, by time.Duration) {
	t.Helper()
	steer(t, f.Control.AdvanceTime, &fakev1.AdvanceTimeRequest{Duration: durationpb.New(by)})
}

// Watches returns how many WatchResources calls the gateway has got that began afresh, and how many that went on from a token.
func (f *Fleet) Watches(t testing.TB) (fresh, resumed int64) {
	t.Helper()
	fake := steer(t, f.Control.GetFake, &fakev1.GetFakeRequest{})
	return fake.GetFreshWatchCount(), fake.GetResumedWatchCount()
}

func steer[Request, Answer any](
	t testing.TB, method func(context.Context, *Request, ...grpc.CallOption) (*Answer, error), request *Request,
) *Answer {
	t.Helper()
	// Not the test's own context: it has ended when the last cleanups run.
	ctx, cancel := context.WithTimeout(context.Background(), controlTimeout)
	defer cancel()
	answer, err := method(ctx, request)
	if err != nil {
		t.Fatalf("the fake fleet does not heed %T: %v", request, err)
	}
	return answer
}

// speech keeps what a program says.
type speech struct {
	mutex sync.Mutex
	text  strings.Builder
}

// Write is part of io.Writer.
func (s *speech) Write(more []byte) (int, error) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	return s.text.Write(more)
}

// String returns all that was said.
func (s *speech) String() string {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	return fmt.Sprintf("%q", s.text.String())
}

package virtfleet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	commonv1 "virtfleet.dev/go/common/v1"
	computev1 "virtfleet.dev/go/compute/v1"
)

// TestMain lets the test program be its own `virtfleet proxy`: it joins connections to the socket that the URI names.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "proxy" {
		os.Exit(proxyProgram(os.Args[2]))
	}
	os.Exit(m.Run())
}

func proxyProgram(text string) int {
	uri, err := url.Parse(text)
	if err != nil || uri.Host == "refused" {
		fmt.Fprintln(os.Stderr, "no way to", uri.Host)
		return 3
	}
	var place string
	if path := uri.Query().Get("record"); path != "" {
		// Of the test, which takes it away when it has killed this program.
		place = filepath.Dir(path)
	}
	folder, err := os.MkdirTemp(place, "proxy")
	if err != nil {
		return 1
	}
	defer func() { _ = os.RemoveAll(folder) }()
	listener, err := net.Listen("unix", filepath.Join(folder, "socket"))
	if err != nil {
		return 1
	}
	if record, err := os.OpenFile(uri.Query().Get("record"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600); err == nil {
		_, _ = fmt.Fprintln(record, os.Getpid())
		_ = record.Close()
	}
	go func() {
		for {
			near, err := listener.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("unix", uri.Path)
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				_ = near.Close()
				continue
			}
			go func() { _, _ = io.Copy(far, near); _ = far.Close() }()
			go func() { _, _ = io.Copy(near, far); _ = near.Close() }()
		}
	}()
	fmt.Println(listener.Addr())
	_, _ = io.Copy(io.Discard, os.Stdin)
	return 0
}

func proxies(t *testing.T, record string) []int {
	t.Helper()
	text, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	var found []int
	for _, line := range strings.Fields(string(text)) {
		var pid int
		if _, err := fmt.Sscan(line, &pid); err != nil {
			t.Fatal(err)
		}
		found = append(found, pid)
	}
	return found
}

func TestAnyTransportComesThroughTheHelper(t *testing.T) {
	t.Setenv("VIRTFLEET_COMMAND", os.Args[0])
	server := startPeer(t, func(_ int, _ proto.Message, stream grpc.ServerStream) error {
		return stream.SendMsg(&commonv1.WhoAmIResponse{Subject: "me"})
	})
	record := filepath.Join(t.TempDir(), "pids")
	address := "ssh://me@far" + strings.TrimPrefix(server.address, "unix://") + "?record=" + record
	client, err := Dial(t.Context(), WithAddress(address))
	if err != nil {
		t.Fatal(err)
	}
	answer, err := client.Access.WhoAmI(t.Context(), &commonv1.WhoAmIRequest{})
	if err != nil || answer.GetSubject() != "me" {
		t.Fatal(answer, err)
	}
	// A helper that dies is started again.
	first := proxies(t, record)
	if err := syscall.Kill(first[0], syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for {
		if err := client.WaitReady(ctx); err != nil {
			t.Fatal(err)
		}
		if len(proxies(t, record)) == 2 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err := client.Close(); err != nil {
		t.Fatal(err)
	}
	for _, pid := range proxies(t, record) {
		if err := syscall.Kill(pid, 0); err == nil {
			t.Errorf("the helper %d is left", pid)
		}
	}
}

func TestAHelperThatCannotStartIsQuoted(t *testing.T) {
	t.Setenv("VIRTFLEET_COMMAND", os.Args[0])
	_, err := Dial(t.Context(), WithAddress("ssh://refused/x"))
	if err == nil || !strings.Contains(err.Error(), "no way to refused") {
		t.Error(err)
	}
	t.Setenv("VIRTFLEET_COMMAND", filepath.Join(t.TempDir(), "missing"))
	if _, err := Dial(t.Context(), WithAddress("ssh://far/x")); err == nil || !strings.Contains(err.Error(), "missing") {
		t.Error(err)
	}
}

func TestWhatTheHelperSaysOfAConnectionIsInTheError(t *testing.T) {
	t.Setenv("VIRTFLEET_COMMAND", os.Args[0])
	client, err := Dial(t.Context(), WithAddress("ssh://far/nowhere/socket"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	_, err = client.Access.WhoAmI(t.Context(), &commonv1.WhoAmIRequest{})
	words := "dial unix /nowhere/socket: connect: no such file or directory"
	if !errors.Is(err, ErrUnavailable) || strings.Count(err.Error(), words) != 1 {
		t.Error(err)
	}
	// A stream ends with its first failure: the words of that one may come after it.
	for attempt := 0; ; attempt++ {
		stream, err := client.ComputeWatch.WatchResources(t.Context(), &computev1.WatchResourcesRequest{Parent: "nodes/-"})
		if err == nil {
			_, err = stream.Recv()
		}
		if !errors.Is(err, ErrUnavailable) {
			t.Fatal(err)
		}
		if strings.Contains(err.Error(), words) {
			break
		}
		if attempt == 50 {
			t.Fatal(err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func TestAWatchThatCannotBeMadeSaysWhyWhenItsContextEnds(t *testing.T) {
	t.Setenv("VIRTFLEET_COMMAND", os.Args[0])
	client, err := Dial(t.Context(), WithAddress("ssh://far/nowhere/socket"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	words := "dial unix /nowhere/socket: connect: no such file or directory"
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var lost, last error
	told := OnLost(func(err error) {
		if lost = err; strings.Contains(err.Error(), words) {
			cancel()
		}
	})
	for _, err := range client.ComputeWatch.FollowResources(ctx, &computev1.WatchResourcesRequest{Parent: "nodes/-"}, told) {
		last = err
	}
	if !errors.Is(lost, ErrUnavailable) || !strings.Contains(lost.Error(), words) {
		t.Error(lost)
	}
	if !errors.Is(last, context.Canceled) || !errors.Is(last, ErrUnavailable) || !strings.Contains(last.Error(), words) {
		t.Error(last)
	}
}

package virtfleet

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	computev1 "virtfleet.dev/go/compute/v1"
	fleetv1 "virtfleet.dev/go/fleet/v1"
	typev1 "virtfleet.dev/go/type/v1"
)

func threePages(t *testing.T, last *computev1.ListDomainsResponse) *peer {
	t.Helper()
	return startPeer(t, func(_ int, request proto.Message, stream grpc.ServerStream) error {
		page := 0
		if token := request.(*computev1.ListDomainsRequest).GetPageToken(); token != "" {
			_, _ = fmt.Sscan(token, &page)
		}
		if page == 2 {
			if last == nil {
				return failure(t, ErrPageTokenInvalid, nil)
			}
			return stream.SendMsg(last)
		}
		name := func(index int) *computev1.Domain { return &computev1.Domain{Name: fmt.Sprint(page, index)} }
		return stream.SendMsg(&computev1.ListDomainsResponse{
			Domains: []*computev1.Domain{name(0), name(1)}, NextPageToken: fmt.Sprint(page + 1),
		})
	})
}

func TestAllPagesAreOneSequence(t *testing.T) {
	server := threePages(t, &computev1.ListDomainsResponse{Domains: []*computev1.Domain{{Name: "last"}}})
	request := &computev1.ListDomainsRequest{Parent: "nodes/-", PageSize: 2}
	var names []string
	for domain, err := range server.dial(t).Domains.AllDomains(t.Context(), request) {
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, domain.GetName())
	}
	if text := strings.Join(names, " "); text != "0 0 0 1 1 0 1 1 last" {
		t.Error(text)
	}
	if request.GetPageToken() != "" {
		t.Error("the request of the caller has changed")
	}
}

func TestALeftLoopAsksForNoFurtherPage(t *testing.T) {
	server := threePages(t, nil)
	for range server.dial(t).Domains.AllDomains(t.Context(), &computev1.ListDomainsRequest{}) {
		break
	}
	if calls := len(server.requests()); calls != 1 {
		t.Errorf("%d calls", calls)
	}
}

func TestAPageThatFailsIsTheLastThatIsYielded(t *testing.T) {
	server := threePages(t, nil)
	var failures []error
	good := 0
	for _, err := range server.dial(t).Domains.AllDomains(t.Context(), &computev1.ListDomainsRequest{}) {
		if err != nil {
			failures = append(failures, err)
		} else {
			good++
		}
	}
	if good != 4 || len(failures) != 1 || !errors.Is(failures[0], ErrPageTokenInvalid) {
		t.Error(good, failures)
	}
}

func TestAListThatIsNotWholeSaysSo(t *testing.T) {
	missing := &typev1.NodeFailure{Node: "nodes/n2", Status: failureStatus(t, ErrNodeUnreachable, nil)}
	server := threePages(t, &computev1.ListDomainsResponse{Unreachable: []*typev1.NodeFailure{missing, missing}})
	client := server.dial(t)
	list := func(request *computev1.ListDomainsRequest) (good int, last error) {
		for _, err := range client.Domains.AllDomains(t.Context(), request) {
			if last = err; err == nil {
				good++
			}
		}
		return good, last
	}
	good, err := list(&computev1.ListDomainsRequest{})
	var partial *PartialError
	if good != 4 || !errors.As(err, &partial) || len(partial.Failures) != 1 || !errors.Is(err, ErrNodeUnreachable) {
		t.Error(good, err)
	}
	if !strings.Contains(err.Error(), "nodes/n2") {
		t.Error(err)
	}
	if good, err := list(&computev1.ListDomainsRequest{AllowStale: true}); good != 4 || err != nil {
		t.Errorf("what was last seen will do: %d, %v", good, err)
	}
	nodes := startPeer(t, func(_ int, _ proto.Message, stream grpc.ServerStream) error {
		return stream.SendMsg(&fleetv1.ListNodesResponse{Nodes: []*fleetv1.Node{{}}, Unreachable: []*typev1.NodeFailure{missing}})
	})
	for _, err := range nodes.dial(t).Nodes.AllNodes(t.Context(), &fleetv1.ListNodesRequest{}) {
		if err != nil {
			t.Errorf("nodes that are away are in the list of nodes: %v", err)
		}
	}
}

//go:build fleet

package main

import (
	"context"
	"slices"
	"testing"
	"time"

	virtfleet "virtfleet.dev/go"
	computev1 "virtfleet.dev/go/compute/v1"
	"virtfleet.dev/go/virtfleettest"
)

func template() *computev1.Domain {
	driver, memory := "test", int64(64<<20)
	return &computev1.Domain{
		Labels: map[string]string{groupLabel: "web"},
		Spec:   &computev1.DomainSpec{Driver: &driver, Memory: &computev1.Memory{MaximumBytes: &memory}},
	}
}

// ours returns the domains of the group, as the fleet itself says.
func ours(t *testing.T, client *virtfleet.Client) map[string][]*computev1.Domain {
	t.Helper()
	found := map[string][]*computev1.Domain{}
	request := &computev1.ListDomainsRequest{
		Parent: "nodes/-", Filter: `labels."` + groupLabel + `"=web`, View: 1, AllowStale: true,
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for domain, err := range client.Domains.AllDomains(ctx, request) {
		if err != nil {
			break // the gateway is away; the caller looks again
		}
		node := domain.GetName()[:len("nodes/n1")]
		found[node] = append(found[node], domain)
	}
	return found
}

func until(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for ends := time.Now().Add(60 * time.Second); !holds(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(ends) {
			t.Fatalf("%s: not within a minute", what)
		}
	}
}

func running(domains []*computev1.Domain) (count int) {
	for _, domain := range domains {
		if domain.GetStatus().GetState() == computev1.DomainState_DOMAIN_STATE_RUNNING {
			count++
		}
	}
	return count
}

func uids(found map[string][]*computev1.Domain) (uids []string) {
	for _, domains := range found {
		for _, domain := range domains {
			uids = append(uids, domain.GetUid())
		}
	}
	slices.Sort(uids)
	return uids
}

func TestReplicas(t *testing.T) {
	fleet := virtfleettest.Start(t, virtfleettest.Nodes(3))
	client, own := fleet.Dial(t), fleet.Dial(t)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- run(ctx, own, 6, template()) }()
	spread := func(n1, n2, n3 int) func() bool {
		return func() bool {
			found := ours(t, client)
			return running(found["nodes/n1"]) == n1 && running(found["nodes/n2"]) == n2 && running(found["nodes/n3"]) == n3 &&
				len(found["nodes/n1"]) == n1 && len(found["nodes/n2"]) == n2 && len(found["nodes/n3"]) == n3
		}
	}
	until(t, "six run, two on each node", spread(2, 2, 2))

	victim := ours(t, client)["nodes/n2"][0]
	operation, err := client.Domains.StopDomain(ctx, &computev1.StopDomainRequest{
		Name: victim.GetName(), Mode: computev1.StopMode_STOP_MODE_FORCE,
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := operation.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	until(t, "the dead one is replaced", func() bool {
		_, err := client.Domains.GetDomain(ctx, &computev1.GetDomainRequest{Name: victim.GetName()})
		return virtfleet.FromError(err).HasReason(virtfleet.ErrResourceNotFound) && spread(2, 2, 2)()
	})

	for range 2 {
		if err := (&controller{client: client, template: template(), made: map[string]time.Time{}}).create(ctx, "nodes/n1"); err != nil {
			t.Fatal(err)
		}
	}
	total := func(count int) func() bool {
		return func() bool {
			found := ours(t, client)
			all := append(append(found["nodes/n1"], found["nodes/n2"]...), found["nodes/n3"]...)
			return len(all) == count && running(all) == count
		}
	}
	until(t, "the surplus is gone", total(6))

	before := uids(ours(t, client))
	fleet.KillGateway(t, time.Second)
	fleet.CutConnections(t)
	until(t, "all are there after the gateway was killed", total(6))
	if after := uids(ours(t, client)); !slices.Equal(before, after) {
		t.Errorf("domains were replaced because the gateway was killed: %v, %v", before, after)
	}

	back := fleet.Away(t, "nodes/n3")
	lost := len(ours(t, client)["nodes/n3"])
	time.Sleep(2 * time.Second)
	if found := ours(t, client); len(found["nodes/n1"])+len(found["nodes/n2"]) != 6-lost {
		t.Errorf("what runs out of reach is replaced too early: %v", found)
	}
	fleet.AdvanceTime(t, 2*time.Minute)
	until(t, "those of the lost node are replaced", func() bool {
		found := ours(t, client)
		return running(found["nodes/n1"])+running(found["nodes/n2"]) == 6
	})
	back()
	until(t, "the surplus that comes back is gone", total(6))

	cancel()
	if err := <-ended; err != nil {
		t.Errorf("it ends with %v", err)
	}
}

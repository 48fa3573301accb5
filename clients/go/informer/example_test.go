//go:build fleet

package informer_test

import (
	"context"
	"fmt"
	"log"

	virtfleet "virtfleet.dev/go"
	computev1 "virtfleet.dev/go/compute/v1"
	fleetv1 "virtfleet.dev/go/fleet/v1"
	"virtfleet.dev/go/informer"
)

// Works on every node, once at the start and again whenever it has changed.
func Example() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	client, err := virtfleet.Dial(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = client.Close() }()

	nodes := informer.Nodes(client)
	queue := informer.NewQueue[string]()
	nodes.Handle(informer.EnqueueUIDs[*fleetv1.Node](queue))
	go func() {
		if err := nodes.Run(ctx); err != nil {
			log.Fatal(err)
		}
	}()
	if err := nodes.WaitSynced(ctx); err != nil {
		log.Fatal(err)
	}
	seen := map[string]bool{}
	queue.Run(ctx, 1, func(_ context.Context, uid string) error {
		if node, known := nodes.Get(uid); known && !seen[node.GetName()] {
			seen[node.GetName()] = true
			fmt.Println(node.GetName(), node.GetStatus().GetState())
		}
		if len(seen) == nodes.Len() {
			cancel()
		}
		return nil
	})
	// Unordered output:
	// nodes/n1 NODE_STATE_READY
	// nodes/n2 NODE_STATE_READY
}

// Finds domains by an index of its own.
func ExampleInformer_Index() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	client, err := virtfleet.Dial(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	domains := informer.Domains(client)
	domains.Index("state", func(domain *computev1.Domain) []string {
		return []string{domain.GetStatus().GetState().String()}
	})
	go func() { _ = domains.Run(ctx) }()
	if err := domains.WaitSynced(ctx); err != nil {
		log.Fatal(err)
	}
	fmt.Println(len(domains.By("state", "DOMAIN_STATE_CRASHED")), "have crashed")
	// Output: 0 have crashed
}

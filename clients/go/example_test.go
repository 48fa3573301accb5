//go:build fleet

package virtfleet_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"time"

	"google.golang.org/protobuf/proto"

	virtfleet "virtfleet.dev/go"
	computev1 "virtfleet.dev/go/compute/v1"
	fleetv1 "virtfleet.dev/go/fleet/v1"
	typev1 "virtfleet.dev/go/type/v1"
)

// Makes and starts a domain, and deletes it again.
func Example() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	client, err := virtfleet.Dial(ctx) // VIRTFLEET_ADDRESS and the files beside it, or a context of the context file
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = client.Close() }()

	creation, err := client.Domains.CreateDomain(ctx, &computev1.CreateDomainRequest{
		Parent:   "nodes/n1",
		DomainId: "example",
		Domain: &computev1.Domain{Spec: &computev1.DomainSpec{
			Driver: proto.String("test"),
			Memory: &computev1.Memory{MaximumBytes: proto.Int64(64 << 20)},
		}},
		Start: &computev1.StartOptions{},
	})
	if err != nil {
		log.Fatal(err)
	}
	domain, err := creation.Wait(ctx)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(domain.GetName(), domain.GetStatus().GetState())

	deletion, err := client.Domains.DeleteDomain(ctx, &computev1.DeleteDomainRequest{Name: domain.GetName(), Stop: true})
	if err != nil {
		log.Fatal(err)
	}
	if _, err := deletion.Wait(ctx); err != nil {
		log.Fatal(err)
	}
	// Output: nodes/n1/domains/example DOMAIN_STATE_RUNNING
}

// Tells apart what went wrong by reasons, and reads the values that come with them.
func ExampleError() {
	ctx := context.Background()
	client, err := virtfleet.Dial(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	_, err = client.Domains.CreateDomain(ctx, &computev1.CreateDomainRequest{
		Parent: "nodes/n1", DomainId: "Not an id", Domain: &computev1.Domain{Spec: &computev1.DomainSpec{}},
	})
	var failure *virtfleet.Error
	switch {
	case errors.Is(err, virtfleet.ErrResourceExists):
		fmt.Println("it is there already")
	case errors.Is(err, virtfleet.ErrUnavailable):
		fmt.Println("later, perhaps")
	case errors.As(err, &failure):
		fmt.Println(failure.Code, failure.Reason, failure.Fields[0].Path)
	}
	// Output: InvalidArgument NAME_MALFORMED domain_id
}

// Goes through all pages of a list as one sequence.
func ExampleNodeService_AllNodes() {
	ctx := context.Background()
	client, err := virtfleet.Dial(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	for node, err := range client.Nodes.AllNodes(ctx, &fleetv1.ListNodesRequest{}) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(node.GetName())
	}
	// Output:
	// nodes/n1
	// nodes/n2
}

// Follows a watch over every break until the snapshot is complete.
func ExampleFollow() {
	ctx := context.Background()
	client, err := virtfleet.Dial(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	request := &fleetv1.WatchResourcesRequest{ResourceTypes: []fleetv1.ResourceType{fleetv1.ResourceType_RESOURCE_TYPE_NODE}}
	for answer, err := range client.FleetWatch.FollowResources(ctx, request) {
		if err != nil {
			log.Fatal(err)
		}
		for _, change := range answer.GetChanges() {
			if node := change.GetPut().GetNode(); node != nil {
				fmt.Println(node.GetName())
			}
		}
		if answer.GetSnapshotEnd() != nil {
			break
		}
	}
	// Unordered output:
	// nodes/n1
	// nodes/n2
}

// Shows how far an operation is.
func ExampleWithProgress() {
	ctx := context.Background()
	client, err := virtfleet.Dial(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	deletion, err := client.Domains.DeleteDomain(ctx, &computev1.DeleteDomainRequest{
		Name: "nodes/n1/domains/nothing", AllowMissing: true,
	})
	if err != nil {
		log.Fatal(err)
	}
	_, err = deletion.Wait(ctx, virtfleet.WithProgress(func(metadata *typev1.OperationMetadata) {
		fmt.Println(metadata.GetTarget())
	}))
	if err != nil {
		log.Fatal(err)
	}
	// Output: nodes/n1/domains/nothing
}

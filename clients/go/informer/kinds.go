package informer

import (
	"context"
	"iter"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	virtfleet "virtfleet.dev/go"
	computev1 "virtfleet.dev/go/compute/v1"
	fleetv1 "virtfleet.dev/go/fleet/v1"
	networkv1 "virtfleet.dev/go/network/v1"
	storagev1 "virtfleet.dev/go/storage/v1"
	typev1 "virtfleet.dev/go/type/v1"
)

// The indexes of the kinds.
const (
	// Node finds resources by their node: nodes/n1. Every kind has it but nodes.
	Node = "node"
	// Label finds resources by a label and its value: app=web. Every kind has it.
	Label = "label"
	// Volume finds domains by a volume of their spec: nodes/n1/pools/p/volumes/v.
	Volume = "volume"
	// MAC finds domains and ports by a MAC address, asked for or given.
	MAC = "mac"
	// Address finds domains and ports by an address of the guest.
	Address = "address"
	// Pool finds volumes by their pool: nodes/n1/pools/p.
	Pool = "pool"
	// Network finds ports by their network: nodes/n1/networks/x.
	Network = "network"
	// Domain finds volumes by a domain that holds them: nodes/n1/domains/web.
	Domain = "domain"
)

// quiet is how long a watch may say nothing.
const quiet = 10 * time.Second

type plan struct {
	parent  string
	filter  string
	view    typev1.ResourceView
	decoded bool
}

// Option changes what an informer keeps.
type Option func(*plan)

// Parent has an informer keep the resources of one node (nodes/n1) instead of all nodes.
func Parent(name string) Option { return func(p *plan) { p.parent = name } }

// Filter has an informer keep only what a filter of lists holds for: labels.app="web". What ceases to hold is deleted here.
func Filter(text string) Option { return func(p *plan) { p.filter = text } }

// Basic has an informer keep the view BASIC: no spec, and of the status no active and resolved spec. A third of the memory; the
// index Volume stays empty, and MAC and Address know what has been given alone.
func Basic() Option {
	return func(p *plan) { p.view = typev1.ResourceView_RESOURCE_VIEW_BASIC }
}

// Decoded has an informer keep each object ready to use, in two to three times the memory: reading costs nothing then, and everybody
// gets the same object, which is not to be changed. Without it an object is kept as it is sent, and each reader gets his own.
func Decoded() Option { return func(p *plan) { p.decoded = true } }

func planned(parent string, options []Option) plan {
	found := plan{parent: parent}
	for _, option := range options {
		option(&found)
	}
	return found
}

// Domains returns an informer of domains, with the indexes Node, Label, Volume, MAC and Address.
func Domains(client *virtfleet.Client, options ...Option) *Informer[*computev1.Domain] {
	plan := planned("nodes/-", options)
	request := &computev1.WatchResourcesRequest{
		Parent: plan.parent, Filter: plan.filter, View: plan.view, BookmarkInterval: durationpb.New(quiet),
		ResourceTypes: []computev1.ResourceType{computev1.ResourceType_RESOURCE_TYPE_DOMAIN},
	}
	found := newInformer(plan, func(ctx context.Context, options ...virtfleet.FollowOption) iter.Seq2[*news[*computev1.Domain], error] {
		return read(client.ComputeWatch.FollowResources(ctx, request, options...), func(change *computev1.Change) *computev1.Domain {
			return change.GetPut().GetDomain()
		})
	})
	found.objects.addIndex(Node, byNode[*computev1.Domain])
	found.objects.addIndex(Volume, volumesOf)
	found.objects.addIndex(MAC, macsOf)
	found.objects.addIndex(Address, func(domain *computev1.Domain) (values []string) {
		for _, address := range domain.GetStatus().GetAddresses() {
			values = append(values, address.GetAddress())
		}
		return values
	})
	return found
}

// Volumes returns an informer of volumes, with the indexes Node, Label, Pool and Domain.
func Volumes(client *virtfleet.Client, options ...Option) *Informer[*storagev1.Volume] {
	found := storage(client, storagev1.ResourceType_RESOURCE_TYPE_VOLUME, options, (*storagev1.ResourcePut).GetVolume)
	found.objects.addIndex(Pool, func(volume *storagev1.Volume) []string { return []string{parentOf(volume.GetName())} })
	found.objects.addIndex(Domain, func(volume *storagev1.Volume) (values []string) {
		for _, attachment := range volume.GetStatus().GetAttachments() {
			values = append(values, attachment.GetDomain())
		}
		return values
	})
	return found
}

// Pools returns an informer of pools, with the indexes Node and Label.
func Pools(client *virtfleet.Client, options ...Option) *Informer[*storagev1.Pool] {
	return storage(client, storagev1.ResourceType_RESOURCE_TYPE_POOL, options, (*storagev1.ResourcePut).GetPool)
}

// Networks returns an informer of networks, with the indexes Node and Label.
func Networks(client *virtfleet.Client, options ...Option) *Informer[*networkv1.Network] {
	return network(client, networkv1.ResourceType_RESOURCE_TYPE_NETWORK, options, (*networkv1.ResourcePut).GetNetwork)
}

// Ports returns an informer of ports, with the indexes Node, Label, Network, MAC and Address.
func Ports(client *virtfleet.Client, options ...Option) *Informer[*networkv1.Port] {
	found := network(client, networkv1.ResourceType_RESOURCE_TYPE_PORT, options, (*networkv1.ResourcePut).GetPort)
	found.objects.addIndex(Network, func(port *networkv1.Port) []string { return []string{parentOf(port.GetName())} })
	found.objects.addIndex(MAC, func(port *networkv1.Port) []string {
		return present(port.GetSpec().GetMacAddress(), port.GetStatus().GetMacAddress())
	})
	found.objects.addIndex(Address, func(port *networkv1.Port) []string {
		return append(port.GetStatus().GetAddresses(), port.GetSpec().GetAddresses()...)
	})
	return found
}

// Nodes returns an informer of the nodes of the fleet, with the index Label.
func Nodes(client *virtfleet.Client, options ...Option) *Informer[*fleetv1.Node] {
	plan := planned("", options)
	request := &fleetv1.WatchResourcesRequest{
		Parent: plan.parent, Filter: plan.filter, View: plan.view, BookmarkInterval: durationpb.New(quiet),
		ResourceTypes: []fleetv1.ResourceType{fleetv1.ResourceType_RESOURCE_TYPE_NODE},
	}
	return newInformer(plan, func(ctx context.Context, options ...virtfleet.FollowOption) iter.Seq2[*news[*fleetv1.Node], error] {
		return read(client.FleetWatch.FollowResources(ctx, request, options...), func(change *fleetv1.Change) *fleetv1.Node {
			return change.GetPut().GetNode()
		})
	})
}

func storage[T Resource](
	client *virtfleet.Client, kind storagev1.ResourceType, options []Option, get func(*storagev1.ResourcePut) T,
) *Informer[T] {
	plan := planned("nodes/-", options)
	request := &storagev1.WatchResourcesRequest{
		Parent: plan.parent, Filter: plan.filter, View: plan.view, BookmarkInterval: durationpb.New(quiet),
		ResourceTypes: []storagev1.ResourceType{kind},
	}
	found := newInformer(plan, func(ctx context.Context, options ...virtfleet.FollowOption) iter.Seq2[*news[T], error] {
		return read(client.StorageWatch.FollowResources(ctx, request, options...), func(change *storagev1.Change) T {
			return get(change.GetPut())
		})
	})
	found.objects.addIndex(Node, byNode[T])
	return found
}

func network[T Resource](
	client *virtfleet.Client, kind networkv1.ResourceType, options []Option, get func(*networkv1.ResourcePut) T,
) *Informer[T] {
	plan := planned("nodes/-", options)
	request := &networkv1.WatchResourcesRequest{
		Parent: plan.parent, Filter: plan.filter, View: plan.view, BookmarkInterval: durationpb.New(quiet),
		ResourceTypes: []networkv1.ResourceType{kind},
	}
	found := newInformer(plan, func(ctx context.Context, options ...virtfleet.FollowOption) iter.Seq2[*news[T], error] {
		return read(client.NetworkWatch.FollowResources(ctx, request, options...), func(change *networkv1.Change) T {
			return get(change.GetPut())
		})
	})
	found.objects.addIndex(Node, byNode[T])
	return found
}

// What the watches of all packages have in common.

type news[T Resource] struct {
	changes     []change[T]
	snapshotEnd bool
	source      *typev1.WatchSourceStatus
}

type change[T Resource] struct {
	isPut    bool
	put      T
	deleted  *typev1.ResourceDelete
	movedOut *typev1.ResourceMovedOut
	movedIn  *typev1.ResourceMovedIn
	moved    *typev1.ResourceMoved
}

type watchAnswer[C any] interface {
	virtfleet.WatchAnswer
	GetChanges() []C
	GetSourceStatus() *typev1.WatchSourceStatus
}

type watchChange interface {
	GetDelete() *typev1.ResourceDelete
	GetMovedOut() *typev1.ResourceMovedOut
	GetMovedIn() *typev1.ResourceMovedIn
	GetMoved() *typev1.ResourceMoved
}

func read[T Resource, C watchChange, Answer watchAnswer[C]](answers iter.Seq2[Answer, error], put func(C) T) iter.Seq2[*news[T], error] {
	return func(yield func(*news[T], error) bool) {
		for answer, err := range answers {
			if err != nil {
				yield(nil, err)
				return
			}
			told := &news[T]{snapshotEnd: answer.GetSnapshotEnd() != nil, source: answer.GetSourceStatus()}
			for _, one := range answer.GetChanges() {
				resource := put(one)
				found := change[T]{
					isPut: resource != *new(T), put: resource, deleted: one.GetDelete(),
					movedOut: one.GetMovedOut(), movedIn: one.GetMovedIn(), moved: one.GetMoved(),
				}
				if found.isPut || found.deleted != nil || found.movedOut != nil || found.movedIn != nil || found.moved != nil {
					told.changes = append(told.changes, found) // the rest are events and other kinds
				}
			}
			if !yield(told, nil) {
				return
			}
		}
	}
}

// Values of indexes.

func byNode[T Resource](resource T) []string { return []string{nodeOf(resource.GetName())} }

func byLabel[T Resource](resource T) []string {
	labels := resource.GetLabels()
	values := make([]string, 0, len(labels))
	for key, value := range labels {
		values = append(values, key+"="+value)
	}
	return values
}

func volumesOf(domain *computev1.Domain) (values []string) {
	for _, disk := range domain.GetSpec().GetDisks() {
		if volume := disk.GetVolume(); strings.HasPrefix(volume, "nodes/") {
			values = append(values, volume)
		} else if volume != "" {
			values = append(values, nodeOf(domain.GetName())+"/"+volume)
		}
	}
	return values
}

func macsOf(domain *computev1.Domain) (values []string) {
	for _, card := range domain.GetSpec().GetInterfaces() {
		values = append(values, present(card.GetMacAddress())...)
	}
	for _, card := range domain.GetStatus().GetResolvedSpec().GetInterfaces() {
		values = append(values, present(card.GetMacAddress())...)
	}
	for _, card := range domain.GetStatus().GetInterfaces() {
		values = append(values, present(card.GetMacAddress())...)
	}
	return values
}

func present(texts ...string) (found []string) {
	for _, text := range texts {
		if text != "" {
			found = append(found, text)
		}
	}
	return found
}

// nodeOf returns the node of a name: nodes/n1 of nodes/n1/domains/web.
func nodeOf(name string) string {
	if first := strings.IndexByte(name, '/'); first >= 0 {
		if second := strings.IndexByte(name[first+1:], '/'); second >= 0 {
			return name[:first+1+second]
		}
	}
	return name
}

// parentOf returns the name without its last two segments.
func parentOf(name string) string {
	for range 2 {
		name = name[:max(strings.LastIndexByte(name, '/'), 0)]
	}
	return name
}

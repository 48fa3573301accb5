// Code generated from the protos by tools/go_services.py. DO NOT EDIT.

package virtfleet

import (
	"context"
	"iter"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	commonv1 "virtfleet.dev/go/common/v1"
	computev1 "virtfleet.dev/go/compute/v1"
	fleetv1 "virtfleet.dev/go/fleet/v1"
	networkv1 "virtfleet.dev/go/network/v1"
	storagev1 "virtfleet.dev/go/storage/v1"
)

// Services holds one client for each service of the API, all on one connection.
type Services struct {
	// Access is virtfleet.common.v1.AccessService.
	Access AccessService
	// Capabilities is virtfleet.compute.v1.CapabilityService.
	Capabilities CapabilityService
	// ComputeWatch is virtfleet.compute.v1.WatchService.
	ComputeWatch ComputeWatchService
	// Consoles is virtfleet.compute.v1.ConsoleService.
	Consoles ConsoleService
	// Domains is virtfleet.compute.v1.DomainService.
	Domains DomainService
	// Enrollment is virtfleet.fleet.v1.EnrollmentService.
	Enrollment EnrollmentService
	// FleetWatch is virtfleet.fleet.v1.WatchService.
	FleetWatch FleetWatchService
	// GuestAgents is virtfleet.compute.v1.GuestAgentService.
	GuestAgents GuestAgentService
	// Hosts is virtfleet.compute.v1.HostService.
	Hosts HostService
	// NetworkWatch is virtfleet.network.v1.WatchService.
	NetworkWatch NetworkWatchService
	// Networks is virtfleet.network.v1.NetworkService.
	Networks NetworkService
	// Nodes is virtfleet.fleet.v1.NodeService.
	Nodes NodeService
	// OperationWatches is virtfleet.common.v1.OperationService.
	OperationWatches OperationService
	// Pools is virtfleet.storage.v1.PoolService.
	Pools PoolService
	// Ports is virtfleet.network.v1.PortService.
	Ports PortService
	// Servers is virtfleet.common.v1.AdminService.
	Servers AdminService
	// Stats is virtfleet.compute.v1.StatsService.
	Stats StatsService
	// StorageWatch is virtfleet.storage.v1.WatchService.
	StorageWatch StorageWatchService
	// Volumes is virtfleet.storage.v1.VolumeService.
	Volumes VolumeService
	// Operations is google.longrunning.Operations. Operation is what most programs want instead.
	Operations longrunningpb.OperationsClient
}

func newServices(c *Client) Services {
	return Services{
		Access:           AccessService{AccessServiceClient: commonv1.NewAccessServiceClient(c.conn), client: c},
		Capabilities:     CapabilityService{CapabilityServiceClient: computev1.NewCapabilityServiceClient(c.conn), client: c},
		ComputeWatch:     ComputeWatchService{WatchServiceClient: computev1.NewWatchServiceClient(c.conn), client: c},
		Consoles:         ConsoleService{ConsoleServiceClient: computev1.NewConsoleServiceClient(c.conn), client: c},
		Domains:          DomainService{DomainServiceClient: computev1.NewDomainServiceClient(c.conn), client: c},
		Enrollment:       EnrollmentService{EnrollmentServiceClient: fleetv1.NewEnrollmentServiceClient(c.conn), client: c},
		FleetWatch:       FleetWatchService{WatchServiceClient: fleetv1.NewWatchServiceClient(c.conn), client: c},
		GuestAgents:      GuestAgentService{GuestAgentServiceClient: computev1.NewGuestAgentServiceClient(c.conn), client: c},
		Hosts:            HostService{HostServiceClient: computev1.NewHostServiceClient(c.conn), client: c},
		NetworkWatch:     NetworkWatchService{WatchServiceClient: networkv1.NewWatchServiceClient(c.conn), client: c},
		Networks:         NetworkService{NetworkServiceClient: networkv1.NewNetworkServiceClient(c.conn), client: c},
		Nodes:            NodeService{NodeServiceClient: fleetv1.NewNodeServiceClient(c.conn), client: c},
		OperationWatches: OperationService{OperationServiceClient: commonv1.NewOperationServiceClient(c.conn), client: c},
		Pools:            PoolService{PoolServiceClient: storagev1.NewPoolServiceClient(c.conn), client: c},
		Ports:            PortService{PortServiceClient: networkv1.NewPortServiceClient(c.conn), client: c},
		Servers:          AdminService{AdminServiceClient: commonv1.NewAdminServiceClient(c.conn), client: c},
		Stats:            StatsService{StatsServiceClient: computev1.NewStatsServiceClient(c.conn), client: c},
		StorageWatch:     StorageWatchService{WatchServiceClient: storagev1.NewWatchServiceClient(c.conn), client: c},
		Volumes:          VolumeService{VolumeServiceClient: storagev1.NewVolumeServiceClient(c.conn), client: c},
		Operations:       longrunningpb.NewOperationsClient(c.conn),
	}
}

// AccessService is virtfleet.common.v1.AccessService. Tells callers who they are.
type AccessService struct {
	commonv1.AccessServiceClient
	client *Client
}

// CapabilityService is virtfleet.compute.v1.CapabilityService. Tells what the drivers of a node can do.
type CapabilityService struct {
	computev1.CapabilityServiceClient
	client *Client
}

// AllDrivers yields every item of ListDrivers, page by page; request.PageToken is where it begins.
// The first error is the last that is yielded. The request stays as it is.
func (s CapabilityService) AllDrivers(ctx context.Context, request *computev1.ListDriversRequest, options ...grpc.CallOption) iter.Seq2[*computev1.Driver, error] {
	return pages(ctx, true, s.CapabilityServiceClient.ListDrivers, (*computev1.ListDriversResponse).GetDrivers, request, options...)
}

// ComputeWatchService is virtfleet.compute.v1.WatchService. Tells what changes in the compute service of a node, or of all nodes.
type ComputeWatchService struct {
	computev1.WatchServiceClient
	client *Client
}

// FollowResources yields the answers of WatchResources for ever, resuming by token over every break. See [Follow].
func (s ComputeWatchService) FollowResources(
	ctx context.Context, request *computev1.WatchResourcesRequest, options ...FollowOption,
) iter.Seq2[*computev1.WatchResourcesResponse, error] {
	return Follow(ctx, s.WatchServiceClient.WatchResources, request, options...)
}

// AllEvents yields every item of ListEvents, page by page; request.PageToken is where it begins.
// The first error is the last that is yielded. The request stays as it is.
func (s ComputeWatchService) AllEvents(ctx context.Context, request *computev1.ListEventsRequest, options ...grpc.CallOption) iter.Seq2[*computev1.Event, error] {
	return pages(ctx, true, s.WatchServiceClient.ListEvents, (*computev1.ListEventsResponse).GetEvents, request, options...)
}

// ConsoleService is virtfleet.compute.v1.ConsoleService. Reads and writes serial and console ports. An offset counts the bytes that a port has put out in one epoch; a new epoch begins with each start of
// the guest, and when the keeper of its history was lost. The history is bounded: what is no longer held is told as a gap, never left out in silence.
type ConsoleService struct {
	computev1.ConsoleServiceClient
	client *Client
}

// DomainService is virtfleet.compute.v1.DomainService. Defines, changes, starts and stops domains. A domain is one guest: a virtual machine or a system container.
// All methods: NAME_MALFORMED, RESOURCE_NOT_FOUND, PERMISSION_MISSING. Mutations: UNKNOWN_FIELD, REQUEST_ID_REUSED, ETAG_MISMATCH, UID_MISMATCH, and
// OPERATION_CONFLICT (metadata `operation`) while another operation on the same domain runs. A driver that lacks a feature: CAPABILITY_MISSING.
type DomainService struct {
	computev1.DomainServiceClient
	client *Client
}

// AllDomains yields every item of ListDomains, page by page; request.PageToken is where it begins.
// The first error is the last that is yielded. The request stays as it is.
func (s DomainService) AllDomains(ctx context.Context, request *computev1.ListDomainsRequest, options ...grpc.CallOption) iter.Seq2[*computev1.Domain, error] {
	return pages(ctx, true, s.DomainServiceClient.ListDomains, (*computev1.ListDomainsResponse).GetDomains, request, options...)
}

// CreateDomain: Defines a domain, makes new volumes for it, and starts it if asked to. A failure undoes all of it, in reverse order; the operation keeps target and reason.
// RESOURCE_EXISTS · IDENTITY_IN_USE (MAC taken) · FIELD_OUT_OF_RANGE, FIELD_CONFLICT, FIELD_REQUIRED (spec) · REFERENCE_OTHER_NODE · DRIVER_BROKEN · what StartDomain says.
func (s DomainService) CreateDomain(ctx context.Context, request *computev1.CreateDomainRequest, options ...grpc.CallOption) (*Operation[*computev1.Domain], error) {
	operation, err := s.DomainServiceClient.CreateDomain(ctx, request, options...)
	return started[*computev1.Domain](s.client, operation, err)
}

// UpdateDomain: Changes a definition, and by `scope` the running guest. Succeeds without a new generation if nothing changes.
// What cannot go live is told in `status.pending_changes`, or refused with NOT_LIVE_UPDATABLE (scopes LIVE and LIVE_AND_CONFIG) · MASK_PATH_UNKNOWN · FIELD_CONFLICT (immutable) · WRONG_STATE (LIVE on a stopped one).
func (s DomainService) UpdateDomain(ctx context.Context, request *computev1.UpdateDomainRequest, options ...grpc.CallOption) (*Operation[*computev1.Domain], error) {
	operation, err := s.DomainServiceClient.UpdateDomain(ctx, request, options...)
	return started[*computev1.Domain](s.client, operation, err)
}

// DeleteDomain: Deletes a definition. Its volumes stay unless asked for. Succeeds with `allow_missing` if there is none.
// WRONG_STATE (it is active and `stop` is not set) · DELETION_PROTECTED.
func (s DomainService) DeleteDomain(ctx context.Context, request *computev1.DeleteDomainRequest, options ...grpc.CallOption) (*Operation[*emptypb.Empty], error) {
	operation, err := s.DomainServiceClient.DeleteDomain(ctx, request, options...)
	return started[*emptypb.Empty](s.client, operation, err)
}

// StartDomain: Starts a domain. Succeeds if it already runs (paused too), without any effect.
// NODE_MEMORY_SHORT · BACKING_MISSING · RESOURCE_IN_USE (disk or port held) · WRONG_STATE (it shuts down or is UNKNOWN; a pool or network is stopped) · FIELD_CONFLICT (a disk's `format`
// is not that of its volume) · HYPERVISOR_FAILED · DRIVER_BROKEN · BACKEND_UNREACHABLE (storage or network service away).
func (s DomainService) StartDomain(ctx context.Context, request *computev1.StartDomainRequest, options ...grpc.CallOption) (*Operation[*computev1.Domain], error) {
	operation, err := s.DomainServiceClient.StartDomain(ctx, request, options...)
	return started[*computev1.Domain](s.client, operation, err)
}

// StopDomain: Stops a domain. Succeeds if it is stopped. A transient one vanishes.
// GUEST_DID_NOT_COMPLY (GRACEFUL, and the guest still runs).
func (s DomainService) StopDomain(ctx context.Context, request *computev1.StopDomainRequest, options ...grpc.CallOption) (*Operation[*computev1.Domain], error) {
	operation, err := s.DomainServiceClient.StopDomain(ctx, request, options...)
	return started[*computev1.Domain](s.client, operation, err)
}

// RebootDomain: Asks the guest to boot again. Each call asks once more.
// WRONG_STATE (not RUNNING or BLOCKED) · GUEST_DID_NOT_COMPLY (with `grace_period`: it has not booted by then).
func (s DomainService) RebootDomain(ctx context.Context, request *computev1.RebootDomainRequest, options ...grpc.CallOption) (*Operation[*computev1.Domain], error) {
	operation, err := s.DomainServiceClient.RebootDomain(ctx, request, options...)
	return started[*computev1.Domain](s.client, operation, err)
}

// ResetDomain: Resets the guest like the button on its case, without asking it. Each call resets once more.
// WRONG_STATE (not active, or UNKNOWN).
func (s DomainService) ResetDomain(ctx context.Context, request *computev1.ResetDomainRequest, options ...grpc.CallOption) (*Operation[*computev1.Domain], error) {
	operation, err := s.DomainServiceClient.ResetDomain(ctx, request, options...)
	return started[*computev1.Domain](s.client, operation, err)
}

// SuspendDomain: Stops the guest's processors; its memory stays. Succeeds if it is paused.
// WRONG_STATE (not RUNNING, BLOCKED or PAUSED).
func (s DomainService) SuspendDomain(ctx context.Context, request *computev1.SuspendDomainRequest, options ...grpc.CallOption) (*Operation[*computev1.Domain], error) {
	operation, err := s.DomainServiceClient.SuspendDomain(ctx, request, options...)
	return started[*computev1.Domain](s.client, operation, err)
}

// ResumeDomain: Lets the guest's processors go on. Succeeds if they do.
// WRONG_STATE (not RUNNING, BLOCKED or PAUSED, or the guest has ended and is kept by `on_exit`).
func (s DomainService) ResumeDomain(ctx context.Context, request *computev1.ResumeDomainRequest, options ...grpc.CallOption) (*Operation[*computev1.Domain], error) {
	operation, err := s.DomainServiceClient.ResumeDomain(ctx, request, options...)
	return started[*computev1.Domain](s.client, operation, err)
}

// BatchCreateDomains: Creates many domains. Not atomic: one result per item, in their order, as CreateDomain would give it.
func (s DomainService) BatchCreateDomains(ctx context.Context, request *computev1.BatchCreateDomainsRequest, options ...grpc.CallOption) (*Operation[*computev1.BatchCreateDomainsResponse], error) {
	operation, err := s.DomainServiceClient.BatchCreateDomains(ctx, request, options...)
	return started[*computev1.BatchCreateDomainsResponse](s.client, operation, err)
}

// BatchStartDomains: Starts many domains. Not atomic: one result per item, in their order, as StartDomain would give it.
func (s DomainService) BatchStartDomains(ctx context.Context, request *computev1.BatchStartDomainsRequest, options ...grpc.CallOption) (*Operation[*computev1.BatchStartDomainsResponse], error) {
	operation, err := s.DomainServiceClient.BatchStartDomains(ctx, request, options...)
	return started[*computev1.BatchStartDomainsResponse](s.client, operation, err)
}

// BatchStopDomains: Stops many domains. Not atomic: one result per item, in their order, as StopDomain would give it.
func (s DomainService) BatchStopDomains(ctx context.Context, request *computev1.BatchStopDomainsRequest, options ...grpc.CallOption) (*Operation[*computev1.BatchStopDomainsResponse], error) {
	operation, err := s.DomainServiceClient.BatchStopDomains(ctx, request, options...)
	return started[*computev1.BatchStopDomainsResponse](s.client, operation, err)
}

// BatchDeleteDomains: Deletes many domains. Not atomic: one result per item, in their order, as DeleteDomain would give it.
func (s DomainService) BatchDeleteDomains(ctx context.Context, request *computev1.BatchDeleteDomainsRequest, options ...grpc.CallOption) (*Operation[*computev1.BatchDeleteDomainsResponse], error) {
	operation, err := s.DomainServiceClient.BatchDeleteDomains(ctx, request, options...)
	return started[*computev1.BatchDeleteDomainsResponse](s.client, operation, err)
}

// EnrollmentService is virtfleet.fleet.v1.EnrollmentService. Brings nodes and people into the fleet and takes them out. Served by gateways only.
//
// How a node joins: an administrator calls CreateJoinToken for one node name and carries the token to the node. The node makes its keys, connects to the
// enrolment port of the gateway, calls GetTrustBundle, checks that the SHA-256 of a CA key in it is the one in its token, and then, trusting that CA alone,
// calls EnrollNode. So neither an impostor of the gateway nor one of the node gets anything. Keys never leave the machine they were made on.
type EnrollmentService struct {
	fleetv1.EnrollmentServiceClient
	client *Client
}

// AllJoinTokens yields every item of ListJoinTokens, page by page; request.PageToken is where it begins.
// The first error is the last that is yielded. The request stays as it is.
func (s EnrollmentService) AllJoinTokens(ctx context.Context, request *fleetv1.ListJoinTokensRequest, options ...grpc.CallOption) iter.Seq2[*fleetv1.JoinToken, error] {
	return pages(ctx, false, s.EnrollmentServiceClient.ListJoinTokens, (*fleetv1.ListJoinTokensResponse).GetJoinTokens, request, options...)
}

// AllCertificates yields every item of ListCertificates, page by page; request.PageToken is where it begins.
// The first error is the last that is yielded. The request stays as it is.
func (s EnrollmentService) AllCertificates(ctx context.Context, request *fleetv1.ListCertificatesRequest, options ...grpc.CallOption) iter.Seq2[*fleetv1.Certificate, error] {
	return pages(ctx, false, s.EnrollmentServiceClient.ListCertificates, (*fleetv1.ListCertificatesResponse).GetCertificates, request, options...)
}

// FleetWatchService is virtfleet.fleet.v1.WatchService. Tells what changes in the fleet itself: its nodes, certificates and join tokens. Served by gateways only.
// What changes on the nodes is told by the WatchService of compute, storage and network with the parent `nodes/-`.
type FleetWatchService struct {
	fleetv1.WatchServiceClient
	client *Client
}

// FollowResources yields the answers of WatchResources for ever, resuming by token over every break. See [Follow].
func (s FleetWatchService) FollowResources(
	ctx context.Context, request *fleetv1.WatchResourcesRequest, options ...FollowOption,
) iter.Seq2[*fleetv1.WatchResourcesResponse, error] {
	return Follow(ctx, s.WatchServiceClient.WatchResources, request, options...)
}

// AllEvents yields every item of ListEvents, page by page; request.PageToken is where it begins.
// The first error is the last that is yielded. The request stays as it is.
func (s FleetWatchService) AllEvents(ctx context.Context, request *fleetv1.ListEventsRequest, options ...grpc.CallOption) iter.Seq2[*fleetv1.Event, error] {
	return pages(ctx, false, s.WatchServiceClient.ListEvents, (*fleetv1.ListEventsResponse).GetEvents, request, options...)
}

// GuestAgentService is virtfleet.compute.v1.GuestAgentService. Tells what is known of the inside of guests.
type GuestAgentService struct {
	computev1.GuestAgentServiceClient
	client *Client
}

// AllGuestAddresses yields every item of ListGuestAddresses, page by page; request.PageToken is where it begins.
// The first error is the last that is yielded. The request stays as it is.
func (s GuestAgentService) AllGuestAddresses(ctx context.Context, request *computev1.ListGuestAddressesRequest, options ...grpc.CallOption) iter.Seq2[*computev1.GuestAddress, error] {
	return pages(ctx, true, s.GuestAgentServiceClient.ListGuestAddresses, (*computev1.ListGuestAddressesResponse).GetAddresses, request, options...)
}

// HostService is virtfleet.compute.v1.HostService. Tells what a node is made of.
type HostService struct {
	computev1.HostServiceClient
	client *Client
}

// NetworkWatchService is virtfleet.network.v1.WatchService. Tells what changes in the network service of a node, or of all nodes.
type NetworkWatchService struct {
	networkv1.WatchServiceClient
	client *Client
}

// FollowResources yields the answers of WatchResources for ever, resuming by token over every break. See [Follow].
func (s NetworkWatchService) FollowResources(
	ctx context.Context, request *networkv1.WatchResourcesRequest, options ...FollowOption,
) iter.Seq2[*networkv1.WatchResourcesResponse, error] {
	return Follow(ctx, s.WatchServiceClient.WatchResources, request, options...)
}

// AllEvents yields every item of ListEvents, page by page; request.PageToken is where it begins.
// The first error is the last that is yielded. The request stays as it is.
func (s NetworkWatchService) AllEvents(ctx context.Context, request *networkv1.ListEventsRequest, options ...grpc.CallOption) iter.Seq2[*networkv1.Event, error] {
	return pages(ctx, true, s.WatchServiceClient.ListEvents, (*networkv1.ListEventsResponse).GetEvents, request, options...)
}

// NetworkService is virtfleet.network.v1.NetworkService. Makes and runs networks.
type NetworkService struct {
	networkv1.NetworkServiceClient
	client *Client
}

// AllNetworks yields every item of ListNetworks, page by page; request.PageToken is where it begins.
// The first error is the last that is yielded. The request stays as it is.
func (s NetworkService) AllNetworks(ctx context.Context, request *networkv1.ListNetworksRequest, options ...grpc.CallOption) iter.Seq2[*networkv1.Network, error] {
	return pages(ctx, true, s.NetworkServiceClient.ListNetworks, (*networkv1.ListNetworksResponse).GetNetworks, request, options...)
}

// CreateNetwork: Defines a network and, if asked, starts it; when the start fails nothing of it stays. With the same request_id: the same operation.
// ALREADY_EXISTS RESOURCE_EXISTS, IDENTITY_IN_USE (uid, bridge name) · FAILED_PRECONDITION SUBNET_OVERLAP · UNIMPLEMENTED CAPABILITY_MISSING ·
// INVALID_ARGUMENT FIELD_REQUIRED, FIELD_OUT_OF_RANGE, FIELD_CONFLICT, NAME_MALFORMED · UNAVAILABLE DRIVER_BROKEN (dnsmasq, nft or a kernel part missing).
func (s NetworkService) CreateNetwork(ctx context.Context, request *networkv1.CreateNetworkRequest, options ...grpc.CallOption) (*Operation[*networkv1.Network], error) {
	operation, err := s.NetworkServiceClient.CreateNetwork(ctx, request, options...)
	return started[*networkv1.Network](s.client, operation, err)
}

// UpdateNetwork: Changes a network. Repeating it changes nothing more. What the running network cannot take live is pending until its next start.
// NOT_FOUND RESOURCE_NOT_FOUND · ABORTED ETAG_MISMATCH, OPERATION_CONFLICT · FAILED_PRECONDITION UID_MISMATCH, SUBNET_OVERLAP, NOT_LIVE_UPDATABLE,
// RESOURCE_IN_USE (a port has an address that would be lost) · INVALID_ARGUMENT MASK_PATH_UNKNOWN and as in CreateNetwork.
func (s NetworkService) UpdateNetwork(ctx context.Context, request *networkv1.UpdateNetworkRequest, options ...grpc.CallOption) (*Operation[*networkv1.Network], error) {
	operation, err := s.NetworkServiceClient.UpdateNetwork(ctx, request, options...)
	return started[*networkv1.Network](s.client, operation, err)
}

// DeleteNetwork: Deletes a network with its leases. FAILED_PRECONDITION WRONG_STATE (it runs; see `force`), HAS_CHILDREN (ports; metadata `holder`),
// UID_MISMATCH ·
// NOT_FOUND RESOURCE_NOT_FOUND (see `allow_missing`) · ABORTED ETAG_MISMATCH, OPERATION_CONFLICT.
func (s NetworkService) DeleteNetwork(ctx context.Context, request *networkv1.DeleteNetworkRequest, options ...grpc.CallOption) (*Operation[*emptypb.Empty], error) {
	operation, err := s.NetworkServiceClient.DeleteNetwork(ctx, request, options...)
	return started[*emptypb.Empty](s.client, operation, err)
}

// StartNetwork: Starts a network: bridge, addresses, rules, DHCP and DNS. Succeeds if it already runs. When it fails the network is inactive as before.
// UNAVAILABLE DRIVER_BROKEN (metadata `cause`) · FAILED_PRECONDITION SUBNET_OVERLAP · ALREADY_EXISTS IDENTITY_IN_USE (bridge name) · INTERNAL BACKEND_FAILED.
func (s NetworkService) StartNetwork(ctx context.Context, request *networkv1.StartNetworkRequest, options ...grpc.CallOption) (*Operation[*networkv1.Network], error) {
	operation, err := s.NetworkServiceClient.StartNetwork(ctx, request, options...)
	return started[*networkv1.Network](s.client, operation, err)
}

// StopNetwork: Stops a network. Succeeds if it does not run. A transient network is deleted. FAILED_PRECONDITION RESOURCE_IN_USE: ports are plugged (see `force`).
func (s NetworkService) StopNetwork(ctx context.Context, request *networkv1.StopNetworkRequest, options ...grpc.CallOption) (*Operation[*networkv1.Network], error) {
	operation, err := s.NetworkServiceClient.StopNetwork(ctx, request, options...)
	return started[*networkv1.Network](s.client, operation, err)
}

// AllLeases yields every item of ListLeases, page by page; request.PageToken is where it begins.
// The first error is the last that is yielded. The request stays as it is.
func (s NetworkService) AllLeases(ctx context.Context, request *networkv1.ListLeasesRequest, options ...grpc.CallOption) iter.Seq2[*networkv1.Lease, error] {
	return pages(ctx, true, s.NetworkServiceClient.ListLeases, (*networkv1.ListLeasesResponse).GetLeases, request, options...)
}

// NodeService is virtfleet.fleet.v1.NodeService. Shows and steers the nodes of a fleet. Served by gateways only. A node comes into being by EnrollNode.
type NodeService struct {
	fleetv1.NodeServiceClient
	client *Client
}

// AllNodes yields every item of ListNodes, page by page; request.PageToken is where it begins.
// The first error is the last that is yielded. The request stays as it is.
func (s NodeService) AllNodes(ctx context.Context, request *fleetv1.ListNodesRequest, options ...grpc.CallOption) iter.Seq2[*fleetv1.Node, error] {
	return pages(ctx, false, s.NodeServiceClient.ListNodes, (*fleetv1.ListNodesResponse).GetNodes, request, options...)
}

// DeleteNode: Removes a node from the fleet: its certificates go on the denial list, its channels are closed, watchers are told LOST. Its guests run on, and its
// local sockets go on answering. The operation's response is the node as it was last.
// NOT_FOUND NODE_UNKNOWN, unless `allow_missing` · ABORTED ETAG_MISMATCH · FAILED_PRECONDITION UID_MISMATCH.
func (s NodeService) DeleteNode(ctx context.Context, request *fleetv1.DeleteNodeRequest, options ...grpc.CallOption) (*Operation[*fleetv1.Node], error) {
	operation, err := s.NodeServiceClient.DeleteNode(ctx, request, options...)
	return started[*fleetv1.Node](s.client, operation, err)
}

// OperationService is virtfleet.common.v1.OperationService. Watches operations. Getting, listing, waiting, cancelling and deleting them is `google.longrunning.Operations`.
type OperationService struct {
	commonv1.OperationServiceClient
	client *Client
}

// FollowOperations yields the answers of WatchOperations for ever, resuming by token over every break. See [Follow].
func (s OperationService) FollowOperations(
	ctx context.Context, request *commonv1.WatchOperationsRequest, options ...FollowOption,
) iter.Seq2[*commonv1.WatchOperationsResponse, error] {
	return Follow(ctx, s.OperationServiceClient.WatchOperations, request, options...)
}

// PoolService is virtfleet.storage.v1.PoolService. Keeps the pools of a node. A pool is a place that volumes come from: a directory today; file systems, volume groups and network storage by
// the same messages later. BuildPool, TeardownPool and FindPoolSources are not built yet.
type PoolService struct {
	storagev1.PoolServiceClient
	client *Client
}

// AllPools yields every item of ListPools, page by page; request.PageToken is where it begins.
// The first error is the last that is yielded. The request stays as it is.
func (s PoolService) AllPools(ctx context.Context, request *storagev1.ListPoolsRequest, options ...grpc.CallOption) iter.Seq2[*storagev1.Pool, error] {
	return pages(ctx, true, s.PoolServiceClient.ListPools, (*storagev1.ListPoolsResponse).GetPools, request, options...)
}

// CreatePool: Defines a pool, makes its place as `build` says, and starts it if `start` is set; volumes that lie there already are found soon after, surely by
// RefreshPool. Undone as a whole on failure. A repetition with the same request_id answers with the same operation. ALREADY_EXISTS RESOURCE_EXISTS, IDENTITY_IN_USE
// (another has that uid, or that directory under whatever path) · FAILED_PRECONDITION BACKING_MISSING (no such directory) · PERMISSION_DENIED PERMISSION_MISSING
// (`hostPaths.use` for a path of the caller's choice) · UNIMPLEMENTED CAPABILITY_MISSING.
func (s PoolService) CreatePool(ctx context.Context, request *storagev1.CreatePoolRequest, options ...grpc.CallOption) (*Operation[*storagev1.Pool], error) {
	operation, err := s.PoolServiceClient.CreatePool(ctx, request, options...)
	return started[*storagev1.Pool](s.client, operation, err)
}

// UpdatePool: Changes display_name, labels, annotations, lifetime or autostart of a pool. Repeatable: the same change twice is one change. ABORTED ETAG_MISMATCH ·
// FAILED_PRECONDITION UID_MISMATCH · INVALID_ARGUMENT MASK_PATH_UNKNOWN, FIELD_CONFLICT (what cannot change after creation).
func (s PoolService) UpdatePool(ctx context.Context, request *storagev1.UpdatePoolRequest, options ...grpc.CallOption) (*Operation[*storagev1.Pool], error) {
	operation, err := s.PoolServiceClient.UpdatePool(ctx, request, options...)
	return started[*storagev1.Pool](s.client, operation, err)
}

// DeletePool: Forgets a pool and its volumes; the files stay. Needs no stop first. Succeeds for a pool that is gone if `allow_missing` is set.
// FAILED_PRECONDITION RESOURCE_IN_USE (a volume is attached or backs one of another pool: metadata `holder`) · ABORTED ETAG_MISMATCH,
// OPERATION_CONFLICT (also while somebody is at work on a volume in it: metadata `holder`).
func (s PoolService) DeletePool(ctx context.Context, request *storagev1.DeletePoolRequest, options ...grpc.CallOption) (*Operation[*emptypb.Empty], error) {
	operation, err := s.PoolServiceClient.DeletePool(ctx, request, options...)
	return started[*emptypb.Empty](s.client, operation, err)
}

// StartPool: Makes a pool ready and finds its volumes. Succeeds if it runs already. FAILED_PRECONDITION BACKING_MISSING (the place is gone) · ABORTED OPERATION_CONFLICT.
func (s PoolService) StartPool(ctx context.Context, request *storagev1.StartPoolRequest, options ...grpc.CallOption) (*Operation[*storagev1.Pool], error) {
	operation, err := s.PoolServiceClient.StartPool(ctx, request, options...)
	return started[*storagev1.Pool](s.client, operation, err)
}

// StopPool: Stops the use of a pool; its volumes stay known. Succeeds if it is stopped already. A transient pool is forgotten.
// FAILED_PRECONDITION RESOURCE_IN_USE (a volume is attached, or a guest reads it through one of another pool: metadata `holder`) ·
// ABORTED OPERATION_CONFLICT (also while somebody is at work on a volume in it: metadata `holder`).
func (s PoolService) StopPool(ctx context.Context, request *storagev1.StopPoolRequest, options ...grpc.CallOption) (*Operation[*storagev1.Pool], error) {
	operation, err := s.PoolServiceClient.StopPool(ctx, request, options...)
	return started[*storagev1.Pool](s.client, operation, err)
}

// RefreshPool: Compares what is recorded with what is there: files that nobody knows become volumes, files that are gone stop being volumes, sizes are read again.
// The same happens by itself within 10 s of a change. Repeatable. FAILED_PRECONDITION WRONG_STATE (the pool does not run).
func (s PoolService) RefreshPool(ctx context.Context, request *storagev1.RefreshPoolRequest, options ...grpc.CallOption) (*Operation[*storagev1.Pool], error) {
	operation, err := s.PoolServiceClient.RefreshPool(ctx, request, options...)
	return started[*storagev1.Pool](s.client, operation, err)
}

// AllPoolBackends yields every item of ListPoolBackends, page by page; request.PageToken is where it begins.
// The first error is the last that is yielded. The request stays as it is.
func (s PoolService) AllPoolBackends(ctx context.Context, request *storagev1.ListPoolBackendsRequest, options ...grpc.CallOption) iter.Seq2[*storagev1.PoolBackend, error] {
	return pages(ctx, true, s.PoolServiceClient.ListPoolBackends, (*storagev1.ListPoolBackendsResponse).GetPoolBackends, request, options...)
}

// PortService is virtfleet.network.v1.PortService. Makes ports. The links are made for compute by `virtfleet.node.v1.PlugService`.
type PortService struct {
	networkv1.PortServiceClient
	client *Client
}

// AllPorts yields every item of ListPorts, page by page; request.PageToken is where it begins.
// The first error is the last that is yielded. The request stays as it is.
func (s PortService) AllPorts(ctx context.Context, request *networkv1.ListPortsRequest, options ...grpc.CallOption) iter.Seq2[*networkv1.Port, error] {
	return pages(ctx, true, s.PortServiceClient.ListPorts, (*networkv1.ListPortsResponse).GetPorts, request, options...)
}

// CreatePort: Reserves MAC, addresses and policy; makes no link. With the same request_id: the same operation.
// NOT_FOUND RESOURCE_NOT_FOUND (network) · ALREADY_EXISTS RESOURCE_EXISTS, IDENTITY_IN_USE (MAC, address or uid; metadata `holder`) ·
// RESOURCE_EXHAUSTED ADDRESSES_EXHAUSTED · INVALID_ARGUMENT FIELD_OUT_OF_RANGE (address outside of the subnets) · UNIMPLEMENTED CAPABILITY_MISSING.
func (s PortService) CreatePort(ctx context.Context, request *networkv1.CreatePortRequest, options ...grpc.CallOption) (*Operation[*networkv1.Port], error) {
	operation, err := s.PortServiceClient.CreatePort(ctx, request, options...)
	return started[*networkv1.Port](s.client, operation, err)
}

// DeletePort: Deletes a port. FAILED_PRECONDITION RESOURCE_IN_USE (plugged, or owned by a domain; metadata `holder`), UID_MISMATCH ·
// NOT_FOUND RESOURCE_NOT_FOUND (see `allow_missing`) · ABORTED ETAG_MISMATCH, OPERATION_CONFLICT.
func (s PortService) DeletePort(ctx context.Context, request *networkv1.DeletePortRequest, options ...grpc.CallOption) (*Operation[*emptypb.Empty], error) {
	operation, err := s.PortServiceClient.DeletePort(ctx, request, options...)
	return started[*emptypb.Empty](s.client, operation, err)
}

// AdminService is virtfleet.common.v1.AdminService. Shows and steers one server process: a service of a node (`nodes/{node}/services/{service}`) or a gateway (`gateways/{gateway}`).
// An empty name stands for the process that is called.
type AdminService struct {
	commonv1.AdminServiceClient
	client *Client
}

// StatsService is virtfleet.compute.v1.StatsService. Reads counters. Counters stand here and never in a status; they begin at 0 with each run of a domain (`runtime_id` tells runs apart).
type StatsService struct {
	computev1.StatsServiceClient
	client *Client
}

// StorageWatchService is virtfleet.storage.v1.WatchService. Tells what changes in the storage service of a node, or of all nodes.
type StorageWatchService struct {
	storagev1.WatchServiceClient
	client *Client
}

// FollowResources yields the answers of WatchResources for ever, resuming by token over every break. See [Follow].
func (s StorageWatchService) FollowResources(
	ctx context.Context, request *storagev1.WatchResourcesRequest, options ...FollowOption,
) iter.Seq2[*storagev1.WatchResourcesResponse, error] {
	return Follow(ctx, s.WatchServiceClient.WatchResources, request, options...)
}

// AllEvents yields every item of ListEvents, page by page; request.PageToken is where it begins.
// The first error is the last that is yielded. The request stays as it is.
func (s StorageWatchService) AllEvents(ctx context.Context, request *storagev1.ListEventsRequest, options ...grpc.CallOption) iter.Seq2[*storagev1.Event, error] {
	return pages(ctx, true, s.WatchServiceClient.ListEvents, (*storagev1.ListEventsResponse).GetEvents, request, options...)
}

// VolumeService is virtfleet.storage.v1.VolumeService. Keeps the volumes of a node's pools. BatchCreateVolumes, UpdateVolume, ListVolumeExtents and FlattenVolume are not built yet.
type VolumeService struct {
	storagev1.VolumeServiceClient
	client *Client
}

// AllVolumes yields every item of ListVolumes, page by page; request.PageToken is where it begins.
// The first error is the last that is yielded. The request stays as it is.
func (s VolumeService) AllVolumes(ctx context.Context, request *storagev1.ListVolumesRequest, options ...grpc.CallOption) iter.Seq2[*storagev1.Volume, error] {
	return pages(ctx, true, s.VolumeServiceClient.ListVolumes, (*storagev1.ListVolumesResponse).GetVolumes, request, options...)
}

// CreateVolume: Makes a volume: empty, on top of another (`spec.backing`), or as a copy of another (`source_volume`). Until it is whole it cannot be seen; a failure, a cancel or a
// crash leaves nothing. A repetition with the same request_id answers with the same operation. ALREADY_EXISTS RESOURCE_EXISTS, IDENTITY_IN_USE (uid) · FAILED_PRECONDITION WOULD_OVERWRITE (a
// file of that name is there), WRONG_STATE (pool or source not ready, or READ_ONLY), BACKING_MISSING, RESOURCE_IN_USE (the source is being written) ·
// RESOURCE_EXHAUSTED POOL_FULL · UNAVAILABLE DRIVER_BROKEN (qcow2, and qemu-img is missing) ·
// INVALID_ARGUMENT FIELD_CONFLICT, FIELD_OUT_OF_RANGE, REFERENCE_OTHER_NODE.
func (s VolumeService) CreateVolume(ctx context.Context, request *storagev1.CreateVolumeRequest, options ...grpc.CallOption) (*Operation[*storagev1.Volume], error) {
	operation, err := s.VolumeServiceClient.CreateVolume(ctx, request, options...)
	return started[*storagev1.Volume](s.client, operation, err)
}

// DeleteVolume: Deletes a volume with its data. FAILED_PRECONDITION RESOURCE_IN_USE (attached: metadata `holder`), HAS_CHILDREN (it backs another volume: metadata `holder`),
// WRONG_STATE (pool not running) · ABORTED ETAG_MISMATCH, OPERATION_CONFLICT.
func (s VolumeService) DeleteVolume(ctx context.Context, request *storagev1.DeleteVolumeRequest, options ...grpc.CallOption) (*Operation[*emptypb.Empty], error) {
	operation, err := s.VolumeServiceClient.DeleteVolume(ctx, request, options...)
	return started[*emptypb.Empty](s.client, operation, err)
}

// ResizeVolume: Changes the size of a volume that nobody holds. Repeatable: succeeds if it has that size. FAILED_PRECONDITION RESOURCE_IN_USE, HAS_CHILDREN (shrinking what backs
// another volume) · INVALID_ARGUMENT FIELD_CONFLICT (smaller without `allow_shrink`) · RESOURCE_EXHAUSTED POOL_FULL.
func (s VolumeService) ResizeVolume(ctx context.Context, request *storagev1.ResizeVolumeRequest, options ...grpc.CallOption) (*Operation[*storagev1.Volume], error) {
	operation, err := s.VolumeServiceClient.ResizeVolume(ctx, request, options...)
	return started[*storagev1.Volume](s.client, operation, err)
}

// WipeVolume: Overwrites what a volume holds. Afterwards it reads as zeros; one on top of another shows the other again. Can be cancelled, and what is overwritten by then is gone;
// until it is wiped again the condition `WipeIncomplete` says so, and an image is refused to guests (IMAGE_CORRUPT).
// FAILED_PRECONDITION RESOURCE_IN_USE, HAS_CHILDREN · UNIMPLEMENTED CAPABILITY_MISSING (an algorithm other than ZERO).
func (s VolumeService) WipeVolume(ctx context.Context, request *storagev1.WipeVolumeRequest, options ...grpc.CallOption) (*Operation[*storagev1.Volume], error) {
	operation, err := s.VolumeServiceClient.WipeVolume(ctx, request, options...)
	return started[*storagev1.Volume](s.client, operation, err)
}

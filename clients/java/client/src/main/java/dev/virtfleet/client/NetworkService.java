// Code generated from the protos by tools/java_services.py. DO NOT EDIT.

package dev.virtfleet.client;

import com.google.protobuf.Empty;
import dev.virtfleet.network.v1.CreateNetworkRequest;
import dev.virtfleet.network.v1.DeleteNetworkRequest;
import dev.virtfleet.network.v1.GetNetworkRequest;
import dev.virtfleet.network.v1.Lease;
import dev.virtfleet.network.v1.ListLeasesRequest;
import dev.virtfleet.network.v1.ListLeasesResponse;
import dev.virtfleet.network.v1.ListNetworksRequest;
import dev.virtfleet.network.v1.ListNetworksResponse;
import dev.virtfleet.network.v1.Network;
import dev.virtfleet.network.v1.NetworkServiceGrpc;
import dev.virtfleet.network.v1.StartNetworkRequest;
import dev.virtfleet.network.v1.StopNetworkRequest;
import dev.virtfleet.network.v1.UpdateNetworkRequest;
import io.grpc.CallOptions;
import io.grpc.Channel;

/**
 * Calls {@code virtfleet.network.v1.NetworkService}. Makes and runs networks. Threads may share it. What narrows a call
 * ({@code withDeadlineAfter} and so on) returns a copy. No argument and no result is null.
 */
public final class NetworkService extends FleetService<NetworkService> {

    NetworkService(VirtfleetClient client, Channel channel, CallOptions options) {
        super(client, channel, options);
    }

    @Override
    protected NetworkService build(Channel channel, CallOptions options) {
        return new NetworkService(client(), channel, options);
    }

    /** {@return the generated stub whose calls return futures} */
    public NetworkServiceGrpc.NetworkServiceFutureStub futureStub() {
        return NetworkServiceGrpc.newFutureStub(getChannel());
    }

    /** {@return the generated stub whose calls are told to observers: for streams of requests} */
    public NetworkServiceGrpc.NetworkServiceStub asyncStub() {
        return NetworkServiceGrpc.newStub(getChannel());
    }

    /**
     * Lists networks in the order of their names. INVALID_ARGUMENT PAGE_TOKEN_INVALID, FILTER_SYNTAX.
     *
     * @param request what is asked for; it stays as it is
     * @return every item, page by page as they are read
     */
    public Pages<Network> listNetworks(ListNetworksRequest request) {
        return pages(NetworkServiceGrpc.getListNetworksMethod(), request, ListNetworksResponse::getNetworksList, true);
    }

    /**
     * Asks for one page. Lists networks in the order of their names. INVALID_ARGUMENT PAGE_TOKEN_INVALID, FILTER_SYNTAX.
     *
     * @param request what is asked for; it stays as it is
     * @return the page
     * @throws VirtfleetException the call failed
     */
    public ListNetworksResponse listNetworksPage(ListNetworksRequest request) {
        return call(NetworkServiceGrpc.getListNetworksMethod(), request);
    }

    /**
     * Gets a network by name, or by uid as the last segment. NOT_FOUND RESOURCE_NOT_FOUND.
     *
     * @param request what is asked for; it stays as it is
     * @return the answer
     * @throws VirtfleetException the call failed
     */
    public Network getNetwork(GetNetworkRequest request) {
        return call(NetworkServiceGrpc.getGetNetworkMethod(), request);
    }

    /**
     * Defines a network and, if asked, starts it; when the start fails nothing of it stays. With the same request_id:
     * the same operation.
     *
     * <p>ALREADY_EXISTS RESOURCE_EXISTS, IDENTITY_IN_USE (uid, bridge name) · FAILED_PRECONDITION SUBNET_OVERLAP ·
     * UNIMPLEMENTED CAPABILITY_MISSING · INVALID_ARGUMENT FIELD_REQUIRED, FIELD_OUT_OF_RANGE, FIELD_CONFLICT,
     * NAME_MALFORMED · UNAVAILABLE DRIVER_BROKEN (dnsmasq, nft or a kernel part missing).
     *
     * @param request what is asked for; it stays as it is
     * @return the work that has been started
     * @throws VirtfleetException the call failed
     */
    public Operation<Network> createNetwork(CreateNetworkRequest request) {
        return start(NetworkServiceGrpc.getCreateNetworkMethod(), request, Network.class);
    }

    /**
     * Changes a network. Repeating it changes nothing more. What the running network cannot take live is pending until
     * its next start.
     *
     * <p>NOT_FOUND RESOURCE_NOT_FOUND · ABORTED ETAG_MISMATCH, OPERATION_CONFLICT · FAILED_PRECONDITION UID_MISMATCH,
     * SUBNET_OVERLAP, NOT_LIVE_UPDATABLE, RESOURCE_IN_USE (a port has an address that would be lost) · INVALID_ARGUMENT
     * MASK_PATH_UNKNOWN and as in CreateNetwork.
     *
     * @param request what is asked for; it stays as it is
     * @return the work that has been started
     * @throws VirtfleetException the call failed
     */
    public Operation<Network> updateNetwork(UpdateNetworkRequest request) {
        return start(NetworkServiceGrpc.getUpdateNetworkMethod(), request, Network.class);
    }

    /**
     * Deletes a network with its leases. FAILED_PRECONDITION WRONG_STATE (it runs; see {@code force}), HAS_CHILDREN
     * (ports; metadata {@code holder}), UID_MISMATCH · NOT_FOUND RESOURCE_NOT_FOUND (see {@code allow_missing}) ·
     * ABORTED ETAG_MISMATCH, OPERATION_CONFLICT.
     *
     * @param request what is asked for; it stays as it is
     * @return the work that has been started
     * @throws VirtfleetException the call failed
     */
    public Operation<Empty> deleteNetwork(DeleteNetworkRequest request) {
        return start(NetworkServiceGrpc.getDeleteNetworkMethod(), request, Empty.class);
    }

    /**
     * Starts a network: bridge, addresses, rules, DHCP and DNS. Succeeds if it already runs. When it fails the network
     * is inactive as before. UNAVAILABLE DRIVER_BROKEN (metadata {@code cause}) · FAILED_PRECONDITION SUBNET_OVERLAP ·
     * ALREADY_EXISTS IDENTITY_IN_USE (bridge name) · INTERNAL BACKEND_FAILED.
     *
     * @param request what is asked for; it stays as it is
     * @return the work that has been started
     * @throws VirtfleetException the call failed
     */
    public Operation<Network> startNetwork(StartNetworkRequest request) {
        return start(NetworkServiceGrpc.getStartNetworkMethod(), request, Network.class);
    }

    /**
     * Stops a network. Succeeds if it does not run. A transient network is deleted. FAILED_PRECONDITION RESOURCE_IN_USE:
     * ports are plugged (see {@code force}).
     *
     * @param request what is asked for; it stays as it is
     * @return the work that has been started
     * @throws VirtfleetException the call failed
     */
    public Operation<Network> stopNetwork(StopNetworkRequest request) {
        return start(NetworkServiceGrpc.getStopNetworkMethod(), request, Network.class);
    }

    /**
     * Lists the leases that DHCP has given out and that have not expired. NOT_FOUND RESOURCE_NOT_FOUND (network).
     *
     * @param request what is asked for; it stays as it is
     * @return every item, page by page as they are read
     */
    public Pages<Lease> listLeases(ListLeasesRequest request) {
        return pages(NetworkServiceGrpc.getListLeasesMethod(), request, ListLeasesResponse::getLeasesList, true);
    }

    /**
     * Asks for one page. Lists the leases that DHCP has given out and that have not expired. NOT_FOUND
     * RESOURCE_NOT_FOUND (network).
     *
     * @param request what is asked for; it stays as it is
     * @return the page
     * @throws VirtfleetException the call failed
     */
    public ListLeasesResponse listLeasesPage(ListLeasesRequest request) {
        return call(NetworkServiceGrpc.getListLeasesMethod(), request);
    }
}

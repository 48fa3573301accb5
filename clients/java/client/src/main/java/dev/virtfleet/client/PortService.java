// Code generated from the protos by tools/java_services.py. DO NOT EDIT.

package dev.virtfleet.client;

import com.google.protobuf.Empty;
import dev.virtfleet.network.v1.CreatePortRequest;
import dev.virtfleet.network.v1.DeletePortRequest;
import dev.virtfleet.network.v1.GetPortRequest;
import dev.virtfleet.network.v1.ListPortsRequest;
import dev.virtfleet.network.v1.ListPortsResponse;
import dev.virtfleet.network.v1.Port;
import dev.virtfleet.network.v1.PortServiceGrpc;
import io.grpc.CallOptions;
import io.grpc.Channel;

/**
 * Calls {@code virtfleet.network.v1.PortService}. Makes ports. The links are made for compute by {@code
 * virtfleet.node.v1.PlugService}. Threads may share it. What narrows a call ({@code withDeadlineAfter} and so on)
 * returns a copy. No argument and no result is null.
 */
public final class PortService extends FleetService<PortService> {

    PortService(VirtfleetClient client, Channel channel, CallOptions options) {
        super(client, channel, options);
    }

    @Override
    protected PortService build(Channel channel, CallOptions options) {
        return new PortService(client(), channel, options);
    }

    /** {@return the generated stub whose calls return futures} */
    public PortServiceGrpc.PortServiceFutureStub futureStub() {
        return PortServiceGrpc.newFutureStub(getChannel());
    }

    /** {@return the generated stub whose calls are told to observers: for streams of requests} */
    public PortServiceGrpc.PortServiceStub asyncStub() {
        return PortServiceGrpc.newStub(getChannel());
    }

    /**
     * Lists ports in the order of their names. NOT_FOUND RESOURCE_NOT_FOUND (network) · INVALID_ARGUMENT
     * PAGE_TOKEN_INVALID, FILTER_SYNTAX.
     *
     * @param request what is asked for; it stays as it is
     * @return every item, page by page as they are read
     */
    public Pages<Port> listPorts(ListPortsRequest request) {
        return pages(PortServiceGrpc.getListPortsMethod(), request, ListPortsResponse::getPortsList, true);
    }

    /**
     * Asks for one page. Lists ports in the order of their names. NOT_FOUND RESOURCE_NOT_FOUND (network) ·
     * INVALID_ARGUMENT PAGE_TOKEN_INVALID, FILTER_SYNTAX.
     *
     * @param request what is asked for; it stays as it is
     * @return the page
     * @throws VirtfleetException the call failed
     */
    public ListPortsResponse listPortsPage(ListPortsRequest request) {
        return call(PortServiceGrpc.getListPortsMethod(), request);
    }

    /**
     * Gets a port by name, or by uid as the last segment. NOT_FOUND RESOURCE_NOT_FOUND.
     *
     * @param request what is asked for; it stays as it is
     * @return the answer
     * @throws VirtfleetException the call failed
     */
    public Port getPort(GetPortRequest request) {
        return call(PortServiceGrpc.getGetPortMethod(), request);
    }

    /**
     * Reserves MAC, addresses and policy; makes no link. With the same request_id: the same operation.
     *
     * <p>NOT_FOUND RESOURCE_NOT_FOUND (network) · ALREADY_EXISTS RESOURCE_EXISTS, IDENTITY_IN_USE (MAC, address or uid;
     * metadata {@code holder}) · RESOURCE_EXHAUSTED ADDRESSES_EXHAUSTED · INVALID_ARGUMENT FIELD_OUT_OF_RANGE (address
     * outside of the subnets) · UNIMPLEMENTED CAPABILITY_MISSING.
     *
     * @param request what is asked for; it stays as it is
     * @return the work that has been started
     * @throws VirtfleetException the call failed
     */
    public Operation<Port> createPort(CreatePortRequest request) {
        return start(PortServiceGrpc.getCreatePortMethod(), request, Port.class);
    }

    /**
     * Deletes a port. FAILED_PRECONDITION RESOURCE_IN_USE (plugged, or owned by a domain; metadata {@code holder}),
     * UID_MISMATCH · NOT_FOUND RESOURCE_NOT_FOUND (see {@code allow_missing}) · ABORTED ETAG_MISMATCH,
     * OPERATION_CONFLICT.
     *
     * @param request what is asked for; it stays as it is
     * @return the work that has been started
     * @throws VirtfleetException the call failed
     */
    public Operation<Empty> deletePort(DeletePortRequest request) {
        return start(PortServiceGrpc.getDeletePortMethod(), request, Empty.class);
    }
}

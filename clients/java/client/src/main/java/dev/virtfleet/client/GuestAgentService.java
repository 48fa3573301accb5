// Code generated from the protos by tools/java_services.py. DO NOT EDIT.

package dev.virtfleet.client;

import dev.virtfleet.compute.v1.GuestAddress;
import dev.virtfleet.compute.v1.GuestAgentServiceGrpc;
import dev.virtfleet.compute.v1.ListGuestAddressesRequest;
import dev.virtfleet.compute.v1.ListGuestAddressesResponse;
import io.grpc.CallOptions;
import io.grpc.Channel;

/**
 * Calls {@code virtfleet.compute.v1.GuestAgentService}. Tells what is known of the inside of guests. Threads may share
 * it. What narrows a call ({@code withDeadlineAfter} and so on) returns a copy. No argument and no result is null.
 */
public final class GuestAgentService extends FleetService<GuestAgentService> {

    GuestAgentService(VirtfleetClient client, Channel channel, CallOptions options) {
        super(client, channel, options);
    }

    @Override
    protected GuestAgentService build(Channel channel, CallOptions options) {
        return new GuestAgentService(client(), channel, options);
    }

    /** {@return the generated stub whose calls return futures} */
    public GuestAgentServiceGrpc.GuestAgentServiceFutureStub futureStub() {
        return GuestAgentServiceGrpc.newFutureStub(getChannel());
    }

    /** {@return the generated stub whose calls are told to observers: for streams of requests} */
    public GuestAgentServiceGrpc.GuestAgentServiceStub asyncStub() {
        return GuestAgentServiceGrpc.newStub(getChannel());
    }

    /**
     * Lists the addresses of a guest with their sources. Asks the network service now; {@code status.addresses} holds
     * what was last seen. A source that does not answer is told in {@code missing_sources}. PAGE_TOKEN_INVALID.
     *
     * @param request what is asked for; it stays as it is
     * @return every item, page by page as they are read
     */
    public Pages<GuestAddress> listGuestAddresses(ListGuestAddressesRequest request) {
        return pages(GuestAgentServiceGrpc.getListGuestAddressesMethod(), request, ListGuestAddressesResponse::getAddressesList, true);
    }

    /**
     * Asks for one page. Lists the addresses of a guest with their sources. Asks the network service now; {@code
     * status.addresses} holds what was last seen. A source that does not answer is told in {@code missing_sources}.
     * PAGE_TOKEN_INVALID.
     *
     * @param request what is asked for; it stays as it is
     * @return the page
     * @throws VirtfleetException the call failed
     */
    public ListGuestAddressesResponse listGuestAddressesPage(ListGuestAddressesRequest request) {
        return call(GuestAgentServiceGrpc.getListGuestAddressesMethod(), request);
    }
}

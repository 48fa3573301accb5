// Code generated from the protos by tools/java_services.py. DO NOT EDIT.

package dev.virtfleet.client;

import dev.virtfleet.compute.v1.CapabilityServiceGrpc;
import dev.virtfleet.compute.v1.Driver;
import dev.virtfleet.compute.v1.GetDriverRequest;
import dev.virtfleet.compute.v1.ListDriversRequest;
import dev.virtfleet.compute.v1.ListDriversResponse;
import io.grpc.CallOptions;
import io.grpc.Channel;

/**
 * Calls {@code virtfleet.compute.v1.CapabilityService}. Tells what the drivers of a node can do. Threads may share it.
 * What narrows a call ({@code withDeadlineAfter} and so on) returns a copy. No argument and no result is null.
 */
public final class CapabilityService extends FleetService<CapabilityService> {

    CapabilityService(VirtfleetClient client, Channel channel, CallOptions options) {
        super(client, channel, options);
    }

    @Override
    protected CapabilityService build(Channel channel, CallOptions options) {
        return new CapabilityService(client(), channel, options);
    }

    /** {@return the generated stub whose calls return futures} */
    public CapabilityServiceGrpc.CapabilityServiceFutureStub futureStub() {
        return CapabilityServiceGrpc.newFutureStub(getChannel());
    }

    /** {@return the generated stub whose calls are told to observers: for streams of requests} */
    public CapabilityServiceGrpc.CapabilityServiceStub asyncStub() {
        return CapabilityServiceGrpc.newStub(getChannel());
    }

    /**
     * Lists the drivers of a node, those that cannot run too. FILTER_SYNTAX · PAGE_TOKEN_INVALID.
     *
     * @param request what is asked for; it stays as it is
     * @return every item, page by page as they are read
     */
    public Pages<Driver> listDrivers(ListDriversRequest request) {
        return pages(CapabilityServiceGrpc.getListDriversMethod(), request, ListDriversResponse::getDriversList, true);
    }

    /**
     * Asks for one page. Lists the drivers of a node, those that cannot run too. FILTER_SYNTAX · PAGE_TOKEN_INVALID.
     *
     * @param request what is asked for; it stays as it is
     * @return the page
     * @throws VirtfleetException the call failed
     */
    public ListDriversResponse listDriversPage(ListDriversRequest request) {
        return call(CapabilityServiceGrpc.getListDriversMethod(), request);
    }

    /**
     * Gets a driver.
     *
     * @param request what is asked for; it stays as it is
     * @return the answer
     * @throws VirtfleetException the call failed
     */
    public Driver getDriver(GetDriverRequest request) {
        return call(CapabilityServiceGrpc.getGetDriverMethod(), request);
    }
}

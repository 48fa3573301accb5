// Code generated from the protos by tools/java_services.py. DO NOT EDIT.

package dev.virtfleet.client;

import dev.virtfleet.compute.v1.GetHostRequest;
import dev.virtfleet.compute.v1.Host;
import dev.virtfleet.compute.v1.HostServiceGrpc;
import io.grpc.CallOptions;
import io.grpc.Channel;

/**
 * Calls {@code virtfleet.compute.v1.HostService}. Tells what a node is made of. Threads may share it. What narrows a
 * call ({@code withDeadlineAfter} and so on) returns a copy. No argument and no result is null.
 */
public final class HostService extends FleetService<HostService> {

    HostService(VirtfleetClient client, Channel channel, CallOptions options) {
        super(client, channel, options);
    }

    @Override
    protected HostService build(Channel channel, CallOptions options) {
        return new HostService(client(), channel, options);
    }

    /** {@return the generated stub whose calls return futures} */
    public HostServiceGrpc.HostServiceFutureStub futureStub() {
        return HostServiceGrpc.newFutureStub(getChannel());
    }

    /** {@return the generated stub whose calls are told to observers: for streams of requests} */
    public HostServiceGrpc.HostServiceStub asyncStub() {
        return HostServiceGrpc.newStub(getChannel());
    }

    /**
     * Gets the host of a node: processors, memory, accelerators, isolation layers, and what is allocatable and
     * allocated.
     *
     * @param request what is asked for; it stays as it is
     * @return the answer
     * @throws VirtfleetException the call failed
     */
    public Host getHost(GetHostRequest request) {
        return call(HostServiceGrpc.getGetHostMethod(), request);
    }
}

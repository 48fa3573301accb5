// Code generated from the protos by tools/java_services.py. DO NOT EDIT.

package dev.virtfleet.client;

import dev.virtfleet.common.v1.AccessServiceGrpc;
import dev.virtfleet.common.v1.WhoAmIRequest;
import dev.virtfleet.common.v1.WhoAmIResponse;
import io.grpc.CallOptions;
import io.grpc.Channel;

/**
 * Calls {@code virtfleet.common.v1.AccessService}. Tells callers who they are. Threads may share it. What narrows a call
 * ({@code withDeadlineAfter} and so on) returns a copy. No argument and no result is null.
 */
public final class AccessService extends FleetService<AccessService> {

    AccessService(VirtfleetClient client, Channel channel, CallOptions options) {
        super(client, channel, options);
    }

    @Override
    protected AccessService build(Channel channel, CallOptions options) {
        return new AccessService(client(), channel, options);
    }

    /** {@return the generated stub whose calls return futures} */
    public AccessServiceGrpc.AccessServiceFutureStub futureStub() {
        return AccessServiceGrpc.newFutureStub(getChannel());
    }

    /** {@return the generated stub whose calls are told to observers: for streams of requests} */
    public AccessServiceGrpc.AccessServiceStub asyncStub() {
        return AccessServiceGrpc.newStub(getChannel());
    }

    /**
     * Gets the identity, roles and transport of the caller as the asked server sees them.
     *
     * @param request what is asked for; it stays as it is
     * @return the answer
     * @throws VirtfleetException the call failed
     */
    public WhoAmIResponse whoAmI(WhoAmIRequest request) {
        return call(AccessServiceGrpc.getWhoAmIMethod(), request);
    }
}

// Code generated from the protos by tools/java_services.py. DO NOT EDIT.

package dev.virtfleet.client;

import dev.virtfleet.common.v1.OperationServiceGrpc;
import dev.virtfleet.common.v1.WatchOperationsRequest;
import dev.virtfleet.common.v1.WatchOperationsResponse;
import io.grpc.CallOptions;
import io.grpc.Channel;

/**
 * Calls {@code virtfleet.common.v1.OperationService}. Watches operations. Getting, listing, waiting, cancelling and
 * deleting them is {@code google.longrunning.Operations}. Threads may share it. What narrows a call ({@code
 * withDeadlineAfter} and so on) returns a copy. No argument and no result is null.
 */
public final class OperationService extends FleetService<OperationService> {

    OperationService(VirtfleetClient client, Channel channel, CallOptions options) {
        super(client, channel, options);
    }

    @Override
    protected OperationService build(Channel channel, CallOptions options) {
        return new OperationService(client(), channel, options);
    }

    /** {@return the generated stub whose calls return futures} */
    public OperationServiceGrpc.OperationServiceFutureStub futureStub() {
        return OperationServiceGrpc.newFutureStub(getChannel());
    }

    /** {@return the generated stub whose calls are told to observers: for streams of requests} */
    public OperationServiceGrpc.OperationServiceStub asyncStub() {
        return OperationServiceGrpc.newStub(getChannel());
    }

    /**
     * Streams the operations of one process as they start, progress and end. Begins with those that are listed now.
     *
     * <p>OUT_OF_RANGE RESUME_TOKEN_COMPACTED: the token is too old; begin with a snapshot · INVALID_ARGUMENT
     * PAGE_TOKEN_INVALID: it is not of this watch, NAME_MALFORMED: {@code parent} is another process ·
     * RESOURCE_EXHAUSTED SLOW_READER.
     *
     * @param request what is asked for; it stays as it is
     * @return the watch, which goes on over every break until it is closed
     */
    public ResourceWatch<WatchOperationsResponse> watchOperations(WatchOperationsRequest request) {
        return watchOperations(request, WatchOptions.standard());
    }

    /**
     * Streams the operations of one process as they start, progress and end. Begins with those that are listed now.
     *
     * <p>OUT_OF_RANGE RESUME_TOKEN_COMPACTED: the token is too old; begin with a snapshot · INVALID_ARGUMENT
     * PAGE_TOKEN_INVALID: it is not of this watch, NAME_MALFORMED: {@code parent} is another process ·
     * RESOURCE_EXHAUSTED SLOW_READER.
     *
     * @param request what is asked for; it stays as it is
     * @param options what is told of breaks, and what is done when the history is too short
     * @return the watch, which goes on over every break until it is closed
     */
    public ResourceWatch<WatchOperationsResponse> watchOperations(WatchOperationsRequest request, WatchOptions options) {
        return watch(OperationServiceGrpc.getWatchOperationsMethod(), request, options);
    }
}

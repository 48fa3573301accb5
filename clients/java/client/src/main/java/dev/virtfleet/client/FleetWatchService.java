// Code generated from the protos by tools/java_services.py. DO NOT EDIT.

package dev.virtfleet.client;

import dev.virtfleet.fleet.v1.Event;
import dev.virtfleet.fleet.v1.ListEventsRequest;
import dev.virtfleet.fleet.v1.ListEventsResponse;
import dev.virtfleet.fleet.v1.WatchResourcesRequest;
import dev.virtfleet.fleet.v1.WatchResourcesResponse;
import dev.virtfleet.fleet.v1.WatchServiceGrpc;
import io.grpc.CallOptions;
import io.grpc.Channel;

/**
 * Calls {@code virtfleet.fleet.v1.WatchService}. Tells what changes in the fleet itself: its nodes, certificates and
 * join tokens. Served by gateways only. What changes on the nodes is told by the WatchService of compute, storage and
 * network with the parent {@code nodes/-}. Threads may share it. What narrows a call ({@code withDeadlineAfter} and so
 * on) returns a copy. No argument and no result is null.
 */
public final class FleetWatchService extends FleetService<FleetWatchService> {

    FleetWatchService(VirtfleetClient client, Channel channel, CallOptions options) {
        super(client, channel, options);
    }

    @Override
    protected FleetWatchService build(Channel channel, CallOptions options) {
        return new FleetWatchService(client(), channel, options);
    }

    /** {@return the generated stub whose calls return futures} */
    public WatchServiceGrpc.WatchServiceFutureStub futureStub() {
        return WatchServiceGrpc.newFutureStub(getChannel());
    }

    /** {@return the generated stub whose calls are told to observers: for streams of requests} */
    public WatchServiceGrpc.WatchServiceStub asyncStub() {
        return WatchServiceGrpc.newStub(getChannel());
    }

    /**
     * Streams changes of resources and events, each resource's in order. Begins with a snapshot (puts of all that
     * exists, then {@code snapshot_end}) or after a resume token. At least once: after a resume, a change may come
     * again.
     *
     * <p>OUT_OF_RANGE RESUME_TOKEN_COMPACTED: begin with a snapshot · INVALID_ARGUMENT PAGE_TOKEN_INVALID: the token is
     * not of this watch, FILTER_SYNTAX · RESOURCE_EXHAUSTED SLOW_READER.
     *
     * @param request what is asked for; it stays as it is
     * @return the watch, which goes on over every break until it is closed
     */
    public ResourceWatch<WatchResourcesResponse> watchResources(WatchResourcesRequest request) {
        return watchResources(request, WatchOptions.standard());
    }

    /**
     * Streams changes of resources and events, each resource's in order. Begins with a snapshot (puts of all that
     * exists, then {@code snapshot_end}) or after a resume token. At least once: after a resume, a change may come
     * again.
     *
     * <p>OUT_OF_RANGE RESUME_TOKEN_COMPACTED: begin with a snapshot · INVALID_ARGUMENT PAGE_TOKEN_INVALID: the token is
     * not of this watch, FILTER_SYNTAX · RESOURCE_EXHAUSTED SLOW_READER.
     *
     * @param request what is asked for; it stays as it is
     * @param options what is told of breaks, and what is done when the history is too short
     * @return the watch, which goes on over every break until it is closed
     */
    public ResourceWatch<WatchResourcesResponse> watchResources(WatchResourcesRequest request, WatchOptions options) {
        return watch(WatchServiceGrpc.getWatchResourcesMethod(), request, options);
    }

    /**
     * Lists past events, oldest first, as far as the log reaches (seven days or 100,000 entries, whichever is less).
     *
     * <p>INVALID_ARGUMENT FILTER_SYNTAX, PAGE_TOKEN_INVALID.
     *
     * @param request what is asked for; it stays as it is
     * @return every item, page by page as they are read
     */
    public Pages<Event> listEvents(ListEventsRequest request) {
        return pages(WatchServiceGrpc.getListEventsMethod(), request, ListEventsResponse::getEventsList, false);
    }

    /**
     * Asks for one page. Lists past events, oldest first, as far as the log reaches (seven days or 100,000 entries,
     * whichever is less).
     *
     * <p>INVALID_ARGUMENT FILTER_SYNTAX, PAGE_TOKEN_INVALID.
     *
     * @param request what is asked for; it stays as it is
     * @return the page
     * @throws VirtfleetException the call failed
     */
    public ListEventsResponse listEventsPage(ListEventsRequest request) {
        return call(WatchServiceGrpc.getListEventsMethod(), request);
    }
}

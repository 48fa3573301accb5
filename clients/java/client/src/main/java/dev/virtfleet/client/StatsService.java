// Code generated from the protos by tools/java_services.py. DO NOT EDIT.

package dev.virtfleet.client;

import dev.virtfleet.compute.v1.BatchGetDomainStatsRequest;
import dev.virtfleet.compute.v1.BatchGetDomainStatsResponse;
import dev.virtfleet.compute.v1.DomainStats;
import dev.virtfleet.compute.v1.GetDomainStatsRequest;
import dev.virtfleet.compute.v1.GetHostStatsRequest;
import dev.virtfleet.compute.v1.HostStats;
import dev.virtfleet.compute.v1.StatsServiceGrpc;
import dev.virtfleet.compute.v1.StreamDomainStatsRequest;
import dev.virtfleet.compute.v1.StreamDomainStatsResponse;
import io.grpc.CallOptions;
import io.grpc.Channel;
import java.util.stream.Stream;

/**
 * Calls {@code virtfleet.compute.v1.StatsService}. Reads counters. Counters stand here and never in a status; they begin
 * at 0 with each run of a domain ({@code runtime_id} tells runs apart). Threads may share it. What narrows a call
 * ({@code withDeadlineAfter} and so on) returns a copy. No argument and no result is null.
 */
public final class StatsService extends FleetService<StatsService> {

    StatsService(VirtfleetClient client, Channel channel, CallOptions options) {
        super(client, channel, options);
    }

    @Override
    protected StatsService build(Channel channel, CallOptions options) {
        return new StatsService(client(), channel, options);
    }

    /** {@return the generated stub whose calls return futures} */
    public StatsServiceGrpc.StatsServiceFutureStub futureStub() {
        return StatsServiceGrpc.newFutureStub(getChannel());
    }

    /** {@return the generated stub whose calls are told to observers: for streams of requests} */
    public StatsServiceGrpc.StatsServiceStub asyncStub() {
        return StatsServiceGrpc.newStub(getChannel());
    }

    /**
     * Gets the counters of a domain. A stopped one has its state only. Never waits for a running operation.
     * CAPABILITY_MISSING · OPERATION_TIMED_OUT (the driver does not answer within 5 s) · what the driver fails with.
     *
     * @param request what is asked for; it stays as it is
     * @return the answer
     * @throws VirtfleetException the call failed
     */
    public DomainStats getDomainStats(GetDomainStatsRequest request) {
        return call(StatsServiceGrpc.getGetDomainStatsMethod(), request);
    }

    /**
     * Gets the counters of many domains, in pages. One whose driver does not answer within 5 s has a {@code failure} and
     * its state.
     *
     * <p>FILTER_SYNTAX · PAGE_TOKEN_INVALID.
     *
     * @param request what is asked for; it stays as it is
     * @return the answer
     * @throws VirtfleetException the call failed
     */
    public BatchGetDomainStatsResponse batchGetDomainStats(BatchGetDomainStatsRequest request) {
        return call(StatsServiceGrpc.getBatchGetDomainStatsMethod(), request);
    }

    /**
     * Streams the counters of many domains, a round every {@code interval}; the first at once. A reader that is slow
     * gets fewer rounds. At a gateway, of {@code nodes/-}, a node that is away is told in each round. FILTER_SYNTAX.
     *
     * @param request what is asked for; it stays as it is
     * @return the answers as they come; closing it ends the call
     */
    public Stream<StreamDomainStatsResponse> streamDomainStats(StreamDomainStatsRequest request) {
        return stream(StatsServiceGrpc.getStreamDomainStatsMethod(), request);
    }

    /**
     * Gets the counters of the host.
     *
     * @param request what is asked for; it stays as it is
     * @return the answer
     * @throws VirtfleetException the call failed
     */
    public HostStats getHostStats(GetHostStatsRequest request) {
        return call(StatsServiceGrpc.getGetHostStatsMethod(), request);
    }
}

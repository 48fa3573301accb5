// Code generated from the protos by tools/java_services.py. DO NOT EDIT.

package dev.virtfleet.client;

import dev.virtfleet.compute.v1.ConsoleServiceGrpc;
import dev.virtfleet.compute.v1.ReadConsoleLogRequest;
import dev.virtfleet.compute.v1.ReadConsoleLogResponse;
import io.grpc.CallOptions;
import io.grpc.Channel;
import java.util.stream.Stream;

/**
 * Calls {@code virtfleet.compute.v1.ConsoleService}. Reads and writes serial and console ports. An offset counts the
 * bytes that a port has put out in one epoch; a new epoch begins with each start of the guest, and when the keeper of
 * its history was lost. The history is bounded: what is no longer held is told as a gap, never left out in silence.
 * Threads may share it. What narrows a call ({@code withDeadlineAfter} and so on) returns a copy. No argument and no
 * result is null.
 */
public final class ConsoleService extends FleetService<ConsoleService> {

    ConsoleService(VirtfleetClient client, Channel channel, CallOptions options) {
        super(client, channel, options);
    }

    @Override
    protected ConsoleService build(Channel channel, CallOptions options) {
        return new ConsoleService(client(), channel, options);
    }

    /** {@return the generated stub whose calls return futures} */
    public ConsoleServiceGrpc.ConsoleServiceFutureStub futureStub() {
        return ConsoleServiceGrpc.newFutureStub(getChannel());
    }

    /** {@return the generated stub whose calls are told to observers: for streams of requests} */
    public ConsoleServiceGrpc.ConsoleServiceStub asyncStub() {
        return ConsoleServiceGrpc.newStub(getChannel());
    }

    /**
     * Reads what a port has put out, from an offset on; with {@code follow} also what comes. Works for a stopped domain
     * as long as its history is kept.
     *
     * <p>DEVICE_NOT_FOUND · RESOURCE_NOT_FOUND (nothing is kept: it never ran) · RANGE_BEYOND_END · CAPABILITY_MISSING.
     *
     * @param request what is asked for; it stays as it is
     * @return the answers as they come; closing it ends the call
     */
    public Stream<ReadConsoleLogResponse> readConsoleLog(ReadConsoleLogRequest request) {
        return stream(ConsoleServiceGrpc.getReadConsoleLogMethod(), request);
    }
}

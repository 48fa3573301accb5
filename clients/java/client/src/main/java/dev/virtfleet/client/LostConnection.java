package dev.virtfleet.client;

import io.grpc.Status;
import java.io.IOException;

/** What a lost connection looks like. */
final class LostConnection {

    private LostConnection() {}

    /**
     * Returns UNAVAILABLE for a connection that closed under a call that was being written: gRPC for Java says UNKNOWN then. Only what
     * happened in this process has a cause; an UNKNOWN of the fleet has none.
     */
    static Status named(Status status) {
        return status.getCode() == Status.Code.UNKNOWN && status.getCause() instanceof IOException
                ? Status.UNAVAILABLE.withDescription(status.getDescription()).withCause(status.getCause())
                : status;
    }
}

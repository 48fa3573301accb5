package dev.virtfleet.client;

import java.util.Objects;
import java.util.Optional;

/**
 * One fleet of the context file: where it is, and who one is there. Immutable; no component is null.
 *
 * @param address {@code tls://HOST:PORT}, {@code HOST:PORT}, {@code unix:///PATH}, or what {@code virtfleet proxy} understands
 * @param credentials the files of mutual TLS; empty for what needs none
 */
public record FleetContext(String address, Optional<Credentials> credentials) {

    /**
     * Makes a context.
     *
     * @param address where the fleet is
     * @param credentials the files of mutual TLS; empty for what needs none
     */
    public FleetContext {
        Objects.requireNonNull(address, "address");
        Objects.requireNonNull(credentials, "credentials");
    }
}

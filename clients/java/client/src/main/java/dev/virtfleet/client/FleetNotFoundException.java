package dev.virtfleet.client;

/**
 * There is no way to a fleet: no address, a wrong one, a context file or certificates that cannot be read, a helper process that
 * does not start. It is thrown while a client is made, before any call.
 */
public final class FleetNotFoundException extends RuntimeException {

    private static final long serialVersionUID = 1L;

    FleetNotFoundException(String message) {
        super(message);
    }

    FleetNotFoundException(String message, Throwable cause) {
        super(message, cause);
    }
}

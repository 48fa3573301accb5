package dev.virtfleet.client;

import java.time.Duration;
import java.util.Optional;

/** An operation has not ended in the time that its caller gave it. It goes on: {@link VirtfleetClient#operation} finds it again. */
public final class OperationPendingException extends RuntimeException {

    private static final long serialVersionUID = 1L;

    /** The name of the operation. */
    private final String operation;

    OperationPendingException(String operation, Duration waited, VirtfleetException obstacle) {
        super(operation + " has not ended within " + waited + " and goes on", obstacle);
        this.operation = operation;
    }

    /** {@return the name of the operation} */
    public String operation() {
        return operation;
    }

    /** {@return what stood in the way of looking at it last; empty if it is simply not done} */
    public Optional<VirtfleetException> obstacle() {
        return Optional.ofNullable((VirtfleetException) getCause());
    }
}

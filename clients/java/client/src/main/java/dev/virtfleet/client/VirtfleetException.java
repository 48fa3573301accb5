package dev.virtfleet.client;

import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import com.google.rpc.PreconditionFailure;
import com.google.rpc.ResourceInfo;
import com.google.rpc.RetryInfo;
import io.grpc.Metadata;
import io.grpc.Status;
import io.grpc.protobuf.StatusProto;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.Objects;
import java.util.Optional;

/**
 * A call or an operation that failed, with all that the fleet says of it as values.
 *
 * <pre>{@code
 * switch (failure.reason()) {
 *     case IDENTITY_IN_USE -> log.warn("held by {}", failure.holder().orElse("?"));
 *     case RESOURCE_MOVED -> again(failure.newName().orElseThrow());
 *     default -> throw failure;
 * }
 * }</pre>
 *
 * <p>There is one class for all reasons: what most programs do is to treat a few of them in one place, and to let the rest pass.
 * Immutable; no method returns null.
 */
public final class VirtfleetException extends RuntimeException {

    private static final long serialVersionUID = 1L;
    /** The domain in the ErrorInfo of every error of virtfleet. */
    static final String ERROR_DOMAIN = "virtfleet.dev";

    private final transient com.google.rpc.Status status;
    /** The code of gRPC. */
    private final Status.Code code;
    /** The reason as it came. */
    private final String reasonText;
    private final transient Map<String, String> metadata;
    private final transient List<FieldViolation> violations;
    /** The resource at fault, or null. */
    private final String resource;
    /** The pause that is asked for, or null. */
    private final Duration retryDelay;

    /**
     * One field of a request that is at fault.
     *
     * @param path the path below the request, as a field mask writes it: {@code domain.spec.memory.maximum_bytes}
     * @param description a sentence for people
     */
    public record FieldViolation(String path, String description) {

        /**
         * Names a field.
         *
         * @param path the path below the request
         * @param description a sentence for people
         */
        public FieldViolation {
            Objects.requireNonNull(path, "path");
            Objects.requireNonNull(description, "description");
        }
    }

    private VirtfleetException(com.google.rpc.Status status, Details details, Throwable cause) {
        super(text(status, details.info), cause);
        this.status = status;
        this.code = Status.fromCodeValue(status.getCode()).getCode();
        this.reasonText = details.info.getReason();
        this.metadata = Map.copyOf(details.info.getMetadataMap());
        this.violations = List.copyOf(details.violations);
        this.resource = details.resource;
        this.retryDelay = details.retryDelay;
    }

    private static String text(com.google.rpc.Status status, ErrorInfo info) {
        Status.Code code = Status.fromCodeValue(status.getCode()).getCode();
        return (info.getReason().isEmpty() ? code : code + " " + info.getReason()) + ": " + status.getMessage();
    }

    /**
     * Returns the exception for what a generated stub threw or told its observer.
     *
     * @param failure anything; what is already of this class is returned as it is
     * @return the exception; what is no failure of a call has the code UNKNOWN and {@code failure} as its cause
     */
    public static VirtfleetException of(Throwable failure) {
        for (Throwable cause = failure; cause != null; cause = cause.getCause()) {
            if (cause instanceof VirtfleetException typed) {
                return typed;
            }
        }
        com.google.rpc.Status status = StatusProto.fromThrowable(failure);
        if (status == null || status.getCode() == Status.Code.OK.value()) {
            status = com.google.rpc.Status.newBuilder()
                    .setCode(Status.Code.UNKNOWN.value())
                    .setMessage(String.valueOf(failure))
                    .build();
        }
        return new VirtfleetException(explained(status, failure), Details.of(status), failure);
    }

    /** Adds what happened in this process, such as a certificate that is refused, to what gRPC says of a connection. */
    private static com.google.rpc.Status explained(com.google.rpc.Status status, Throwable failure) {
        Throwable root = Status.fromThrowable(failure).getCause();
        if (root == null || status.getDetailsCount() > 0) {
            return status;
        }
        while (root.getCause() != null) {
            root = root.getCause();
        }
        String first = status.getMessage().lines().findFirst().orElse("");
        String why = root.getMessage() == null ? root.getClass().getSimpleName() : root.getMessage();
        return status.toBuilder().setMessage(first.contains(why) ? first : first + ": " + why).build();
    }

    /**
     * Returns the exception for a status, as operations, batches and watches carry it.
     *
     * @param status the status
     * @return the exception; empty if the status is OK
     */
    public static Optional<VirtfleetException> ofStatus(com.google.rpc.Status status) {
        return status.getCode() == Status.Code.OK.value()
                ? Optional.empty()
                : Optional.of(new VirtfleetException(status, Details.of(status), null));
    }

    static VirtfleetException of(Status status, Metadata trailers) {
        return of(status.asRuntimeException(trailers));
    }

    /**
     * Tells whether a call was lost on its way, so that nobody knows how far it came. Every server of virtfleet gives a reason with
     * CANCELLED; without one it comes from gRPC itself, which ends so what waits for a handler when a server stops.
     */
    boolean isLost() {
        return code == Status.Code.UNAVAILABLE || code == Status.Code.CANCELLED && reason() == Reason.NONE;
    }

    /** {@return the code of gRPC} */
    public Status.Code code() {
        return code;
    }

    /**
     * {@return the stable cause; {@link Reason#NONE} if the error is none of virtfleet's own, such as a lost connection, and
     * {@link Reason#UNRECOGNIZED} if this release does not know it}
     */
    public Reason reason() {
        return Reason.named(reasonText);
    }

    /** {@return the reason as it came; empty if there is none} */
    public String reasonText() {
        return reasonText;
    }

    /** {@return every variable of the message} */
    public Map<String, String> metadata() {
        return metadata == null ? Map.of() : metadata;
    }

    /** {@return the fields of the request that are at fault} */
    public List<FieldViolation> violations() {
        return violations == null ? List.of() : violations;
    }

    /** {@return the resource at fault, where it is not the target of the call} */
    public Optional<String> resource() {
        return Optional.ofNullable(resource);
    }

    /** {@return who holds what the call wanted (RESOURCE_IN_USE, IDENTITY_IN_USE, SUBNET_OVERLAP)} */
    public Optional<String> holder() {
        return Optional.ofNullable(metadata().get("holder"));
    }

    /** {@return the operation that is in the way (OPERATION_CONFLICT)} */
    public Optional<String> operation() {
        return Optional.ofNullable(metadata().get("operation"));
    }

    /** {@return where the resource lives now (RESOURCE_MOVED)} */
    public Optional<String> newName() {
        return Optional.ofNullable(metadata().get("new_name"));
    }

    /** {@return the pause that the fleet asks for before a repetition} */
    public Optional<Duration> retryDelay() {
        return Optional.ofNullable(retryDelay);
    }

    /** {@return the whole status with all details; of an exception that has been serialized, code and message alone} */
    public com.google.rpc.Status status() {
        return status != null
                ? status
                : com.google.rpc.Status.newBuilder().setCode(code.value()).setMessage(getMessage()).build();
    }

    /** What the details of a status say. */
    private static final class Details {
        private ErrorInfo info = ErrorInfo.getDefaultInstance();
        private final List<FieldViolation> violations = new ArrayList<>();
        private String resource;
        private Duration retryDelay;

        static Details of(com.google.rpc.Status status) {
            Details found = new Details();
            for (Any detail : status.getDetailsList()) {
                try {
                    found.take(detail);
                } catch (InvalidProtocolBufferException damaged) {
                    // A detail that does not parse says nothing; the status still holds its bytes.
                    continue;
                }
            }
            return found;
        }

        private void take(Any detail) throws InvalidProtocolBufferException {
            if (detail.is(ErrorInfo.class)) {
                ErrorInfo told = detail.unpack(ErrorInfo.class);
                info = told.getDomain().equals(ERROR_DOMAIN) ? told : info;
            } else if (detail.is(BadRequest.class)) {
                for (BadRequest.FieldViolation one : detail.unpack(BadRequest.class).getFieldViolationsList()) {
                    violations.add(new FieldViolation(one.getField(), one.getDescription()));
                }
            } else if (detail.is(PreconditionFailure.class)) {
                for (PreconditionFailure.Violation one : detail.unpack(PreconditionFailure.class).getViolationsList()) {
                    // The subject is a path below the request, or the resource.
                    if (!one.getSubject().isEmpty() && !one.getSubject().contains("/")) {
                        violations.add(new FieldViolation(one.getSubject(), one.getDescription()));
                    }
                }
            } else if (detail.is(ResourceInfo.class)) {
                resource = detail.unpack(ResourceInfo.class).getResourceName();
            } else if (detail.is(RetryInfo.class)) {
                com.google.protobuf.Duration asked = detail.unpack(RetryInfo.class).getRetryDelay();
                retryDelay = Duration.ofSeconds(asked.getSeconds(), asked.getNanos());
            }
        }
    }
}

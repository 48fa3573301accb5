// Code generated from the protos by tools/java_services.py. DO NOT EDIT.

package dev.virtfleet.client;

import io.grpc.Status;
import java.util.Map;
import java.util.function.Function;
import java.util.stream.Collectors;
import java.util.stream.Stream;

/**
 * The stable causes of errors of virtfleet. Branch on these, never on the text of a message.
 *
 * <p>Later releases add some: a {@code switch} over them needs a {@code default}.
 */
public enum Reason {
    /**
     * A resource name or id does not have the form that its kind demands.
     */
    NAME_MALFORMED(Status.Code.INVALID_ARGUMENT),
    /**
     * A field that the method needs is unset.
     */
    FIELD_REQUIRED(Status.Code.INVALID_ARGUMENT),
    /**
     * A field holds a value that is not allowed.
     */
    FIELD_OUT_OF_RANGE(Status.Code.INVALID_ARGUMENT),
    /**
     * Two fields exclude each other, or one may not be changed after creation.
     */
    FIELD_CONFLICT(Status.Code.INVALID_ARGUMENT),
    /**
     * An update mask names a field that does not exist or may not be written.
     */
    MASK_PATH_UNKNOWN(Status.Code.INVALID_ARGUMENT),
    /**
     * A filter does not parse, or names a field that cannot be filtered on.
     */
    FILTER_SYNTAX(Status.Code.INVALID_ARGUMENT),
    /**
     * A page or resume token is not one of this list or watch.
     */
    PAGE_TOKEN_INVALID(Status.Code.INVALID_ARGUMENT),
    /**
     * A document (XML, CSR) is refused.
     */
    DOCUMENT_INVALID(Status.Code.INVALID_ARGUMENT),
    /**
     * A spec refers to a resource of another node.
     */
    REFERENCE_OTHER_NODE(Status.Code.INVALID_ARGUMENT),
    /**
     * The request_id has been used by the same caller for another request.
     */
    REQUEST_ID_REUSED(Status.Code.INVALID_ARGUMENT),
    /**
     * A mutation carries a field or an enum number that this server does not know.
     */
    UNKNOWN_FIELD(Status.Code.INVALID_ARGUMENT),
    /**
     * The resource does not exist.
     */
    RESOURCE_NOT_FOUND(Status.Code.NOT_FOUND),
    /**
     * The resource lives under another name now: metadata {@code new_name}.
     */
    RESOURCE_MOVED(Status.Code.NOT_FOUND),
    /**
     * The gateway has no node of that name.
     */
    NODE_UNKNOWN(Status.Code.NOT_FOUND),
    /**
     * The domain has no device of that id.
     */
    DEVICE_NOT_FOUND(Status.Code.NOT_FOUND),
    /**
     * A resource of that name exists.
     */
    RESOURCE_EXISTS(Status.Code.ALREADY_EXISTS),
    /**
     * A uid, MAC or address is taken: metadata {@code holder}.
     */
    IDENTITY_IN_USE(Status.Code.ALREADY_EXISTS),
    /**
     * The target is in a state in which the call means nothing: metadata {@code state}.
     */
    WRONG_STATE(Status.Code.FAILED_PRECONDITION),
    /**
     * A change cannot be made to the running guest; the paths are the violations.
     */
    NOT_LIVE_UPDATABLE(Status.Code.FAILED_PRECONDITION),
    /**
     * The target is held: metadata {@code holder}.
     */
    RESOURCE_IN_USE(Status.Code.FAILED_PRECONDITION),
    /**
     * The target has children that must go first: metadata {@code holder} is one.
     */
    HAS_CHILDREN(Status.Code.FAILED_PRECONDITION),
    /**
     * The name is of another node than this one.
     */
    WRONG_NODE(Status.Code.FAILED_PRECONDITION),
    /**
     * The node takes no new resources.
     */
    NODE_CORDONED(Status.Code.FAILED_PRECONDITION),
    /**
     * A file or volume that the target is built on is gone.
     */
    BACKING_MISSING(Status.Code.FAILED_PRECONDITION),
    /**
     * There is data where something new is to be made.
     */
    WOULD_OVERWRITE(Status.Code.FAILED_PRECONDITION),
    /**
     * A subnet overlaps one of the node: metadata {@code holder}.
     */
    SUBNET_OVERLAP(Status.Code.FAILED_PRECONDITION),
    /**
     * Several resources answer to that id: metadata {@code names}.
     */
    AMBIGUOUS_NAME(Status.Code.FAILED_PRECONDITION),
    /**
     * The name is now that of another resource than the caller meant.
     */
    UID_MISMATCH(Status.Code.FAILED_PRECONDITION),
    /**
     * The operation cannot be cancelled at this moment.
     */
    NOT_CANCELLABLE(Status.Code.FAILED_PRECONDITION),
    /**
     * The resource is protected: clear {@code spec.deletion_protection} first.
     */
    DELETION_PROTECTED(Status.Code.FAILED_PRECONDITION),
    /**
     * The resource has changed since the caller read it.
     */
    ETAG_MISMATCH(Status.Code.ABORTED),
    /**
     * An operation on the target runs: metadata {@code operation}.
     */
    OPERATION_CONFLICT(Status.Code.ABORTED),
    /**
     * The change has been undone.
     */
    CHANGE_ROLLED_BACK(Status.Code.ABORTED),
    /**
     * The history from that token on is no longer held; begin with a snapshot.
     */
    RESUME_TOKEN_COMPACTED(Status.Code.OUT_OF_RANGE),
    /**
     * The range begins behind the end of the data.
     */
    RANGE_BEYOND_END(Status.Code.OUT_OF_RANGE),
    /**
     * The pool has no room for it.
     */
    POOL_FULL(Status.Code.RESOURCE_EXHAUSTED),
    /**
     * The node has not enough free memory.
     */
    NODE_MEMORY_SHORT(Status.Code.RESOURCE_EXHAUSTED),
    /**
     * The network has no free address.
     */
    ADDRESSES_EXHAUSTED(Status.Code.RESOURCE_EXHAUSTED),
    /**
     * A limit of the settings is reached: metadata {@code limit}.
     */
    QUOTA_EXCEEDED(Status.Code.RESOURCE_EXHAUSTED),
    /**
     * The caller is too fast.
     */
    RATE_LIMITED(Status.Code.RESOURCE_EXHAUSTED),
    /**
     * The reader of a stream is too slow; resume with the last token.
     */
    SLOW_READER(Status.Code.RESOURCE_EXHAUSTED),
    /**
     * The message is larger than the server takes.
     */
    MESSAGE_TOO_LARGE(Status.Code.RESOURCE_EXHAUSTED),
    /**
     * No role of the caller gives the permission on the resource: metadata {@code permission}.
     */
    PERMISSION_MISSING(Status.Code.PERMISSION_DENIED),
    /**
     * The local socket is one of a role without that permission.
     */
    READ_ONLY_SOCKET(Status.Code.PERMISSION_DENIED),
    /**
     * A path leaves its pool.
     */
    PATH_OUTSIDE_POOL(Status.Code.PERMISSION_DENIED),
    /**
     * The caller has no credentials that this server accepts.
     */
    CREDENTIALS_INVALID(Status.Code.UNAUTHENTICATED),
    /**
     * The certificate of the caller is on the denial list.
     */
    CERTIFICATE_REVOKED(Status.Code.UNAUTHENTICATED),
    /**
     * The join token is unknown, used, expired, or of another node.
     */
    JOIN_TOKEN_INVALID(Status.Code.UNAUTHENTICATED),
    /**
     * The driver or back end lacks the ability: metadata {@code capability}.
     */
    CAPABILITY_MISSING(Status.Code.UNIMPLEMENTED),
    /**
     * The method is not built, or not known to this release.
     */
    METHOD_NOT_IMPLEMENTED(Status.Code.UNIMPLEMENTED),
    /**
     * The node does not answer.
     */
    NODE_UNREACHABLE(Status.Code.UNAVAILABLE),
    /**
     * The server is about to stop.
     */
    SERVICE_DRAINING(Status.Code.UNAVAILABLE),
    /**
     * A service, file system or host behind the server does not answer.
     */
    BACKEND_UNREACHABLE(Status.Code.UNAVAILABLE),
    /**
     * The driver cannot run: metadata {@code cause}.
     */
    DRIVER_BROKEN(Status.Code.UNAVAILABLE),
    /**
     * The guest did not do what it was asked to in time.
     */
    GUEST_DID_NOT_COMPLY(Status.Code.DEADLINE_EXCEEDED),
    /**
     * A step took longer than it may.
     */
    OPERATION_TIMED_OUT(Status.Code.DEADLINE_EXCEEDED),
    /**
     * CancelOperation ended the operation; its effects are undone, but for what had ended of a batch.
     */
    OPERATION_CANCELLED(Status.Code.CANCELLED),
    /**
     * The hypervisor refused or died; the message holds the redacted end of what it said.
     */
    HYPERVISOR_FAILED(Status.Code.INTERNAL),
    /**
     * A tool or the kernel refused; the message holds what it said.
     */
    BACKEND_FAILED(Status.Code.INTERNAL),
    /**
     * A fault of virtfleet; metadata {@code log_id} finds it in the log.
     */
    UNEXPECTED(Status.Code.INTERNAL),
    /**
     * An image does not parse or its check fails.
     */
    IMAGE_CORRUPT(Status.Code.DATA_LOSS),
    /**
     * Data does not have the digest that was promised.
     */
    CHECKSUM_MISMATCH(Status.Code.DATA_LOSS),
    /** The error is none of virtfleet's own: a lost connection, a deadline that ran out. */
    NONE(Status.Code.UNKNOWN),
    /** A reason that this release does not know; {@link VirtfleetException#reasonText()} has it as it came. */
    UNRECOGNIZED(Status.Code.UNKNOWN);

    private static final Map<String, Reason> BY_NAME =
            Stream.of(values()).collect(Collectors.toUnmodifiableMap(Reason::name, Function.identity()));

    private final Status.Code code;

    Reason(Status.Code code) {
        this.code = code;
    }

    /** {@return the code that errors of this reason have; UNKNOWN for {@link #NONE} and {@link #UNRECOGNIZED}} */
    public Status.Code code() {
        return code;
    }

    static Reason named(String text) {
        return text.isEmpty() ? NONE : BY_NAME.getOrDefault(text, UNRECOGNIZED);
    }
}

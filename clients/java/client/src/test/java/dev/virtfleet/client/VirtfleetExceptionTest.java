package dev.virtfleet.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertSame;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.protobuf.Any;
import com.google.protobuf.ByteString;
import com.google.protobuf.Message;
import com.google.protobuf.util.Durations;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import com.google.rpc.PreconditionFailure;
import com.google.rpc.ResourceInfo;
import com.google.rpc.RetryInfo;
import io.grpc.Status;
import io.grpc.protobuf.StatusProto;
import java.io.ByteArrayInputStream;
import java.io.ByteArrayOutputStream;
import java.io.IOException;
import java.io.ObjectInputStream;
import java.io.ObjectOutputStream;
import java.time.Duration;
import java.util.Optional;
import java.util.concurrent.CompletionException;
import org.junit.jupiter.api.Test;

class VirtfleetExceptionTest {

    static ErrorInfo info(String reason) {
        return ErrorInfo.newBuilder().setDomain("virtfleet.dev").setReason(reason).build();
    }

    static com.google.rpc.Status status(Status.Code code, Message... details) {
        var status = com.google.rpc.Status.newBuilder().setCode(code.value()).setMessage("what happened");
        for (Message detail : details) {
            status.addDetails(Any.pack(detail));
        }
        return status.build();
    }

    @Test
    void allThatTheFleetSaysIsThereAsValues() {
        com.google.rpc.Status told = status(
                Status.Code.ALREADY_EXISTS,
                info("IDENTITY_IN_USE").toBuilder()
                        .putMetadata("holder", "nodes/n1/domains/a")
                        .putMetadata("operation", "o")
                        .putMetadata("new_name", "n")
                        .build(),
                BadRequest.newBuilder()
                        .addFieldViolations(BadRequest.FieldViolation.newBuilder().setField("domain.spec").setDescription("bad"))
                        .build(),
                PreconditionFailure.newBuilder()
                        .addViolations(PreconditionFailure.Violation.newBuilder().setSubject("spec.memory"))
                        .addViolations(PreconditionFailure.Violation.newBuilder().setSubject("nodes/n1/domains/a"))
                        .build(),
                ResourceInfo.newBuilder().setResourceName("nodes/n1/networks/x").build(),
                RetryInfo.newBuilder().setRetryDelay(Durations.fromMillis(1500)).build());
        VirtfleetException failure = VirtfleetException.of(StatusProto.toStatusRuntimeException(told));
        assertEquals(Status.Code.ALREADY_EXISTS, failure.code());
        assertEquals(Reason.IDENTITY_IN_USE, failure.reason());
        assertEquals(Optional.of("nodes/n1/domains/a"), failure.holder());
        assertEquals(Optional.of("o"), failure.operation());
        assertEquals(Optional.of("n"), failure.newName());
        assertEquals(Optional.of("nodes/n1/networks/x"), failure.resource());
        assertEquals(Optional.of(Duration.ofMillis(1500)), failure.retryDelay());
        assertEquals("domain.spec", failure.violations().get(0).path());
        assertEquals("spec.memory", failure.violations().get(1).path());
        assertEquals(2, failure.violations().size());
        assertEquals("ALREADY_EXISTS IDENTITY_IN_USE: what happened", failure.getMessage());
        assertEquals(told, failure.status());
    }

    @Test
    void anUnknownReasonIsKeptAndAForeignOneIsNone() {
        VirtfleetException unknown = VirtfleetException.ofStatus(status(Status.Code.ABORTED, info("FROM_TOMORROW"))).orElseThrow();
        assertEquals(Reason.UNRECOGNIZED, unknown.reason());
        assertEquals("FROM_TOMORROW", unknown.reasonText());
        ErrorInfo foreign = ErrorInfo.newBuilder().setDomain("elsewhere").setReason("WRONG_STATE").build();
        assertEquals(Reason.NONE, VirtfleetException.ofStatus(status(Status.Code.ABORTED, foreign)).orElseThrow().reason());
        assertTrue(VirtfleetException.ofStatus(status(Status.Code.OK)).isEmpty());
    }

    @Test
    void aDamagedDetailSpoilsNothingElse() {
        com.google.rpc.Status damaged = status(Status.Code.ABORTED, info("ETAG_MISMATCH")).toBuilder()
                .addDetails(0, Any.newBuilder()
                        .setTypeUrl("type.googleapis.com/google.rpc.BadRequest")
                        .setValue(ByteString.copyFromUtf8("\u0001\u0001\u0001")))
                .build();
        assertEquals(Reason.ETAG_MISMATCH, VirtfleetException.ofStatus(damaged).orElseThrow().reason());
    }

    @Test
    void whatIsTypedStaysAndWhatIsNotBecomesUnknown() {
        VirtfleetException typed = VirtfleetException.of(Status.NOT_FOUND.asRuntimeException());
        assertSame(typed, VirtfleetException.of(new CompletionException(typed)));
        VirtfleetException other = VirtfleetException.of(new IllegalArgumentException("x"));
        assertEquals(Status.Code.UNKNOWN, other.code());
        assertTrue(other.getCause() instanceof IllegalArgumentException);
    }

    @Test
    void everyReasonHasItsCode() {
        assertEquals(Status.Code.FAILED_PRECONDITION, Reason.WRONG_STATE.code());
        assertEquals(Status.Code.UNAVAILABLE, Reason.NODE_UNREACHABLE.code());
        assertEquals(Status.Code.OUT_OF_RANGE, Reason.RESUME_TOKEN_COMPACTED.code());
    }

    @Test
    void aSerializedExceptionStillSaysWhatItWas() throws IOException, ClassNotFoundException {
        VirtfleetException failure = VirtfleetException.ofStatus(status(Status.Code.ABORTED, info("ETAG_MISMATCH"))).orElseThrow();
        ByteArrayOutputStream bytes = new ByteArrayOutputStream();
        try (ObjectOutputStream out = new ObjectOutputStream(bytes)) {
            out.writeObject(failure);
        }
        try (ObjectInputStream in = new ObjectInputStream(new ByteArrayInputStream(bytes.toByteArray()))) {
            VirtfleetException read = (VirtfleetException) in.readObject();
            assertEquals(Reason.ETAG_MISMATCH, read.reason());
            assertTrue(read.metadata().isEmpty());
            assertEquals(Status.Code.ABORTED.value(), read.status().getCode());
        }
    }
}

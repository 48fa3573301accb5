package dev.virtfleet.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertNotEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.longrunning.CancelOperationRequest;
import com.google.longrunning.Operation;
import com.google.longrunning.OperationsGrpc;
import com.google.protobuf.util.Durations;
import com.google.rpc.RetryInfo;
import dev.virtfleet.compute.v1.CreateDomainRequest;
import dev.virtfleet.compute.v1.Domain;
import dev.virtfleet.compute.v1.DomainServiceGrpc;
import dev.virtfleet.compute.v1.GetDomainRequest;
import io.grpc.MethodDescriptor;
import io.grpc.Status;
import java.io.IOException;
import java.util.List;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.TimeUnit;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;

@Timeout(30)
class RepetitionTest {

    private static final MethodDescriptor<GetDomainRequest, Domain> GET = DomainServiceGrpc.getGetDomainMethod();
    private static final MethodDescriptor<CreateDomainRequest, Operation> CREATE = DomainServiceGrpc.getCreateDomainMethod();
    private static final GetDomainRequest REQUEST = GetDomainRequest.newBuilder().setName("nodes/n1/domains/a").build();
    private static final Script.Answer LOST = Script.Answer.failing(Status.Code.UNAVAILABLE);

    private Script script;

    @BeforeEach
    void start() throws IOException {
        script = new Script(GET, CREATE, OperationsGrpc.getCancelOperationMethod());
    }

    @AfterEach
    void end() {
        script.close();
    }

    @Test
    void aReadIsMadeFourTimesInAll() {
        Domain domain = Domain.newBuilder().setName("a").build();
        script.answering(GET, LOST, LOST, LOST, Script.Answer.of(domain));
        assertEquals(domain, script.client().domains().getDomain(REQUEST));
        script.answering(GET, LOST, LOST, LOST, LOST, Script.Answer.of(domain));
        VirtfleetException failure =
                assertThrows(VirtfleetException.class, () -> script.client().domains().getDomain(REQUEST));
        assertEquals(Status.Code.UNAVAILABLE, failure.code());
        assertEquals(8, script.asked().size());
    }

    @Test
    void whatAServerThatStopsHasDroppedIsMadeAgain() {
        Domain domain = Domain.newBuilder().setName("a").build();
        script.answering(GET, Script.Answer.failing(Status.Code.CANCELLED), Script.Answer.of(domain));
        assertEquals(domain, script.client().domains().getDomain(REQUEST));
        com.google.rpc.Status told = VirtfleetExceptionTest.status(
                Status.Code.CANCELLED, VirtfleetExceptionTest.info("OPERATION_CANCELLED"));
        script.answering(GET, Script.Answer.failing(told), Script.Answer.of(domain));
        VirtfleetException failure =
                assertThrows(VirtfleetException.class, () -> script.client().domains().getDomain(REQUEST));
        assertEquals(Reason.OPERATION_CANCELLED, failure.reason());
        assertEquals(3, script.asked().size());
    }

    @Test
    void aMutationIsRepeatedUnderOneRequestIdAndTwoCallsHaveTwo() {
        Script.Answer started = Script.Answer.of(Operation.newBuilder().setName("o").build());
        script.answering(CREATE, LOST, started, started);
        CreateDomainRequest request = CreateDomainRequest.newBuilder().setParent("nodes/n1").build();
        assertEquals("o", script.client().domains().createDomain(request).name());
        script.client().domains().createDomain(request);
        List<String> ids = script.fields("request_id").toList();
        assertEquals(36, ids.get(0).length());
        assertEquals(ids.get(0), ids.get(1));
        assertNotEquals(ids.get(0), ids.get(2));
        assertEquals("", request.getRequestId());
        script.answering(CREATE, started);
        script.client().domains().createDomain(request.toBuilder().setRequestId("mine").build());
        assertEquals("mine", script.fields("request_id").skip(3).findFirst().orElseThrow());
    }

    @Test
    void otherCodesAndWhatHasNoRequestIdAreNeverRepeated() {
        for (Status.Code code : Status.Code.values()) {
            if (code != Status.Code.OK && code != Status.Code.UNAVAILABLE && code != Status.Code.CANCELLED) {
                script.answering(GET, Script.Answer.failing(code));
                assertEquals(code, assertThrows(
                                VirtfleetException.class, () -> script.client().domains().getDomain(REQUEST))
                        .code());
            }
        }
        assertEquals(Status.Code.values().length - 3, script.asked().size());
        script.answering(OperationsGrpc.getCancelOperationMethod(), LOST);
        var operation = script.client().operation("o", Domain.class);
        assertEquals(Status.Code.UNAVAILABLE, assertThrows(VirtfleetException.class, operation::cancel).code());
        assertEquals(1, script.asked().stream().filter(CancelOperationRequest.class::isInstance).count());
    }

    @Test
    void noPauseRunsBeyondTheDeadlineAndTheFleetIsHeardOnPauses() {
        com.google.rpc.Status busy = VirtfleetExceptionTest.status(
                Status.Code.UNAVAILABLE, RetryInfo.newBuilder().setRetryDelay(Durations.fromSeconds(60)).build());
        script.answering(GET, Script.Answer.failing(busy), Script.Answer.of(Domain.getDefaultInstance()));
        VirtfleetException failure = assertThrows(VirtfleetException.class, () -> script.client()
                .domains()
                .withDeadlineAfter(2, TimeUnit.SECONDS)
                .getDomain(REQUEST));
        // Not DEADLINE_EXCEEDED: it has not waited for what cannot come in time.
        assertEquals(Status.Code.UNAVAILABLE, failure.code());
        assertEquals(1, script.asked().size());
        com.google.rpc.Status soon = VirtfleetExceptionTest.status(
                Status.Code.UNAVAILABLE, RetryInfo.newBuilder().setRetryDelay(Durations.fromMillis(700)).build());
        script.close();
        assertEquals(700, Pause.before(1, VirtfleetException.ofStatus(soon).orElseThrow()).toMillis());
        for (int repetition = 1; repetition < 100; repetition++) {
            long millis = Pause.before(repetition, VirtfleetException.of(Status.UNAVAILABLE.asRuntimeException())).toMillis();
            assertTrue(millis >= Math.min(50L << Math.min(repetition - 1, 10), 1500) && millis <= 3000, millis + " ms");
        }
    }

    @Test
    void futuresAreRepeatedTooAndCancelledInAPause() throws Exception {
        script.answering(GET, LOST, Script.Answer.of(Domain.newBuilder().setName("a").build()));
        assertEquals("a", script.client().domains().futureStub().getDomain(REQUEST).get(10, TimeUnit.SECONDS).getName());
        com.google.rpc.Status busy = VirtfleetExceptionTest.status(
                Status.Code.UNAVAILABLE, RetryInfo.newBuilder().setRetryDelay(Durations.fromSeconds(3)).build());
        script.answering(GET, Script.Answer.failing(busy));
        var pausing = script.client().domains().futureStub().getDomain(REQUEST);
        while (script.asked().size() < 3) {
            Thread.sleep(5);
        }
        assertTrue(pausing.cancel(true));
        script.answering(GET, Script.Answer.failing(busy));
        var closing = script.client().domains().futureStub().getDomain(REQUEST);
        while (script.asked().size() < 4) {
            Thread.sleep(5);
        }
        script.client().close();
        ExecutionException ended = assertThrows(ExecutionException.class, () -> closing.get(20, TimeUnit.SECONDS));
        assertEquals(Status.Code.UNAVAILABLE, VirtfleetException.of(ended).code());
    }

    @Test
    void anInterruptEndsACall() {
        script.answering(GET, Script.Answer.open());
        Thread.currentThread().interrupt();
        VirtfleetException ended =
                assertThrows(VirtfleetException.class, () -> script.client().domains().getDomain(REQUEST));
        assertEquals(Status.Code.CANCELLED, ended.code());
        assertTrue(Thread.interrupted());
    }
}

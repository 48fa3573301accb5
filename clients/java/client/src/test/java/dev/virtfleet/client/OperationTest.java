package dev.virtfleet.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.longrunning.OperationsGrpc;
import com.google.protobuf.Any;
import dev.virtfleet.compute.v1.Domain;
import dev.virtfleet.compute.v1.DomainServiceGrpc;
import dev.virtfleet.compute.v1.StartDomainRequest;
import dev.virtfleet.type.v1.OperationMetadata;
import io.grpc.Status;
import java.io.IOException;
import java.time.Duration;
import java.util.List;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CopyOnWriteArrayList;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.TimeUnit;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;

@Timeout(60)
class OperationTest {

    private static final Duration LIMIT = Duration.ofSeconds(30);
    private static final Domain DOMAIN = Domain.newBuilder().setName("nodes/n1/domains/a").build();

    private Script script;

    @BeforeEach
    void start() throws IOException {
        script = new Script(DomainServiceGrpc.getStartDomainMethod(), OperationsGrpc.getWaitOperationMethod());
    }

    @AfterEach
    void end() {
        script.close();
    }

    private static com.google.longrunning.Operation.Builder at(String phase) {
        return com.google.longrunning.Operation.newBuilder()
                .setName("o")
                .setMetadata(Any.pack(OperationMetadata.newBuilder().setPhase(phase).build()));
    }

    private Operation<Domain> started(com.google.longrunning.Operation first) {
        script.answering(DomainServiceGrpc.getStartDomainMethod(), Script.Answer.of(first));
        return script.client().domains().startDomain(StartDomainRequest.getDefaultInstance());
    }

    private void then(Script.Answer... answers) {
        script.answering(OperationsGrpc.getWaitOperationMethod(), answers);
    }

    private static com.google.longrunning.Operation done() {
        return at("done").setDone(true).setResponse(Any.pack(DOMAIN)).build();
    }

    @Test
    void quickWorkNeedsNoSecondCall() throws InterruptedException {
        Operation<Domain> operation = started(done());
        assertTrue(operation.isDone());
        assertEquals(DOMAIN, operation.await(LIMIT));
        assertEquals(1, script.asked().size());
    }

    @Test
    void progressIsToldAtEachLookAndAtTheEnd() throws Exception {
        Operation<Domain> operation = started(at("first").build());
        then(Script.Answer.of(at("second").build()), Script.Answer.of(done()));
        List<String> phases = new CopyOnWriteArrayList<>();
        assertEquals(DOMAIN, operation.result(metadata -> phases.add(metadata.getPhase())).get(30, TimeUnit.SECONDS));
        assertEquals(List.of("first", "second", "done"), phases);
        assertEquals("done", operation.metadata().orElseThrow().getPhase());
    }

    @Test
    void lostConnectionsDoNotEndTheWaitHoweverMany() throws InterruptedException {
        Operation<Domain> operation = started(at("x").build());
        Script.Answer lost = Script.Answer.failing(Status.Code.UNAVAILABLE);
        then(lost, lost, lost, lost, lost, Script.Answer.failing(Status.Code.DEADLINE_EXCEEDED), Script.Answer.of(done()));
        assertEquals(DOMAIN, operation.await(LIMIT));
    }

    @Test
    void aFailureIsTypedAndSoIsTheRefusalOfALook() {
        var failed = at("x").setDone(true).setError(VirtfleetExceptionTest.status(
                Status.Code.RESOURCE_EXHAUSTED, VirtfleetExceptionTest.info("NODE_MEMORY_SHORT")));
        Operation<Domain> operation = started(at("x").build());
        then(Script.Answer.of(failed.build()));
        VirtfleetException failure = assertThrows(VirtfleetException.class, () -> operation.await(LIMIT));
        assertEquals(Reason.NODE_MEMORY_SHORT, failure.reason());
        Operation<Domain> gone = script.client().operation("p", Domain.class);
        then(Script.Answer.failing(Status.Code.NOT_FOUND));
        assertEquals(
                Status.Code.NOT_FOUND, assertThrows(VirtfleetException.class, () -> gone.await(LIMIT)).code());
    }

    @Test
    void timeRunsOutWhileTheWorkGoesOn() {
        Operation<Domain> operation = started(at("x").build());
        then(Script.Answer.open());
        OperationPendingException pending =
                assertThrows(OperationPendingException.class, () -> operation.await(Duration.ofMillis(100)));
        assertEquals("o", pending.operation());
        then(Script.Answer.failing(Status.Code.UNAVAILABLE), Script.Answer.open());
        assertThrows(OperationPendingException.class, () -> operation.await(Duration.ofMillis(300)));
    }

    @Test
    void anInterruptEndsTheWait() {
        Operation<Domain> operation = started(at("x").build());
        then(Script.Answer.open());
        Thread.currentThread().interrupt();
        assertThrows(InterruptedException.class, () -> operation.await(LIMIT));
    }

    @Test
    void aWaitEndsWithItsFutureItsListenerOrItsClient() throws Exception {
        Operation<Domain> operation = started(at("x").build());
        then(Script.Answer.open(), Script.Answer.open());
        CompletableFuture<Domain> given = operation.result();
        given.cancel(false);
        CompletableFuture<Domain> broken = operation.result(metadata -> {
            throw new IllegalStateException("the listener");
        });
        assertEquals(
                "the listener",
                assertThrows(ExecutionException.class, () -> broken.get(10, TimeUnit.SECONDS)).getCause().getMessage());
        CompletableFuture<Domain> cut = operation.result();
        script.client().close();
        ExecutionException closed = assertThrows(ExecutionException.class, () -> cut.get(10, TimeUnit.SECONDS));
        assertEquals(Status.Code.UNAVAILABLE, VirtfleetException.of(closed).code());
    }

    @Test
    void anotherResultThanWasExpectedIsSaid() {
        Operation<Domain> operation =
                started(at("x").setDone(true).setResponse(Any.pack(OperationMetadata.getDefaultInstance())).build());
        IllegalStateException wrong = assertThrows(IllegalStateException.class, () -> operation.await(LIMIT));
        assertTrue(wrong.getMessage().contains("OperationMetadata"), wrong.getMessage());
        assertFalse(script.client().operation("q", Domain.class).isDone());
    }
}

package dev.virtfleet.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.virtfleet.compute.v1.WatchResourcesRequest;
import dev.virtfleet.compute.v1.WatchResourcesResponse;
import dev.virtfleet.compute.v1.WatchServiceGrpc;
import dev.virtfleet.type.v1.WatchSnapshotEnd;
import io.grpc.Status;
import java.io.IOException;
import java.util.ArrayList;
import java.util.List;
import java.util.NoSuchElementException;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.TimeUnit;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;

@Timeout(30)
class ResourceWatchTest {

    private static final WatchResourcesRequest REQUEST = WatchResourcesRequest.newBuilder().setParent("nodes/-").build();

    private Script script;

    @BeforeEach
    void start() throws IOException {
        script = new Script(WatchServiceGrpc.getWatchResourcesMethod());
    }

    @AfterEach
    void end() {
        script.close();
    }

    private ResourceWatch<WatchResourcesResponse> watch(WatchOptions options, Script.Answer... streams) {
        script.answering(WatchServiceGrpc.getWatchResourcesMethod(), streams);
        return script.client().computeWatch().watchResources(REQUEST, options);
    }

    private static WatchResourcesResponse answer(String token) {
        return WatchResourcesResponse.newBuilder().setResumeToken(token).build();
    }

    private static WatchResourcesResponse snapshotEnd(String token) {
        return answer(token).toBuilder().setSnapshotEnd(WatchSnapshotEnd.getDefaultInstance()).build();
    }

    private static List<String> tokens(ResourceWatch<WatchResourcesResponse> watch, int count) {
        List<String> found = new ArrayList<>();
        while (found.size() < count && watch.hasNext()) {
            found.add(watch.next().getResumeToken());
        }
        return found;
    }

    private static com.google.rpc.Status slowReader() {
        return VirtfleetExceptionTest.status(Status.Code.RESOURCE_EXHAUSTED, VirtfleetExceptionTest.info("SLOW_READER"));
    }

    private static com.google.rpc.Status compacted() {
        return VirtfleetExceptionTest.status(Status.Code.OUT_OF_RANGE, VirtfleetExceptionTest.info("RESUME_TOKEN_COMPACTED"));
    }

    @Test
    void aWatchGoesOnByItsTokenAfterEveryBreak() {
        List<String> told = new ArrayList<>();
        WatchOptions options = WatchOptions.standard()
                .onBegin(begin -> told.add(begin.name()))
                .onBreak(broken -> told.add(broken.code().name()));
        try (var watch = watch(
                options,
                Script.Answer.failing(Status.Code.UNAVAILABLE, snapshotEnd("1"), answer("2")),
                Script.Answer.of(answer("3")), // the server drains
                Script.Answer.failing(slowReader(), answer("4")),
                Script.Answer.failing(Status.Code.INTERNAL),
                Script.Answer.failing(Status.Code.CANCELLED),
                Script.Answer.open(answer("5")))) {
            assertEquals(List.of("1", "2", "3", "4"), tokens(watch, 4));
            assertTrue(watch.hasNext());
            assertEquals("4", watch.resumeToken()); // not of what has not been taken
            assertEquals(List.of("5"), tokens(watch, 1));
            assertEquals("5", watch.resumeToken());
        }
        assertEquals(List.of("", "2", "3", "4", "4", "4"), script.fields("resume_token").toList());
        assertEquals(
                List.of("SNAPSHOT", "UNAVAILABLE", "RESUMED", "UNAVAILABLE", "RESUMED", "RESOURCE_EXHAUSTED", "INTERNAL",
                        "CANCELLED", "RESUMED"),
                told);
    }

    @Test
    void aBrokenSnapshotBeginsAgain() {
        try (var watch = watch(
                WatchOptions.standard(),
                Script.Answer.failing(Status.Code.UNAVAILABLE, answer("1"), answer("2")),
                Script.Answer.open(answer("1"), snapshotEnd("3")))) {
            assertEquals(List.of("1", "2", "1", "3"), tokens(watch, 4));
        }
        assertEquals(List.of("", ""), script.fields("resume_token").toList());
    }

    @Test
    void aTokenThatIsTooOldEndsItUnlessASnapshotIsWanted() {
        Script.Answer first = Script.Answer.failing(Status.Code.UNAVAILABLE, snapshotEnd("1"));
        try (var watch = watch(WatchOptions.standard(), first, Script.Answer.failing(compacted()))) {
            assertEquals(List.of("1"), tokens(watch, 1));
            assertEquals(
                    Reason.RESUME_TOKEN_COMPACTED, assertThrows(VirtfleetException.class, watch::hasNext).reason());
            assertFalse(watch.hasNext());
        }
        List<WatchOptions.Begin> begun = new ArrayList<>();
        try (var watch = watch(
                WatchOptions.standard().resnapshotting().onBegin(begun::add),
                first, Script.Answer.failing(compacted()), Script.Answer.open(snapshotEnd("9")))) {
            assertEquals(List.of("1", "9"), tokens(watch, 2));
            assertEquals(List.of(WatchOptions.Begin.SNAPSHOT, WatchOptions.Begin.SNAPSHOT), begun);
        }
    }

    @Test
    void aRefusalEndsIt() {
        com.google.rpc.Status refusal =
                VirtfleetExceptionTest.status(Status.Code.INTERNAL, VirtfleetExceptionTest.info("UNEXPECTED"));
        try (var watch = watch(WatchOptions.standard(), Script.Answer.failing(refusal))) {
            assertEquals(Reason.UNEXPECTED, assertThrows(VirtfleetException.class, watch::next).reason());
        }
        try (var watch = watch(WatchOptions.standard(), Script.Answer.failing(Status.Code.PERMISSION_DENIED))) {
            assertEquals(
                    Status.Code.PERMISSION_DENIED, assertThrows(VirtfleetException.class, watch::hasNext).code());
        }
    }

    @Test
    void anotherThreadEndsItOrAnInterrupt() throws Exception {
        var watch = watch(WatchOptions.standard(), Script.Answer.open(snapshotEnd("1")), Script.Answer.open());
        assertTrue(watch.hasNext());
        watch.next();
        CompletableFuture<Boolean> waiting = CompletableFuture.supplyAsync(watch::hasNext);
        Thread.sleep(100);
        assertFalse(waiting.isDone());
        watch.close();
        watch.close();
        assertFalse(waiting.get(10, TimeUnit.SECONDS));
        assertThrows(NoSuchElementException.class, watch::next);
        try (var interrupted = watch(WatchOptions.standard())) {
            Thread.currentThread().interrupt();
            assertFalse(interrupted.hasNext());
            assertTrue(Thread.interrupted());
        }
    }
}

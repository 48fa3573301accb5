package dev.virtfleet.testing;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.protobuf.FieldMask;
import dev.virtfleet.client.OperationPendingException;
import dev.virtfleet.client.Reason;
import dev.virtfleet.client.VirtfleetClient;
import dev.virtfleet.client.VirtfleetException;
import dev.virtfleet.common.v1.WhoAmIRequest;
import dev.virtfleet.compute.v1.Domain;
import dev.virtfleet.compute.v1.DomainSpec;
import dev.virtfleet.compute.v1.DomainState;
import dev.virtfleet.compute.v1.GetDomainRequest;
import dev.virtfleet.compute.v1.Interface;
import dev.virtfleet.compute.v1.StartDomainRequest;
import dev.virtfleet.compute.v1.StopDomainRequest;
import dev.virtfleet.compute.v1.StopMode;
import dev.virtfleet.compute.v1.SuspendDomainRequest;
import dev.virtfleet.compute.v1.UpdateDomainRequest;
import dev.virtfleet.fake.v1.CallError;
import dev.virtfleet.fake.v1.Fault;
import dev.virtfleet.type.v1.OperationMetadata;
import io.grpc.Status;
import io.grpc.health.v1.HealthCheckRequest;
import io.grpc.health.v1.HealthCheckResponse;
import io.grpc.health.v1.HealthGrpc;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.concurrent.Callable;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicBoolean;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.EnumSource;

class CallsTest {

    @ParameterizedTest
    @EnumSource(World.Kind.class)
    void refusalsAreReasonsWithValues(World.Kind kind) throws Exception {
        try (World world = kind.open(); VirtfleetClient client = world.clients().build(); Guests guests = new Guests(client)) {
            Domain domain = guests.make("nodes/n1");
            update(client, domain, "first");
            VirtfleetException old = assertThrows(VirtfleetException.class, () -> update(client, domain, "second"));
            assertEquals(Reason.ETAG_MISMATCH, old.reason());
            assertEquals(Status.Code.ABORTED, old.code());
            assertEquals("first", guests.get(domain.getName()).getDisplayName());

            SuspendDomainRequest pause = SuspendDomainRequest.newBuilder().setName(domain.getName()).build();
            VirtfleetException idle = assertThrows(
                    VirtfleetException.class, () -> client.domains().suspendDomain(pause).await(Guests.PATIENCE));
            assertEquals(Reason.WRONG_STATE, idle.reason());
            assertFalse(idle.metadata().get("state").isEmpty());

            DomainSpec card = Guests.small().toBuilder()
                    .putInterfaces("lan", Interface.newBuilder().setMacAddress("06:07:08:09:0a:0c").build())
                    .build();
            Domain holder = guests.make("nodes/n1", Guests.unique(), card);
            VirtfleetException taken = assertThrows(
                    VirtfleetException.class, () -> guests.make("nodes/n1", Guests.unique(), card));
            assertEquals(Reason.IDENTITY_IN_USE, taken.reason());
            assertEquals(holder.getName(), taken.holder().orElseThrow());

            VirtfleetException bad = assertThrows(
                    VirtfleetException.class, () -> guests.make("nodes/n1", "Not an id", Guests.small()));
            assertEquals(Status.Code.INVALID_ARGUMENT, bad.code());
            assertTrue(bad.violations().stream().anyMatch(field -> field.path().equals("domain_id")), bad.toString());
        }
    }

    private static Domain update(VirtfleetClient client, Domain domain, String title) throws InterruptedException {
        return client.domains()
                .updateDomain(UpdateDomainRequest.newBuilder()
                        .setDomain(Domain.newBuilder()
                                .setName(domain.getName())
                                .setEtag(domain.getEtag())
                                .setDisplayName(title))
                        .setUpdateMask(FieldMask.newBuilder().addPaths("display_name"))
                        .build())
                .await(Guests.PATIENCE);
    }

    @ParameterizedTest
    @EnumSource(World.Kind.class)
    void anOperationIsWaitedForOverKilledGateways(World.Kind kind) throws Exception {
        try (World world = kind.open(); VirtfleetClient client = world.clients().build(); Guests guests = new Guests(client)) {
            Domain domain = guests.make("nodes/n1");
            String name = client.domains()
                    .startDomain(StartDomainRequest.newBuilder().setName(domain.getName()).build())
                    .name();
            world.killGateway();
            List<OperationMetadata> seen = Collections.synchronizedList(new ArrayList<>());
            Domain started = client.operation(name, Domain.class).result(seen::add).get(60, TimeUnit.SECONDS);
            assertEquals(DomainState.DOMAIN_STATE_RUNNING, started.getStatus().getState());
            OperationMetadata last = seen.get(seen.size() - 1);
            assertEquals(domain.getName(), last.getTarget());
            assertTrue(last.getMethod().endsWith("StartDomain"), last.getMethod());
        }
    }

    @Test
    @WithFakeFleet
    void workThatTakesItsTimeIsPendingAndCanBeCancelled(FakeFleet fleet, VirtfleetClient client) throws Exception {
        try (Guests guests = new Guests(client)) {
            DomainSpec slow = Guests.small().toBuilder()
                    .setTest(dev.virtfleet.compute.v1.TestOptions.newBuilder()
                            .setPowerButtonDelay(com.google.protobuf.util.Durations.fromSeconds(600)))
                    .build();
            Domain domain = guests.make("nodes/n1", Guests.unique(), slow);
            client.domains()
                    .startDomain(StartDomainRequest.newBuilder().setName(domain.getName()).build())
                    .await(Guests.PATIENCE);
            var stopping = client.domains().stopDomain(StopDomainRequest.newBuilder()
                    .setName(domain.getName())
                    .setMode(StopMode.STOP_MODE_GRACEFUL)
                    .setGracePeriod(com.google.protobuf.util.Durations.fromSeconds(300))
                    .build());
            assertFalse(stopping.isDone());
            OperationPendingException pending =
                    assertThrows(OperationPendingException.class, () -> stopping.await(Duration.ofMillis(300)));
            assertEquals(stopping.name(), pending.operation());
            assertTrue(pending.obstacle().isEmpty());
            CompletableFuture<Domain> result = stopping.result();
            stopping.cancel();
            ExecutionException cancelled = assertThrows(ExecutionException.class, () -> result.get(30, TimeUnit.SECONDS));
            assertEquals(Reason.OPERATION_CANCELLED, VirtfleetException.of(cancelled).reason());
        }
    }

    @ParameterizedTest
    @EnumSource(World.Kind.class)
    void aDeadlineEndsACallToANodeThatDoesNotAnswer(World.Kind kind) throws Exception {
        try (World world = kind.open(); VirtfleetClient client = world.clients().build(); Guests guests = new Guests(client)) {
            Domain domain = guests.make("nodes/n2");
            GetDomainRequest request = GetDomainRequest.newBuilder().setName(domain.getName()).build();
            try (FakeFleet.Ending frozen = world.freeze("nodes/n2")) {
                VirtfleetException late = assertThrows(VirtfleetException.class, () -> client.domains()
                        .withDeadlineAfter(300, TimeUnit.MILLISECONDS)
                        .getDomain(request));
                assertEquals(Status.Code.DEADLINE_EXCEEDED, late.code());
            }
            Eventually.holds("it answers again", () -> answers(client, request));
        }
    }

    private static boolean answers(VirtfleetClient client, GetDomainRequest request) {
        try {
            return client.domains().withDeadlineAfter(5, TimeUnit.SECONDS).getDomain(request).getName().equals(request.getName());
        } catch (VirtfleetException notYet) {
            return false;
        }
    }

    @Test
    @WithFakeFleet(nodes = 2)
    void mutationsOverLostConnectionsHappenOnce(FakeFleet fleet, VirtfleetClient client) throws Exception {
        ExecutorService threads = Executors.newCachedThreadPool();
        AtomicBoolean cutting = new AtomicBoolean(true);
        try {
            Future<?> cuts = threads.submit((Callable<Void>) () -> {
                while (cutting.get()) {
                    fleet.cutConnections();
                    Thread.sleep(100);
                }
                return null;
            });
            List<Future<Long>> generations = new ArrayList<>();
            for (int worker = 0; worker < 8; worker++) {
                generations.add(threads.submit(() -> generationOfOne(client)));
            }
            for (Future<Long> generation : generations) {
                assertEquals(1, generation.get(60, TimeUnit.SECONDS));
            }
            cutting.set(false);
            cuts.get(30, TimeUnit.SECONDS);
        } finally {
            threads.shutdownNow();
        }
    }

    private static long generationOfOne(VirtfleetClient client) throws InterruptedException {
        while (true) {
            try {
                return new Guests(client).make("nodes/n1").getGeneration();
            } catch (VirtfleetException failure) {
                if (failure.code() != Status.Code.UNAVAILABLE) {
                    throw failure;
                }
                // Four times in a row; another id.
            }
        }
    }

    @Test
    @WithFakeFleet
    void anEffectWhoseAnswerWasLostIsNotMadeTwice(FakeFleet fleet, VirtfleetClient client) throws Exception {
        try (Guests guests = new Guests(client)) {
            fleet.inject("nodes/n1", failing("DomainService.CreateDomain", 2, true));
            assertEquals(1, guests.make("nodes/n1").getGeneration());
            fleet.inject("nodes/n1", failing("DomainService.CreateDomain", 4, false));
            VirtfleetException given = assertThrows(VirtfleetException.class, () -> guests.make("nodes/n1"));
            assertEquals(Reason.SERVICE_DRAINING, given.reason());
        }
    }

    private static Fault failing(String method, int count, boolean afterEffect) {
        return Fault.newBuilder()
                .setError(CallError.newBuilder()
                        .setMethodPattern(method)
                        .setReason("SERVICE_DRAINING")
                        .setCount(count)
                        .setAfterEffect(afterEffect))
                .build();
    }

    @Test
    @WithFakeFleet
    void callsThatNameNoResourceReachTheirNode(FakeFleet fleet, VirtfleetClient client) {
        HealthCheckResponse health = HealthGrpc.newBlockingStub(client.channelTo("n1/compute"))
                .check(HealthCheckRequest.getDefaultInstance());
        assertEquals(HealthCheckResponse.ServingStatus.SERVING, health.getStatus());
        VirtfleetException unknown = VirtfleetException.of(assertThrows(
                io.grpc.StatusRuntimeException.class,
                () -> HealthGrpc.newBlockingStub(client.channelTo("n9/compute"))
                        .check(HealthCheckRequest.getDefaultInstance())));
        assertEquals(Reason.NODE_UNKNOWN, unknown.reason());
    }

    @Test
    @WithFakeFleet
    void itIsReadyWhenTheFleetAnswers(FakeFleet fleet, VirtfleetClient client) throws Exception {
        fleet.killGateway(Duration.ofSeconds(1));
        client.awaitReady(Duration.ofSeconds(30));
        assertEquals("tls", client.access().whoAmI(WhoAmIRequest.getDefaultInstance()).getTransport());
        try (FakeFleet.Ending thaw = fleet.freeze("")) {
            VirtfleetException silent =
                    assertThrows(VirtfleetException.class, () -> client.awaitReady(Duration.ofMillis(500)));
            assertEquals(Status.Code.DEADLINE_EXCEEDED, silent.code());
        }
    }
}

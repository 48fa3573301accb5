package dev.virtfleet.testing;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertNotEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.virtfleet.client.PartialListException;
import dev.virtfleet.client.Reason;
import dev.virtfleet.client.ResourceWatch;
import dev.virtfleet.client.VirtfleetClient;
import dev.virtfleet.client.VirtfleetException;
import dev.virtfleet.client.WatchOptions;
import dev.virtfleet.client.informer.Indexes;
import dev.virtfleet.client.informer.Informer;
import dev.virtfleet.client.informer.InformerHandler;
import dev.virtfleet.client.informer.InformerStatistics;
import dev.virtfleet.client.informer.Informers;
import dev.virtfleet.compute.v1.BatchStartDomainsRequest;
import dev.virtfleet.compute.v1.BatchStopDomainsRequest;
import dev.virtfleet.compute.v1.Change;
import dev.virtfleet.compute.v1.Domain;
import dev.virtfleet.compute.v1.DomainResult;
import dev.virtfleet.compute.v1.ListDomainsRequest;
import dev.virtfleet.compute.v1.StartDomainRequest;
import dev.virtfleet.compute.v1.StopDomainRequest;
import dev.virtfleet.compute.v1.StopMode;
import dev.virtfleet.compute.v1.WatchResourcesRequest;
import dev.virtfleet.compute.v1.WatchResourcesResponse;
import dev.virtfleet.fake.v1.Fake;
import dev.virtfleet.type.v1.NodeFailure;
import dev.virtfleet.type.v1.ResourceView;
import dev.virtfleet.type.v1.SourceState;
import io.grpc.Status;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;
import java.util.stream.Collectors;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.EnumSource;

class InformerFleetTest {

    @ParameterizedTest
    @EnumSource(World.Kind.class)
    void anInformerOutlivesKilledGatewaysWithoutAList(World.Kind kind) throws Exception {
        try (World world = kind.open()) {
            outlives(world, world::killGateway);
        }
    }

    @ParameterizedTest
    @EnumSource(World.Kind.class)
    void anInformerOutlivesDrainedGatewaysWithoutAList(World.Kind kind) throws Exception {
        try (World world = kind.open()) {
            outlives(world, world::drainGateway);
        }
    }

    private static void outlives(World world, Runnable end) throws Exception {
        Census sent = new Census();
        try (VirtfleetClient others = world.clients().build();
                VirtfleetClient own = world.clients().intercept(sent).build();
                Guests guests = new Guests(others);
                Observed domains = Observed.all(own)) {
            Domain before = guests.make("nodes/n1");
            Eventually.holds("a new domain is known", () -> domains.knows(before));
            for (int round = 1; round <= 2; round++) {
                end.run();
                Eventually.holds("another gateway serves", () -> World.isWhole(others));
                Domain after = guests.make("nodes/n2");
                Eventually.holds("a domain that was made afterwards is known", () -> domains.knows(after));
                guests.remove(after.getName());
                Eventually.holds("its end is known", () -> !domains.knows(after));
                assertTrue(domains.informer().statistics().resumptions() >= round);
            }
            assertTrue(domains.knows(before));
            assertFalse(domains.hasDeleted(before));
            assertEquals(1, sent.fresh());
            assertEquals(0, sent.lists());
            assertTrue(sent.resumed() >= 2);
            assertEquals(1, domains.informer().statistics().snapshots());
            if (world instanceof World.FakeWorld fake) {
                Fake counted = fake.fleet().state(); // what the gateway itself has counted
                assertEquals(1, counted.getFreshWatchCount());
                assertTrue(counted.getResumedWatchCount() >= 2);
            }
        }
    }

    @ParameterizedTest
    @EnumSource(World.Kind.class)
    void aNodeThatIsAwayIsToldAndKept(World.Kind kind) throws Exception {
        try (World world = kind.open();
                VirtfleetClient client = world.clients().build();
                Guests guests = new Guests(client);
                Observed domains = Observed.all(client)) {
            Domain domain = guests.make("nodes/n2");
            Eventually.holds("it is known", () -> domains.knows(domain));
            FakeFleet.Ending frozen = world.freeze("nodes/n2");
            try {
                Eventually.holds("the node is told as stale", () -> domains.told().contains("nodes/n2 SOURCE_STATE_STALE"));
                assertTrue(domains.knows(domain));
                assertNotEquals(SourceState.SOURCE_STATE_LIVE, domains.source("nodes/n2"));
                assertEquals(SourceState.SOURCE_STATE_LIVE, domains.source("nodes/n1"));

                VirtfleetException away = assertThrows(VirtfleetException.class, () -> client.domains()
                        .withDeadlineAfter(3, TimeUnit.SECONDS)
                        .getDomain(dev.virtfleet.compute.v1.GetDomainRequest.newBuilder()
                                .setName(domain.getName())
                                .build()));
                assertTrue(away.reason() == Reason.NODE_UNREACHABLE || away.code() == Status.Code.DEADLINE_EXCEEDED);

                var list = client.domains().listDomains(ListDomainsRequest.newBuilder().setParent("nodes/-").build());
                PartialListException partial = assertThrows(PartialListException.class, list::toList);
                assertEquals("nodes/n2", partial.failures().get(0).getNode());
                List<NodeFailure> missing = new ArrayList<>();
                list.tolerating(missing::add).toList();
                assertEquals(List.of("nodes/n2"), missing.stream().map(NodeFailure::getNode).toList());
            } finally {
                frozen.close();
            }
            Eventually.holds("the node is live again", () -> domains.source("nodes/n2") == SourceState.SOURCE_STATE_LIVE);
            assertFalse(domains.hasDeleted(domain));
        }
    }

    @Test
    @WithFakeFleet(nodes = 2)
    void aLogThatDoesNotReachBackIsReadAnewForThatNodeAlone(FakeFleet fleet, VirtfleetClient client) throws Exception {
        try (Guests guests = new Guests(client); Observed domains = Observed.all(client)) {
            Domain kept = guests.make("nodes/n1");
            Domain deleted = guests.make("nodes/n1");
            Eventually.holds("both are known", () -> domains.knows(kept) && domains.knows(deleted));
            WatchResourcesRequest later = WatchResourcesRequest.newBuilder()
                    .setParent("nodes/-")
                    .setResumeToken(tokenAfterSnapshot(client, "nodes/-"))
                    .build();
            guests.remove(deleted.getName());
            fleet.compactLogs("nodes/n1");
            fleet.killGateway(Duration.ZERO);
            Eventually.holds("the end of one is known", () -> !domains.knows(deleted));
            Eventually.holds("the informer goes on", () ->
                    domains.informer().statistics().resumptions() > 0 && domains.informer().isConnected());
            assertTrue(domains.knows(kept));
            assertFalse(domains.hasDeleted(kept));
            assertEquals(1, domains.informer().statistics().snapshots());

            // Who comes with the token of before is told that the node is read anew, and all of it.
            List<String> told = new ArrayList<>();
            try (ResourceWatch<WatchResourcesResponse> watch = client.computeWatch().watchResources(later)) {
                while (!told.contains("SOURCE_STATE_LIVE") && watch.hasNext()) {
                    WatchResourcesResponse answer = watch.next();
                    for (Change change : answer.getChangesList()) {
                        told.add(change.getPut().getDomain().getName());
                    }
                    if (answer.getSourceStatus().getNode().equals("nodes/n1")) {
                        told.add(answer.getSourceStatus().getState().toString());
                    }
                }
            }
            List<String> anew = told.subList(told.indexOf("SOURCE_STATE_RESYNCING"), told.indexOf("SOURCE_STATE_LIVE"));
            assertTrue(anew.contains(kept.getName()), told.toString());
            assertFalse(anew.contains(deleted.getName()), told.toString());

            // At the node itself the token is refused: a watch ends, and an informer of one node begins anew.
            WatchResourcesRequest old = WatchResourcesRequest.newBuilder()
                    .setParent("nodes/n1")
                    .setResumeToken(tokenAfterSnapshot(client, "nodes/n1"))
                    .build();
            guests.remove(guests.make("nodes/n1").getName());
            try (Observed one = Observed.of(Informers.domains(client).parent("nodes/n1"))) {
                fleet.compactLogs("nodes/n1");
                fleet.cutConnections();
                Eventually.holds("it goes on", () -> {
                    InformerStatistics seen = one.informer().statistics();
                    return seen.resumptions() + seen.snapshots() > 1 && one.informer().isConnected();
                });
                assertTrue(one.knows(kept));
                assertFalse(one.hasDeleted(kept));
                assertEquals(1, one.informer().size());
            }
            try (ResourceWatch<WatchResourcesResponse> refused = client.computeWatch().watchResources(old)) {
                assertEquals(
                        Reason.RESUME_TOKEN_COMPACTED,
                        assertThrows(VirtfleetException.class, refused::hasNext).reason());
                assertFalse(refused.hasNext());
            }
            List<WatchOptions.Begin> begun = new ArrayList<>();
            WatchOptions again = WatchOptions.standard().resnapshotting().onBegin(begun::add);
            try (ResourceWatch<WatchResourcesResponse> anyhow = client.computeWatch().watchResources(old, again)) {
                assertTrue(anyhow.hasNext());
                assertEquals(List.of(WatchOptions.Begin.SNAPSHOT), begun);
            }
        }
    }

    private static String tokenAfterSnapshot(VirtfleetClient client, String parent) {
        WatchResourcesRequest request = WatchResourcesRequest.newBuilder().setParent(parent).build();
        try (ResourceWatch<WatchResourcesResponse> watch = client.computeWatch().watchResources(request)) {
            while (!watch.next().hasSnapshotEnd()) {
                assertEquals("", watch.resumeToken());
            }
            return watch.resumeToken();
        }
    }

    @Test
    @WithFakeFleet(nodes = 2)
    void whatMovesStaysOneObject(FakeFleet fleet, VirtfleetClient client) throws Exception {
        try (Guests guests = new Guests(client); Observed domains = Observed.all(client)) {
            Domain domain = guests.make("nodes/n1");
            Eventually.holds("it is known", () -> domains.knows(domain));
            String moved = fleet.moveDomain(domain.getName(), "n2");
            guests.renamed(domain.getName(), moved);
            Eventually.holds("the move is told", () -> domains.told().contains("moved " + domain.getName() + " " + moved));
            assertEquals(moved, domains.informer().get(domain.getUid()).orElseThrow().getName());
            assertEquals(domain.getUid(), domains.informer().named(moved).orElseThrow().getUid());
            assertEquals(1, domains.informer().size());
            assertFalse(domains.hasDeleted(domain));
            assertFalse(domains.told().contains("added " + moved));
            VirtfleetException gone =
                    assertThrows(VirtfleetException.class, () -> guests.get(domain.getName()));
            assertEquals(Reason.RESOURCE_MOVED, gone.reason());
            assertEquals(moved, gone.newName().orElseThrow());
        }
    }

    @Test
    @WithFakeFleet(nodes = 10, domains = 1000)
    void tenThousandDomainsAndASlowReader(FakeFleet fleet, VirtfleetClient client) throws Exception {
        int all = 10_000;
        ListDomainsRequest request = ListDomainsRequest.newBuilder()
                .setParent("nodes/-")
                .setView(ResourceView.RESOURCE_VIEW_BASIC)
                .build();
        // On a crowded machine a node may be out of reach for a moment.
        Eventually.holds("the pages hold them all", () -> client.domains()
                        .listDomains(request)
                        .tolerating(missing -> {})
                        .stream()
                        .map(Domain::getName)
                        .distinct()
                        .count()
                == all);
        CountDownLatch blocked = new CountDownLatch(1);
        CountDownLatch release = new CountDownLatch(1);
        // A handler that blocks is the slowest reader that there is.
        InformerHandler<Domain> blocking = new InformerHandler<>() {
            @Override
            public void changed(Domain before, Domain after) {
                blocked.countDown();
                try {
                    release.await();
                } catch (InterruptedException interrupted) {
                    throw new IllegalStateException(interrupted);
                }
            }
        };
        try (VirtfleetClient other = fleet.connect();
                Informer<Domain> slow = Informers.domains(other).packed().handler(blocking).start();
                Observed quick = Observed.all(client)) {
            slow.awaitSynced(Guests.PATIENCE);
            assertEquals(all, quick.informer().size());
            assertEquals(all, slow.size());
            assertEquals(1000, quick.informer().count(Indexes.NODE, "nodes/n3"));
            List<String> names =
                    quick.informer().find(Indexes.NODE, "nodes/n1").stream().map(Domain::getName).toList();
            for (int round = 0; round < 2; round++) {
                stop(client, names);
                start(client, names);
            }
            assertTrue(blocked.await(60, TimeUnit.SECONDS));
            new Guests(client).remove(names.get(0));
            Eventually.holds("the quick reader knows the end of one", () ->
                    quick.informer().named(names.get(0)).isEmpty());
            assertTrue(slow.named(names.get(0)).isPresent(), "the slow reader is not slow");
            release.countDown();
            Eventually.holds("the slow reader knows the end of one", () -> slow.named(names.get(0)).isEmpty());
            Eventually.holds("both know the same", () -> states(slow).equals(states(quick.informer())));
        }
    }

    private static String states(Informer<Domain> domains) {
        return domains.stream()
                .map(domain -> domain.getName() + " " + domain.getStatus().getRuntimeId() + domain.getStatus().getState())
                .sorted()
                .collect(Collectors.joining("\n"));
    }

    private static void stop(VirtfleetClient client, List<String> names) throws InterruptedException {
        var request = BatchStopDomainsRequest.newBuilder().setParent("nodes/n1");
        names.forEach(name -> request.addRequests(
                StopDomainRequest.newBuilder().setName(name).setMode(StopMode.STOP_MODE_FORCE)));
        succeeded(client.domains().batchStopDomains(request.build()).await(Guests.PATIENCE).getResultsList());
    }

    private static void start(VirtfleetClient client, List<String> names) throws InterruptedException {
        var request = BatchStartDomainsRequest.newBuilder().setParent("nodes/n1");
        names.forEach(name -> request.addRequests(StartDomainRequest.newBuilder().setName(name)));
        succeeded(client.domains().batchStartDomains(request.build()).await(Guests.PATIENCE).getResultsList());
    }

    private static void succeeded(List<DomainResult> results) {
        results.forEach(result -> VirtfleetException.ofStatus(result.getStatus()).ifPresent(failure -> {
            throw failure;
        }));
    }
}

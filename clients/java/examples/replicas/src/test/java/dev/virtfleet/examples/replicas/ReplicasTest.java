package dev.virtfleet.examples.replicas;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.fail;

import dev.virtfleet.client.Reason;
import dev.virtfleet.client.VirtfleetClient;
import dev.virtfleet.client.VirtfleetException;
import dev.virtfleet.compute.v1.Domain;
import dev.virtfleet.compute.v1.DomainSpec;
import dev.virtfleet.compute.v1.DomainState;
import dev.virtfleet.compute.v1.GetDomainRequest;
import dev.virtfleet.compute.v1.ListDomainsRequest;
import dev.virtfleet.compute.v1.Memory;
import dev.virtfleet.compute.v1.StopDomainRequest;
import dev.virtfleet.compute.v1.StopMode;
import dev.virtfleet.testing.FakeFleet;
import dev.virtfleet.testing.WithFakeFleet;
import java.time.Duration;
import java.util.List;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.TimeUnit;
import java.util.function.BooleanSupplier;
import org.junit.jupiter.api.Test;

class ReplicasTest {

    private static final Domain TEMPLATE = Domain.newBuilder()
            .putLabels(Replicas.GROUP_LABEL, "web")
            .setSpec(DomainSpec.newBuilder()
                    .setDriver("test")
                    .setMemory(Memory.newBuilder().setMaximumBytes(64 << 20)))
            .build();

    private VirtfleetClient client;

    /** Returns the domains of the group, as the fleet itself says; none while the gateway is away. */
    private List<Domain> ours() {
        try {
            return client.domains()
                    .withDeadlineAfter(10, TimeUnit.SECONDS)
                    .listDomains(ListDomainsRequest.newBuilder()
                            .setParent("nodes/-")
                            .setFilter("labels.\"" + Replicas.GROUP_LABEL + "\"=web")
                            .setAllowStale(true)
                            .build())
                    .toList();
        } catch (VirtfleetException away) {
            return List.of();
        }
    }

    private List<Domain> on(String... nodes) {
        return ours().stream()
                .filter(domain -> List.of(nodes).contains(domain.getName().substring(0, "nodes/n1".length())))
                .toList();
    }

    private static boolean run(List<Domain> domains, int count) {
        return domains.size() == count
                && domains.stream().allMatch(domain -> domain.getStatus().getState() == DomainState.DOMAIN_STATE_RUNNING);
    }

    private boolean isSpread() {
        return run(on("nodes/n1"), 2) && run(on("nodes/n2"), 2) && run(on("nodes/n3"), 2);
    }

    private static List<String> uids(List<Domain> domains) {
        return domains.stream().map(Domain::getUid).sorted().toList();
    }

    private static void until(String what, BooleanSupplier holds) throws InterruptedException {
        for (long end = System.nanoTime() + TimeUnit.MINUTES.toNanos(1); !holds.getAsBoolean(); Thread.sleep(50)) {
            if (System.nanoTime() > end) {
                fail(what + ": not within a minute");
            }
        }
    }

    @Test
    @WithFakeFleet(nodes = 3)
    void itKeepsItsCountThroughEverything(FakeFleet fleet, VirtfleetClient admin) throws Exception {
        client = admin;
        try (VirtfleetClient own = fleet.connect(); Replicas replicas = new Replicas(own, 6, TEMPLATE)) {
            CompletableFuture<Void> running = CompletableFuture.runAsync(() -> {
                try {
                    replicas.run();
                } catch (Exception failure) {
                    throw new IllegalStateException(failure);
                }
            });
            until("six run, two on each node", this::isSpread);

            Domain victim = on("nodes/n2").get(0);
            client.domains().stopDomain(StopDomainRequest.newBuilder()
                    .setName(victim.getName())
                    .setMode(StopMode.STOP_MODE_FORCE)
                    .build()).await(Duration.ofSeconds(30));
            until("the dead one is replaced", () -> isGone(victim) && isSpread());

            try (Replicas others = new Replicas(client, 6, TEMPLATE)) {
                others.create("nodes/n1");
                others.create("nodes/n1");
            }
            until("the surplus is gone", () -> run(ours(), 6));

            List<String> before = uids(ours());
            fleet.killGateway(Duration.ofSeconds(1));
            until("all are there after the gateway was killed", () -> run(ours(), 6));
            assertEquals(before, uids(ours()), "domains were replaced because the gateway was killed");

            FakeFleet.Ending away = fleet.away("nodes/n3");
            int lost = on("nodes/n3").size();
            Thread.sleep(2000);
            assertEquals(6 - lost, on("nodes/n1", "nodes/n2").size(), "what runs out of reach is replaced too early");
            fleet.advanceTime(Duration.ofMinutes(2));
            until("those of the lost node are replaced", () -> run(on("nodes/n1", "nodes/n2"), 6));
            away.close();
            until("the surplus that comes back is gone", () -> run(ours(), 6));

            assertFalse(running.isDone());
            replicas.close();
            running.get(10, TimeUnit.SECONDS);
        }
    }

    private boolean isGone(Domain domain) {
        try {
            client.domains().getDomain(GetDomainRequest.newBuilder().setName(domain.getName()).build());
            return false;
        } catch (VirtfleetException failure) {
            return failure.reason() == Reason.RESOURCE_NOT_FOUND;
        }
    }
}

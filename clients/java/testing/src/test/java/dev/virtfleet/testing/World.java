package dev.virtfleet.testing;

import com.google.protobuf.util.Durations;
import dev.virtfleet.client.PartialListException;
import dev.virtfleet.client.VirtfleetClient;
import dev.virtfleet.client.VirtfleetException;
import dev.virtfleet.compute.v1.ListDomainsRequest;
import dev.virtfleet.fleet.v1.ListNodesRequest;
import dev.virtfleet.fleet.v1.Node;
import dev.virtfleet.fleet.v1.NodeState;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.file.Files;
import java.nio.file.NoSuchFileException;
import java.nio.file.Path;
import java.time.Duration;
import java.util.List;
import java.util.Optional;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.locks.ReentrantLock;
import java.util.function.Supplier;
import java.util.stream.Stream;

/**
 * A fleet with two nodes, and what can be done to it: a fake one of the test's own, or the real one of the environment
 * (VIRTFLEET_ADDRESS and the files beside it, and VIRTFLEET_RUN with the pid files of its processes).
 */
interface World extends AutoCloseable {

    /** The worlds that there are. */
    enum Kind {
        FAKE(() -> new FakeWorld(FakeFleet.builder().nodes(2).start())),
        REAL(RealWorld::new);

        private final Supplier<World> maker;

        Kind(Supplier<World> maker) {
            this.maker = maker;
        }

        World open() {
            return maker.get();
        }
    }

    VirtfleetClient.Builder clients();

    /** Ends the gateway by SIGKILL; another takes its place. */
    void killGateway();

    /** Ends it in good order; another takes its place. */
    void drainGateway();

    /** Stops a node without closing anything, until the result is closed. */
    FakeFleet.Ending freeze(String node);

    @Override
    void close();

    /** Tells whether all nodes are ready and their parts are in the lists. */
    static boolean isWhole(VirtfleetClient client) {
        try {
            List<Node> nodes = client.nodes()
                    .withDeadlineAfter(10, TimeUnit.SECONDS)
                    .listNodes(ListNodesRequest.getDefaultInstance())
                    .toList();
            client.domains()
                    .withDeadlineAfter(10, TimeUnit.SECONDS)
                    .listDomains(ListDomainsRequest.newBuilder().setParent("nodes/-").build())
                    .toList();
            return nodes.size() >= 2
                    && nodes.stream().allMatch(node -> node.getStatus().getState() == NodeState.NODE_STATE_READY);
        } catch (VirtfleetException | PartialListException notYet) {
            return false;
        }
    }

    /** A fleet in one process. */
    record FakeWorld(FakeFleet fleet) implements World {

        private static final Duration PAUSE = Duration.ofMillis(200);

        @Override
        public VirtfleetClient.Builder clients() {
            return fleet.clientBuilder();
        }

        @Override
        public void killGateway() {
            fleet.killGateway(PAUSE);
        }

        @Override
        public void drainGateway() {
            fleet.drainGateway(PAUSE);
        }

        @Override
        public FakeFleet.Ending freeze(String node) {
            return fleet.freeze(node);
        }

        @Override
        public void close() {
            fleet.close();
        }
    }

    /** The processes that `make up` has started. */
    final class RealWorld implements World {

        /** Held by the test that does something to the real fleet. Fake fleets are each test's own. */
        private static final ReentrantLock ONE_AT_A_TIME = new ReentrantLock();

        private final Path run;

        RealWorld() {
            String folder = System.getenv("VIRTFLEET_RUN");
            if (folder == null || System.getenv("VIRTFLEET_ADDRESS") == null) {
                throw new IllegalStateException("no fleet: VIRTFLEET_ADDRESS and VIRTFLEET_RUN name it; "
                        + "`python -m pytest tests/clients/test_java.py` starts one");
            }
            run = Path.of(folder);
            ONE_AT_A_TIME.lock();
        }

        @Override
        public VirtfleetClient.Builder clients() {
            return VirtfleetClient.builder();
        }

        private Optional<String> pid(String place) {
            try {
                return Optional.of(Files.readString(run.resolve(place + ".pid")).strip()).filter(pid -> !pid.isEmpty());
            } catch (NoSuchFileException gone) {
                return Optional.empty();
            } catch (IOException failure) {
                throw new UncheckedIOException(failure);
            }
        }

        private static void signal(String name, String pid) {
            try {
                if (new ProcessBuilder("kill", "-" + name, pid).start().waitFor() != 0) {
                    throw new IllegalStateException("process " + pid + " takes no " + name);
                }
            } catch (IOException | InterruptedException failure) {
                throw new IllegalStateException(failure);
            }
        }

        private void replaceGateway(String signal) {
            String before = pid("gateway").orElseThrow();
            signal(signal, before);
            Eventually.holds("another gateway runs", () -> pid("gateway").filter(pid -> !pid.equals(before)).isPresent());
        }

        @Override
        public void killGateway() {
            replaceGateway("KILL");
        }

        @Override
        public void drainGateway() {
            replaceGateway("TERM");
        }

        @Override
        public FakeFleet.Ending freeze(String node) {
            List<String> pids = Stream.of("compute", "storage", "network")
                    .map(service -> pid(node.substring("nodes/".length()) + "/" + service).orElseThrow())
                    .toList();
            pids.forEach(pid -> signal("STOP", pid));
            return () -> pids.forEach(pid -> signal("CONT", pid));
        }

        @Override
        public void close() {
            try (VirtfleetClient client = clients().build()) {
                Eventually.holds("the fleet is whole again", () -> isWhole(client));
            } finally {
                ONE_AT_A_TIME.unlock();
            }
        }
    }
}

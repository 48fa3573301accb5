package dev.virtfleet.testing;

import com.google.gson.JsonObject;
import com.google.gson.JsonParseException;
import com.google.gson.JsonParser;
import com.google.protobuf.util.Durations;
import dev.virtfleet.client.Credentials;
import dev.virtfleet.client.VirtfleetClient;
import dev.virtfleet.fake.v1.AdvanceTimeRequest;
import dev.virtfleet.fake.v1.Away;
import dev.virtfleet.fake.v1.ClearFaultsRequest;
import dev.virtfleet.fake.v1.CompactLogsRequest;
import dev.virtfleet.fake.v1.CutConnectionsRequest;
import dev.virtfleet.fake.v1.Fake;
import dev.virtfleet.fake.v1.FakeServiceGrpc;
import dev.virtfleet.fake.v1.Fault;
import dev.virtfleet.fake.v1.Freeze;
import dev.virtfleet.fake.v1.GetFakeRequest;
import dev.virtfleet.fake.v1.InjectFaultRequest;
import dev.virtfleet.fake.v1.MoveDomainRequest;
import dev.virtfleet.fake.v1.RestartGatewayRequest;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStream;
import java.io.InputStreamReader;
import java.io.UncheckedIOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.Map;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.TimeoutException;
import java.util.function.Consumer;

/**
 * A fake fleet that runs, until it is closed. Threads may share it. No method takes or returns null.
 *
 * <p>Its methods are the short forms of what is needed most; {@link #control} has the rest. They throw
 * {@link io.grpc.StatusRuntimeException} when the fleet does not heed them.
 */
public final class FakeFleet implements AutoCloseable {

    /** Two seconds on an idle machine; many tests at once may crowd it. */
    private static final Duration START_TIMEOUT = Duration.ofMinutes(3);

    private static final Duration END_TIMEOUT = Duration.ofSeconds(20);
    private static final Duration CONTROL_TIMEOUT = Duration.ofSeconds(30);

    private final Process process;
    private final List<String> said;
    private final String address;
    private final Credentials credentials;
    private final ManagedChannel channel;

    /** Ends a fault. Again, it does nothing more than the first time. */
    @FunctionalInterface
    public interface Ending extends AutoCloseable {

        /** Ends it. */
        @Override
        void close();
    }

    private FakeFleet(Process process, List<String> said, JsonObject ready) {
        this.process = process;
        this.said = said;
        address = ready.get("address").getAsString();
        credentials = new Credentials(
                Path.of(ready.get("ca_file").getAsString()),
                Path.of(ready.get("cert_file").getAsString()),
                Path.of(ready.get("key_file").getAsString()));
        channel = Grpc.newChannelBuilder(
                        ready.get("control_address").getAsString(), InsecureChannelCredentials.create())
                .build();
    }

    /**
     * Starts a fake fleet of one node without domains.
     *
     * @return the fleet, which is to be closed
     */
    public static FakeFleet start() {
        return builder().start();
    }

    /** {@return a builder, for another fleet than one node without domains} */
    public static Builder builder() {
        return new Builder();
    }

    /** {@return where the gateway is: {@code host:port}, for mutual TLS} */
    public String address() {
        return address;
    }

    /** {@return the files of an administrator} */
    public Credentials credentials() {
        return credentials;
    }

    /** {@return the variables by which another program finds the fleet: VIRTFLEET_ADDRESS and the files beside it} */
    public Map<String, String> environment() {
        return Map.of(
                "VIRTFLEET_ADDRESS", address,
                "VIRTFLEET_CA_FILE", credentials.caFile().toString(),
                "VIRTFLEET_CERT_FILE", credentials.certFile().toString(),
                "VIRTFLEET_KEY_FILE", credentials.keyFile().toString());
    }

    /** {@return a new client of an administrator, which is to be closed} */
    public VirtfleetClient connect() {
        return clientBuilder().build();
    }

    /** {@return a builder of clients of an administrator} */
    public VirtfleetClient.Builder clientBuilder() {
        return VirtfleetClient.builder().address(address).credentials(credentials);
    }

    /** {@return the stub that steers the fleet; no fault reaches it} */
    public FakeServiceGrpc.FakeServiceBlockingStub control() {
        return FakeServiceGrpc.newBlockingStub(channel)
                .withDeadlineAfter(CONTROL_TIMEOUT.toMillis(), TimeUnit.MILLISECONDS);
    }

    /**
     * Puts a fault in force.
     *
     * @param node {@code nodes/n1}; empty: on the connections of clients
     * @param fault the fault
     * @return what ends it
     */
    public Ending inject(String node, Fault fault) {
        String id = control()
                .injectFault(InjectFaultRequest.newBuilder().setName(node).setFault(fault).build())
                .getFaultId();
        return () -> control()
                .clearFaults(ClearFaultsRequest.newBuilder().setName(node).setFaultId(id).build());
    }

    /**
     * Cuts a node off: connections to it are cut and refused.
     *
     * @param node {@code nodes/n1}
     * @return what brings it back
     */
    public Ending away(String node) {
        return inject(node, Fault.newBuilder().setAway(Away.getDefaultInstance()).build());
    }

    /**
     * Stops a node without closing anything.
     *
     * @param node {@code nodes/n1}; empty: the connections of clients
     * @return what lets it go on
     */
    public Ending freeze(String node) {
        return inject(node, Fault.newBuilder().setFreeze(Freeze.getDefaultInstance()).build());
    }

    /** Cuts all connections of clients, in the middle of their calls. */
    public void cutConnections() {
        control().cutConnections(CutConnectionsRequest.getDefaultInstance());
    }

    /**
     * Ends the gateway as SIGKILL does, and starts it again.
     *
     * @param pause how long it is away
     */
    public void killGateway(Duration pause) {
        control().restartGateway(RestartGatewayRequest.newBuilder().setPause(proto(pause)).build());
    }

    /**
     * Ends the gateway in good order, and starts it again.
     *
     * @param pause how long it is away
     */
    public void drainGateway(Duration pause) {
        control()
                .restartGateway(RestartGatewayRequest.newBuilder().setPause(proto(pause)).setDrain(true).build());
    }

    /**
     * Makes resume tokens too old.
     *
     * @param node those of {@code nodes/n1}; empty: of all nodes
     */
    public void compactLogs(String node) {
        control().compactLogs(CompactLogsRequest.newBuilder().setName(node).build());
    }

    /**
     * Moves a domain to another node, as a migration does.
     *
     * @param name the domain
     * @param node the id of the node: {@code n2}
     * @return its new name
     */
    public String moveDomain(String name, String node) {
        return control()
                .moveDomain(MoveDomainRequest.newBuilder().setName(name).setTargetNode(node).build())
                .getNewName();
    }

    /**
     * Moves the time of the whole fleet forward.
     *
     * @param by how far
     */
    public void advanceTime(Duration by) {
        control().advanceTime(AdvanceTimeRequest.newBuilder().setDuration(proto(by)).build());
    }

    /** {@return how the fleet stands: its faults, and how many watches began afresh or went on from a token} */
    public Fake state() {
        return control().getFake(GetFakeRequest.getDefaultInstance());
    }

    private static com.google.protobuf.Duration proto(Duration duration) {
        return Durations.fromNanos(duration.toNanos());
    }

    /**
     * Ends the fleet.
     *
     * @throws IllegalStateException it has not ended well; the message has what it said
     */
    @Override
    public void close() {
        channel.shutdownNow();
        if (process.isAlive()) {
            end(process);
        }
        if (process.exitValue() != 0) {
            throw new IllegalStateException("the fake fleet ended with " + process.exitValue() + ": " + text(said));
        }
    }

    private static void end(Process process) {
        try {
            process.getOutputStream().close();
            if (!process.waitFor(END_TIMEOUT.toSeconds(), TimeUnit.SECONDS)) {
                process.destroyForcibly().waitFor();
            }
        } catch (IOException broken) {
            process.destroyForcibly();
        } catch (InterruptedException interrupted) {
            process.destroyForcibly();
            Thread.currentThread().interrupt();
        }
    }

    private static String text(List<String> said) {
        synchronized (said) {
            return String.join("\n", said);
        }
    }

    private static void follow(InputStream from, Consumer<String> each) {
        Thread thread = new Thread(() -> {
            try (var lines = new BufferedReader(new InputStreamReader(from, StandardCharsets.UTF_8))) {
                lines.lines().forEach(each);
            } catch (IOException | UncheckedIOException ended) {
                return; // the process is gone, and with it what it had to say
            }
        }, "virtfleet-fake");
        thread.setDaemon(true);
        thread.start();
    }

    /** Says what a fake fleet has. Not for several threads at once. */
    public static final class Builder {

        private final List<String> options = new ArrayList<>();

        private Builder() {}

        /**
         * Sets how many nodes there are: n1, n2 and so on. Without it there is one.
         *
         * @param count how many
         * @return this
         */
        public Builder nodes(int count) {
            return option("--nodes", Integer.toString(count));
        }

        /**
         * Sets how many running domains each node has from the start. Without it there are none.
         *
         * @param count how many
         * @return this
         */
        public Builder domains(int count) {
            return option("--domains", Integer.toString(count));
        }

        /**
         * Names a file with the domains of each node.
         *
         * @param path the file, TOML or JSON
         * @return this
         */
        public Builder seedFile(Path path) {
            return option("--seed-file", path.toString());
        }

        /**
         * Puts a fault in force from the start.
         *
         * @param text {@code n7=freeze}, {@code n9=latency:300ms}
         * @return this
         */
        public Builder fault(String text) {
            return option("--fault", text);
        }

        private Builder option(String name, String value) {
            options.add(name);
            options.add(value);
            return this;
        }

        /**
         * Starts the fleet and waits until all of its nodes are ready.
         *
         * @return the fleet, which is to be closed
         * @throws IllegalStateException that does not come about; the message has what the program said
         */
        public FakeFleet start() {
            String named = System.getenv().getOrDefault("VIRTFLEET_FAKE_COMMAND", "").strip();
            List<String> command = new ArrayList<>(List.of((named.isEmpty() ? "virtfleet fake" : named).split("\\s+")));
            command.add("--until-eof");
            command.addAll(options);
            List<String> said = Collections.synchronizedList(new ArrayList<>());
            try {
                Process process = new ProcessBuilder(command).start();
                follow(process.getErrorStream(), said::add);
                CompletableFuture<String> line = new CompletableFuture<>();
                follow(process.getInputStream(), line::complete);
                process.onExit().thenAccept(ended -> line.completeExceptionally(
                        new IllegalStateException("it ended with " + ended.exitValue())));
                return new FakeFleet(process, said, ready(process, line, said));
            } catch (IOException failure) {
                throw new IllegalStateException(
                        "no fake fleet: " + failure.getMessage() + " (VIRTFLEET_FAKE_COMMAND names the program)", failure);
            }
        }

        private static JsonObject ready(Process process, CompletableFuture<String> line, List<String> said) {
            try {
                String text = line.get(START_TIMEOUT.toSeconds(), TimeUnit.SECONDS);
                return JsonParser.parseString(text).getAsJsonObject();
            } catch (ExecutionException | TimeoutException | JsonParseException failure) {
                end(process);
                throw new IllegalStateException("the fake fleet does not say where it is: " + text(said), failure);
            } catch (InterruptedException interrupted) {
                end(process);
                Thread.currentThread().interrupt();
                throw new IllegalStateException("interrupted while the fake fleet was starting", interrupted);
            }
        }
    }
}

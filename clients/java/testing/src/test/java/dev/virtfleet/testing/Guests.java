package dev.virtfleet.testing;

import dev.virtfleet.client.Operation;
import dev.virtfleet.client.VirtfleetClient;
import dev.virtfleet.compute.v1.CreateDomainRequest;
import dev.virtfleet.compute.v1.DeleteDomainRequest;
import dev.virtfleet.compute.v1.Domain;
import dev.virtfleet.compute.v1.DomainSpec;
import dev.virtfleet.compute.v1.GetDomainRequest;
import dev.virtfleet.compute.v1.Memory;
import java.time.Duration;
import java.util.ArrayDeque;
import java.util.Deque;
import java.util.concurrent.atomic.AtomicLong;

/** The domains of a test, which are deleted with it. */
final class Guests implements AutoCloseable {

    static final Duration PATIENCE = Duration.ofSeconds(60);
    private static final AtomicLong LAST = new AtomicLong();

    private final VirtfleetClient client;
    private final Deque<String> names = new ArrayDeque<>();

    Guests(VirtfleetClient client) {
        this.client = client;
    }

    /** Returns an id that no other test has. */
    static String unique() {
        return "java-" + System.nanoTime() + "-" + LAST.incrementAndGet();
    }

    static DomainSpec small() {
        return DomainSpec.newBuilder()
                .setDriver("test")
                .setMemory(Memory.newBuilder().setMaximumBytes(64 << 20))
                .build();
    }

    Domain make(String node) throws InterruptedException {
        return make(node, unique(), small());
    }

    Domain make(String node, String id, DomainSpec spec) throws InterruptedException {
        Operation<Domain> creation = client.domains().createDomain(CreateDomainRequest.newBuilder()
                .setParent(node)
                .setDomainId(id)
                .setDomain(Domain.newBuilder().setSpec(spec))
                .build());
        Domain made = creation.await(PATIENCE);
        names.push(made.getName());
        return made;
    }

    Domain get(String name) {
        return client.domains().getDomain(GetDomainRequest.newBuilder().setName(name).build());
    }

    void remove(String name) throws InterruptedException {
        DeleteDomainRequest request =
                DeleteDomainRequest.newBuilder().setName(name).setStop(true).setAllowMissing(true).build();
        client.domains().deleteDomain(request).await(PATIENCE);
        names.remove(name);
    }

    /** Says that a domain has another name by now. */
    void renamed(String before, String after) {
        names.remove(before);
        names.push(after);
    }

    @Override
    public void close() {
        while (!names.isEmpty()) {
            try {
                remove(names.peek());
            } catch (InterruptedException interrupted) {
                throw new IllegalStateException(interrupted);
            }
        }
    }
}

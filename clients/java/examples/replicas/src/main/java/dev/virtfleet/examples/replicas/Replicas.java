package dev.virtfleet.examples.replicas;

import com.google.protobuf.util.JsonFormat;
import dev.virtfleet.client.OperationPendingException;
import dev.virtfleet.client.VirtfleetClient;
import dev.virtfleet.client.VirtfleetException;
import dev.virtfleet.client.informer.Informer;
import dev.virtfleet.client.informer.InformerHandler;
import dev.virtfleet.client.informer.Informers;
import dev.virtfleet.client.informer.WorkQueue;
import dev.virtfleet.compute.v1.CreateDomainRequest;
import dev.virtfleet.compute.v1.DeleteDomainRequest;
import dev.virtfleet.compute.v1.Domain;
import dev.virtfleet.compute.v1.StartOptions;
import dev.virtfleet.fleet.v1.Node;
import dev.virtfleet.fleet.v1.NodeState;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.time.Instant;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;
import java.util.UUID;

/**
 * Keeps a number of running domains of one template, spread over the ready nodes of a fleet. It replaces the dead and those of lost nodes,
 * deletes the surplus, and waits out lost connections and gateways that are killed. Arguments: {@code web 12 domain.json}.
 */
public final class Replicas implements AutoCloseable {

    static final String GROUP_LABEL = "replicas.example/group";
    private static final Duration LIMIT = Duration.ofSeconds(30);

    private final VirtfleetClient client;
    private final Domain template;
    private final int count;
    private final WorkQueue<String> queue = WorkQueue.create(Duration.ofMillis(100), Duration.ofSeconds(5));
    private final Informer<Domain> domains;
    private final Informer<Node> nodes;
    private final Map<String, Instant> made = new HashMap<>(); // when, by uid, until the informer knows them

    private interface Step {
        void take() throws InterruptedException;
    }

    Replicas(VirtfleetClient client, int count, Domain template) {
        this.client = client;
        this.count = count;
        this.template = template;
        String ours = "labels.\"" + GROUP_LABEL + "\"=\"" + template.getLabelsOrThrow(GROUP_LABEL) + "\"";
        InformerHandler<Object> waking = queue.handler(resource -> List.of("all"));
        domains = Informers.domains(client).basic().filter(ours).handler(waking).start();
        nodes = Informers.nodes(client).handler(waking).start();
    }

    public static void main(String[] arguments) throws Exception {
        Domain.Builder template = Domain.newBuilder();
        JsonFormat.parser().merge(Files.readString(Path.of(arguments[2])), template);
        template.putLabels(GROUP_LABEL, arguments[0]);
        try (VirtfleetClient client = VirtfleetClient.connect();
                Replicas replicas = new Replicas(client, Integer.parseInt(arguments[1]), template.build())) {
            Runtime.getRuntime().addShutdownHook(new Thread(replicas.queue::close));
            replicas.run();
        }
    }

    /** Works until it is closed, or the fleet refuses to tell it of its domains and nodes. */
    void run() throws Exception {
        domains.awaitSynced(Duration.ofMinutes(1));
        nodes.awaitSynced(Duration.ofMinutes(1));
        domains.ended().whenComplete((none, refused) -> queue.close());
        nodes.ended().whenComplete((none, refused) -> queue.close());
        queue.run(1, all -> reconcile());
    }

    /** Makes what is there what is wanted. What it changes comes back through the informers and has it look again. */
    private void reconcile() throws Exception {
        if (!domains.isConnected() || !nodes.isConnected()) {
            queue.addAfter("all", Duration.ofSeconds(1)); // what is known may be old
            return;
        }
        Map<String, Integer> load = new TreeMap<>();
        nodes.stream().filter(Replicas::takesDomains).forEach(node -> load.put(node.getName(), 0));
        List<Step> steps = new ArrayList<>();
        int alive = 0;
        for (Domain domain : domains.stream().toList()) {
            made.remove(domain.getUid());
            String node = domain.getName().split("/domains/")[0];
            boolean ready = load.containsKey(node);
            if (ready && (!domain.getStatus().getActive() || alive >= count)) {
                steps.add(() -> delete(domain));
            } else if (ready) {
                load.merge(node, 1, Integer::sum);
                alive++;
            } else if (!isLost(node)) {
                alive++; // it is not in reach, and most likely runs
            }
        }
        made.values().removeIf(at -> at.isBefore(Instant.now().minusSeconds(60)));
        for (int missing = count - alive - made.size(); missing > 0 && !load.isEmpty(); missing--) {
            String node = load.entrySet().stream().min(Map.Entry.comparingByValue()).orElseThrow().getKey();
            load.merge(node, 1, Integer::sum);
            steps.add(() -> create(node));
        }
        Exception failed = null;
        for (Step step : steps) {
            try {
                step.take();
            } catch (VirtfleetException | OperationPendingException failure) {
                failed = failure; // the others are taken all the same, and it looks again after a pause
            }
        }
        if (failed != null) {
            throw failed;
        }
    }

    private static boolean takesDomains(Node node) {
        boolean cordoned = node.getSpec().hasSchedulable() && !node.getSpec().getSchedulable();
        return node.getStatus().getState() == NodeState.NODE_STATE_READY && !cordoned;
    }

    private boolean isLost(String name) {
        return nodes.named(name).filter(node -> node.getStatus().getState() == NodeState.NODE_STATE_LOST).isPresent();
    }

    void create(String node) throws InterruptedException {
        Domain domain = client.domains().createDomain(CreateDomainRequest.newBuilder()
                .setParent(node).setDomainId("replica-" + UUID.randomUUID().toString().substring(0, 13))
                .setDomain(template).setStart(StartOptions.getDefaultInstance()).build()).await(LIMIT);
        made.put(domain.getUid(), Instant.now());
    }

    private void delete(Domain domain) throws InterruptedException {
        client.domains().deleteDomain(DeleteDomainRequest.newBuilder()
                .setName(domain.getName()).setExpectedUid(domain.getUid())
                .setStop(true).setAllowMissing(true).build()).await(LIMIT);
    }

    @Override
    public void close() {
        queue.close();
        domains.close();
        nodes.close();
    }
}

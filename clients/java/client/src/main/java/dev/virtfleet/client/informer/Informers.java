package dev.virtfleet.client.informer;

import com.google.protobuf.Duration;
import com.google.protobuf.Message;
import com.google.protobuf.Parser;
import dev.virtfleet.client.ResourceWatch;
import dev.virtfleet.client.VirtfleetClient;
import dev.virtfleet.client.WatchOptions;
import dev.virtfleet.compute.v1.Domain;
import dev.virtfleet.fleet.v1.Node;
import dev.virtfleet.network.v1.Network;
import dev.virtfleet.network.v1.Port;
import dev.virtfleet.storage.v1.Pool;
import dev.virtfleet.storage.v1.Volume;
import java.util.function.BiFunction;

/** Makes informers, one kind of resource each. */
public final class Informers {

    /** How long a watch may say nothing. */
    private static final Duration QUIET = Duration.newBuilder().setSeconds(10).build();

    private Informers() {}

    /**
     * Makes an informer of domains, with the indexes {@link Indexes#NODE}, {@link Indexes#LABEL}, {@link Indexes#DOMAIN_VOLUME},
     * {@link Indexes#DOMAIN_MAC} and {@link Indexes#DOMAIN_ADDRESS}.
     *
     * @param client the fleet's
     * @return its builder
     */
    public static Informer.Builder<Domain> domains(VirtfleetClient client) {
        return builder(Domain.class, Domain.parser(), (plan, options) -> client.computeWatch()
                        .watchResources(dev.virtfleet.compute.v1.WatchResourcesRequest.newBuilder()
                                .setParent(plan.parent())
                                .setFilter(plan.filter())
                                .setView(plan.view())
                                .addResourceTypes(dev.virtfleet.compute.v1.ResourceType.RESOURCE_TYPE_DOMAIN)
                                .setBookmarkInterval(QUIET)
                                .build(), options))
                .parent("nodes/-")
                .index(Indexes.NODE)
                .index(Indexes.DOMAIN_VOLUME)
                .index(Indexes.DOMAIN_MAC)
                .index(Indexes.DOMAIN_ADDRESS);
    }

    /**
     * Makes an informer of volumes, with the indexes {@link Indexes#NODE}, {@link Indexes#LABEL}, {@link Indexes#VOLUME_POOL} and
     * {@link Indexes#VOLUME_DOMAIN}.
     *
     * @param client the fleet's
     * @return its builder
     */
    public static Informer.Builder<Volume> volumes(VirtfleetClient client) {
        return storage(client, Volume.class, Volume.parser(), dev.virtfleet.storage.v1.ResourceType.RESOURCE_TYPE_VOLUME)
                .index(Indexes.VOLUME_POOL)
                .index(Indexes.VOLUME_DOMAIN);
    }

    /**
     * Makes an informer of pools, with the indexes {@link Indexes#NODE} and {@link Indexes#LABEL}.
     *
     * @param client the fleet's
     * @return its builder
     */
    public static Informer.Builder<Pool> pools(VirtfleetClient client) {
        return storage(client, Pool.class, Pool.parser(), dev.virtfleet.storage.v1.ResourceType.RESOURCE_TYPE_POOL);
    }

    /**
     * Makes an informer of networks, with the indexes {@link Indexes#NODE} and {@link Indexes#LABEL}.
     *
     * @param client the fleet's
     * @return its builder
     */
    public static Informer.Builder<Network> networks(VirtfleetClient client) {
        return network(client, Network.class, Network.parser(), dev.virtfleet.network.v1.ResourceType.RESOURCE_TYPE_NETWORK);
    }

    /**
     * Makes an informer of ports, with the indexes {@link Indexes#NODE}, {@link Indexes#LABEL}, {@link Indexes#PORT_NETWORK},
     * {@link Indexes#PORT_MAC} and {@link Indexes#PORT_ADDRESS}.
     *
     * @param client the fleet's
     * @return its builder
     */
    public static Informer.Builder<Port> ports(VirtfleetClient client) {
        return network(client, Port.class, Port.parser(), dev.virtfleet.network.v1.ResourceType.RESOURCE_TYPE_PORT)
                .index(Indexes.PORT_NETWORK)
                .index(Indexes.PORT_MAC)
                .index(Indexes.PORT_ADDRESS);
    }

    /**
     * Makes an informer of the nodes of the fleet, with the index {@link Indexes#LABEL}.
     *
     * @param client the fleet's
     * @return its builder
     */
    public static Informer.Builder<Node> nodes(VirtfleetClient client) {
        return builder(Node.class, Node.parser(), (plan, options) -> client.fleetWatch()
                .watchResources(dev.virtfleet.fleet.v1.WatchResourcesRequest.newBuilder()
                        .setParent(plan.parent())
                        .setFilter(plan.filter())
                        .setView(plan.view())
                        .addResourceTypes(dev.virtfleet.fleet.v1.ResourceType.RESOURCE_TYPE_NODE)
                        .setBookmarkInterval(QUIET)
                        .build(), options));
    }

    private static <T extends Message> Informer.Builder<T> storage(
            VirtfleetClient client, Class<T> resource, Parser<T> parser, dev.virtfleet.storage.v1.ResourceType kind) {
        return builder(resource, parser, (plan, options) -> client.storageWatch()
                        .watchResources(dev.virtfleet.storage.v1.WatchResourcesRequest.newBuilder()
                                .setParent(plan.parent())
                                .setFilter(plan.filter())
                                .setView(plan.view())
                                .addResourceTypes(kind)
                                .setBookmarkInterval(QUIET)
                                .build(), options))
                .parent("nodes/-")
                .index(Indexes.NODE);
    }

    private static <T extends Message> Informer.Builder<T> network(
            VirtfleetClient client, Class<T> resource, Parser<T> parser, dev.virtfleet.network.v1.ResourceType kind) {
        return builder(resource, parser, (plan, options) -> client.networkWatch()
                        .watchResources(dev.virtfleet.network.v1.WatchResourcesRequest.newBuilder()
                                .setParent(plan.parent())
                                .setFilter(plan.filter())
                                .setView(plan.view())
                                .addResourceTypes(kind)
                                .setBookmarkInterval(QUIET)
                                .build(), options))
                .parent("nodes/-")
                .index(Indexes.NODE);
    }

    private static <T extends Message, A extends Message> Informer.Builder<T> builder(
            Class<T> kind, Parser<T> parser, BiFunction<Informer.Plan, WatchOptions, ResourceWatch<A>> open) {
        return new Informer.Builder<>(kind, parser, (plan, options) -> new Answers<>(open.apply(plan, options), kind))
                .index(Indexes.LABEL);
    }
}

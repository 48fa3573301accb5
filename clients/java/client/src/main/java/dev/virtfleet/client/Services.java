// Code generated from the protos by tools/java_services.py. DO NOT EDIT.

package dev.virtfleet.client;

import io.grpc.CallOptions;
import io.grpc.Channel;

/** The services of the API, one class for each: what a {@link VirtfleetClient} has. Threads may share it; nothing is null. */
public abstract sealed class Services permits VirtfleetClient {

    Services() {
    }

    abstract VirtfleetClient client();

    /** {@return the connection, for stubs of other services; calls through it are treated alike} */
    public abstract Channel channel();

    /** {@return the calls of {@code virtfleet.common.v1.AccessService}} */
    public AccessService access() {
        return new AccessService(client(), channel(), CallOptions.DEFAULT);
    }

    /** {@return the calls of {@code virtfleet.compute.v1.CapabilityService}} */
    public CapabilityService capabilities() {
        return new CapabilityService(client(), channel(), CallOptions.DEFAULT);
    }

    /** {@return the calls of {@code virtfleet.compute.v1.WatchService}} */
    public ComputeWatchService computeWatch() {
        return new ComputeWatchService(client(), channel(), CallOptions.DEFAULT);
    }

    /** {@return the calls of {@code virtfleet.compute.v1.ConsoleService}} */
    public ConsoleService consoles() {
        return new ConsoleService(client(), channel(), CallOptions.DEFAULT);
    }

    /** {@return the calls of {@code virtfleet.compute.v1.DomainService}} */
    public DomainService domains() {
        return new DomainService(client(), channel(), CallOptions.DEFAULT);
    }

    /** {@return the calls of {@code virtfleet.fleet.v1.EnrollmentService}} */
    public EnrollmentService enrollment() {
        return new EnrollmentService(client(), channel(), CallOptions.DEFAULT);
    }

    /** {@return the calls of {@code virtfleet.fleet.v1.WatchService}} */
    public FleetWatchService fleetWatch() {
        return new FleetWatchService(client(), channel(), CallOptions.DEFAULT);
    }

    /** {@return the calls of {@code virtfleet.compute.v1.GuestAgentService}} */
    public GuestAgentService guestAgents() {
        return new GuestAgentService(client(), channel(), CallOptions.DEFAULT);
    }

    /** {@return the calls of {@code virtfleet.compute.v1.HostService}} */
    public HostService hosts() {
        return new HostService(client(), channel(), CallOptions.DEFAULT);
    }

    /** {@return the calls of {@code virtfleet.network.v1.WatchService}} */
    public NetworkWatchService networkWatch() {
        return new NetworkWatchService(client(), channel(), CallOptions.DEFAULT);
    }

    /** {@return the calls of {@code virtfleet.network.v1.NetworkService}} */
    public NetworkService networks() {
        return new NetworkService(client(), channel(), CallOptions.DEFAULT);
    }

    /** {@return the calls of {@code virtfleet.fleet.v1.NodeService}} */
    public NodeService nodes() {
        return new NodeService(client(), channel(), CallOptions.DEFAULT);
    }

    /** {@return the calls of {@code virtfleet.common.v1.OperationService}} */
    public OperationService operationWatches() {
        return new OperationService(client(), channel(), CallOptions.DEFAULT);
    }

    /** {@return the calls of {@code virtfleet.storage.v1.PoolService}} */
    public PoolService pools() {
        return new PoolService(client(), channel(), CallOptions.DEFAULT);
    }

    /** {@return the calls of {@code virtfleet.network.v1.PortService}} */
    public PortService ports() {
        return new PortService(client(), channel(), CallOptions.DEFAULT);
    }

    /** {@return the calls of {@code virtfleet.common.v1.AdminService}} */
    public AdminService servers() {
        return new AdminService(client(), channel(), CallOptions.DEFAULT);
    }

    /** {@return the calls of {@code virtfleet.compute.v1.StatsService}} */
    public StatsService stats() {
        return new StatsService(client(), channel(), CallOptions.DEFAULT);
    }

    /** {@return the calls of {@code virtfleet.storage.v1.WatchService}} */
    public StorageWatchService storageWatch() {
        return new StorageWatchService(client(), channel(), CallOptions.DEFAULT);
    }

    /** {@return the calls of {@code virtfleet.storage.v1.VolumeService}} */
    public VolumeService volumes() {
        return new VolumeService(client(), channel(), CallOptions.DEFAULT);
    }
}

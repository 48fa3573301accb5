// Code generated from the protos by tools/java_services.py. DO NOT EDIT.

package dev.virtfleet.client;

import dev.virtfleet.common.v1.AdminServiceGrpc;
import dev.virtfleet.common.v1.GetServerRequest;
import dev.virtfleet.common.v1.ReloadCertificatesRequest;
import dev.virtfleet.common.v1.Server;
import io.grpc.CallOptions;
import io.grpc.Channel;

/**
 * Calls {@code virtfleet.common.v1.AdminService}. Shows and steers one server process: a service of a node ({@code
 * nodes/{node}/services/{service}}) or a gateway ({@code gateways/{gateway}}). An empty name stands for the process that
 * is called. Threads may share it. What narrows a call ({@code withDeadlineAfter} and so on) returns a copy. No argument
 * and no result is null.
 */
public final class AdminService extends FleetService<AdminService> {

    AdminService(VirtfleetClient client, Channel channel, CallOptions options) {
        super(client, channel, options);
    }

    @Override
    protected AdminService build(Channel channel, CallOptions options) {
        return new AdminService(client(), channel, options);
    }

    /** {@return the generated stub whose calls return futures} */
    public AdminServiceGrpc.AdminServiceFutureStub futureStub() {
        return AdminServiceGrpc.newFutureStub(getChannel());
    }

    /** {@return the generated stub whose calls are told to observers: for streams of requests} */
    public AdminServiceGrpc.AdminServiceStub asyncStub() {
        return AdminServiceGrpc.newStub(getChannel());
    }

    /**
     * Gets version, start time and limits of a server.
     *
     * @param request what is asked for; it stays as it is
     * @return the answer
     * @throws VirtfleetException the call failed
     */
    public Server getServer(GetServerRequest request) {
        return call(AdminServiceGrpc.getGetServerMethod(), request);
    }

    /**
     * Reads certificate, key, trust bundle and denial list again from their files. Running calls and streams go on.
     * Succeeds if nothing changed. FAILED_PRECONDITION BACKING_MISSING: a file is absent or does not parse; the old ones
     * stay in use.
     *
     * @param request what is asked for; it stays as it is
     * @return the answer
     * @throws VirtfleetException the call failed
     */
    public Server reloadCertificates(ReloadCertificatesRequest request) {
        return call(AdminServiceGrpc.getReloadCertificatesMethod(), request);
    }
}

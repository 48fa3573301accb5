// Code generated from the protos by tools/java_services.py. DO NOT EDIT.

package dev.virtfleet.client;

import com.google.protobuf.Empty;
import dev.virtfleet.compute.v1.BatchCreateDomainsRequest;
import dev.virtfleet.compute.v1.BatchCreateDomainsResponse;
import dev.virtfleet.compute.v1.BatchDeleteDomainsRequest;
import dev.virtfleet.compute.v1.BatchDeleteDomainsResponse;
import dev.virtfleet.compute.v1.BatchGetDomainsRequest;
import dev.virtfleet.compute.v1.BatchGetDomainsResponse;
import dev.virtfleet.compute.v1.BatchStartDomainsRequest;
import dev.virtfleet.compute.v1.BatchStartDomainsResponse;
import dev.virtfleet.compute.v1.BatchStopDomainsRequest;
import dev.virtfleet.compute.v1.BatchStopDomainsResponse;
import dev.virtfleet.compute.v1.CreateDomainRequest;
import dev.virtfleet.compute.v1.DeleteDomainRequest;
import dev.virtfleet.compute.v1.Domain;
import dev.virtfleet.compute.v1.DomainServiceGrpc;
import dev.virtfleet.compute.v1.GetDomainRequest;
import dev.virtfleet.compute.v1.ListDomainsRequest;
import dev.virtfleet.compute.v1.ListDomainsResponse;
import dev.virtfleet.compute.v1.RebootDomainRequest;
import dev.virtfleet.compute.v1.ResetDomainRequest;
import dev.virtfleet.compute.v1.ResumeDomainRequest;
import dev.virtfleet.compute.v1.StartDomainRequest;
import dev.virtfleet.compute.v1.StopDomainRequest;
import dev.virtfleet.compute.v1.SuspendDomainRequest;
import dev.virtfleet.compute.v1.UpdateDomainRequest;
import io.grpc.CallOptions;
import io.grpc.Channel;

/**
 * Calls {@code virtfleet.compute.v1.DomainService}. Defines, changes, starts and stops domains. A domain is one guest: a
 * virtual machine or a system container. All methods: NAME_MALFORMED, RESOURCE_NOT_FOUND, PERMISSION_MISSING. Mutations:
 * UNKNOWN_FIELD, REQUEST_ID_REUSED, ETAG_MISMATCH, UID_MISMATCH, and OPERATION_CONFLICT (metadata {@code operation})
 * while another operation on the same domain runs. A driver that lacks a feature: CAPABILITY_MISSING. Threads may share
 * it. What narrows a call ({@code withDeadlineAfter} and so on) returns a copy. No argument and no result is null.
 */
public final class DomainService extends FleetService<DomainService> {

    DomainService(VirtfleetClient client, Channel channel, CallOptions options) {
        super(client, channel, options);
    }

    @Override
    protected DomainService build(Channel channel, CallOptions options) {
        return new DomainService(client(), channel, options);
    }

    /** {@return the generated stub whose calls return futures} */
    public DomainServiceGrpc.DomainServiceFutureStub futureStub() {
        return DomainServiceGrpc.newFutureStub(getChannel());
    }

    /** {@return the generated stub whose calls are told to observers: for streams of requests} */
    public DomainServiceGrpc.DomainServiceStub asyncStub() {
        return DomainServiceGrpc.newStub(getChannel());
    }

    /**
     * Lists the domains of a node, or of all nodes ({@code nodes/-}), by name.
     *
     * <p>FILTER_SYNTAX · PAGE_TOKEN_INVALID.
     *
     * @param request what is asked for; it stays as it is
     * @return every item, page by page as they are read
     */
    public Pages<Domain> listDomains(ListDomainsRequest request) {
        return pages(DomainServiceGrpc.getListDomainsMethod(), request, ListDomainsResponse::getDomainsList, true);
    }

    /**
     * Asks for one page. Lists the domains of a node, or of all nodes ({@code nodes/-}), by name.
     *
     * <p>FILTER_SYNTAX · PAGE_TOKEN_INVALID.
     *
     * @param request what is asked for; it stays as it is
     * @return the page
     * @throws VirtfleetException the call failed
     */
    public ListDomainsResponse listDomainsPage(ListDomainsRequest request) {
        return call(DomainServiceGrpc.getListDomainsMethod(), request);
    }

    /**
     * Gets a domain. The last segment of the name may be its uid.
     *
     * @param request what is asked for; it stays as it is
     * @return the answer
     * @throws VirtfleetException the call failed
     */
    public Domain getDomain(GetDomainRequest request) {
        return call(DomainServiceGrpc.getGetDomainMethod(), request);
    }

    /**
     * Gets many domains, each with a status of its own. NAME_MALFORMED · MESSAGE_TOO_LARGE (all would pass 3 MiB: ask
     * for fewer at a time, or for view BASIC).
     *
     * @param request what is asked for; it stays as it is
     * @return the answer
     * @throws VirtfleetException the call failed
     */
    public BatchGetDomainsResponse batchGetDomains(BatchGetDomainsRequest request) {
        return call(DomainServiceGrpc.getBatchGetDomainsMethod(), request);
    }

    /**
     * Defines a domain, makes new volumes for it, and starts it if asked to. A failure undoes all of it, in reverse
     * order; the operation keeps target and reason.
     *
     * <p>RESOURCE_EXISTS · IDENTITY_IN_USE (MAC taken) · FIELD_OUT_OF_RANGE, FIELD_CONFLICT, FIELD_REQUIRED (spec) ·
     * REFERENCE_OTHER_NODE · DRIVER_BROKEN · what StartDomain says.
     *
     * @param request what is asked for; it stays as it is
     * @return the work that has been started
     * @throws VirtfleetException the call failed
     */
    public Operation<Domain> createDomain(CreateDomainRequest request) {
        return start(DomainServiceGrpc.getCreateDomainMethod(), request, Domain.class);
    }

    /**
     * Changes a definition, and by {@code scope} the running guest. Succeeds without a new generation if nothing
     * changes. What cannot go live is told in {@code status.pending_changes}, or refused with NOT_LIVE_UPDATABLE (scopes
     * LIVE and LIVE_AND_CONFIG) · MASK_PATH_UNKNOWN · FIELD_CONFLICT (immutable) · WRONG_STATE (LIVE on a stopped one).
     *
     * @param request what is asked for; it stays as it is
     * @return the work that has been started
     * @throws VirtfleetException the call failed
     */
    public Operation<Domain> updateDomain(UpdateDomainRequest request) {
        return start(DomainServiceGrpc.getUpdateDomainMethod(), request, Domain.class);
    }

    /**
     * Deletes a definition. Its volumes stay unless asked for. Succeeds with {@code allow_missing} if there is none.
     *
     * <p>WRONG_STATE (it is active and {@code stop} is not set) · DELETION_PROTECTED.
     *
     * @param request what is asked for; it stays as it is
     * @return the work that has been started
     * @throws VirtfleetException the call failed
     */
    public Operation<Empty> deleteDomain(DeleteDomainRequest request) {
        return start(DomainServiceGrpc.getDeleteDomainMethod(), request, Empty.class);
    }

    /**
     * Starts a domain. Succeeds if it already runs (paused too), without any effect.
     *
     * <p>NODE_MEMORY_SHORT · BACKING_MISSING · RESOURCE_IN_USE (disk or port held) · WRONG_STATE (it shuts down or is
     * UNKNOWN; a pool or network is stopped) · FIELD_CONFLICT (a disk's {@code format} is not that of its volume) ·
     * HYPERVISOR_FAILED · DRIVER_BROKEN · BACKEND_UNREACHABLE (storage or network service away).
     *
     * @param request what is asked for; it stays as it is
     * @return the work that has been started
     * @throws VirtfleetException the call failed
     */
    public Operation<Domain> startDomain(StartDomainRequest request) {
        return start(DomainServiceGrpc.getStartDomainMethod(), request, Domain.class);
    }

    /**
     * Stops a domain. Succeeds if it is stopped. A transient one vanishes.
     *
     * <p>GUEST_DID_NOT_COMPLY (GRACEFUL, and the guest still runs).
     *
     * @param request what is asked for; it stays as it is
     * @return the work that has been started
     * @throws VirtfleetException the call failed
     */
    public Operation<Domain> stopDomain(StopDomainRequest request) {
        return start(DomainServiceGrpc.getStopDomainMethod(), request, Domain.class);
    }

    /**
     * Asks the guest to boot again. Each call asks once more.
     *
     * <p>WRONG_STATE (not RUNNING or BLOCKED) · GUEST_DID_NOT_COMPLY (with {@code grace_period}: it has not booted by
     * then).
     *
     * @param request what is asked for; it stays as it is
     * @return the work that has been started
     * @throws VirtfleetException the call failed
     */
    public Operation<Domain> rebootDomain(RebootDomainRequest request) {
        return start(DomainServiceGrpc.getRebootDomainMethod(), request, Domain.class);
    }

    /**
     * Resets the guest like the button on its case, without asking it. Each call resets once more.
     *
     * <p>WRONG_STATE (not active, or UNKNOWN).
     *
     * @param request what is asked for; it stays as it is
     * @return the work that has been started
     * @throws VirtfleetException the call failed
     */
    public Operation<Domain> resetDomain(ResetDomainRequest request) {
        return start(DomainServiceGrpc.getResetDomainMethod(), request, Domain.class);
    }

    /**
     * Stops the guest's processors; its memory stays. Succeeds if it is paused.
     *
     * <p>WRONG_STATE (not RUNNING, BLOCKED or PAUSED).
     *
     * @param request what is asked for; it stays as it is
     * @return the work that has been started
     * @throws VirtfleetException the call failed
     */
    public Operation<Domain> suspendDomain(SuspendDomainRequest request) {
        return start(DomainServiceGrpc.getSuspendDomainMethod(), request, Domain.class);
    }

    /**
     * Lets the guest's processors go on. Succeeds if they do.
     *
     * <p>WRONG_STATE (not RUNNING, BLOCKED or PAUSED, or the guest has ended and is kept by {@code on_exit}).
     *
     * @param request what is asked for; it stays as it is
     * @return the work that has been started
     * @throws VirtfleetException the call failed
     */
    public Operation<Domain> resumeDomain(ResumeDomainRequest request) {
        return start(DomainServiceGrpc.getResumeDomainMethod(), request, Domain.class);
    }

    /**
     * Creates many domains. Not atomic: one result per item, in their order, as CreateDomain would give it.
     *
     * @param request what is asked for; it stays as it is
     * @return the work that has been started
     * @throws VirtfleetException the call failed
     */
    public Operation<BatchCreateDomainsResponse> batchCreateDomains(BatchCreateDomainsRequest request) {
        return start(DomainServiceGrpc.getBatchCreateDomainsMethod(), request, BatchCreateDomainsResponse.class);
    }

    /**
     * Starts many domains. Not atomic: one result per item, in their order, as StartDomain would give it.
     *
     * @param request what is asked for; it stays as it is
     * @return the work that has been started
     * @throws VirtfleetException the call failed
     */
    public Operation<BatchStartDomainsResponse> batchStartDomains(BatchStartDomainsRequest request) {
        return start(DomainServiceGrpc.getBatchStartDomainsMethod(), request, BatchStartDomainsResponse.class);
    }

    /**
     * Stops many domains. Not atomic: one result per item, in their order, as StopDomain would give it.
     *
     * @param request what is asked for; it stays as it is
     * @return the work that has been started
     * @throws VirtfleetException the call failed
     */
    public Operation<BatchStopDomainsResponse> batchStopDomains(BatchStopDomainsRequest request) {
        return start(DomainServiceGrpc.getBatchStopDomainsMethod(), request, BatchStopDomainsResponse.class);
    }

    /**
     * Deletes many domains. Not atomic: one result per item, in their order, as DeleteDomain would give it.
     *
     * @param request what is asked for; it stays as it is
     * @return the work that has been started
     * @throws VirtfleetException the call failed
     */
    public Operation<BatchDeleteDomainsResponse> batchDeleteDomains(BatchDeleteDomainsRequest request) {
        return start(DomainServiceGrpc.getBatchDeleteDomainsMethod(), request, BatchDeleteDomainsResponse.class);
    }
}

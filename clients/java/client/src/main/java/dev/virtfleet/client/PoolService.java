// Code generated from the protos by tools/java_services.py. DO NOT EDIT.

package dev.virtfleet.client;

import com.google.protobuf.Empty;
import dev.virtfleet.storage.v1.CreatePoolRequest;
import dev.virtfleet.storage.v1.DeletePoolRequest;
import dev.virtfleet.storage.v1.GetPoolRequest;
import dev.virtfleet.storage.v1.ListPoolBackendsRequest;
import dev.virtfleet.storage.v1.ListPoolBackendsResponse;
import dev.virtfleet.storage.v1.ListPoolsRequest;
import dev.virtfleet.storage.v1.ListPoolsResponse;
import dev.virtfleet.storage.v1.Pool;
import dev.virtfleet.storage.v1.PoolBackend;
import dev.virtfleet.storage.v1.PoolServiceGrpc;
import dev.virtfleet.storage.v1.RefreshPoolRequest;
import dev.virtfleet.storage.v1.StartPoolRequest;
import dev.virtfleet.storage.v1.StopPoolRequest;
import dev.virtfleet.storage.v1.UpdatePoolRequest;
import io.grpc.CallOptions;
import io.grpc.Channel;

/**
 * Calls {@code virtfleet.storage.v1.PoolService}. Keeps the pools of a node. A pool is a place that volumes come from: a
 * directory today; file systems, volume groups and network storage by the same messages later. BuildPool, TeardownPool
 * and FindPoolSources are not built yet. Threads may share it. What narrows a call ({@code withDeadlineAfter} and so on)
 * returns a copy. No argument and no result is null.
 */
public final class PoolService extends FleetService<PoolService> {

    PoolService(VirtfleetClient client, Channel channel, CallOptions options) {
        super(client, channel, options);
    }

    @Override
    protected PoolService build(Channel channel, CallOptions options) {
        return new PoolService(client(), channel, options);
    }

    /** {@return the generated stub whose calls return futures} */
    public PoolServiceGrpc.PoolServiceFutureStub futureStub() {
        return PoolServiceGrpc.newFutureStub(getChannel());
    }

    /** {@return the generated stub whose calls are told to observers: for streams of requests} */
    public PoolServiceGrpc.PoolServiceStub asyncStub() {
        return PoolServiceGrpc.newStub(getChannel());
    }

    /**
     * Lists pools. Never waits for a running operation.
     *
     * @param request what is asked for; it stays as it is
     * @return every item, page by page as they are read
     */
    public Pages<Pool> listPools(ListPoolsRequest request) {
        return pages(PoolServiceGrpc.getListPoolsMethod(), request, ListPoolsResponse::getPoolsList, true);
    }

    /**
     * Asks for one page. Lists pools. Never waits for a running operation.
     *
     * @param request what is asked for; it stays as it is
     * @return the page
     * @throws VirtfleetException the call failed
     */
    public ListPoolsResponse listPoolsPage(ListPoolsRequest request) {
        return call(PoolServiceGrpc.getListPoolsMethod(), request);
    }

    /**
     * Returns a pool by name, or by uid as the last segment. NOT_FOUND RESOURCE_NOT_FOUND.
     *
     * @param request what is asked for; it stays as it is
     * @return the answer
     * @throws VirtfleetException the call failed
     */
    public Pool getPool(GetPoolRequest request) {
        return call(PoolServiceGrpc.getGetPoolMethod(), request);
    }

    /**
     * Defines a pool, makes its place as {@code build} says, and starts it if {@code start} is set; volumes that lie
     * there already are found soon after, surely by RefreshPool. Undone as a whole on failure. A repetition with the
     * same request_id answers with the same operation. ALREADY_EXISTS RESOURCE_EXISTS, IDENTITY_IN_USE (another has that
     * uid, or that directory under whatever path) · FAILED_PRECONDITION BACKING_MISSING (no such directory) ·
     * PERMISSION_DENIED PERMISSION_MISSING ({@code hostPaths.use} for a path of the caller's choice) · UNIMPLEMENTED
     * CAPABILITY_MISSING.
     *
     * @param request what is asked for; it stays as it is
     * @return the work that has been started
     * @throws VirtfleetException the call failed
     */
    public Operation<Pool> createPool(CreatePoolRequest request) {
        return start(PoolServiceGrpc.getCreatePoolMethod(), request, Pool.class);
    }

    /**
     * Changes display_name, labels, annotations, lifetime or autostart of a pool. Repeatable: the same change twice is
     * one change. ABORTED ETAG_MISMATCH · FAILED_PRECONDITION UID_MISMATCH · INVALID_ARGUMENT MASK_PATH_UNKNOWN,
     * FIELD_CONFLICT (what cannot change after creation).
     *
     * @param request what is asked for; it stays as it is
     * @return the work that has been started
     * @throws VirtfleetException the call failed
     */
    public Operation<Pool> updatePool(UpdatePoolRequest request) {
        return start(PoolServiceGrpc.getUpdatePoolMethod(), request, Pool.class);
    }

    /**
     * Forgets a pool and its volumes; the files stay. Needs no stop first. Succeeds for a pool that is gone if {@code
     * allow_missing} is set.
     *
     * <p>FAILED_PRECONDITION RESOURCE_IN_USE (a volume is attached or backs one of another pool: metadata {@code
     * holder}) · ABORTED ETAG_MISMATCH, OPERATION_CONFLICT (also while somebody is at work on a volume in it: metadata
     * {@code holder}).
     *
     * @param request what is asked for; it stays as it is
     * @return the work that has been started
     * @throws VirtfleetException the call failed
     */
    public Operation<Empty> deletePool(DeletePoolRequest request) {
        return start(PoolServiceGrpc.getDeletePoolMethod(), request, Empty.class);
    }

    /**
     * Makes a pool ready and finds its volumes. Succeeds if it runs already. FAILED_PRECONDITION BACKING_MISSING (the
     * place is gone) · ABORTED OPERATION_CONFLICT.
     *
     * @param request what is asked for; it stays as it is
     * @return the work that has been started
     * @throws VirtfleetException the call failed
     */
    public Operation<Pool> startPool(StartPoolRequest request) {
        return start(PoolServiceGrpc.getStartPoolMethod(), request, Pool.class);
    }

    /**
     * Stops the use of a pool; its volumes stay known. Succeeds if it is stopped already. A transient pool is forgotten.
     *
     * <p>FAILED_PRECONDITION RESOURCE_IN_USE (a volume is attached, or a guest reads it through one of another pool:
     * metadata {@code holder}) · ABORTED OPERATION_CONFLICT (also while somebody is at work on a volume in it: metadata
     * {@code holder}).
     *
     * @param request what is asked for; it stays as it is
     * @return the work that has been started
     * @throws VirtfleetException the call failed
     */
    public Operation<Pool> stopPool(StopPoolRequest request) {
        return start(PoolServiceGrpc.getStopPoolMethod(), request, Pool.class);
    }

    /**
     * Compares what is recorded with what is there: files that nobody knows become volumes, files that are gone stop
     * being volumes, sizes are read again. The same happens by itself within 10 s of a change. Repeatable.
     * FAILED_PRECONDITION WRONG_STATE (the pool does not run).
     *
     * @param request what is asked for; it stays as it is
     * @return the work that has been started
     * @throws VirtfleetException the call failed
     */
    public Operation<Pool> refreshPool(RefreshPoolRequest request) {
        return start(PoolServiceGrpc.getRefreshPoolMethod(), request, Pool.class);
    }

    /**
     * Lists the kinds of pools that this node knows, what each can do, and why one cannot run.
     *
     * @param request what is asked for; it stays as it is
     * @return every item, page by page as they are read
     */
    public Pages<PoolBackend> listPoolBackends(ListPoolBackendsRequest request) {
        return pages(PoolServiceGrpc.getListPoolBackendsMethod(), request, ListPoolBackendsResponse::getPoolBackendsList, true);
    }

    /**
     * Asks for one page. Lists the kinds of pools that this node knows, what each can do, and why one cannot run.
     *
     * @param request what is asked for; it stays as it is
     * @return the page
     * @throws VirtfleetException the call failed
     */
    public ListPoolBackendsResponse listPoolBackendsPage(ListPoolBackendsRequest request) {
        return call(PoolServiceGrpc.getListPoolBackendsMethod(), request);
    }
}

// Code generated from the protos by tools/java_services.py. DO NOT EDIT.

package dev.virtfleet.client;

import com.google.protobuf.Empty;
import dev.virtfleet.storage.v1.BatchGetVolumesRequest;
import dev.virtfleet.storage.v1.BatchGetVolumesResponse;
import dev.virtfleet.storage.v1.CreateVolumeRequest;
import dev.virtfleet.storage.v1.DeleteVolumeRequest;
import dev.virtfleet.storage.v1.DownloadVolumeRequest;
import dev.virtfleet.storage.v1.DownloadVolumeResponse;
import dev.virtfleet.storage.v1.GetVolumeRequest;
import dev.virtfleet.storage.v1.ListVolumesRequest;
import dev.virtfleet.storage.v1.ListVolumesResponse;
import dev.virtfleet.storage.v1.LookupVolumeRequest;
import dev.virtfleet.storage.v1.ResizeVolumeRequest;
import dev.virtfleet.storage.v1.Volume;
import dev.virtfleet.storage.v1.VolumeServiceGrpc;
import dev.virtfleet.storage.v1.WipeVolumeRequest;
import io.grpc.CallOptions;
import io.grpc.Channel;
import java.util.stream.Stream;

/**
 * Calls {@code virtfleet.storage.v1.VolumeService}. Keeps the volumes of a node's pools. BatchCreateVolumes,
 * UpdateVolume, ListVolumeExtents and FlattenVolume are not built yet. Threads may share it. What narrows a call ({@code
 * withDeadlineAfter} and so on) returns a copy. No argument and no result is null.
 */
public final class VolumeService extends FleetService<VolumeService> {

    VolumeService(VirtfleetClient client, Channel channel, CallOptions options) {
        super(client, channel, options);
    }

    @Override
    protected VolumeService build(Channel channel, CallOptions options) {
        return new VolumeService(client(), channel, options);
    }

    /** {@return the generated stub whose calls return futures} */
    public VolumeServiceGrpc.VolumeServiceFutureStub futureStub() {
        return VolumeServiceGrpc.newFutureStub(getChannel());
    }

    /** {@return the generated stub whose calls are told to observers: for streams of requests} */
    public VolumeServiceGrpc.VolumeServiceStub asyncStub() {
        return VolumeServiceGrpc.newStub(getChannel());
    }

    /**
     * Lists volumes of a pool, or of all with {@code pools/-}. Never waits for a running operation.
     *
     * @param request what is asked for; it stays as it is
     * @return every item, page by page as they are read
     */
    public Pages<Volume> listVolumes(ListVolumesRequest request) {
        return pages(VolumeServiceGrpc.getListVolumesMethod(), request, ListVolumesResponse::getVolumesList, true);
    }

    /**
     * Asks for one page. Lists volumes of a pool, or of all with {@code pools/-}. Never waits for a running operation.
     *
     * @param request what is asked for; it stays as it is
     * @return the page
     * @throws VirtfleetException the call failed
     */
    public ListVolumesResponse listVolumesPage(ListVolumesRequest request) {
        return call(VolumeServiceGrpc.getListVolumesMethod(), request);
    }

    /**
     * Returns a volume by name, or by uid as the last segment. NOT_FOUND RESOURCE_NOT_FOUND.
     *
     * @param request what is asked for; it stays as it is
     * @return the answer
     * @throws VirtfleetException the call failed
     */
    public Volume getVolume(GetVolumeRequest request) {
        return call(VolumeServiceGrpc.getGetVolumeMethod(), request);
    }

    /**
     * Returns many volumes, one result per name in the order asked. A volume that is missing fails its own item only.
     *
     * <p>INVALID_ARGUMENT NAME_MALFORMED, FIELD_CONFLICT (a name that is not below {@code parent}) · RESOURCE_EXHAUSTED
     * MESSAGE_TOO_LARGE (all would pass 3 MiB: ask for fewer at a time).
     *
     * @param request what is asked for; it stays as it is
     * @return the answer
     * @throws VirtfleetException the call failed
     */
    public BatchGetVolumesResponse batchGetVolumes(BatchGetVolumesRequest request) {
        return call(VolumeServiceGrpc.getBatchGetVolumesMethod(), request);
    }

    /**
     * Finds the volume that a path on the node or a key belongs to. NOT_FOUND RESOURCE_NOT_FOUND.
     *
     * @param request what is asked for; it stays as it is
     * @return the answer
     * @throws VirtfleetException the call failed
     */
    public Volume lookupVolume(LookupVolumeRequest request) {
        return call(VolumeServiceGrpc.getLookupVolumeMethod(), request);
    }

    /**
     * Makes a volume: empty, on top of another ({@code spec.backing}), or as a copy of another ({@code source_volume}).
     * Until it is whole it cannot be seen; a failure, a cancel or a crash leaves nothing. A repetition with the same
     * request_id answers with the same operation. ALREADY_EXISTS RESOURCE_EXISTS, IDENTITY_IN_USE (uid) ·
     * FAILED_PRECONDITION WOULD_OVERWRITE (a file of that name is there), WRONG_STATE (pool or source not ready, or
     * READ_ONLY), BACKING_MISSING, RESOURCE_IN_USE (the source is being written) · RESOURCE_EXHAUSTED POOL_FULL ·
     * UNAVAILABLE DRIVER_BROKEN (qcow2, and qemu-img is missing) · INVALID_ARGUMENT FIELD_CONFLICT, FIELD_OUT_OF_RANGE,
     * REFERENCE_OTHER_NODE.
     *
     * @param request what is asked for; it stays as it is
     * @return the work that has been started
     * @throws VirtfleetException the call failed
     */
    public Operation<Volume> createVolume(CreateVolumeRequest request) {
        return start(VolumeServiceGrpc.getCreateVolumeMethod(), request, Volume.class);
    }

    /**
     * Deletes a volume with its data. FAILED_PRECONDITION RESOURCE_IN_USE (attached: metadata {@code holder}),
     * HAS_CHILDREN (it backs another volume: metadata {@code holder}), WRONG_STATE (pool not running) · ABORTED
     * ETAG_MISMATCH, OPERATION_CONFLICT.
     *
     * @param request what is asked for; it stays as it is
     * @return the work that has been started
     * @throws VirtfleetException the call failed
     */
    public Operation<Empty> deleteVolume(DeleteVolumeRequest request) {
        return start(VolumeServiceGrpc.getDeleteVolumeMethod(), request, Empty.class);
    }

    /**
     * Changes the size of a volume that nobody holds. Repeatable: succeeds if it has that size. FAILED_PRECONDITION
     * RESOURCE_IN_USE, HAS_CHILDREN (shrinking what backs another volume) · INVALID_ARGUMENT FIELD_CONFLICT (smaller
     * without {@code allow_shrink}) · RESOURCE_EXHAUSTED POOL_FULL.
     *
     * @param request what is asked for; it stays as it is
     * @return the work that has been started
     * @throws VirtfleetException the call failed
     */
    public Operation<Volume> resizeVolume(ResizeVolumeRequest request) {
        return start(VolumeServiceGrpc.getResizeVolumeMethod(), request, Volume.class);
    }

    /**
     * Overwrites what a volume holds. Afterwards it reads as zeros; one on top of another shows the other again. Can be
     * cancelled, and what is overwritten by then is gone; until it is wiped again the condition {@code WipeIncomplete}
     * says so, and an image is refused to guests (IMAGE_CORRUPT).
     *
     * <p>FAILED_PRECONDITION RESOURCE_IN_USE, HAS_CHILDREN · UNIMPLEMENTED CAPABILITY_MISSING (an algorithm other than
     * ZERO).
     *
     * @param request what is asked for; it stays as it is
     * @return the work that has been started
     * @throws VirtfleetException the call failed
     */
    public Operation<Volume> wipeVolume(WipeVolumeRequest request) {
        return start(VolumeServiceGrpc.getWipeVolumeMethod(), request, Volume.class);
    }

    /**
     * Sends the bytes of a volume's file: those of an image, not those that its guest sees. Zeros that the file does not
     * store come as holes. The content is that of the moment of the call also when an upload replaces it meanwhile; what
     * a guest writes meanwhile may or may not be in it. OUT_OF_RANGE RANGE_BEYOND_END · ABORTED ETAG_MISMATCH.
     *
     * @param request what is asked for; it stays as it is
     * @return the answers as they come; closing it ends the call
     */
    public Stream<DownloadVolumeResponse> downloadVolume(DownloadVolumeRequest request) {
        return stream(VolumeServiceGrpc.getDownloadVolumeMethod(), request);
    }
}

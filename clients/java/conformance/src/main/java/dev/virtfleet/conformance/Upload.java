package dev.virtfleet.conformance;

import com.google.gson.JsonObject;
import com.google.protobuf.ByteString;
import com.google.protobuf.UnsafeByteOperations;
import dev.virtfleet.client.VirtfleetClient;
import dev.virtfleet.client.VirtfleetException;
import dev.virtfleet.storage.v1.UploadStart;
import dev.virtfleet.storage.v1.UploadVolumeRequest;
import dev.virtfleet.storage.v1.UploadVolumeResponse;
import dev.virtfleet.type.v1.DataChunk;
import io.grpc.stub.ClientCallStreamObserver;
import io.grpc.stub.ClientResponseObserver;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.security.MessageDigest;
import java.util.HexFormat;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ExecutionException;

/** One upload, sent as fast as it is taken. */
final class Upload implements ClientResponseObserver<UploadVolumeRequest, UploadVolumeResponse> {

    private static final int CHUNK_BYTES = 256 << 10;

    private final CompletableFuture<UploadVolumeResponse> answer = new CompletableFuture<>();
    private final UploadVolumeRequest first;
    private final ByteString content;
    private ClientCallStreamObserver<UploadVolumeRequest> requests;
    private int offset;
    private boolean begun;
    private boolean done;

    private Upload(UploadVolumeRequest first, ByteString content, int offset) {
        this.first = first;
        this.content = content;
        this.offset = offset;
    }

    static UploadVolumeResponse send(VirtfleetClient client, JsonObject request) throws Exception {
        int size = (int) Agent.number(request, "size_bytes");
        ByteBuffer words = ByteBuffer.allocate(size).order(ByteOrder.LITTLE_ENDIAN);
        for (long word = 0; word < size / 4; word++) {
            words.putInt((int) (Agent.number(request, "seed") + word));
        }
        byte[] digest = MessageDigest.getInstance("SHA-256").digest(words.array());
        UploadVolumeRequest first = UploadVolumeRequest.newBuilder()
                .setName(Agent.text(request, "name"))
                .setStart(UploadStart.newBuilder()
                        .setLengthBytes(size)
                        .setDigest("sha256:" + HexFormat.of().formatHex(digest))
                        .setUploadId(Agent.text(request, "upload_id")))
                .build();
        ByteString content = UnsafeByteOperations.unsafeWrap(words.array());
        Upload upload = new Upload(first, content, (int) Agent.number(request, "offset_bytes"));
        client.volumes().asyncStub().uploadVolume(upload);
        try {
            return upload.answer.get();
        } catch (ExecutionException failure) {
            throw VirtfleetException.of(failure.getCause());
        }
    }

    @Override
    public void beforeStart(ClientCallStreamObserver<UploadVolumeRequest> stream) {
        requests = stream;
        stream.setOnReadyHandler(this::sendMore);
    }

    private void sendMore() {
        if (!begun) {
            begun = true;
            requests.onNext(first);
        }
        while (requests.isReady() && !done) {
            if (offset >= content.size()) {
                done = true;
                requests.onCompleted();
                return;
            }
            int end = Math.min(offset + CHUNK_BYTES, content.size());
            requests.onNext(UploadVolumeRequest.newBuilder()
                    .setChunk(DataChunk.newBuilder().setOffset(offset).setData(content.substring(offset, end)))
                    .build());
            offset = end;
        }
    }

    @Override
    public void onNext(UploadVolumeResponse response) {
        answer.complete(response);
    }

    @Override
    public void onError(Throwable failure) {
        answer.completeExceptionally(VirtfleetException.of(failure));
    }

    @Override
    public void onCompleted() {
        answer.completeExceptionally(new IllegalStateException("the upload ended without an answer"));
    }
}

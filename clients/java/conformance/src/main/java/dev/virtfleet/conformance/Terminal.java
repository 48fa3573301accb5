package dev.virtfleet.conformance;

import com.google.gson.JsonNull;
import com.google.gson.JsonObject;
import com.google.protobuf.ByteString;
import dev.virtfleet.client.VirtfleetClient;
import dev.virtfleet.client.VirtfleetException;
import dev.virtfleet.compute.v1.ConsoleMode;
import dev.virtfleet.compute.v1.ConsoleOpen;
import dev.virtfleet.compute.v1.ConsoleOpened;
import dev.virtfleet.compute.v1.OpenConsoleRequest;
import dev.virtfleet.compute.v1.OpenConsoleResponse;
import io.grpc.stub.StreamObserver;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ExecutionException;

/** A console, and what it has said. */
final class Terminal implements Agent.Part, StreamObserver<OpenConsoleResponse> {

    private final CompletableFuture<ConsoleOpened> opened = new CompletableFuture<>();
    private final StreamObserver<OpenConsoleRequest> input;
    private ByteString output = ByteString.EMPTY;
    private String epoch = "";
    private long nextOffset;
    private long gap;
    private boolean ended;
    private String closed = "";
    private JsonObject error;

    Terminal(VirtfleetClient client, JsonObject request) {
        input = client.consoles().asyncStub().openConsole(this);
        input.onNext(OpenConsoleRequest.newBuilder()
                .setName(Agent.text(request, "name"))
                .setOpen(ConsoleOpen.newBuilder()
                        .setMode(ConsoleMode.CONSOLE_MODE_READ_WRITE)
                        .setForce(Agent.flag(request, "force", true))
                        .setEpoch(Agent.text(request, "epoch"))
                        .setOffset(Agent.number(request, "offset")))
                .build());
    }

    JsonObject opened() throws Exception {
        try {
            ConsoleOpened answer = opened.get();
            JsonObject told = Agent.object("epoch", answer.getEpoch());
            told.addProperty("offset", answer.getOffset());
            told.addProperty("writable", answer.getWritable());
            return told;
        } catch (ExecutionException failure) {
            throw VirtfleetException.of(failure);
        }
    }

    void write(ByteString data) {
        input.onNext(OpenConsoleRequest.newBuilder().setData(data).build());
    }

    @Override
    public synchronized void onNext(OpenConsoleResponse answer) {
        switch (answer.getEventCase()) {
            case OPENED -> {
                epoch = answer.getOpened().getEpoch();
                nextOffset = answer.getOpened().getOffset();
                opened.complete(answer.getOpened());
            }
            case DATA -> {
                output = output.concat(answer.getData().getData());
                nextOffset = answer.getData().getOffset() + answer.getData().getData().size();
            }
            case GAP -> {
                gap += answer.getGap().getLengthBytes();
                nextOffset = answer.getGap().getOffset() + answer.getGap().getLengthBytes();
            }
            case CLOSED -> closed = answer.getClosed().getReason().name().replaceFirst("^CONSOLE_CLOSE_REASON_", "");
            default -> throw new IllegalStateException("an event that this agent does not know: " + answer);
        }
    }

    @Override
    public synchronized void onError(Throwable failure) {
        VirtfleetException typed = VirtfleetException.of(failure);
        ended = true;
        error = Agent.error(typed);
        opened.completeExceptionally(typed);
    }

    @Override
    public synchronized void onCompleted() {
        ended = true;
        opened.completeExceptionally(new IllegalStateException("the console ended before it was opened"));
        input.onCompleted();
    }

    @Override
    public synchronized JsonObject state(JsonObject request) {
        JsonObject state = Agent.object("text", output.toStringUtf8());
        state.addProperty("epoch", epoch);
        state.addProperty("next_offset", nextOffset);
        state.addProperty("gap", gap);
        state.addProperty("ended", ended);
        state.addProperty("closed", closed);
        state.add("error", error == null ? JsonNull.INSTANCE : error);
        return state;
    }

    @Override
    public Hold hold() {
        throw new IllegalStateException("a console is not held");
    }

    @Override
    public synchronized void close() {
        if (!ended) {
            input.onError(io.grpc.Status.CANCELLED.asException());
        }
    }
}

package dev.virtfleet.client;

import com.google.common.util.concurrent.ListenableFuture;
import com.google.common.util.concurrent.MoreExecutors;
import com.google.longrunning.CancelOperationRequest;
import com.google.longrunning.OperationsGrpc;
import com.google.longrunning.WaitOperationRequest;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.protobuf.Message;
import com.google.protobuf.util.Durations;
import dev.virtfleet.type.v1.OperationMetadata;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import java.time.Duration;
import java.util.Objects;
import java.util.Optional;
import java.util.concurrent.CancellationException;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.TimeoutException;
import java.util.function.Consumer;

/**
 * A piece of work of the fleet that a mutation has started. It goes on whatever becomes of the client;
 * {@link VirtfleetClient#operation} finds it again by its name.
 *
 * <pre>{@code
 * Operation<Domain> starting = client.domains().startDomain(request);
 * Domain domain = starting.await(Duration.ofMinutes(1));                     // or
 * starting.result(progress -> show(progress.getPhase())).thenAccept(…);
 * }</pre>
 *
 * <p>Threads may share it. No method takes or returns null.
 *
 * @param <T> the result
 */
public final class Operation<T extends Message> {

    /** How long one call may hang: short enough that a proxy with a minute's patience never cuts it. */
    private static final Duration LONGEST_LOOK = Duration.ofSeconds(20);
    /** How often a person wants to see progress. */
    private static final Duration PROGRESS_INTERVAL = Duration.ofMillis(500);

    private static final Duration GRACE = Duration.ofSeconds(10);

    private final VirtfleetClient client;
    private final Class<T> type;
    private volatile com.google.longrunning.Operation last;
    private volatile VirtfleetException obstacle;

    Operation(VirtfleetClient client, com.google.longrunning.Operation last, Class<T> type) {
        this.client = client;
        this.last = last;
        this.type = type;
    }

    /** {@return its name: {@code nodes/n1/services/compute/operations/…}} */
    public String name() {
        return last.getName();
    }

    /** {@return whether it had ended when last looked at; quick work is done in the first answer} */
    public boolean isDone() {
        return last.getDone();
    }

    /** {@return what it is about, and how far it was when last looked at; empty if nothing is known yet} */
    public Optional<OperationMetadata> metadata() {
        return metadataOf(last);
    }

    /** {@return the operation as it was when last looked at} */
    public com.google.longrunning.Operation proto() {
        return last;
    }

    /**
     * Waits for the end, without a thread.
     *
     * <p>Lost connections, restarted gateways and nodes that are away do not end the wait. Cancelling the future ends the wait, not
     * the work: that is {@link #cancel}.
     *
     * @return a new future: the result, or the {@link VirtfleetException} that the work failed with
     */
    public CompletableFuture<T> result() {
        return wait(LONGEST_LOOK, metadata -> {});
    }

    /**
     * Waits for the end and tells how far the work is, twice a second or so and at the end.
     *
     * @param progress is told of it, in a thread of gRPC: it must not block. What it throws ends the wait.
     * @return a new future, as {@link #result()} returns it
     */
    public CompletableFuture<T> result(Consumer<? super OperationMetadata> progress) {
        Objects.requireNonNull(progress, "progress");
        return wait(PROGRESS_INTERVAL, progress);
    }

    /**
     * Waits for the end in the calling thread.
     *
     * @param limit how long at most
     * @return the result
     * @throws VirtfleetException the work failed
     * @throws OperationPendingException it has not ended in that time; it goes on
     * @throws InterruptedException the thread was interrupted; the work goes on
     */
    public T await(Duration limit) throws InterruptedException {
        CompletableFuture<T> result = result();
        try {
            return result.get(limit.toNanos(), TimeUnit.NANOSECONDS);
        } catch (ExecutionException failure) {
            throw unwrapped(failure);
        } catch (TimeoutException pending) {
            throw new OperationPendingException(name(), limit, obstacle);
        } finally {
            result.cancel(false);
        }
    }

    private static RuntimeException unwrapped(ExecutionException failure) {
        return failure.getCause() instanceof RuntimeException cause ? cause : new IllegalStateException(failure.getCause());
    }

    /**
     * Looks at the operation once, without waiting for its end.
     *
     * @throws VirtfleetException the look failed
     */
    public void refresh() {
        try {
            WaitOperationRequest request =
                    WaitOperationRequest.newBuilder().setName(name()).setTimeout(Durations.ZERO).build();
            last = OperationsGrpc.newBlockingStub(client.channel())
                    .withDeadlineAfter(GRACE.toMillis(), TimeUnit.MILLISECONDS)
                    .waitOperation(request);
        } catch (StatusRuntimeException failure) {
            throw VirtfleetException.of(failure);
        }
    }

    /**
     * Asks for the end of the work and the undoing of its effects. Returns when that has been heard: the result then is
     * OPERATION_CANCELLED, or a success that came first.
     *
     * @throws VirtfleetException NOT_CANCELLABLE: not at this moment
     */
    public void cancel() {
        try {
            OperationsGrpc.newBlockingStub(client.channel())
                    .cancelOperation(CancelOperationRequest.newBuilder().setName(name()).build());
        } catch (StatusRuntimeException failure) {
            throw VirtfleetException.of(failure);
        }
    }

    private CompletableFuture<T> wait(Duration interval, Consumer<? super OperationMetadata> progress) {
        Waiting waiting = new Waiting(interval, progress);
        waiting.look();
        return waiting.result;
    }

    private static Optional<OperationMetadata> metadataOf(com.google.longrunning.Operation operation) {
        try {
            return operation.getMetadata().is(OperationMetadata.class)
                    ? Optional.of(operation.getMetadata().unpack(OperationMetadata.class))
                    : Optional.empty();
        } catch (InvalidProtocolBufferException damaged) {
            throw new IllegalStateException(operation.getName() + ": its metadata does not parse", damaged);
        }
    }

    private T response(com.google.longrunning.Operation operation) {
        try {
            return operation.getResponse().unpack(type);
        } catch (InvalidProtocolBufferException other) {
            String found = operation.getResponse().getTypeUrl();
            throw new IllegalStateException(operation.getName() + " answers " + found + ", not " + type.getName(), other);
        }
    }

    /** One wait: looks again until the operation has ended. */
    private final class Waiting {

        private final CompletableFuture<T> result = new CompletableFuture<>();
        private final Duration interval;
        private final Consumer<? super OperationMetadata> progress;
        private int failures;

        Waiting(Duration interval, Consumer<? super OperationMetadata> progress) {
            this.interval = interval;
            this.progress = progress;
        }

        /** Takes what is known, and asks for more if that is not the end. */
        void look() {
            try {
                com.google.longrunning.Operation known = last;
                metadataOf(known).ifPresent(progress);
                if (known.getDone()) {
                    finish(known);
                } else if (!result.isDone()) {
                    ask();
                }
            } catch (RuntimeException failure) {
                result.completeExceptionally(failure);
            }
        }

        private void finish(com.google.longrunning.Operation known) {
            Optional<VirtfleetException> failure =
                    known.hasError() ? VirtfleetException.ofStatus(known.getError()) : Optional.empty();
            failure.ifPresentOrElse(result::completeExceptionally, () -> result.complete(response(known)));
        }

        private void ask() {
            WaitOperationRequest request = WaitOperationRequest.newBuilder()
                    .setName(name())
                    .setTimeout(Durations.fromMillis(interval.toMillis()))
                    .build();
            ListenableFuture<com.google.longrunning.Operation> answer = OperationsGrpc.newFutureStub(client.channel())
                    .withDeadlineAfter(interval.plus(GRACE).toMillis(), TimeUnit.MILLISECONDS)
                    .waitOperation(request);
            result.whenComplete((value, failure) -> answer.cancel(true)); // the caller has stopped waiting
            answer.addListener(() -> take(answer), MoreExecutors.directExecutor());
        }

        private void take(ListenableFuture<com.google.longrunning.Operation> answer) {
            try {
                last = answer.get();
                obstacle = null;
                failures = 0;
                look();
            } catch (CancellationException stopped) {
                result.cancel(false);
            } catch (ExecutionException failure) {
                retry(VirtfleetException.of(failure.getCause()));
            } catch (InterruptedException impossible) {
                // The answer is there already: get() does not wait.
                Thread.currentThread().interrupt();
                result.completeExceptionally(impossible);
            }
        }

        /** A look that is not answered in its time is as good as a lost connection. */
        private void retry(VirtfleetException failure) {
            boolean again = failure.isLost() || failure.code() == Status.Code.DEADLINE_EXCEEDED;
            if (!again || client.isClosed()) {
                result.completeExceptionally(failure);
                return;
            }
            obstacle = failure;
            failures++;
            client.later(Pause.before(failures, failure), this::look);
        }
    }
}

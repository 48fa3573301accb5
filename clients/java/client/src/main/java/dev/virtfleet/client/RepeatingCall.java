package dev.virtfleet.client;

import io.grpc.CallOptions;
import io.grpc.Channel;
import io.grpc.ClientCall;
import io.grpc.Context;
import io.grpc.Deadline;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.Status;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.Executor;
import java.util.concurrent.TimeUnit;

/**
 * A unary call that is made again when it was lost, where that cannot have a second effect.
 *
 * <p>What an attempt is told is kept until it ends, since only then it is known whether it was the last.
 */
final class RepeatingCall<Q, A> extends ClientCall<Q, A> {

    /** How often a call that is safe to repeat is made in all. */
    static final int ATTEMPTS = 4;

    private final MethodDescriptor<Q, A> method;
    private final CallOptions options;
    private final Channel next;
    private final Delays delays;
    private final Context context = Context.current();

    private Listener<A> listener;
    private Metadata headers;
    private Effects.Prepared<Q> request;
    private int attempts;
    private boolean compresses;

    // What cancel() meets, whichever thread calls it.
    private final Object lock = new Object();
    private ClientCall<Q, A> current;
    private Delays.Delayed pause;
    private int requested;
    private boolean ended;
    private boolean cancelled;
    private String cancelMessage;
    private Throwable cancelCause;

    RepeatingCall(MethodDescriptor<Q, A> method, CallOptions options, Channel next, Delays delays) {
        this.method = method;
        this.options = options;
        this.next = next;
        this.delays = delays;
    }

    @Override
    public void start(Listener<A> responses, Metadata sent) {
        listener = responses;
        headers = sent;
    }

    @Override
    public void request(int count) {
        ClientCall<Q, A> running;
        synchronized (lock) {
            requested += count;
            running = current;
        }
        if (running != null) {
            running.request(count);
        }
    }

    @Override
    public void setMessageCompression(boolean enabled) {
        compresses = enabled;
    }

    @Override
    public void sendMessage(Q message) {
        request = Effects.prepare(method, message);
    }

    @Override
    public void halfClose() {
        attempt();
    }

    private void attempt() {
        synchronized (lock) {
            if (ended) {
                return;
            }
            pause = null;
            attempts++;
        }
        ClientCall<Q, A> call = next.newCall(method, options);
        Attempt attempt = new Attempt();
        Metadata copy = new Metadata();
        copy.merge(headers);
        call.start(attempt, copy);
        int wanted;
        boolean unwanted;
        synchronized (lock) {
            // Before its start a call takes neither requests nor an end: what came in between is made up for here.
            current = attempt.closed ? current : call;
            wanted = requested;
            unwanted = cancelled;
        }
        if (unwanted) {
            call.cancel(cancelMessage, cancelCause);
            return;
        }
        call.request(wanted);
        call.setMessageCompression(compresses);
        call.sendMessage(request.message());
        call.halfClose();
    }

    @Override
    public void cancel(String message, Throwable cause) {
        ClientCall<Q, A> running;
        boolean idle;
        synchronized (lock) {
            cancelled = true;
            cancelMessage = message;
            cancelCause = cause;
            running = current;
            idle = !ended && (pause != null || attempts == 0);
            ended |= idle;
            if (pause != null) {
                pause.cancel();
            }
        }
        if (running != null) {
            running.cancel(message, cause);
        } else if (idle && listener != null) {
            Executor executor = options.getExecutor() == null ? Runnable::run : options.getExecutor();
            Status status = Status.CANCELLED.withDescription(message).withCause(cause);
            executor.execute(() -> listener.onClose(status, new Metadata()));
        }
    }

    /** Returns how long to wait before the next attempt, or null if this was the last. */
    private Duration pauseAfter(Status status, Metadata trailers) {
        VirtfleetException failure = VirtfleetException.of(status, trailers);
        boolean again = failure.isLost() && request.repeatable() && attempts < ATTEMPTS;
        if (!again || context.isCancelled() || delays.isClosed()) {
            return null;
        }
        Duration wait = Pause.before(attempts, failure);
        return leaves(options.getDeadline(), wait) && leaves(context.getDeadline(), wait) ? wait : null;
    }

    private static boolean leaves(Deadline deadline, Duration wait) {
        return deadline == null || deadline.timeRemaining(TimeUnit.NANOSECONDS) > wait.toNanos();
    }

    private final class Attempt extends Listener<A> {

        private final List<A> messages = new ArrayList<>(1);
        private Metadata received;
        private boolean closed;

        @Override
        public void onHeaders(Metadata told) {
            received = told;
        }

        @Override
        public void onMessage(A message) {
            messages.add(message);
        }

        @Override
        public void onClose(Status told, Metadata trailers) {
            Status status = LostConnection.named(told);
            Duration wait = status.isOk() ? null : pauseAfter(status, trailers);
            synchronized (lock) {
                closed = true;
                current = null;
                if (wait != null && !cancelled) {
                    pause = delays.after(wait, context.wrap(RepeatingCall.this::attempt));
                    return;
                }
                ended = true;
            }
            if (received != null) {
                listener.onHeaders(received);
            }
            messages.forEach(listener::onMessage);
            listener.onClose(status, trailers);
        }
    }
}

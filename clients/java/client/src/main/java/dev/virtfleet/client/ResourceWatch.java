package dev.virtfleet.client;

import com.google.protobuf.Descriptors.FieldDescriptor;
import com.google.protobuf.Message;
import dev.virtfleet.type.v1.WatchSnapshot;
import io.grpc.CallOptions;
import io.grpc.Channel;
import io.grpc.Context;
import io.grpc.MethodDescriptor;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.stub.ClientCalls;
import java.util.Iterator;
import java.util.NoSuchElementException;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;

/**
 * A watch that goes on for ever: over lost connections, restarted gateways, drains and slow reading it resumes by its token.
 *
 * <pre>{@code
 * try (var watch = client.computeWatch().watchResources(request)) {
 *     while (watch.hasNext()) {
 *         handle(watch.next());
 *     }
 * }
 * }</pre>
 *
 * <p>{@link #hasNext} waits for the next answer. It is false when the watch has been closed or its thread interrupted (which it stays),
 * and throws {@link VirtfleetException} when the watch is refused. One thread reads; any thread may {@link #close}. No method takes or
 * returns null.
 *
 * @param <A> the answers
 */
public final class ResourceWatch<A extends Message> implements Iterator<A>, AutoCloseable {

    private final WatchOptions options;
    private final Stream<?, A> stream;
    private final CountDownLatch closed = new CountDownLatch(1);
    private A next;
    private volatile String token;
    private int failures;

    <Q extends Message> ResourceWatch(
            Channel channel, MethodDescriptor<Q, A> method, CallOptions call, Q request, WatchOptions options) {
        this.options = options;
        Resumption<Q> place = new Resumption<>(request);
        this.stream = new Stream<>(channel, method, call, place);
        this.token = place.token();
    }

    @Override
    public boolean hasNext() {
        while (next == null) {
            if (isClosed() || Thread.currentThread().isInterrupted()) {
                stream.end();
                return false;
            }
            try {
                next = read();
            } catch (StatusRuntimeException failure) {
                recover(VirtfleetException.of(failure));
            }
        }
        return true;
    }

    @Override
    public A next() {
        if (!hasNext()) {
            throw new NoSuchElementException("the watch has been closed");
        }
        A answer = next;
        next = null;
        token = stream.place.token();
        return answer;
    }

    /** {@return the token after what {@link #next} gave last, which another watch can go on from; empty within the first snapshot} */
    public String resumeToken() {
        return token;
    }

    /** Ends the watch. A thread that waits in {@link #hasNext} gets false. Again, it does nothing. */
    @Override
    public void close() {
        closed.countDown();
        stream.end();
    }

    private boolean isClosed() {
        return closed.getCount() == 0;
    }

    private A read() {
        boolean first = stream.open();
        if (isClosed()) {
            stream.end(); // close() may have come before there was a stream to end
        }
        A answer = stream.read();
        if (first) {
            failures = 0;
            options.begun(stream.place.inSnapshot ? WatchOptions.Begin.SNAPSHOT : WatchOptions.Begin.RESUMED);
        }
        stream.place.note(answer);
        return answer;
    }

    /** Returns if the watch is to be tried again, now; throws if it is refused. */
    private void recover(VirtfleetException failure) {
        boolean answered = stream.hasAnswered();
        stream.forget();
        if (isClosed() || Thread.currentThread().isInterrupted()) {
            return;
        }
        if (failure.reason() == Reason.RESUME_TOKEN_COMPACTED && options.resnapshots()) {
            stream.place.forget();
        } else if (!isBreak(failure)) {
            closed.countDown();
            throw failure;
        }
        options.broken(failure);
        if (answered) {
            return;
        }
        failures++;
        try {
            closed.await(Pause.before(failures, failure).toNanos(), TimeUnit.NANOSECONDS);
        } catch (InterruptedException interrupted) {
            Thread.currentThread().interrupt();
        }
    }

    /** Tells whether it is what the token is for: the end of the stream, its connection or its gateway, or slow reading. */
    private static boolean isBreak(VirtfleetException failure) {
        // Errors of virtfleet itself with these codes have a reason; without one, what carries the stream has cut it.
        boolean ofTransport = failure.reason() == Reason.NONE
                && (failure.code() == Status.Code.INTERNAL || failure.code() == Status.Code.CANCELLED);
        return ofTransport || failure.code() == Status.Code.UNAVAILABLE || failure.reason() == Reason.SLOW_READER;
    }

    /** The stream that is open, if one is. */
    private static final class Stream<Q extends Message, A extends Message> {

        private final Channel channel;
        private final MethodDescriptor<Q, A> method;
        private final CallOptions call;
        private final Resumption<Q> place;
        private Iterator<A> answers;
        private Context.CancellableContext context;
        private boolean answered;

        Stream(Channel channel, MethodDescriptor<Q, A> method, CallOptions call, Resumption<Q> place) {
            this.channel = channel;
            this.method = method;
            this.call = call;
            this.place = place;
        }

        /** Opens a stream if none is open; tells whether the next answer is its first. */
        boolean open() {
            if (answers == null) {
                Context.CancellableContext own = Context.current().withCancellation();
                synchronized (this) {
                    context = own;
                }
                answered = false;
                Context before = own.attach();
                try {
                    answers = ClientCalls.blockingServerStreamingCall(channel, method, call, place.request);
                } finally {
                    own.detach(before);
                }
            }
            return !answered;
        }

        A read() {
            if (!answers.hasNext()) {
                throw Status.UNAVAILABLE.withDescription("the stream has ended").asRuntimeException();
            }
            A answer = answers.next();
            answered = true;
            return answer;
        }

        boolean hasAnswered() {
            return answered;
        }

        /** Ends the stream, whichever thread says so. */
        synchronized void end() {
            if (context != null) {
                context.cancel(null);
            }
        }

        /** Makes room for another; for the reader alone. */
        void forget() {
            end();
            answers = null;
        }
    }

    /** Where a watch stands, so that it can go on after any break. */
    private static final class Resumption<Q extends Message> {

        private Q request;
        private boolean inSnapshot;

        Resumption(Q request) {
            this.request = request;
            this.inSnapshot = token().isEmpty();
        }

        private FieldDescriptor field(String name) {
            return request.getDescriptorForType().findFieldByName(name);
        }

        String token() {
            return (String) request.getField(field("resume_token"));
        }

        /** Takes the token of an answer, except inside a snapshot: a broken snapshot begins again. */
        void note(Message answer) {
            var described = answer.getDescriptorForType();
            if (answer.hasField(described.findFieldByName("snapshot_end"))) {
                inSnapshot = false;
            }
            String token = (String) answer.getField(described.findFieldByName("resume_token"));
            if (!token.isEmpty() && !inSnapshot) {
                request = with("resume_token", token);
            }
        }

        /** Makes the next stream begin with a snapshot. */
        void forget() {
            request = with("snapshot", WatchSnapshot.getDefaultInstance());
            inSnapshot = true;
        }

        @SuppressWarnings("unchecked") // a copy of a request of that very class
        private Q with(String name, Object value) {
            return (Q) request.toBuilder().setField(field(name), value).build();
        }
    }
}

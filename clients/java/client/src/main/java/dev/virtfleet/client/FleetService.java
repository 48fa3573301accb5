package dev.virtfleet.client;

import com.google.protobuf.Message;
import io.grpc.CallOptions;
import io.grpc.Channel;
import io.grpc.Context;
import io.grpc.MethodDescriptor;
import io.grpc.StatusRuntimeException;
import io.grpc.stub.AbstractBlockingStub;
import io.grpc.stub.ClientCalls;
import java.util.Iterator;
import java.util.List;
import java.util.Objects;
import java.util.Spliterator;
import java.util.Spliterators;
import java.util.function.Function;
import java.util.stream.Stream;
import java.util.stream.StreamSupport;

/**
 * What the services of a client have in common. It is a stub of gRPC: {@code withDeadlineAfter}, {@code withInterceptors} and the
 * rest of {@link io.grpc.stub.AbstractStub} return a copy that calls so.
 *
 * <p>Threads may share it. A call without a deadline waits as long as the fleet does. An interrupt ends a call with the code
 * CANCELLED and leaves the thread interrupted.
 *
 * @param <S> the service itself
 */
public abstract class FleetService<S extends FleetService<S>> extends AbstractBlockingStub<S> {

    private final VirtfleetClient client;

    FleetService(VirtfleetClient client, Channel channel, CallOptions options) {
        super(channel, options);
        this.client = client;
    }

    final VirtfleetClient client() {
        return client;
    }

    final <Q, A> A call(MethodDescriptor<Q, A> method, Q request) {
        Objects.requireNonNull(request, "request");
        try {
            return ClientCalls.blockingUnaryCall(getChannel(), method, getCallOptions(), request);
        } catch (StatusRuntimeException failure) {
            throw VirtfleetException.of(failure);
        }
    }

    final <Q, T extends Message> Operation<T> start(
            MethodDescriptor<Q, com.google.longrunning.Operation> method, Q request, Class<T> result) {
        return new Operation<>(client, call(method, request), result);
    }

    final <Q extends Message, A extends Message, T> Pages<T> pages(
            MethodDescriptor<Q, A> method, Q request, Function<A, List<T>> items, boolean whole) {
        return new Pages<>(page -> call(method, page), Objects.requireNonNull(request, "request"), items, whole);
    }

    final <Q extends Message, A extends Message> ResourceWatch<A> watch(
            MethodDescriptor<Q, A> method, Q request, WatchOptions options) {
        Objects.requireNonNull(options, "options");
        return new ResourceWatch<>(getChannel(), method, getCallOptions(), Objects.requireNonNull(request, "request"), options);
    }

    final <Q, A> Stream<A> stream(MethodDescriptor<Q, A> method, Q request) {
        Objects.requireNonNull(request, "request");
        Context.CancellableContext context = Context.current().withCancellation();
        Iterator<A> answers;
        Context before = context.attach();
        try {
            answers = ClientCalls.blockingServerStreamingCall(getChannel(), method, getCallOptions(), request);
        } finally {
            context.detach(before);
        }
        var typed = new TypedIterator<>(answers);
        return StreamSupport.stream(Spliterators.spliteratorUnknownSize(typed, Spliterator.ORDERED), false)
                .onClose(() -> context.cancel(null));
    }

    /** Answers of a stream, whose failures are typed. */
    private record TypedIterator<A>(Iterator<A> answers) implements Iterator<A> {

        @Override
        public boolean hasNext() {
            try {
                return answers.hasNext();
            } catch (StatusRuntimeException failure) {
                throw VirtfleetException.of(failure);
            }
        }

        @Override
        public A next() {
            try {
                return answers.next();
            } catch (StatusRuntimeException failure) {
                throw VirtfleetException.of(failure);
            }
        }
    }
}

package dev.virtfleet.client;

import com.google.protobuf.Descriptors.FieldDescriptor;
import com.google.protobuf.Message;
import dev.virtfleet.type.v1.NodeFailure;
import java.util.Iterator;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.NoSuchElementException;
import java.util.Objects;
import java.util.Spliterator;
import java.util.Spliterators;
import java.util.function.Consumer;
import java.util.function.Function;
import java.util.function.UnaryOperator;
import java.util.stream.Stream;
import java.util.stream.StreamSupport;

/**
 * All items of a list, page by page as they are read. A {@code page_token} in the request is where it begins.
 *
 * <p>A list of all nodes may lack the part of one that is away. That is never silent: after the last item a
 * {@link PartialListException} names the nodes. {@link #tolerating} takes what there is instead, as does {@code allow_stale} in
 * the request, for what was last seen.
 *
 * <p>Immutable: each iteration asks anew. Threads may share it, not its iterators. Reading throws {@link VirtfleetException} when a
 * page cannot be had.
 *
 * @param <T> the items
 */
public final class Pages<T> implements Iterable<T> {

    private final Function<Message, List<T>> reader;
    private final UnaryOperator<Message> call;
    private final Message request;
    private final Consumer<Map<String, NodeFailure>> end;

    /** Calls for pages and takes the items out of them; {@code whole} is whether missing nodes are told. */
    @SuppressWarnings("unchecked") // the answers of the call are those that the getter is of
    <Q extends Message, A extends Message> Pages(
            Function<Q, A> call, Q request, Function<A, List<T>> items, boolean whole) {
        this((UnaryOperator<Message>) page -> call.apply((Q) page), request, page -> items.apply((A) page), whole
                ? missing -> { throw new PartialListException(List.copyOf(missing.values())); }
                : missing -> {});
    }

    private Pages(
            UnaryOperator<Message> call,
            Message request,
            Function<Message, List<T>> reader,
            Consumer<Map<String, NodeFailure>> end) {
        this.call = call;
        this.request = request;
        this.reader = reader;
        this.end = end;
    }

    /**
     * Returns the same list, which may lack nodes.
     *
     * @param missing is told of each node whose part is missing, after the last item
     * @return a list that does not throw {@link PartialListException}
     */
    public Pages<T> tolerating(Consumer<? super NodeFailure> missing) {
        Objects.requireNonNull(missing, "missing");
        return new Pages<>(call, request, reader, failures -> failures.values().forEach(missing));
    }

    /** {@return the items as a stream, in the order of the fleet} */
    public Stream<T> stream() {
        return StreamSupport.stream(spliterator(), false);
    }

    /** {@return all items, read to the end} */
    public List<T> toList() {
        return stream().toList();
    }

    @Override
    public Spliterator<T> spliterator() {
        return Spliterators.spliteratorUnknownSize(iterator(), Spliterator.ORDERED | Spliterator.NONNULL);
    }

    @Override
    public Iterator<T> iterator() {
        return new Reading();
    }

    private final class Reading implements Iterator<T> {

        private final Map<String, NodeFailure> missing = new LinkedHashMap<>();
        private Iterator<T> page = List.<T>of().iterator();
        private Message next = request;

        @Override
        public boolean hasNext() {
            while (!page.hasNext() && next != null) {
                read();
            }
            if (page.hasNext()) {
                return true;
            }
            if (!missing.isEmpty()) {
                Map<String, NodeFailure> told = new LinkedHashMap<>(missing);
                missing.clear();
                end.accept(told);
            }
            return false;
        }

        @Override
        public T next() {
            if (!hasNext()) {
                throw new NoSuchElementException();
            }
            return page.next();
        }

        private void read() {
            Message answer = call.apply(next);
            if (!allowsStale()) {
                unreachable(answer).forEach(failure -> missing.put(failure.getNode(), failure));
            }
            String token = (String) answer.getField(answer.getDescriptorForType().findFieldByName("next_page_token"));
            FieldDescriptor field = request.getDescriptorForType().findFieldByName("page_token");
            next = token.isEmpty() ? null : request.toBuilder().setField(field, token).build();
            page = reader.apply(answer).iterator();
        }

        private boolean allowsStale() {
            FieldDescriptor stale = request.getDescriptorForType().findFieldByName("allow_stale");
            return stale != null && (Boolean) request.getField(stale); // the caller has said that what was last seen will do
        }

        private List<NodeFailure> unreachable(Message answer) {
            FieldDescriptor field = answer.getDescriptorForType().findFieldByName("unreachable");
            if (field == null) {
                return List.of();
            }
            List<?> failures = (List<?>) answer.getField(field);
            return failures.stream().map(NodeFailure.class::cast).toList();
        }
    }
}

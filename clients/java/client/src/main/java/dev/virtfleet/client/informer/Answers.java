package dev.virtfleet.client.informer;

import com.google.protobuf.Descriptors.FieldDescriptor;
import com.google.protobuf.Message;
import dev.virtfleet.client.ResourceWatch;
import dev.virtfleet.type.v1.ResourceDelete;
import dev.virtfleet.type.v1.ResourceMoved;
import dev.virtfleet.type.v1.ResourceMovedIn;
import dev.virtfleet.type.v1.ResourceMovedOut;
import dev.virtfleet.type.v1.WatchSourceStatus;
import java.util.ArrayList;
import java.util.List;
import java.util.Optional;

/** What a watch answers, whichever package it is of: their answers have the same fields, in classes of their own. */
final class Answers<T extends Message> implements Informer.Source<T> {

    private final ResourceWatch<?> watch;
    private final Class<T> kind;

    Answers(ResourceWatch<?> watch, Class<T> kind) {
        this.watch = watch;
        this.kind = kind;
    }

    @Override
    public boolean hasNext() {
        return watch.hasNext();
    }

    @Override
    public Change.News<T> next() {
        return news(watch.next());
    }

    @Override
    public void close() {
        watch.close();
    }

    private Change.News<T> news(Message answer) {
        var described = answer.getDescriptorForType();
        List<Change<T>> changes = new ArrayList<>();
        for (Object change : (List<?>) answer.getField(described.findFieldByName("changes"))) {
            change((Message) change).ifPresent(changes::add); // the rest are events and other kinds
        }
        FieldDescriptor source = described.findFieldByName("source_status");
        return new Change.News<>(
                List.copyOf(changes),
                answer.hasField(described.findFieldByName("snapshot_end")),
                answer.hasField(source) ? Optional.of((WatchSourceStatus) answer.getField(source)) : Optional.empty());
    }

    private Optional<Change<T>> change(Message change) {
        Optional<Object> said = chosen(change, "kind");
        Object what = said.orElse(change);
        if (what instanceof ResourceDelete deleted) {
            return Optional.of(new Change.Deleted<>(deleted));
        }
        if (what instanceof ResourceMoved moved) {
            return Optional.of(new Change.Moved<>(moved.getUid(), moved.getNewName()));
        }
        if (what instanceof ResourceMovedIn moved) {
            return Optional.of(new Change.Moved<>(moved.getUid(), moved.getName()));
        }
        if (what instanceof ResourceMovedOut moved) {
            return Optional.of(new Change.Left<>(moved.getUid()));
        }
        FieldDescriptor put = change.getDescriptorForType().findFieldByName("put");
        if (!change.hasField(put)) {
            return Optional.empty();
        }
        return chosen((Message) what, "resource").filter(kind::isInstance).map(one -> new Change.Put<>(kind.cast(one)));
    }

    /** Returns what is set of a oneof. */
    private static Optional<Object> chosen(Message of, String name) {
        for (var oneof : of.getDescriptorForType().getOneofs()) {
            if (oneof.getName().equals(name) && of.hasOneof(oneof)) {
                return Optional.of(of.getField(of.getOneofFieldDescriptor(oneof)));
            }
        }
        return Optional.empty();
    }
}

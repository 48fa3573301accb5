package dev.virtfleet.client.informer;

import com.google.protobuf.Message;
import dev.virtfleet.type.v1.ResourceDelete;
import dev.virtfleet.type.v1.WatchSourceStatus;
import java.util.List;
import java.util.Optional;

/** One change of a resource, whichever package its watch is of. */
sealed interface Change<T extends Message> {

    /** It is new, or not as it was. */
    record Put<T extends Message>(T resource) implements Change<T> {}

    /** It is gone. */
    record Deleted<T extends Message>(ResourceDelete what) implements Change<T> {}

    /** It has another name; what else has changed is told by a put that follows. */
    record Moved<T extends Message>(String uid, String name) implements Change<T> {}

    /** It has left the node that is watched. */
    record Left<T extends Message>(String uid) implements Change<T> {}

    /** What one answer of a watch says. */
    record News<T extends Message>(List<Change<T>> changes, boolean snapshotEnd, Optional<WatchSourceStatus> source) {}
}

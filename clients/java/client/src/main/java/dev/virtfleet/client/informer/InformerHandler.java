package dev.virtfleet.client.informer;

import dev.virtfleet.client.VirtfleetException;
import dev.virtfleet.type.v1.WatchSourceStatus;

/**
 * Is told of changes, in order, by the one thread of an informer: a handler must not block. What it throws ends the informer.
 *
 * <p>Every method does nothing unless it is overridden. No argument is null.
 *
 * @param <T> the resources
 */
public interface InformerHandler<T> {

    /**
     * Tells of a resource that was not known.
     *
     * @param resource the resource
     */
    default void added(T resource) {}

    /**
     * Tells of a resource that is not as it was.
     *
     * @param before as it was
     * @param after as it is
     */
    default void changed(T before, T after) {}

    /**
     * Tells of a resource that has come to another node, or has another name. It is still the same object.
     *
     * @param before as it was
     * @param after as it is
     */
    default void moved(T before, T after) {}

    /**
     * Tells of a resource that is gone.
     *
     * @param last as it was last
     */
    default void deleted(T last) {}

    /** Tells that all that exists is known: once after the start, and after each new snapshot. */
    default void synced() {}

    /**
     * Tells that the part of a node is live, stale, being read anew, or lost.
     *
     * @param status how it stands
     */
    default void sourceChanged(WatchSourceStatus status) {}

    /** Tells that the watch stands. */
    default void connected() {}

    /**
     * Tells that the watch is broken. It is being resumed, unless {@link Informer#ended} is done.
     *
     * @param cause why
     */
    default void disconnected(VirtfleetException cause) {}
}

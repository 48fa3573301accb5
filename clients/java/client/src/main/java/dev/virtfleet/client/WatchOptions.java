package dev.virtfleet.client;

import java.util.Objects;
import java.util.function.Consumer;

/**
 * How a watch is followed. Immutable; what is told is told in the thread that reads the watch.
 */
public final class WatchOptions {

    /** How a stream of a watch begins: the first, and those after breaks. */
    public enum Begin {
        /** With all that exists. What does not occur up to the end of the snapshot is gone. */
        SNAPSHOT,
        /** Where the last one ended. */
        RESUMED
    }

    private static final WatchOptions STANDARD = new WatchOptions(false, begin -> {}, broken -> {});

    private final boolean resnapshots;
    private final Consumer<? super Begin> begun;
    private final Consumer<? super VirtfleetException> broken;

    private WatchOptions(
            boolean resnapshots, Consumer<? super Begin> begun, Consumer<? super VirtfleetException> broken) {
        this.resnapshots = resnapshots;
        this.begun = begun;
        this.broken = broken;
    }

    /** {@return options that end a watch with RESUME_TOKEN_COMPACTED when the history is too short, and tell nothing} */
    public static WatchOptions standard() {
        return STANDARD;
    }

    /**
     * Has the watch begin again with a snapshot when the history no longer reaches back to its token.
     *
     * @return options that do
     */
    public WatchOptions resnapshotting() {
        return new WatchOptions(true, begun, broken);
    }

    /**
     * Tells before the answers of each stream how it begins.
     *
     * @param listener is told
     * @return options that do
     */
    public WatchOptions onBegin(Consumer<? super Begin> listener) {
        return new WatchOptions(resnapshots, Objects.requireNonNull(listener, "listener"), broken);
    }

    /**
     * Tells the cause when a stream breaks that will be resumed.
     *
     * @param listener is told
     * @return options that do
     */
    public WatchOptions onBreak(Consumer<? super VirtfleetException> listener) {
        return new WatchOptions(resnapshots, begun, Objects.requireNonNull(listener, "listener"));
    }

    boolean resnapshots() {
        return resnapshots;
    }

    void begun(Begin how) {
        begun.accept(how);
    }

    void broken(VirtfleetException cause) {
        broken.accept(cause);
    }
}

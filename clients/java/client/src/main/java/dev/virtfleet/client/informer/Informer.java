package dev.virtfleet.client.informer;

import com.google.protobuf.Message;
import com.google.protobuf.Parser;
import dev.virtfleet.client.Reason;
import dev.virtfleet.client.VirtfleetException;
import dev.virtfleet.client.WatchOptions;
import dev.virtfleet.type.v1.ResourceView;
import dev.virtfleet.type.v1.SourceState;
import dev.virtfleet.type.v1.WatchSourceStatus;
import java.time.Duration;
import java.time.Instant;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.HashSet;
import java.util.LinkedHashSet;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.Objects;
import java.util.Optional;
import java.util.Set;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.TimeoutException;
import java.util.concurrent.locks.Lock;
import java.util.concurrent.locks.ReadWriteLock;
import java.util.concurrent.locks.ReentrantReadWriteLock;
import java.util.function.BiFunction;
import java.util.function.Consumer;
import java.util.function.Supplier;
import java.util.stream.Stream;

/**
 * A local copy of the resources of one kind. {@link Informers} makes one.
 *
 * <p>It is as fresh as it says: {@link #isConnected} is about the watch, {@link #source} about one node. What was last seen of a node
 * that is away is kept; do not take it for dead.
 *
 * <p>Threads may share it, and read while it is being told of changes. {@link #close} ends its thread; what it has learned can be read
 * still. No method takes or returns null.
 *
 * @param <T> the resources
 */
public final class Informer<T extends Message> implements AutoCloseable {

    private static final Duration CLOSE_TIMEOUT = Duration.ofSeconds(10);

    private final Source<T> source;
    private final List<InformerHandler<? super T>> handlers;
    private final CompletableFuture<Void> synced = new CompletableFuture<>();
    private final CompletableFuture<Void> ended = new CompletableFuture<>();
    private final Thread thread;
    private volatile boolean closing;

    private final ReadWriteLock lock = new ReentrantReadWriteLock();
    private final Store<T> store;
    private final Map<String, WatchSourceStatus> sources = new HashMap<>();
    private boolean connected;
    private VirtfleetException obstacle;
    private Instant heard = Instant.EPOCH;
    private long changes;
    private long snapshots;
    private long resumptions;
    private long resyncs;

    // Of the informer's own thread alone: the uids that occurred in the snapshot that is being read, of all and of single nodes.
    private Set<String> snapshot;
    private final Map<String, Set<String>> resyncing = new HashMap<>();

    /** Where the news come from. */
    interface Source<T extends Message> extends AutoCloseable {
        boolean hasNext();

        Change.News<T> next();

        @Override
        void close();
    }

    /** What of the resources is watched. */
    record Plan(String parent, String filter, ResourceView view) {}

    private Informer(Builder<T> builder) {
        handlers = List.copyOf(builder.handlers);
        store = new Store<>(builder.parser, builder.packs, builder.indexes);
        WatchOptions options = WatchOptions.standard().resnapshotting().onBegin(this::begin).onBreak(this::broken);
        source = builder.open.apply(new Plan(builder.parent, builder.filter, builder.view), options);
        thread = new Thread(this::run, "virtfleet-informer-" + builder.kind.getSimpleName().toLowerCase(Locale.ROOT));
        thread.setDaemon(true);
    }

    // What is read.

    /**
     * Waits until all that exists is known.
     *
     * @param limit how long at most
     * @throws TimeoutException it is not known in that time; its cause is what stood in the way last, if anything did
     * @throws VirtfleetException the watch is refused
     * @throws InterruptedException the thread was interrupted
     */
    public void awaitSynced(Duration limit) throws InterruptedException, TimeoutException {
        try {
            CompletableFuture.anyOf(synced, ended).get(limit.toNanos(), TimeUnit.NANOSECONDS);
        } catch (TimeoutException late) {
            String why = reading(() -> Optional.ofNullable(obstacle)).map(cause -> ": " + cause.getMessage()).orElse("");
            throw (TimeoutException) new TimeoutException("not all is known within " + limit + why).initCause(obstacle);
        } catch (ExecutionException failure) {
            throw failure.getCause() instanceof VirtfleetException refused ? refused : new IllegalStateException(failure.getCause());
        }
        if (!synced.isDone()) {
            throw new IllegalStateException("the informer was closed before it knew all");
        }
    }

    /** {@return whether all that existed at the start is known} */
    public boolean isSynced() {
        return synced.isDone();
    }

    /** {@return whether the watch stands; while it does not, everything is as last seen} */
    public boolean isConnected() {
        return reading(() -> connected);
    }

    /** {@return when the watch last said anything, which it does at least every 10 seconds; the epoch: never} */
    public Instant lastHeard() {
        return reading(() -> heard);
    }

    /**
     * {@return a new future that is done when the informer has ended: normally when it was closed, else with the cause, a
     * {@link VirtfleetException} when the watch is refused}
     */
    public CompletableFuture<Void> ended() {
        return ended.copy();
    }

    /**
     * Returns how the part of a node stands.
     *
     * @param node {@code nodes/n1}
     * @return how it stands; a node that nothing was told of is live
     */
    public WatchSourceStatus source(String node) {
        Objects.requireNonNull(node, "node");
        return reading(() -> sources.getOrDefault(node, WatchSourceStatus.newBuilder()
                .setNode(node)
                .setState(SourceState.SOURCE_STATE_LIVE)
                .build()));
    }

    /** {@return how the parts of all nodes stand that something was told of, by their names} */
    public Map<String, WatchSourceStatus> sources() {
        return reading(() -> Map.copyOf(sources));
    }

    /** {@return what has been told so far} */
    public InformerStatistics statistics() {
        return reading(() -> new InformerStatistics(changes, snapshots, resumptions, resyncs));
    }

    /**
     * Returns the resource with a uid.
     *
     * @param uid its uid
     * @return the resource; empty if there is none
     */
    public Optional<T> get(String uid) {
        return reading(() -> store.get(uid));
    }

    /**
     * Returns the resource of a name.
     *
     * @param name its name: {@code nodes/n1/domains/web}
     * @return the resource; empty if there is none
     */
    public Optional<T> named(String name) {
        return reading(() -> store.named(name));
    }

    /**
     * Returns the resources that have a value in an index: {@code find(Indexes.LABEL, "app=web")}.
     *
     * @param index one of the kind's, or one that was added before the start
     * @param value the value
     * @return the resources, by name
     */
    public List<T> find(Index<? super T> index, String value) {
        return reading(() -> store.find(index, value));
    }

    /**
     * Counts the resources that have a value in an index, without looking at them.
     *
     * @param index one of the kind's, or one that was added before the start
     * @param value the value
     * @return how many there are
     */
    public int count(Index<? super T> index, String value) {
        return reading(() -> store.count(index, value));
    }

    /** {@return every resource that there is now, each as it is at the moment of its turn} */
    public Stream<T> stream() {
        return reading(store::uids).stream().map(this::get).flatMap(Optional::stream);
    }

    /** {@return how many resources there are} */
    public int size() {
        return reading(store::size);
    }

    private <R> R reading(Supplier<R> read) {
        return under(lock.readLock(), read);
    }

    private static <R> R under(Lock held, Supplier<R> work) {
        held.lock();
        try {
            return work.get();
        } finally {
            held.unlock();
        }
    }

    /** Ends the watch and waits for the thread of the informer, unless that is the caller. Again, it does nothing. */
    @Override
    public void close() {
        closing = true;
        source.close();
        if (Thread.currentThread() != thread) {
            try {
                thread.join(CLOSE_TIMEOUT.toMillis());
            } catch (InterruptedException interrupted) {
                Thread.currentThread().interrupt();
            }
        }
    }

    // What the watch tells.

    private void run() {
        try {
            while (source.hasNext()) {
                take(source.next());
            }
            connection(Optional.of(VirtfleetException.of(io.grpc.Status.CANCELLED
                    .withDescription("the informer has been closed")
                    .asRuntimeException())));
            ended.complete(null);
        } catch (VirtfleetException refused) {
            connection(Optional.of(refused));
            ended.completeExceptionally(refused);
        } catch (RuntimeException | Error failure) {
            // A handler or an index has thrown: what they know is not to be relied on any more.
            ended.completeExceptionally(failure);
            if (!closing) {
                throw failure;
            }
        } finally {
            source.close();
        }
    }

    void begin(WatchOptions.Begin how) {
        boolean fresh = how == WatchOptions.Begin.SNAPSHOT;
        under(lock.writeLock(), () -> fresh ? ++snapshots : ++resumptions);
        // A part that was being read when the stream broke is read anew.
        snapshot = fresh ? new HashSet<>() : null;
        resyncing.clear();
        connection(Optional.empty());
    }

    void broken(VirtfleetException cause) {
        connection(Optional.of(cause));
    }

    private void connection(Optional<VirtfleetException> cause) {
        boolean changed = under(lock.writeLock(), () -> {
            boolean before = connected;
            connected = cause.isEmpty();
            obstacle = cause.orElse(null);
            return before != connected;
        });
        if (changed) {
            handlers.forEach(handler -> cause.ifPresentOrElse(handler::disconnected, handler::connected));
        }
    }

    /** Takes the news, then tells the handlers of them: they may read. */
    void take(Change.News<T> news) {
        List<Consumer<InformerHandler<? super T>>> told = new ArrayList<>();
        boolean complete = under(lock.writeLock(), () -> {
            heard = Instant.now();
            for (Change<T> change : news.changes()) {
                changes++;
                take(change, told);
            }
            if (news.snapshotEnd()) {
                endSnapshot(told);
            }
            news.source().ifPresent(status -> sourceStatus(status, told));
            return news.snapshotEnd();
        });
        if (complete) {
            synced.complete(null);
        }
        told.forEach(handlers::forEach);
    }

    private void take(Change<T> change, List<Consumer<InformerHandler<? super T>>> told) {
        if (change instanceof Change.Put<T> put) {
            put(put.resource(), told);
        } else if (change instanceof Change.Deleted<T> deleted) {
            String uid = deleted.what().getUid();
            // Unknown, or it lives under another name by now: nothing of what is known is gone.
            if (store.nameOf(uid).filter(deleted.what().getName()::equals).isPresent()) {
                drop(uid, told);
            }
        } else if (change instanceof Change.Moved<T> moved) {
            store.get(moved.uid())
                    .filter(known -> !Resource.of(known).name(known).equals(moved.name()))
                    .ifPresent(known -> put(Resource.of(known).renamed(known, moved.name()), told));
        } else if (change instanceof Change.Left<T> left) {
            drop(left.uid(), told); // of a watch of one node: what has left it is gone for this watch
        }
    }

    private void put(T resource, List<Consumer<InformerHandler<? super T>>> told) {
        String uid = Resource.of(resource).uid(resource);
        String name = Resource.of(resource).name(resource);
        if (snapshot != null) {
            snapshot.add(uid);
        }
        Optional.ofNullable(resyncing.get(Names.nodeOf(name))).ifPresent(seen -> seen.add(uid));
        // A slow reader is told of a name only how it is last: the deletion of its predecessor may be left out.
        store.holder(name).filter(holder -> !holder.equals(uid)).ifPresent(holder -> drop(holder, told));
        Store.Outcome<T> outcome = store.put(resource);
        if (outcome.same()) {
            return;
        }
        if (outcome.before().isEmpty()) {
            told.add(handler -> handler.added(resource));
            return;
        }
        T before = outcome.before().get();
        if (outcome.renamed()) {
            told.add(handler -> handler.moved(before, resource));
        } else {
            told.add(handler -> handler.changed(before, resource));
        }
    }

    private void drop(String uid, List<Consumer<InformerHandler<? super T>>> told) {
        store.remove(uid).ifPresent(last -> told.add(handler -> handler.deleted(last)));
    }

    /** Drops what the snapshot did not hold. */
    private void endSnapshot(List<Consumer<InformerHandler<? super T>>> told) {
        Set<String> seen = snapshot == null ? Set.of() : snapshot;
        store.uids().stream().filter(uid -> !seen.contains(uid)).forEach(uid -> drop(uid, told));
        snapshot = null;
        told.add(InformerHandler::synced);
    }

    /** Takes how the part of a node stands, and ends the reading anew of that part. */
    private void sourceStatus(WatchSourceStatus status, List<Consumer<InformerHandler<? super T>>> told) {
        String node = status.getNode();
        boolean removed = status.getState() == SourceState.SOURCE_STATE_LOST
                && VirtfleetException.ofStatus(status.getStatus())
                        .filter(failure -> failure.reason() == Reason.NODE_UNKNOWN)
                        .isPresent();
        if (status.getState() == SourceState.SOURCE_STATE_RESYNCING) {
            resyncs++;
            resyncing.put(node, new HashSet<>());
        } else {
            Set<String> seen = resyncing.remove(node);
            if (removed || seen != null) {
                dropNode(node, removed ? Set.of() : seen, told);
            }
        }
        if (removed) {
            sources.remove(node);
        } else {
            sources.put(node, status);
        }
        told.add(handler -> handler.sourceChanged(status));
    }

    /** Drops all of a node but what is in {@code kept}. An informer of nodes keeps them: it is told of their ends itself. */
    private void dropNode(String node, Set<String> kept, List<Consumer<InformerHandler<? super T>>> told) {
        if (store.has(Indexes.NODE)) {
            store.uidsOf(Indexes.NODE, node).stream().filter(uid -> !kept.contains(uid)).forEach(uid -> drop(uid, told));
        }
    }

    /**
     * Says what an informer keeps and whom it tells. Not for several threads at once, and for one informer.
     *
     * @param <T> the resources
     */
    public static final class Builder<T extends Message> {

        private final Class<T> kind;
        private final Parser<T> parser;
        private final BiFunction<Plan, WatchOptions, Source<T>> open;
        private final List<InformerHandler<? super T>> handlers = new ArrayList<>();
        private final Set<Index<? super T>> indexes = new LinkedHashSet<>();
        private String parent = "";
        private String filter = "";
        private ResourceView view = ResourceView.RESOURCE_VIEW_UNSPECIFIED;
        private boolean packs;
        private boolean used;

        Builder(Class<T> kind, Parser<T> parser, BiFunction<Plan, WatchOptions, Source<T>> open) {
            this.kind = kind;
            this.parser = parser;
            this.open = open;
        }

        /**
         * Keeps the resources of one node instead of all nodes.
         *
         * @param name {@code nodes/n1}
         * @return this
         */
        public Builder<T> parent(String name) {
            parent = Objects.requireNonNull(name, "name");
            return this;
        }

        /**
         * Keeps only what a filter of lists holds for. What ceases to hold is deleted here.
         *
         * @param text the filter: {@code labels.app="web"}
         * @return this
         */
        public Builder<T> filter(String text) {
            filter = Objects.requireNonNull(text, "text");
            return this;
        }

        /**
         * Keeps the view BASIC: no spec, and of the status no active and resolved spec. {@link Indexes#DOMAIN_VOLUME} stays empty then,
         * and the indexes of MACs and addresses know what has been given alone.
         *
         * @return this
         */
        public Builder<T> basic() {
            view = ResourceView.RESOURCE_VIEW_BASIC;
            return this;
        }

        /**
         * Keeps each resource as it is sent, in about a third of the memory, and decodes it at each read.
         *
         * @return this
         */
        public Builder<T> packed() {
            packs = true;
            return this;
        }

        /**
         * Adds an index of one's own.
         *
         * @param index the index; adding it again does nothing
         * @return this
         */
        public Builder<T> index(Index<? super T> index) {
            indexes.add(Objects.requireNonNull(index, "index"));
            return this;
        }

        /**
         * Adds a handler.
         *
         * @param handler is told of all changes from the first on
         * @return this
         */
        public Builder<T> handler(InformerHandler<? super T> handler) {
            handlers.add(Objects.requireNonNull(handler, "handler"));
            return this;
        }

        /**
         * Starts the informer. It does not wait: see {@link Informer#awaitSynced}.
         *
         * @return the informer, which is to be closed
         * @throws IllegalStateException the builder has started one already
         */
        public Informer<T> start() {
            Informer<T> informer = prepared();
            informer.thread.start();
            return informer;
        }

        /** Makes an informer that is told by its maker, not by a thread. */
        Informer<T> prepared() {
            if (used) {
                throw new IllegalStateException("a builder starts one informer");
            }
            used = true;
            return new Informer<>(this);
        }
    }
}

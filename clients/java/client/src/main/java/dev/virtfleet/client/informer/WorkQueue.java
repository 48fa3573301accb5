package dev.virtfleet.client.informer;

import com.google.protobuf.Message;
import java.lang.System.Logger;
import java.lang.System.Logger.Level;
import java.time.Duration;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.Collection;
import java.util.Deque;
import java.util.HashMap;
import java.util.HashSet;
import java.util.List;
import java.util.Map;
import java.util.Objects;
import java.util.Optional;
import java.util.PriorityQueue;
import java.util.Set;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.locks.Condition;
import java.util.concurrent.locks.ReentrantLock;
import java.util.function.BiConsumer;
import java.util.function.Function;

/**
 * A queue of work for the keys of resources.
 *
 * <p>A key that is added while it waits is in it once; one that is added while it is worked on comes again afterwards, so that no two
 * workers ever have the same key and no change is missed. A key whose work fails comes again, after a pause that grows.
 *
 * <p>Threads may share it. No method takes or returns null.
 *
 * @param <K> the keys, which have {@code equals} and {@code hashCode}
 */
public final class WorkQueue<K> implements AutoCloseable {

    private static final Logger LOG = System.getLogger(WorkQueue.class.getName());
    private static final Duration FIRST_PAUSE = Duration.ofMillis(10);
    private static final Duration LONGEST_PAUSE = Duration.ofMinutes(1);
    private static final int MOST_DOUBLINGS = 30;

    private final Duration firstPause;
    private final Duration longestPause;
    private final BiConsumer<? super K, ? super Exception> failed;

    private final ReentrantLock lock = new ReentrantLock();
    private final Condition news = lock.newCondition();
    private final Deque<K> order = new ArrayDeque<>();
    private final Set<K> waiting = new HashSet<>();
    private final Set<K> working = new HashSet<>();
    private final Map<K, Integer> failures = new HashMap<>();
    private final Map<K, Alarm<K>> later = new HashMap<>();
    private final PriorityQueue<Alarm<K>> alarms = new PriorityQueue<>();
    private final Set<Thread> workers = new HashSet<>();
    private boolean closed;

    /** When a key is to be added. One that is no longer in {@code later} has been overtaken by an earlier one. */
    private record Alarm<K>(long nanos, K key) implements Comparable<Alarm<K>> {
        @Override
        public int compareTo(Alarm<K> other) {
            return Long.compare(nanos - other.nanos, 0);
        }
    }

    /**
     * The work on one key.
     *
     * @param <K> the keys
     */
    @FunctionalInterface
    public interface Work<K> {

        /**
         * Does the work.
         *
         * @param key the key
         * @throws Exception it failed, and is tried again after a pause
         */
        void on(K key) throws Exception;
    }

    private WorkQueue(Duration firstPause, Duration longestPause, BiConsumer<? super K, ? super Exception> failed) {
        this.firstPause = firstPause;
        this.longestPause = longestPause;
        this.failed = failed;
    }

    /**
     * Makes a queue whose pauses after failures grow from 10 milliseconds to one minute, and which logs them.
     *
     * @param <K> the keys
     * @return an empty queue
     */
    public static <K> WorkQueue<K> create() {
        return create(FIRST_PAUSE, LONGEST_PAUSE);
    }

    /**
     * Makes a queue that logs failures to the {@link System.Logger} of this class.
     *
     * @param <K> the keys
     * @param firstPause how long a key waits after its first failure; doubled with each further one
     * @param longestPause how long at most
     * @return an empty queue
     */
    public static <K> WorkQueue<K> create(Duration firstPause, Duration longestPause) {
        return create(firstPause, longestPause, (key, failure) ->
                LOG.log(Level.WARNING, () -> "the work on " + key + " failed and is tried again", failure));
    }

    /**
     * Makes a queue.
     *
     * @param <K> the keys
     * @param firstPause how long a key waits after its first failure; doubled with each further one
     * @param longestPause how long at most
     * @param failed is told of each failure, by the worker
     * @return an empty queue
     */
    public static <K> WorkQueue<K> create(
            Duration firstPause, Duration longestPause, BiConsumer<? super K, ? super Exception> failed) {
        Objects.requireNonNull(failed, "failed");
        if (firstPause.isNegative() || firstPause.isZero() || longestPause.compareTo(firstPause) < 0) {
            throw new IllegalArgumentException("pauses grow from more than nothing: " + firstPause + ", " + longestPause);
        }
        return new WorkQueue<>(firstPause, longestPause, failed);
    }

    /**
     * Puts a key at the end, unless it waits already.
     *
     * @param key the key
     */
    public void add(K key) {
        Objects.requireNonNull(key, "key");
        locked(() -> addNow(key));
    }

    private void addNow(K key) {
        if (closed || !waiting.add(key) || working.contains(key)) {
            return; // one that is worked on is put at the end when that is done
        }
        order.add(key);
        news.signal();
    }

    /**
     * Adds a key when a time has gone by. Of several times that are set for a key, the earliest to come holds.
     *
     * @param key the key
     * @param pause the time
     */
    public void addAfter(K key, Duration pause) {
        Objects.requireNonNull(key, "key");
        locked(() -> addLater(key, pause));
    }

    private void addLater(K key, Duration pause) {
        if (pause.isZero() || pause.isNegative()) {
            addNow(key);
            return;
        }
        Alarm<K> alarm = new Alarm<>(System.nanoTime() + pause.toNanos(), key);
        Alarm<K> known = later.get(key);
        if (!closed && (known == null || alarm.compareTo(known) < 0)) {
            later.put(key, alarm);
            alarms.add(alarm);
            news.signal(); // one who waits must look when it is due
        }
    }

    /**
     * Takes the first key, waiting for one. {@link #done} must follow.
     *
     * @return the key; empty when the queue is closed
     * @throws InterruptedException the thread was interrupted
     */
    public Optional<K> take() throws InterruptedException {
        lock.lockInterruptibly();
        try {
            while (!closed) {
                long pause = due();
                if (!order.isEmpty()) {
                    K key = order.remove();
                    waiting.remove(key);
                    working.add(key);
                    return Optional.of(key);
                }
                if (pause == Long.MAX_VALUE) {
                    news.await();
                } else {
                    news.awaitNanos(pause);
                }
            }
            return Optional.empty();
        } finally {
            lock.unlock();
        }
    }

    /** Adds what is due; returns how long it is until the next is. */
    private long due() {
        while (!alarms.isEmpty()) {
            Alarm<K> first = alarms.peek();
            long pause = first.nanos() - System.nanoTime();
            if (pause > 0) {
                return pause;
            }
            alarms.remove();
            if (later.remove(first.key(), first)) {
                addNow(first.key());
            }
        }
        return Long.MAX_VALUE;
    }

    /**
     * Says that the work on a key has ended well: its next failure is its first. If it was added in between, it comes again.
     *
     * @param key the key that was taken
     */
    public void done(K key) {
        locked(() -> {
            failures.remove(key);
            free(key);
        });
    }

    /**
     * Says that the work on a key has failed: it comes again after a pause that grows with each failure.
     *
     * @param key the key that was taken
     */
    public void failed(K key) {
        locked(() -> {
            int before = failures.merge(key, 1, Integer::sum) - 1;
            Duration pause = firstPause.multipliedBy(1L << Math.min(before, MOST_DOUBLINGS));
            addLater(key, pause.compareTo(longestPause) < 0 ? pause : longestPause);
            free(key);
        });
    }

    private void free(K key) {
        working.remove(key);
        if (!closed && waiting.contains(key)) {
            order.add(key);
            news.signal();
        }
    }

    /** {@return how many keys wait to be taken now} */
    public int size() {
        lock.lock();
        try {
            due();
            return order.size();
        } finally {
            lock.unlock();
        }
    }

    /**
     * Works until the queue is closed or the calling thread is interrupted, and returns when all workers have ended.
     *
     * @param count how many workers there are
     * @param work what they do; an exception has its key tried again after a pause
     * @throws InterruptedException the thread was interrupted; the workers have been, too
     */
    public void run(int count, Work<? super K> work) throws InterruptedException {
        Objects.requireNonNull(work, "work");
        List<Thread> own = new ArrayList<>();
        for (int number = 1; number <= count; number++) {
            own.add(new Thread(() -> work(work), "virtfleet-worker-" + number));
        }
        locked(() -> workers.addAll(own));
        own.forEach(Thread::start);
        try {
            for (Thread worker : own) {
                worker.join();
            }
        } catch (InterruptedException interrupted) {
            own.forEach(Thread::interrupt);
            throw interrupted;
        } finally {
            locked(() -> workers.removeAll(own));
        }
    }

    private void work(Work<? super K> work) {
        try {
            for (Optional<K> key = take(); key.isPresent(); key = take()) {
                one(key.get(), work);
            }
        } catch (InterruptedException interrupted) {
            Thread.currentThread().interrupt(); // and with that it ends
        }
    }

    private void one(K key, Work<? super K> work) throws InterruptedException {
        try {
            work.on(key);
            done(key);
        } catch (InterruptedException interrupted) {
            failed(key);
            throw interrupted;
        } catch (Exception failure) {
            failed(key);
            if (!isClosed()) {
                failed.accept(key, failure);
            }
        }
    }

    /** {@return whether it has been closed} */
    public boolean isClosed() {
        lock.lock();
        try {
            return closed;
        } finally {
            lock.unlock();
        }
    }

    /** Ends the queue: nothing more is added or given out, and workers of {@link #run} are interrupted. Again, it does nothing. */
    @Override
    public void close() {
        locked(() -> {
            closed = true;
            order.clear();
            later.clear();
            alarms.clear();
            news.signalAll();
            workers.stream().filter(worker -> worker != Thread.currentThread()).forEach(Thread::interrupt);
        });
    }

    private void locked(Runnable work) {
        lock.lock();
        try {
            work.run();
        } finally {
            lock.unlock();
        }
    }

    /**
     * Returns a handler that adds the keys of a resource whenever it is new, changed, moved or gone: before and after.
     *
     * @param <T> the resources
     * @param keys the keys of a resource
     * @return the handler
     */
    public <T> InformerHandler<T> handler(Function<? super T, ? extends Collection<? extends K>> keys) {
        Objects.requireNonNull(keys, "keys");
        return new InformerHandler<>() {
            @Override
            public void added(T resource) {
                keys.apply(resource).forEach(WorkQueue.this::add);
            }

            @Override
            public void changed(T before, T after) {
                added(before);
                added(after);
            }

            @Override
            public void moved(T before, T after) {
                changed(before, after);
            }

            @Override
            public void deleted(T last) {
                added(last);
            }
        };
    }

    /**
     * Returns a handler that adds the uid of a resource whenever it is new, changed, moved or gone.
     *
     * @param queue a queue of uids
     * @return the handler, for informers of any kind
     */
    public static InformerHandler<Message> uids(WorkQueue<? super String> queue) {
        return queue.handler(resource -> List.of(Resource.of(resource).uid(resource)));
    }
}

package dev.virtfleet.client;

import io.grpc.netty.shaded.io.netty.util.concurrent.DefaultThreadFactory;
import java.time.Duration;
import java.util.Set;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.RejectedExecutionException;
import java.util.concurrent.ScheduledThreadPoolExecutor;
import java.util.concurrent.TimeUnit;

/**
 * What a client does after pauses, in one thread. When it is closed all that waits is done at once: whoever waits for it finds the
 * connection closed, instead of nothing for ever.
 */
final class Delays implements AutoCloseable {

    private final ScheduledThreadPoolExecutor executor =
            new ScheduledThreadPoolExecutor(1, new DefaultThreadFactory("virtfleet-client", true));
    private final Set<Delayed> waiting = ConcurrentHashMap.newKeySet();
    private volatile boolean closed;

    Delays() {
        executor.setRemoveOnCancelPolicy(true);
    }

    /** Something that is to be done, once. */
    final class Delayed implements Runnable {

        private final Runnable work;

        private Delayed(Runnable work) {
            this.work = work;
        }

        @Override
        public void run() {
            if (waiting.remove(this)) {
                work.run();
            }
        }

        /** Has it left undone, if it has not begun. */
        void cancel() {
            waiting.remove(this);
        }
    }

    /** Has something done after a pause; at once if the client is closed. */
    Delayed after(Duration pause, Runnable work) {
        Delayed delayed = new Delayed(work);
        waiting.add(delayed);
        try {
            executor.schedule(delayed, pause.toNanos(), TimeUnit.NANOSECONDS);
        } catch (RejectedExecutionException late) {
            delayed.run();
        }
        return delayed;
    }

    boolean isClosed() {
        return closed;
    }

    @Override
    public void close() {
        closed = true;
        executor.shutdownNow();
        waiting.forEach(Delayed::run);
    }
}

package dev.virtfleet.client.informer;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.virtfleet.compute.v1.Domain;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Collections;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicInteger;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;

@Timeout(30)
class WorkQueueTest {

    private static final Duration TINY = Duration.ofMillis(1);

    @Test
    void aKeyWaitsOnceAndComesAgainIfItWasAddedMeanwhile() throws InterruptedException {
        WorkQueue<String> queue = WorkQueue.create();
        queue.add("a");
        queue.add("b");
        queue.add("a");
        assertEquals(2, queue.size());
        assertEquals("a", queue.take().orElseThrow());
        queue.add("a");
        queue.add("a");
        assertEquals(1, queue.size()); // no second worker gets it
        queue.done("a");
        assertEquals("b", queue.take().orElseThrow());
        assertEquals("a", queue.take().orElseThrow());
        queue.done("a");
        assertEquals(0, queue.size());
    }

    @Test
    void ofSeveralTimesTheEarliestHolds() throws InterruptedException {
        WorkQueue<String> queue = WorkQueue.create();
        queue.addAfter("a", Duration.ofHours(1));
        queue.addAfter("a", Duration.ofMillis(30));
        queue.addAfter("a", Duration.ofMinutes(1));
        assertEquals(0, queue.size());
        long begun = System.nanoTime();
        assertEquals("a", queue.take().orElseThrow());
        assertTrue(System.nanoTime() - begun >= TimeUnit.MILLISECONDS.toNanos(25));
        queue.done("a");
        queue.addAfter("b", Duration.ZERO);
        assertEquals("b", queue.take().orElseThrow());
    }

    @Test
    void failuresComeAgainAfterPausesThatGrow() throws InterruptedException {
        Map<String, Integer> failures = Collections.synchronizedMap(new HashMap<>());
        WorkQueue<String> queue =
                WorkQueue.create(Duration.ofMillis(10), Duration.ofMillis(40), (key, why) -> failures.merge(key, 1, Integer::sum));
        List<Long> times = new ArrayList<>();
        queue.add("a");
        queue.run(1, key -> {
            times.add(System.nanoTime());
            if (times.size() < 5) {
                throw new IllegalStateException("not yet");
            }
            queue.close();
        });
        assertEquals(Map.of("a", 4), failures);
        for (int number = 1; number < times.size(); number++) {
            long pause = times.get(number) - times.get(number - 1);
            assertTrue(pause >= TimeUnit.MILLISECONDS.toNanos(Math.min(10L << (number - 1), 40) - 1), times.toString());
        }
    }

    @Test
    void noTwoWorkersHaveTheSameKeyAndNoChangeIsMissed() throws InterruptedException {
        WorkQueue<Integer> queue = WorkQueue.create(TINY, TINY);
        int[] state = new int[10];
        int[] seen = new int[10];
        AtomicInteger[] busy = new AtomicInteger[10];
        for (int key = 0; key < 10; key++) {
            busy[key] = new AtomicInteger();
        }
        AtomicInteger collisions = new AtomicInteger();
        Thread producer = new Thread(() -> {
            for (int round = 1; round <= 1000; round++) {
                synchronized (state) {
                    state[round % 10] = round;
                }
                queue.add(round % 10);
            }
        });
        Thread workers = new Thread(() -> {
            try {
                queue.run(4, key -> {
                    if (busy[key].incrementAndGet() > 1) {
                        collisions.incrementAndGet();
                    }
                    synchronized (state) {
                        seen[key] = state[key];
                    }
                    Thread.yield();
                    busy[key].decrementAndGet();
                });
            } catch (InterruptedException interrupted) {
                collisions.incrementAndGet();
            }
        });
        workers.start();
        producer.start();
        producer.join();
        while (true) {
            synchronized (state) {
                if (java.util.Arrays.equals(state, seen)) {
                    break;
                }
            }
            Thread.sleep(1);
        }
        queue.close();
        workers.join();
        assertEquals(0, collisions.get());
    }

    @Test
    void closingEndsTheWorkAndAnInterruptEndsTheRun() throws Exception {
        WorkQueue<String> queue = WorkQueue.create();
        CountDownLatch begun = new CountDownLatch(1);
        CountDownLatch interrupted = new CountDownLatch(1);
        queue.add("a");
        Thread running = new Thread(() -> {
            try {
                queue.run(2, key -> {
                    begun.countDown();
                    try {
                        Thread.sleep(60_000);
                    } finally {
                        interrupted.countDown();
                    }
                });
            } catch (InterruptedException ended) {
                begun.countDown();
            }
        });
        running.start();
        begun.await();
        queue.close();
        queue.close();
        assertTrue(interrupted.await(10, TimeUnit.SECONDS));
        running.join(10_000);
        assertFalse(running.isAlive());
        queue.add("b");
        assertTrue(queue.take().isEmpty());
        WorkQueue<String> other = WorkQueue.create();
        Thread.currentThread().interrupt();
        assertThrows(InterruptedException.class, () -> other.run(1, key -> {}));
        assertThrows(IllegalArgumentException.class, () -> WorkQueue.create(Duration.ZERO, TINY));
    }

    @Test
    void handlersAddTheKeysOfBeforeAndAfter() throws InterruptedException {
        WorkQueue<String> queue = WorkQueue.create();
        InformerHandler<Domain> byNode = queue.handler(domain -> List.of(Names.nodeOf(domain.getName())));
        Domain before = Domain.newBuilder().setUid("u").setName("nodes/n1/domains/a").build();
        byNode.moved(before, before.toBuilder().setName("nodes/n2/domains/a").build());
        assertEquals("nodes/n1", queue.take().orElseThrow());
        assertEquals("nodes/n2", queue.take().orElseThrow());
        WorkQueue.uids(queue).deleted(before);
        assertEquals("u", queue.take().orElseThrow());
    }
}

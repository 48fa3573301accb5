package dev.virtfleet.client;

import java.time.Duration;
import java.util.concurrent.ThreadLocalRandom;

/** How long a client waits before it tries again. */
final class Pause {

    private static final Duration FIRST = Duration.ofMillis(100);
    private static final Duration LONGEST = Duration.ofSeconds(3);
    private static final int MOST_DOUBLINGS = 10;

    private Pause() {}

    /** Returns the pause before the repetition of that number, from 1; at least what the server asks for, but not for ever. */
    static Duration before(int repetition, Duration asked) {
        Duration doubled = FIRST.multipliedBy(1L << Math.min(repetition - 1, MOST_DOUBLINGS));
        Duration longest = shorter(doubled, LONGEST);
        long jittered = (long) (longest.toNanos() * ThreadLocalRandom.current().nextDouble(0.5, 1));
        return Duration.ofNanos(Math.max(jittered, shorter(asked, LONGEST).toNanos()));
    }

    static Duration before(int repetition, VirtfleetException failure) {
        return before(repetition, failure.retryDelay().orElse(Duration.ZERO));
    }

    private static Duration shorter(Duration one, Duration other) {
        return one.compareTo(other) < 0 ? one : other;
    }
}

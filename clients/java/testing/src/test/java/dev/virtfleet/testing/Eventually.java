package dev.virtfleet.testing;

import java.time.Duration;
import java.util.function.BooleanSupplier;
import org.opentest4j.AssertionFailedError;

/** Looks again and again until something holds. */
final class Eventually {

    private static final Duration PATIENCE = Duration.ofSeconds(60);
    private static final long INTERVAL_MILLIS = 20;

    private Eventually() {}

    static void holds(String what, BooleanSupplier condition) {
        long end = System.nanoTime() + PATIENCE.toNanos();
        while (!condition.getAsBoolean()) {
            if (System.nanoTime() > end) {
                throw new AssertionFailedError(what + ": not within " + PATIENCE);
            }
            try {
                Thread.sleep(INTERVAL_MILLIS);
            } catch (InterruptedException interrupted) {
                throw new AssertionFailedError(what + ": interrupted", interrupted);
            }
        }
    }
}

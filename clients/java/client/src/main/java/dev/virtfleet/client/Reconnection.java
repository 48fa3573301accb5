package dev.virtfleet.client;

import io.grpc.ConnectivityState;
import io.grpc.ManagedChannel;
import java.time.Duration;
import java.util.concurrent.ThreadLocalRandom;

/**
 * Has a channel connect again after 0.1 to 5 seconds. By itself it would wait up to two minutes, and gRPC for Java has no setting for
 * that: what it has is a way to cut the wait short.
 */
final class Reconnection {

    private static final Duration FIRST = Duration.ofMillis(100);
    private static final Duration LONGEST = Duration.ofSeconds(5);
    private static final double GROWTH = 1.6;
    private static final double JITTER = 0.2;

    private final ManagedChannel channel;
    private final Delays delays;

    private Reconnection(ManagedChannel channel, Delays delays) {
        this.channel = channel;
        this.delays = delays;
    }

    static void keep(ManagedChannel channel, Delays delays) {
        new Reconnection(channel, delays).follow(channel.getState(false));
    }

    private void follow(ConnectivityState state) {
        if (state == ConnectivityState.TRANSIENT_FAILURE) {
            again(FIRST);
        }
        if (state != ConnectivityState.SHUTDOWN) {
            channel.notifyWhenStateChanged(state, () -> follow(channel.getState(false)));
        }
    }

    private void again(Duration pause) {
        double jitter = ThreadLocalRandom.current().nextDouble(1 - JITTER, 1 + JITTER);
        Duration jittered = Duration.ofNanos((long) (pause.toNanos() * jitter));
        Duration longer = Duration.ofNanos((long) Math.min(pause.toNanos() * GROWTH, LONGEST.toNanos()));
        delays.after(jittered, () -> {
            if (!delays.isClosed() && channel.getState(false) == ConnectivityState.TRANSIENT_FAILURE) {
                channel.resetConnectBackoff();
                again(longer);
            }
        });
    }
}

package dev.virtfleet.conformance;

/** Stops a reader at its next change while it is set. */
final class Hold {

    private boolean set;
    private boolean stands;

    synchronized void set(boolean holds) {
        set = holds;
        notifyAll();
    }

    synchronized boolean stands() {
        return stands;
    }

    /** Stands here while it is set. */
    synchronized void pass() {
        try {
            while (set) {
                stands = true;
                wait();
            }
        } catch (InterruptedException interrupted) {
            Thread.currentThread().interrupt();
        } finally {
            stands = false;
        }
    }
}

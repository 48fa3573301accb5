package dev.virtfleet.client.informer;

/**
 * What an informer has been told so far. Immutable.
 *
 * @param changes the number of changes of resources
 * @param snapshots the number of streams that began with a snapshot of all
 * @param resumptions the number of streams that went on from a token
 * @param resyncs the number of times that a single node was read anew
 */
public record InformerStatistics(long changes, long snapshots, long resumptions, long resyncs) {}

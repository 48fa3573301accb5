/**
 * A local copy of the resources of one kind, kept fresh by a watch, and indexed.
 *
 * <pre>{@code
 * WorkQueue<String> queue = WorkQueue.create();
 * try (Informer<Domain> domains = Informers.domains(client).handler(WorkQueue.uids(queue)).start()) {
 *     domains.awaitSynced(Duration.ofMinutes(1));
 *     queue.run(4, uid -> reconcile(domains.get(uid)));
 * }
 * }</pre>
 *
 * <p>An informer never lists: the watch begins with a snapshot of all that exists and goes on by token over lost connections,
 * restarted gateways and drains. What is not known to be fresh is told:
 * {@link dev.virtfleet.client.informer.Informer#source} says for each node whether its part is live, as last seen or being read anew,
 * {@link dev.virtfleet.client.informer.Informer#isConnected} whether the watch itself stands. A domain that moves to another node
 * stays one object.
 *
 * <p>No method takes or returns null; what may be missing is an {@link java.util.Optional}.
 */
package dev.virtfleet.client.informer;

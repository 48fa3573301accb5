/**
 * The client of virtfleet: a fleet's domains, storage and networks behind one endpoint.
 *
 * <pre>{@code
 * try (VirtfleetClient client = VirtfleetClient.connect()) {
 *     Domain domain = client.domains()
 *             .startDomain(StartDomainRequest.newBuilder().setName("nodes/n1/domains/web").build())
 *             .await(Duration.ofMinutes(1));
 * } catch (VirtfleetException failure) {
 *     switch (failure.reason()) {
 *         case NODE_MEMORY_SHORT -> …
 *     }
 * }
 * }</pre>
 *
 * <p>{@link dev.virtfleet.client.VirtfleetClient} finds the fleet and has the services of the API. Calls carry a request_id
 * where they change something, are repeated exactly where that is safe, and fail with a
 * {@link dev.virtfleet.client.VirtfleetException}. A mutation that touches a hypervisor returns an
 * {@link dev.virtfleet.client.Operation}, a list {@link dev.virtfleet.client.Pages}, a watch a
 * {@link dev.virtfleet.client.ResourceWatch} that resumes by token. {@link dev.virtfleet.client.informer} makes an indexed
 * local copy of one kind of resource.
 *
 * <p>No method takes or returns null unless it says so; what may be missing is an {@link java.util.Optional}. Passing null is
 * a {@link java.lang.NullPointerException} at once.
 */
package dev.virtfleet.client;

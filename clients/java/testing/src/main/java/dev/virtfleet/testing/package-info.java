/**
 * Fake fleets for the tests of programs: one process each, with a real gateway and real compute code over a driver in memory, whose
 * faults and time the test steers.
 *
 * <pre>{@code
 * @WithFakeFleet(nodes = 3, domains = 10)
 * class ControllerTest {
 *     @Test
 *     void outlivesTheGateway(FakeFleet fleet, VirtfleetClient client) {
 *         …
 *         fleet.killGateway(Duration.ofSeconds(1));
 *     }
 * }
 * }</pre>
 *
 * <p>The program is {@code virtfleet fake}; VIRTFLEET_FAKE_COMMAND names another (words separated by blanks). No method takes or
 * returns null.
 */
package dev.virtfleet.testing;

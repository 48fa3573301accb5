package dev.virtfleet.testing;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.gson.JsonParser;
import dev.virtfleet.client.Credentials;
import dev.virtfleet.client.FleetNotFoundException;
import dev.virtfleet.client.VirtfleetClient;
import dev.virtfleet.client.VirtfleetException;
import dev.virtfleet.client.informer.Informer;
import dev.virtfleet.client.informer.Informers;
import dev.virtfleet.common.v1.WhoAmIRequest;
import dev.virtfleet.common.v1.WhoAmIResponse;
import dev.virtfleet.compute.v1.Domain;
import io.grpc.Status;
import java.io.IOException;
import java.net.URLEncoder;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.time.Duration;
import java.util.List;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.TimeoutException;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.api.parallel.Execution;
import org.junit.jupiter.api.parallel.ExecutionMode;

// One after the other: it counts the helper processes of this JVM.
@Execution(ExecutionMode.SAME_THREAD)
class TransportsTest {

    private static WhoAmIResponse whoAmI(VirtfleetClient client) {
        return client.access().withDeadlineAfter(20, TimeUnit.SECONDS).whoAmI(WhoAmIRequest.getDefaultInstance());
    }

    @Test
    @WithFakeFleet
    void newCertificatesAreUsedForNewConnections(FakeFleet fleet, @TempDir Path folder) throws Exception {
        Credentials admin = fleet.credentials();
        Credentials own = new Credentials(folder.resolve("ca.crt"), folder.resolve("me.crt"), folder.resolve("me.key"));
        Files.copy(admin.caFile(), own.caFile());
        Files.copy(admin.certFile(), own.certFile());
        Files.copy(admin.keyFile(), own.keyFile());
        try (VirtfleetClient client =
                VirtfleetClient.builder().address(fleet.address()).credentials(own).build()) {
            String before = whoAmI(client).toString();
            replace(admin.certFile().resolveSibling("viewer.crt"), own.certFile());
            // The key does not fit yet: the last good pair is used on.
            fleet.cutConnections();
            assertEquals(before, whoAmI(client).toString());
            replace(admin.certFile().resolveSibling("viewer.key"), own.keyFile());
            assertEquals(before, whoAmI(client).toString()); // the connection that stands keeps its certificate
            fleet.cutConnections();
            Eventually.holds("the new certificate is shown", () -> !whoAmI(client).toString().equals(before));
            assertTrue(whoAmI(client).toString().contains("viewer"), whoAmI(client).toString());
        }
    }

    private static void replace(Path from, Path to) throws Exception {
        Path beside = to.resolveSibling(to.getFileName() + ".new");
        Files.copy(from, beside, StandardCopyOption.REPLACE_EXISTING);
        Files.move(beside, to, StandardCopyOption.REPLACE_EXISTING, StandardCopyOption.ATOMIC_MOVE);
    }

    @Test
    @WithFakeFleet
    void theNameInTheCertificateIsHeldAgainstTheAddress(FakeFleet fleet) {
        try (VirtfleetClient client = fleet.clientBuilder()
                .address("tls://" + fleet.address() + "?server_name=another.example")
                .build()) {
            VirtfleetException refused = assertThrows(VirtfleetException.class, () -> whoAmI(client));
            assertEquals(Status.Code.UNAVAILABLE, refused.code());
            assertTrue(refused.getMessage().contains("another.example"), refused.getMessage());
            Informer<Domain> informer = Informers.domains(client).start();
            try (informer) {
                TimeoutException late =
                        assertThrows(TimeoutException.class, () -> informer.awaitSynced(Duration.ofMillis(500)));
                assertTrue(late.getMessage().contains("another.example"), late.getMessage());
            }
        }
    }

    @Test
    @WithFakeFleet
    void aFleetThatIsNotThereIsSaidToRefuse(FakeFleet fleet) {
        try (VirtfleetClient client = fleet.clientBuilder().address("127.0.0.1:1").build()) {
            VirtfleetException away = assertThrows(VirtfleetException.class, () -> whoAmI(client));
            assertEquals(Status.Code.UNAVAILABLE, away.code());
            assertTrue(away.getMessage().contains("refused"), away.getMessage());
        }
    }

    @Test
    @WithFakeFleet
    void anyCommandIsATransport(FakeFleet fleet) {
        String java = Path.of(System.getProperty("java.home"), "bin", "java").toString();
        // The JVM of this test is the program that joins its standard input and output to a port.
        String arguments = List.of("-cp", System.getProperty("java.class.path"), Relay.class.getName(), fleet.address())
                .stream()
                .map(argument -> "arg=" + URLEncoder.encode(argument, StandardCharsets.UTF_8) + "&")
                .reduce("", String::concat);
        String address = "command:" + java + "?" + arguments + "server_name=127.0.0.1";
        try (VirtfleetClient client = fleet.clientBuilder().address(address).build()) {
            assertEquals("tls", whoAmI(client).getTransport());
            fleet.cutConnections();
            Eventually.holds("it is connected again, through another program", () -> answers(client));
            ProcessHandle.current()
                    .children()
                    .filter(child -> List.of(child.info().arguments().orElse(new String[0])).contains("proxy"))
                    .forEach(ProcessHandle::destroyForcibly);
            Eventually.holds("it is connected again, through another helper", () -> answers(client));
        }
        assertEquals(0, ProcessHandle.current()
                .children()
                .filter(child -> List.of(child.info().arguments().orElse(new String[0])).contains("proxy"))
                .count());
    }

    private static boolean answers(VirtfleetClient client) {
        try {
            return whoAmI(client).getTransport().equals("tls");
        } catch (VirtfleetException notYet) {
            return false;
        }
    }

    @Test
    void aHelperThatDoesNotStartSaysWhy() {
        FleetNotFoundException failure = assertThrows(
                FleetNotFoundException.class,
                () -> VirtfleetClient.builder().address("ssh://host/%").build());
        assertFalse(failure.getMessage().isEmpty());
        FleetNotFoundException silent = assertThrows(
                FleetNotFoundException.class,
                () -> VirtfleetClient.builder().address("nonsense://host").build());
        assertTrue(silent.getMessage().contains("names no socket"), silent.getMessage());
    }

    @Test
    void theUnixSocketOfANodeIsSpokenToInTheClear() throws IOException {
        String fleet = Files.readString(Path.of(System.getenv("VIRTFLEET_RUN"), "fleet.json"));
        Path folder = Path.of(JsonParser.parseString(fleet).getAsJsonObject().get("folder").getAsString());
        Path socket = folder.resolve("n1/run/compute/admin.sock");
        try (VirtfleetClient client =
                VirtfleetClient.builder().address("unix://" + socket).build()) {
            assertEquals("unix", whoAmI(client).getTransport());
        }
    }
}

package dev.virtfleet.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import java.io.IOException;
import java.io.RandomAccessFile;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.HashMap;
import java.util.Map;
import java.util.Optional;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

class ContextFileTest {

    @TempDir
    private Path folder;

    private Path file;

    @BeforeEach
    void write() throws IOException {
        file = folder.resolve("contexts.json");
        Files.writeString(file, """
                {"current": "lab", "more": 1, "contexts": {
                  "lab": {"address": "tls://fleet.example:7443", "ca_file": "lab/ca.crt", "cert_file": "/x/me.crt",
                          "key_file": "lab/me.key", "colour": "red"},
                  "node": {"address": "ssh://me@n1/run/admin.sock"}}}
                """);
    }

    @Test
    void relativePathsBeginAtTheFile() {
        ContextFile read = ContextFile.read(file);
        assertEquals(Optional.of("lab"), read.current());
        Credentials files = read.contexts().get("lab").credentials().orElseThrow();
        assertEquals(new Credentials(folder.resolve("lab/ca.crt"), Path.of("/x/me.crt"), folder.resolve("lab/me.key")), files);
        assertTrue(read.contexts().get("node").credentials().isEmpty());
    }

    @Test
    void aMissingFileHasNoContextsAndABrokenOneIsAnError() throws IOException {
        assertTrue(ContextFile.read(folder.resolve("none.json")).contexts().isEmpty());
        for (String broken : new String[] {"", "{", "[]", "{\"contexts\": 1}", "{\"contexts\": {\"\": {\"address\": \"a:1\"}}}",
            "{\"contexts\": {\"a\": {}}}", "{\"current\": {}}"}) {
            Files.writeString(file, broken);
            FleetNotFoundException failure = assertThrows(FleetNotFoundException.class, () -> ContextFile.read(file), broken);
            assertTrue(failure.getMessage().startsWith(file.toString()), failure.getMessage());
        }
    }

    @Test
    void aFileWithoutEndIsNotRead() throws IOException {
        Path big = folder.resolve("big");
        try (var sparse = new RandomAccessFile(big.toFile(), "rw")) {
            sparse.setLength(1L << 30);
        }
        for (Path endless : new Path[] {big, Path.of("/dev/zero")}) {
            FleetNotFoundException failure = assertThrows(FleetNotFoundException.class, () -> ContextFile.read(endless));
            assertEquals(endless + ": has more than 1 MiB", failure.getMessage());
            Credentials files = new Credentials(endless, endless, endless);
            VirtfleetClient.Builder builder = VirtfleetClient.builder().address("localhost:1").credentials(files);
            failure = assertThrows(FleetNotFoundException.class, builder::build);
            assertTrue(failure.getMessage().contains("has more than 1 MiB"), failure.getMessage());
        }
    }

    @Test
    void theFileIsWhereTheEnvironmentSays() {
        assertEquals(Path.of("/c.json"), ContextFile.defaultPath(Map.of("VIRTFLEET_CONTEXTS_FILE", "/c.json")));
        assertEquals(
                Path.of("/s/virtfleet/contexts.json"), ContextFile.defaultPath(Map.of("XDG_CONFIG_HOME", "/s")));
        assertEquals(
                Path.of(System.getProperty("user.home"), ".config/virtfleet/contexts.json"),
                ContextFile.defaultPath(Map.of()));
    }

    @Test
    void theFirstThatIsThereSaysWhereTheFleetIs() {
        Map<String, String> environment = new HashMap<>(Map.of(
                "VIRTFLEET_ADDRESS", "a:1", "VIRTFLEET_CONTEXT", "node",
                "VIRTFLEET_CA_FILE", "/ca", "VIRTFLEET_CERT_FILE", "/cert", "VIRTFLEET_KEY_FILE", "/key"));
        Credentials own = new Credentials(Path.of("/1"), Path.of("/2"), Path.of("/3"));
        FleetContext named = VirtfleetClient.builder().address("b:2").find(environment, file);
        assertEquals("b:2", named.address());
        assertEquals(Path.of("/ca"), named.credentials().orElseThrow().caFile());
        assertEquals("ssh://me@n1/run/admin.sock", VirtfleetClient.builder().context("node").find(environment, file).address());
        assertEquals("a:1", VirtfleetClient.builder().find(environment, file).address());
        environment.remove("VIRTFLEET_ADDRESS");
        assertEquals("ssh://me@n1/run/admin.sock", VirtfleetClient.builder().find(environment, file).address());
        environment.remove("VIRTFLEET_CONTEXT");
        assertEquals("tls://fleet.example:7443", VirtfleetClient.builder().find(environment, file).address());
        assertEquals(
                Optional.of(own), VirtfleetClient.builder().credentials(own).find(environment, file).credentials());
    }

    @ParameterizedTest
    @ValueSource(strings = {"nobody", ""})
    void aFleetThatIsNotThereIsNamed(String context) {
        Map<String, String> environment = Map.of("VIRTFLEET_CONTEXT", context);
        Path empty = folder.resolve("none.json");
        FleetNotFoundException failure = assertThrows(
                FleetNotFoundException.class, () -> VirtfleetClient.builder().find(environment, empty));
        assertTrue(failure.getMessage().contains(empty.toString()), failure.getMessage());
        assertTrue(failure.getMessage().contains(context.isEmpty() ? "VIRTFLEET_ADDRESS" : "nobody"), failure.getMessage());
    }

    @Test
    void certificatesThatAreMissingOrWrongAreNamed() throws IOException {
        FleetContext bare = VirtfleetClient.builder().address("a:1").find(Map.of(), file);
        assertTrue(refusal(bare).contains("mutual TLS needs three files"), refusal(bare));
        Path text = Files.writeString(folder.resolve("x.crt"), "no certificate");
        FleetContext wrong = new FleetContext("a:1", Optional.of(new Credentials(text, text, text)));
        assertTrue(refusal(wrong).contains("x.crt"), refusal(wrong));
        Path none = folder.resolve("none.crt");
        FleetContext missing = new FleetContext("a:1", Optional.of(new Credentials(none, none, none)));
        assertEquals(none + " does not exist", refusal(missing));
    }

    private static String refusal(FleetContext where) {
        return assertThrows(FleetNotFoundException.class, () -> VirtfleetClient.Transport.to(where)).getMessage();
    }
}

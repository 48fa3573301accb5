package dev.virtfleet.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import java.nio.file.Path;
import java.util.Optional;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

class EndpointTest {

    @Test
    void addressesAreUnderstood() {
        assertEquals(new Endpoint.Tls("fleet.example", 7443, Optional.empty()), Endpoint.parse("fleet.example:7443"));
        assertEquals(
                new Endpoint.Tls("10.0.0.1", 1, Optional.of("fleet.example")),
                Endpoint.parse("tls://10.0.0.1:1?server_name=fleet.example"));
        assertEquals("dns:///[::1]:7443", ((Endpoint.Tls) Endpoint.parse("[::1]:7443")).target());
        assertEquals(new Endpoint.Unix(Path.of("/run/a.sock")), Endpoint.parse("unix:///run/a.sock"));
        assertEquals(
                new Endpoint.Proxied("ssh://me@n1/run/a.sock", Optional.empty()), Endpoint.parse("ssh://me@n1/run/a.sock"));
        assertEquals(
                Optional.of("a b"),
                ((Endpoint.Proxied) Endpoint.parse("command:/bin/x?arg=1&server_name=a%20b")).serverName());
    }

    @ParameterizedTest
    @ValueSource(strings = {
        "", "fleet", "fleet.example", "tls://fleet.example", "tls://:1", "tls://a:1/b", "unix://run/a.sock", "unix:///",
        "http://a:1", "https://a:1", "grpc://a:1", "tls://a b:1"
    })
    void wrongAddressesAreRefusedWithTheRightForm(String address) {
        FleetNotFoundException refused = assertThrows(FleetNotFoundException.class, () -> Endpoint.parse(address));
        assertTrue(refused.getMessage().contains("is no address of virtfleet"), refused.getMessage());
    }
}

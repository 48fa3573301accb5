package dev.virtfleet.client;

import java.net.URI;
import java.net.URISyntaxException;
import java.net.URLDecoder;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.util.Optional;
import java.util.Set;

/** An address, understood. */
sealed interface Endpoint {

    /** Mutual TLS over TCP; the certificate must be that of the server name, or of the host where there is none. */
    record Tls(String host, int port, Optional<String> serverName) implements Endpoint {
        String target() {
            return "dns:///" + (host.contains(":") ? "[" + host + "]" : host) + ":" + port;
        }
    }

    /** A local socket; its file mode decides who may use it. */
    record Unix(Path path) implements Endpoint {}

    /** What the helper process connects to; with a server name TLS is spoken through it. */
    record Proxied(String address, Optional<String> serverName) implements Endpoint {}

    /** Schemes that people write by habit, and that the helper does not know either. */
    Set<String> FOREIGN = Set.of("http", "https", "tcp", "grpc", "grpcs", "dns");

    static Endpoint parse(String address) {
        String text = address.contains("://") || address.startsWith("command:") ? address : "tls://" + address;
        URI uri;
        try {
            uri = new URI(text);
        } catch (URISyntaxException failure) {
            throw wrong(address, failure.getReason());
        }
        Optional<String> serverName = query(uri, "server_name");
        String scheme = uri.getScheme();
        if (scheme.equals("tls")) {
            boolean whole = uri.getHost() != null && uri.getPort() > 0 && uri.getRawPath().isEmpty();
            if (!whole || uri.getRawUserInfo() != null) {
                throw wrong(address, "write tls://HOST:PORT");
            }
            return new Tls(uri.getHost().replaceAll("^\\[|]$", ""), uri.getPort(), serverName);
        }
        if (scheme.equals("unix")) {
            boolean local = uri.getRawAuthority() == null && uri.getPath() != null && uri.getPath().startsWith("/");
            if (!local || Path.of(uri.getPath()).normalize().getNameCount() == 0) {
                throw wrong(address, "write unix:///PATH");
            }
            return new Unix(Path.of(uri.getPath()));
        }
        if (FOREIGN.contains(scheme)) {
            throw wrong(address, "write tls://HOST:PORT, unix:///PATH, ssh://HOST/PATH or command:PROGRAM");
        }
        return new Proxied(address, serverName);
    }

    private static Optional<String> query(URI uri, String key) {
        // command:PROGRAM?… is opaque: its query is part of what follows the scheme.
        String raw = uri.isOpaque() ? uri.getRawSchemeSpecificPart() : "?" + uri.getRawQuery();
        for (String pair : raw.substring(raw.indexOf('?') + 1).split("&")) {
            if (pair.startsWith(key + "=") && pair.length() > key.length() + 1) {
                return Optional.of(URLDecoder.decode(pair.substring(key.length() + 1), StandardCharsets.UTF_8));
            }
        }
        return Optional.empty();
    }

    private static FleetNotFoundException wrong(String address, String why) {
        return new FleetNotFoundException("\"" + address + "\" is no address of virtfleet: " + why);
    }
}

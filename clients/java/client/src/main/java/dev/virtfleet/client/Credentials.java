package dev.virtfleet.client;

import java.nio.file.Path;
import java.util.Objects;

/**
 * The files that mutual TLS needs, PEM all of them. They are read again, for each new connection, when they have changed.
 *
 * <p>Immutable; no component is null.
 *
 * @param caFile the certificates of the fleet's authority
 * @param certFile the certificate of the caller, as {@code virtfleet authority issue} writes it
 * @param keyFile its private key, in the form PKCS #8
 */
public record Credentials(Path caFile, Path certFile, Path keyFile) {

    /**
     * Names the files; none of them is read yet.
     *
     * @param caFile the certificates of the fleet's authority
     * @param certFile the certificate of the caller
     * @param keyFile its private key
     */
    public Credentials {
        Objects.requireNonNull(caFile, "caFile");
        Objects.requireNonNull(certFile, "certFile");
        Objects.requireNonNull(keyFile, "keyFile");
    }
}

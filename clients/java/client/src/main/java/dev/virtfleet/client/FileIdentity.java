package dev.virtfleet.client;

import java.io.ByteArrayInputStream;
import java.io.IOException;
import java.net.Socket;
import java.nio.file.Files;
import java.nio.file.NoSuchFileException;
import java.nio.file.Path;
import java.nio.file.attribute.BasicFileAttributes;
import java.nio.file.attribute.FileTime;
import java.security.GeneralSecurityException;
import java.security.KeyFactory;
import java.security.KeyStore;
import java.security.Principal;
import java.security.PrivateKey;
import java.security.PublicKey;
import java.security.Signature;
import java.security.cert.Certificate;
import java.security.cert.CertificateException;
import java.security.cert.CertificateFactory;
import java.security.cert.X509Certificate;
import java.security.spec.PKCS8EncodedKeySpec;
import java.util.ArrayList;
import java.util.Base64;
import java.util.List;
import java.util.Map;
import java.util.concurrent.ConcurrentHashMap;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import javax.net.ssl.SSLEngine;
import javax.net.ssl.TrustManagerFactory;
import javax.net.ssl.X509ExtendedKeyManager;
import javax.net.ssl.X509ExtendedTrustManager;

/**
 * Who the client is and whom it trusts, from files that are read again, when they have changed, for each new connection.
 *
 * <p>While they are being replaced and do not fit together, the last good ones stay.
 */
final class FileIdentity {

    private static final Pattern PKCS8 =
            Pattern.compile("-----BEGIN PRIVATE KEY-----([A-Za-z0-9+/=\\s]+)-----END PRIVATE KEY-----");
    private static final Pattern OTHER_KEY = Pattern.compile("-----BEGIN (.*PRIVATE KEY)-----");
    /** How a key of each kind signs, for the proof that it is that of a certificate. */
    private static final Map<String, String> SIGNATURES =
            Map.of("EC", "SHA256withECDSA", "RSA", "SHA256withRSA", "EdDSA", "EdDSA");

    private final Credentials files;
    private Loaded loaded;
    private List<Stamp> stamps;

    /** What changes when a file is replaced. */
    private record Stamp(FileTime modified, long size, Object file) {
        static Stamp of(Path path) throws IOException {
            BasicFileAttributes found = Files.readAttributes(path, BasicFileAttributes.class);
            return new Stamp(found.lastModifiedTime(), found.size(), String.valueOf(found.fileKey()));
        }
    }

    /** What the files said when they last fitted together. */
    private record Loaded(X509ExtendedTrustManager trust, List<X509Certificate> chain, PrivateKey key) {}

    /**
     * Reads the files for the first time.
     *
     * @throws FleetNotFoundException they cannot be read, or do not fit together
     */
    FileIdentity(Credentials files) {
        this.files = files;
        try {
            current();
        } catch (NoSuchFileException missing) {
            throw new FleetNotFoundException(missing.getFile() + " does not exist", missing);
        } catch (IOException | GeneralSecurityException failure) {
            throw new FleetNotFoundException(failure.getMessage(), failure);
        }
    }

    private synchronized Loaded current() throws IOException, GeneralSecurityException {
        try {
            List<Stamp> now =
                    List.of(Stamp.of(files.caFile()), Stamp.of(files.certFile()), Stamp.of(files.keyFile()));
            if (!now.equals(stamps)) {
                loaded = load();
                stamps = now;
            }
        } catch (IOException | GeneralSecurityException unfinished) {
            if (loaded == null) {
                throw unfinished;
            }
        }
        return loaded;
    }

    private Loaded load() throws IOException, GeneralSecurityException {
        List<X509Certificate> chain = certificates(files.certFile());
        PrivateKey key = key(files.keyFile());
        if (!fit(chain.get(0).getPublicKey(), key)) {
            throw new CertificateException(files.keyFile() + " is not the key of " + files.certFile());
        }
        KeyStore authorities = KeyStore.getInstance(KeyStore.getDefaultType());
        authorities.load(null, null);
        List<X509Certificate> trusted = certificates(files.caFile());
        for (int index = 0; index < trusted.size(); index++) {
            authorities.setCertificateEntry("authority-" + index, trusted.get(index));
        }
        TrustManagerFactory factory = TrustManagerFactory.getInstance(TrustManagerFactory.getDefaultAlgorithm());
        factory.init(authorities);
        return new Loaded((X509ExtendedTrustManager) factory.getTrustManagers()[0], chain, key);
    }

    private static List<X509Certificate> certificates(Path path) throws IOException, CertificateException {
        List<X509Certificate> found = new ArrayList<>();
        try {
            var content = new ByteArrayInputStream(SmallFile.bytes(path));
            for (Certificate one : CertificateFactory.getInstance("X.509").generateCertificates(content)) {
                found.add((X509Certificate) one);
            }
        } catch (CertificateException failure) {
            throw new CertificateException(path + ": " + failure.getMessage(), failure);
        }
        if (found.isEmpty()) {
            throw new CertificateException(path + " holds no certificate");
        }
        return found;
    }

    private static PrivateKey key(Path path) throws IOException, GeneralSecurityException {
        String text = SmallFile.text(path);
        Matcher found = PKCS8.matcher(text);
        if (!found.find()) {
            Matcher other = OTHER_KEY.matcher(text);
            String why = other.find() ? "holds a key as " + other.group(1) + ", not as PKCS #8" : "holds no private key";
            throw new CertificateException(path + " " + why);
        }
        var encoded = new PKCS8EncodedKeySpec(Base64.getMimeDecoder().decode(found.group(1)));
        GeneralSecurityException last = null;
        for (String kind : SIGNATURES.keySet()) {
            try {
                return KeyFactory.getInstance(kind).generatePrivate(encoded);
            } catch (GeneralSecurityException another) {
                last = another; // the encoding does not say its kind in a way that can be asked for
            }
        }
        throw new CertificateException(path + " holds a key of a kind that is not known", last);
    }

    private static boolean fit(PublicKey of, PrivateKey key) throws GeneralSecurityException {
        if (!of.getAlgorithm().equals(key.getAlgorithm())) {
            return false;
        }
        byte[] probe = {1};
        Signature signature = Signature.getInstance(SIGNATURES.getOrDefault(key.getAlgorithm(), key.getAlgorithm()));
        signature.initSign(key);
        signature.update(probe);
        byte[] signed = signature.sign();
        signature.initVerify(of);
        signature.update(probe);
        return signature.verify(signed);
    }

    /** {@return what shows the certificate at each new connection} */
    X509ExtendedKeyManager keys() {
        return new Keys();
    }

    /** {@return what judges the certificate of the fleet at each new connection} */
    X509ExtendedTrustManager trust() {
        return new Trust();
    }

    /** One connection asks for alias, chain and key one after the other: they must be of one state of the files. */
    private final class Keys extends X509ExtendedKeyManager {

        private final Map<String, Loaded> shown = new ConcurrentHashMap<>();

        private String alias() {
            try {
                Loaded now = current();
                String alias = Integer.toHexString(System.identityHashCode(now));
                // Those of connections that are being made at this moment; older ones have been asked for.
                if (shown.size() > 2) {
                    shown.clear();
                }
                shown.put(alias, now);
                return alias;
            } catch (IOException | GeneralSecurityException failure) {
                throw new IllegalStateException(failure); // there always is a last good state
            }
        }

        @Override
        public String chooseEngineClientAlias(String[] types, Principal[] issuers, SSLEngine engine) {
            return alias();
        }

        @Override
        public String chooseClientAlias(String[] types, Principal[] issuers, Socket socket) {
            return alias();
        }

        @Override
        public String[] getClientAliases(String type, Principal[] issuers) {
            return new String[] {alias()};
        }

        @Override
        public X509Certificate[] getCertificateChain(String alias) {
            return shown.get(alias).chain().toArray(X509Certificate[]::new);
        }

        @Override
        public PrivateKey getPrivateKey(String alias) {
            return shown.get(alias).key();
        }

        @Override
        public String[] getServerAliases(String type, Principal[] issuers) {
            return null; // a client has none
        }

        @Override
        public String chooseServerAlias(String type, Principal[] issuers, Socket socket) {
            return null; // a client has none
        }
    }

    private final class Trust extends X509ExtendedTrustManager {

        private X509ExtendedTrustManager now() throws CertificateException {
            try {
                return current().trust();
            } catch (IOException | GeneralSecurityException failure) {
                throw new CertificateException(failure);
            }
        }

        @Override
        public void checkServerTrusted(X509Certificate[] chain, String type, SSLEngine engine) throws CertificateException {
            now().checkServerTrusted(chain, type, engine);
        }

        @Override
        public void checkServerTrusted(X509Certificate[] chain, String type, Socket socket) throws CertificateException {
            now().checkServerTrusted(chain, type, socket);
        }

        @Override
        public void checkServerTrusted(X509Certificate[] chain, String type) throws CertificateException {
            // Without the connection the name in the certificate could not be held against the address.
            throw new CertificateException("a certificate is only judged with its connection");
        }

        @Override
        public void checkClientTrusted(X509Certificate[] chain, String type, SSLEngine engine) throws CertificateException {
            throw new CertificateException("these are credentials of a client");
        }

        @Override
        public void checkClientTrusted(X509Certificate[] chain, String type, Socket socket) throws CertificateException {
            throw new CertificateException("these are credentials of a client");
        }

        @Override
        public void checkClientTrusted(X509Certificate[] chain, String type) throws CertificateException {
            throw new CertificateException("these are credentials of a client");
        }

        @Override
        public X509Certificate[] getAcceptedIssuers() {
            return new X509Certificate[0];
        }
    }
}

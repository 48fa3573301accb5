package dev.virtfleet.client;

import java.io.IOException;
import java.io.InputStream;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.nio.file.FileSystemException;
import java.nio.file.Files;
import java.nio.file.Path;

/** Context files and certificates, bounded: a wrong path costs neither memory nor time. */
final class SmallFile {

    private static final int LIMIT_BYTES = 1 << 20;

    private SmallFile() {}

    static byte[] bytes(Path path) throws IOException {
        try (InputStream file = Files.newInputStream(path)) {
            byte[] content = file.readNBytes(LIMIT_BYTES + 1);
            if (content.length > LIMIT_BYTES) {
                throw new FileSystemException(path.toString(), null, "has more than " + (LIMIT_BYTES >> 20) + " MiB");
            }
            return content;
        }
    }

    /** Returns the text of a file; what is no UTF-8 is a {@link java.nio.charset.CharacterCodingException}. */
    static String text(Path path) throws IOException {
        return StandardCharsets.UTF_8.newDecoder().decode(ByteBuffer.wrap(bytes(path))).toString();
    }
}

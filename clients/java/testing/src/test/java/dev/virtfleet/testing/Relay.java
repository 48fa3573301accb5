package dev.virtfleet.testing;

import java.io.IOException;
import java.net.Socket;

/** A program that joins its standard input and output to a port. */
final class Relay {

    private Relay() {}

    public static void main(String[] arguments) throws IOException {
        String[] place = arguments[0].split(":");
        try (Socket socket = new Socket(place[0], Integer.parseInt(place[1]))) {
            Thread outward = new Thread(() -> {
                try {
                    System.in.transferTo(socket.getOutputStream());
                    socket.shutdownOutput();
                } catch (IOException broken) {
                    System.err.println(broken.getMessage());
                }
            });
            outward.setDaemon(true);
            outward.start();
            byte[] buffer = new byte[8192];
            for (int count = socket.getInputStream().read(buffer); count >= 0; count = socket.getInputStream().read(buffer)) {
                System.out.write(buffer, 0, count);
                System.out.flush();
            }
        }
    }
}

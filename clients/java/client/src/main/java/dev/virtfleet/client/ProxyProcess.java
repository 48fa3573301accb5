package dev.virtfleet.client;

import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStream;
import java.io.InputStreamReader;
import java.io.UncheckedIOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.util.List;
import java.util.Optional;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.TimeoutException;
import java.util.stream.Collectors;

/**
 * The helper process {@code virtfleet proxy URI}, which gives a unix socket for any transport. It is started at the beginning, and
 * again when it has died.
 */
final class ProxyProcess implements AutoCloseable {

    private static final long START_SECONDS = 30;
    private static final long END_SECONDS = 10;
    private static final int TEXT_LIMIT = 4096;

    private final String program;
    private final String uri;
    /** What the process that was started last has said. */
    private volatile StringBuffer said = new StringBuffer();

    private Running running;
    private boolean closed;

    /** A process that has named its socket. */
    private record Running(Process process, Path socket) {}

    ProxyProcess(String uri, String program) {
        this.uri = uri;
        this.program = program;
    }

    /** {@return the program that is the helper: VIRTFLEET_COMMAND, else virtfleet} */
    static String program() {
        String named = System.getenv().getOrDefault("VIRTFLEET_COMMAND", "");
        return named.isEmpty() ? "virtfleet" : named;
    }

    /**
     * Returns the socket of the process, which is started if it does not run.
     *
     * @throws IOException it cannot be started, or names no socket in time
     */
    synchronized Path socket() throws IOException {
        if (closed) {
            throw new IOException("the client is closed");
        }
        if (running == null || !running.process().isAlive()) {
            running = null;
            running = start();
        }
        return running.socket();
    }

    /** {@return the last two lines that differ of what the process has said; attempts that fail alike say the same} */
    String lastWords() {
        List<String> lines = said.toString().lines().map(String::strip).filter(line -> !line.isEmpty()).toList();
        return lines.stream().skip(Math.max(0, lines.size() - 2)).distinct().collect(Collectors.joining("; "));
    }

    private Running start() throws IOException {
        Process process = new ProcessBuilder(program, "proxy", uri).start();
        StringBuffer said = new StringBuffer();
        this.said = said;
        follow("virtfleet-proxy-errors", process.getErrorStream(), line -> keep(said, line));
        CompletableFuture<Optional<String>> first = new CompletableFuture<>();
        // Nothing else is said there; a full pipe must not stop it.
        Thread reader = follow("virtfleet-proxy-output", process.getInputStream(), line -> first.complete(Optional.of(line)));
        CompletableFuture<Void> silent = process.onExit().thenAccept(ended -> {
            join(reader);
            first.complete(Optional.empty());
        });
        try {
            Optional<String> socket = first.get(START_SECONDS, TimeUnit.SECONDS).filter(line -> line.startsWith("/"));
            if (socket.isPresent()) {
                return new Running(process, Path.of(socket.get()));
            }
            end(process);
            silent.join();
            throw new IOException(program + " proxy " + uri + ": it names no socket" + quoted(said));
        } catch (TimeoutException late) {
            end(process);
            throw new IOException(
                    program + " proxy " + uri + ": it names no socket within " + START_SECONDS + " s" + quoted(said), late);
        } catch (InterruptedException interrupted) {
            end(process);
            Thread.currentThread().interrupt();
            throw new IOException("interrupted while " + program + " proxy " + uri + " was starting", interrupted);
        } catch (ExecutionException impossible) {
            throw new IllegalStateException(impossible); // it is only ever completed
        }
    }

    private static void join(Thread reader) {
        try {
            reader.join(TimeUnit.SECONDS.toMillis(END_SECONDS));
        } catch (InterruptedException interrupted) {
            Thread.currentThread().interrupt();
        }
    }

    private static void keep(StringBuffer said, String line) {
        said.append(line).append('\n');
        if (said.length() > TEXT_LIMIT) {
            said.delete(0, said.length() - TEXT_LIMIT);
        }
    }

    private static String quoted(StringBuffer said) {
        String text = said.toString().strip();
        return text.isEmpty() ? "" : ": " + text;
    }

    private static Thread follow(String name, InputStream from, java.util.function.Consumer<String> each) {
        Thread thread = new Thread(() -> {
            try (var lines = new BufferedReader(new InputStreamReader(from, StandardCharsets.UTF_8))) {
                lines.lines().forEach(each);
            } catch (IOException | UncheckedIOException ended) {
                // The process is gone, and with it what it had to say.
                return;
            }
        }, name);
        thread.setDaemon(true);
        thread.start();
        return thread;
    }

    /** Ends a process in good order, by force if it does not heed that. */
    private static void end(Process process) {
        try {
            process.getOutputStream().close();
            if (!process.waitFor(END_SECONDS, TimeUnit.SECONDS)) {
                process.destroyForcibly();
            }
        } catch (IOException broken) {
            process.destroyForcibly();
        } catch (InterruptedException interrupted) {
            process.destroyForcibly();
            Thread.currentThread().interrupt();
        }
    }

    @Override
    public synchronized void close() {
        closed = true;
        if (running != null) {
            end(running.process());
            running = null;
        }
    }
}

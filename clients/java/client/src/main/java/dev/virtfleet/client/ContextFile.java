package dev.virtfleet.client;

import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonParseException;
import com.google.gson.JsonParser;
import java.io.IOException;
import java.nio.file.NoSuchFileException;
import java.nio.file.Path;
import java.util.Map;
import java.util.Objects;
import java.util.Optional;
import java.util.TreeMap;

/**
 * The context file, which all clients of virtfleet share: the fleets that one has access to, by name.
 *
 * <p>Immutable; no component is null.
 *
 * @param current the name of the context that is used when none is named; empty: none is
 * @param contexts the contexts by name
 */
public record ContextFile(Optional<String> current, Map<String, FleetContext> contexts) {

    /**
     * Makes the content of a context file.
     *
     * @param current the name of the context that is used when none is named
     * @param contexts the contexts by name; copied
     */
    public ContextFile {
        Objects.requireNonNull(current, "current");
        contexts = Map.copyOf(contexts);
    }

    /**
     * {@return where the context file is: VIRTFLEET_CONTEXTS_FILE, or virtfleet/contexts.json in the user's folder for settings
     * (XDG_CONFIG_HOME, else ~/.config)}
     */
    public static Path defaultPath() {
        return defaultPath(System.getenv());
    }

    static Path defaultPath(Map<String, String> environment) {
        String path = environment.getOrDefault("VIRTFLEET_CONTEXTS_FILE", "");
        if (!path.isEmpty()) {
            return Path.of(path);
        }
        String folder = environment.getOrDefault("XDG_CONFIG_HOME", "");
        Path settings = folder.isEmpty() ? Path.of(System.getProperty("user.home"), ".config") : Path.of(folder);
        return settings.resolve("virtfleet").resolve("contexts.json");
    }

    /**
     * Reads a context file. One that is missing has no contexts; relative paths in it begin at its folder.
     *
     * @param path where it is
     * @return its content
     * @throws FleetNotFoundException it cannot be read, or is not what a context file should be
     */
    public static ContextFile read(Path path) {
        try {
            return parse(SmallFile.text(path), path);
        } catch (NoSuchFileException missing) {
            return new ContextFile(Optional.empty(), Map.of());
        } catch (IOException | JsonParseException | IllegalStateException | UnsupportedOperationException failure) {
            // What the system says of a file begins with its path.
            String why = String.valueOf(failure.getMessage());
            throw new FleetNotFoundException(why.startsWith(path.toString()) ? why : path + ": " + why, failure);
        }
    }

    private static ContextFile parse(String content, Path path) {
        JsonObject whole = JsonParser.parseString(content).getAsJsonObject();
        Map<String, FleetContext> contexts = new TreeMap<>();
        JsonElement named = whole.get("contexts");
        if (named != null && !named.isJsonNull()) {
            named.getAsJsonObject().asMap().forEach((name, value) -> {
                if (name.isEmpty()) {
                    throw new JsonParseException("the name of a context is empty");
                }
                contexts.put(name, context(name, value.getAsJsonObject(), path));
            });
        }
        return new ContextFile(text(whole, "current"), contexts);
    }

    private static FleetContext context(String name, JsonObject value, Path path) {
        Optional<Path> authority = text(value, "ca_file").map(path::resolveSibling);
        Optional<Path> certificate = text(value, "cert_file").map(path::resolveSibling);
        Optional<Path> key = text(value, "key_file").map(path::resolveSibling);
        String address = text(value, "address")
                .orElseThrow(() -> new JsonParseException("context \"" + name + "\" has no address"));
        if (authority.isPresent() && certificate.isPresent() && key.isPresent()) {
            return new FleetContext(address, Optional.of(new Credentials(authority.get(), certificate.get(), key.get())));
        }
        return new FleetContext(address, Optional.empty());
    }

    private static Optional<String> text(JsonObject from, String key) {
        JsonElement value = from.get(key);
        return value == null || value.isJsonNull() || value.getAsString().isEmpty()
                ? Optional.empty()
                : Optional.of(value.getAsString());
    }

    /**
     * Returns a context of the file.
     *
     * @param name its name
     * @param path where the file is, for the message
     */
    FleetContext named(String name, Path path) {
        FleetContext found = contexts.get(name);
        if (found == null) {
            throw new FleetNotFoundException(path + " has no context \"" + name + "\"");
        }
        return found;
    }
}

package dev.virtfleet.client.informer;

import java.util.Collection;
import java.util.Objects;
import java.util.function.Function;

/**
 * A way to find resources by a value that they have. Those of each kind are in {@link Indexes}; a program adds its own:
 *
 * <pre>{@code
 * Index<Domain> byOwner = Index.of(domain -> List.of(domain.getAnnotationsOrDefault("owner", "nobody")));
 * Informer<Domain> domains = Informers.domains(client).index(byOwner).start();
 * domains.find(byOwner, "ada");
 * }</pre>
 *
 * <p>Immutable. An index is itself only: two of the same function are two indexes.
 *
 * @param <T> the resources
 */
public final class Index<T> {

    private final Function<? super T, ? extends Collection<String>> values;

    private Index(Function<? super T, ? extends Collection<String>> values) {
        this.values = values;
    }

    /**
     * Makes an index.
     *
     * @param <T> the resources
     * @param values the values under which a resource is found; pure, and called by any thread
     * @return the index
     */
    public static <T> Index<T> of(Function<? super T, ? extends Collection<String>> values) {
        return new Index<>(Objects.requireNonNull(values, "values"));
    }

    Collection<String> valuesOf(T resource) {
        return values.apply(resource);
    }
}

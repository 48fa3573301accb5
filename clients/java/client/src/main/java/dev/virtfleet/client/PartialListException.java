package dev.virtfleet.client;

import dev.virtfleet.type.v1.NodeFailure;
import java.util.List;
import java.util.stream.Collectors;

/**
 * A list has been read to its end, and the parts of some nodes are missing or as last seen. Every item that came before is good.
 * {@link Pages#tolerating} does without it.
 */
public final class PartialListException extends RuntimeException {

    private static final long serialVersionUID = 1L;

    private final transient List<NodeFailure> failures;

    PartialListException(List<NodeFailure> failures) {
        super(
                failures.stream()
                        .map(NodeFailure::getNode)
                        .collect(Collectors.joining(", ", "the list is not whole: nothing new of ", "")),
                VirtfleetException.ofStatus(failures.get(0).getStatus()).orElse(null));
        this.failures = List.copyOf(failures);
    }

    /** {@return the nodes, and why; never empty, but in an exception that has been serialized} */
    public List<NodeFailure> failures() {
        return failures == null ? List.of() : failures;
    }
}

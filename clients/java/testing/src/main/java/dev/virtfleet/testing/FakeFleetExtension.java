package dev.virtfleet.testing;

import dev.virtfleet.client.VirtfleetClient;
import org.junit.jupiter.api.extension.ExtensionContext;
import org.junit.jupiter.api.extension.ExtensionContext.Namespace;
import org.junit.jupiter.api.extension.ParameterContext;
import org.junit.jupiter.api.extension.ParameterResolutionException;
import org.junit.jupiter.api.extension.ParameterResolver;
import org.junit.platform.commons.support.AnnotationSupport;

/** The extension behind {@link WithFakeFleet}. It has no state of its own: threads may share it, tests run at the same time. */
public final class FakeFleetExtension implements ParameterResolver {

    private static final Namespace NAMESPACE = Namespace.create(FakeFleetExtension.class);

    /** What a test has, and JUnit closes after it: the client first. */
    private record Held(FakeFleet fleet, VirtfleetClient client) implements AutoCloseable {
        @Override
        public void close() {
            client.close();
            fleet.close();
        }
    }

    /** Made by JUnit. */
    public FakeFleetExtension() {}

    @Override
    public boolean supportsParameter(ParameterContext parameter, ExtensionContext test) {
        Class<?> type = parameter.getParameter().getType();
        return type == FakeFleet.class || type == VirtfleetClient.class;
    }

    @Override
    public Object resolveParameter(ParameterContext parameter, ExtensionContext test) {
        // Of the context of one test, so that each test has its own.
        Held held = test.getStore(NAMESPACE).getOrComputeIfAbsent(Held.class, key -> start(test), Held.class);
        return parameter.getParameter().getType() == FakeFleet.class ? held.fleet() : held.client();
    }

    private static Held start(ExtensionContext test) {
        WithFakeFleet wanted = AnnotationSupport.findAnnotation(test.getElement(), WithFakeFleet.class)
                .or(() -> AnnotationSupport.findAnnotation(test.getTestClass(), WithFakeFleet.class))
                .orElseThrow(() -> new ParameterResolutionException("the test is not annotated with @WithFakeFleet"));
        FakeFleet.Builder builder = FakeFleet.builder().nodes(wanted.nodes()).domains(wanted.domains());
        for (String fault : wanted.faults()) {
            builder.fault(fault);
        }
        FakeFleet fleet = builder.start();
        return new Held(fleet, fleet.connect());
    }
}

package dev.virtfleet.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.virtfleet.compute.v1.Domain;
import dev.virtfleet.compute.v1.DomainServiceGrpc;
import dev.virtfleet.compute.v1.ListDomainsRequest;
import dev.virtfleet.compute.v1.ListDomainsResponse;
import dev.virtfleet.type.v1.NodeFailure;
import io.grpc.Status;
import java.io.IOException;
import java.util.ArrayList;
import java.util.Iterator;
import java.util.List;
import java.util.NoSuchElementException;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;

class PagesTest {

    private static final ListDomainsRequest REQUEST = ListDomainsRequest.newBuilder().setParent("nodes/-").build();

    private Script script;

    @BeforeEach
    void start() throws IOException {
        script = new Script(DomainServiceGrpc.getListDomainsMethod());
    }

    @AfterEach
    void end() {
        script.close();
    }

    private static ListDomainsResponse page(String next, List<String> names, String... missing) {
        var page = ListDomainsResponse.newBuilder().setNextPageToken(next);
        names.forEach(name -> page.addDomains(Domain.newBuilder().setName(name)));
        for (String node : missing) {
            page.addUnreachable(NodeFailure.newBuilder().setNode(node).setStatus(VirtfleetExceptionTest.status(
                    Status.Code.UNAVAILABLE, VirtfleetExceptionTest.info("NODE_UNREACHABLE"))));
        }
        return page.build();
    }

    private Pages<Domain> list(ListDomainsRequest request, ListDomainsResponse... pages) {
        for (ListDomainsResponse page : pages) {
            script.answering(DomainServiceGrpc.getListDomainsMethod(), Script.Answer.of(page));
        }
        return script.client().domains().listDomains(request);
    }

    @Test
    void everyPageIsReadWhenItIsNeeded() {
        Pages<Domain> pages = list(REQUEST, page("2", List.of("a", "b")), page("3", List.of()), page("", List.of("c")));
        assertTrue(script.asked().isEmpty());
        Iterator<Domain> items = pages.iterator();
        assertEquals("a", items.next().getName());
        assertEquals("b", items.next().getName());
        assertEquals(1, script.asked().size());
        assertEquals("c", items.next().getName());
        assertThrows(NoSuchElementException.class, items::next);
        assertEquals(List.of("", "2", "3"), script.fields("page_token").toList());
    }

    @Test
    void nodesThatAreMissingAreToldAtTheEnd() {
        Pages<Domain> pages = list(REQUEST, page("2", List.of("a"), "nodes/n1"), page("", List.of("b"), "nodes/n1", "nodes/n2"));
        List<String> seen = new ArrayList<>();
        PartialListException partial =
                assertThrows(PartialListException.class, () -> pages.forEach(domain -> seen.add(domain.getName())));
        assertEquals(List.of("a", "b"), seen);
        assertEquals(List.of("nodes/n1", "nodes/n2"), partial.failures().stream().map(NodeFailure::getNode).toList());
        assertEquals(Reason.NODE_UNREACHABLE, VirtfleetException.of(partial.getCause()).reason());
    }

    @Test
    void whoToleratesItGetsWhatThereIs() {
        List<String> missing = new ArrayList<>();
        Pages<Domain> pages = list(REQUEST, page("", List.of("a"), "nodes/n1"));
        assertEquals(1, pages.tolerating(failure -> missing.add(failure.getNode())).toList().size());
        assertEquals(List.of("nodes/n1"), missing);
        ListDomainsRequest stale = REQUEST.toBuilder().setAllowStale(true).build();
        assertEquals(1, list(stale, page("", List.of("a"), "nodes/n1")).toList().size());
    }

    @Test
    void aPageThatCannotBeHadEndsTheReading() {
        Pages<Domain> pages = list(REQUEST, page("2", List.of("a")));
        script.answering(DomainServiceGrpc.getListDomainsMethod(), Script.Answer.failing(Status.Code.INVALID_ARGUMENT));
        assertEquals(Status.Code.INVALID_ARGUMENT, assertThrows(VirtfleetException.class, pages::toList).code());
    }
}

package dev.virtfleet.client.informer;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.protobuf.Any;
import com.google.rpc.ErrorInfo;
import dev.virtfleet.client.VirtfleetException;
import dev.virtfleet.client.WatchOptions;
import dev.virtfleet.compute.v1.Disk;
import dev.virtfleet.compute.v1.Domain;
import dev.virtfleet.compute.v1.DomainSpec;
import dev.virtfleet.compute.v1.DomainStatus;
import dev.virtfleet.compute.v1.GuestAddress;
import dev.virtfleet.compute.v1.Interface;
import dev.virtfleet.compute.v1.InterfaceStatus;
import dev.virtfleet.type.v1.ResourceDelete;
import dev.virtfleet.type.v1.SourceState;
import dev.virtfleet.type.v1.WatchSourceStatus;
import io.grpc.Status;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.LinkedBlockingQueue;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.TimeoutException;
import java.util.stream.Collectors;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

@Timeout(30)
class InformerTest {

    private static final Index<Domain> FIRST_LETTER = Index.of(domain -> List.of(domain.getDisplayName().substring(0, 1)));

    private final List<String> heard = new ArrayList<>();
    private Informer<Domain> domains = informer(false);

    private Informer.Builder<Domain> builder(Informer.Source<Domain> source) {
        return new Informer.Builder<>(Domain.class, Domain.parser(), (plan, options) -> source)
                .index(Indexes.NODE)
                .index(Indexes.LABEL)
                .index(Indexes.DOMAIN_VOLUME)
                .index(Indexes.DOMAIN_MAC)
                .index(Indexes.DOMAIN_ADDRESS)
                .handler(new Told());
    }

    /** An informer that is told what a test says. */
    private Informer<Domain> informer(boolean packed) {
        Informer.Builder<Domain> builder = builder(new Line());
        return (packed ? builder.packed() : builder).prepared();
    }

    private final class Told implements InformerHandler<Domain> {
        @Override
        public void added(Domain domain) {
            heard.add("added " + domain.getName());
        }

        @Override
        public void changed(Domain before, Domain after) {
            heard.add("changed " + after.getName() + " " + before.getDisplayName() + " to " + after.getDisplayName());
        }

        @Override
        public void moved(Domain before, Domain after) {
            heard.add("moved " + before.getName() + " to " + after.getName());
        }

        @Override
        public void deleted(Domain last) {
            heard.add("deleted " + last.getName());
        }

        @Override
        public void synced() {
            heard.add("synced");
        }

        @Override
        public void sourceChanged(WatchSourceStatus status) {
            heard.add(status.getNode() + " " + status.getState().name().substring("SOURCE_STATE_".length()));
        }
    }

    /** A source of what a test puts into it. */
    private static final class Line implements Informer.Source<Domain> {
        private final BlockingQueue<Object> news = new LinkedBlockingQueue<>();
        private Change.News<Domain> next;

        @Override
        public boolean hasNext() {
            try {
                Object taken = news.take();
                if (taken instanceof RuntimeException failure) {
                    throw failure;
                }
                if (taken instanceof Change.News<?> told) {
                    @SuppressWarnings("unchecked") // all that is put into it
                    Change.News<Domain> typed = (Change.News<Domain>) told;
                    next = typed;
                }
                return taken instanceof Change.News<?>;
            } catch (InterruptedException interrupted) {
                return false;
            }
        }

        @Override
        public Change.News<Domain> next() {
            return next;
        }

        @Override
        public void close() {
            news.add("end");
        }
    }

    private void expect(String... wanted) {
        assertEquals(List.of(wanted).stream().sorted().toList(), heard.stream().sorted().toList());
        heard.clear();
    }

    private String names() {
        return domains.stream().map(Domain::getName).sorted().collect(Collectors.joining(" "));
    }

    private static Change<Domain> put(String uid, String name, String title) {
        return new Change.Put<>(Domain.newBuilder().setUid(uid).setName(name).setDisplayName(title).build());
    }

    private static Change<Domain> gone(String uid, String name) {
        return new Change.Deleted<>(ResourceDelete.newBuilder().setUid(uid).setName(name).build());
    }

    private void tell(List<Change<Domain>> changes) {
        domains.take(new Change.News<>(changes, false, Optional.empty()));
    }

    private void tell(Change<Domain> change) {
        tell(List.of(change));
    }

    private void tell(Change<Domain> one, Change<Domain> other) {
        tell(List.of(one, other));
    }

    private void tell(Change<Domain> one, Change<Domain> other, Change<Domain> third) {
        tell(List.of(one, other, third));
    }

    private static Change.News<Domain> snapshotEnd() {
        return new Change.News<>(List.of(), true, Optional.empty());
    }

    private void end() {
        domains.take(snapshotEnd());
    }

    private void begin(boolean snapshot) {
        domains.begin(snapshot ? WatchOptions.Begin.SNAPSHOT : WatchOptions.Begin.RESUMED);
    }

    private void sourceIs(String node, SourceState state, String reason) {
        var status = WatchSourceStatus.newBuilder().setNode(node).setState(state);
        if (!reason.isEmpty()) {
            status.setStatus(com.google.rpc.Status.newBuilder()
                    .setCode(Status.Code.UNAVAILABLE.value())
                    .addDetails(Any.pack(ErrorInfo.newBuilder().setDomain("virtfleet.dev").setReason(reason).build())));
        }
        domains.take(new Change.News<>(List.of(), false, Optional.of(status.build())));
    }

    @ParameterizedTest
    @ValueSource(booleans = {false, true})
    void changesAreTaken(boolean packed) {
        domains = informer(packed);
        begin(true);
        tell(put("1", "nodes/n1/domains/a", "x"), put("2", "nodes/n2/domains/b", ""));
        assertFalse(domains.isSynced());
        end();
        expect("added nodes/n1/domains/a", "added nodes/n2/domains/b", "synced");
        tell(put("1", "nodes/n1/domains/a", "y"), put("1", "nodes/n1/domains/a", "y"));
        expect("changed nodes/n1/domains/a x to y");
        tell(gone("2", "nodes/n2/domains/b"), gone("2", "nodes/n2/domains/b"), gone("9", "nodes/n2/domains/z"));
        expect("deleted nodes/n2/domains/b");
        assertEquals("y", domains.named("nodes/n1/domains/a").orElseThrow().getDisplayName());
        assertTrue(domains.isSynced());
        assertTrue(domains.isConnected());
        assertEquals(1, domains.size());
        assertTrue(domains.get("2").isEmpty());
    }

    @Test
    void aNewSnapshotDropsWhatIsNotInIt() {
        begin(true);
        tell(put("1", "nodes/n1/domains/a", ""), put("2", "nodes/n1/domains/b", ""));
        end();
        heard.clear();
        begin(true);
        tell(put("1", "nodes/n1/domains/a", ""));
        begin(true); // it broke, and begins again
        tell(put("2", "nodes/n1/domains/b", ""), put("3", "nodes/n1/domains/c", ""));
        end();
        expect("added nodes/n1/domains/c", "deleted nodes/n1/domains/a", "synced");
        begin(false); // it goes on: nothing is dropped
        tell(put("4", "nodes/n1/domains/d", ""));
        expect("added nodes/n1/domains/d");
        assertEquals(new InformerStatistics(6, 3, 1, 0), domains.statistics());
    }

    @Test
    void aNodeThatIsReadAnewLosesWhatIsNotTold() {
        tell(put("1", "nodes/n1/domains/a", ""), put("2", "nodes/n1/domains/b", ""), put("3", "nodes/n2/domains/c", ""));
        heard.clear();
        sourceIs("nodes/n1", SourceState.SOURCE_STATE_STALE, "NODE_UNREACHABLE");
        expect("nodes/n1 STALE");
        assertEquals("nodes/n1/domains/a nodes/n1/domains/b nodes/n2/domains/c", names());
        assertEquals(SourceState.SOURCE_STATE_STALE, domains.source("nodes/n1").getState());
        sourceIs("nodes/n1", SourceState.SOURCE_STATE_RESYNCING, "");
        tell(put("2", "nodes/n1/domains/b", ""), put("4", "nodes/n2/domains/d", ""));
        sourceIs("nodes/n1", SourceState.SOURCE_STATE_LIVE, "");
        expect("nodes/n1 RESYNCING", "nodes/n1 LIVE", "added nodes/n2/domains/d", "deleted nodes/n1/domains/a");
        assertEquals(SourceState.SOURCE_STATE_LIVE, domains.source("nodes/n9").getState());
        assertEquals(1, domains.statistics().resyncs());
        // A stream that breaks in the middle drops nothing; the node is read anew after it.
        sourceIs("nodes/n2", SourceState.SOURCE_STATE_RESYNCING, "");
        begin(false);
        sourceIs("nodes/n2", SourceState.SOURCE_STATE_LIVE, "");
        assertEquals("nodes/n1/domains/b nodes/n2/domains/c nodes/n2/domains/d", names());
    }

    @Test
    void aNodeThatIsLostIsKeptAndOneThatIsRemovedIsNot() {
        tell(put("1", "nodes/n1/domains/a", ""), put("2", "nodes/n2/domains/b", ""));
        heard.clear();
        sourceIs("nodes/n1", SourceState.SOURCE_STATE_LOST, "NODE_UNREACHABLE");
        assertEquals("nodes/n1/domains/a nodes/n2/domains/b", names());
        assertEquals(SourceState.SOURCE_STATE_LOST, domains.sources().get("nodes/n1").getState());
        sourceIs("nodes/n1", SourceState.SOURCE_STATE_LOST, "NODE_UNKNOWN");
        expect("nodes/n1 LOST", "nodes/n1 LOST", "deleted nodes/n1/domains/a");
        assertTrue(domains.sources().isEmpty());
    }

    @Test
    void whatMovesStaysOneObject() {
        Change<Domain> moved = new Change.Moved<>("1", "nodes/n2/domains/a");
        Change<Domain> arrived = put("1", "nodes/n2/domains/a", "");
        Change<Domain> left = gone("1", "nodes/n1/domains/a"); // of its old name: it says nothing of the new one
        for (List<Change<Domain>> changes : List.of(List.of(moved, arrived, left), List.of(arrived, moved), List.of(arrived))) {
            domains = informer(false);
            tell(put("1", "nodes/n1/domains/a", ""));
            heard.clear();
            domains.take(new Change.News<>(changes, false, Optional.empty()));
            expect("moved nodes/n1/domains/a to nodes/n2/domains/a");
            assertEquals("nodes/n2/domains/a", names());
            assertEquals(0, domains.count(Indexes.NODE, "nodes/n1"));
            assertEquals(1, domains.count(Indexes.NODE, "nodes/n2"));
            assertTrue(domains.named("nodes/n1/domains/a").isEmpty());
        }
        tell(new Change.Left<>("1")); // of a watch of one node
        assertEquals(0, domains.size());
    }

    @Test
    void aNameUnderAnotherUidMeansThatTheOldOneIsGone() {
        tell(put("1", "nodes/n1/domains/a", ""));
        heard.clear();
        tell(put("2", "nodes/n1/domains/a", ""));
        expect("deleted nodes/n1/domains/a", "added nodes/n1/domains/a");
        tell(gone("1", "nodes/n1/domains/a")); // late, and of the old one
        expect();
        assertEquals("2", domains.named("nodes/n1/domains/a").orElseThrow().getUid());
        assertEquals(1, domains.size());
    }

    @ParameterizedTest
    @ValueSource(booleans = {false, true})
    void indexesFollowTheResources(boolean packed) {
        Informer.Builder<Domain> builder = builder(new Line()).index(FIRST_LETTER);
        domains = (packed ? builder.packed() : builder).prepared();
        String given = "06:00:00:00:00:02";
        String mac = "06:00:00:00:00:01";
        Domain full = Domain.newBuilder()
                .setUid("1")
                .setName("nodes/n1/domains/a")
                .setDisplayName("x")
                .putLabels("app", "web")
                .putLabels("tier", "1")
                .setSpec(DomainSpec.newBuilder()
                        .putDisks("root", Disk.newBuilder().setVolume("pools/p/volumes/v").build())
                        .putInterfaces("lan", Interface.newBuilder().setMacAddress(mac).build()))
                .setStatus(DomainStatus.newBuilder()
                        .addInterfaces(InterfaceStatus.newBuilder().setMacAddress(mac))
                        .addInterfaces(InterfaceStatus.newBuilder().setMacAddress(given))
                        .addAddresses(GuestAddress.newBuilder().setAddress("10.0.0.7")))
                .build();
        Domain bare = Domain.newBuilder()
                .setUid("2")
                .setName("nodes/n1/domains/b")
                .setDisplayName("x")
                .putLabels("app", "web")
                .build();
        tell(new Change.Put<>(bare), new Change.Put<>(full));
        Map<Index<? super Domain>, Map<String, Integer>> wanted = Map.of(
                Indexes.NODE, Map.of("nodes/n1", 2, "nodes/n2", 0),
                Indexes.LABEL, Map.of("app=web", 2, "tier=1", 1, "tier=2", 0),
                Indexes.DOMAIN_VOLUME, Map.of("nodes/n1/pools/p/volumes/v", 1),
                Indexes.DOMAIN_MAC, Map.of(mac, 1, given, 1),
                Indexes.DOMAIN_ADDRESS, Map.of("10.0.0.7", 1),
                FIRST_LETTER, Map.of("x", 2));
        wanted.forEach((index, values) -> values.forEach((value, count) -> {
            assertEquals(count, domains.find(index, value).size(), value);
            assertEquals(count, domains.count(index, value), value);
        }));
        assertEquals(List.of("1", "2"), domains.find(Indexes.LABEL, "app=web").stream().map(Domain::getUid).toList());
        tell(put("1", "nodes/n1/domains/a", "y"));
        assertEquals(0, domains.count(Indexes.LABEL, "tier=1"));
        assertEquals(0, domains.count(Indexes.DOMAIN_MAC, mac));
        assertEquals(1, domains.count(FIRST_LETTER, "y"));
        assertThrows(IllegalArgumentException.class, () -> domains.count(Index.of(domain -> List.of()), "x"));
    }

    @Test
    void anIndexKeepsNothingOfNothing() {
        Store<Domain> store = new Store<>(Domain.parser(), true, List.of(Indexes.NODE, Indexes.LABEL));
        store.put(Domain.newBuilder().setUid("1").setName("nodes/n1/domains/a").putLabels("a", "b").build());
        store.put(Domain.newBuilder().setUid("1").setName("nodes/n2/domains/a").build());
        assertEquals(1, store.values(Indexes.NODE));
        assertEquals(0, store.values(Indexes.LABEL));
        store.remove("1");
        assertEquals(0, store.values(Indexes.NODE));
        assertTrue(store.remove("1").isEmpty());
    }

    @Test
    void itEndsWhenItIsClosedRefusedOrLetDownByAHandler() throws Exception {
        Line line = new Line();
        Informer<Domain> closed = builder(line).start();
        assertThrows(TimeoutException.class, () -> closed.awaitSynced(Duration.ofMillis(50)));
        line.news.add(snapshotEnd());
        closed.awaitSynced(Duration.ofSeconds(10));
        closed.close();
        closed.ended().get(10, TimeUnit.SECONDS);
        assertFalse(closed.isConnected());

        Line refusing = new Line();
        refusing.news.add(VirtfleetException.of(Status.PERMISSION_DENIED.asRuntimeException()));
        Informer<Domain> refused = builder(refusing).start();
        VirtfleetException why =
                assertThrows(VirtfleetException.class, () -> refused.awaitSynced(Duration.ofSeconds(10)));
        assertEquals(Status.Code.PERMISSION_DENIED, why.code());

        Line news = new Line();
        news.news.add(new Change.News<>(List.of(put("1", "nodes/n1/domains/a", "")), false, Optional.empty()));
        Informer<Domain> broken = builder(news)
                .handler(new InformerHandler<Domain>() {
                    @Override
                    public void added(Domain domain) {
                        throw new IllegalStateException("the handler");
                    }
                })
                .start();
        ExecutionException ended =
                assertThrows(ExecutionException.class, () -> broken.ended().get(10, TimeUnit.SECONDS));
        assertEquals("the handler", ended.getCause().getMessage());
    }

    @Test
    void aBuilderStartsOneInformer() {
        Informer.Builder<Domain> builder = builder(new Line());
        builder.prepared();
        assertThrows(IllegalStateException.class, builder::start);
    }

    @Test
    void namesHaveParts() {
        assertEquals("nodes/n1", Names.nodeOf("nodes/n1/domains/a"));
        assertEquals("nodes/n1", Names.nodeOf("nodes/n1"));
        assertEquals("", Names.nodeOf(""));
        assertEquals("nodes/n1/pools/p", Names.parentOf("nodes/n1/pools/p/volumes/v"));
        assertEquals("", Names.parentOf("x"));
    }
}

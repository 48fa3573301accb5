package dev.virtfleet.testing;

import dev.virtfleet.client.VirtfleetClient;
import dev.virtfleet.client.informer.Informer;
import dev.virtfleet.client.informer.InformerHandler;
import dev.virtfleet.client.informer.Informers;
import dev.virtfleet.compute.v1.Domain;
import dev.virtfleet.type.v1.SourceState;
import dev.virtfleet.type.v1.WatchSourceStatus;
import java.util.Set;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.TimeoutException;

/** An informer of domains that runs, with what it has told. */
record Observed(Informer<Domain> informer, Set<String> told) implements AutoCloseable {

    static Observed all(VirtfleetClient client) throws InterruptedException, TimeoutException {
        return of(Informers.domains(client));
    }

    static Observed of(Informer.Builder<Domain> builder) throws InterruptedException, TimeoutException {
        Set<String> told = ConcurrentHashMap.newKeySet();
        Informer<Domain> informer = builder.handler(new InformerHandler<Domain>() {
            @Override
            public void added(Domain domain) {
                told.add("added " + domain.getName());
            }

            @Override
            public void moved(Domain before, Domain after) {
                told.add("moved " + before.getName() + " " + after.getName());
            }

            @Override
            public void deleted(Domain last) {
                told.add("deleted " + last.getName());
            }

            @Override
            public void sourceChanged(WatchSourceStatus status) {
                told.add(status.getNode() + " " + status.getState());
            }
        }).start();
        informer.awaitSynced(Guests.PATIENCE);
        return new Observed(informer, told);
    }

    boolean knows(Domain domain) {
        return informer.named(domain.getName()).isPresent();
    }

    boolean hasDeleted(Domain domain) {
        return told.contains("deleted " + domain.getName());
    }

    SourceState source(String node) {
        return informer.source(node).getState();
    }

    @Override
    public void close() {
        informer.close();
        informer.ended().join(); // throws what it ended with, if that was not the closing
    }
}

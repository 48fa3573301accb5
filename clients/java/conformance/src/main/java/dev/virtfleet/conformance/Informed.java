package dev.virtfleet.conformance;

import com.google.gson.JsonObject;
import dev.virtfleet.client.VirtfleetClient;
import dev.virtfleet.client.informer.Informer;
import dev.virtfleet.client.informer.InformerHandler;
import dev.virtfleet.client.informer.Informers;
import dev.virtfleet.compute.v1.Domain;
import java.time.Duration;
import java.util.HashMap;
import java.util.Map;
import java.util.Optional;
import java.util.concurrent.TimeoutException;

/** An informer, and how often its handler was told what. */
final class Informed implements Agent.Part, InformerHandler<Domain> {

    private final Hold hold = new Hold();
    private final Map<String, Map<String, Integer>> told = new HashMap<>();
    private final Informer<Domain> domains;

    Informed(VirtfleetClient client, JsonObject request) {
        domains = Informers.domains(client).parent(Agent.text(request, "parent")).handler(this).start();
    }

    JsonObject synced(Duration limit) throws InterruptedException, TimeoutException {
        domains.awaitSynced(limit);
        JsonObject answer = new JsonObject();
        answer.addProperty("count", domains.size());
        return answer;
    }

    private void count(Domain domain, String what) {
        hold.pass();
        synchronized (told) {
            told.computeIfAbsent(domain.getUid(), first -> new HashMap<>()).merge(what, 1, Integer::sum);
        }
    }

    @Override
    public void added(Domain domain) {
        count(domain, "added");
    }

    @Override
    public void changed(Domain before, Domain after) {
        count(after, "changed");
    }

    @Override
    public void moved(Domain before, Domain after) {
        count(after, "moved");
    }

    @Override
    public void deleted(Domain last) {
        count(last, "deleted");
    }

    @Override
    public JsonObject state(JsonObject request) {
        Optional<Domain> domain = domains.get(Agent.text(request, "uid"));
        JsonObject counts = new JsonObject();
        synchronized (told) {
            Map<String, Integer> found = told.getOrDefault(Agent.text(request, "uid"), Map.of());
            for (String what : new String[] {"added", "changed", "moved", "deleted"}) {
                counts.addProperty(what, found.getOrDefault(what, 0));
            }
        }
        JsonObject state = new JsonObject();
        state.addProperty("count", domains.size());
        state.addProperty("connected", domains.isConnected());
        state.addProperty("held", hold.stands());
        state.addProperty("source", domains.source(Agent.text(request, "node")).getState().name().replaceFirst("^SOURCE_STATE_", ""));
        state.addProperty("known", domain.isPresent());
        state.addProperty("name", domain.map(Domain::getName).orElse(""));
        state.addProperty("display_name", domain.map(Domain::getDisplayName).orElse(""));
        state.addProperty("state", domain.map(Agent::state).orElse(""));
        state.add("told", counts);
        return state;
    }

    @Override
    public Hold hold() {
        return hold;
    }

    @Override
    public void close() {
        hold.set(false);
        domains.close();
    }
}

package dev.virtfleet.conformance;

import com.google.gson.JsonNull;
import com.google.gson.JsonObject;
import dev.virtfleet.client.ResourceWatch;
import dev.virtfleet.client.VirtfleetClient;
import dev.virtfleet.client.WatchOptions;
import dev.virtfleet.compute.v1.Change;
import dev.virtfleet.compute.v1.Domain;
import dev.virtfleet.compute.v1.ResourceType;
import dev.virtfleet.compute.v1.WatchResourcesRequest;
import dev.virtfleet.compute.v1.WatchResourcesResponse;
import dev.virtfleet.type.v1.WatchSnapshot;
import java.util.HashMap;
import java.util.Map;

/** A watch, and what it has told. */
final class Watched implements Agent.Part {

    private final Hold hold = new Hold();
    private final ResourceWatch<WatchResourcesResponse> watch;
    private final Map<String, Long> generations = new HashMap<>();
    private final Map<String, JsonObject> last = new HashMap<>();
    private int changes;
    private int snapshotEnds;
    private int backwards;
    private boolean ended;
    private JsonObject error;

    Watched(VirtfleetClient client, JsonObject request) {
        WatchOptions options = WatchOptions.standard();
        watch = client.computeWatch().watchResources(
                WatchResourcesRequest.newBuilder()
                        .setParent(Agent.text(request, "parent"))
                        .addResourceTypes(ResourceType.RESOURCE_TYPE_DOMAIN)
                        .setSnapshot(WatchSnapshot.getDefaultInstance())
                        .build(),
                Agent.flag(request, "resnapshot", false) ? options.resnapshotting() : options);
        Thread thread = new Thread(this::read, "watch");
        thread.setDaemon(true);
        thread.start();
    }

    private void read() {
        try {
            while (watch.hasNext()) {
                WatchResourcesResponse answer = watch.next();
                if (answer.getChangesCount() > 0) {
                    hold.pass();
                }
                take(answer);
            }
            end(null);
        } catch (RuntimeException failure) {
            end(Agent.error(failure));
        }
    }

    private synchronized void end(JsonObject failure) {
        ended = true;
        error = failure;
    }

    private synchronized void take(WatchResourcesResponse answer) {
        for (Change change : answer.getChangesList()) {
            changes++;
            if (change.hasPut()) {
                Domain domain = change.getPut().getDomain();
                Long before = generations.put(domain.getUid(), domain.getGeneration());
                backwards += before != null && domain.getGeneration() < before ? 1 : 0;
                note(domain.getName(), domain.getDisplayName(), false, domain.getGeneration());
            } else if (change.hasDelete()) {
                note(change.getDelete().getName(), "", true, 0);
            }
        }
        snapshotEnds += answer.hasSnapshotEnd() ? 1 : 0;
    }

    private void note(String name, String title, boolean deleted, long generation) {
        JsonObject told = Agent.object("display_name", title);
        told.addProperty("deleted", deleted);
        told.addProperty("generation", generation);
        last.put(name, told);
    }

    @Override
    public synchronized JsonObject state(JsonObject request) {
        JsonObject state = new JsonObject();
        state.addProperty("changes", changes);
        state.addProperty("snapshot_ends", snapshotEnds);
        state.addProperty("held", hold.stands());
        state.addProperty("ended", ended);
        state.add("error", error == null ? JsonNull.INSTANCE : error);
        state.addProperty("backwards", backwards);
        JsonObject told = last.get(Agent.text(request, "name"));
        state.add("last", told == null ? JsonNull.INSTANCE : told);
        return state;
    }

    @Override
    public Hold hold() {
        return hold;
    }

    @Override
    public void close() {
        hold.set(false);
        watch.close();
    }
}

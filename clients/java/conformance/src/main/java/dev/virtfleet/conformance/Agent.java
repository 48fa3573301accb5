package dev.virtfleet.conformance;

import com.google.gson.JsonArray;
import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import com.google.protobuf.ByteString;
import com.google.protobuf.Duration;
import com.google.protobuf.Empty;
import com.google.protobuf.FieldMask;
import com.google.protobuf.util.Durations;
import dev.virtfleet.client.Credentials;
import dev.virtfleet.client.Operation;
import dev.virtfleet.client.OperationPendingException;
import dev.virtfleet.client.VirtfleetClient;
import dev.virtfleet.client.VirtfleetException;
import dev.virtfleet.compute.v1.CreateDomainRequest;
import dev.virtfleet.compute.v1.DeleteDomainRequest;
import dev.virtfleet.compute.v1.Domain;
import dev.virtfleet.compute.v1.DomainSpec;
import dev.virtfleet.compute.v1.GetDomainRequest;
import dev.virtfleet.compute.v1.ListDomainsRequest;
import dev.virtfleet.compute.v1.Memory;
import dev.virtfleet.compute.v1.StartOptions;
import dev.virtfleet.compute.v1.StopDomainRequest;
import dev.virtfleet.compute.v1.StopMode;
import dev.virtfleet.compute.v1.TestOptions;
import dev.virtfleet.compute.v1.UpdateDomainRequest;
import dev.virtfleet.type.v1.NodeFailure;
import dev.virtfleet.type.v1.ResourceView;
import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.HashSet;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.TimeoutException;

/**
 * What the conformance suite drives: it does what standard input asks for with the client's normal means, and says on standard output what
 * came of it. It has no opinion.
 */
final class Agent {

    private final Map<String, Part> parts = new ConcurrentHashMap<>();
    private volatile VirtfleetClient client;
    private final Map<String, Step> steps = Map.ofEntries(
            Map.entry("connect", new Step(this::connect, "address ca_file cert_file key_file")),
            Map.entry("close", new Step(request -> close(), "")),
            Map.entry("create", new Step(this::create, "parent domain_id start power_button_delay_s deadline_s")),
            Map.entry("get", new Step(this::get, "name deadline_s")),
            Map.entry("list", new Step(this::list, "parent page_size")),
            Map.entry("update", new Step(this::update, "name display_name etag")),
            Map.entry("delete", new Step(this::delete, "name")),
            Map.entry("stop", new Step(this::stop, "name timeout_s")),
            Map.entry("wait", new Step(this::await, "operation deadline_s")),
            Map.entry("cancel", new Step(this::cancel, "operation")),
            Map.entry("watch", new Step(request -> begin(request, new Watched(client, request)), "as parent resnapshot")),
            Map.entry("watched", new Step(request -> part(request).state(request), "as name")),
            Map.entry("informer", new Step(this::informer, "as parent deadline_s")),
            Map.entry("informed", new Step(request -> part(request).state(request), "as uid node")),
            Map.entry("hold", new Step(request -> held(request, true), "as")),
            Map.entry("release", new Step(request -> held(request, false), "as")),
            Map.entry("console", new Step(this::console, "as name epoch offset force")),
            Map.entry("console_write", new Step(this::write, "as text")),
            Map.entry("console_read", new Step(request -> part(request).state(request), "as")),
            Map.entry("upload", new Step(this::upload, "name size_bytes seed upload_id offset_bytes")));
    /** Something that goes on in the background under a name. */
    interface Part extends AutoCloseable {
        JsonObject state(JsonObject request);

        Hold hold();

        @Override
        void close();
    }

    private interface Work {
        JsonObject on(JsonObject request) throws Exception;
    }

    private record Step(Work work, String fields) {}

    /** The harness asks for something that this agent does not know. */
    private static final class UnknownStepException extends Exception {
        private static final long serialVersionUID = 1L;

        UnknownStepException(String message) {
            super(message);
        }
    }

    private Agent() {}

    public static void main(String[] arguments) throws IOException {
        Agent agent = new Agent();
        PrintStream output = new PrintStream(System.out, true, StandardCharsets.UTF_8);
        var input = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
        for (String line = input.readLine(); line != null; line = input.readLine()) {
            JsonObject request = JsonParser.parseString(line).getAsJsonObject();
            Thread thread = new Thread(() -> {
                JsonObject answer = agent.answer(request);
                synchronized (output) {
                    output.println(answer);
                }
            });
            thread.setDaemon(true);
            thread.start();
        }
        agent.close();
    }

    private JsonObject answer(JsonObject request) {
        JsonObject answer = new JsonObject();
        answer.add("id", request.get("id"));
        try {
            answer.add("result", known(request).work().on(request));
        } catch (Exception failure) {
            answer.add("error", error(failure));
        }
        return answer;
    }

    private Step known(JsonObject request) throws UnknownStepException {
        String name = request.get("do").getAsString();
        Step step = steps.get(name);
        if (step == null) {
            throw new UnknownStepException("unknown request " + name);
        }
        Set<String> unknown = new HashSet<>(request.keySet());
        unknown.removeAll(Set.of("id", "do"));
        unknown.removeAll(List.of(step.fields().split(" ")));
        if (!unknown.isEmpty()) {
            throw new UnknownStepException(name + " has no " + unknown);
        }
        return step;
    }

    static JsonObject error(Throwable failure) {
        JsonObject error = new JsonObject();
        if (failure instanceof VirtfleetException typed) {
            JsonObject metadata = new JsonObject();
            typed.metadata().forEach(metadata::addProperty);
            JsonArray fields = new JsonArray();
            typed.violations().forEach(violation -> fields.add(violation.path()));
            error.addProperty("code", typed.code().name());
            error.addProperty("reason", typed.reasonText());
            error.addProperty("message", typed.getMessage());
            error.add("metadata", metadata);
            error.addProperty("new_name", typed.newName().orElse(""));
            error.add("fields", fields);
        } else if (failure instanceof OperationPendingException || failure instanceof TimeoutException) {
            error.addProperty("code", "DEADLINE_EXCEEDED");
            error.addProperty("reason", "");
            error.addProperty("message", String.valueOf(failure.getMessage()));
            error.add("metadata", new JsonObject());
            error.addProperty("new_name", "");
            error.add("fields", new JsonArray());
        } else {
            boolean unknown = failure instanceof UnknownStepException;
            error.addProperty("code", unknown ? "UNKNOWN_STEP" : "UNTYPED");
            error.addProperty("message", unknown ? failure.getMessage() : String.valueOf(failure));
        }
        return error;
    }

    // Fields of requests.

    static String text(JsonObject request, String name) {
        return request.has(name) ? request.get(name).getAsString() : "";
    }

    static boolean flag(JsonObject request, String name, boolean otherwise) {
        return request.has(name) ? request.get(name).getAsBoolean() : otherwise;
    }

    static long number(JsonObject request, String name) {
        return request.has(name) ? request.get(name).getAsLong() : 0;
    }

    static java.time.Duration seconds(JsonObject request, String name, double otherwise) {
        double seconds = request.has(name) ? request.get(name).getAsDouble() : otherwise;
        return java.time.Duration.ofNanos(Math.round(seconds * 1e9));
    }

    private static Duration proto(java.time.Duration duration) {
        return Durations.fromNanos(duration.toNanos());
    }

    static JsonObject object(String name, String value) {
        JsonObject object = new JsonObject();
        object.addProperty(name, value);
        return object;
    }

    // Calls.

    private JsonObject connect(JsonObject request) {
        client = VirtfleetClient.builder()
                .address(text(request, "address"))
                .credentials(new Credentials(
                        Path.of(text(request, "ca_file")),
                        Path.of(text(request, "cert_file")),
                        Path.of(text(request, "key_file"))))
                .build();
        return new JsonObject();
    }

    private JsonObject close() {
        parts.values().forEach(Part::close);
        parts.clear();
        if (client != null) {
            client.close();
        }
        return new JsonObject();
    }

    private JsonObject create(JsonObject request) throws Exception {
        DomainSpec.Builder spec = DomainSpec.newBuilder()
                .setDriver("test")
                .setMemory(Memory.newBuilder().setMaximumBytes(64 << 20));
        java.time.Duration delay = seconds(request, "power_button_delay_s", 0);
        if (!delay.isZero()) {
            spec.setTest(TestOptions.newBuilder().setPowerButtonDelay(proto(delay)));
        }
        CreateDomainRequest.Builder asked = CreateDomainRequest.newBuilder()
                .setParent(text(request, "parent"))
                .setDomainId(text(request, "domain_id"))
                .setDomain(Domain.newBuilder().setSpec(spec));
        if (flag(request, "start", false)) {
            asked.setStart(StartOptions.getDefaultInstance());
        }
        long begun = System.nanoTime();
        var calls = client.domains();
        if (request.has("deadline_s")) {
            java.time.Duration limit = seconds(request, "deadline_s", 0);
            Operation<Domain> creation =
                    calls.withDeadlineAfter(limit.toNanos(), TimeUnit.NANOSECONDS).createDomain(asked.build());
            return named(creation.await(limit.minusNanos(System.nanoTime() - begun)));
        }
        return named(result(calls.createDomain(asked.build())));
    }

    private static JsonObject named(Domain domain) {
        JsonObject named = object("name", domain.getName());
        named.addProperty("uid", domain.getUid());
        return named;
    }

    /** Waits without a limit. */
    private static <T extends com.google.protobuf.Message> T result(Operation<T> operation) throws Exception {
        try {
            return operation.result().get();
        } catch (ExecutionException failure) {
            throw failure.getCause() instanceof Exception cause ? cause : failure;
        }
    }

    private JsonObject get(JsonObject request) {
        GetDomainRequest asked = GetDomainRequest.newBuilder().setName(text(request, "name")).build();
        var calls = client.domains();
        if (request.has("deadline_s")) {
            calls = calls.withDeadlineAfter(seconds(request, "deadline_s", 0).toNanos(), TimeUnit.NANOSECONDS);
        }
        Domain domain = calls.getDomain(asked);
        JsonObject answer = named(domain);
        answer.addProperty("etag", domain.getEtag());
        answer.addProperty("state", state(domain));
        answer.addProperty("display_name", domain.getDisplayName());
        return answer;
    }

    static String state(Domain domain) {
        return domain.getStatus().getState().name().replaceFirst("^DOMAIN_STATE_", "");
    }

    private JsonObject list(JsonObject request) {
        JsonArray missing = new JsonArray();
        List<String> names = new ArrayList<>();
        client.domains()
                .listDomains(ListDomainsRequest.newBuilder()
                        .setParent(text(request, "parent"))
                        .setPageSize((int) number(request, "page_size"))
                        .setView(ResourceView.RESOURCE_VIEW_BASIC)
                        .build())
                .tolerating((NodeFailure failure) -> missing.add(failure.getNode()))
                .forEach(domain -> names.add(domain.getName()));
        JsonObject answer = new JsonObject();
        answer.addProperty("count", names.size());
        answer.addProperty("distinct_count", new HashSet<>(names).size());
        answer.add("missing", missing);
        return answer;
    }

    private JsonObject update(JsonObject request) throws Exception {
        Domain wanted = Domain.newBuilder()
                .setName(text(request, "name"))
                .setDisplayName(text(request, "display_name"))
                .setEtag(text(request, "etag"))
                .build();
        return object("etag", result(client.domains().updateDomain(UpdateDomainRequest.newBuilder()
                .setDomain(wanted)
                .setUpdateMask(FieldMask.newBuilder().addPaths("display_name"))
                .build())).getEtag());
    }

    private JsonObject delete(JsonObject request) throws Exception {
        Operation<Empty> deletion = client.domains()
                .deleteDomain(DeleteDomainRequest.newBuilder().setName(text(request, "name")).setStop(true).build());
        result(deletion);
        return new JsonObject();
    }

    private JsonObject stop(JsonObject request) {
        return object("operation", client.domains().stopDomain(StopDomainRequest.newBuilder()
                .setName(text(request, "name"))
                .setMode(StopMode.STOP_MODE_GRACEFUL)
                .setGracePeriod(proto(seconds(request, "timeout_s", 30)))
                .setInlineWait(Durations.ZERO)
                .build()).name());
    }

    private JsonObject await(JsonObject request) throws Exception {
        Operation<Domain> operation = client.operation(text(request, "operation"), Domain.class);
        Domain domain = request.has("deadline_s")
                ? operation.await(seconds(request, "deadline_s", 0))
                : result(operation);
        return object("state", state(domain));
    }

    private JsonObject cancel(JsonObject request) {
        client.operation(text(request, "operation"), Domain.class).cancel();
        return new JsonObject();
    }

    // What goes on in the background.

    private JsonObject begin(JsonObject request, Part part) {
        parts.put(text(request, "as"), part);
        return new JsonObject();
    }

    private Part part(JsonObject request) {
        return parts.get(text(request, "as"));
    }

    private JsonObject held(JsonObject request, boolean holds) {
        part(request).hold().set(holds);
        return new JsonObject();
    }

    private JsonObject informer(JsonObject request) throws Exception {
        Informed informed = new Informed(client, request);
        begin(request, informed);
        return informed.synced(seconds(request, "deadline_s", 30));
    }

    private JsonObject console(JsonObject request) throws Exception {
        Terminal terminal = new Terminal(client, request);
        begin(request, terminal);
        return terminal.opened();
    }

    private JsonObject write(JsonObject request) {
        ((Terminal) part(request)).write(ByteString.copyFromUtf8(text(request, "text")));
        return new JsonObject();
    }

    private JsonObject upload(JsonObject request) throws Exception {
        JsonObject answer = new JsonObject();
        answer.addProperty("content_length", Upload.send(client, request).getVolume().getSpec().getCapacityBytes());
        return answer;
    }
}

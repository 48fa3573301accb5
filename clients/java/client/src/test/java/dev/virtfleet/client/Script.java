package dev.virtfleet.client;

import com.google.protobuf.Message;
import io.grpc.HandlerRegistry;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.Server;
import io.grpc.ServerCall;
import io.grpc.ServerCallHandler;
import io.grpc.ServerMethodDefinition;
import io.grpc.Status;
import io.grpc.inprocess.InProcessChannelBuilder;
import io.grpc.inprocess.InProcessServerBuilder;
import io.grpc.protobuf.StatusProto;
import java.io.IOException;
import java.util.List;
import java.util.Map;
import java.util.UUID;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.ConcurrentLinkedQueue;
import java.util.concurrent.CopyOnWriteArrayList;
import java.util.stream.Stream;

/** A server that answers what a test says, method by method and call by call, and keeps what it was asked. */
final class Script implements AutoCloseable {

    /** What one call is answered: messages, then a status; no status leaves the call open. */
    record Answer(List<Message> messages, com.google.rpc.Status status) {
        static Answer of(Message... messages) {
            return new Answer(List.of(messages), com.google.rpc.Status.getDefaultInstance());
        }

        static Answer failing(com.google.rpc.Status status, Message... messages) {
            return new Answer(List.of(messages), status);
        }

        static Answer failing(Status.Code code, Message... messages) {
            return failing(com.google.rpc.Status.newBuilder().setCode(code.value()).build(), messages);
        }

        static Answer open(Message... messages) {
            return new Answer(List.of(messages), null);
        }
    }

    private final Map<String, ConcurrentLinkedQueue<Answer>> answers = new ConcurrentHashMap<>();
    private final List<Message> asked = new CopyOnWriteArrayList<>();
    private final Server server;
    private final VirtfleetClient client;

    Script(MethodDescriptor<?, ?>... methods) throws IOException {
        Map<String, ServerMethodDefinition<?, ?>> known = new ConcurrentHashMap<>();
        for (MethodDescriptor<?, ?> method : methods) {
            answers.put(method.getFullMethodName(), new ConcurrentLinkedQueue<>());
            known.put(method.getFullMethodName(), definition(method));
        }
        String name = UUID.randomUUID().toString();
        server = InProcessServerBuilder.forName(name)
                .fallbackHandlerRegistry(new HandlerRegistry() {
                    @Override
                    public ServerMethodDefinition<?, ?> lookupMethod(String method, String authority) {
                        return known.get(method);
                    }
                })
                .build()
                .start();
        client = VirtfleetClient.over(InProcessChannelBuilder.forName(name));
    }

    VirtfleetClient client() {
        return client;
    }

    /** Adds the answers of the next calls of a method. */
    Script answering(MethodDescriptor<?, ?> method, Answer... next) {
        answers.get(method.getFullMethodName()).addAll(List.of(next));
        return this;
    }

    List<Message> asked() {
        return List.copyOf(asked);
    }

    Stream<String> fields(String name) {
        return asked.stream().map(message -> String.valueOf(message.getField(message.getDescriptorForType().findFieldByName(name))));
    }

    private <Q, A> ServerMethodDefinition<Q, A> definition(MethodDescriptor<Q, A> method) {
        ServerCallHandler<Q, A> handler = (call, headers) -> {
            call.request(1);
            return new ServerCall.Listener<Q>() {
                @Override
                public void onMessage(Q request) {
                    asked.add((Message) request);
                }

                @Override
                public void onHalfClose() {
                    Answer answer = answers.get(method.getFullMethodName()).poll();
                    if (answer == null) {
                        call.close(Status.UNIMPLEMENTED.withDescription("the script has ended"), new Metadata());
                        return;
                    }
                    call.sendHeaders(new Metadata());
                    for (Message message : answer.messages()) {
                        @SuppressWarnings("unchecked") // the test knows what the method answers
                        A typed = (A) message;
                        call.sendMessage(typed);
                    }
                    if (answer.status() != null) {
                        var closing = StatusProto.toStatusRuntimeException(answer.status());
                        call.close(closing.getStatus(), closing.getTrailers());
                    }
                }
            };
        };
        return ServerMethodDefinition.create(method, handler);
    }

    @Override
    public void close() {
        client.close();
        server.shutdownNow();
    }
}

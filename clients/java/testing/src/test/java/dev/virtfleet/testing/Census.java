package dev.virtfleet.testing;

import com.google.protobuf.Message;
import io.grpc.CallOptions;
import io.grpc.Channel;
import io.grpc.ClientCall;
import io.grpc.ClientInterceptor;
import io.grpc.ForwardingClientCall.SimpleForwardingClientCall;
import io.grpc.MethodDescriptor;
import java.util.concurrent.atomic.AtomicInteger;

/** Counts what a client sends, next to the wire: lists, watches from a snapshot and watches from a token. */
final class Census implements ClientInterceptor {

    private final AtomicInteger lists = new AtomicInteger();
    private final AtomicInteger fresh = new AtomicInteger();
    private final AtomicInteger resumed = new AtomicInteger();

    int lists() {
        return lists.get();
    }

    int fresh() {
        return fresh.get();
    }

    int resumed() {
        return resumed.get();
    }

    @Override
    public <Q, A> ClientCall<Q, A> interceptCall(MethodDescriptor<Q, A> method, CallOptions options, Channel next) {
        String name = String.valueOf(method.getBareMethodName());
        if (name.startsWith("List")) {
            lists.incrementAndGet();
        }
        return new SimpleForwardingClientCall<>(next.newCall(method, options)) {
            @Override
            public void sendMessage(Q message) {
                if (name.equals("WatchResources") && message instanceof Message request) {
                    Object token = request.getField(request.getDescriptorForType().findFieldByName("resume_token"));
                    (token.equals("") ? fresh : resumed).incrementAndGet();
                }
                super.sendMessage(message);
            }
        };
    }
}

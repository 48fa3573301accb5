package dev.virtfleet.client;

import io.grpc.CallOptions;
import io.grpc.Channel;
import io.grpc.ClientCall;
import io.grpc.ClientInterceptor;
import io.grpc.ForwardingClientCall.SimpleForwardingClientCall;
import io.grpc.ForwardingClientCallListener.SimpleForwardingClientCallListener;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.Status;

/** What is done to every call: mutations are identified, and what is safe to repeat is repeated. */
final class CallPolicy implements ClientInterceptor {

    private final Delays delays;

    CallPolicy(Delays delays) {
        this.delays = delays;
    }

    @Override
    public <Q, A> ClientCall<Q, A> interceptCall(MethodDescriptor<Q, A> method, CallOptions options, Channel next) {
        if (method.getType() == MethodDescriptor.MethodType.UNARY) {
            return new RepeatingCall<>(method, options, next, delays);
        }
        return new SimpleForwardingClientCall<>(next.newCall(method, options)) {
            private boolean begun;

            @Override
            public void start(Listener<A> listener, Metadata headers) {
                super.start(new SimpleForwardingClientCallListener<>(listener) {
                    @Override
                    public void onClose(Status status, Metadata trailers) {
                        super.onClose(LostConnection.named(status), trailers);
                    }
                }, headers);
            }

            @Override
            public void sendMessage(Q message) {
                super.sendMessage(begun ? message : Effects.prepare(method, message).message());
                begun = true;
            }
        };
    }
}

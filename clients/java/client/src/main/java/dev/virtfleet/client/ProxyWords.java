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

/**
 * Adds to errors of the connection what the helper process says of it (the words of ssh, say): gRPC sees a closed socket only. It stands
 * next to the wire, so that each attempt is explained.
 */
record ProxyWords(ProxyProcess proxy) implements ClientInterceptor {

    private static final Metadata.Key<byte[]> DETAILS =
            Metadata.Key.of("grpc-status-details-bin", Metadata.BINARY_BYTE_MARSHALLER);

    @Override
    public <Q, A> ClientCall<Q, A> interceptCall(MethodDescriptor<Q, A> method, CallOptions options, Channel next) {
        return new SimpleForwardingClientCall<>(next.newCall(method, options)) {
            @Override
            public void start(Listener<A> listener, Metadata headers) {
                super.start(new Explaining<>(listener), headers);
            }
        };
    }

    private Status explained(Status status, Metadata trailers) {
        String said = proxy.lastWords();
        // Netty adds a line about its insides.
        String known = String.valueOf(status.getDescription()).lines().findFirst().orElse("");
        boolean ofConnection =
                LostConnection.named(status).getCode() == Status.Code.UNAVAILABLE && !trailers.containsKey(DETAILS);
        return ofConnection && !said.isEmpty() && !known.contains(said) ? status.withDescription(known + ": " + said) : status;
    }

    private final class Explaining<A> extends SimpleForwardingClientCallListener<A> {

        Explaining(ClientCall.Listener<A> listener) {
            super(listener);
        }

        @Override
        public void onClose(Status status, Metadata trailers) {
            super.onClose(explained(status, trailers), trailers);
        }
    }
}

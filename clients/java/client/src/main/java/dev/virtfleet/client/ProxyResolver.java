package dev.virtfleet.client;

import io.grpc.EquivalentAddressGroup;
import io.grpc.NameResolver;
import io.grpc.NameResolverProvider;
import io.grpc.NameResolverRegistry;
import io.grpc.Status;
import io.grpc.StatusOr;
import java.io.IOException;
import java.net.SocketAddress;
import java.net.URI;
import java.net.UnixDomainSocketAddress;
import java.nio.file.Path;
import java.util.Collection;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.Executor;
import java.util.concurrent.atomic.AtomicLong;

/** Tells a channel where the socket of its helper process is, again after each lost connection: a new process has a new one. */
final class ProxyResolver extends NameResolver {

    private static final String SCHEME = "virtfleet-proxy";
    private static final Map<String, ProxyProcess> PROXIES = new ConcurrentHashMap<>();
    private static final AtomicLong COUNT = new AtomicLong();

    static {
        NameResolverRegistry.getDefaultRegistry().register(new Provider());
    }

    private final ProxyProcess proxy;
    private final Executor executor;
    private Listener2 listener;

    private ProxyResolver(ProxyProcess proxy, Executor executor) {
        this.proxy = proxy;
        this.executor = executor;
    }

    /** Returns the target of a channel through a helper process; {@link #forget} must follow. */
    static String target(ProxyProcess proxy) {
        String id = Long.toString(COUNT.incrementAndGet());
        PROXIES.put(id, proxy);
        return SCHEME + ":///" + id;
    }

    static void forget(String target) {
        PROXIES.remove(target.substring(target.lastIndexOf('/') + 1));
    }

    @Override
    public String getServiceAuthority() {
        return "localhost";
    }

    @Override
    public void start(Listener2 told) {
        listener = told;
        refresh();
    }

    @Override
    public void refresh() {
        executor.execute(() -> {
            try {
                Path socket = proxy.socket();
                SocketAddress address = UnixDomainSocketAddress.of(socket);
                listener.onResult(ResolutionResult.newBuilder()
                        .setAddressesOrError(StatusOr.fromValue(List.of(new EquivalentAddressGroup(address))))
                        .build());
            } catch (IOException failure) {
                listener.onError(Status.UNAVAILABLE.withDescription(failure.getMessage()).withCause(failure));
            }
        });
    }

    @Override
    public void shutdown() {
        // The process belongs to the client, which ends it.
    }

    private static final class Provider extends NameResolverProvider {

        private static final int PRIORITY = 5;

        @Override
        protected boolean isAvailable() {
            return true;
        }

        @Override
        protected int priority() {
            return PRIORITY;
        }

        @Override
        public String getDefaultScheme() {
            return SCHEME;
        }

        @Override
        public Collection<Class<? extends SocketAddress>> getProducedSocketAddressTypes() {
            return Set.of(UnixDomainSocketAddress.class);
        }

        @Override
        public NameResolver newNameResolver(URI target, Args args) {
            ProxyProcess proxy = target.getScheme().equals(SCHEME) ? PROXIES.get(target.getPath().substring(1)) : null;
            return proxy == null ? null : new ProxyResolver(proxy, args.getOffloadExecutor());
        }
    }
}

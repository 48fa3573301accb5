package dev.virtfleet.client;

import com.google.protobuf.Message;
import dev.virtfleet.common.v1.WhoAmIRequest;
import io.grpc.Channel;
import io.grpc.ClientInterceptor;
import io.grpc.ClientInterceptors;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.Status;
import io.grpc.netty.shaded.io.grpc.netty.GrpcSslContexts;
import io.grpc.netty.shaded.io.grpc.netty.NettyChannelBuilder;
import io.grpc.netty.shaded.io.netty.channel.EventLoopGroup;
import io.grpc.netty.shaded.io.netty.channel.MultiThreadIoEventLoopGroup;
import io.grpc.netty.shaded.io.netty.channel.nio.NioIoHandler;
import io.grpc.netty.shaded.io.netty.channel.socket.nio.NioDomainSocketChannel;
import io.grpc.netty.shaded.io.netty.handler.ssl.OpenSslSessionContext;
import io.grpc.netty.shaded.io.netty.handler.ssl.SslContext;
import io.grpc.netty.shaded.io.netty.util.concurrent.DefaultThreadFactory;
import java.io.IOException;
import java.net.UnixDomainSocketAddress;
import java.nio.file.Path;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.Map;
import java.util.Objects;
import java.util.Optional;
import java.util.concurrent.TimeUnit;
import javax.net.ssl.SSLException;

/**
 * A connection to a fleet's gateway, or to one service of a node, with the services of the API.
 *
 * <pre>{@code
 * try (VirtfleetClient client = VirtfleetClient.connect()) {
 *     for (Domain domain : client.domains().listDomains(ListDomainsRequest.newBuilder().setParent("nodes/-").build())) {
 *         System.out.println(domain.getName());
 *     }
 * }
 * }</pre>
 *
 * <p>Every call through it gets a request_id if it is a mutation, is repeated when it was lost where that cannot have a second effect,
 * and fails with a {@link VirtfleetException}. The connection is made at the first call, and again when it has been lost.
 *
 * <p>Threads may share it, and one client is enough for a program. No method takes or returns null.
 */
public final class VirtfleetClient extends Services implements AutoCloseable {

    private static final int MESSAGE_LIMIT_BYTES = 8 << 20; // answers stay below 3 MiB
    private static final Duration KEEPALIVE = Duration.ofSeconds(20);
    private static final Duration KEEPALIVE_TIMEOUT = Duration.ofSeconds(10);
    private static final Duration CLOSE_TIMEOUT = Duration.ofSeconds(5);

    private final Delays delays = new Delays();
    private final ManagedChannel connection;
    private final Channel channel;
    private final Runnable release;

    private VirtfleetClient(Transport transport, List<ClientInterceptor> interceptors) {
        release = transport.release();
        // Interceptors of the caller come next to the wire: they see each attempt, as it is sent.
        List<ClientInterceptor> nearest = new ArrayList<>(interceptors);
        Collections.reverse(nearest);
        connection = transport.builder()
                .userAgent("virtfleet-java")
                .maxInboundMessageSize(MESSAGE_LIMIT_BYTES)
                .keepAliveTime(KEEPALIVE.toSeconds(), TimeUnit.SECONDS)
                .keepAliveTimeout(KEEPALIVE_TIMEOUT.toSeconds(), TimeUnit.SECONDS)
                .disableServiceConfigLookUp()
                .intercept(nearest)
                .build();
        Reconnection.keep(connection, delays);
        channel = ClientInterceptors.intercept(connection, new CallPolicy(delays));
    }

    /**
     * Connects to the fleet of VIRTFLEET_ADDRESS (with VIRTFLEET_CA_FILE, VIRTFLEET_CERT_FILE and VIRTFLEET_KEY_FILE), else of the
     * context that VIRTFLEET_CONTEXT names, else of the current context of the context file.
     *
     * @return the client
     * @throws FleetNotFoundException there is no such fleet, or its files cannot be read
     */
    public static VirtfleetClient connect() {
        return builder().build();
    }

    /** Returns a client over a connection of any kind. */
    static VirtfleetClient over(ManagedChannelBuilder<?> builder) {
        return new VirtfleetClient(new Transport(builder, () -> {}), List.of());
    }

    /** {@return a builder, for a fleet that is not the one of the environment} */
    public static Builder builder() {
        return new Builder();
    }

    @Override
    VirtfleetClient client() {
        return this;
    }

    @Override
    public Channel channel() {
        return channel;
    }

    /**
     * Returns the connection for calls that name no resource, to one node or service of it: health, reflection.
     *
     * @param node {@code n1} or {@code n1/compute}
     * @return a channel for stubs of gRPC
     */
    public Channel channelTo(String node) {
        return ClientInterceptors.intercept(channel, NodeHeader.naming(Objects.requireNonNull(node, "node")));
    }

    /**
     * Finds an operation again, perhaps of an earlier life of the program. It makes no call.
     *
     * @param <T> the result
     * @param name as {@link Operation#name} gave it
     * @param result the class of the result
     * @return the operation
     */
    public <T extends Message> Operation<T> operation(String name, Class<T> result) {
        Objects.requireNonNull(result, "result");
        var named = com.google.longrunning.Operation.newBuilder().setName(name).build();
        return new Operation<>(this, named, result);
    }

    /**
     * Waits until the fleet has answered a call. It waits out lost connections; what no waiting mends, such as a permission that is
     * missing, ends it at once.
     *
     * @param limit how long at most
     * @throws VirtfleetException the fleet has not answered in that time, for this reason
     * @throws InterruptedException the thread was interrupted
     */
    public void awaitReady(Duration limit) throws InterruptedException {
        long end = System.nanoTime() + limit.toNanos();
        for (int attempt = 1; ; attempt++) {
            try {
                long left = Math.max(end - System.nanoTime(), 0);
                access().withDeadlineAfter(left, TimeUnit.NANOSECONDS).whoAmI(WhoAmIRequest.getDefaultInstance());
                return;
            } catch (VirtfleetException failure) {
                Duration pause = Pause.before(attempt, Duration.ZERO);
                if (Thread.interrupted()) {
                    throw new InterruptedException();
                }
                if (failure.code() != Status.Code.UNAVAILABLE || System.nanoTime() + pause.toNanos() >= end) {
                    throw failure;
                }
                TimeUnit.NANOSECONDS.sleep(pause.toNanos());
            }
        }
    }

    boolean isClosed() {
        return connection.isShutdown();
    }

    /** Has something done after a pause; at once if the client is closed. */
    void later(Duration pause, Runnable work) {
        delays.after(pause, work);
    }

    /** Ends all calls and the connection. Again, it does nothing. */
    @Override
    public void close() {
        connection.shutdownNow();
        delays.close();
        try {
            connection.awaitTermination(CLOSE_TIMEOUT.toNanos(), TimeUnit.NANOSECONDS);
        } catch (InterruptedException interrupted) {
            Thread.currentThread().interrupt();
        }
        release.run();
    }

    /** How the bytes of a connection go, and what is let go of with it. */
    record Transport(ManagedChannelBuilder<?> builder, Runnable release) {

        static Transport to(FleetContext where) {
            Endpoint endpoint = Endpoint.parse(where.address());
            if (endpoint instanceof Endpoint.Tls tls) {
                NettyChannelBuilder builder = NettyChannelBuilder.forTarget(tls.target());
                tls.serverName().ifPresent(builder::overrideAuthority);
                return new Transport(secured(builder, where), () -> {});
            }
            if (endpoint instanceof Endpoint.Unix unix) {
                EventLoopGroup group = group();
                var address = UnixDomainSocketAddress.of(unix.path());
                NettyChannelBuilder builder = local(NettyChannelBuilder.forAddress(address), group);
                return new Transport(builder.overrideAuthority("localhost").usePlaintext(), group::shutdownGracefully);
            }
            return through((Endpoint.Proxied) endpoint, where);
        }

        private static Transport through(Endpoint.Proxied proxied, FleetContext where) {
            ProxyProcess proxy = new ProxyProcess(proxied.address(), ProxyProcess.program());
            EventLoopGroup group = group();
            try {
                proxy.socket();
                String target = ProxyResolver.target(proxy);
                NettyChannelBuilder builder = local(NettyChannelBuilder.forTarget(target), group);
                if (proxied.serverName().isPresent()) {
                    secured(builder.overrideAuthority(proxied.serverName().get()), where);
                } else {
                    builder.usePlaintext();
                }
                builder.intercept(new ProxyWords(proxy));
                return new Transport(builder, () -> {
                    ProxyResolver.forget(target);
                    proxy.close();
                    group.shutdownGracefully();
                });
            } catch (IOException | FleetNotFoundException failure) {
                proxy.close();
                group.shutdownGracefully();
                throw failure instanceof FleetNotFoundException known
                        ? known
                        : new FleetNotFoundException(failure.getMessage(), failure);
            }
        }

        private static NettyChannelBuilder local(NettyChannelBuilder builder, EventLoopGroup group) {
            return builder.eventLoopGroup(group).channelType(NioDomainSocketChannel.class, UnixDomainSocketAddress.class);
        }

        private static EventLoopGroup group() {
            return new MultiThreadIoEventLoopGroup(
                    1, new DefaultThreadFactory("virtfleet-io", true), NioIoHandler.newFactory());
        }

        private static NettyChannelBuilder secured(NettyChannelBuilder builder, FleetContext where) {
            FileIdentity identity = new FileIdentity(where.credentials().orElseThrow(() -> new FleetNotFoundException(
                    "mutual TLS needs three files: of the authority, the certificate and its key (VIRTFLEET_CA_FILE, "
                            + "VIRTFLEET_CERT_FILE and VIRTFLEET_KEY_FILE, or ca_file, cert_file and key_file of the context)")));
            try {
                SslContext context = GrpcSslContexts.forClient()
                        .protocols("TLSv1.3")
                        .keyManager(identity.keys())
                        .trustManager(identity.trust())
                        .build();
                // A session that is resumed would be that of the certificate before.
                if (context.sessionContext() instanceof OpenSslSessionContext sessions) {
                    sessions.setSessionCacheEnabled(false);
                } else {
                    context.sessionContext().setSessionTimeout(1);
                }
                return builder.sslContext(context);
            } catch (SSLException failure) {
                throw new FleetNotFoundException(failure.getMessage(), failure);
            }
        }
    }

    /** Says which fleet a client is of. Not for several threads at once; {@link #build} may be called more than once. */
    public static final class Builder {

        private final List<ClientInterceptor> interceptors = new ArrayList<>();
        private Optional<String> address = Optional.empty();
        private Optional<String> context = Optional.empty();
        private Optional<Credentials> credentials = Optional.empty();

        private Builder() {}

        /**
         * Says where the fleet is, instead of the environment and the context file.
         *
         * @param uri {@code tls://HOST:PORT}, {@code HOST:PORT}, {@code unix:///PATH}, or what {@code virtfleet proxy} understands
         *     ({@code ssh://…}, {@code command:…})
         * @return this
         */
        public Builder address(String uri) {
            address = Optional.of(uri);
            return this;
        }

        /**
         * Names a context of the context file.
         *
         * @param name its name
         * @return this
         */
        public Builder context(String name) {
            context = Optional.of(name);
            return this;
        }

        /**
         * Names the files of mutual TLS, instead of those of the environment or of the context.
         *
         * @param files the files
         * @return this
         */
        public Builder credentials(Credentials files) {
            credentials = Optional.of(files);
            return this;
        }

        /**
         * Adds an interceptor, such as one of tracing. It sees every attempt of a call, as it is sent.
         *
         * @param interceptor the interceptor
         * @return this
         */
        public Builder intercept(ClientInterceptor interceptor) {
            interceptors.add(Objects.requireNonNull(interceptor, "interceptor"));
            return this;
        }

        /**
         * Makes the client. It does not wait for the fleet: see {@link VirtfleetClient#awaitReady}. For an address that needs the
         * helper process, it waits for that one to start.
         *
         * @return the client, which is to be closed
         * @throws FleetNotFoundException there is no such fleet, its address is wrong, or its files cannot be read
         */
        public VirtfleetClient build() {
            return new VirtfleetClient(Transport.to(find(System.getenv(), ContextFile.defaultPath())), interceptors);
        }

        FleetContext find(Map<String, String> environment, Path contexts) {
            FleetContext found = address.map(where -> new FleetContext(where, ofEnvironment(environment)))
                    .or(() -> context.map(name -> ContextFile.read(contexts).named(name, contexts)))
                    .or(() -> variable(environment, "VIRTFLEET_ADDRESS")
                            .map(where -> new FleetContext(where, ofEnvironment(environment))))
                    .or(() -> variable(environment, "VIRTFLEET_CONTEXT")
                            .map(name -> ContextFile.read(contexts).named(name, contexts)))
                    .orElseGet(() -> {
                        ContextFile file = ContextFile.read(contexts);
                        return file.named(file.current().orElseThrow(() -> new FleetNotFoundException("no fleet: set "
                                + "VIRTFLEET_ADDRESS, or name a context of " + contexts + " in VIRTFLEET_CONTEXT")), contexts);
                    });
            return credentials.isPresent() ? new FleetContext(found.address(), credentials) : found;
        }

        private static Optional<Credentials> ofEnvironment(Map<String, String> environment) {
            Optional<Path> authority = variable(environment, "VIRTFLEET_CA_FILE").map(Path::of);
            Optional<Path> certificate = variable(environment, "VIRTFLEET_CERT_FILE").map(Path::of);
            Optional<Path> key = variable(environment, "VIRTFLEET_KEY_FILE").map(Path::of);
            return authority.isPresent() && certificate.isPresent() && key.isPresent()
                    ? Optional.of(new Credentials(authority.get(), certificate.get(), key.get()))
                    : Optional.empty();
        }

        private static Optional<String> variable(Map<String, String> environment, String name) {
            return Optional.ofNullable(environment.get(name)).filter(value -> !value.isEmpty());
        }
    }
}

package dev.virtfleet.client;

import io.grpc.ClientInterceptor;
import io.grpc.Metadata;
import io.grpc.stub.MetadataUtils;

/** The header by which a call that names no resource finds its node. */
final class NodeHeader {

    private static final Metadata.Key<String> KEY = Metadata.Key.of("x-virtfleet-node", Metadata.ASCII_STRING_MARSHALLER);

    private NodeHeader() {}

    static ClientInterceptor naming(String node) {
        Metadata headers = new Metadata();
        headers.put(KEY, node);
        return MetadataUtils.newAttachHeadersInterceptor(headers);
    }
}

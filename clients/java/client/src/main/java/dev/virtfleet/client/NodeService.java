// Code generated from the protos by tools/java_services.py. DO NOT EDIT.

package dev.virtfleet.client;

import dev.virtfleet.fleet.v1.CordonNodeRequest;
import dev.virtfleet.fleet.v1.DeleteNodeRequest;
import dev.virtfleet.fleet.v1.GetNodeRequest;
import dev.virtfleet.fleet.v1.ListNodesRequest;
import dev.virtfleet.fleet.v1.ListNodesResponse;
import dev.virtfleet.fleet.v1.Node;
import dev.virtfleet.fleet.v1.NodeServiceGrpc;
import dev.virtfleet.fleet.v1.UncordonNodeRequest;
import dev.virtfleet.fleet.v1.UpdateNodeRequest;
import io.grpc.CallOptions;
import io.grpc.Channel;

/**
 * Calls {@code virtfleet.fleet.v1.NodeService}. Shows and steers the nodes of a fleet. Served by gateways only. A node
 * comes into being by EnrollNode. Threads may share it. What narrows a call ({@code withDeadlineAfter} and so on)
 * returns a copy. No argument and no result is null.
 */
public final class NodeService extends FleetService<NodeService> {

    NodeService(VirtfleetClient client, Channel channel, CallOptions options) {
        super(client, channel, options);
    }

    @Override
    protected NodeService build(Channel channel, CallOptions options) {
        return new NodeService(client(), channel, options);
    }

    /** {@return the generated stub whose calls return futures} */
    public NodeServiceGrpc.NodeServiceFutureStub futureStub() {
        return NodeServiceGrpc.newFutureStub(getChannel());
    }

    /** {@return the generated stub whose calls are told to observers: for streams of requests} */
    public NodeServiceGrpc.NodeServiceStub asyncStub() {
        return NodeServiceGrpc.newStub(getChannel());
    }

    /**
     * Lists nodes in the order of their names. Never waits for a node: {@code status} is what the gateway knows now.
     *
     * <p>INVALID_ARGUMENT FILTER_SYNTAX, PAGE_TOKEN_INVALID.
     *
     * @param request what is asked for; it stays as it is
     * @return every item, page by page as they are read
     */
    public Pages<Node> listNodes(ListNodesRequest request) {
        return pages(NodeServiceGrpc.getListNodesMethod(), request, ListNodesResponse::getNodesList, false);
    }

    /**
     * Asks for one page. Lists nodes in the order of their names. Never waits for a node: {@code status} is what the
     * gateway knows now.
     *
     * <p>INVALID_ARGUMENT FILTER_SYNTAX, PAGE_TOKEN_INVALID.
     *
     * @param request what is asked for; it stays as it is
     * @return the page
     * @throws VirtfleetException the call failed
     */
    public ListNodesResponse listNodesPage(ListNodesRequest request) {
        return call(NodeServiceGrpc.getListNodesMethod(), request);
    }

    /**
     * Gets a node with the state of its services and of the gateway's channels to them. Never waits for the node. The
     * last segment of the name may be the uid. NOT_FOUND NODE_UNKNOWN.
     *
     * @param request what is asked for; it stays as it is
     * @return the answer
     * @throws VirtfleetException the call failed
     */
    public Node getNode(GetNodeRequest request) {
        return call(NodeServiceGrpc.getGetNodeMethod(), request);
    }

    /**
     * Changes labels, annotations, display name and spec of a node. Repeating it changes nothing more.
     *
     * <p>NOT_FOUND NODE_UNKNOWN · ABORTED ETAG_MISMATCH · FAILED_PRECONDITION UID_MISMATCH · INVALID_ARGUMENT
     * MASK_PATH_UNKNOWN.
     *
     * @param request what is asked for; it stays as it is
     * @return the answer
     * @throws VirtfleetException the call failed
     */
    public Node updateNode(UpdateNodeRequest request) {
        return call(NodeServiceGrpc.getUpdateNodeMethod(), request);
    }

    /**
     * Makes the gateway refuse new domains on a node (FAILED_PRECONDITION NODE_CORDONED), by UpdateDomain with {@code
     * allow_missing} too; what is there is left alone. Succeeds if the node is cordoned already. NOT_FOUND NODE_UNKNOWN
     * · ABORTED ETAG_MISMATCH.
     *
     * @param request what is asked for; it stays as it is
     * @return the answer
     * @throws VirtfleetException the call failed
     */
    public Node cordonNode(CordonNodeRequest request) {
        return call(NodeServiceGrpc.getCordonNodeMethod(), request);
    }

    /**
     * Lets a node take new domains again. Succeeds if it does already. NOT_FOUND NODE_UNKNOWN · ABORTED ETAG_MISMATCH.
     *
     * @param request what is asked for; it stays as it is
     * @return the answer
     * @throws VirtfleetException the call failed
     */
    public Node uncordonNode(UncordonNodeRequest request) {
        return call(NodeServiceGrpc.getUncordonNodeMethod(), request);
    }

    /**
     * Removes a node from the fleet: its certificates go on the denial list, its channels are closed, watchers are told
     * LOST. Its guests run on, and its local sockets go on answering. The operation's response is the node as it was
     * last.
     *
     * <p>NOT_FOUND NODE_UNKNOWN, unless {@code allow_missing} · ABORTED ETAG_MISMATCH · FAILED_PRECONDITION
     * UID_MISMATCH.
     *
     * @param request what is asked for; it stays as it is
     * @return the work that has been started
     * @throws VirtfleetException the call failed
     */
    public Operation<Node> deleteNode(DeleteNodeRequest request) {
        return start(NodeServiceGrpc.getDeleteNodeMethod(), request, Node.class);
    }
}

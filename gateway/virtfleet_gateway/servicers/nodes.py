"""The gRPC edge of the registry: `virtfleet.fleet.v1.NodeService`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from virtfleet.fleet.v1 import node_pb2, watch_pb2
from virtfleet.type.v1 import resource_pb2
from virtfleet_gateway.nodes import KIND
from virtfleet_gateway.source import set_time
from virtfleet_service import masks, paging, requests, resources
from virtfleet_service.errors import NodeUnknown, NodeUnreachable, ResourceNotFound
from virtfleet_service.operations import plan

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from google.longrunning import operations_pb2

    from virtfleet_gateway.nodes import Registry
    from virtfleet_service.call import Call
    from virtfleet_service.operations import Commit, Job, Operations
    from virtfleet_service.store import Store
    from virtfleet_service.transaction import Transaction

_SERVICE: Final = "virtfleet.fleet.v1.NodeService."


class NodeServicer:
    """Serves `virtfleet.fleet.v1.NodeService`.

    Args:
        store: The gateway's store.
        registry: The nodes.
        operations: The gateway's operations.
        expel: Puts the certificates of a node on the denial list, for a principal.
    """

    def __init__(
        self,
        store: Store,
        registry: Registry,
        operations: Operations,
        expel: Callable[[str, str], Awaitable[None]],
    ) -> None:
        self._store = store
        self._registry = registry
        self._operations = operations
        self._expel = expel

    async def list_nodes(self, request: node_pb2.ListNodesRequest, call: Call) -> node_pb2.ListNodesResponse:
        """List nodes."""
        page = paging.read_page(self._store, KIND, "", request, call=call)
        answer = node_pb2.ListNodesResponse(next_page_token=page.next_page_token, resume_token=page.resume_token)
        for item in page.items:
            node = node_pb2.Node.FromString(item if isinstance(item, bytes) else item.SerializeToString())
            answer.nodes.append(self._registry.describe(node))
        listed = {node.name: node for node in answer.nodes}
        for name in self._registry.unreachable():
            found = listed.get(f"nodes/{name}")
            if found is not None:
                answer.unreachable.append(_failure(found))
        return answer

    async def get_node(self, request: node_pb2.GetNodeRequest, call: Call) -> node_pb2.Node:
        """Get a node."""
        try:
            row = self._store.find(KIND, request.name)
        except ResourceNotFound as error:
            raise _unknown(request.name) from error
        call.authorize(row.name)
        node = self._registry.describe(node_pb2.Node.FromString(row.body))
        if request.view == resource_pb2.RESOURCE_VIEW_BASIC:
            node.ClearField("spec")
        return node

    async def update_node(self, request: node_pb2.UpdateNodeRequest, call: Call) -> node_pb2.Node:
        """Change labels, annotations, display name and spec of a node."""

        def change(node: node_pb2.Node) -> bool:
            resources.check_preconditions(node, etag=request.node.etag, expected_uid=request.node.uid)
            return bool(masks.apply_update(node, request.node, request.update_mask))

        return await self._change(call, request, request.node.name, change, "UpdateNode")

    async def cordon_node(self, request: node_pb2.CordonNodeRequest, call: Call) -> node_pb2.Node:
        """Make a node take no new domains."""
        return await self._set_schedulable(call, request, "CordonNode", schedulable=False)

    async def uncordon_node(self, request: node_pb2.UncordonNodeRequest, call: Call) -> node_pb2.Node:
        """Let a node take new domains again."""
        return await self._set_schedulable(call, request, "UncordonNode", schedulable=True)

    async def delete_node(self, request: node_pb2.DeleteNodeRequest, call: Call) -> operations_pb2.Operation:
        """Remove a node from the fleet."""
        repeated = await self._operations.repeated(call, request)
        if repeated is not None:
            return repeated
        if request.validate_only:
            row = self._store.get(request.name)
            if row is None and request.allow_missing:
                return plan(node_pb2.Node(name=request.name))
            node = node_pb2.Node.FromString(_found(row.body if row is not None else None, request.name))
            resources.check_preconditions(node, etag=request.etag, expected_uid=request.expected_uid)
            return plan(self._registry.describe(node))

        missing = False

        def intent(tx: Transaction) -> str:
            nonlocal missing
            missing = request.allow_missing and tx.get(request.name) is None
            if missing:
                return ""
            stored = node_pb2.Node.FromString(_body(tx, request.name))
            resources.check_preconditions(stored, etag=request.etag, expected_uid=request.expected_uid)
            return stored.uid

        async def work(job: Job) -> Commit:
            if missing:
                return lambda _tx: node_pb2.Node(name=request.name)
            return await self._remove(job, request.name, call.caller.subject)

        return await self._operations.run(
            call, request, target=request.name, intent=intent, work=work, cancellable=False
        )

    async def _remove(self, job: Job, name: str, principal: str) -> Callable[[Transaction], node_pb2.Node]:
        job.progress(phase="denying certificates")
        await self._expel(name.removeprefix("nodes/"), principal)
        return lambda tx: remove(tx, name)

    async def _set_schedulable(
        self,
        call: Call,
        request: node_pb2.CordonNodeRequest | node_pb2.UncordonNodeRequest,
        method: str,
        *,
        schedulable: bool,
    ) -> node_pb2.Node:
        def change(node: node_pb2.Node) -> bool:
            resources.check_preconditions(node, etag=request.etag, expected_uid=request.expected_uid)
            before = node.spec.schedulable if node.spec.HasField("schedulable") else True
            node.spec.schedulable = schedulable
            return before != schedulable

        return await self._change(call, request, request.name, change, method)

    async def _change(
        self,
        call: Call,
        request: node_pb2.UpdateNodeRequest | node_pb2.CordonNodeRequest | node_pb2.UncordonNodeRequest,
        name: str,
        change: Callable[[node_pb2.Node], bool],
        method: str,
    ) -> node_pb2.Node:
        """Change a stored node in one transaction; answers with the node as it is afterwards."""
        if request.validate_only:
            row = self._store.get(name)
            node = node_pb2.Node.FromString(_found(row.body if row is not None else None, name))
            if change(node):
                resources.touch(node)
            return self._registry.describe(node)

        def work(tx: Transaction) -> node_pb2.Node:
            node = node_pb2.Node.FromString(_body(tx, name))
            if change(node):
                resources.touch(node)
                node.status.observed_generation = node.generation
                tx.put(KIND, node, cause=_SERVICE + method)
            return node

        return self._registry.describe(await requests.once(self._store, call, request, work))


def remove(tx: Transaction, name: str) -> node_pb2.Node:
    """Remove a node from the store; returns it as it was last. Succeeds if it is gone."""
    row = tx.get(name)
    if row is None:
        return node_pb2.Node(name=name)
    node = node_pb2.Node.FromString(row.body)
    tx.delete(name, cause=f"{_SERVICE}DeleteNode")
    tx.event(
        watch_pb2.Event(
            resource=name,
            uid=node.uid,
            type=watch_pb2.EVENT_TYPE_NODE_REMOVED,
            reason="REMOVED",
            message=f"{name} has been removed from the fleet",
        )
    )
    return node


def _unknown(name: str) -> NodeUnknown:
    return NodeUnknown(f"The fleet has no node {name.removeprefix('nodes/')}", resource=name, node=name)


def _found(body: bytes | None, name: str) -> bytes:
    if body is None:
        raise _unknown(name)
    return body


def _body(tx: Transaction, name: str) -> bytes:
    row = tx.get(name)
    return _found(row.body if row is not None and row.kind == KIND else None, name)


def _failure(node: node_pb2.Node) -> resource_pb2.NodeFailure:
    error = NodeUnreachable(
        node.status.message or "The node is not heard", retry_delay_seconds=1.0, node=node.name, state=node.status.state
    )
    failure = resource_pb2.NodeFailure(node=node.name, status=error.to_status())
    if node.status.HasField("last_seen_time"):
        failure.last_seen_time.CopyFrom(node.status.last_seen_time)
        set_time(failure.observe_time, node.status.last_seen_time.ToNanoseconds() / 1e9)
    return failure

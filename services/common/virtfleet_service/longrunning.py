"""The standard service of operations, over what `operations` keeps."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Final

from google.longrunning import operations_pb2
from google.protobuf import empty_pb2

from virtfleet.type.v1 import operation_pb2
from virtfleet_service import errors, filters, paging, tokens
from virtfleet_service.transaction import Transaction

if TYPE_CHECKING:
    from virtfleet_service.call import Call
    from virtfleet_service.operations import Operations

WAIT_LIMIT_SECONDS: Final = 300.0
SHARE_OF_DEADLINE: Final = 0.9


class OperationsService:
    """Serves `google.longrunning.Operations`.

    Whoever may use the method on the target of an operation may use it on the operation.
    """

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    async def get_operation(self, request: operations_pb2.GetOperationRequest, call: Call) -> operations_pb2.Operation:
        """Get an operation as it is now.

        Raises:
            ResourceNotFound: There is none of that name.
        """
        return self._authorized(request.name, call)

    async def wait_operation(
        self, request: operations_pb2.WaitOperationRequest, call: Call
    ) -> operations_pb2.Operation:
        """Wait until an operation is done or the time is over, and get it as it is then.

        Raises:
            ResourceNotFound: There is none of that name.
        """
        self._authorized(request.name, call)
        seconds = request.timeout.ToNanoseconds() / 1e9 if request.HasField("timeout") else WAIT_LIMIT_SECONDS
        remaining = call.remaining()
        if remaining is not None:
            seconds = min(seconds, remaining * SHARE_OF_DEADLINE)
        return await self._operations.wait(request.name, min(max(seconds, 0.0), WAIT_LIMIT_SECONDS))

    async def cancel_operation(self, request: operations_pb2.CancelOperationRequest, call: Call) -> empty_pb2.Empty:
        """Ask an operation to stop; succeeds if it is done already.

        Raises:
            ResourceNotFound: There is none of that name.
            NotCancellable: It cannot be cancelled now.
        """
        self._authorized(request.name, call)
        self._operations.cancel(request.name)
        return empty_pb2.Empty()

    async def delete_operation(self, request: operations_pb2.DeleteOperationRequest, call: Call) -> empty_pb2.Empty:
        """Forget an operation that is done.

        Raises:
            ResourceNotFound: There is none of that name.
            WrongState: It runs.
        """
        self._authorized(request.name, call)
        name = request.name

        def delete(tx: Transaction) -> None:
            found = tx.connection.execute("SELECT done FROM operations WHERE id = ?", (name,)).fetchone()
            if found is None:
                raise errors.ResourceNotFound(f"{name} does not exist", resource=name, name=name)
            if not found[0]:
                raise errors.WrongState(f"{name} runs: cancel it or wait for it", resource=name, state="RUNNING")
            tx.connection.execute("DELETE FROM operations WHERE id = ?", (name,))

        await self._operations.store.write(delete)
        return empty_pb2.Empty()

    async def list_operations(
        self, request: operations_pb2.ListOperationsRequest, call: Call
    ) -> operations_pb2.ListOperationsResponse:
        """List operations, oldest first. Filter terms are `done` and the fields of `OperationMetadata`.

        Raises:
            PageTokenInvalid: The token is of another list.
            FilterSyntax: The filter does not parse.
            NameMalformed: The name is not that of this service.
        """
        operations = self._operations
        owner = operations.owner
        if request.name.rstrip("/") not in ("", owner, operations.prefix.rstrip("/")):
            raise errors.NameMalformed(
                f"the operations of this service are those of {owner or 'the gateway'}", field="name", name=request.name
            )
        size = paging.page_size_of(request)
        matches = (
            filters.compile_roots(
                request.filter, (operations_pb2.Operation.DESCRIPTOR, operation_pb2.OperationMetadata.DESCRIPTOR)
            )
            if request.filter
            else None
        )
        store = operations.store
        binding = tokens.binding_of("operations", request.filter)
        after = tokens.unseal(store.token_key, binding, request.page_token).decode() if request.page_token else ""
        response = operations_pb2.ListOperationsResponse()
        used, last = 0, after
        with closing(
            store.reader.execute("SELECT id, target, body FROM operations WHERE id > ? ORDER BY id", (after,))
        ) as rows:
            for name, target, body in rows:
                if len(response.operations) == size or used + len(body) > paging.PAGE_LIMIT_BYTES > used > 0:
                    response.next_page_token = tokens.seal(store.token_key, binding, last.encode())
                    break
                last = name
                if not call.sees_all and not call.may_see(target):
                    continue
                operation = operations.shown(name, body)
                if matches is not None and not matches((operation, metadata_of(operation))):
                    continue
                used += len(body)
                response.operations.append(operation)
        return response

    def _authorized(self, name: str, call: Call) -> operations_pb2.Operation:
        if not name:
            # The answer of a plan has none.
            raise errors.FieldRequired("`name` is required: what was only planned has no operation", field="name")
        operation = self._operations.get(name)
        call.authorize(metadata_of(operation).target or name)
        return operation


def metadata_of(operation: operations_pb2.Operation) -> operation_pb2.OperationMetadata:
    """Return the metadata of an operation."""
    metadata = operation_pb2.OperationMetadata()
    operation.metadata.Unpack(metadata)
    return metadata


def longrunning_service(operations: Operations) -> OperationsService:
    """Make the handlers of `google.longrunning.Operations`."""
    return OperationsService(operations)

"""`virtfleet.storage.v1.PoolService`."""

from __future__ import annotations

from google.longrunning import operations_pb2

from virtfleet.storage.v1 import pool_pb2
from virtfleet_service.call import Call
from virtfleet_service.views import apply_view
from virtfleet_storage.kinds import Kinds
from virtfleet_storage.lists import Lists
from virtfleet_storage.pools import Pools


class PoolServicer:
    """Serves pools."""

    def __init__(self, pools: Pools, lists: Lists, kinds: Kinds) -> None:
        self._pools = pools
        self._lists = lists
        self._kinds = kinds

    async def list_pools(self, request: pool_pb2.ListPoolsRequest, call: Call) -> bytes:
        """List pools."""
        return self._lists.pools(request, call)

    async def get_pool(self, request: pool_pb2.GetPoolRequest, call: Call) -> pool_pb2.Pool:
        """Get a pool."""
        pool = self._pools.find(request.name)
        call.authorize(pool.name)
        return apply_view(pool, request.view)

    async def create_pool(self, request: pool_pb2.CreatePoolRequest, call: Call) -> operations_pb2.Operation:
        """Define a pool."""
        return await self._pools.create(request, call)

    async def update_pool(self, request: pool_pb2.UpdatePoolRequest, call: Call) -> operations_pb2.Operation:
        """Change a pool."""
        return await self._pools.update(request, call)

    async def delete_pool(self, request: pool_pb2.DeletePoolRequest, call: Call) -> operations_pb2.Operation:
        """Forget a pool."""
        return await self._pools.delete(request, call)

    async def start_pool(self, request: pool_pb2.StartPoolRequest, call: Call) -> operations_pb2.Operation:
        """Start a pool."""
        return await self._pools.start(request, call)

    async def stop_pool(self, request: pool_pb2.StopPoolRequest, call: Call) -> operations_pb2.Operation:
        """Stop a pool."""
        return await self._pools.stop(request, call)

    async def refresh_pool(self, request: pool_pb2.RefreshPoolRequest, call: Call) -> operations_pb2.Operation:
        """Look at a pool again."""
        return await self._pools.refresh(request, call)

    async def list_pool_backends(
        self, request: pool_pb2.ListPoolBackendsRequest, call: Call
    ) -> pool_pb2.ListPoolBackendsResponse:
        """List the kinds of pools."""
        return await self._kinds.list(request, call)

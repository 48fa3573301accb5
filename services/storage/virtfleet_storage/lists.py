"""Answers lists and batches out of the store."""

from __future__ import annotations

from google.rpc import status_pb2

from virtfleet.storage.v1 import pool_pb2, volume_pb2
from virtfleet_service.call import Call
from virtfleet_service.errors import NotFound
from virtfleet_service.paging import list_reply
from virtfleet_service.store import Store
from virtfleet_service.views import apply_view
from virtfleet_storage import catalog

REPLY_LIMIT_BYTES = 3 << 20


class Lists:
    """Reads pools and volumes."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def pools(self, request: pool_pb2.ListPoolsRequest, call: Call) -> bytes:
        """Return a page of pools, serialised."""
        return list_reply(self._store, catalog.POOL, request, pool_pb2.ListPoolsResponse, call=call)

    def volumes(self, request: volume_pb2.ListVolumesRequest, call: Call) -> bytes:
        """Return a page of volumes, serialised.

        Raises:
            ResourceNotFound: There is no such pool.
        """
        if not request.parent.endswith("/-"):
            catalog.need_pool(self._store, request.parent)
        return list_reply(self._store, catalog.VOLUME, request, volume_pb2.ListVolumesResponse, call=call)

    def batch(self, request: volume_pb2.BatchGetVolumesRequest) -> volume_pb2.BatchGetVolumesResponse:
        """Return many volumes, each with a status of its own."""
        answer = volume_pb2.BatchGetVolumesResponse()
        used = 0
        for name in request.names:
            result = volume_pb2.BatchGetVolumesResult(name=name, status=status_pb2.Status())
            full = name if name.startswith("nodes/") else f"{request.parent.split('/pools/')[0]}/{name}"
            try:
                volume = volume_pb2.Volume.FromString(self._store.find(catalog.VOLUME, full).body)
                result.volume.CopyFrom(apply_view(volume, request.view))
            except NotFound as error:
                result.status.CopyFrom(error.to_status())
            used += result.ByteSize()
            if used > REPLY_LIMIT_BYTES:
                break
            answer.results.append(result)
        return answer

"""Answers lists and batches out of the store."""

from __future__ import annotations

from virtfleet.storage.v1 import pool_pb2, volume_pb2
from virtfleet_service.call import Call
from virtfleet_service.errors import FieldConflict, VirtfleetError
from virtfleet_service.paging import list_reply
from virtfleet_service.store import Store
from virtfleet_service.views import apply_view
from virtfleet_storage import catalog


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

    def batch(self, request: volume_pb2.BatchGetVolumesRequest, call: Call) -> volume_pb2.BatchGetVolumesResponse:
        """Return many volumes, each with a status of its own.

        Raises:
            FieldConflict: One is of another pool than the parent says.
        """
        pool = "" if request.parent.endswith("/-") else f"{request.parent}/volumes/"
        answer = volume_pb2.BatchGetVolumesResponse()
        for index, name in enumerate(request.names):
            if not name.startswith(pool):
                raise FieldConflict(
                    f"{name} is not of {request.parent}", field=f"names[{index}]", name=name, parent=request.parent
                )
            result = answer.results.add(name=name)
            result.status.SetInParent()
            try:
                row = self._store.find(catalog.VOLUME, name)
                call.authorize(row.name)
                result.volume.CopyFrom(apply_view(volume_pb2.Volume.FromString(row.body), request.view))
            except VirtfleetError as error:
                # Told by its place in the request, as the gateway tells it.
                result.status.CopyFrom(error.rebased(lambda _, index=index: f"names[{index}]").to_status())  # type: ignore[misc]  # the round's own
        return answer

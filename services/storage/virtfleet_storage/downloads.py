"""Sends the bytes of volumes."""

from __future__ import annotations

from collections.abc import AsyncIterator

import google_crc32c

from virtfleet.storage.v1 import volume_pb2
from virtfleet_service import resources
from virtfleet_service.store import Store
from virtfleet_storage import catalog
from virtfleet_storage.backends.api import downloading
from virtfleet_storage.places import Places


class Downloads:
    """Sends volumes."""

    def __init__(self, store: Store, places: Places) -> None:
        self._store = store
        self._places = places

    async def download(
        self, request: volume_pb2.DownloadVolumeRequest
    ) -> AsyncIterator[volume_pb2.DownloadVolumeResponse]:
        """Send a range of a volume's file: what is to come, then its pieces.

        Raises:
            RangeBeyondEnd: It begins behind the end.
        """
        volume = catalog.need_volume(self._store, request.name)
        resources.check_preconditions(volume, request.etag, request.expected_uid)
        place = self._places.need(catalog.pool_of(volume.name))
        reading = downloading(place.open).read(catalog.key_of(volume), request.offset_bytes, request.length_bytes)
        async with reading as download:
            yield volume_pb2.DownloadVolumeResponse(
                start=volume_pb2.DownloadStart(
                    offset_bytes=download.offset,
                    length_bytes=download.length,
                    physical_bytes=download.physical_bytes,
                    etag=volume.etag,
                    format=volume.spec.format,
                    digest=volume.status.digest,
                )
            )
            async for piece in download.pieces:
                answer = volume_pb2.DownloadVolumeResponse()
                answer.chunk.offset = piece.offset
                if piece.data is None:
                    answer.chunk.hole_length = piece.length
                else:
                    answer.chunk.data = piece.data
                    answer.chunk.crc32c = int(google_crc32c.value(piece.data))
                yield answer

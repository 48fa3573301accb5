"""`virtfleet.storage.v1.VolumeService`."""

from __future__ import annotations

from collections.abc import AsyncIterator

from google.longrunning import operations_pb2

from virtfleet.storage.v1 import volume_pb2
from virtfleet_service.call import Call
from virtfleet_service.errors import ResourceNotFound
from virtfleet_service.views import apply_view
from virtfleet_storage.downloads import Downloads
from virtfleet_storage.lists import Lists
from virtfleet_storage.uploads import Uploads
from virtfleet_storage.volumes import Volumes


class VolumeServicer:
    """Serves volumes."""

    def __init__(self, volumes: Volumes, uploads: Uploads, downloads: Downloads, lists: Lists) -> None:
        self._volumes = volumes
        self._uploads = uploads
        self._downloads = downloads
        self._lists = lists

    async def list_volumes(self, request: volume_pb2.ListVolumesRequest, call: Call) -> bytes:
        """List volumes."""
        return self._lists.volumes(request, call)

    async def get_volume(self, request: volume_pb2.GetVolumeRequest, call: Call) -> volume_pb2.Volume:
        """Get a volume."""
        volume = self._volumes.find(request.name)
        call.authorize(volume.name)
        return apply_view(volume, request.view)

    async def batch_get_volumes(
        self, request: volume_pb2.BatchGetVolumesRequest, call: Call
    ) -> volume_pb2.BatchGetVolumesResponse:
        """Get many volumes."""
        return self._lists.batch(request, call)

    async def lookup_volume(self, request: volume_pb2.LookupVolumeRequest, call: Call) -> volume_pb2.Volume:
        """Find the volume of a path or key."""
        volume = self._volumes.lookup(request)
        if volume is None or not call.may_see(volume.name):
            which = request.path or request.key
            raise ResourceNotFound(f"no volume has {which!r}", resource=which, name=which)
        return apply_view(volume, request.view)

    async def create_volume(self, request: volume_pb2.CreateVolumeRequest, call: Call) -> operations_pb2.Operation:
        """Make a volume."""
        return await self._volumes.create(request, call)

    async def delete_volume(self, request: volume_pb2.DeleteVolumeRequest, call: Call) -> operations_pb2.Operation:
        """Delete a volume."""
        return await self._volumes.delete(request, call)

    async def resize_volume(self, request: volume_pb2.ResizeVolumeRequest, call: Call) -> operations_pb2.Operation:
        """Change the size of a volume."""
        return await self._volumes.resize(request, call)

    async def wipe_volume(self, request: volume_pb2.WipeVolumeRequest, call: Call) -> operations_pb2.Operation:
        """Overwrite a volume."""
        return await self._volumes.wipe(request, call)

    async def upload_volume(
        self, requests: AsyncIterator[volume_pb2.UploadVolumeRequest], call: Call
    ) -> volume_pb2.UploadVolumeResponse:
        """Replace the content of a volume."""
        return await self._uploads.upload(requests, call)

    def download_volume(
        self, request: volume_pb2.DownloadVolumeRequest, _call: Call
    ) -> AsyncIterator[volume_pb2.DownloadVolumeResponse]:
        """Send the bytes of a volume."""
        return self._downloads.download(request)

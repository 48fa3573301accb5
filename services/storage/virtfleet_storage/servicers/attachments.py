"""`virtfleet.node.v1.AttachmentService`, on the peer socket only."""

from __future__ import annotations

from virtfleet.node.v1 import attachment_pb2
from virtfleet_service.call import Call
from virtfleet_storage.attachments import Attachments


class AttachmentServicer:
    """Serves attachments."""

    def __init__(self, attachments: Attachments) -> None:
        self._attachments = attachments

    async def attach_volume(
        self, request: attachment_pb2.AttachVolumeRequest, call: Call
    ) -> attachment_pb2.AttachVolumeResponse:
        """Make a volume ready for a device of a domain."""
        return await self._attachments.attach(request, call)

    async def release_volume(
        self, request: attachment_pb2.ReleaseVolumeRequest, _call: Call
    ) -> attachment_pb2.ReleaseVolumeResponse:
        """End an attachment."""
        return await self._attachments.release(request)

    async def list_attachments(
        self, _request: attachment_pb2.ListAttachmentsRequest, _call: Call
    ) -> attachment_pb2.ListAttachmentsResponse:
        """List all attachments."""
        return self._attachments.list()

"""A server with its own authority in a temporary folder, and callers with certificates of every kind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from tests.pki import Issued, Pki
from virtfleet.compute.v1 import domain_pb2
from virtfleet.node.v1 import attachment_pb2
from virtfleet.storage.v1 import volume_pb2
from virtfleet_service.call import Call
from virtfleet_service.server import Server
from virtfleet_service.settings import ServiceSettings, TlsSettings

DOMAINS = domain_pb2.DESCRIPTOR.services_by_name["DomainService"]
VOLUMES = volume_pb2.DESCRIPTOR.services_by_name["VolumeService"]
ATTACHMENTS = attachment_pb2.DESCRIPTOR.services_by_name["AttachmentService"]


class Domains:
    """Answers with what it was asked, and remembers the calls."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.started = asyncio.Event()
        self.ended: list[str] = []
        self.act: Callable[[Any, Call], Awaitable[Any]] | None = None

    async def get_domain(self, request: domain_pb2.GetDomainRequest, call: Call) -> Message | bytes:
        self.calls.append(call)
        if self.act is not None:
            answer: Message | bytes = await self.act(request, call)
            return answer
        return domain_pb2.Domain(name=request.name).SerializeToString()

    async def list_domains(self, request: domain_pb2.ListDomainsRequest, call: Call) -> Message:
        names = [f"{request.parent}/domains/{name}" for name in ("a-1", "a-2", "b-1")]
        return domain_pb2.ListDomainsResponse(
            domains=[domain_pb2.Domain(name=name) for name in names if call.may_see(name)]
        )

    async def create_domain(self, request: domain_pb2.CreateDomainRequest, call: Call) -> Message:
        self.calls.append(call)
        from google.longrunning import operations_pb2

        return operations_pb2.Operation(name=f"{request.parent}/services/compute/operations/1", done=True)

    batch_start_domains = create_domain
    batch_create_domains = create_domain
    update_domain = create_domain
    start_domain = create_domain


class Volumes:
    """Streams in both directions."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.go_on = asyncio.Event()
        self.ended: list[str] = []
        self.received = 0

    async def download_volume(self, request: volume_pb2.DownloadVolumeRequest, _call: Call) -> AsyncIterator[Message]:
        try:
            response = volume_pb2.DownloadVolumeResponse()
            response.chunk.data = request.name.encode()
            yield response
            self.started.set()
            await self.go_on.wait()
            yield response
        finally:
            self.ended.append("download")

    async def upload_volume(self, requests: AsyncIterator[volume_pb2.UploadVolumeRequest], _call: Call) -> Message:
        try:
            async for _ in requests:
                self.received += 1
                self.started.set()
        finally:
            self.ended.append("upload")
        return volume_pb2.UploadVolumeResponse()


class Attachments:
    """Remembers who asked."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.remaining: list[float | None] = []
        self.fail: Exception | None = None
        self.act: Callable[[Any, Call], Awaitable[None]] | None = None

    async def attach_volume(self, request: Message, call: Call) -> Message:
        self.calls.append(call)
        self.remaining.append(call.remaining())
        if self.fail is not None:
            raise self.fail
        if self.act is not None:
            await self.act(request, call)
        return attachment_pb2.AttachVolumeResponse(attachment_id="1")


class Rig:
    """Is a server that runs, with its authority.

    Args:
        folder: Where everything lies.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pki = Pki(folder / "pki")
        issued = self.pki.service("n1", "compute")
        self.settings = ServiceSettings(
            node="n1",
            state_dir=folder / "state",
            run_dir=folder / "run",
            listen="127.0.0.1:0",
            drain_seconds=5,
            tls=TlsSettings(
                certificate_file=issued.certificate_file, key_file=issued.key_file, ca_file=self.pki.ca_file
            ),
        )
        self.domains = Domains()
        self.volumes = Volumes()
        self.attachments = Attachments()
        self.server = self.make()

    def make(self, **changes: Any) -> Server:
        """Return a server that is not started, with the services of the rig."""
        self.settings = replace(self.settings, **changes)
        server = Server(self.settings, service="compute")
        server.add(DOMAINS, self.domains)
        server.add(VOLUMES, self.volumes)
        server.add(ATTACHMENTS, self.attachments, peer=True)
        self.server = server
        return server

    def channel(self, issued: Issued | None, *, authority: bytes | None = None) -> Any:
        """Return a channel over TLS with a certificate, or with none."""
        credentials = grpc.ssl_channel_credentials(
            authority or self.pki.pem,
            issued.key if issued is not None else None,
            issued.certificate if issued is not None else None,
        )
        options = (("grpc.use_local_subchannel_pool", 1),)
        return grpc.aio.secure_channel(f"localhost:{self.server.port}", credentials, options=options)

    def socket(self, name: str) -> Any:
        """Return a channel over a local socket."""
        return grpc.aio.insecure_channel(
            f"unix:{self.settings.run_dir}/compute/{name}.sock", options=(("grpc.use_local_subchannel_pool", 1),)
        )

    def audit(self) -> list[dict[str, Any]]:
        """Return the entries of the audit log, of what was done and of what was refused, in the order of time."""
        files = [self.settings.state_dir / name for name in ("compute.audit.log", "compute.audit.refused.log")]
        entries = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        return sorted(entries, key=lambda entry: entry["time"])


@asynccontextmanager
async def running(folder: Path, **changes: Any) -> AsyncIterator[Rig]:
    """Run a rig."""
    rig = Rig(folder)
    async with rig.make(**changes):
        yield rig


async def ask(
    channel: Any,
    method: str,
    request: Message | bytes,
    response: type[Message] | None = None,
    **options: Any,
) -> Any:
    """Call a unary method once and close the channel; the answer is parsed if its class is given."""
    try:
        encoded = request if isinstance(request, bytes) else request.SerializeToString()
        unary: Any = channel.unary_unary(method)
        answer = await unary(encoded, **{"timeout": 20, **options})
        return answer if response is None else response.FromString(answer)
    finally:
        await channel.close()


GET_DOMAIN = "/virtfleet.compute.v1.DomainService/GetDomain"
LIST_DOMAINS = "/virtfleet.compute.v1.DomainService/ListDomains"
CREATE_DOMAIN = "/virtfleet.compute.v1.DomainService/CreateDomain"
UPDATE_DOMAIN = "/virtfleet.compute.v1.DomainService/UpdateDomain"
START_DOMAIN = "/virtfleet.compute.v1.DomainService/StartDomain"
BATCH_START = "/virtfleet.compute.v1.DomainService/BatchStartDomains"
BATCH_CREATE = "/virtfleet.compute.v1.DomainService/BatchCreateDomains"
WHO_AM_I = "/virtfleet.common.v1.AccessService/WhoAmI"
GET_SERVER = "/virtfleet.common.v1.AdminService/GetServer"
RELOAD = "/virtfleet.common.v1.AdminService/ReloadCertificates"
DOWNLOAD = "/virtfleet.storage.v1.VolumeService/DownloadVolume"
UPLOAD = "/virtfleet.storage.v1.VolumeService/UploadVolume"
ATTACH = "/virtfleet.node.v1.AttachmentService/AttachVolume"


class Refused:
    """Is what an error says, taken apart from its trailers.

    Args:
        error: The error that the client got.
    """

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code = error.code()
        self.message = error.details() or ""
        self.reason = ""
        self.metadata: dict[str, str] = {}
        self.fields: list[str] = []
        self.retry_seconds: float | None = None
        for key, value in error.trailing_metadata() or ():
            if key == "grpc-status-details-bin" and isinstance(value, bytes):
                for detail in status_pb2.Status.FromString(value).details:
                    self._take(detail)

    def _take(self, detail: Any) -> None:
        info = error_details_pb2.ErrorInfo()
        bad = error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            self.reason, self.metadata = info.reason, dict(info.metadata)
            assert info.domain == "virtfleet.dev"
        elif detail.Unpack(bad):
            self.fields = [violation.field for violation in bad.field_violations]
        elif detail.Unpack(retry):
            self.retry_seconds = retry.retry_delay.ToNanoseconds() / 1e9

    @property
    def short(self) -> tuple[str, str]:
        """Code and reason."""
        return self.code.name, self.reason


async def refused(call: Awaitable[Any]) -> Refused:
    """Return what the error of a call says.

    Raises:
        AssertionError: It succeeded.
    """
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return Refused(error)
    raise AssertionError("the call succeeded")

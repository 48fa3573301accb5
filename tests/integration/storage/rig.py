"""A storage service for tests: in this process or one of its own, and a client on its local sockets."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import google_crc32c
import grpc
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf import empty_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from virtfleet.node.v1 import attachment_pb2
from virtfleet.storage.v1 import (
    pool_pb2,
    pool_pb2_grpc,
    volume_pb2,
    volume_pb2_grpc,
    watch_pb2,
    watch_pb2_grpc,
)
from virtfleet_service.peers import Peer
from virtfleet_storage import app
from virtfleet_storage.settings import StorageSettings

NODE = "n1"
PARENT = f"nodes/{NODE}"
MIB = 1 << 20

M = TypeVar("M", bound=Message)


class Refused(Exception):
    """An error that the service answered with."""

    def __init__(self, status: status_pb2.Status) -> None:
        super().__init__(f"{status.code} {status.message}")
        self.code = status.code
        info = error_details_pb2.ErrorInfo()
        for detail in status.details:
            # False, and nothing unpacked, for the details of other types.
            detail.Unpack(info)
        self.reason = info.reason
        self.metadata = dict(info.metadata)

    @property
    def short(self) -> tuple[str, str]:
        """Code and reason."""
        return next(code.name for code in grpc.StatusCode if code.value[0] == self.code), self.reason


def refusal(error: grpc.aio.AioRpcError) -> Refused:
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            return Refused(status_pb2.Status.FromString(value if isinstance(value, bytes) else value.encode()))
    raise error


class Client:
    """Calls the service on one of its sockets."""

    def __init__(self, socket: Path) -> None:
        self.channel = grpc.aio.insecure_channel(f"unix:{socket}", options=[("grpc.use_local_subchannel_pool", 1)])
        self.pools: Any = pool_pb2_grpc.PoolServiceStub(self.channel)
        self.volumes: Any = volume_pb2_grpc.VolumeServiceStub(self.channel)
        self.watch: Any = watch_pb2_grpc.WatchServiceStub(self.channel)
        self.operations: Any = operations_pb2_grpc.OperationsStub(self.channel)  # type: ignore[no-untyped-call]  # the stubs of the wheel have no types

    async def call(self, method: Any, request: Message) -> Any:
        try:
            return await method(request, timeout=30)
        except grpc.aio.AioRpcError as error:
            raise refusal(error) from None

    async def do(self, method: Any, request: Message, kind: type[M]) -> M:
        """Run an operation to its end and return its response."""
        operation: operations_pb2.Operation = await self.call(method, request)
        if not operation.done:
            operation = await self.call(
                self.operations.WaitOperation, operations_pb2.WaitOperationRequest(name=operation.name)
            )
        assert operation.done
        if operation.HasField("error"):
            raise Refused(operation.error)
        response = kind()
        assert operation.response.Unpack(response)
        return response

    async def pool(self, id_: str, *, start: bool = True, **spec: Any) -> pool_pb2.Pool:
        request = pool_pb2.CreatePoolRequest(
            parent=PARENT, pool_id=id_, pool=pool_pb2.Pool(spec=pool_pb2.PoolSpec(**spec)), start=start
        )
        return await self.do(self.pools.CreatePool, request, pool_pb2.Pool)

    async def volume(self, pool: str, id_: str, *, source: str = "", **spec: Any) -> volume_pb2.Volume:
        request = volume_pb2.CreateVolumeRequest(
            parent=f"{PARENT}/pools/{pool}",
            volume_id=id_,
            volume=volume_pb2.Volume(spec=volume_pb2.VolumeSpec(**spec)),
            source_volume=source,
        )
        return await self.do(self.volumes.CreateVolume, request, volume_pb2.Volume)

    async def get(self, name: str) -> volume_pb2.Volume:
        answer: volume_pb2.Volume = await self.call(
            self.volumes.GetVolume, volume_pb2.GetVolumeRequest(name=f"{PARENT}/{name}")
        )
        return answer

    async def delete(self, name: str) -> None:
        await self.do(
            self.volumes.DeleteVolume, volume_pb2.DeleteVolumeRequest(name=f"{PARENT}/{name}"), empty_pb2.Empty
        )

    async def volumes_of(self, pool: str = "-") -> list[volume_pb2.Volume]:
        answer = await self.call(
            self.volumes.ListVolumes, volume_pb2.ListVolumesRequest(parent=f"{PARENT}/pools/{pool}")
        )
        return list(answer.volumes)

    async def refresh(self, pool: str) -> pool_pb2.Pool:
        return await self.do(
            self.pools.RefreshPool, pool_pb2.RefreshPoolRequest(name=f"{PARENT}/pools/{pool}"), pool_pb2.Pool
        )

    async def upload(
        self,
        name: str,
        data: bytes,
        *,
        digest: str | None = None,
        upload_id: str = "",
        offset: int = 0,
        stop: int | None = None,
        chunk: int = MIB,
        length: int | None = None,
        **fields: Any,
    ) -> volume_pb2.UploadVolumeResponse:
        """Send the bytes from an offset to `stop`."""

        async def messages() -> AsyncIterator[volume_pb2.UploadVolumeRequest]:
            yield first_message(name, data, digest=digest, upload_id=upload_id, length=length, **fields)
            for message in chunks(data, offset, len(data) if stop is None else stop, chunk):
                yield message

        return await self.send(messages())

    async def send(self, messages: AsyncIterator[volume_pb2.UploadVolumeRequest]) -> volume_pb2.UploadVolumeResponse:
        stream = self.volumes.UploadVolume(timeout=60)
        try:
            async for message in messages:
                await stream.write(message)
            await stream.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # The server has answered; what it said is asked for below.
            assert stream.done()
        try:
            answer: volume_pb2.UploadVolumeResponse = await stream
            return answer
        except grpc.aio.AioRpcError as error:
            raise refusal(error) from None

    async def download(
        self, name: str, **fields: Any
    ) -> tuple[volume_pb2.DownloadStart, bytes, list[tuple[int, int, bool]]]:
        """Return the start, the bytes with holes filled, and the pieces as (offset, length, stored)."""
        request = volume_pb2.DownloadVolumeRequest(name=f"{PARENT}/{name}", **fields)
        start, data, pieces = volume_pb2.DownloadStart(), bytearray(), []
        try:
            async for answer in self.volumes.DownloadVolume(request, timeout=60):
                if answer.HasField("start"):
                    start = answer.start
                elif answer.chunk.WhichOneof("content") == "data":
                    assert answer.chunk.crc32c == google_crc32c.value(answer.chunk.data)
                    assert answer.chunk.offset == start.offset_bytes + len(data)
                    data += answer.chunk.data
                    pieces.append((answer.chunk.offset, len(answer.chunk.data), True))
                else:
                    data += bytes(answer.chunk.hole_length)
                    pieces.append((answer.chunk.offset, answer.chunk.hole_length, False))
        except grpc.aio.AioRpcError as error:
            raise refusal(error) from None
        return start, bytes(data), pieces

    async def events(self) -> list[watch_pb2.Event]:
        answer = await self.call(self.watch.ListEvents, watch_pb2.ListEventsRequest(parent=PARENT))
        return list(answer.events)

    async def close(self) -> None:
        await self.channel.close()


def first_message(
    name: str,
    data: bytes,
    *,
    digest: str | None = None,
    upload_id: str = "",
    length: int | None = None,
    **fields: Any,
) -> volume_pb2.UploadVolumeRequest:
    start = volume_pb2.UploadStart(
        length_bytes=len(data) if length is None else length,
        digest=sha256(data) if digest is None else digest,
        upload_id=upload_id,
    )
    return volume_pb2.UploadVolumeRequest(name=f"{PARENT}/{name}", start=start, **fields)


def chunks(data: bytes, start: int, stop: int, size: int) -> Sequence[volume_pb2.UploadVolumeRequest]:
    found = []
    for at in range(start, stop, size):
        piece = data[at : min(at + size, stop)]
        message = volume_pb2.UploadVolumeRequest()
        message.chunk.offset = at
        message.chunk.data = piece
        message.chunk.crc32c = google_crc32c.value(piece)
        found.append(message)
    return found


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class Rig:
    """Is a running service with a client of an administrator and the peer socket that compute would use."""

    def __init__(self, base: Path, **settings: Any) -> None:
        self.base = base
        self.settings = StorageSettings(
            node=NODE,
            state_dir=base / "state",
            run_dir=base / "run",
            rescan_seconds=1.0,
            drain_seconds=2.0,
            **settings,
        )
        self.app: app.App
        self.client: Client
        self.peer: Peer

    def socket(self, role: str) -> Path:
        return self.base / "run" / "storage" / f"{role}.sock"

    @property
    def root(self) -> Path:
        return self.base / "state" / "pools"

    @asynccontextmanager
    async def clients(self) -> AsyncIterator[Rig]:
        self.client = Client(self.socket("admin"))
        async with Peer(self.socket("peer"), service="compute", node=NODE) as peer:
            self.peer = peer
            try:
                yield self
            finally:
                await self.client.close()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Rig]:
        async with app.running(self.settings) as self.app, self.clients():
            yield self

    async def attach(
        self,
        volume: str,
        *,
        domain_uid: str = "",
        device: str = "disk0",
        mode: int = attachment_pb2.ATTACHMENT_MODE_EXCLUSIVE,
        uid: int = 0,
    ) -> attachment_pb2.AttachVolumeResponse:
        request = attachment_pb2.AttachVolumeRequest(
            name=f"{PARENT}/{volume}",
            domain_uid=domain_uid or str(uuid.uuid4()),
            domain=f"{PARENT}/domains/web",
            device_id=device,
            mode=attachment_pb2.AttachmentMode.ValueType(mode),
            run_as_uid=uid,
        )
        return await self.peer.call("AttachmentService.AttachVolume", request, attachment_pb2.AttachVolumeResponse)

    async def release(self, volume: str, attachment_id: str) -> None:
        await self.peer.call(
            "AttachmentService.ReleaseVolume",
            attachment_pb2.ReleaseVolumeRequest(name=f"{PARENT}/{volume}", attachment_id=attachment_id),
            attachment_pb2.ReleaseVolumeResponse,
        )


@asynccontextmanager
async def rig() -> AsyncIterator[Rig]:
    with tempfile.TemporaryDirectory(prefix=f"vf-storage-{os.getpid()}-") as base:
        # Guests reach their files through it.
        Path(base).chmod(0o711)
        async with Rig(Path(base)).running() as made:
            yield made


class Process:
    """Is the service as a process of its own, to be killed.

    Args:
        rig_: The folder and the clients.
        prefix: What runs it: `unshare` with what is to be different for it.
        settings: More of its settings.
        environment: Added to its environment.
    """

    def __init__(
        self,
        rig_: Rig,
        *,
        prefix: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.rig = rig_
        self.prefix = prefix
        self.settings = settings or {}
        self.environment = environment or {}
        self.process: asyncio.subprocess.Process

    async def start(self) -> None:
        settings = self.rig.base / "settings.toml"
        settings.write_text(
            f'node = "{NODE}"\nstate_dir = "{self.rig.base}/state"\nrun_dir = "{self.rig.base}/run"\n'
            "drain_seconds = 2.0\n[storage]\nrescan_seconds = 1.0\n"
            + "".join(f"{name} = {json.dumps(value)}\n" for name, value in self.settings.items())
        )
        self.process = await asyncio.create_subprocess_exec(
            *self.prefix,
            sys.executable,
            "-m",
            "virtfleet_storage",
            "--config",
            str(settings),
            env={**os.environ, **self.environment},
            start_new_session=True,
        )
        channel = grpc.aio.insecure_channel(f"unix:{self.rig.socket('admin')}")
        try:
            async with asyncio.timeout(20):
                await channel.channel_ready()
        finally:
            await channel.close()

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGKILL)
        await self.process.wait()

    async def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return await self.process.wait()


async def qemu_img(*arguments: str | Path) -> str:
    process = await asyncio.create_subprocess_exec(
        "qemu-img", *map(str, arguments), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()


async def info(path: str | Path, format: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(await qemu_img("info", "-U", "-f", format, "--output=json", path))
    return found

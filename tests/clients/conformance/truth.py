"""What the harness does and sees itself: bare stubs on a connection past the door, nothing of the clients under test."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import grpc
from google.longrunning import operations_pb2, operations_pb2_grpc

from tests.clients.conformance.agent_speech import content
from virtfleet.compute.v1 import console_pb2, console_pb2_grpc, domain_pb2, domain_pb2_grpc
from virtfleet.fleet.v1 import node_pb2, node_pb2_grpc
from virtfleet.storage.v1 import pool_pb2, pool_pb2_grpc, volume_pb2, volume_pb2_grpc
from virtfleet.type.v1 import operation_pb2

Answer = TypeVar("Answer")
_PATIENCE_SECONDS = 30.0
_CALL_SECONDS = 10.0
_MIB = 1 << 20


class Truth:
    """Asks and changes the fleet while entered.

    Args:
        address: The gateway, `host:port`.
        files: The certificate files of an administrator, by their use.

    Attributes:
        calls: How many calls of each method it has made that the gateway has answered.
    """

    def __init__(self, address: str, files: Mapping[str, str]) -> None:
        ca, key, certificate = (Path(files[name]).read_bytes() for name in ("ca_file", "key_file", "cert_file"))
        self._channel = grpc.secure_channel(
            address,
            grpc.ssl_channel_credentials(ca, key, certificate),
            options=[
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.max_receive_message_length", 16 * _MIB),
                ("grpc.initial_reconnect_backoff_ms", 50),
                ("grpc.min_reconnect_backoff_ms", 50),
                ("grpc.max_reconnect_backoff_ms", 200),
            ],
        )
        self.calls: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._domains = domain_pb2_grpc.DomainServiceStub(self._channel)
        self._nodes = node_pb2_grpc.NodeServiceStub(self._channel)
        self._operations = operations_pb2_grpc.OperationsStub(self._channel)  # type: ignore[no-untyped-call]  # Google's stubs have no types
        self._consoles = console_pb2_grpc.ConsoleServiceStub(self._channel)
        self._pools = pool_pb2_grpc.PoolServiceStub(self._channel)
        self._volumes = volume_pb2_grpc.VolumeServiceStub(self._channel)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection."""
        self._channel.close()

    def _call(self, service: str, method: Any, request: Any, *, repeat: bool = True) -> Any:
        """Call, again and again where the gateway is being replaced."""
        ends_at = time.monotonic() + _PATIENCE_SECONDS
        name = type(request).__name__.removesuffix("Request")
        while True:
            try:
                answer = method(request, timeout=_CALL_SECONDS)
            except grpc.RpcError as error:
                failed: Any = error
                if failed.code() is grpc.StatusCode.UNAVAILABLE and repeat and time.monotonic() < ends_at:
                    time.sleep(0.05)
                    continue
                if failed.code() is not grpc.StatusCode.UNAVAILABLE:
                    self._count(f"{service}/{name}")
                raise
            self._count(f"{service}/{name}")
            return answer

    def _count(self, method: str) -> None:
        with self._lock:
            self.calls[method] += 1

    def _finish(self, operation: operations_pb2.Operation) -> operations_pb2.Operation:
        ends_at = time.monotonic() + _PATIENCE_SECONDS
        while not operation.done:
            assert time.monotonic() < ends_at, f"{operation.name} does not end"
            request = operations_pb2.WaitOperationRequest(name=operation.name)
            request.timeout.FromSeconds(5)
            operation = self._call("Operations", self._operations.WaitOperation, request)
        assert not operation.HasField("error"), operation.error
        return operation

    # Domains.

    def get(self, name: str) -> domain_pb2.Domain | None:
        """Return a domain; None: there is none."""
        try:
            found: domain_pb2.Domain = self._call(
                "DomainService", self._domains.GetDomain, domain_pb2.GetDomainRequest(name=name)
            )
        except grpc.RpcError as error:
            failed: Any = error
            if failed.code() is grpc.StatusCode.NOT_FOUND:
                return None
            raise
        return found

    def create(self, name: str, *, running: bool, power_button_delay_s: float) -> domain_pb2.Domain:
        """Make a domain of the driver in memory, with a console."""
        node, _, domain_id = name.partition("/domains/")
        request = domain_pb2.CreateDomainRequest(parent=node, domain_id=domain_id)
        request.domain.spec.driver = "test"
        request.domain.spec.memory.maximum_bytes = 64 * _MIB
        request.domain.spec.serials["tty"].SetInParent()
        if power_button_delay_s:
            request.domain.spec.test.power_button_delay.FromNanoseconds(round(power_button_delay_s * 1e9))
        if running:
            request.start.SetInParent()
        operation = self._finish(self._call("DomainService", self._domains.CreateDomain, request, repeat=False))
        domain = domain_pb2.Domain()
        assert operation.response.Unpack(domain)
        return domain

    def update(self, name: str, path: str, **fields: Any) -> None:
        """Change one field of a domain."""
        request = domain_pb2.UpdateDomainRequest(domain=domain_pb2.Domain(name=name, **fields))
        request.update_mask.paths.append(path)
        self._finish(self._call("DomainService", self._domains.UpdateDomain, request, repeat=False))

    def delete(self, name: str) -> None:
        """Delete a domain, whatever it does; succeeds if there is none."""
        request = domain_pb2.DeleteDomainRequest(name=name, stop=True, allow_missing=True)
        self._finish(self._call("DomainService", self._domains.DeleteDomain, request))

    def operations(self, name: str) -> list[str]:
        """Return the methods of all operations that a domain has had."""
        service = f"{name.partition('/domains/')[0]}/services/compute"
        request = operations_pb2.ListOperationsRequest(name=service, page_size=1000)
        found = []
        while True:
            answer = self._call("Operations", self._operations.ListOperations, request)
            for operation in answer.operations:
                metadata = operation_pb2.OperationMetadata()
                operation.metadata.Unpack(metadata)
                if metadata.target == name:
                    found.append(metadata.method.replace("/", ".").rpartition(".")[2])
            if not answer.next_page_token:
                return found
            request.page_token = answer.next_page_token

    def console_log(self, name: str) -> bytes:
        """Return all that the console of a domain has put out."""
        request = console_pb2.ReadConsoleLogRequest(name=name)
        return b"".join(answer.data.data for answer in self._consoles.ReadConsoleLog(request, timeout=_CALL_SECONDS))

    # Nodes.

    def node_state(self, node: str) -> str:
        """Return the state of a node: `READY`."""
        request = node_pb2.GetNodeRequest(name=f"nodes/{node}")
        status = self._call("NodeService", self._nodes.GetNode, request).status
        return node_pb2.NodeState.Name(status.state).removeprefix("NODE_STATE_")

    def unreachable(self) -> list[str]:
        """Return the nodes that are missing in the list of domains."""
        # A page tells of the nodes that it comes past: the filter has the first come past all.
        request = domain_pb2.ListDomainsRequest(parent="nodes/-", filter='uid="none"')
        found = []
        while True:
            answer = self._call("DomainService", self._domains.ListDomains, request)
            found += [failure.node.removeprefix("nodes/") for failure in answer.unreachable]
            if not answer.next_page_token:
                return found
            request.page_token = answer.next_page_token

    # Volumes.

    def create_volume(self, node: str, pool_id: str, size_bytes: int, seed: int) -> str:
        """Make a pool with one volume that has a content; returns the volume's name."""
        request = pool_pb2.CreatePoolRequest(parent=f"nodes/{node}", pool_id=pool_id, start=True)
        request.pool.spec.dir.SetInParent()
        self._finish(self._call("PoolService", self._pools.CreatePool, request, repeat=False))
        wanted = volume_pb2.CreateVolumeRequest(parent=f"nodes/{node}/pools/{pool_id}", volume_id="disk")
        wanted.volume.spec.format = volume_pb2.VOLUME_FORMAT_RAW
        wanted.volume.spec.capacity_bytes = size_bytes
        self._finish(self._call("VolumeService", self._volumes.CreateVolume, wanted, repeat=False))
        name = f"{wanted.parent}/volumes/disk"

        def messages() -> Iterator[volume_pb2.UploadVolumeRequest]:
            yield volume_pb2.UploadVolumeRequest(name=name, start=volume_pb2.UploadStart(length_bytes=size_bytes))
            message = volume_pb2.UploadVolumeRequest()
            message.chunk.data = content(seed, size_bytes)
            yield message

        self._volumes.UploadVolume(messages(), timeout=_PATIENCE_SECONDS)
        return name

    def delete_volume(self, name: str) -> None:
        """Take a volume and its pool away."""
        pool = name.partition("/volumes/")[0]
        self._finish(self._call("VolumeService", self._volumes.DeleteVolume, volume_pb2.DeleteVolumeRequest(name=name)))
        self._finish(self._call("PoolService", self._pools.StopPool, pool_pb2.StopPoolRequest(name=pool)))
        self._finish(self._call("PoolService", self._pools.DeletePool, pool_pb2.DeletePoolRequest(name=pool)))

    def received_bytes(self, name: str, upload_id: str) -> int:
        """Return how much of an upload the server has kept."""
        request = volume_pb2.GetVolumeRequest(name=name)
        volume = self._call("VolumeService", self._volumes.GetVolume, request)
        return next((part.received_bytes for part in volume.status.uploads if part.upload_id == upload_id), 0)

    def volume_content(self, name: str) -> bytes:
        """Return what a volume holds."""
        data = bytearray()
        request = volume_pb2.DownloadVolumeRequest(name=name)
        for message in self._volumes.DownloadVolume(request, timeout=_PATIENCE_SECONDS):
            if message.HasField("start"):
                data = bytearray(message.start.length_bytes)
            elif message.chunk.HasField("data"):
                data[message.chunk.offset : message.chunk.offset + len(message.chunk.data)] = message.chunk.data
        return bytes(data)


def until(holds: Callable[[], Answer], what: str, seconds: float = _PATIENCE_SECONDS) -> Answer:
    """Look again and again until something holds, and return it."""
    ends_at = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < ends_at, f"{what}: not within {seconds} s"
        time.sleep(0.02)
    return found

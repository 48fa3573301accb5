"""Volumes and ports of domains: what compute asks of the storage and the network service of its node, and gives back.

Every call conveys the caller on whose behalf it is made; storage and network authorise him. Attaching and plugging are
registered for undo before they are asked for, because both can be undone whether or not they were done.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from virtfleet.compute.v1 import device_pb2, domain_pb2, domain_spec_pb2
from virtfleet.node.v1 import attachment_pb2, plug_pb2
from virtfleet_compute import specs
from virtfleet_compute.drivers.api import (
    INITRD_DEVICE_ID,
    KERNEL_DEVICE_ID,
    BackingFile,
    DomainRef,
    FileConnection,
    TapConnection,
)
from virtfleet_service import names
from virtfleet_service.errors import BackendFailed, FieldConflict, VirtfleetError
from virtfleet_service.peers import Peer

if TYPE_CHECKING:
    from virtfleet_service.call import Call

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

_OF_A_CARD = {"port.spec.mac_address": ".mac_address", "parent": ".network"}
"""Where a card has what network refuses of a port, by its field there; else the card as a whole is named."""

_FORMATS = {device_pb2.DISK_FORMAT_RAW: "raw", device_pb2.DISK_FORMAT_QCOW2: "qcow2"}

DomainSpec = domain_spec_pb2.DomainSpec


@dataclass(frozen=True, slots=True)
class VolumeUse:
    """Is one volume that a domain uses."""

    device_id: str
    volume: str
    """In full: `nodes/{node}/pools/{pool}/volumes/{volume}`."""
    mode: attachment_pb2.AttachmentMode.ValueType
    format: str = ""
    """The format that it must have, as `FileConnection` names it; empty: any."""


@dataclass(slots=True)
class Connections:
    """Is all that a guest is joined to."""

    disks: dict[str, FileConnection] = field(default_factory=dict)
    kernel: FileConnection | None = None
    initrd: FileConnection | None = None
    interfaces: dict[str, TapConnection] = field(default_factory=dict)
    addresses: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """The fixed addresses of each card."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """Is a port that was made for a card."""

    device_id: str
    port: str
    mac_address: str
    addresses: tuple[str, ...]


def volume_uses(spec: DomainSpec, node: str) -> list[VolumeUse]:
    """List the volumes of a resolved spec, kernel and initial file system included."""
    uses = []
    for key in sorted(spec.disks):
        disk = spec.disks[key]
        if disk.WhichOneof("source") != "volume":
            continue
        if disk.read_only or disk.device == device_pb2.DISK_DEVICE_CDROM:
            mode = attachment_pb2.ATTACHMENT_MODE_READ_ONLY
        elif disk.shareable:
            mode = attachment_pb2.ATTACHMENT_MODE_SHARED
        else:
            mode = attachment_pb2.ATTACHMENT_MODE_EXCLUSIVE
        uses.append(VolumeUse(key, names.absolute(disk.volume, node), mode, _FORMATS.get(disk.format, "")))
    if spec.os.WhichOneof("boot") == "kernel":
        kernel = spec.os.kernel
        for device_id, volume in ((KERNEL_DEVICE_ID, kernel.kernel_volume), (INITRD_DEVICE_ID, kernel.initrd_volume)):
            if volume:
                full = names.absolute(volume, node)
                uses.append(VolumeUse(device_id, full, attachment_pb2.ATTACHMENT_MODE_READ_ONLY))
    return uses


def owned_ports(spec: DomainSpec) -> list[str]:
    """List the cards of a spec that own a port: those that name a network."""
    return sorted(key for key, card in spec.interfaces.items() if card.WhichOneof("source") == "network")


class Wiring:
    """Asks the storage and the network service.

    Args:
        node: The id of the node.
        storage: The storage service's peer socket.
        network: The network service's peer socket.
        timeout_seconds: How long one call may take.
    """

    def __init__(self, node: str, storage: Peer, network: Peer, timeout_seconds: float) -> None:
        self._node = node
        self.storage = storage
        self.network = network
        self.timeout_seconds = timeout_seconds
        self.unswept: Mapping[str, asyncio.Event] = {"storage": asyncio.Event(), "network": asyncio.Event()}
        """Set where a peer could not be told to give something back; the sweep does it when the peer answers."""

    # A start and its end.

    async def connect(
        self,
        domain: DomainRef,
        spec: DomainSpec,
        ports: dict[str, str],
        run_as_uid: int,
        call: Call | None,
        undo: AsyncExitStack,
    ) -> Connections:
        """Attach every volume and plug every port of a domain that is about to start, all at once.

        Succeeds with the same connections if they are there. After a failure `undo` gives back whatever was got.

        Args:
            domain: The domain.
            spec: Its resolved spec.
            ports: The port of each card, by device id.
            run_as_uid: The user of its process.
            call: On whose behalf.
            undo: Where the way back is pushed.

        Raises:
            VirtfleetError: What storage or network answered.
            FieldConflict: A volume does not have the format that its disk says.
            BackendUnreachable: One of them is away.
        """
        uses = volume_uses(spec, self._node)
        undo.push_async_callback(self.disconnect, domain, uses, list(ports.values()))
        return await self._connect(domain, spec, uses, ports, run_as_uid, call)

    async def look(self, domain: DomainRef, spec: DomainSpec, ports: dict[str, str], run_as_uid: int) -> Connections:
        """Ask again for the connections of a guest that runs: both peers answer with what there is.

        Raises:
            VirtfleetError: What storage or network answered.
        """
        return await self._connect(domain, spec, volume_uses(spec, self._node), ports, run_as_uid, None)

    async def _connect(
        self,
        domain: DomainRef,
        spec: DomainSpec,
        uses: Sequence[VolumeUse],
        ports: dict[str, str],
        run_as_uid: int,
        call: Call | None,
    ) -> Connections:
        found = Connections()
        for key, disk in spec.disks.items():
            if disk.WhichOneof("source") == "host_path":
                found.disks[key] = FileConnection(disk.host_path, _FORMATS[disk.format])
        await _all(
            [self._attach(domain, use, run_as_uid, call, found) for use in uses]
            + [self._plug(domain, device_id, port, run_as_uid, call, found) for device_id, port in ports.items()]
        )
        return found

    async def disconnect(self, domain: DomainRef, uses: Sequence[VolumeUse], ports: Sequence[str]) -> None:
        """Give back what a guest had, as the service itself: whatever the caller may do by now.

        Never raises for a peer: what one that is away still holds, the sweep gives back.
        """
        works = [self._release(domain, use) for use in uses] + [self.unplug(domain, port) for port in ports]
        peers = ["storage"] * len(uses) + ["network"] * len(ports)
        await self._give_back(domain, works, peers)

    async def _give_back(self, domain: DomainRef, works: Sequence[Awaitable[None]], peers: Sequence[str]) -> None:
        for peer, result in zip(peers, await asyncio.gather(*works, return_exceptions=True), strict=True):
            if isinstance(result, VirtfleetError):
                _log.warning("%s of %s keeps something for now: %s", peer, domain.name, result)
                self.unswept[peer].set()
            elif isinstance(result, BaseException):
                raise result

    async def _attach(
        self, domain: DomainRef, use: VolumeUse, run_as_uid: int, call: Call | None, found: Connections
    ) -> None:
        request = attachment_pb2.AttachVolumeRequest(
            name=use.volume,
            domain_uid=domain.uid,
            domain=domain.name,
            device_id=use.device_id,
            mode=use.mode,
            run_as_uid=run_as_uid,
        )
        answer = await self.storage.call(
            "AttachmentService.AttachVolume",
            request,
            attachment_pb2.AttachVolumeResponse,
            call,
            timeout_seconds=self.timeout_seconds,
        )
        if answer.WhichOneof("connection") != "file":
            raise BackendFailed(f"{use.volume} comes with an unknown kind of connection", volume=use.volume)
        if use.format not in ("", answer.file.format):
            raise FieldConflict(
                f"{use.device_id} of {domain.name} is to be {use.format}, and {use.volume} is {answer.file.format}",
                resource=use.volume,
                device_id=use.device_id,
                format=use.format,
                volume_format=answer.file.format,
            )
        connection = FileConnection(
            path=answer.file.path,
            format=answer.file.format,
            backing_chain=tuple(BackingFile(link.path, link.format) for link in answer.file.backing_chain),
            capacity_bytes=answer.capacity_bytes,
            attachment_id=answer.attachment_id,
        )
        if use.device_id == KERNEL_DEVICE_ID:
            found.kernel = connection
        elif use.device_id == INITRD_DEVICE_ID:
            found.initrd = connection
        else:
            found.disks[use.device_id] = connection

    async def _release(self, domain: DomainRef, use: VolumeUse) -> None:
        await self.release(attachment_pb2.Attachment(volume=use.volume, attachment_id=f"{domain.uid}:{use.device_id}"))

    async def release(self, attachment: attachment_pb2.Attachment) -> None:
        """Give a volume back. Succeeds if it is not attached.

        Raises:
            VirtfleetError: What storage answered.
            BackendUnreachable: It is away.
        """
        request = attachment_pb2.ReleaseVolumeRequest(name=attachment.volume, attachment_id=attachment.attachment_id)
        await self.storage.call(
            "AttachmentService.ReleaseVolume",
            request,
            attachment_pb2.ReleaseVolumeResponse,
            timeout_seconds=self.timeout_seconds,
        )

    async def _plug(
        self, domain: DomainRef, device_id: str, port: str, run_as_uid: int, call: Call | None, found: Connections
    ) -> None:
        request = plug_pb2.PlugPortRequest(
            name=port, domain_uid=domain.uid, domain=domain.name, device_id=device_id, run_as_uid=run_as_uid
        )
        answer = await self.network.call(
            "PlugService.PlugPort", request, plug_pb2.PlugPortResponse, call, timeout_seconds=self.timeout_seconds
        )
        if answer.WhichOneof("plug") != "tap":
            raise BackendFailed(f"{port} comes with a plug that this release does not know", port=port)
        found.interfaces[device_id] = TapConnection(
            interface_name=answer.tap.interface_name,
            bridge_name=answer.tap.bridge_name,
            mac_address=answer.mac_address,
            mtu_bytes=answer.mtu_bytes,
            port=port,
        )
        found.addresses[device_id] = tuple(answer.addresses)

    async def unplug(self, domain: DomainRef, port: str) -> None:
        """Remove the link of a port. Succeeds if there is none.

        Raises:
            VirtfleetError: What network answered.
            BackendUnreachable: It is away.
        """
        await self.network.call(
            "PlugService.UnplugPort",
            plug_pb2.UnplugPortRequest(name=port, domain_uid=domain.uid),
            plug_pb2.UnplugPortResponse,
            timeout_seconds=self.timeout_seconds,
        )

    # A definition and its end.

    async def reserve(
        self, domain: DomainRef, spec: DomainSpec, device_ids: Sequence[str], call: Call | None, undo: AsyncExitStack
    ) -> list[Reservation]:
        """Make the ports that cards own. Succeeds with the same ports if they are there.

        Raises:
            VirtfleetError: What network answered.
            BackendUnreachable: It is away.
        """

        async def one(device_id: str) -> Reservation:
            card = spec.interfaces[device_id]
            network = names.absolute(card.network, self._node)
            port_id = specs.port_id(domain.domain_id, device_id)
            undo.push_async_callback(self.unreserve, domain, [f"{network}/ports/{port_id}"])
            request = plug_pb2.ReservePortRequest(
                parent=network,
                port_id=port_id,
                domain_uid=domain.uid,
                domain=domain.name,
                device_id=device_id,
                mac_address=card.mac_address,
                bandwidth=card.bandwidth if card.HasField("bandwidth") else None,
            )
            answer = await self.network.call(
                "PlugService.ReservePort",
                request,
                plug_pb2.ReservePortResponse,
                call,
                timeout_seconds=self.timeout_seconds,
                place=lambda field: f"domain.spec.interfaces.{device_id}{_OF_A_CARD.get(field, '')}",
            )
            return Reservation(device_id, answer.port, answer.mac_address, tuple(answer.addresses))

        return await _all([one(device_id) for device_id in device_ids])

    async def unreserve(self, domain: DomainRef, ports: Sequence[str]) -> None:
        """Remove ports that cards owned. Never raises for a peer: what remains, the sweep removes."""
        await self._give_back(domain, [self.give_up(domain, port) for port in ports], ["network"] * len(ports))

    async def give_up(self, domain: DomainRef, port: str) -> None:
        """Remove a port that a card owned, with its link. Succeeds if there is none.

        Raises:
            VirtfleetError: What network answered.
            BackendUnreachable: It is away.
        """
        await self.unplug(domain, port)
        await self.network.call(
            "PlugService.UnreservePort",
            plug_pb2.UnreservePortRequest(name=port, domain_uid=domain.uid),
            plug_pb2.UnreservePortResponse,
            timeout_seconds=self.timeout_seconds,
        )

    # What the peers hold.

    async def attachments(self) -> Sequence[attachment_pb2.Attachment]:
        """List what storage holds for domains.

        Raises:
            BackendUnreachable: It is away.
        """
        request = attachment_pb2.ListAttachmentsRequest(parent=f"nodes/{self._node}")
        answer = await self.storage.call(
            "AttachmentService.ListAttachments",
            request,
            attachment_pb2.ListAttachmentsResponse,
            timeout_seconds=self.timeout_seconds,
        )
        return answer.attachments

    async def plugs(self) -> Sequence[plug_pb2.PlugRecord]:
        """List the ports that network holds for domains.

        Raises:
            BackendUnreachable: It is away.
        """
        answer = await self.network.call(
            "PlugService.ListPlugs",
            plug_pb2.ListPlugsRequest(parent=f"nodes/{self._node}"),
            plug_pb2.ListPlugsResponse,
            timeout_seconds=self.timeout_seconds,
        )
        return answer.plugs


async def _all(works: Sequence[Awaitable[_T]]) -> list[_T]:
    """Run works side by side and wait for all of them, so that undo never overtakes one; raise the first failure."""
    results = await asyncio.gather(*works, return_exceptions=True)
    failures = [result for result in results if isinstance(result, BaseException)]
    if failures:
        raise failures[0]
    return [result for result in results if not isinstance(result, BaseException)]


def ports_of(domain: domain_pb2.Domain, spec: DomainSpec, node: str) -> dict[str, str]:
    """Return the port of each card that has a source, by device id: reserved ones as recorded, named ones as named."""
    recorded = {card.device_id: card.port for card in domain.status.interfaces}
    ports: dict[str, str] = {}
    for key in sorted(spec.interfaces):
        card = spec.interfaces[key]
        source = card.WhichOneof("source")
        if source == "port":
            ports[key] = names.absolute(card.port, node)
        elif source == "network":
            port_id = specs.port_id(domain.name.rpartition("/")[2], key)
            ports[key] = recorded.get(key) or f"{names.absolute(card.network, node)}/ports/{port_id}"
    return ports

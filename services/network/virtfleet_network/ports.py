"""Ports: reserve and delete them for callers and for compute; plug and unplug them for compute."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from typing import TYPE_CHECKING

from google.protobuf import empty_pb2
from google.protobuf.message import Message

from virtfleet.network.v1 import network_pb2, port_pb2, watch_pb2
from virtfleet.node.v1 import plug_pb2
from virtfleet_network import addresses, records
from virtfleet_network.backends.api import NetworkBackend, PortLink
from virtfleet_network.networks import Networks
from virtfleet_service import longrunning, names, resources
from virtfleet_service.errors import (
    CapabilityMissing,
    ChangeRolledBack,
    IdentityInUse,
    ResourceExists,
    ResourceInUse,
    VirtfleetError,
    WrongState,
)
from virtfleet_service.failpoints import reach
from virtfleet_service.locks import Locks
from virtfleet_service.operations import Commit, Handler, Job, JournalEntry, Operations, plan
from virtfleet_service.store import Store
from virtfleet_service.transaction import Transaction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from google.longrunning import operations_pb2

    from virtfleet_service.call import Call

__all__ = ["Ports"]

_log = logging.getLogger(__name__)

_SERVICE = "virtfleet.network.v1.PortService"
_CREATE, _DELETE = f"{_SERVICE}.CreatePort", f"{_SERVICE}.DeletePort"
_PLUGS = "virtfleet.node.v1.PlugService"
_RESERVE, _UNRESERVE = f"{_PLUGS}.ReservePort", f"{_PLUGS}.UnreservePort"
_PLUG, _UNPLUG = f"{_PLUGS}.PlugPort", f"{_PLUGS}.UnplugPort"
_HOSTNAME_LIMIT = 63

FORGET_AGAIN_SECONDS = 1.0
"""When the store refuses, how long until it is asked again."""


class Ports:
    """Keeps the records of ports and has the back end make their links."""

    def __init__(self, store: Store, operations: Operations, backend: NetworkBackend, networks: Networks) -> None:
        self._store = store
        self._operations = operations
        self._backend = backend
        self._networks = networks
        self._locks = Locks()
        self._removals: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

    # For callers.

    async def create(self, call: Call, request: port_pb2.CreatePortRequest) -> operations_pb2.Operation:
        """Answer CreatePort."""
        name = names.child(request.parent, "ports", names.check_id(request.port_id, "port_id"))
        port = port_pb2.Port()
        port.CopyFrom(request.port)
        port.ClearField("status")
        port.spec.SetInParent()

        def reserve(tx: Transaction) -> str:
            self._reserve(tx, port, name, _CREATE)
            return port.uid

        if request.validate_only:
            await self._store.rehearse(reserve)
            return plan(port)

        async def work(_job: Job) -> Commit:
            reach("port.create.recorded")
            await self._networks.refresh(request.parent)
            return lambda tx: records.port_of(tx.need(name))

        return await self._operations.run(call, request, target=name, intent=reserve, work=work, cancellable=False)

    def _reserve(
        self, tx: Transaction, port: port_pb2.Port, name: str, cause: str, owner: port_pb2.PortHolder | None = None
    ) -> None:
        """Make a port in place and write it: MAC, addresses, host name."""
        network = records.need_network(tx, names.parent_of(name))
        if tx.get(name) is not None:
            raise ResourceExists(f"{name} exists", resource=name, name=name)
        if port.spec.HasField("bandwidth"):
            raise CapabilityMissing(
                "the back end lacks limits of bandwidth",
                resource=name,
                capability="port.bandwidth",
                backend=self._backend.id,
            )
        uid = resources.uid_for(port)
        other = tx.get_by_uid("port", uid)
        if other is not None:
            raise IdentityInUse(f"{other.name} has the uid {uid}", field="port.uid", holder=other.name, uid=uid)
        resources.create_head(port, name, uid=uid)
        status = port.status
        status.state, status.observed_generation = port_pb2.PORT_STATE_UNPLUGGED, 1
        if owner is not None:
            status.owner.CopyFrom(owner)
        status.mac_address = addresses.reserve_mac(tx, port.spec.mac_address, name)
        spec = network.status.resolved_spec
        found = addresses.reserve_addresses(tx, network, spec, status.mac_address, port.spec.addresses, name)
        status.addresses.extend(found)
        status.hostname = port.spec.hostname or (
            names.id_of(owner.domain)[:_HOSTNAME_LIMIT] if owner is not None else ""
        )
        tx.put("port", port, cause=cause)
        self._count(tx, network, cause)
        records.emit(
            tx, port, watch_pb2.EVENT_TYPE_PORT_ADDED, "RESERVED", f"{name} has {', '.join(found) or 'no address'}"
        )

    async def delete(self, call: Call, request: port_pb2.DeletePortRequest) -> operations_pb2.Operation:
        """Answer DeletePort."""
        name = request.name

        def check(tx: Transaction) -> port_pb2.Port | None:
            if tx.get(name) is None and request.allow_missing:
                return None
            port = records.port_of(tx.need(name))
            resources.check_preconditions(port, request.etag, request.expected_uid)
            for holder, why in ((port.status.owner, "belongs to"), (port.status.holder, "is plugged by")):
                if holder.domain_uid:
                    raise ResourceInUse(
                        f"{name} {why} {holder.domain}",
                        resource=name,
                        holder=holder.domain,
                        holder_uid=holder.domain_uid,
                    )
            return port

        if request.validate_only:
            await self._store.write(check)
            return plan(empty_pb2.Empty())

        def intent(tx: Transaction) -> str:
            port = check(tx)
            if port is None:
                return ""
            self._remove(tx, port, _DELETE)
            return port.uid

        async def work(_job: Job) -> Commit:
            await self._networks.refresh(names.parent_of(name))
            return lambda _tx: empty_pb2.Empty()

        return await self._operations.run(call, request, target=name, intent=intent, work=work, cancellable=False)

    def _remove(self, tx: Transaction, port: port_pb2.Port, cause: str) -> None:
        network = records.network_of(tx.need(names.parent_of(port.name)))
        addresses.unreserve(tx, network.uid, port.status.mac_address, port.status.addresses)
        tx.delete(port.name, cause=cause)
        self._count(tx, network, cause)
        records.emit(tx, port, watch_pb2.EVENT_TYPE_PORT_REMOVED, "DELETED", f"{port.name} was deleted")

    @staticmethod
    def _count(tx: Transaction, network: network_pb2.Network, cause: str) -> None:
        records.count(tx, network)
        tx.put("network", network, cause=cause)

    # For compute.

    async def reserve(self, request: plug_pb2.ReservePortRequest) -> plug_pb2.ReservePortResponse:
        """Answer ReservePort."""
        name = names.child(request.parent, "ports", names.check_id(request.port_id, "port_id"))
        owner = port_pb2.PortHolder(domain=request.domain, domain_uid=request.domain_uid, device_id=request.device_id)

        def reserve(tx: Transaction) -> port_pb2.Port:
            row = tx.get(name)
            if row is not None:
                there = records.port_of(row)
                same = (there.status.owner.domain_uid, there.status.owner.device_id) == (
                    owner.domain_uid,
                    owner.device_id,
                )
                if same and request.mac_address in ("", there.status.mac_address):
                    return there
            port = port_pb2.Port()
            port.spec.SetInParent()
            if request.mac_address:
                port.spec.mac_address = request.mac_address
            if request.HasField("bandwidth"):
                port.spec.bandwidth.CopyFrom(request.bandwidth)
            self._reserve(tx, port, name, _RESERVE, owner)
            return port

        port = await self._store.write(reserve)
        await self._networks.refresh(request.parent)
        status = port.status
        return plug_pb2.ReservePortResponse(port=name, mac_address=status.mac_address, addresses=status.addresses)

    async def unreserve(self, request: plug_pb2.UnreservePortRequest) -> plug_pb2.UnreservePortResponse:
        """Answer UnreservePort."""
        name = request.name

        def remove(tx: Transaction) -> bool:
            row = tx.get(name)
            if row is None:
                return False
            port = records.port_of(row)
            owner = port.status.owner
            if owner.domain_uid != request.domain_uid:
                raise ResourceInUse(f"{name} is not a port of that domain", resource=name, holder=owner.domain or name)
            if port.status.state == port_pb2.PORT_STATE_PLUGGED:
                raise WrongState(f"{name} is plugged", resource=name, state="PLUGGED")
            self._remove(tx, port, _UNRESERVE)
            return True

        if await self._store.write(remove):
            await self._networks.refresh(names.parent_of(name))
        return plug_pb2.UnreservePortResponse()

    async def plug(self, request: plug_pb2.PlugPortRequest) -> plug_pb2.PlugPortResponse:
        """Answer PlugPort.

        When it fails, or its caller goes away, there is no link, or one that the next PlugPort finds.
        """
        async with self._locks.of(request.name):
            # The effect and its record belong together, whatever the caller does meanwhile.
            return await asyncio.shield(asyncio.ensure_future(self._plug(request)))

    async def _plug(self, request: plug_pb2.PlugPortRequest) -> plug_pb2.PlugPortResponse:
        port = records.port_of(self._store.need(request.name))
        network = records.network_of(self._store.need(names.parent_of(request.name)))
        status = port.status
        for holder in (status.owner, status.holder):
            if holder.domain_uid and holder.domain_uid != request.domain_uid:
                raise ResourceInUse(
                    f"{port.name} is a port of {holder.domain}",
                    resource=port.name,
                    holder=holder.domain,
                    holder_uid=holder.domain_uid,
                )
        if status.state != port_pb2.PORT_STATE_PLUGGED:
            records.refuse_ending(self._store, network)
            link = PortLink(
                port_uid=port.uid,
                interface_name=f"vp-{secrets.token_hex(5)}",
                mac_address=status.mac_address,
                run_as_uid=request.run_as_uid,
                link_up=not port.spec.HasField("link_up") or port.spec.link_up,
            )
            reach("port.plug.begun")
            await self._backend.plug(network.uid, link)
            reach("port.plug.done")
            try:
                port = await self._store.write(lambda tx: self._plugged(tx, request, link))
            except BaseException:
                await self._backend.unplug(network.uid, link)
                raise
        tap = port.status.tap
        return plug_pb2.PlugPortResponse(
            tap=plug_pb2.TapPlug(interface_name=tap.interface_name, bridge_name=tap.bridge_name),
            mac_address=port.status.mac_address,
            mtu_bytes=tap.mtu_bytes,
            addresses=port.status.addresses,
        )

    def _plugged(self, tx: Transaction, request: plug_pb2.PlugPortRequest, link: PortLink) -> port_pb2.Port:
        port = records.port_of(tx.need(request.name))
        network = records.network_of(tx.need(names.parent_of(request.name)))
        # Whoever stops it has looked who is plugged, and will not look again.
        records.refuse_ending(tx, network)
        status, spec = port.status, network.status.active_spec
        status.state = port_pb2.PORT_STATE_PLUGGED
        status.holder.domain, status.holder.domain_uid = request.domain, request.domain_uid
        status.holder.device_id = request.device_id
        status.tap.interface_name, status.tap.bridge_name = link.interface_name, spec.bridge_name
        status.tap.mtu_bytes, status.tap.run_as_uid = spec.mtu_bytes, link.run_as_uid
        tx.put("port", port, cause=_PLUG)
        network.status.connections += 1
        tx.put("network", network, cause=_PLUG)
        self._emit_plug(tx, port, watch_pb2.EVENT_TYPE_PORT_PLUGGED, "PLUGGED", link.interface_name, request.domain_uid)
        return port

    @staticmethod
    def _emit_plug(
        tx: Transaction,
        port: port_pb2.Port,
        kind: watch_pb2.EventType.ValueType,
        reason: str,
        interface_name: str,
        domain_uid: str,
    ) -> None:
        detail = watch_pb2.PortPlugChanged(interface_name=interface_name, domain_uid=domain_uid)
        records.emit(tx, port, kind, reason, f"{port.name}: {interface_name}", plug=detail)

    async def unplug(self, request: plug_pb2.UnplugPortRequest) -> plug_pb2.UnplugPortResponse:
        """Answer UnplugPort."""
        async with self._locks.of(request.name):
            if self._store.get(request.name) is not None:
                await asyncio.shield(asyncio.ensure_future(self._unplug(request)))
        return plug_pb2.UnplugPortResponse()

    async def _unplug(self, request: plug_pb2.UnplugPortRequest) -> None:
        def record(tx: Transaction) -> port_pb2.Port | None:
            port = records.port_of(tx.need(request.name))
            status = port.status
            if status.state != port_pb2.PORT_STATE_PLUGGED:
                return None
            if status.holder.domain_uid != request.domain_uid:
                raise ResourceInUse(
                    f"{port.name} is plugged by {status.holder.domain}", resource=port.name, holder=status.holder.domain
                )
            before = port_pb2.Port()
            before.CopyFrom(port)
            status.state = port_pb2.PORT_STATE_UNPLUGGED
            status.ClearField("holder")
            status.ClearField("plug")
            status.ClearField("conditions")
            tx.put("port", port, cause=_UNPLUG)
            network = records.network_of(tx.need(names.parent_of(request.name)))
            network.status.connections = max(network.status.connections - 1, 0)
            tx.put("network", network, cause=_UNPLUG)
            # The port may be deleted before its link is gone: this remembers whose it was.
            tx.put_record(records.LINKS, port.uid, json.dumps({}).encode())
            name = before.status.tap.interface_name
            self._emit_plug(tx, port, watch_pb2.EVENT_TYPE_PORT_UNPLUGGED, "UNPLUGGED", name, request.domain_uid)
            return before

        before = await self._store.write(record)
        if before is None:
            return
        reach("port.unplug.recorded")
        network = self._store.need(names.parent_of(request.name))
        link = records.link_of(before)
        await self._backend.unplug(network.uid, link)
        self._removals.put_nowait((before.uid, link.interface_name))

    async def forget_removed(self) -> None:
        """Take what is written down about links away once they are gone; runs as long as the service does."""
        while True:
            gone = [await self._removals.get()]
            while not self._removals.empty():
                gone.append(self._removals.get_nowait())
            await self._backend.removed([name for _, name in gone])
            await self._forget_gone(tuple(gone))

    async def _forget_gone(self, gone: tuple[tuple[str, str], ...]) -> None:
        while True:
            try:
                await self._store.write(lambda tx: self._forget(tx, gone))
                return
            except VirtfleetError as error:
                # A full disk; the links are gone, and what is written down about them is no harm.
                _log.warning("links that are gone stay written down for now: %s", error)
                await asyncio.sleep(FORGET_AGAIN_SECONDS)

    @staticmethod
    def _forget(tx: Transaction, gone: tuple[tuple[str, str], ...]) -> None:
        for uid, _ in gone:
            tx.delete_record(records.LINKS, uid)

    def list_plugs(self, parent: str) -> plug_pb2.ListPlugsResponse:
        """Answer ListPlugs."""
        response = plug_pb2.ListPlugsResponse()
        for row in self._store.list("port", parent=parent):
            port = records.port_of(row)
            holder = port.status.owner if port.status.HasField("owner") else port.status.holder
            if holder.domain_uid:
                response.plugs.add(
                    port=port.name,
                    domain_uid=holder.domain_uid,
                    domain=holder.domain,
                    device_id=holder.device_id,
                    plugged=port.status.state == port_pb2.PORT_STATE_PLUGGED,
                    interface_name=port.status.tap.interface_name,
                )
        return response

    def settlements(self) -> dict[str, Handler]:
        """Return how each method's operations are ended that a crash left unfinished."""

        async def settle_create(operation: operations_pb2.Operation, _steps: Sequence[JournalEntry]) -> Commit:
            # The port was made with the record of the operation.
            name = longrunning.metadata_of(operation).target
            if self._store.get(name) is None:
                raise ChangeRolledBack(f"{name} was not made", operation=operation.name)
            return lambda tx: records.port_of(tx.need(name))

        async def settle_delete(_operation: operations_pb2.Operation, _steps: Sequence[JournalEntry]) -> Commit:
            return _empty

        return {_CREATE: settle_create, _DELETE: settle_delete}


def _empty(_tx: Transaction) -> Message:
    return empty_pb2.Empty()

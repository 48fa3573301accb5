"""Leases: what DHCP gave out, as resources that come and go, with an event for each change."""

from __future__ import annotations

import ipaddress
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from virtfleet.network.v1 import network_pb2, watch_pb2
from virtfleet_network import addresses, records
from virtfleet_network.backends.api import LeaseRecord
from virtfleet_service import names, resources
from virtfleet_service.store import Store
from virtfleet_service.transaction import Transaction

__all__ = ["LeaseChanges", "Leases", "compare"]

_GRACE_SECONDS = 2
"""How long an expired lease is left to dnsmasq to remove."""


@dataclass(frozen=True, slots=True)
class LeaseChanges:
    """Is what has happened between two looks."""

    added: tuple[LeaseRecord, ...]
    renewed: tuple[LeaseRecord, ...]
    gone: tuple[str, ...]
    """Addresses."""


def compare(known: Mapping[str, LeaseRecord], found: Iterable[LeaseRecord], now_seconds: float) -> LeaseChanges:
    """Hold the leases that DHCP has against those that are known, by address.

    An address that another guest has now is gone and added. One that has expired counts as gone.
    """
    valid = {item.address: item for item in found if not item.expire_seconds or item.expire_seconds > now_seconds}
    added, renewed, gone = [], [], []
    for address, item in valid.items():
        before = known.get(address)
        if before is None:
            added.append(item)
        elif (before.mac_address, before.client_id) != (item.mac_address, item.client_id):
            gone.append(address)
            added.append(item)
        elif before != item:
            renewed.append(item)
    gone += [address for address in known if address not in valid]
    return LeaseChanges(tuple(added), tuple(renewed), tuple(gone))


class Leases:
    """Keeps leases in the store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def take(self, network_uid: str, found: Sequence[LeaseRecord]) -> None:
        """Record the leases that DHCP of a network has; nothing is written if they are known."""
        row = self._store.get_by_uid("network", network_uid)
        if row is None:
            return
        name = row.name
        known = {lease.status.address: _record(lease) for lease in self._known(name)}
        changes = compare(known, found, time.time())
        if changes.added or changes.renewed or changes.gone:
            await self._store.write(lambda tx: _apply(tx, name, changes))

    def _known(self, network: str) -> list[network_pb2.Lease]:
        return [network_pb2.Lease.FromString(row.body) for row in self._store.list("lease", parent=network)]

    async def sweep(self, node: str) -> None:
        """End leases whose time is over although nobody has removed them, as when the network does not run."""
        now = time.time()
        over: dict[str, list[str]] = {}
        for lease in self._known(node):
            status = lease.status
            if status.HasField("expire_time") and status.expire_time.seconds + _GRACE_SECONDS < now:
                over.setdefault(names.parent_of(lease.name), []).append(status.address)
        for network, gone in over.items():
            changes = LeaseChanges((), (), tuple(gone))
            await self._store.write(lambda tx, network=network, changes=changes: _apply(tx, network, changes))  # type: ignore[misc]  # bound here, not later


def _record(lease: network_pb2.Lease) -> LeaseRecord:
    status = lease.status
    expire = status.expire_time.seconds if status.HasField("expire_time") else 0
    return LeaseRecord(status.address, status.mac_address, status.hostname, status.client_id, expire)


def _name(network: str, address: str) -> str:
    return names.child(network, "leases", addresses.lease_id(ipaddress.ip_address(address)))


def _apply(tx: Transaction, network: str, changes: LeaseChanges) -> None:
    if tx.get(network) is None:
        return
    for address in changes.gone:
        row = tx.get(_name(network, address))
        if row is not None:
            lease = network_pb2.Lease.FromString(row.body)
            expired = lease.status.HasField("expire_time") and lease.status.expire_time.seconds <= time.time() + 1
            reason = "EXPIRED" if expired else "RELEASED"
            tx.delete(row.name, cause=records.OBSERVED)
            _emit(tx, lease, watch_pb2.EVENT_TYPE_LEASE_EXPIRED, reason)
    for item in changes.added:
        lease = network_pb2.Lease()
        resources.create_head(lease, _name(network, item.address), uid=str(uuid.uuid4()))
        _fill(tx, lease, item)
        tx.put("lease", lease, cause=records.OBSERVED)
        _emit(tx, lease, watch_pb2.EVENT_TYPE_LEASE_ADDED, "ADDED")
    for item in changes.renewed:
        row = tx.get(_name(network, item.address))
        if row is not None:
            lease = network_pb2.Lease.FromString(row.body)
            _fill(tx, lease, item)
            tx.put("lease", lease, cause=records.OBSERVED)
            _emit(tx, lease, watch_pb2.EVENT_TYPE_LEASE_RENEWED, "RENEWED")


def _fill(tx: Transaction, lease: network_pb2.Lease, item: LeaseRecord) -> None:
    status = lease.status
    status.mac_address, status.address = item.mac_address, item.address
    status.hostname, status.client_id = item.hostname, item.client_id
    if item.expire_seconds:
        status.expire_time.FromSeconds(item.expire_seconds)
    else:
        status.ClearField("expire_time")
    status.renew_time.CopyFrom(resources.now())
    port = tx.get_record(addresses.MACS, item.mac_address) if item.mac_address else None
    status.port = port.decode() if port is not None else ""


def _emit(tx: Transaction, lease: network_pb2.Lease, kind: watch_pb2.EventType.ValueType, reason: str) -> None:
    status = lease.status
    detail = watch_pb2.LeaseChanged(
        mac_address=status.mac_address, address=status.address, hostname=status.hostname, port=status.port
    )
    if status.HasField("expire_time"):
        detail.expire_time.CopyFrom(status.expire_time)
    who = status.mac_address or status.client_id or "a guest"
    records.emit(tx, lease, kind, reason, f"{who} and {status.address}: {reason.lower()}", lease=detail)

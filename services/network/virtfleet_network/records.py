"""How networks, ports and their events stand in the store, and the plan that a back end gets of them."""

from __future__ import annotations

import json
from collections.abc import Iterable

from virtfleet.network.v1 import network_pb2, port_pb2, watch_pb2
from virtfleet_network import addresses, network_spec
from virtfleet_network.backends.api import HostEntry, Leftover, NetworkPlan, PortLink
from virtfleet_service.errors import ResourceNotFound, WrongState
from virtfleet_service.store import Store
from virtfleet_service.transaction import Row, Transaction

__all__ = [
    "LINKS",
    "OBSERVED",
    "count",
    "emit",
    "is_up",
    "network_of",
    "plan_of",
    "port_of",
    "set_state",
]

OBSERVED = "observed"
"""The cause of changes that no call asked for."""

LINKS = "link"
"""Records.

The uid of a network or port → what may be on the node for it. Written before it is made, removed when it is gone.
"""

DELETING = "deleting"
"""Records: the uid of a network that is being deleted, which takes no new ports."""

STOPPING = "stopping"
"""Records: the uid of a network that is being stopped, into which nothing is plugged any more."""

ENDING = (STOPPING, DELETING)

UP = frozenset({network_pb2.NETWORK_STATE_RUNNING, network_pb2.NETWORK_STATE_DEGRADED})


def network_of(row: Row) -> network_pb2.Network:
    """Return a stored network."""
    return network_pb2.Network.FromString(row.body)


def port_of(row: Row) -> port_pb2.Port:
    """Return a stored port."""
    return port_pb2.Port.FromString(row.body)


def need_network(tx: Transaction, name: str) -> network_pb2.Network:
    """Return a network that must exist and is not being deleted.

    Raises:
        ResourceNotFound: There is none.
        WrongState: It is being deleted.
    """
    row = tx.get(name)
    if row is None or row.kind != "network":
        raise ResourceNotFound(f"{name} does not exist", resource=name, name=name)
    if tx.get_record(DELETING, row.uid) is not None:
        raise WrongState(f"{name} is being deleted", resource=name, state="DELETING")
    return network_of(row)


def refuse_ending(reader: Store | Transaction, network: network_pb2.Network) -> None:
    """Accept a network into which may be plugged: one that runs, and is not about to end.

    Raises:
        WrongState: It does not run, or is being stopped or deleted.
    """
    ending = [space.upper() for space in ENDING if reader.get_record(space, network.uid) is not None]
    if ending or not is_up(network):
        raise WrongState(
            f"{network.name} does not run, or is about to end",
            resource=network.name,
            state=ending[0] if ending else state_name(network),
        )


def is_up(network: network_pb2.Network) -> bool:
    """Tell whether a network runs, in whole or in part."""
    return network.status.state in UP


def state_name(network: network_pb2.Network) -> str:
    """Return the state as errors name it."""
    return network_pb2.NetworkState.Name(network.status.state).removeprefix("NETWORK_STATE_")


def set_state(
    network: network_pb2.Network,
    state: network_pb2.NetworkState.ValueType,
    reason: network_pb2.NetworkStateReason.ValueType,
    message: str = "",
) -> None:
    """Set state, reason and message, and what hangs on them."""
    status = network.status
    status.state, status.state_reason, status.state_message = state, reason, message
    if state == network_pb2.NETWORK_STATE_INACTIVE:
        for field in ("active_spec", "start_time", "pending_changes", "conditions"):
            status.ClearField(field)


def set_pending(network: network_pb2.Network, reason: str = "NEEDS_RESTART") -> None:
    """Say which parts of the definition the running network does not have; earlier reasons stay."""
    status = network.status
    before = {change.path: change.reason for change in status.pending_changes}
    del status.pending_changes[:]
    if not is_up(network):
        return
    for path in network_spec.differences(status.active_spec, status.resolved_spec):
        why = before.get(path, reason)
        status.pending_changes.add(path=path, reason=why, message=_PENDING[why])


_PENDING = {
    "NEEDS_RESTART": "takes effect when the network is stopped and started",
    "SCOPE_CONFIG": "was changed in the definition alone, as asked",
    "SCOPE_LIVE": "was changed in the running network alone, as asked",
}


def count(tx: Transaction, network: network_pb2.Network) -> None:
    """Count plugged ports and free addresses into the status."""
    ports = [port_of(row) for row in tx.list("port", parent=network.name)]
    network.status.connections = sum(1 for port in ports if port.status.state == port_pb2.PORT_STATE_PLUGGED)
    network.status.addresses_free = addresses.free_count(tx, network, network.status.resolved_spec)


def emit(
    tx: Transaction,
    resource: network_pb2.Network | port_pb2.Port | network_pb2.Lease,
    kind: watch_pb2.EventType.ValueType,
    reason: str,
    message: str,
    *,
    lease: watch_pb2.LeaseChanged | None = None,
    plug: watch_pb2.PortPlugChanged | None = None,
) -> None:
    """Write an event."""
    event = watch_pb2.Event(resource=resource.name, uid=resource.uid, type=kind, reason=reason, message=message)
    if lease is not None:
        event.lease_changed.CopyFrom(lease)
    if plug is not None:
        event.port_plug_changed.CopyFrom(plug)
    tx.event(event)


def plan_of(network: network_pb2.Network, ports: Iterable[port_pb2.Port]) -> NetworkPlan:
    """Return what a back end has to make of a network: as it runs, or as it would if it were started."""
    spec = network.status.active_spec if network.status.HasField("active_spec") else network.status.resolved_spec
    hosts: dict[tuple[str, str], HostEntry] = {}
    for subnet in spec.subnets.values():
        for host in subnet.dhcp.hosts.values():
            found = (host.address,) if host.address else ()
            hosts[host.mac_address, host.address] = HostEntry(host.mac_address, found, host.hostname)
    links = {}
    for port in ports:
        status = port.status
        # One line for each MAC and family: dnsmasq takes one address of each in a line.
        for address in status.addresses:
            hosts[status.mac_address, address] = HostEntry(status.mac_address, (address,), status.hostname)
        if status.state == port_pb2.PORT_STATE_PLUGGED:
            links[port.uid] = link_of(port)
    return NetworkPlan(network.uid, network.name, spec, tuple(hosts.values()), links)


def link_of(port: port_pb2.Port, run_as_uid: int = 0) -> PortLink:
    """Return the link of a plugged port."""
    return PortLink(
        port_uid=port.uid,
        interface_name=port.status.tap.interface_name,
        mac_address=port.status.mac_address,
        run_as_uid=run_as_uid or port.status.tap.run_as_uid,
        link_up=not port.spec.HasField("link_up") or port.spec.link_up,
    )


def current_plan(store: Store, network: network_pb2.Network) -> NetworkPlan:
    """Return the plan of a network with its ports as they are now."""
    return plan_of(network, [port_of(row) for row in store.list("port", parent=network.name)])


def record_bridge(tx: Transaction, network: network_pb2.Network) -> None:
    """Write down the bridge of a network before it is made."""
    spec = network.status.resolved_spec
    body = {"interface_name": spec.bridge_name, "mac_address": spec.mac_address}
    tx.put_record(LINKS, network.uid, json.dumps(body).encode())


def leftovers(records: Iterable[tuple[str, bytes]], running: frozenset[str]) -> list[Leftover]:
    """Return the recorded owners that should have nothing on the node."""
    return [Leftover(uid, **json.loads(body)) for uid, body in records if uid not in running]

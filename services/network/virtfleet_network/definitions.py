"""Definitions of networks: made, changed, and held against the other networks and the ports of the node."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtfleet.network.v1 import network_pb2, watch_pb2
from virtfleet.type.v1 import resource_pb2
from virtfleet_network import network_spec, records
from virtfleet_network.backends.api import NetworkBackend
from virtfleet_service import masks, names, resources
from virtfleet_service.errors import (
    CapabilityMissing,
    FieldConflict,
    IdentityInUse,
    NotLiveUpdatable,
    ResourceExists,
    ResourceInUse,
    SubnetOverlap,
    WrongState,
)
from virtfleet_service.transaction import Transaction

if TYPE_CHECKING:
    from virtfleet_service.call import Call

__all__ = ["Definitions", "emit_change"]

_METADATA_PATHS = ("display_name", "labels", "annotations", "spec.title", "spec.description")
_LIVE = (resource_pb2.CHANGE_SCOPE_LIVE, resource_pb2.CHANGE_SCOPE_LIVE_AND_CONFIG)


class Definitions:
    """Judges definitions for a back end. Its methods write nothing."""

    def __init__(self, backend: NetworkBackend) -> None:
        self._backend = backend

    def new(self, name: str, given: network_pb2.Network, call: Call) -> network_pb2.Network:
        """Return the network that a request describes, with all that the server decides.

        Raises:
            InvalidArgument: The spec or the uid cannot be used.
            CapabilityMissing: The back end lacks something that the spec needs.
        """
        uid = resources.uid_for(given)
        network = network_pb2.Network()
        network.CopyFrom(given)
        network.ClearField("status")
        check_lifetime(network.spec)
        network.spec.SetInParent()
        network_spec.normalise(network.spec)
        self._check_capabilities(network.spec, name)
        resources.create_head(network, name, call=call, uid=uid)
        network.status.resolved_spec.CopyFrom(network_spec.resolve(network.spec, uid, network_spec.new_mac_address()))
        network.status.bridge_name = network.status.resolved_spec.bridge_name
        network.status.backend = self._backend.id
        network.status.observed_generation = 1
        records.set_state(network, network_pb2.NETWORK_STATE_INACTIVE, network_pb2.NETWORK_STATE_REASON_DEFINED)
        return network

    def _check_capabilities(self, spec: network_pb2.NetworkSpec, name: str) -> None:
        missing = self._backend.missing_capability(spec)
        if missing:
            raise CapabilityMissing(
                f"the back end {self._backend.id} lacks {missing}",
                resource=name,
                capability=missing,
                backend=self._backend.id,
            )

    def check_new(self, tx: Transaction, network: network_pb2.Network) -> None:
        """Hold a new network against what there is.

        Raises:
            ResourceExists: There is one of that name.
            IdentityInUse: Another network has its uid or bridge.
            SubnetOverlap: Another network has a part of one of its subnets.
        """
        if tx.get(network.name) is not None:
            raise ResourceExists(f"{network.name} exists", resource=network.name, name=network.name)
        other = tx.get_by_uid("network", network.uid)
        if other is not None:
            raise IdentityInUse(
                f"{other.name} has the uid {network.uid}", field="network.uid", holder=other.name, uid=network.uid
            )
        self._check_others(tx, network)

    @staticmethod
    def _check_others(tx: Transaction, network: network_pb2.Network) -> None:
        """Hold a definition against those of the other networks of the node."""
        spec = network.status.resolved_spec
        own = network_spec.prefixes(spec)
        for row in tx.list("network", parent=names.parent_of(network.name)):
            if row.uid == network.uid:
                continue
            other = records.network_of(row)
            if other.status.resolved_spec.bridge_name == spec.bridge_name:
                raise IdentityInUse(
                    f"{other.name} has the bridge {spec.bridge_name}",
                    field="network.spec.bridge_name",
                    holder=other.name,
                    bridge_name=spec.bridge_name,
                )
            for theirs in (other.status.resolved_spec, other.status.active_spec):
                found = network_spec.overlapping(own, network_spec.prefixes(theirs))
                if found is not None:
                    raise SubnetOverlap(
                        f"{found[0]} of {network.name} overlaps {found[1]} of {other.name}",
                        resource=network.name,
                        holder=other.name,
                        prefix=found[0],
                        other_prefix=found[1],
                    )

    def apply(self, tx: Transaction, network: network_pb2.Network, request: network_pb2.UpdateNetworkRequest) -> None:
        """Change a network in place as a request says.

        Raises:
            WrongState: The running network alone is to change, and it does not run.
            NotLiveUpdatable: All is to go live, and something cannot: its paths are the violations.
        """
        scope, status = request.scope, network.status
        up = records.is_up(network)
        if scope == resource_pb2.CHANGE_SCOPE_LIVE and not up:
            state = records.state_name(network)
            raise WrongState(f"{network.name} does not run", resource=network.name, state=state)
        wanted = network_pb2.Network()
        wanted.CopyFrom(network)
        changed = masks.apply_update(wanted, request.network, request.update_mask)
        if not changed:
            return
        check_lifetime(wanted.spec)
        if scope == resource_pb2.CHANGE_SCOPE_CONFIG and wanted.spec.lifetime == resource_pb2.LIFETIME_TRANSIENT and up:
            raise WrongState(
                f"{network.name} is transient: it has no definition beside what runs",
                resource=network.name,
                state="TRANSIENT",
            )
        network_spec.normalise(wanted.spec)
        self._check_capabilities(wanted.spec, network.name)
        wanted.status.resolved_spec.CopyFrom(
            network_spec.resolve(wanted.spec, network.uid, status.resolved_spec.mac_address)
        )
        self._check_others(tx, wanted)
        self._check_ports(tx, wanted)
        wanted.status.bridge_name = status.bridge_name if up else wanted.status.resolved_spec.bridge_name
        active = network_spec.with_live_changes(status.active_spec, wanted.status.resolved_spec) if up else None
        if scope in _LIVE and active is not None:
            _refuse_stuck(network, active, wanted.status.resolved_spec)
        reason = "NEEDS_RESTART"
        if scope == resource_pb2.CHANGE_SCOPE_LIVE:
            if any(not path.startswith("spec.") for path in changed):
                raise FieldConflict("scope LIVE changes the spec alone", field="scope", paths=",".join(changed))
            reason = "SCOPE_LIVE"
        else:
            network.CopyFrom(wanted)
            resources.touch(network)
        if scope == resource_pb2.CHANGE_SCOPE_CONFIG:
            reason = "SCOPE_CONFIG"
        elif active is not None:
            network.status.active_spec.CopyFrom(active)
        if not up:
            network.status.observed_generation = network.generation
        records.set_pending(network, reason)

    @staticmethod
    def _check_ports(tx: Transaction, network: network_pb2.Network) -> None:
        """Refuse a definition in which a port would lose its address, or a fixed entry would get it."""
        known = network_spec.prefixes(network.status.resolved_spec)
        fixed = {subnet.host_address: "" for subnet in network.status.resolved_spec.subnets.values()}
        for subnet in network.spec.subnets.values():
            fixed |= {host.address: host.mac_address for host in subnet.dhcp.hosts.values() if host.address}
        for row in tx.list("port", parent=network.name):
            port = records.port_of(row)
            for text in port.status.addresses:
                if not any(network_spec.usable(network_spec.address_of(text), prefix) for prefix in known):
                    raise ResourceInUse(
                        f"{port.name} has {text}, which would be in no subnet", resource=network.name, holder=port.name
                    )
                if fixed.get(text, port.status.mac_address) != port.status.mac_address:
                    raise IdentityInUse(
                        f"{text} is that of {port.name}", field="network.spec.subnets", holder=port.name, address=text
                    )


def check_lifetime(spec: network_pb2.NetworkSpec) -> None:
    """Refuse a transient network that starts by itself: when it could, it is gone.

    Raises:
        FieldConflict: It is to be.
    """
    if spec.lifetime == resource_pb2.LIFETIME_TRANSIENT and spec.autostart > resource_pb2.AUTOSTART_NEVER:
        raise FieldConflict("a transient network has no autostart", field="network.spec.autostart")


def _refuse_stuck(
    network: network_pb2.Network, active: network_pb2.NetworkSpec, wanted: network_pb2.NetworkSpec
) -> None:
    """Refuse a change that would not go live; what was pending before it does not count."""
    asked = set(network_spec.differences(network.status.resolved_spec, wanted))
    refused = [path for path in network_spec.differences(active, wanted) if path in asked]
    if refused:
        raise NotLiveUpdatable(
            f"{network.name} cannot change while it runs: {', '.join(refused)}",
            resource=network.name,
            violations=[(f"network.{path}", "needs a stop and a start") for path in refused],
            paths=",".join(refused),
        )


def emit_change(tx: Transaction, before: network_pb2.Network, network: network_pb2.Network) -> None:
    """Write the event of a changed definition, if it has changed."""
    paths = [
        path
        for path in masks.diff(before, network)
        if not path.startswith(("status", "generation", "etag", "update_time"))
    ]
    if not paths:
        return
    metadata = all(path.startswith(_METADATA_PATHS) for path in paths)
    kind = watch_pb2.EVENT_TYPE_NETWORK_METADATA_CHANGED if metadata else watch_pb2.EVENT_TYPE_NETWORK_DEFINED
    records.emit(tx, network, kind, "UPDATED", f"{network.name} was changed: {', '.join(paths[:8])}")

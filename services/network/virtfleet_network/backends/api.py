"""What a back end of networks promises.

A back end gets a `NetworkPlan` (the API's own resolved spec and what the service adds to it) and makes the node
fit. It knows no store, no gRPC, no other back end. Every method may be repeated, may be cancelled at each await,
and says what holds when it fails.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from virtfleet.network.v1 import network_pb2

__all__ = [
    "BackendReport",
    "Drift",
    "DriftKind",
    "HostEntry",
    "LeaseRecord",
    "Leftover",
    "Listener",
    "NetworkBackend",
    "NetworkPlan",
    "PortLink",
    "Prior",
]


@dataclass(frozen=True, slots=True)
class HostEntry:
    """Is a guest that DHCP knows beforehand: a port, or a fixed entry of the spec."""

    mac_address: str
    addresses: tuple[str, ...]
    hostname: str = ""


@dataclass(frozen=True, slots=True)
class PortLink:
    """Is the link of one plugged port."""

    port_uid: str
    interface_name: str
    mac_address: str
    run_as_uid: int = 0
    link_up: bool = True


@dataclass(frozen=True, slots=True)
class NetworkPlan:
    """Is all that a running network consists of.

    `spec` is resolved: bridge name, MAC, MTU, host addresses and the forward kind are set.
    """

    uid: str
    name: str
    spec: network_pb2.NetworkSpec
    hosts: tuple[HostEntry, ...] = ()
    links: Mapping[str, PortLink] = field(default_factory=dict)
    """By the uid of the port."""


@dataclass(frozen=True, slots=True)
class BackendReport:
    """Says whether a back end can run here.

    `problem` is empty when it can, else a sentence; `cause` is a stable word for it: `NFT_MISSING`,
    `DNSMASQ_MISSING`, `NOT_PERMITTED`.
    """

    capabilities: frozenset[str]
    cause: str = ""
    problem: str = ""


class DriftKind(Enum):
    """Says what somebody else changed; the names are the reasons of the events."""

    LINK_LOST = "the link was gone"
    LINK_CHANGED = "the link had other settings"
    ADDRESS_LOST = "an address or route was gone"
    RULES_CHANGED = "the packet filter rules were not ours"
    FORWARDING_DISABLED = "the kernel did not forward"
    DAEMON_DIED = "the DHCP and DNS server had died"


@dataclass(frozen=True, slots=True)
class Drift:
    """Is one thing that was not as planned.

    Either it is mended (`problem` empty), or `problem` says why it could not be.
    """

    network_uid: str
    kind: DriftKind
    subject: str
    port_uid: str = ""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Leftover:
    """Names the owner of links that should not be there.

    For a network `interface_name` and `mac_address` are those of its bridge; for a port both are empty, and every link
    with its mark is meant that no plan has.
    """

    uid: str
    interface_name: str = ""
    mac_address: str = ""


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """Is one lease as the DHCP server has it now."""

    address: str
    mac_address: str
    hostname: str
    client_id: str
    expire_seconds: int
    """Unix time; 0: never."""


@dataclass(slots=True)
class Prior:
    """Is what the node had before the back end changed it.

    A setting → its value. The service keeps it, so that it can be set back.

    A back end notes, awaits `save`, and only then changes.
    """

    save: Callable[[], Awaitable[None]]
    values: dict[str, str] = field(default_factory=dict)


class Listener(Protocol):
    """Is told what a back end notices. Its methods are called on the loop and return at once."""

    def leases_changed(self, network_uid: str, leases: Sequence[LeaseRecord]) -> None:
        """Take all leases of a network; the same ones may come again."""

    def something_changed(self) -> None:
        """Take that `repair` has something to look at."""

    def daemon_restarted(self, network_uid: str, detail: str) -> None:
        """Take that the DHCP and DNS server of a network died and has been started again."""

    def daemon_failed(self, network_uid: str, detail: str) -> None:
        """Take that the DHCP and DNS server of a network died and could not be started again yet.

        The back end goes on trying.
        """


class NetworkBackend(Protocol):
    """Runs networks of some kinds."""

    @property
    def id(self) -> str:
        """The name in `status.backend` and in the registry."""

    async def open(self, listener: Listener, prior: Prior) -> None:
        """Begin to watch the node; changes nothing on it."""

    async def close(self) -> None:
        """End all that runs in this process. Networks run on."""

    async def probe(self) -> BackendReport:
        """Find out whether the back end can run here. Never raises for a missing part."""

    def missing_capability(self, spec: network_pb2.NetworkSpec) -> str:
        """Return the id of the first capability that the spec needs and the back end lacks; empty: it can run it."""

    async def check(self, plan: NetworkPlan) -> None:
        """Look for what on the node stands against a start; changes nothing.

        Raises:
            IdentityInUse: The bridge name is taken by a link that is not this network's.
            SubnetOverlap: The node has an address or route in one of the subnets.
            DriverBroken: A part of the node that it needs is missing.
        """

    async def start(self, plan: NetworkPlan) -> None:
        """Make all of the plan. Succeeds if it is there. When it fails nothing of it is left.

        Raises:
            IdentityInUse, SubnetOverlap, DriverBroken: as `check`.
            BackendFailed: The kernel or a tool refused.
        """

    async def adopt(self, plans: Sequence[NetworkPlan]) -> None:
        """Take networks that ran before this process as they are; changes nothing until `repair`."""

    async def update(self, plan: NetworkPlan) -> None:
        """Bring a running network to a plan that differs only in what can change live.

        That is: hosts, ranges, DNS, the domain, lease times.

        Raises:
            BackendFailed: The new plan is kept and tried again by `repair`.
        """

    async def stop(self, plan: NetworkPlan) -> None:
        """Remove all of the network but the leases' history.

        Succeeds if nothing is there. May be repeated after a failure.

        Raises:
            BackendFailed: The kernel or a tool refused; some of it may be left.
        """

    async def forget(self, network_uid: str) -> None:
        """Remove what is kept of a stopped network over its stop: its leases."""

    async def plug(self, network_uid: str, link: PortLink) -> None:
        """Make the link of a port and join it to the network. Succeeds if it is there. When it fails nothing is left.

        Raises:
            BackendFailed: The kernel refused.
        """

    async def unplug(self, network_uid: str, link: PortLink) -> None:
        """Give the link of a port up. Succeeds if there is none. Answers before the kernel has finished."""

    async def removed(self, interface_names: Sequence[str]) -> None:
        """Return when none of these given-up links exists any more."""

    async def remove_leftovers(self, leftovers: Sequence[Leftover]) -> None:
        """Remove what this service made and no plan has, after a crash.

        What was not recorded, or is not marked as recorded, stays.
        """

    async def repair(self) -> Sequence[Drift]:
        """Hold the node against all plans and mend what differs; returns what it found."""

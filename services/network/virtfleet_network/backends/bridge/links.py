"""Bridges, their addresses and routes, and taps: what is there, what should be, and the steps between.

Everything here runs in a `NetlinkThread`. A link that is ours carries `virtfleet:` and the uid of its network or
port as its alias; nothing without that mark is ever changed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import os
import secrets
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network
from pathlib import Path
from typing import TYPE_CHECKING

from virtfleet_network.backends.api import DriftKind, PortLink
from virtfleet_network.backends.bridge.link_message import (
    change_link,
    delete_group,
    delete_link,
    find_link,
    group_link,
)
from virtfleet_service.errors import IdentityInUse

if TYPE_CHECKING:
    from pyroute2 import IPRoute  # type: ignore[import-untyped]  # it has no types

__all__ = [
    "ALIAS_PREFIX",
    "BridgeSettings",
    "Link",
    "RouteSettings",
    "Snapshot",
    "bridge_differences",
    "delete_bridge",
    "delete_links",
    "delete_links_of",
    "ensure_links",
    "make_bridge",
    "make_tap",
    "overlaps",
    "set_tap",
    "take_snapshot",
    "tap_differences",
]

ALIAS_PREFIX = "virtfleet:"

# linux/if_tun.h
_TUNSETIFF, _TUNSETPERSIST, _TUNSETOWNER = 0x400454CA, 0x400454CB, 0x400454CC
# As the launcher opens it: a tap without packet information, with the virtio header that QEMU's offloads need.
_TAP_FLAGS = 0x0002 | 0x1000 | 0x4000

_IFA_F_NODAD = 0x02
_MAIN_TABLE = 254
_IFF_UP = 1

Interface = IPv4Interface | IPv6Interface
Prefix = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class RouteSettings:
    """Is a route through a host of the network."""

    prefix: Prefix
    gateway: str
    metric: int = 0


@dataclass(frozen=True, slots=True)
class BridgeSettings:
    """Is all that the bridge of a network must be."""

    network_uid: str
    name: str
    mac_address: str
    mtu_bytes: int
    addresses: tuple[Interface, ...]
    routes: tuple[RouteSettings, ...]
    isolated_ports: bool

    @property
    def alias(self) -> str:
        """The mark of the bridge."""
        return ALIAS_PREFIX + self.network_uid

    @property
    def has_ipv6(self) -> bool:
        """Whether a subnet is an IPv6 one."""
        return any(address.version == 6 for address in self.addresses)


@dataclass(frozen=True, slots=True)
class Link:
    """Is a link as the kernel has it."""

    index: int
    name: str
    alias: str
    kind: str
    mac_address: str
    mtu_bytes: int
    up: bool
    master: int
    isolated: bool = False
    """Whether, as the port of a bridge, it reaches no other isolated one."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Is what the kernel has at a moment."""

    links: Mapping[str, Link]
    addresses: tuple[tuple[int, Interface], ...]
    """The index of the link, and the address with its prefix."""
    routes: tuple[tuple[int, Prefix, str], ...]
    """The index of the link, where it leads, and the gateway (or an empty string), of the main table."""

    def addresses_of(self, index: int) -> set[Interface]:
        """Return the addresses of a link."""
        return {address for owner, address in self.addresses if owner == index}

    def routes_of(self, index: int) -> set[tuple[Prefix, str]]:
        """Return the routes over a link."""
        return {(prefix, gateway) for owner, prefix, gateway in self.routes if owner == index}


def take_snapshot(ipr: IPRoute) -> Snapshot:
    """Read links, addresses and routes."""
    links = {}
    for message in ipr.get_links():
        name = message.get("ifname")
        links[name] = Link(
            index=message["index"],
            name=name,
            alias=message.get("ifalias") or "",
            kind=message.get(("linkinfo", "kind")) or "",
            mac_address=message.get("address") or "",
            mtu_bytes=message.get("mtu") or 0,
            up=bool(message["flags"] & _IFF_UP),
            master=message.get("master") or 0,
            isolated=bool(message.get(("linkinfo", "slave_data", "IFLA_BRPORT_ISOLATED"))),
        )
    addresses = []
    for message in ipr.get_addr():
        address = message.get("local") or message.get("address")
        if address:
            addresses.append((message["index"], ipaddress.ip_interface(f"{address}/{message['prefixlen']}")))
    routes = []
    for message in ipr.get_routes(table=_MAIN_TABLE):
        destination, index = message.get("dst"), message.get("oif")
        if destination and index:
            prefix = ipaddress.ip_network(f"{destination}/{message['dst_len']}", strict=False)
            routes.append((index, prefix, message.get("gateway") or ""))
    return Snapshot(links, tuple(addresses), tuple(routes))


def _set_sysctl(interface: str, name: str, value: int) -> None:
    # The kernel may be without IPv6; then there is nothing to set.
    path = Path(f"/proc/sys/net/ipv6/conf/{interface}/{name}")
    if path.exists():
        path.write_text(f"{value}\n")


def make_bridge(ipr: IPRoute, settings: BridgeSettings) -> int:
    """Make a bridge with its mark, addresses and routes; returns its index. A link of that name must not exist."""
    # With its MAC from the first moment: until the alias is set that is the mark.
    ipr.link(
        "add", ifname=settings.name, kind="bridge", address=settings.mac_address, br_stp_state=0, br_forward_delay=0
    )
    index: int = ipr.link_lookup(ifname=settings.name)[0]
    set_bridge(ipr, index, settings)
    return index


def set_bridge(ipr: IPRoute, index: int, settings: BridgeSettings) -> None:
    """Bring an existing bridge of ours to its settings; may be repeated."""
    # Part of nothing else: its packets would pass our rules by.
    ipr.link("set", index=index, ifalias=settings.alias, mtu=settings.mtu_bytes, address=settings.mac_address, master=0)
    _set_sysctl(settings.name, "disable_ipv6", 0 if settings.has_ipv6 else 1)
    if settings.has_ipv6:
        # Nobody else can have our address; and on a bridge without guests a check would never end.
        _set_sysctl(settings.name, "accept_dad", 0)
        _set_sysctl(settings.name, "accept_ra", 0)
        _set_sysctl(settings.name, "autoconf", 0)
    ipr.link("set", index=index, state="up")
    add_addresses(ipr, index, settings.addresses)
    add_routes(ipr, index, settings.routes)


def add_addresses(ipr: IPRoute, index: int, addresses: Iterable[Interface]) -> None:
    """Add addresses to a link; one that is there is left."""
    for address in addresses:
        more = (
            {"flags": _IFA_F_NODAD} if address.version == 6 else {"broadcast": str(address.network.broadcast_address)}
        )
        ipr.addr("replace", index=index, address=str(address.ip), prefixlen=address.network.prefixlen, **more)


def add_routes(ipr: IPRoute, index: int, routes: Iterable[RouteSettings]) -> None:
    """Add routes over a link; one that is there is left."""
    for route in routes:
        more = {"priority": route.metric} if route.metric else {}
        ipr.route("replace", dst=str(route.prefix), gateway=route.gateway, oif=index, **more)


def delete_bridge(ipr: IPRoute, name: str, network_uid: str, mac_address: str) -> bool:
    """Remove the bridge of a network; False if it is not there. One that is not this network's is left."""
    link = take_snapshot(ipr).links.get(name)
    if link is None or not _is_bridge_of(link, network_uid, mac_address):
        return False
    with _gone_is_fine():
        ipr.link("del", index=link.index)
    return True


def _is_bridge_of(link: Link, network_uid: str, mac_address: str) -> bool:
    unmarked = not link.alias and link.kind == "bridge" and bool(mac_address) and link.mac_address == mac_address
    return link.alias == ALIAS_PREFIX + network_uid or unmarked


@contextlib.contextmanager
def _gone_is_fine() -> Iterator[None]:
    from pyroute2.netlink.exceptions import NetlinkError  # type: ignore[import-untyped]  # it has no types

    try:
        yield
    except NetlinkError as error:
        if abs(int(error.code)) != errno.ENODEV:
            raise
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise


def make_tap(ipr: IPRoute, link: PortLink, bridge: BridgeSettings) -> None:
    """Make the persistent tap of a port and join it to a bridge. Succeeds if it is there.

    It becomes persistent as the last step: whoever dies before leaves nothing.
    """
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        request = struct.pack("16sH22x", link.interface_name.encode(), _TAP_FLAGS)
        try:
            fcntl.ioctl(descriptor, _TUNSETIFF, request)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            # A guest has it open: it exists, and only its place is to be checked.
            set_tap(ipr, link, bridge)
            return
        # Without an owner any user that can open /dev/net/tun could attach to it.
        fcntl.ioctl(descriptor, _TUNSETOWNER, link.run_as_uid)
        set_tap(ipr, link, bridge)
        fcntl.ioctl(descriptor, _TUNSETPERSIST, 1)
    finally:
        os.close(descriptor)


def set_tap(ipr: IPRoute, link: PortLink, bridge: BridgeSettings) -> None:
    """Bring a tap to its settings and its place on the bridge; may be repeated."""
    index, master = (_index(name) for name in (link.interface_name, bridge.name))
    _set_sysctl(link.interface_name, "disable_ipv6", 1)
    change_link(
        index,
        alias=ALIAS_PREFIX + link.port_uid,
        mtu_bytes=bridge.mtu_bytes,
        master_index=master,
        up=link.link_up,
    )
    if bridge.isolated_ports:
        ipr.brport("set", index=index, isolated=1)


def _index(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError as error:
        # The kernel's call gives no name, and a missing bridge is told by it.
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), name) from error


def delete_links(_ipr: IPRoute, owners: Mapping[str, str]) -> None:
    """Remove taps by name; those that are not there, or are not of the port that is named with them, are left.

    The kernel takes 20 ms for a removal, however many links it takes at once: they are put into a group and removed
    as one.

    Args:
        _ipr: Not needed: as all that runs in a `NetlinkThread`.
        owners: The name of a link → the uid of its port.
    """
    found = {name: find_link(name) for name in owners}
    ours = [
        there[0]
        for name, port_uid in owners.items()
        if (there := found[name]) is not None and there[1] == ALIAS_PREFIX + port_uid
    ]
    if len(ours) <= 1:
        for index in ours:
            with _gone_is_fine():
                delete_link(index)
        return
    # Nobody else has a group of this number, but for one chance in 2^30.
    group = secrets.randbits(30) | (1 << 30)
    for index in ours:
        with _gone_is_fine():
            group_link(index, group)
    with _gone_is_fine():
        delete_group(group)


def delete_links_of(ipr: IPRoute, port_uids: frozenset[str], keep: frozenset[str]) -> None:
    """Remove the links that carry the mark of one of these ports, except those with a name to keep."""
    marks = {ALIAS_PREFIX + uid: uid for uid in port_uids}
    found = take_snapshot(ipr).links.values()
    delete_links(ipr, {link.name: marks[link.alias] for link in found if link.alias in marks and link.name not in keep})


def ensure_links(
    ipr: IPRoute, settings: BridgeSettings, port_links: Iterable[PortLink]
) -> tuple[int, list[tuple[DriftKind, str, str]]]:
    """Make what is missing of a bridge and of the taps on it, and set right what differs.

    Returns:
        The index of the bridge, and what was not as it should be: kind, name of the link, uid of the port or an
        empty string.

    Raises:
        IdentityInUse: Another link has the name of the bridge.
    """
    snapshot = take_snapshot(ipr)
    found: list[tuple[DriftKind, str, str]] = []
    gone, changed, missing = bridge_differences(settings, snapshot)
    if gone:
        there = snapshot.links.get(settings.name)
        if there is None:
            make_bridge(ipr, settings)
        elif _is_bridge_of(there, settings.network_uid, settings.mac_address):
            set_bridge(ipr, there.index, settings)
        else:
            raise IdentityInUse(
                f"the node has another link {settings.name} now", holder=settings.name, bridge_name=settings.name
            )
        found.append((DriftKind.LINK_LOST, settings.name, ""))
        snapshot = take_snapshot(ipr)
    elif changed or missing:
        set_bridge(ipr, snapshot.links[settings.name].index, settings)
        found += [(DriftKind.LINK_CHANGED, settings.name, "")] if changed else []
        found += [(DriftKind.ADDRESS_LOST, settings.name, "")] if missing else []
    for link in port_links:
        gone, changed = tap_differences(link, settings, snapshot)
        if gone:
            make_tap(ipr, link, settings)
            found.append((DriftKind.LINK_LOST, link.interface_name, link.port_uid))
        elif changed:
            set_tap(ipr, link, settings)
            if not settings.isolated_ports:
                ipr.brport("set", index=_index(link.interface_name), isolated=0)
            found.append((DriftKind.LINK_CHANGED, link.interface_name, link.port_uid))
    return snapshot.links[settings.name].index, found


def bridge_differences(settings: BridgeSettings, snapshot: Snapshot) -> tuple[bool, bool, bool]:
    """Hold a bridge against its settings.

    Returns:
        Whether it is gone (or another link has its name), whether its settings differ, and whether addresses or
        routes are missing.
    """
    link = snapshot.links.get(settings.name)
    if link is None or link.alias != settings.alias:
        return True, False, False
    changed = not link.up or link.mtu_bytes != settings.mtu_bytes or link.mac_address != settings.mac_address
    changed = changed or link.master != 0
    addresses = snapshot.addresses_of(link.index)
    routes = snapshot.routes_of(link.index)
    missing = any(address not in addresses for address in settings.addresses) or any(
        (route.prefix, route.gateway) not in routes for route in settings.routes
    )
    return False, changed, missing


def tap_differences(link: PortLink, bridge: BridgeSettings, snapshot: Snapshot) -> tuple[bool, bool]:
    """Hold a tap against its settings.

    Returns:
        Whether it is gone, and whether its settings differ.
    """
    tap = snapshot.links.get(link.interface_name)
    if tap is None or tap.alias != ALIAS_PREFIX + link.port_uid:
        return True, False
    master = snapshot.links.get(bridge.name)
    joined = master is not None and tap.master == master.index and tap.isolated == bridge.isolated_ports
    return False, not joined or tap.up != link.link_up or tap.mtu_bytes != bridge.mtu_bytes


def overlaps(
    prefixes: Sequence[Prefix], snapshot: Snapshot, own_names: frozenset[str]
) -> tuple[Prefix, Prefix, str] | None:
    """Find what of the node lies in one of the prefixes, apart from some links.

    Default routes lie in everything and do not count.

    Returns:
        The prefix, what overlaps it, and the name of the link that has it; None: nothing.
    """
    names = {link.index: link.name for link in snapshot.links.values()}
    taken: list[tuple[int, Prefix]] = [(index, address.network) for index, address in snapshot.addresses]
    taken += [(index, prefix) for index, prefix, _ in snapshot.routes]
    for prefix in prefixes:
        for index, other in taken:
            name = names.get(index, "")
            if name in own_names or other.prefixlen == 0 or other.version != prefix.version or other.is_link_local:
                continue
            if other.overlaps(prefix):
                return prefix, other, name
    return None

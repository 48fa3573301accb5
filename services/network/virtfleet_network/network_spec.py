"""The spec of a network.

What is allowed in it, what the server decides, and what of it can change while it runs. Pure.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TypeVar

from virtfleet.network.v1 import network_pb2
from virtfleet_service import masks
from virtfleet_service.errors import FieldConflict, FieldOutOfRange, FieldRequired

__all__ = ["differences", "new_mac_address", "normalise", "prefixes", "resolve", "usable", "with_live_changes"]

INTERFACE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,14}")
DEFAULT_MTU_BYTES = 1500
_LARGEST_MTU_BYTES = 65521
"""Of a tap; a bridge takes a little more."""

DEFAULT_LEASE_SECONDS = 3600
_SMALLEST_IPV4, _SMALLEST_IPV6, _LARGEST_IPV6_WITH_DHCP = 30, 126, 64

_IPV4_IN_IPV6 = IPv6Network("::ffff:0:0/96")
"""How sockets show IPv4 addresses: nobody can listen to one of these."""

Address = IPv4Address | IPv6Address
Prefix = IPv4Network | IPv6Network


def new_mac_address() -> str:
    """Return a random MAC of the range that virtual machines use."""
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in secrets.token_bytes(3))


def prefixes(spec: network_pb2.NetworkSpec) -> list[Prefix]:
    """Return the prefixes of all subnets of a checked spec."""
    return [ipaddress.ip_network(subnet.prefix) for _, subnet in sorted(spec.subnets.items())]


def address_of(text: str) -> Address:
    """Return a checked address."""
    return ipaddress.ip_address(text)


def usable(address: Address, prefix: Prefix) -> bool:
    """Tell whether a host in the prefix can have an address."""
    inside = address in prefix and address != prefix.network_address
    return inside and not (prefix.version == 4 and address == prefix.broadcast_address)


def normalise(spec: network_pb2.NetworkSpec, field: str = "network.spec") -> None:
    """Check a spec and bring its addresses to their canonical form, in place.

    Args:
        spec: The spec; the rules in the proto hold already.
        field: The path of the spec in the request.

    Raises:
        FieldRequired: Something that the rest needs is unset.
        FieldOutOfRange: A value cannot be used.
        FieldConflict: Two values exclude each other, as two subnets that overlap do.
    """
    if spec.HasField("bridge_name") and (
        not INTERFACE_NAME.fullmatch(spec.bridge_name) or spec.bridge_name in ("lo", "all", "default")
    ):
        raise FieldOutOfRange(
            f"`{spec.bridge_name}` cannot be the name of a link: 1 to 15 characters of A-Z, a-z, 0-9, `.`, `_` and `-`",
            field=f"{field}.bridge_name",
            bridge_name=spec.bridge_name,
            limit_characters=15,
        )
    if spec.HasField("mac_address"):
        check_mac_address(spec.mac_address, f"{field}.mac_address")
    if spec.mtu_bytes > _LARGEST_MTU_BYTES:
        raise _bad(
            f"{field}.mtu_bytes", f"no guest can be joined by more than {_LARGEST_MTU_BYTES}", limit=_LARGEST_MTU_BYTES
        )
    _normalise_forward(spec, field)
    _check_source_addresses(spec, field)
    known: dict[str, Prefix] = {}
    for key, subnet in sorted(spec.subnets.items()):
        prefix = _normalise_subnet(subnet, f"{field}.subnets.{key}")
        for other_key, other in known.items():
            if prefix.version == other.version and prefix.overlaps(other):
                raise FieldConflict(
                    f"subnet {key} ({prefix}) overlaps subnet {other_key} ({other}) of the same network",
                    field=f"{field}.subnets.{key}.prefix",
                    prefix=prefix,
                    other_prefix=other,
                )
        known[key] = prefix
    _check_announcements(spec, field)
    _check_hosts(spec, field)
    _normalise_routes(spec, list(known.values()), field)
    _normalise_dns(spec, field)


def check_mac_address(mac_address: str, field: str) -> None:
    """Refuse MACs that a single host cannot have.

    Raises:
        FieldOutOfRange: It is a group's, or all zeros.
    """
    if int(mac_address[:2], 16) & 1 or mac_address == "00:00:00:00:00:00":
        raise FieldOutOfRange(f"{mac_address} is not the MAC of a single host", field=field, mac_address=mac_address)


def check_address(text: str, field: str) -> Address:
    """Read an address that a caller gave.

    Raises:
        FieldOutOfRange: It has a zone (`fe80::1%eth0`).
    """
    # The rule in the proto lets any text pass behind the `%`, ends of lines too; nft and dnsmasq would read it.
    if "%" in text:
        raise _bad(field, f"`{field}` must be an address without a zone")
    return ipaddress.ip_address(text)


def _address(text: str, field: str) -> Address:
    if not text:
        raise FieldRequired(f"`{field}` is needed", field=field)
    return check_address(text, field)


def _bad(field: str, message: str, **variables: object) -> FieldOutOfRange:
    return FieldOutOfRange(message, **{"field": field, **variables})  # type: ignore[arg-type]  # the variables are metadata


def _normalise_forward(spec: network_pb2.NetworkSpec, field: str) -> None:
    kind = spec.WhichOneof("forward")
    if kind not in ("nat", "routed"):
        return
    interface = spec.nat.interface_name if kind == "nat" else spec.routed.interface_name
    if interface and not INTERFACE_NAME.fullmatch(interface):
        place = f"{field}.{kind}.interface_name"
        raise _bad(place, f"`{interface}` cannot be the name of a link", interface_name=interface)
    if kind != "nat":
        return
    if spec.nat.HasField("addresses"):
        _normalise_range(spec.nat.addresses, f"{field}.nat.addresses")
    ports = spec.nat.ports
    if spec.nat.HasField("ports") and (not ports.first or (ports.HasField("last") and ports.last < ports.first)):
        raise _bad(f"{field}.nat.ports", "the ports must have a first, and a last that is not less")


def _check_source_addresses(spec: network_pb2.NetworkSpec, field: str) -> None:
    """Refuse addresses of a family in which nobody would ever leave the network under them."""
    if not spec.nat.HasField("addresses") or not spec.subnets:
        return
    version = ipaddress.ip_address(spec.nat.addresses.first).version
    if not any((":" in subnet.prefix) == (version == 6) for subnet in spec.subnets.values()):
        raise FieldConflict(
            f"the network has no IPv{version} subnet whose guests could leave it under these addresses",
            field=f"{field}.nat.addresses",
        )


def _normalise_range(item: network_pb2.AddressRange, field: str) -> tuple[Address, Address]:
    first = _address(item.first, f"{field}.first")
    last = _address(item.last, f"{field}.last")
    if first.version != last.version or first > last:  # type: ignore[operator]  # the versions are equal
        raise _bad(field, f"{first} to {last} is no range", first=first, last=last)
    item.first, item.last = str(first), str(last)
    return first, last


def _normalise_subnet(subnet: network_pb2.Subnet, field: str) -> Prefix:
    if not subnet.prefix:
        raise FieldRequired(f"`{field}.prefix` is needed", field=f"{field}.prefix")
    place = f"{field}.prefix"
    try:
        prefix = ipaddress.ip_network(subnet.prefix)
    except ValueError:
        wanted = ipaddress.ip_network(subnet.prefix, strict=False)
        raise _bad(place, f"{subnet.prefix} has host bits; the prefix is {wanted}", prefix=wanted) from None
    smallest = _SMALLEST_IPV4 if prefix.version == 4 else _SMALLEST_IPV6
    if prefix.prefixlen > smallest or prefix.prefixlen < 8:
        raise _bad(place, f"{prefix} must have a length of 8 to {smallest}", prefix=prefix)
    special = prefix.is_multicast or prefix.is_loopback or prefix.is_link_local or prefix.network_address.is_unspecified
    if special or (prefix.version == 6 and prefix.overlaps(_IPV4_IN_IPV6)):
        raise _bad(place, f"{prefix} is not for hosts of a network", prefix=prefix)
    subnet.prefix = str(prefix)
    if subnet.HasField("host_address"):
        host = _address(subnet.host_address, f"{field}.host_address")
        if not usable(host, prefix):
            raise _bad(f"{field}.host_address", f"{host} is no address in {prefix}", prefix=prefix, address=host)
        subnet.host_address = str(host)
    if subnet.HasField("router_advertisement") and prefix.version == 4:
        raise FieldConflict(
            "router advertisements are of IPv6 subnets only", field=f"{field}.router_advertisement", prefix=prefix
        )
    if subnet.HasField("dhcp"):
        _normalise_dhcp(subnet.dhcp, prefix, f"{field}.dhcp")
    if prefix.version == 6:
        _check_announced(subnet, prefix, place)
    return prefix


def _check_announced(subnet: network_pb2.Subnet, prefix: Prefix, place: str) -> None:
    served = subnet.HasField("dhcp")
    if prefix.prefixlen < _LARGEST_IPV6_WITH_DHCP and (served or announced(subnet)):
        raise _bad(place, f"{prefix} is too large for DHCP and router advertisements: at most a /64", prefix=prefix)
    if prefix.prefixlen > _LARGEST_IPV6_WITH_DHCP and announced(subnet) and not served:
        raise _bad(
            place,
            f"{prefix} is too small for router advertisements without DHCP: guests make addresses in a /64 only",
            prefix=prefix,
        )


def announced(subnet: network_pb2.Subnet) -> bool:
    """Tell whether router advertisements are sent in a subnet."""
    wanted = not subnet.router_advertisement.HasField("enabled") or subnet.router_advertisement.enabled
    return ":" in subnet.prefix and wanted


def _normalise_dhcp(dhcp: network_pb2.Dhcp, prefix: Prefix, field: str) -> None:
    taken: list[tuple[Address, Address]] = []
    for index, item in enumerate(dhcp.ranges):
        place = f"{field}.ranges[{index}]"
        first, last = _normalise_range(item, place)
        if not usable(first, prefix) or not usable(last, prefix):
            raise _bad(place, f"{first} to {last} is not in {prefix}", prefix=prefix, first=first, last=last)
        for low, high in taken:
            if first <= high and low <= last:  # type: ignore[operator]  # all are in one prefix
                raise FieldConflict(
                    f"the range {first} to {last} overlaps another one", field=place, first=first, last=last
                )
        taken.append((first, last))
    for key, host in sorted(dhcp.hosts.items()):
        place = f"{field}.hosts.{key}"
        if not host.mac_address:
            raise FieldRequired(f"`{place}.mac_address` is needed", field=f"{place}.mac_address")
        check_mac_address(host.mac_address, f"{place}.mac_address")
        if host.HasField("address"):
            address = _address(host.address, f"{place}.address")
            if not usable(address, prefix):
                raise _bad(f"{place}.address", f"{address} is no address in {prefix}", prefix=prefix, address=address)
            host.address = str(address)
    if dhcp.HasField("bootp"):
        _check_boot(dhcp.bootp, prefix, f"{field}.bootp")


def _check_boot(bootp: network_pb2.Bootp, prefix: Prefix, field: str) -> None:
    if prefix.version == 6:
        raise FieldConflict("bootp is of IPv4 subnets only", field=field, prefix=prefix)
    if not bootp.file_name:
        raise FieldRequired("a boot over the network needs a file", field=f"{field}.file_name")


def _check_announcements(spec: network_pb2.NetworkSpec, field: str) -> None:
    # dnsmasq announces in all subnets that it serves or in none.
    silent = [key for key, subnet in sorted(spec.subnets.items()) if ":" in subnet.prefix and not announced(subnet)]
    if silent and any(announced(subnet) for subnet in spec.subnets.values()):
        raise FieldConflict(
            "router advertisements are sent in all IPv6 subnets of a network or in none",
            field=f"{field}.subnets.{silent[0]}.router_advertisement",
        )


def _check_hosts(spec: network_pb2.NetworkSpec, field: str) -> None:
    """Refuse an address that two entries have, and a MAC with two addresses in one subnet."""
    for key, subnet in sorted(spec.subnets.items()):
        addresses: dict[str, str] = {subnet.host_address: "host_address"} if subnet.host_address else {}
        macs: dict[str, str] = {}
        for host_key, host in sorted(subnet.dhcp.hosts.items()):
            place = f"{field}.subnets.{key}.dhcp.hosts.{host_key}"
            for value, seen, what in ((host.address, addresses, "address"), (host.mac_address, macs, "mac_address")):
                if value and value in seen:
                    raise FieldConflict(
                        f"{value} is that of {seen[value]} too", field=f"{place}.{what}", holder=seen[value]
                    )
                seen[value] = f"hosts.{host_key}"


def _lies_in(inner: Prefix, outer: Prefix) -> bool:
    return inner.version == outer.version and inner.prefixlen >= outer.prefixlen and inner.overlaps(outer)


def _normalise_routes(spec: network_pb2.NetworkSpec, known: Sequence[Prefix], field: str) -> None:
    for index, route in enumerate(spec.routes):
        place = f"{field}.routes[{index}]"
        if not route.prefix:
            raise FieldRequired(f"`{place}.prefix` is needed", field=f"{place}.prefix")
        try:
            target = ipaddress.ip_network(route.prefix)
        except ValueError:
            raise _bad(f"{place}.prefix", f"{route.prefix} has host bits", prefix=route.prefix) from None
        route.prefix = str(target)
        direct = next((prefix for prefix in known if _lies_in(target, prefix)), None)
        if direct is not None:
            raise FieldConflict(
                f"{target} lies in {direct}, which is reached directly",
                field=f"{place}.prefix",
                prefix=target,
                other_prefix=direct,
            )
        gateway = _address(route.gateway_address, f"{place}.gateway_address")
        if not any(usable(gateway, prefix) for prefix in known if prefix.version == gateway.version):
            raise _bad(f"{place}.gateway_address", f"{gateway} is in no subnet of the network", address=gateway)
        route.gateway_address = str(gateway)


def _normalise_dns(spec: network_pb2.NetworkSpec, field: str) -> None:
    for key, host in sorted(spec.dns.hosts.items()):
        host.address = str(_address(host.address, f"{field}.dns.hosts.{key}.address"))
    for key, text in sorted(spec.dns.texts.items()):
        if not text.record_name:
            raise FieldRequired("a text record needs a name", field=f"{field}.dns.texts.{key}.record_name")
    for key, service in sorted(spec.dns.services.items()):
        place = f"{field}.dns.services.{key}"
        if not service.service or not service.protocol:
            raise FieldRequired("a service record needs a service and a protocol", field=f"{place}.service")
        if service.target and not service.port:
            raise FieldRequired("a service record with a target needs a port", field=f"{place}.port")
    for index, forwarder in enumerate(spec.dns.forwarders):
        place = f"{field}.dns.forwarders[{index}].address"
        forwarder.address = str(_address(forwarder.address, place))


def resolve(spec: network_pb2.NetworkSpec, uid: str, mac_address: str) -> network_pb2.NetworkSpec:
    """Return a checked spec with all that the server decides.

    Args:
        spec: The spec.
        uid: The identity of the network, of which the name of the bridge is made.
        mac_address: The MAC of the bridge where the spec has none.
    """
    resolved = network_pb2.NetworkSpec()
    resolved.CopyFrom(spec)
    if not resolved.WhichOneof("forward"):
        resolved.isolated.SetInParent()
    if not resolved.HasField("mtu_bytes"):
        resolved.mtu_bytes = DEFAULT_MTU_BYTES
    if not resolved.HasField("bridge_name"):
        resolved.bridge_name = f"vf-{uid.replace('-', '')[:8]}"
    if not resolved.HasField("mac_address"):
        resolved.mac_address = mac_address
    resolved.port_isolation = spec.port_isolation
    for subnet in resolved.subnets.values():
        if not subnet.HasField("host_address"):
            subnet.host_address = str(ipaddress.ip_network(subnet.prefix).network_address + 1)
        if subnet.HasField("dhcp") and not subnet.dhcp.HasField("lease_duration"):
            subnet.dhcp.lease_duration.FromSeconds(DEFAULT_LEASE_SECONDS)
    return resolved


def with_live_changes(active: network_pb2.NetworkSpec, wanted: network_pb2.NetworkSpec) -> network_pb2.NetworkSpec:
    """Return what a running network becomes of a wanted resolved spec.

    The parts that can change live are the wanted ones.
    """
    new = network_pb2.NetworkSpec()
    new.CopyFrom(active)
    new.lifetime, new.autostart = wanted.lifetime, wanted.autostart
    for name in ("title", "description", "domain_name"):
        if wanted.HasField(name):
            setattr(new, name, getattr(wanted, name))
        else:
            new.ClearField(name)
    _take(new, wanted, "dns")
    for key, subnet in new.subnets.items():
        if key in wanted.subnets and wanted.subnets[key].prefix == subnet.prefix:
            _take(subnet, wanted.subnets[key], "dhcp")
            _take(subnet, wanted.subnets[key], "router_advertisement")
    return new


_Part = TypeVar("_Part", network_pb2.NetworkSpec, network_pb2.Subnet)


def _take(target: _Part, source: _Part, name: str) -> None:
    target.ClearField(name)  # type: ignore[arg-type]  # a field that both kinds have
    if source.HasField(name):  # type: ignore[arg-type]  # as above
        getattr(target, name).CopyFrom(getattr(source, name))


def differences(active: network_pb2.NetworkSpec, wanted: network_pb2.NetworkSpec) -> list[str]:
    """Return the paths, from the resource, in which a running network is not what is wanted."""
    return [f"spec.{path}" for path in masks.diff(active, wanted)]


def overlapping(wanted: Iterable[Prefix], others: Iterable[Prefix]) -> tuple[Prefix, Prefix] | None:
    """Return the first two prefixes that overlap; None: none do."""
    known = list(others)
    for prefix in wanted:
        for other in known:
            if prefix.version == other.version and prefix.overlaps(other):
                return prefix, other
    return None

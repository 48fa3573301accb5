"""MACs and addresses of ports.

Who has which, and the next free one. Records in the store, judged in the transaction that uses them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence

from virtfleet.network.v1 import network_pb2
from virtfleet_network import network_spec
from virtfleet_network.network_spec import Address
from virtfleet_service.errors import AddressesExhausted, FieldConflict, FieldOutOfRange, IdentityInUse
from virtfleet_service.transaction import Transaction

__all__ = ["free_count", "lease_id", "reserve_addresses", "reserve_mac", "unreserve"]

MACS = "mac"
"""Records: MAC → the name of the port that has it."""
ADDRESSES = "address"
"""Records: `{network uid}/{address in hex}` → the name of the port that has it."""
NEXT = "next-address"
"""Records: `{network uid}/{subnet}` → the address that was given last, so that one given back rests for a while."""

_FREE_COUNT_LIMIT = 1 << 62
_ATTEMPTS = 64


def lease_id(address: Address) -> str:
    """Return the id of the lease of an address."""
    return f"ip{address.version}-{address.packed.hex()}"


def _key(network_uid: str, address: Address) -> str:
    return f"{network_uid}/{lease_id(address)}"


def reserve_mac(tx: Transaction, mac_address: str, port: str, field: str = "port.spec.mac_address") -> str:
    """Give a MAC to a port: the one asked for, or a new one if none is.

    Raises:
        FieldOutOfRange: It is not the MAC of a single host.
        IdentityInUse: Another port has it.
    """
    if mac_address:
        network_spec.check_mac_address(mac_address, field)
        holder = tx.get_record(MACS, mac_address)
        if holder is not None:
            name = holder.decode()
            raise IdentityInUse(f"{mac_address} is that of {name}", field=field, holder=name, mac_address=mac_address)
    while not mac_address:
        candidate = network_spec.new_mac_address()
        if tx.get_record(MACS, candidate) is None:
            mac_address = candidate
    tx.put_record(MACS, mac_address, port.encode())
    return mac_address


def reserve_addresses(
    tx: Transaction,
    network: network_pb2.Network,
    spec: network_pb2.NetworkSpec,
    mac_address: str,
    wanted: Sequence[str],
    port: str,
) -> list[str]:
    """Give addresses to a port: those asked for, and one of each other subnet that has DHCP ranges.

    Raises:
        FieldOutOfRange: An address is in no subnet, or has a zone.
        FieldConflict: Two are in one subnet.
        IdentityInUse: Another port, a fixed entry, the node or a guest with a lease has it: metadata `holder`.
        AddressesExhausted: The ranges of a subnet are full.
    """
    given: dict[str, Address] = {}
    for index, text in enumerate(wanted):
        field = f"port.spec.addresses[{index}]"
        address = network_spec.check_address(text, field)
        key = next((key for key, prefix in _prefixes(spec) if network_spec.usable(address, prefix)), "")
        if not key:
            raise FieldOutOfRange(f"{address} is in no subnet of {network.name}", field=field, address=address)
        if key in given:
            raise FieldConflict(f"{address} is in the same subnet as {given[key]}", field=field, address=address)
        holder = _holder(tx, network, spec.subnets[key], address, mac_address)
        if holder:
            raise IdentityInUse(f"{address} is that of {holder}", field=field, holder=holder, address=address)
        given[key] = address
    for key, subnet in sorted(spec.subnets.items()):
        if key not in given and subnet.dhcp.ranges:
            given[key] = _next_free(tx, network, key, subnet, mac_address)
    for address in given.values():
        tx.put_record(ADDRESSES, _key(network.uid, address), port.encode())
    return [str(address) for _, address in sorted(given.items())]


def _prefixes(spec: network_pb2.NetworkSpec) -> Iterator[tuple[str, network_spec.Prefix]]:
    for key, subnet in sorted(spec.subnets.items()):
        yield key, ipaddress.ip_network(subnet.prefix)


def _holder(
    tx: Transaction, network: network_pb2.Network, subnet: network_pb2.Subnet, address: Address, mac_address: str
) -> str:
    """Return who has an address, other than a guest with this MAC; empty: nobody."""
    if str(address) == subnet.host_address:
        return f"{network.name} (the node itself)"
    port = tx.get_record(ADDRESSES, _key(network.uid, address))
    if port is not None:
        return port.decode()
    for key, host in subnet.dhcp.hosts.items():
        if host.address == str(address) and host.mac_address != mac_address:
            return f"{network.name} (dhcp host {key})"
    name = f"{network.name}/leases/{lease_id(address)}"
    row = tx.get(name)
    if row is not None and network_pb2.Lease.FromString(row.body).status.mac_address != mac_address:
        return name
    return ""


def _next_free(
    tx: Transaction, network: network_pb2.Network, key: str, subnet: network_pb2.Subnet, mac_address: str
) -> Address:
    for host in subnet.dhcp.hosts.values():
        # A fixed entry for this very MAC is what DHCP would give.
        if host.mac_address == mac_address and host.address:
            address = ipaddress.ip_address(host.address)
            if tx.get_record(ADDRESSES, _key(network.uid, address)) is None:
                return address
    record = f"{network.uid}/{key}"
    last = (tx.get_record(NEXT, record) or b"").decode()
    taken: set[str] | None = None
    for attempt, address in enumerate(_candidates(subnet, last)):
        if attempt == _ATTEMPTS:
            # Nearly full: look at all records once instead of at each.
            taken = {found for found, _ in tx.list_records(ADDRESSES, f"{network.uid}/")}
        if taken is not None and _key(network.uid, address) in taken:
            continue
        if not _holder(tx, network, subnet, address, mac_address):
            tx.put_record(NEXT, record, str(address).encode())
            return address
    raise AddressesExhausted(
        f"the DHCP ranges of subnet {key} of {network.name} have no free address", resource=network.name, subnet=key
    )


def _candidates(subnet: network_pb2.Subnet, last: str) -> Iterator[Address]:
    """Yield all addresses of the ranges, beginning behind the one that was given last."""
    ranges = [(ipaddress.ip_address(item.first), ipaddress.ip_address(item.last)) for item in subnet.dhcp.ranges]
    start = ipaddress.ip_address(last) if last else None
    behind = [(max(low, start + 1), high) for low, high in ranges if start is not None and high > start]  # type: ignore[operator]  # one family
    before = [(low, min(high, start)) for low, high in ranges if start is not None and low <= start]  # type: ignore[operator]  # one family
    for low, high in [*behind, *before] if start is not None else ranges:
        for number in range(int(low), int(high) + 1):
            yield type(low)(number)


def unreserve(tx: Transaction, network_uid: str, mac_address: str, addresses: Sequence[str]) -> None:
    """Give MAC and addresses of a port back."""
    tx.delete_record(MACS, mac_address)
    for text in addresses:
        tx.delete_record(ADDRESSES, _key(network_uid, ipaddress.ip_address(text)))


def forget(tx: Transaction, network_uid: str) -> None:
    """Forget where the search for free addresses of a network has come to."""
    for record, _ in tx.list_records(NEXT, f"{network_uid}/"):
        tx.delete_record(NEXT, record)


def free_count(tx: Transaction, network: network_pb2.Network, spec: network_pb2.NetworkSpec) -> int:
    """Count the addresses of the DHCP ranges that no port, no fixed entry and not the node has."""
    ranges = [
        (ipaddress.ip_address(item.first), ipaddress.ip_address(item.last))
        for subnet in spec.subnets.values()
        for item in subnet.dhcp.ranges
    ]
    total = sum(int(high) - int(low) + 1 for low, high in ranges)
    held = {key.rpartition("/")[2] for key, _ in tx.list_records(ADDRESSES, f"{network.uid}/")}
    for subnet in spec.subnets.values():
        fixed = [subnet.host_address, *(host.address for host in subnet.dhcp.hosts.values())]
        held |= {lease_id(ipaddress.ip_address(text)) for text in fixed if text}
    used = sum(1 for item in held if any(_within(item, low, high) for low, high in ranges))
    return min(total - used, _FREE_COUNT_LIMIT)


def _within(item: str, low: Address, high: Address) -> bool:
    family, _, digits = item.partition("-")
    return family == f"ip{low.version}" and int(low) <= int(digits, 16) <= int(high)

"""Addresses and MACs of ports, in a real store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from virtfleet.network.v1 import network_pb2, port_pb2
from virtfleet_network import addresses, network_spec
from virtfleet_service.errors import AddressesExhausted, IdentityInUse
from virtfleet_service.store import Store

UID = "0123abcd-0000-4000-8000-000000000000"
TYPES = {"network": network_pb2.Network, "port": port_pb2.Port, "lease": network_pb2.Lease}
MAC = "52:54:00:00:00:05"


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with Store.open(tmp_path / "s.db", package="virtfleet.network.v1", resource_types=TYPES) as store:
        yield store


def network(first: int, last: int) -> network_pb2.Network:
    found = network_pb2.Network(name="nodes/n1/networks/demo", uid=UID)
    found.spec.subnets["lan"].prefix = "10.0.0.0/24"
    found.spec.subnets["lan"].dhcp.ranges.add(first=f"10.0.0.{first}", last=f"10.0.0.{last}")
    found.status.resolved_spec.CopyFrom(network_spec.resolve(found.spec, UID, MAC))
    return found


async def reserve(store: Store, of: network_pb2.Network, port: str, *wanted: str, mac: str = MAC) -> list[str]:
    spec = of.status.resolved_spec
    return await store.write(lambda tx: addresses.reserve_addresses(tx, of, spec, mac, wanted, port))


async def test_addresses_rest_before_they_are_given_again(store: Store) -> None:
    of = network(10, 13)
    assert await reserve(store, of, "a") == ["10.0.0.10"]
    await store.write(lambda tx: addresses.unreserve(tx, UID, MAC, ["10.0.0.10"]))
    assert [await reserve(store, of, name) for name in "bcd"] == [["10.0.0.11"], ["10.0.0.12"], ["10.0.0.13"]]
    assert await reserve(store, of, "e") == ["10.0.0.10"]
    with pytest.raises(AddressesExhausted):
        await reserve(store, of, "f")


async def test_own_address_fixed_entries_and_leases_of_others_are_not_given(store: Store) -> None:
    of = network(1, 4)
    host = of.spec.subnets["lan"].dhcp.hosts["h"]
    host.mac_address, host.address = "52:54:00:00:00:09", "10.0.0.2"
    of.status.resolved_spec.CopyFrom(network_spec.resolve(of.spec, UID, MAC))
    lease = network_pb2.Lease(
        name=f"{of.name}/leases/{addresses.lease_id(network_spec.address_of('10.0.0.3'))}", uid="l"
    )
    lease.status.mac_address, lease.status.address = "52:54:00:00:00:08", "10.0.0.3"
    await store.write(lambda tx: tx.put("lease", lease, cause="observed"))
    assert await store.write(lambda tx: addresses.free_count(tx, of, of.status.resolved_spec)) == 2
    assert await reserve(store, of, "a") == ["10.0.0.4"]
    for taken, holder in (("10.0.0.1", "node itself"), ("10.0.0.2", "dhcp host h"), ("10.0.0.3", "leases/ip4-")):
        with pytest.raises(IdentityInUse, match=holder):
            await reserve(store, of, "b", taken)
    # Who has the fixed entry or the lease gets its own.
    assert await reserve(store, of, "c", mac="52:54:00:00:00:09") == ["10.0.0.2"]
    assert await reserve(store, of, "d", "10.0.0.3", mac="52:54:00:00:00:08") == ["10.0.0.3"]


async def test_a_nearly_full_range_of_many_is_searched_whole(store: Store) -> None:
    of = network(2, 250)
    for number in range(248):
        await reserve(store, of, f"p{number}")
    await store.write(lambda tx: addresses.unreserve(tx, UID, MAC, ["10.0.0.100"]))
    assert await reserve(store, of, "last") == ["10.0.0.250"]
    assert await reserve(store, of, "again") == ["10.0.0.100"]
    assert await store.write(lambda tx: addresses.free_count(tx, of, of.status.resolved_spec)) == 0


async def test_macs_are_unique_in_the_node(store: Store) -> None:
    assert await store.write(lambda tx: addresses.reserve_mac(tx, MAC, "a")) == MAC
    with pytest.raises(IdentityInUse) as refused:
        await store.write(lambda tx: addresses.reserve_mac(tx, MAC, "b"))
    assert refused.value.metadata["holder"] == "a"
    new = await store.write(lambda tx: addresses.reserve_mac(tx, "", "b"))
    assert new.startswith("52:54:00:")
    assert new != MAC

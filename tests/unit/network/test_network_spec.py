"""What a spec may say, what the server decides of it, and what of it changes live."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtfleet.network.v1 import network_pb2
from virtfleet_network import network_spec
from virtfleet_service.errors import FieldConflict, FieldOutOfRange, FieldRequired

UID = "0123abcd-0000-4000-8000-000000000000"
MAC = "52:54:00:00:00:01"
AddressRange = network_pb2.AddressRange


def spec_with(prefix: str = "192.168.1.0/24") -> network_pb2.NetworkSpec:
    spec = network_pb2.NetworkSpec()
    spec.subnets["lan"].prefix = prefix
    return spec


def test_an_empty_spec_is_an_isolated_network() -> None:
    spec = network_pb2.NetworkSpec()
    network_spec.normalise(spec)
    resolved = network_spec.resolve(spec, UID, MAC)
    assert resolved.WhichOneof("forward") == "isolated"
    assert (resolved.bridge_name, resolved.mac_address, resolved.mtu_bytes) == ("vf-0123abcd", MAC, 1500)


def test_what_is_given_is_not_decided() -> None:
    spec = spec_with()
    spec.bridge_name, spec.mac_address, spec.mtu_bytes = "br0", "52:54:00:00:00:99", 1400
    spec.subnets["lan"].host_address = "192.168.1.254"
    network_spec.normalise(spec)
    resolved = network_spec.resolve(spec, UID, MAC)
    assert (resolved.bridge_name, resolved.mac_address, resolved.mtu_bytes) == ("br0", "52:54:00:00:00:99", 1400)
    assert resolved.subnets["lan"].host_address == "192.168.1.254"
    assert network_spec.resolve(resolved, UID, "52:54:00:00:00:77") == resolved


def test_addresses_become_canonical() -> None:
    spec = spec_with("FD00:0:0::/64")
    spec.subnets["lan"].host_address = "fd00:0::0001"
    network_spec.normalise(spec)
    assert (spec.subnets["lan"].prefix, spec.subnets["lan"].host_address) == ("fd00::/64", "fd00::1")


@pytest.mark.parametrize(
    "prefix",
    [
        "224.0.0.0/8",
        "169.254.0.0/16",
        "fe80::/64",
        "0.0.0.0/8",
        "::/64",
        "::ffff:10.0.0.0/112",
        "10.0.0.0/31",
        "10.0.0.0/7",
    ],
)
def test_prefixes_that_hosts_cannot_have(prefix: str) -> None:
    with pytest.raises(FieldOutOfRange) as refused:
        network_spec.normalise(spec_with(prefix))
    assert refused.value.field == "network.spec.subnets.lan.prefix"


ZONE = "fd00::5%x\nenable-tftp"


def _everywhere(spec: network_pb2.NetworkSpec, address: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the field and what sets it, for every field of a spec that is an address."""
    lan = spec.subnets["lan"]
    yield "subnets.lan.host_address", lambda: setattr(lan, "host_address", address)
    yield "subnets.lan.dhcp.ranges[0].first", lambda: lan.dhcp.ranges.add(first=address, last="fd00::9")
    yield "subnets.lan.dhcp.ranges[0].last", lambda: lan.dhcp.ranges.add(first="fd00::2", last=address)
    host = network_pb2.DhcpHost(mac_address=MAC, address=address)
    yield "subnets.lan.dhcp.hosts.h.address", lambda: lan.dhcp.hosts["h"].CopyFrom(host)
    yield "nat.addresses.first", lambda: spec.nat.addresses.MergeFrom(AddressRange(first=address, last="fd00::9"))
    yield "nat.addresses.last", lambda: spec.nat.addresses.MergeFrom(AddressRange(first="fd00::2", last=address))
    yield "routes[0].gateway_address", lambda: spec.routes.add(prefix="fd01::/64", gateway_address=address)
    name = network_pb2.DnsHost(address=address, hostnames=["a"])
    yield "dns.hosts.h.address", lambda: spec.dns.hosts["h"].CopyFrom(name)
    yield "dns.forwarders[0].address", lambda: spec.dns.forwarders.add(address=address)


@pytest.mark.parametrize("number", range(9))
def test_an_address_has_no_zone(number: int) -> None:
    """A zone may be any text, and would stand in what nft and dnsmasq read."""
    for address in ("fd00::5", ZONE):
        spec = spec_with("fd00::/64")
        field, change = list(_everywhere(spec, address))[number]
        change()
        if address != ZONE:
            network_spec.normalise(spec)
            continue
        with pytest.raises(FieldOutOfRange, match="without a zone") as refused:
            network_spec.normalise(spec)
        assert refused.value.field == f"network.spec.{field}"
        assert "tftp" not in refused.value.message


def test_a_small_ipv6_subnet_is_announced_with_dhcp_only() -> None:
    spec = spec_with("fd00::/80")
    with pytest.raises(FieldOutOfRange, match="without DHCP") as refused:
        network_spec.normalise(spec)
    assert refused.value.field == "network.spec.subnets.lan.prefix"
    spec.subnets["lan"].dhcp.SetInParent()
    network_spec.normalise(spec)
    spec.subnets["lan"].ClearField("dhcp")
    spec.subnets["lan"].router_advertisement.enabled = False
    network_spec.normalise(spec)


def test_host_bits_are_answered_with_the_prefix_that_was_meant() -> None:
    with pytest.raises(FieldOutOfRange, match=r"the prefix is 192\.168\.1\.0/24"):
        network_spec.normalise(spec_with("192.168.1.1/24"))


def test_a_subnet_needs_a_prefix() -> None:
    spec = network_pb2.NetworkSpec()
    spec.subnets["lan"].SetInParent()
    with pytest.raises(FieldRequired):
        network_spec.normalise(spec)


def test_what_is_of_one_family_alone() -> None:
    four = spec_with()
    four.subnets["lan"].router_advertisement.enabled = True
    six = spec_with("fd00::/64")
    six.subnets["lan"].dhcp.bootp.file_name = "x"
    for spec in (four, six):
        with pytest.raises(FieldConflict):
            network_spec.normalise(spec)


def test_announcements_in_all_subnets_or_in_none() -> None:
    spec = spec_with("fd00::/64")
    spec.subnets["two"].prefix = "fd01::/64"
    network_spec.normalise(spec)
    spec.subnets["two"].router_advertisement.enabled = False
    with pytest.raises(FieldConflict) as refused:
        network_spec.normalise(spec)
    assert refused.value.field == "network.spec.subnets.two.router_advertisement"


def test_two_entries_for_one_address_or_mac() -> None:
    spec = spec_with()
    for key, mac, address in (("a", MAC, "192.168.1.5"), ("b", "52:54:00:00:00:02", "192.168.1.5")):
        spec.subnets["lan"].dhcp.hosts[key].CopyFrom(network_pb2.DhcpHost(mac_address=mac, address=address))
    with pytest.raises(FieldConflict, match=r"hosts\.a"):
        network_spec.normalise(spec)


def test_overlapping_ranges_and_subnets() -> None:
    spec = spec_with()
    spec.subnets["lan"].dhcp.ranges.add(first="192.168.1.10", last="192.168.1.20")
    spec.subnets["lan"].dhcp.ranges.add(first="192.168.1.20", last="192.168.1.30")
    with pytest.raises(FieldConflict):
        network_spec.normalise(spec)
    spec = spec_with()
    spec.subnets["other"].prefix = "192.168.0.0/16"
    with pytest.raises(FieldConflict) as refused:
        network_spec.normalise(spec)
    assert refused.value.field == "network.spec.subnets.other.prefix"


def test_what_would_have_no_effect_is_refused() -> None:
    boot = spec_with()
    boot.subnets["lan"].dhcp.bootp.server_address = "192.168.1.9"
    with pytest.raises(FieldRequired) as missing:
        network_spec.normalise(boot)
    assert missing.value.field == "network.spec.subnets.lan.dhcp.bootp.file_name"
    source = spec_with()
    source.nat.addresses.first, source.nat.addresses.last = "fd09::1", "fd09::9"
    with pytest.raises(FieldConflict) as refused:
        network_spec.normalise(source)
    assert refused.value.field == "network.spec.nat.addresses"
    source.subnets["six"].prefix = "fd00::/64"
    network_spec.normalise(source)


def test_live_parts_are_taken_and_the_rest_is_a_difference() -> None:
    spec = spec_with()
    active = network_spec.resolve(spec, UID, MAC)
    spec.mtu_bytes = 1400
    spec.domain_name = "a.test"
    spec.subnets["lan"].dhcp.ranges.add(first="192.168.1.10", last="192.168.1.20")
    spec.subnets["new"].prefix = "10.0.0.0/24"
    wanted = network_spec.resolve(spec, UID, MAC)
    new = network_spec.with_live_changes(active, wanted)
    assert new.domain_name == "a.test"
    assert new.subnets["lan"].dhcp.ranges[0].first == "192.168.1.10"
    assert network_spec.differences(new, wanted) == ["spec.mtu_bytes", "spec.subnets.new"]


@given(st.integers(0, 2**32 - 1), st.integers(8, 30), st.integers(0, 2**32 - 1))
def test_usable_is_what_a_host_can_have(base: int, length: int, other: int) -> None:
    prefix = ipaddress.ip_network((base, length), strict=False)
    address = ipaddress.ip_address(other)
    assert network_spec.usable(address, prefix) == (
        address in prefix and address not in (prefix.network_address, prefix.broadcast_address)
    )


def test_new_macs_are_of_virtual_machines() -> None:
    macs = {network_spec.new_mac_address() for _ in range(50)}
    assert len(macs) > 45
    assert all(mac.startswith("52:54:00:") and len(mac) == 17 for mac in macs)


@pytest.mark.parametrize("prefix", ["192.168.1.0/24", "192.168.1.128/25"])
def test_what_is_reached_directly_has_no_route(prefix: str) -> None:
    """In the kernel it would take the place of the bridge's own."""
    spec = spec_with()
    spec.routes.add(prefix=prefix, gateway_address="192.168.1.9")
    with pytest.raises(FieldConflict, match="directly") as refused:
        network_spec.normalise(spec)
    assert refused.value.field == "network.spec.routes[0].prefix"
    spec.routes[0].prefix = "192.168.0.0/16"
    network_spec.normalise(spec)

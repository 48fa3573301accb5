"""What passes and what does not."""

from __future__ import annotations

from tests.integration.network.rig import Node, add_subnet, nat
from virtfleet.network.v1 import network_pb2


def isolated(prefix: str) -> network_pb2.NetworkSpec:
    spec = network_pb2.NetworkSpec()
    spec.isolated.SetInParent()
    add_subnet(spec, "lan", prefix, (10, 20))
    return spec


def test_nat_leads_out_under_the_address_of_the_node(node: Node) -> None:
    outside = node.outside()
    network = node.create("demo", nat())
    guest = node.guest(network.status.bridge_name)
    guest.dhcp()
    # The outside has no way back to the guest's own address: an answer proves that it saw another.
    assert guest.pings("198.51.100.2")
    outside("ip", "route", "add", "192.168.177.0/24", "via", "198.51.100.1")
    address = next(iter(guest.namespace.addresses("eth0"))).partition("/")[0]
    assert not outside.succeeds("busybox", "ping", "-c", "1", "-W", "1", address), "nobody outside reaches a guest"


def test_guests_of_one_network_reach_each_other_and_the_node(node: Node) -> None:
    network = node.create("demo", isolated("192.168.60.0/24"))
    one, two = node.guest(network.status.bridge_name), node.guest(network.status.bridge_name)
    one.dhcp()
    other = two.dhcp()["ip"]
    assert one.pings(other)
    assert one.pings("192.168.60.1")


def test_an_isolated_network_has_no_way_out(node: Node) -> None:
    node.outside()
    node.create("open-way", nat())  # so that the kernel forwards at all
    network = node.create("demo", isolated("192.168.60.0/24"))
    guest = node.guest(network.status.bridge_name)
    guest.static("192.168.60.99/24", "192.168.60.1")
    assert guest.pings("192.168.60.1")
    assert not guest.pings("198.51.100.2")


def test_networks_do_not_reach_each_other(node: Node) -> None:
    one = node.create("one", nat("192.168.10.0/24"))
    two = node.create("two", nat("192.168.11.0/24"))
    left, right = node.guest(one.status.bridge_name), node.guest(two.status.bridge_name)
    left.dhcp()
    address = right.dhcp()["ip"]
    assert left.pings("192.168.10.1")
    assert not left.pings(address)


def test_a_routed_network_shows_the_guests_own_address(node: Node) -> None:
    outside = node.outside()
    spec = network_pb2.NetworkSpec()
    spec.routed.SetInParent()
    add_subnet(spec, "lan", "192.168.61.0/24", (10, 20))
    network = node.create("demo", spec)
    guest = node.guest(network.status.bridge_name)
    address = guest.dhcp()["ip"]
    assert not guest.pings("198.51.100.2"), "the outside has no way back"
    outside("ip", "route", "add", "192.168.61.0/24", "via", "198.51.100.1")
    assert guest.pings("198.51.100.2")
    assert outside.succeeds("busybox", "ping", "-c", "1", "-W", "2", address)

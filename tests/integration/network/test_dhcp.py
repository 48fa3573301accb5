"""DHCP and DNS with a real client, and leases as resources and events."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time

from tests.integration.network.rig import NODE, Node, add_subnet, nat, new_uid
from virtfleet.network.v1 import network_pb2, watch_pb2

ADDED = watch_pb2.EVENT_TYPE_LEASE_ADDED
RENEWED = watch_pb2.EVENT_TYPE_LEASE_RENEWED
EXPIRED = watch_pb2.EVENT_TYPE_LEASE_EXPIRED


def test_a_guest_gets_a_lease_that_is_listed_and_told(node: Node) -> None:
    network = node.create("demo", nat())
    guest = node.guest(network.status.bridge_name)
    with node.expecting(ADDED) as events:
        lease = guest.dhcp("-x", "hostname:web")
    assert lease["router"] == "192.168.177.1"
    assert lease["dns"] == "192.168.177.1"
    assert lease["domain"] == "demo.test"
    assert lease["lease"] == "3600"
    [found] = node.leases("demo")
    assert found.status.address == lease["ip"]
    assert found.status.mac_address == guest.mac_address
    assert found.status.hostname == "web"
    assert found.status.expire_time.seconds > found.status.renew_time.seconds + 3500
    assert found.name == f"{network.name}/leases/ip4-{bytes(map(int, lease['ip'].split('.'))).hex()}"
    told = next(event for event in events if event.type == ADDED)
    assert told.lease_changed.address == lease["ip"]
    assert told.resource == found.name
    assert lease["ip"] in guest.lookup("web.demo.test", "192.168.177.1")


def test_a_renewed_and_a_released_lease_are_told(node: Node) -> None:
    network = node.create("demo", nat())
    guest = node.guest(network.status.bridge_name)
    with node.expecting(ADDED):
        first = guest.dhcp()
    before = node.leases("demo")[0]
    # The lease file counts whole seconds; a renewal in the same one cannot be seen.
    time.sleep(1.1)
    with node.expecting(RENEWED):
        again = guest.dhcp()
    assert again["ip"] == first["ip"]
    assert node.leases("demo")[0].uid == before.uid
    with node.expecting(EXPIRED) as events:
        guest.release()
    assert next(event.reason for event in events if event.type == EXPIRED) == "RELEASED"
    assert node.leases("demo") == []


def test_a_port_gets_its_own_address_and_its_name_in_dns(node: Node) -> None:
    network = node.create("demo", nat())
    port = node.reserve("demo", "d1-lan", new_uid())
    guest = node.guest(network.status.bridge_name, port.mac_address)
    with node.expecting(ADDED):
        lease = guest.dhcp()
    assert [lease["ip"]] == list(port.addresses)
    [found] = node.leases("demo")
    assert found.status.port == f"{NODE}/networks/demo/ports/d1-lan"
    assert lease["ip"] in guest.lookup("d1.demo.test", "192.168.177.1")


def test_names_that_dnsmasq_has_words_for_are_names(node: Node) -> None:
    network = node.create("demo", nat())
    for name in ("ignore", "infinite", "3600", "12h"):
        port = node.create_port("demo", f"p-{name}", hostname=name)
        guest = node.guest(network.status.bridge_name, port.status.mac_address)
        lease = guest.dhcp()
        assert ([lease["ip"]], lease["lease"]) == (list(port.status.addresses), "3600"), name
        assert lease["ip"] in guest.lookup(f"{name}.demo.test", "192.168.177.1"), name


def test_addresses_of_ports_are_not_given_to_others(node: Node) -> None:
    network = node.create("demo", nat(ranges=(10, 12)))
    node.create_port("demo", "one")
    node.create_port("demo", "two")
    lease = node.guest(network.status.bridge_name).dhcp()
    assert lease["ip"] == "192.168.177.12"


def test_a_fixed_entry_made_live_is_served_by_the_same_process(node: Node) -> None:
    network = node.create("demo", nat())
    pid = node.dnsmasq(network.uid)
    guest = node.guest(network.status.bridge_name)
    change = network_pb2.Network(name=network.name)
    host = change.spec.subnets["lan"].dhcp.hosts["web"]
    host.mac_address, host.address, host.hostname = guest.mac_address, "192.168.177.77", "fixed"
    updated = node.update(change, "spec.subnets.lan.dhcp.hosts.web")
    assert not updated.status.pending_changes
    assert guest.dhcp()["ip"] == "192.168.177.77"
    assert node.dnsmasq(network.uid) == pid


def test_new_ranges_are_live_with_the_leases_kept(node: Node) -> None:
    network = node.create("demo", nat(ranges=(10, 10)))
    first = node.guest(network.status.bridge_name)
    assert first.dhcp()["ip"] == "192.168.177.10"
    change = network_pb2.Network(name=network.name)
    change.spec.subnets["lan"].dhcp.ranges.add(first="192.168.177.10", last="192.168.177.11")
    assert not node.update(change, "spec.subnets.lan.dhcp.ranges").status.pending_changes
    assert node.guest(network.status.bridge_name).dhcp()["ip"] == "192.168.177.11"
    assert first.dhcp()["ip"] == "192.168.177.10"


def test_an_isolated_network_gives_no_router(node: Node) -> None:
    spec = network_pb2.NetworkSpec()
    add_subnet(spec, "lan", "192.168.60.0/24", (10, 20))
    network = node.create("demo", spec)
    lease = node.guest(network.status.bridge_name).dhcp()
    assert lease["ip"].startswith("192.168.60.")
    assert "router" not in lease


def test_names_of_others_are_unknown_without_forwarders(node: Node) -> None:
    network = node.create("demo", nat())
    guest = node.guest(network.status.bridge_name)
    guest.dhcp()
    answer = guest.lookup("example.com", "192.168.177.1")
    assert "REFUSED" in answer.upper() or "can't find" in answer


def test_dnsmasq_killed_after_a_lease_comes_back_and_keeps_it(node: Node) -> None:
    network = node.create("demo", nat())
    guest = node.guest(network.status.bridge_name)
    with node.expecting(ADDED):
        first = guest.dhcp()
    pid = node.dnsmasq(network.uid)
    with node.expecting(watch_pb2.EVENT_TYPE_NETWORK_DAEMON_RESTARTED) as events:
        os.kill(pid, signal.SIGKILL)
    assert next(e.reason for e in events if e.type == watch_pb2.EVENT_TYPE_NETWORK_DRIFTED) == "DAEMON_DIED"
    assert node.dnsmasq(network.uid) not in (0, pid)
    assert guest.dhcp()["ip"] == first["ip"]
    status = node.get("demo").status
    assert status.state == network_pb2.NETWORK_STATE_RUNNING
    assert next(item.status for item in status.conditions if item.type == "Drifted") == 2


def test_a_guest_gets_an_ipv6_address_by_router_advertisement(node: Node) -> None:
    spec = nat()
    add_subnet(spec, "six", "fd00:177::/64", None)
    network = node.create("demo", spec)
    guest = node.guest(network.status.bridge_name)
    guest.namespace("ip", "link", "set", "eth0", "down")
    monitor = [*guest.namespace.prefix, "timeout", "15", "ip", "monitor", "address"]
    with subprocess.Popen(monitor, stdout=subprocess.PIPE, text=True) as lines:
        assert lines.stdout is not None
        # A guest asks for advertisements when its link comes up.
        guest.namespace("ip", "link", "set", "eth0", "up")
        assert any("fd00:177:" in line for line in lines.stdout)
        lines.kill()
    assert any(address.startswith("fd00:177:") for address in guest.namespace.addresses("eth0"))


def test_what_a_guest_calls_itself_harms_nobody(node: Node) -> None:
    network = node.create("demo", nat())
    bridge = network.status.bridge_name
    port = node.reserve("demo", "d1-lan", new_uid())
    victim = node.guest(bridge, port.mac_address)
    assert victim.dhcp()["ip"] == port.addresses[0]
    hostile = [
        "d1",
        "wpad",
        "isatap",
        "localhost",
        "-rf",
        "../../etc",
        "a b c",
        "x" * 250,
        "\u0430dmin",
        "1.2.3.4",
        "*",
        "evil.example.com",
    ]
    addresses = []
    for name in hostile:
        guest = node.guest(bridge)
        addresses.append(guest.dhcp("-x", f"hostname:{name}")["ip"])
    deadline = time.monotonic() + 10
    while len(node.leases("demo")) < len(hostile) + 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    found = {one.status.address: one.status.hostname for one in node.leases("demo")}
    # All are served, and told of by names that are names.
    assert set(found) == {*addresses, *port.addresses}
    for name in found.values():
        assert re.fullmatch(r"[A-Za-z0-9_.-]{0,253}", name)
    # The name of a port stays with it, and nobody becomes the proxy of the others.
    answer = victim.lookup("d1.demo.test", "192.168.177.1")
    assert port.addresses[0] in answer
    assert addresses[0] not in answer
    for name in ("wpad", "isatap"):
        answer = victim.lookup(f"{name}.demo.test", "192.168.177.1")
        assert not any(address in answer for address in addresses)


def test_a_network_of_ipv6_alone(node: Node) -> None:
    spec = network_pb2.NetworkSpec(domain_name="six.test")
    spec.nat.SetInParent()
    add_subnet(spec, "six", "fd00:66::/64", (0x10, 0x20))
    network = node.create("demo", spec)
    bridge = network.status.bridge_name
    assert node.namespace.addresses(bridge) == {"fd00:66::1/64"}
    port = node.reserve("demo", "d1-lan", new_uid())
    assert [address.startswith("fd00:66::") for address in port.addresses] == [True]
    rules = node.namespace("nft", "list", "table", "inet", "virtfleet")
    assert "ip6 saddr fd00:66::/64" in rules
    assert "ip saddr" not in rules
    assert node.namespace("cat", "/proc/sys/net/ipv6/conf/all/forwarding").strip() == "1"
    # Forwarding of the other family is nobody's need.
    assert node.namespace("cat", "/proc/sys/net/ipv4/ip_forward").strip() == "0"
    guest = node.guest(bridge, port.mac_address)
    with node.expecting(ADDED) as events:
        assert [guest.dhcp6()] == list(port.addresses)
    told = next(event for event in events if event.type == ADDED)
    assert told.lease_changed.address in port.addresses
    assert told.lease_changed.mac_address == port.mac_address
    [lease] = node.leases("demo")
    assert lease.status.port == f"{NODE}/networks/demo/ports/d1-lan"
    assert lease.name.rpartition("/")[2].startswith("ip6-")
    # By its name, of the node's IPv6 address.
    guest.namespace("ip", "address", "replace", f"{port.addresses[0]}/64", "dev", "eth0", "nodad")
    assert port.addresses[0] in guest.lookup("d1.six.test", "fd00:66::1")
    node.stop("demo")
    assert node.namespace("cat", "/proc/sys/net/ipv6/conf/all/forwarding").strip() == "0"

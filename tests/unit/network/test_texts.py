"""The texts that nft and dnsmasq read, made from plans."""

from __future__ import annotations

from pathlib import Path

from virtfleet.network.v1 import network_pb2
from virtfleet_network import network_spec
from virtfleet_network.backends.api import HostEntry, NetworkPlan
from virtfleet_network.backends.bridge.dnsmasq_files import daemon_files, is_needed
from virtfleet_network.backends.bridge.ruleset import empty_ruleset, normalised, ruleset

UID = "0123abcd-0000-4000-8000-000000000000"
CHAIN = UID.replace("-", "")


def plan(spec: network_pb2.NetworkSpec, *hosts: HostEntry) -> NetworkPlan:
    network_spec.normalise(spec)
    resolved = network_spec.resolve(spec, UID, "52:54:00:00:00:01")
    return NetworkPlan(UID, "nodes/n1/networks/demo", resolved, hosts)


def nat() -> network_pb2.NetworkSpec:
    spec = network_pb2.NetworkSpec(bridge_name="br0")
    spec.nat.SetInParent()
    spec.subnets["lan"].prefix = "192.168.1.0/24"
    spec.subnets["six"].prefix = "fd00::/64"
    return spec


def test_rules_of_a_nat_network() -> None:
    assert (
        ruleset([plan(nat())])
        == f"""\
table inet virtfleet
delete table inet virtfleet
table inet virtfleet {{
	chain from_{CHAIN} {{
		oifname "br0" accept
		oifname {{ "br0" }} reject with icmpx type admin-prohibited
		ip saddr 192.168.1.0/24 accept
		ip6 saddr fd00::/64 accept
		reject with icmpx type admin-prohibited
	}}
	chain to_{CHAIN} {{
		ct state established,related accept
		reject with icmpx type admin-prohibited
	}}
	chain forward {{
		type filter hook forward priority filter; policy accept;
		iifname "br0" jump from_{CHAIN}
		oifname "br0" jump to_{CHAIN}
	}}
	chain input {{
		type filter hook input priority filter; policy accept;
		iifname "br0" udp dport {{ 53, 67, 547 }} accept
		iifname "br0" tcp dport 53 accept
	}}
	chain postrouting {{
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr 192.168.1.0/24 ip daddr {{ 224.0.0.0/24, 255.255.255.255 }} return
		ip saddr 192.168.1.0/24 ip daddr != 192.168.1.0/24 masquerade
		ip6 saddr fd00::/64 ip6 daddr ff00::/8 return
		ip6 saddr fd00::/64 ip6 daddr != fd00::/64 masquerade
	}}
}}
"""
    )


def test_source_addresses_ports_and_interface() -> None:
    spec = nat()
    spec.nat.interface_name = "wan0"
    spec.nat.addresses.first, spec.nat.addresses.last = "203.0.113.5", "203.0.113.6"
    spec.nat.ports.first, spec.nat.ports.last = 2000, 3000
    text = ruleset([plan(spec)])
    out = 'oifname "wan0" ip saddr 192.168.1.0/24 ip daddr != 192.168.1.0/24'
    assert f"{out} meta l4proto {{ tcp, udp }} snat ip to 203.0.113.5-203.0.113.6:2000-3000\n" in text
    assert f"{out} snat ip to 203.0.113.5-203.0.113.6\n" in text
    assert 'oifname "wan0" ip saddr 192.168.1.0/24 accept' in text


def test_open_networks_have_no_rules() -> None:
    spec = nat()
    spec.open.SetInParent()
    assert ruleset([plan(spec)]) == ruleset([]) == empty_ruleset()


def test_listings_are_compared_without_handles() -> None:
    listing = '{"nftables": [{"metainfo": {"version": "1"}}, {"rule": {"handle": 7, "expr": [{"a": 1}]}}]}'
    assert normalised(listing) == [{"rule": {"expr": [{"a": 1}]}}]


def test_files_of_dnsmasq() -> None:
    spec = nat()
    spec.mtu_bytes = 1400
    spec.domain_name = "demo.test"
    lan = spec.subnets["lan"]
    lan.dhcp.ranges.add(first="192.168.1.10", last="192.168.1.20")
    lan.dhcp.lease_duration.FromSeconds(600)
    lan.dhcp.bootp.file_name = "boot.bin"
    spec.dns.forwarders.add(address="9.9.9.9", port=5353, domain_name="corp.test")
    spec.dns.texts["t"].CopyFrom(network_pb2.DnsText(record_name="a.demo.test", text="hello world"))
    spec.dns.services["s"].CopyFrom(
        network_pb2.DnsService(service="ldap", protocol="tcp", target="x.demo.test", port=389)
    )
    spec.dns.hosts["h"].CopyFrom(network_pb2.DnsHost(address="192.168.1.5", hostnames=["a", "b.demo.test"]))
    hosts = (
        HostEntry("52:54:00:00:00:02", ("192.168.1.10",), "web"),
        HostEntry("52:54:00:00:00:02", ("fd00::10",)),
    )
    files = daemon_files(plan(spec, *hosts), Path("/x"))
    lines = files.configuration.splitlines()
    for line in (
        "interface=br0",
        "domain=demo.test",
        "local=/demo.test/",
        "dhcp-range=192.168.1.10,192.168.1.20,255.255.255.0,600",
        "dhcp-range=fd00::,ra-only,64",
        "dhcp-boot=boot.bin",
        "dhcp-option=26,1400",
        "ra-param=br0,mtu:1400,0,1800",
        "server=/corp.test/9.9.9.9#5353",
        'txt-record=a.demo.test,"hello world"',
        "srv-host=_ldap._tcp.demo.test,x.demo.test,389,0,0",
        "dhcp-hostsfile=/x/dhcp-hosts",
        "dhcp-leasefile=/x/var/leases",
        "no-ping",
        "dhcp-name-match=set:claimed,wpad",
        "dhcp-ignore-names=tag:claimed",
        "no-resolv",
    ):
        assert line in lines
    assert "dhcp-option=3" not in lines
    assert files.dhcp_hosts == "52:54:00:00:00:02,192.168.1.10,web.\n52:54:00:00:00:02,[fd00::10]\n"
    assert files.dns_hosts == "192.168.1.5 a b.demo.test\n"


def test_no_dns_no_dhcp_no_daemon() -> None:
    spec = network_pb2.NetworkSpec()
    assert not is_needed(plan(spec).spec)
    spec.subnets["lan"].prefix = "192.168.1.0/24"
    assert is_needed(plan(spec).spec)
    spec.dns.enabled = False
    assert not is_needed(plan(spec).spec)
    spec.subnets["lan"].dhcp.SetInParent()
    lines = daemon_files(plan(spec), Path("/x")).configuration.splitlines()
    assert "port=0" in lines
    assert "dhcp-range=192.168.1.0,static,255.255.255.0,3600" in lines
    assert "dhcp-option=3" in lines

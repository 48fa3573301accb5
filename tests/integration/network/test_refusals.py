"""What is refused: code, reason and field, and that nothing has changed afterwards."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable

import grpc
import pytest

from tests.integration.network.rig import NODE, Node, Refusal, add_subnet, nat, translated
from virtfleet.network.v1 import network_pb2, port_pb2
from virtfleet.type.v1 import resource_pb2

Change = Callable[[network_pb2.NetworkSpec], object]
INVALID, EXISTS = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.ALREADY_EXISTS
FAILED, UNIMPLEMENTED = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNIMPLEMENTED
LAN = "network.spec.subnets.lan"


def bridge(name: str) -> Change:
    return lambda spec: setattr(spec, "bridge_name", name)


def prefix(text: str) -> Change:
    return lambda spec: setattr(spec.subnets["lan"], "prefix", text)


def a_range(first: str, last: str) -> Change:
    return lambda spec: spec.subnets["lan"].dhcp.ranges.add(first=first, last=last)


def host(**fields: str) -> Change:
    return lambda spec: spec.subnets["lan"].dhcp.hosts["h"].CopyFrom(network_pb2.DhcpHost(**fields))


SPECS: list[tuple[str, Change, grpc.StatusCode, str, str]] = [
    ("bridge name too long", bridge("b" * 16), INVALID, "FIELD_OUT_OF_RANGE", "network.spec.bridge_name"),
    ("bridge name with a slash", bridge("a/b"), INVALID, "FIELD_OUT_OF_RANGE", "network.spec.bridge_name"),
    ("bridge name of a link of the node", bridge("wan0"), EXISTS, "IDENTITY_IN_USE", "network.spec.bridge_name"),
    ("bridge name of another network", bridge("taken0"), EXISTS, "IDENTITY_IN_USE", "network.spec.bridge_name"),
    ("host bits in the prefix", prefix("192.168.9.1/24"), INVALID, "FIELD_OUT_OF_RANGE", f"{LAN}.prefix"),
    ("no prefix at all", prefix("lan"), INVALID, "FIELD_OUT_OF_RANGE", f"{LAN}.prefix"),
    ("loopback", prefix("127.0.0.0/16"), INVALID, "FIELD_OUT_OF_RANGE", f"{LAN}.prefix"),
    ("IPv4 in IPv6", prefix("::ffff:10.9.0.0/112"), INVALID, "FIELD_OUT_OF_RANGE", f"{LAN}.prefix"),
    ("too small to be announced", prefix("fd00:9::/80"), INVALID, "FIELD_OUT_OF_RANGE", f"{LAN}.prefix"),
    ("too small", prefix("192.168.9.0/31"), INVALID, "FIELD_OUT_OF_RANGE", f"{LAN}.prefix"),
    ("overlap with an address of the node", prefix("198.51.0.0/16"), FAILED, "SUBNET_OVERLAP", ""),
    ("overlap with a route of the node", prefix("203.0.113.0/25"), FAILED, "SUBNET_OVERLAP", ""),
    ("overlap with another network", prefix("192.168.177.128/25"), FAILED, "SUBNET_OVERLAP", ""),
    ("overlap in itself", lambda s: add_subnet(s, "two", "192.168.9.0/25", None), INVALID, "FIELD_CONFLICT", "network.spec.subnets.two.prefix"),
    ("range outside", a_range("10.0.0.1", "10.0.0.2"), INVALID, "FIELD_OUT_OF_RANGE", f"{LAN}.dhcp.ranges[0]"),
    ("range backwards", a_range("192.168.9.9", "192.168.9.8"), INVALID, "FIELD_OUT_OF_RANGE", f"{LAN}.dhcp.ranges[0]"),
    ("host without MAC", host(address="192.168.9.5"), INVALID, "FIELD_REQUIRED", f"{LAN}.dhcp.hosts.h.mac_address"),
    ("group MAC", host(mac_address="01:00:5e:00:00:01"), INVALID, "FIELD_OUT_OF_RANGE", f"{LAN}.dhcp.hosts.h.mac_address"),
    ("MAC in capitals", host(mac_address="52:54:00:AA:BB:CC"), INVALID, "FIELD_OUT_OF_RANGE", f"{LAN}.dhcp.hosts.h.mac_address"),
    ("small MTU", lambda s: setattr(s, "mtu_bytes", 100), INVALID, "FIELD_OUT_OF_RANGE", "network.spec.mtu_bytes"),
    ("MTU of no tap", lambda s: setattr(s, "mtu_bytes", 65522), INVALID, "FIELD_OUT_OF_RANGE", "network.spec.mtu_bytes"),
    ("existing bridge", lambda s: s.bridge.SetInParent(), UNIMPLEMENTED, "CAPABILITY_MISSING", ""),
    ("macvtap", lambda s: s.macvtap.SetInParent(), UNIMPLEMENTED, "CAPABILITY_MISSING", ""),
    ("host device", lambda s: s.host_device.SetInParent(), UNIMPLEMENTED, "CAPABILITY_MISSING", ""),
    ("unknown enum number", lambda s: setattr(s, "lifetime", 77), INVALID, "UNKNOWN_FIELD", "network.spec.lifetime"),
    ("quote in a text record", lambda s: s.dns.texts["t"].CopyFrom(network_pb2.DnsText(record_name="a", text='"')),
    INVALID, "FIELD_OUT_OF_RANGE", "network.spec.dns.texts.t.text"), ("new line in a host name", host(mac_address="52:54:00:aa:bb:cc",
    hostname="a\nb"), INVALID, "FIELD_OUT_OF_RANGE", f"{LAN}.dhcp.hosts.h.hostname"),
    ("options of dnsmasq in a zone", lambda s: s.dns.forwarders.add(address="fe80::1%a\nenable-tftp"),
    INVALID, "FIELD_OUT_OF_RANGE", "network.spec.dns.forwarders[0].address"),
]  # fmt: skip


def test_specs_that_cannot_be(node: Node) -> None:
    node.outside()
    node.namespace("ip", "route", "add", "203.0.113.0/24", "via", "198.51.100.2")
    there = nat()
    there.bridge_name = "taken0"
    node.create("there", there)
    links, tables = set(node.namespace.links()), node.namespace("nft", "list", "ruleset")
    wrong = []
    for what, change, code, reason, field in SPECS:
        spec = network_pb2.NetworkSpec()
        spec.subnets["lan"].prefix = "192.168.9.0/24"
        change(spec)
        try:
            node.create("demo", spec)
            wrong.append(f"{what}: was accepted")
            node.delete("demo", force=True)
        except Refusal as refusal:
            got = (refusal.code, refusal.reason, refusal.field)
            if got != (code, reason, field):
                wrong.append(f"{what}: {got} {refusal.message}")
    assert not wrong, "\n".join(wrong)
    assert set(node.namespace.links()) == links
    assert node.namespace("nft", "list", "ruleset") == tables
    assert [
        item.name for item in node.networks.ListNetworks(network_pb2.ListNetworksRequest(parent=NODE)).networks
    ] == [f"{NODE}/networks/there"]


@pytest.mark.parametrize("prefix", ["0.0.0.0/0", "203.0.113.0/24", "203.0.113.128/25", "198.51.100.0/24", "::/0"])
def test_routes_that_would_take_the_place_of_the_nodes_own(node: Node, prefix: str) -> None:
    node.outside()
    node.namespace("ip", "route", "add", "203.0.113.0/24", "via", "198.51.100.2")
    node.namespace("ip", "route", "replace", "default", "via", "198.51.100.2")
    before = node.namespace("ip", "route"), node.namespace("ip", "-6", "route"), set(node.namespace.links())
    spec = nat()
    add_subnet(spec, "six", "fd00:177::/64", None)
    spec.routes.add(prefix=prefix, gateway_address="fd00:177::5" if ":" in prefix else "192.168.177.5")
    with pytest.raises(Refusal) as refused:
        node.create("demo", spec)
    assert (refused.value.code, refused.value.reason) == (FAILED, "SUBNET_OVERLAP")
    assert refused.value.metadata["prefix"] == prefix
    assert (node.namespace("ip", "route"), node.namespace("ip", "-6", "route"), set(node.namespace.links())) == before
    spec.routes[0].prefix = "fd09::/48" if ":" in prefix else "10.99.0.0/16"
    network = node.create("demo", spec)
    assert spec.routes[0].prefix in node.namespace("ip", "-6" if ":" in prefix else "-4", "route")
    node.delete("demo", force=True)
    assert network.status.bridge_name not in node.namespace.links()


def test_holders_of_an_overlap_are_named(node: Node) -> None:
    node.outside()
    node.create("there", nat(), start=False)
    links = set(node.namespace.links())
    with pytest.raises(Refusal) as network:
        node.create("demo", nat("192.168.176.0/22", None))
    with pytest.raises(Refusal) as link:
        node.create("demo", nat("198.51.100.0/28", None))
    for refused, holder in ((network.value, f"{NODE}/networks/there"), (link.value, "wan0")):
        assert (refused.code, refused.reason) == (FAILED, "SUBNET_OVERLAP")
        assert refused.metadata["holder"] == holder
    assert set(node.namespace.links()) == links
    assert node.namespace.tables() == set()
    assert node.all_dnsmasq() == []


@pytest.mark.parametrize(
    ("network_id", "reason"),
    [("Up", "NAME_MALFORMED"), ("a" * 64, "NAME_MALFORMED"), ("a-", "NAME_MALFORMED"), ("d\u0435mo", "NAME_MALFORMED")],
)
def test_ids_that_cannot_be(node: Node, network_id: str, reason: str) -> None:
    with pytest.raises(Refusal) as refused:
        node.create(network_id, nat())
    assert (refused.value.code, refused.value.reason, refused.value.field) == (INVALID, reason, "network_id")


def test_a_second_one_of_the_same_name_or_uid(node: Node) -> None:
    network = node.create("demo", nat(), start=False)
    with pytest.raises(Refusal) as name:
        node.create("demo", nat("10.1.0.0/24", None))
    assert (name.value.code, name.value.reason) == (EXISTS, "RESOURCE_EXISTS")
    with pytest.raises(Refusal) as uid, translated():
        node.networks.CreateNetwork(
            network_pb2.CreateNetworkRequest(
                parent=NODE, network_id="two", network=network_pb2.Network(uid=network.uid)
            )
        )
    assert (uid.value.code, uid.value.reason, uid.value.field) == (EXISTS, "IDENTITY_IN_USE", "network.uid")
    assert uid.value.metadata["holder"] == network.name
    listed = node.networks.ListNetworks(network_pb2.ListNetworksRequest(parent=NODE)).networks
    assert list(listed) == [network]


def test_missing_programs_are_named_and_the_network_stays_inactive(bare_node: Node) -> None:
    node = bare_node
    node.settings |= {"nft": "/nonexistent/nft"}
    node.start_launcher()
    node.start_service()
    node.create("demo", nat(), start=False)
    with pytest.raises(Refusal) as nft:
        node.start("demo")
    assert (nft.value.code, nft.value.reason) == (grpc.StatusCode.UNAVAILABLE, "DRIVER_BROKEN")
    assert nft.value.metadata["cause"] == "NFT_MISSING"
    status = node.get("demo").status
    assert status.state == network_pb2.NETWORK_STATE_INACTIVE
    assert "nft" in status.state_message
    node.end("service")
    del node.settings["nft"]
    node.settings |= {"dnsmasq": "/nonexistent/dnsmasq"}
    node.start_service()
    with pytest.raises(Refusal) as dnsmasq:
        node.start("demo")
    assert (dnsmasq.value.code, dnsmasq.value.reason) == (grpc.StatusCode.UNAVAILABLE, "DRIVER_BROKEN")
    assert dnsmasq.value.metadata["cause"] == "DNSMASQ_MISSING"
    status = node.get("demo").status
    assert status.state == network_pb2.NETWORK_STATE_INACTIVE
    assert "dnsmasq" in status.state_message
    assert node.all_dnsmasq() == []
    assert set(node.namespace.links()) == {"lo"}
    assert node.namespace.tables() == set()


NFT = """#!/bin/sh
mode=$(cat {folder}/mode)
case "$mode $*" in
    "refuse -f -") cat >/dev/null; echo "Error: Could not process rule: No such file or directory" >&2; exit 1 ;;
    "die -f -") kill -9 $$ ;;
    "babble -j list"*) echo "table inet filter {{"; exit 0 ;;
esac
exec /usr/sbin/nft "$@"
"""


@pytest.mark.parametrize(
    ("mode", "text"), [("refuse", "Could not process rule"), ("die", "signal 9"), ("babble", "no JSON")]
)
def test_nft_that_fails_says_why_and_nothing_is_left(bare_node: Node, mode: str, text: str) -> None:
    node = bare_node
    program, state = node.folder / "nft", node.folder / "mode"
    program.write_text(NFT.format(folder=node.folder))
    program.chmod(0o755)
    state.write_text("real")
    node.settings |= {"nft": str(program)}
    node.start_launcher()
    node.start_service()
    node.create("demo", nat(), start=False)
    other = node.create("other", nat("192.168.178.0/24"))
    links, ruleset = set(node.namespace.links()), node.namespace("nft", "list", "ruleset")
    state.write_text(mode)
    with pytest.raises(Refusal) as refused:
        node.start("demo")
    assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.INTERNAL, "BACKEND_FAILED")
    assert text in refused.value.message + refused.value.metadata.get("said", "")
    status = node.get("demo").status
    assert status.state == network_pb2.NETWORK_STATE_INACTIVE
    assert status.state_reason == network_pb2.NETWORK_STATE_REASON_START_FAILED
    state.write_text("real")
    # What runs beside it was not touched, or is as it was a moment later.
    for _ in range(100):
        if set(node.namespace.links()) == links and node.namespace("nft", "list", "ruleset") == ruleset:
            break
        threading.Event().wait(0.1)
    assert set(node.namespace.links()) == links
    assert node.namespace("nft", "list", "ruleset") == ruleset
    assert node.all_dnsmasq() == [node.dnsmasq(other.uid)]
    assert "Traceback" not in node.log()
    # And it is no obstacle.
    assert node.start("demo").status.state == network_pb2.NETWORK_STATE_RUNNING


def test_a_stop_that_nft_fails_leaves_a_network_that_runs(bare_node: Node) -> None:
    """What had been removed before the failure comes back by itself, and the next try ends it."""
    node = bare_node
    program, state = node.folder / "nft", node.folder / "mode"
    program.write_text(NFT.format(folder=node.folder))
    program.chmod(0o755)
    state.write_text("real")
    node.settings |= {"nft": str(program)}
    node.start_launcher()
    node.start_service()
    network = node.create("demo", nat())
    state.write_text("refuse")
    with pytest.raises(Refusal) as refused:
        node.stop("demo")
    assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.INTERNAL, "BACKEND_FAILED")
    assert node.get("demo").status.state != network_pb2.NETWORK_STATE_INACTIVE
    state.write_text("real")
    for _ in range(100):
        if node.dnsmasq(network.uid) and network.status.bridge_name in node.namespace.links():
            break
        threading.Event().wait(0.1)
    assert node.guest(network.status.bridge_name).dhcp()["ip"].startswith("192.168.177.")
    assert node.stop("demo").status.state == network_pb2.NETWORK_STATE_INACTIVE
    assert network.status.bridge_name not in node.namespace.links()
    assert node.namespace.tables() == set()
    assert node.all_dnsmasq() == []


def test_dnsmasq_that_fails_says_why_and_nothing_is_left(node: Node) -> None:
    program = (
        "import socket; s = socket.socket(); s.bind(('0.0.0.0', 53)); s.listen(); print('ready', flush=True); input()"
    )
    with subprocess.Popen(
        [*node.prefix, sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(Refusal) as refused:
            node.create("demo", nat())
        other.kill()
    assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.INTERNAL, "BACKEND_FAILED")
    assert "Address already in use" in refused.value.metadata["said"]
    assert set(node.namespace.links()) == {"lo"}
    assert node.namespace.tables() == set()
    assert node.all_dnsmasq() == []
    assert list((node.folder / "state" / "dnsmasq").iterdir()) == []


def test_delete_and_lists(node: Node) -> None:
    node.create("demo", nat())
    with pytest.raises(Refusal) as running:
        node.delete("demo")
    assert (running.value.reason, running.value.metadata["state"]) == ("WRONG_STATE", "RUNNING")
    node.create_port("demo", "p1")
    node.stop("demo")
    with pytest.raises(Refusal) as children:
        node.delete("demo")
    assert children.value.reason == "HAS_CHILDREN"
    node.delete("demo", force=True)
    with pytest.raises(grpc.RpcError, match="does not exist"):
        node.ports.ListPorts(port_pb2.ListPortsRequest(parent=f"{NODE}/networks/demo"))
    missing = network_pb2.DeleteNetworkRequest(name=f"{NODE}/networks/demo", allow_missing=True)
    assert node.networks.DeleteNetwork(missing).done
    with pytest.raises(grpc.RpcError) as syntax:
        node.networks.ListNetworks(network_pb2.ListNetworksRequest(parent=NODE, filter="("))
    assert syntax.value.code() == INVALID


def test_lists_in_pages_by_filter_and_view(node: Node) -> None:
    for number in range(3):
        node.create(f"n{number}", nat(f"10.0.{number}.0/24", None), start=number == 1)
    request = network_pb2.ListNetworksRequest(parent=NODE, page_size=2, view=resource_pb2.RESOURCE_VIEW_BASIC)
    first = node.networks.ListNetworks(request)
    assert len(first.networks) == 2
    assert not first.networks[0].HasField("spec")
    assert not first.networks[0].status.HasField("resolved_spec")
    request.page_token = first.next_page_token
    assert [item.name for item in node.networks.ListNetworks(request).networks] == [f"{NODE}/networks/n2"]
    up = network_pb2.ListNetworksRequest(parent=NODE, filter="status.state=NETWORK_STATE_RUNNING")
    assert [item.name for item in node.networks.ListNetworks(up).networks] == [f"{NODE}/networks/n1"]

"""The life of a network, seen from the kernel."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import grpc
import pytest

from tests.integration.network.rig import DNSMASQ_UID, NODE, Node, Refusal, add_subnet, nat
from virtfleet.network.v1 import network_pb2, watch_pb2
from virtfleet.type.v1 import resource_pb2


def forwarding(node: Node) -> str:
    return node.namespace("cat", "/proc/sys/net/ipv4/ip_forward").strip()


def test_a_nat_network_runs_as_its_status_says(node: Node) -> None:
    assert forwarding(node) == "0"
    spec = nat()
    spec.mtu_bytes = 1400
    add_subnet(spec, "six", "fd00:177::/64", (0x10, 0xFF))
    network = node.create("demo", spec)

    assert network.status.state == network_pb2.NETWORK_STATE_RUNNING
    bridge = node.namespace.links()[network.status.bridge_name]
    assert bridge["linkinfo"]["info_kind"] == "bridge"
    assert bridge["mtu"] == 1400
    assert bridge["ifalias"] == f"virtfleet:{network.uid}"
    assert bridge["address"] == network.status.resolved_spec.mac_address
    assert "UP" in bridge["flags"]
    assert node.namespace.addresses(network.status.bridge_name) == {"192.168.177.1/24", "fd00:177::1/64"}
    assert node.namespace.tables() == {"inet virtfleet"}
    assert forwarding(node) == "1"
    assert network.status.bridge_name == f"vf-{network.uid[:8]}"
    assert len(network.status.bridge_name) <= 15


def test_dnsmasq_has_an_id_of_its_own_and_three_capabilities(node: Node) -> None:
    network = node.create("demo", nat())
    pid = node.dnsmasq(network.uid)
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    assert set(status["Uid"].split()) == {str(DNSMASQ_UID)}
    assert set(status["Gid"].split()) == {str(DNSMASQ_UID)}
    assert status["Groups"].strip() == ""
    # CAP_NET_BIND_SERVICE, CAP_NET_ADMIN, CAP_NET_RAW
    assert int(status["CapEff"], 16) == 1 << 10 | 1 << 12 | 1 << 13
    assert status["NoNewPrivs"].strip() == "1"
    parent = int(status["PPid"])
    assert "virtfleet_launcher" in Path(f"/proc/{parent}/cmdline").read_text()


def test_stop_and_delete_leave_nothing(node: Node) -> None:
    network = node.create("demo", nat())
    stopped = node.stop("demo")
    assert stopped.status.state == network_pb2.NETWORK_STATE_INACTIVE
    assert not stopped.status.HasField("active_spec")
    assert set(node.namespace.links()) == {"lo"}
    assert node.namespace.tables() == set()
    assert node.dnsmasq(network.uid) == 0
    assert forwarding(node) == "0"
    assert node.stop("demo").uid == network.uid
    node.delete("demo")
    assert list((node.folder / "state" / "dnsmasq").iterdir()) == []
    with pytest.raises(Refusal) as refused:
        node.get("demo")
    assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.NOT_FOUND, "RESOURCE_NOT_FOUND")


def test_nothing_stays_written_down_of_a_network_with_ports_that_goes(node: Node) -> None:
    def written() -> list[tuple[str, str]]:
        with closing(sqlite3.connect(f"file:{node.folder}/state/network.db?mode=ro", uri=True)) as store:
            return store.execute("SELECT space, key FROM records WHERE space != 'node' ORDER BY space, key").fetchall()

    before = written()
    node.create("demo", nat())
    node.create_port("demo", "p1")
    assert written() != before
    node.delete("demo", force=True)
    assert written() == before


def test_what_is_decided_stays_over_stop_and_start(node: Node) -> None:
    first = node.create("demo", nat())
    node.stop("demo")
    second = node.start("demo")
    assert second.status.resolved_spec == first.status.resolved_spec
    assert node.start("demo").status.start_time == second.status.start_time
    assert second.generation == 1


def test_forwarding_that_somebody_else_had_on_stays_on(node: Node) -> None:
    node.namespace("busybox", "sysctl", "-q", "-w", "net.ipv4.ip_forward=1")
    node.create("demo", nat())
    node.stop("demo")
    assert forwarding(node) == "1"


def test_two_networks_share_one_table_and_forwarding_stays_for_the_second(node: Node) -> None:
    node.create("one", nat("192.168.10.0/24"))
    node.create("two", nat("192.168.11.0/24"))
    node.delete("one", force=True)
    assert node.namespace.tables() == {"inet virtfleet"}
    listing = node.namespace("nft", "list", "table", "inet", "virtfleet")
    assert "192.168.11.0/24" in listing
    assert "192.168.10.0/24" not in listing
    assert forwarding(node) == "1"


def test_an_isolated_network_without_subnets_is_a_bridge_alone(node: Node) -> None:
    network = node.create("demo", network_pb2.NetworkSpec())
    assert network.status.active_spec.WhichOneof("forward") == "isolated"
    assert node.namespace.addresses(network.status.bridge_name) == set()
    assert node.dnsmasq(network.uid) == 0
    assert forwarding(node) == "0"


def test_a_transient_network_starts_at_once_and_goes_with_its_stop(node: Node) -> None:
    spec = nat()
    spec.lifetime = resource_pb2.LIFETIME_TRANSIENT
    assert node.create("demo", spec, start=False).status.state == network_pb2.NETWORK_STATE_RUNNING
    node.stop("demo")
    with pytest.raises(Refusal, match="does not exist"):
        node.get("demo")


def test_validate_only_changes_nothing(node: Node) -> None:
    planned = node.create("demo", nat(), validate_only=True)
    assert planned.status.resolved_spec.subnets["lan"].host_address == "192.168.177.1"
    assert set(node.namespace.links()) == {"lo"}
    with pytest.raises(Refusal, match="does not exist"):
        node.get("demo")


def test_a_repeated_request_id_gets_the_same_operation(node: Node) -> None:
    request = network_pb2.CreateNetworkRequest(parent=NODE, network_id="demo", start=True, request_id="r1")
    request.network.spec.CopyFrom(nat())
    first = node.networks.CreateNetwork(request)
    assert node.networks.CreateNetwork(request).name == first.name
    assert node.done(first, network_pb2.Network).status.state == network_pb2.NETWORK_STATE_RUNNING


def test_hosts_ranges_and_names_change_live_and_the_rest_is_pending(node: Node) -> None:
    network = node.create("demo", nat())
    pid = node.dnsmasq(network.uid)
    change = network_pb2.Network(name=network.name)
    change.spec.mtu_bytes = 1300
    change.spec.title = "a title"
    change.spec.dns.hosts["printer"].address = "192.168.177.5"
    change.spec.dns.hosts["printer"].hostnames.append("printer.demo.test")
    updated = node.update(change)
    assert updated.generation == 2
    assert [(item.path, item.reason) for item in updated.status.pending_changes] == [
        ("spec.mtu_bytes", "NEEDS_RESTART")
    ]
    assert updated.status.active_spec.mtu_bytes == 1500
    assert updated.status.active_spec.dns.hosts["printer"].address == "192.168.177.5"
    assert node.dnsmasq(network.uid) == pid, "names change without another process"
    guest = node.guest(network.status.bridge_name)
    guest.dhcp()
    assert "192.168.177.5" in guest.lookup("printer.demo.test", "192.168.177.1")
    node.stop("demo")
    again = node.start("demo")
    assert not again.status.pending_changes
    assert node.namespace.links()[network.status.bridge_name]["mtu"] == 1300


def test_scopes(node: Node) -> None:
    network = node.create("demo", nat())
    change = network_pb2.Network(name=network.name)
    change.spec.mtu_bytes = 1300
    with pytest.raises(Refusal) as refused:
        node.update(change, "spec.mtu_bytes", scope=resource_pb2.CHANGE_SCOPE_LIVE_AND_CONFIG)
    assert refused.value.reason == "NOT_LIVE_UPDATABLE"
    assert refused.value.metadata["paths"] == "spec.mtu_bytes"
    assert node.get("demo").generation == 1

    change.spec.domain_name = "other.test"
    config = node.update(change, "spec.domain_name", scope=resource_pb2.CHANGE_SCOPE_CONFIG)
    assert config.status.active_spec.domain_name == "demo.test"
    assert [(item.path, item.reason) for item in config.status.pending_changes] == [
        ("spec.domain_name", "SCOPE_CONFIG")
    ]

    change.spec.domain_name = "live.test"
    live = node.update(change, "spec.domain_name", scope=resource_pb2.CHANGE_SCOPE_LIVE)
    assert live.spec.domain_name == "other.test"
    assert live.status.active_spec.domain_name == "live.test"
    assert live.generation == config.generation
    node.stop("demo")
    with pytest.raises(Refusal) as stopped:
        node.update(change, "spec.domain_name", scope=resource_pb2.CHANGE_SCOPE_LIVE)
    assert (stopped.value.reason, stopped.value.metadata["state"]) == ("WRONG_STATE", "INACTIVE")


def test_an_update_with_another_etag_or_uid_changes_nothing(node: Node) -> None:
    network = node.create("demo", nat(), start=False)
    change = network_pb2.Network(name=network.name, display_name="x", etag="old")
    with pytest.raises(Refusal) as refused:
        node.update(change, "display_name")
    assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    change = network_pb2.Network(name=network.name, display_name="x", uid="00000000-0000-4000-8000-000000000000")
    with pytest.raises(Refusal) as other:
        node.update(change, "display_name")
    assert other.value.reason == "UID_MISMATCH"
    assert node.get("demo") == network


def test_update_creates_what_is_missing_if_allowed(node: Node) -> None:
    network = network_pb2.Network(name=f"{NODE}/networks/made")
    network.spec.CopyFrom(nat())
    made = node.update(network, allow_missing=True)
    assert (made.generation, made.status.state) == (1, network_pb2.NETWORK_STATE_INACTIVE)


@pytest.mark.parametrize("bridge", ["br.very_long-15", "0", "A-._"])
def test_a_name_of_a_link_at_its_limits_serves_as_any_other(node: Node, bridge: str) -> None:
    spec = nat()
    spec.bridge_name = bridge
    add_subnet(spec, "six", "fd00:177::/64", None)
    network = node.create("demo", spec)
    assert network.status.bridge_name == bridge
    assert node.namespace.addresses(bridge) == {"192.168.177.1/24", "fd00:177::1/64"}
    assert f'iifname "{bridge}"' in node.namespace("nft", "list", "table", "inet", "virtfleet")
    guest = node.guest(bridge)
    assert guest.dhcp()["ip"].startswith("192.168.177.")
    with node.expecting(watch_pb2.EVENT_TYPE_NETWORK_RESTORED):
        node.namespace("ip", "link", "set", bridge, "down")
    assert guest.pings("192.168.177.1")
    node.delete("demo", force=True)
    assert bridge not in node.namespace.links()
    assert node.namespace.tables() == set()

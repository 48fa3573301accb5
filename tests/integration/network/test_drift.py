"""What others take away or change is noticed within seconds, told, and made again."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.integration.network.rig import NODE, Node, nat, new_uid
from virtfleet.network.v1 import network_pb2, watch_pb2
from virtfleet.type.v1 import resource_pb2

DRIFTED, RESTORED = watch_pb2.EVENT_TYPE_NETWORK_DRIFTED, watch_pb2.EVENT_TYPE_NETWORK_RESTORED
SECONDS = 10.0


def flush(node: Node, _bridge: str, _tap: str) -> None:
    node.namespace("nft", "flush", "ruleset")


def delete_rule(node: Node, _bridge: str, _tap: str) -> None:
    node.namespace("nft", "flush", "chain", "inet", "virtfleet", "postrouting")


def delete_bridge(node: Node, bridge: str, _tap: str) -> None:
    node.namespace("ip", "link", "del", bridge)


def bridge_down(node: Node, bridge: str, _tap: str) -> None:
    node.namespace("ip", "link", "set", bridge, "down")


def delete_address(node: Node, bridge: str, _tap: str) -> None:
    node.namespace("ip", "address", "flush", "dev", bridge, "scope", "global")


def leave_bridge(node: Node, _bridge: str, tap: str) -> None:
    node.namespace("ip", "link", "set", tap, "nomaster")


def delete_tap(node: Node, _bridge: str, tap: str) -> None:
    node.namespace("ip", "link", "del", tap)


def stop_forwarding(node: Node, _bridge: str, _tap: str) -> None:
    node.namespace("busybox", "sysctl", "-q", "-w", "net.ipv4.ip_forward=0")


def end_isolation(node: Node, _bridge: str, tap: str) -> None:
    node.namespace("bridge", "link", "set", "dev", tap, "isolated", "off")


def isolate(node: Node, _bridge: str, tap: str) -> None:
    node.namespace("bridge", "link", "set", "dev", tap, "isolated", "on")


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (flush, "RULES_CHANGED"),
        (delete_rule, "RULES_CHANGED"),
        (delete_bridge, "LINK_LOST"),
        (bridge_down, "LINK_CHANGED"),
        (delete_address, "ADDRESS_LOST"),
        (leave_bridge, "LINK_CHANGED"),
        (delete_tap, "LINK_LOST"),
        (stop_forwarding, "FORWARDING_DISABLED"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_harm_is_noticed_and_mended(node: Node, harm: Callable[[Node, str, str], None], reason: str) -> None:
    outside = node.outside()
    network = node.create("demo", nat())
    bridge, domain_uid = network.status.bridge_name, new_uid()
    node.reserve("demo", "d1-lan", domain_uid)
    tap = node.plug(f"{NODE}/networks/demo/ports/d1-lan", domain_uid).tap.interface_name
    rules = node.namespace("nft", "list", "table", "inet", "virtfleet")
    with node.expecting(DRIFTED, RESTORED, seconds=SECONDS) as events:
        harm(node, bridge, tap)
    assert reason in [event.reason for event in events if event.type == DRIFTED]
    links = node.namespace.links()
    assert "UP" in links[bridge]["flags"]
    assert links[tap]["master"] == bridge
    assert node.namespace.addresses(bridge) == {"192.168.177.1/24"}
    assert node.namespace("nft", "list", "table", "inet", "virtfleet") == rules
    # And it works: a lease, and a way out.
    guest = node.guest(bridge)
    guest.dhcp()
    assert guest.pings("198.51.100.2")
    assert outside.links()
    status = node.get("demo").status
    assert status.state == network_pb2.NETWORK_STATE_RUNNING
    [drifted] = [item for item in status.conditions if item.type == "Drifted"]
    assert drifted.status == resource_pb2.CONDITION_STATUS_FALSE


def test_what_is_not_ours_is_left_alone(node: Node) -> None:
    node.namespace("nft", "add", "table", "inet", "other")
    node.namespace("ip", "link", "add", "br-other", "type", "bridge")
    node.namespace("ip", "tuntap", "add", "vp-0123456789", "mode", "tap")
    node.create("demo", nat())
    node.stop("demo")
    node.end("service")
    node.start_service()
    assert node.namespace.tables() == {"inet other"}
    assert set(node.namespace.links()) == {"lo", "br-other", "vp-0123456789"}


def test_another_link_with_the_bridges_name_is_told_and_not_touched(node: Node) -> None:
    network = node.create("demo", nat())
    bridge = network.status.bridge_name
    node.end("service")
    node.namespace("ip", "link", "del", bridge)
    node.namespace("ip", "tuntap", "add", bridge, "mode", "tap")
    node.start_service()
    status = node.get("demo").status
    assert status.state == network_pb2.NETWORK_STATE_DEGRADED
    assert bridge in status.state_message
    assert node.namespace.links()[bridge]["linkinfo"]["info_kind"] == "tun"
    with node.expecting(RESTORED):
        node.namespace("ip", "link", "del", bridge)
    assert node.get("demo").status.state == network_pb2.NETWORK_STATE_RUNNING
    assert node.namespace.links()[bridge]["linkinfo"]["info_kind"] == "bridge"


@pytest.mark.parametrize(("isolated", "harm"), [(True, end_isolation), (False, isolate)])
def test_guests_stay_as_far_apart_as_was_asked(
    node: Node,
    isolated: bool,  # noqa: FBT001
    harm: Callable[[Node, str, str], None],
) -> None:
    spec = nat()
    spec.port_isolation = isolated
    network = node.create("demo", spec)
    domain_uid = new_uid()
    node.reserve("demo", "d1-lan", domain_uid)
    tap = node.plug(f"{NODE}/networks/demo/ports/d1-lan", domain_uid).tap.interface_name
    with node.expecting(DRIFTED, RESTORED, seconds=SECONDS) as events:
        harm(node, network.status.bridge_name, tap)
    assert [event.reason for event in events if event.type == DRIFTED] == ["LINK_CHANGED"]
    [port] = node.namespace.json("bridge", "-j", "-d", "link", "show", "dev", tap)
    assert port["isolated"] is isolated

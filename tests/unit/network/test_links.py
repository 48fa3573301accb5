from __future__ import annotations

import ipaddress
from dataclasses import replace

import pytest

from virtfleet_network.backends.api import PortLink
from virtfleet_network.backends.bridge.links import (
    BridgeSettings,
    Link,
    Snapshot,
    bridge_differences,
    overlaps,
    tap_differences,
)

MAC = "52:54:00:00:00:01"
UID = "0c6e9d3e-8b8b-4d0a-9c58-6f2d6c0a1a11"
SETTINGS = BridgeSettings(UID, "vf-0c6e9d3e", MAC, 1500, (ipaddress.ip_interface("192.168.5.1/24"),), (), False)
BRIDGE = Link(5, "vf-0c6e9d3e", f"virtfleet:{UID}", "bridge", MAC, 1500, True, 0)
TAP = Link(6, "vp-1", "virtfleet:port", "tun", MAC, 1500, True, 5)
PORT = PortLink("port", "vp-1", MAC)
ADDRESSES = ((5, ipaddress.ip_interface("192.168.5.1/24")),)


def seen(*links: Link) -> Snapshot:
    return Snapshot({link.name: link for link in links}, ADDRESSES, ())


def test_a_bridge_as_it_should_be() -> None:
    assert bridge_differences(SETTINGS, seen(BRIDGE)) == (False, False, False)


@pytest.mark.parametrize(
    "harm",
    [{"up": False}, {"mtu_bytes": 1400}, {"mac_address": "52:54:00:00:00:02"}, {"master": 9}],
    ids=str,
)
def test_a_bridge_that_others_changed_or_joined_to_something(harm: dict[str, object]) -> None:
    assert bridge_differences(SETTINGS, seen(replace(BRIDGE, **harm))) == (False, True, False)  # type: ignore[arg-type]  # fields of the link


@pytest.mark.parametrize("there", [(), (replace(BRIDGE, alias=""),), (replace(BRIDGE, alias="virtfleet:other"),)])
def test_a_bridge_that_is_gone_or_is_not_ours(there: tuple[Link, ...]) -> None:
    assert bridge_differences(SETTINGS, seen(*there)) == (True, False, False)


@pytest.mark.parametrize(
    ("harm", "wanted"),
    [
        ({}, (False, False)),
        ({"master": 0}, (False, True)),
        ({"up": False}, (False, True)),
        ({"isolated": True}, (False, True)),
        ({"alias": "virtfleet:another"}, (True, False)),
    ],
    ids=str,
)
def test_a_tap_is_where_and_as_it_should_be(harm: dict[str, object], wanted: tuple[bool, bool]) -> None:
    assert tap_differences(PORT, SETTINGS, seen(BRIDGE, replace(TAP, **harm))) == wanted  # type: ignore[arg-type]  # fields of the link


def test_what_overlaps_is_named_and_default_routes_are_not_counted() -> None:
    snapshot = Snapshot(
        {"eth0": replace(BRIDGE, index=2, name="eth0")},
        ((2, ipaddress.ip_interface("10.0.0.5/16")),),
        ((2, ipaddress.ip_network("0.0.0.0/0"), "10.0.0.1"), (2, ipaddress.ip_network("fd00:9::/48"), "")),
    )
    found = overlaps([ipaddress.ip_network("fd00:9:0:7::/64")], snapshot, frozenset())
    assert found is not None
    assert (str(found[1]), found[2]) == ("fd00:9::/48", "eth0")
    assert overlaps([ipaddress.ip_network("10.1.0.0/24")], snapshot, frozenset()) is None
    assert overlaps([ipaddress.ip_network("10.0.9.0/24")], snapshot, frozenset({"eth0"})) is None

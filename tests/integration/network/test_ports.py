"""Ports: what is reserved, what is plugged, and what is refused."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.protobuf import empty_pb2

from tests.integration.network.rig import NODE, Node, Refusal, add_subnet, nat, new_uid
from virtfleet.network.v1 import network_pb2, port_pb2, watch_pb2
from virtfleet.node.v1 import plug_pb2

PORT = f"{NODE}/networks/demo/ports/d1-lan"


def taps(node: Node) -> dict[str, dict[str, object]]:
    return {name: link for name, link in node.namespace.links().items() if name.startswith("vp-")}


def test_a_port_reserves_and_touches_no_link(node: Node) -> None:
    node.create("demo", nat(), start=False)
    port = node.create_port("demo", "p1")
    assert port.status.mac_address.startswith("52:54:00:")
    assert list(port.status.addresses) == ["192.168.177.10"]
    assert port.status.state == port_pb2.PORT_STATE_UNPLUGGED
    assert set(node.namespace.links()) == {"lo"}
    assert node.get("demo").status.addresses_free == 190
    listed = node.ports.ListPorts(port_pb2.ListPortsRequest(parent=f"{NODE}/networks/-"))
    assert [item.name for item in listed.ports] == [port.name]


def test_plug_makes_a_tap_of_the_guests_user_on_the_bridge(node: Node) -> None:
    network = node.create("demo", nat())
    domain_uid = new_uid()
    reserved = node.reserve("demo", "d1-lan", domain_uid)
    with node.expecting(watch_pb2.EVENT_TYPE_PORT_PLUGGED):
        plugged = node.plug(PORT, domain_uid)
    assert plugged.mac_address == reserved.mac_address
    assert plugged.tap.bridge_name == network.status.bridge_name
    assert plugged.mtu_bytes == 1500
    link = taps(node)[plugged.tap.interface_name]
    assert link["master"] == network.status.bridge_name
    assert link["ifalias"] == f"virtfleet:{node.get_port(PORT).uid}"
    data = link["linkinfo"]["info_data"]  # type: ignore[index]  # JSON
    assert (data["type"], data["persist"], data["user"], data["vnet_hdr"], data["pi"]) == (
        "tap",
        True,
        20001,
        True,
        False,
    )
    assert node.plug(PORT, domain_uid) == plugged, "the same link again"
    assert len(taps(node)) == 1
    assert node.get("demo").status.connections == 1
    status = node.get_port(PORT).status
    assert (status.state, status.holder.domain_uid) == (port_pb2.PORT_STATE_PLUGGED, domain_uid)
    listed = node.peer("ListPlugs", plug_pb2.ListPlugsRequest(parent=NODE))
    assert [(item.port, item.plugged, item.interface_name) for item in listed.plugs] == [
        (PORT, True, plugged.tap.interface_name)
    ]


def gone(node: Node, names: set[str]) -> None:
    """Wait until taps are gone: the kernel says so."""
    script = f"while ip -o link | grep -q -E '({'|'.join(names)})'; do sleep 0.02; done"
    node.namespace("timeout", "5", "sh", "-c", script)


def test_unplug_answers_and_the_tap_goes(node: Node) -> None:
    node.create("demo", nat())
    domain_uid = new_uid()
    node.reserve("demo", "d1-lan", domain_uid)
    name = node.plug(PORT, domain_uid).tap.interface_name
    node.unplug(PORT, domain_uid)
    node.unplug(PORT, domain_uid)
    status = node.get_port(PORT).status
    assert (status.state, status.WhichOneof("plug")) == (port_pb2.PORT_STATE_UNPLUGGED, None)
    again = node.plug(PORT, domain_uid).tap.interface_name
    assert again != name
    gone(node, {name})
    assert set(taps(node)) == {again}
    node.unplug(PORT, domain_uid)
    node.peer("UnreservePort", plug_pb2.UnreservePortRequest(name=PORT, domain_uid=domain_uid))
    node.peer("UnreservePort", plug_pb2.UnreservePortRequest(name=PORT, domain_uid=domain_uid))
    gone(node, {again})
    assert node.get("demo").status.addresses_free == 191


def test_many_taps_go_together(node: Node) -> None:
    node.create("demo", nat())
    names = {}
    for number in range(12):
        uid = new_uid()
        node.reserve("demo", f"p{number}", uid)
        names[number] = uid
        node.plug(f"{NODE}/networks/demo/ports/p{number}", uid)
    links = set(taps(node))
    assert len(links) == 12
    for number, uid in names.items():
        node.unplug(f"{NODE}/networks/demo/ports/p{number}", uid)
    gone(node, links)


def test_a_port_is_of_one_domain(node: Node) -> None:
    node.create("demo", nat())
    owner, other = new_uid(), new_uid()
    node.reserve("demo", "d1-lan", owner)
    assert node.reserve("demo", "d1-lan", owner).port == PORT
    for attempt in (
        lambda: node.plug(PORT, other),
        lambda: node.peer("UnreservePort", plug_pb2.UnreservePortRequest(name=PORT, domain_uid=other)),
        lambda: node.done(node.ports.DeletePort(port_pb2.DeletePortRequest(name=PORT)), port_pb2.Port),
    ):
        with pytest.raises((Refusal, grpc.RpcError)) as refused:
            attempt()
        assert "RESOURCE_IN_USE" in str(getattr(refused.value, "reason", "")) or "d1" in str(refused.value)
    with pytest.raises(Refusal) as exists:
        node.reserve("demo", "d1-lan", other)
    assert exists.value.reason == "RESOURCE_EXISTS"
    node.plug(PORT, owner)
    with pytest.raises(Refusal) as plugged:
        node.peer("UnreservePort", plug_pb2.UnreservePortRequest(name=PORT, domain_uid=owner))
    assert (plugged.value.reason, plugged.value.metadata["state"]) == ("WRONG_STATE", "PLUGGED")


def test_identities_are_unique(node: Node) -> None:
    node.create("demo", nat())
    node.create("other", nat("192.168.178.0/24"))
    first = node.create_port("demo", "one", mac_address="52:54:00:aa:bb:cc", addresses=["192.168.177.50"])
    with pytest.raises(Refusal) as mac:
        node.create_port("other", "two", mac_address="52:54:00:aa:bb:cc")
    assert (mac.value.code, mac.value.reason) == (grpc.StatusCode.ALREADY_EXISTS, "IDENTITY_IN_USE")
    assert (mac.value.field, mac.value.metadata["holder"]) == ("port.spec.mac_address", first.name)
    with pytest.raises(Refusal) as address:
        node.create_port("demo", "two", addresses=["192.168.177.50"])
    assert (address.value.reason, address.value.metadata["holder"]) == ("IDENTITY_IN_USE", first.name)
    with pytest.raises(Refusal) as own:
        node.create_port("demo", "two", addresses=["192.168.177.1"])
    assert own.value.reason == "IDENTITY_IN_USE"
    with pytest.raises(Refusal) as elsewhere:
        node.create_port("demo", "two", addresses=["10.0.0.1"])
    assert (elsewhere.value.reason, elsewhere.value.field) == ("FIELD_OUT_OF_RANGE", "port.spec.addresses[0]")
    assert len(node.ports.ListPorts(port_pb2.ListPortsRequest(parent=f"{NODE}/networks/-")).ports) == 1


def test_a_port_of_the_largest_mtu_is_plugged(node: Node) -> None:
    spec = nat()
    spec.mtu_bytes = 65521
    node.create("demo", spec)
    owner = new_uid()
    node.reserve("demo", "d1-lan", owner)
    assert node.plug(PORT, owner).mtu_bytes == 65521
    [tap] = taps(node).values()
    assert tap["mtu"] == 65521


def test_an_address_with_a_zone_is_none(node: Node) -> None:
    spec = nat()
    add_subnet(spec, "six", "fd00:177::/64", None)
    network = node.create("demo", spec)
    hosts = node.folder / "state" / "dnsmasq" / network.uid / "dhcp-hosts"
    with pytest.raises(Refusal) as refused:
        node.create_port("demo", "one", addresses=["fd00:177::5%x]\nset:known,52:54:00:00:00:09,192.168.177.77"])
    assert (refused.value.reason, refused.value.field) == ("FIELD_OUT_OF_RANGE", "port.spec.addresses[0]")
    assert not node.ports.ListPorts(port_pb2.ListPortsRequest(parent=network.name)).ports
    assert hosts.read_text() == ""


def test_addresses_end(node: Node) -> None:
    node.create("demo", nat(ranges=(10, 11)))
    node.create_port("demo", "one")
    two = node.create_port("demo", "two")
    with pytest.raises(Refusal) as refused:
        node.create_port("demo", "three")
    assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "ADDRESSES_EXHAUSTED")
    node.ports.DeletePort(port_pb2.DeletePortRequest(name=two.name))
    assert list(node.create_port("demo", "three").status.addresses) == list(two.status.addresses)


def test_a_network_with_plugged_ports_stops_by_force_alone_and_finds_them_again(node: Node) -> None:
    network = node.create("demo", nat())
    domain_uid = new_uid()
    node.reserve("demo", "d1-lan", domain_uid)
    tap = node.plug(PORT, domain_uid).tap.interface_name
    with pytest.raises(Refusal) as refused:
        node.stop("demo")
    assert (refused.value.reason, refused.value.metadata["holder"]) == ("RESOURCE_IN_USE", f"{NODE}/domains/d1")
    with pytest.raises(Refusal) as children:
        node.delete("demo", force=True)
    assert (children.value.reason, children.value.metadata["holder"]) == ("HAS_CHILDREN", PORT)
    node.stop("demo", force=True)
    assert "master" not in taps(node)[tap]
    other = new_uid()
    node.reserve("demo", "d2-lan", other)
    with pytest.raises(Refusal) as stopped:
        node.plug(f"{NODE}/networks/demo/ports/d2-lan", other)
    assert (stopped.value.reason, stopped.value.metadata["state"]) == ("WRONG_STATE", "INACTIVE")
    node.start("demo")
    assert taps(node)[tap]["master"] == network.status.bridge_name


@pytest.mark.parametrize("method", ["StopNetwork", "DeleteNetwork"])
def test_nothing_is_plugged_into_a_network_that_is_about_to_end(node: Node, method: str) -> None:
    """Whoever ends it was told that nobody is plugged: that must hold until it has ended."""
    created = node.create("demo", nat())
    ports = [node.create_port("demo", f"p{number}").name for number in range(4)]
    request = (
        network_pb2.StopNetworkRequest(name=created.name)
        if method == "StopNetwork"
        else network_pb2.DeleteNetworkRequest(name=created.name, force=True)
    )
    request.inline_wait.SetInParent()

    def plug(port: str) -> str:
        try:
            node.plug(port, new_uid())
        except Refusal as refusal:
            return refusal.reason
        return "PLUGGED"

    with ThreadPoolExecutor(len(ports)) as threads:
        operation = getattr(node.networks, method)(request)
        outcomes = set(threads.map(plug, ports))
    assert outcomes <= {"WRONG_STATE", "RESOURCE_NOT_FOUND"}
    node.done(operation, network_pb2.Network if method == "StopNetwork" else empty_pb2.Empty)
    gone(node, {"vp-"})
    if method == "StopNetwork":
        assert node.get("demo").status.connections == 0
        node.start("demo")
        assert plug(ports[0]) == "PLUGGED"


def test_the_conveyed_caller_must_be_allowed_to_use_the_network(node: Node) -> None:
    node.create("demo", nat())
    request = plug_pb2.ReservePortRequest(
        parent=f"{NODE}/networks/demo", port_id="p", domain_uid=new_uid(), domain=f"{NODE}/domains/d1", device_id="lan"
    )
    with pytest.raises(Refusal) as refused:
        node.peer("ReservePort", request, roles=("viewer",))
    assert refused.value.reason == "PERMISSION_MISSING"


def test_isolated_ports_do_not_reach_each_other(node: Node) -> None:
    spec = nat()
    spec.port_isolation = True
    node.create("demo", spec)
    domain_uid = new_uid()
    node.reserve("demo", "d1-lan", domain_uid)
    name = node.plug(PORT, domain_uid).tap.interface_name
    assert taps(node)[name]["linkinfo"]["info_slave_data"]["isolated"] is True  # type: ignore[index]  # JSON


def test_limits_of_bandwidth_are_refused_and_not_ignored(node: Node) -> None:
    node.create("demo", nat())
    request = port_pb2.CreatePortRequest(parent=f"{NODE}/networks/demo", port_id="p1")
    request.port.spec.bandwidth.inbound.average_bytes_per_second = 1000
    with pytest.raises(grpc.RpcError, match="bandwidth"):
        node.ports.CreatePort(request)
    spec = network_pb2.NetworkSpec()
    spec.bandwidth.inbound.average_bytes_per_second = 1000
    with pytest.raises(Refusal) as refused:
        node.create("other", spec)
    assert (refused.value.reason, refused.value.metadata["capability"]) == ("CAPABILITY_MISSING", "network.bandwidth")


def test_five_hundred_ports_of_one_network(node: Node) -> None:
    spec = nat("10.20.0.0/21", None)
    spec.subnets["lan"].dhcp.ranges.add(first="10.20.0.10", last="10.20.5.250")
    network = node.create("demo", spec)
    bridge = network.status.bridge_name
    owners = {f"d{number}-lan": new_uid() for number in range(500)}
    given = [node.reserve("demo", port, uid).addresses[0] for port, uid in owners.items()]
    assert len(set(given)) == 500
    names = [node.plug(f"{NODE}/networks/demo/ports/{port}", uid).tap.interface_name for port, uid in owners.items()]
    assert node.get("demo").status.connections == 500
    links = node.namespace.links()
    assert all(links[tap]["master"] == bridge for tap in names)
    # The last of them is served, and so is the network while its rules are mended.
    last = node.get_port(f"{NODE}/networks/demo/ports/d499-lan")
    guest = node.guest(bridge, last.status.mac_address)
    assert guest.dhcp()["ip"] == last.status.addresses[0]
    with node.expecting(watch_pb2.EVENT_TYPE_NETWORK_RESTORED):
        node.namespace("ip", "link", "del", bridge)
    links = node.namespace.links()
    assert all(links[tap]["master"] == bridge for tap in names)
    # A new service finds them all.
    node.end("service", signal.SIGKILL)
    node.start_service()
    assert node.get("demo").status.connections == 500
    for port, uid in owners.items():
        node.unplug(f"{NODE}/networks/demo/ports/{port}", uid)
    ends = time.monotonic() + 20
    while taps(node):
        assert time.monotonic() < ends
        time.sleep(0.1)

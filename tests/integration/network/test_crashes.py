"""The service dies, at any line; what runs goes on, and nothing is left that no network accounts for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import grpc
import pytest
from google.longrunning import operations_pb2

from tests.integration.network.rig import NODE, Node, Refusal, nat, new_uid
from virtfleet.network.v1 import network_pb2, port_pb2, watch_pb2
from virtfleet.node.v1 import plug_pb2

PORT = f"{NODE}/networks/demo/ports/d1-lan"


def restart(node: Node) -> None:
    node.start_service()
    node.networks.ListNetworks(network_pb2.ListNetworksRequest(parent=NODE), wait_for_ready=True, timeout=20)


def nothing_is_left(node: Node) -> None:
    assert set(node.namespace.links()) == {"lo"}
    assert node.namespace.tables() == set()
    assert node.all_dnsmasq() == []
    assert node.namespace("cat", "/proc/sys/net/ipv4/ip_forward").strip() == "0"


def test_a_killed_service_finds_its_networks(node: Node) -> None:
    network = node.create("demo", nat())
    domain_uid = new_uid()
    node.reserve("demo", "d1-lan", domain_uid)
    tap = node.plug(PORT, domain_uid)
    guest = node.guest(network.status.bridge_name)
    pid = node.dnsmasq(network.uid)
    links = {name: link["ifindex"] for name, link in node.namespace.links().items()}
    node.end("service", signal.SIGKILL)
    lease = guest.dhcp()
    restart(node)
    found = node.get("demo")
    assert found.uid == network.uid
    assert found.status.state_reason == network_pb2.NETWORK_STATE_REASON_ADOPTED
    assert node.dnsmasq(network.uid) == pid, "the same process"
    assert {name: link["ifindex"] for name, link in node.namespace.links().items()} == links
    assert node.plug(PORT, domain_uid) == tap
    assert not [event for event in node.events() if event.type == watch_pb2.EVENT_TYPE_NETWORK_DRIFTED]
    for _ in range(100):
        if node.leases("demo"):
            break
        threading.Event().wait(0.05)
    assert [item.status.address for item in node.leases("demo")] == [lease["ip"]], "a lease given meanwhile is seen"
    node.unplug(PORT, domain_uid)


def test_harm_done_while_the_service_was_away_is_mended(node: Node) -> None:
    network = node.create("demo", nat())
    pid = node.dnsmasq(network.uid)
    node.end("service", signal.SIGKILL)
    node.namespace("nft", "flush", "ruleset")
    node.namespace("ip", "link", "del", network.status.bridge_name)
    os.kill(pid, signal.SIGKILL)
    restart(node)
    assert node.guest(network.status.bridge_name).dhcp()["ip"].startswith("192.168.177.")
    reasons = {event.reason for event in node.events() if event.type == watch_pb2.EVENT_TYPE_NETWORK_DRIFTED}
    assert {"RULES_CHANGED", "LINK_LOST"} <= reasons


def test_a_killed_launcher_costs_nothing(node: Node) -> None:
    network = node.create("demo", nat())
    pid = node.dnsmasq(network.uid)
    node.end("launcher", signal.SIGKILL)
    node.start_launcher()
    node.create_port("demo", "p1")
    assert node.dnsmasq(network.uid) == pid
    with node.expecting(watch_pb2.EVENT_TYPE_NETWORK_DAEMON_RESTARTED):
        os.kill(pid, signal.SIGKILL)
    assert node.dnsmasq(network.uid) not in (0, pid)
    node.stop("demo")
    assert node.all_dnsmasq() == []


@pytest.mark.parametrize("failpoint", ["network.create.recorded", "network.start.recorded", "network.start.done"])
def test_death_in_a_create_with_start_undoes_it(bare_node: Node, failpoint: str) -> None:
    node = bare_node
    node.start_launcher()
    node.start_service(failpoint=failpoint)
    with pytest.raises(grpc.RpcError):
        node.create("demo", nat())
    node.died()
    restart(node)
    [operation] = node.operations.ListOperations(
        operations_pb2.ListOperationsRequest(name=f"{NODE}/services/network")
    ).operations
    assert operation.done
    assert operation.error.code == grpc.StatusCode.ABORTED.value[0]
    assert not node.networks.ListNetworks(network_pb2.ListNetworksRequest(parent=NODE)).networks
    nothing_is_left(node)
    node.create("demo", nat())


@pytest.mark.parametrize("failpoint", ["network.start.recorded", "network.start.done"])
def test_death_in_a_start_leaves_the_network_inactive(node: Node, failpoint: str) -> None:
    node.create("demo", nat(), start=False)
    node.end("service")
    node.start_service(failpoint=failpoint)
    with pytest.raises(grpc.RpcError):
        node.start("demo")
    node.died()
    restart(node)
    status = node.get("demo").status
    assert status.state == network_pb2.NETWORK_STATE_INACTIVE
    assert status.state_reason == network_pb2.NETWORK_STATE_REASON_START_FAILED
    nothing_is_left(node)


@pytest.mark.parametrize("failpoint", ["network.stop.recorded", "network.stop.done"])
def test_death_in_a_stop_ends_with_the_network_stopped(node: Node, failpoint: str) -> None:
    node.create("demo", nat())
    node.end("service")
    node.start_service(failpoint=failpoint)
    with pytest.raises(grpc.RpcError):
        node.stop("demo")
    node.died()
    restart(node)
    assert node.get("demo").status.state == network_pb2.NETWORK_STATE_INACTIVE
    nothing_is_left(node)


@pytest.mark.parametrize("failpoint", ["network.delete.recorded", "network.delete.done"])
def test_death_in_a_delete_ends_with_the_network_gone(node: Node, failpoint: str) -> None:
    node.create("demo", nat())
    node.end("service")
    node.start_service(failpoint=failpoint)
    with pytest.raises(grpc.RpcError):
        node.delete("demo", force=True)
    node.died()
    restart(node)
    assert not node.networks.ListNetworks(network_pb2.ListNetworksRequest(parent=NODE)).networks
    nothing_is_left(node)
    assert list((node.folder / "state" / "dnsmasq").iterdir()) == []


def only_operation(node: Node, method: str) -> operations_pb2.Operation:
    request = operations_pb2.ListOperationsRequest(name=f"{NODE}/services/network")
    found = [one for one in node.operations.ListOperations(request).operations if method in str(one.metadata.value)]
    operation: operations_pb2.Operation
    [operation] = found
    assert operation.done
    return operation


def test_death_in_an_update_of_a_running_network_finishes_it(node: Node) -> None:
    """What was recorded before the death is what DHCP then serves."""
    network = node.create("demo", nat())
    guest = node.guest(network.status.bridge_name)
    node.end("service")
    node.start_service(failpoint="network.update.recorded")
    change = network_pb2.Network(name=network.name)
    host = change.spec.subnets["lan"].dhcp.hosts["web"]
    host.mac_address, host.address = guest.mac_address, "192.168.177.77"
    with pytest.raises(grpc.RpcError):
        node.update(change, "spec.subnets.lan.dhcp.hosts.web")
    node.died()
    restart(node)
    after = node.get("demo")
    assert after.generation == after.status.observed_generation == network.generation + 1
    assert not only_operation(node, "UpdateNetwork").HasField("error")
    assert guest.dhcp()["ip"] == "192.168.177.77"


def test_death_in_the_making_of_a_port_finishes_it(node: Node) -> None:
    network = node.create("demo", nat())
    node.end("service")
    node.start_service(failpoint="port.create.recorded")
    with pytest.raises(grpc.RpcError):
        node.create_port("demo", "p1", mac_address="52:54:00:00:00:01")
    node.died()
    restart(node)
    assert not only_operation(node, "CreatePort").HasField("error")
    port = node.get_port(f"{NODE}/networks/demo/ports/p1")
    assert port.status.mac_address == "52:54:00:00:00:01"
    # DHCP had not been told of it before the death.
    assert node.guest(network.status.bridge_name, port.status.mac_address).dhcp()["ip"] == port.status.addresses[0]


def test_death_in_the_deletion_of_a_port_finishes_it(node: Node) -> None:
    network = node.create("demo", nat())
    port = node.create_port("demo", "p1", mac_address="52:54:00:00:00:01")
    node.end("service")
    node.start_service(failpoint="operations.accepted")
    with pytest.raises(grpc.RpcError):
        node.ports.DeletePort(port_pb2.DeletePortRequest(name=port.name), timeout=10)
    node.died()
    restart(node)
    assert not only_operation(node, "DeletePort").HasField("error")
    assert not node.ports.ListPorts(port_pb2.ListPortsRequest(parent=network.name)).ports
    # Neither address nor MAC is kept for it: DHCP gives the address to nobody in particular, and another has the MAC.
    lease = node.guest(network.status.bridge_name, "52:54:00:00:00:01").dhcp()
    other = node.create_port("demo", "p2", mac_address="52:54:00:00:00:01")
    assert other.uid != port.uid
    assert lease["ip"].startswith("192.168.177.")


@pytest.mark.parametrize("failpoint", ["port.plug.begun", "port.plug.done"])
def test_death_in_a_plug_leaves_no_link(node: Node, failpoint: str) -> None:
    network = node.create("demo", nat())
    domain_uid = new_uid()
    node.reserve("demo", "d1-lan", domain_uid)
    node.end("service")
    node.start_service(failpoint=failpoint)
    with pytest.raises(grpc.RpcError):
        node.plug(PORT, domain_uid)
    node.died()
    restart(node)
    assert node.get_port(PORT).status.state == port_pb2.PORT_STATE_UNPLUGGED
    assert set(node.namespace.links()) == {"lo", network.status.bridge_name}
    node.plug(PORT, domain_uid)


def test_death_in_an_unplug_leaves_no_link(node: Node) -> None:
    network = node.create("demo", nat())
    domain_uid = new_uid()
    node.reserve("demo", "d1-lan", domain_uid)
    node.plug(PORT, domain_uid)
    node.end("service")
    node.start_service(failpoint="port.unplug.recorded")
    with pytest.raises(grpc.RpcError):
        node.unplug(PORT, domain_uid)
    node.died()
    restart(node)
    node.peer("UnreservePort", plug_pb2.UnreservePortRequest(name=PORT, domain_uid=domain_uid))
    assert set(node.namespace.links()) == {"lo", network.status.bridge_name}


def test_a_service_without_its_launcher_serves_and_takes_up_later(node: Node) -> None:
    network = node.create("demo", nat())
    node.end("service")
    node.end("launcher")
    os.kill(node.dnsmasq(network.uid), signal.SIGKILL)
    node.start_service()
    node.networks.ListNetworks(network_pb2.ListNetworksRequest(parent=NODE), wait_for_ready=True, timeout=30)
    assert node.get("demo").status.state == network_pb2.NETWORK_STATE_DEGRADED
    with node.expecting(watch_pb2.EVENT_TYPE_NETWORK_RESTORED, seconds=20):
        node.start_launcher()
    assert node.dnsmasq(network.uid)


def test_a_stop_that_fails_leaves_a_network_that_is_looked_after(node: Node) -> None:
    network = node.create("demo", nat())
    bridge = network.status.bridge_name
    node.end("launcher", signal.SIGKILL)
    with pytest.raises(Refusal) as refused:
        node.stop("demo")
    assert refused.value.reason == "BACKEND_UNREACHABLE"
    # It runs, as its status says: guests keep their network, and what others change is mended.
    assert node.get("demo").status.state == network_pb2.NETWORK_STATE_RUNNING
    assert bridge in node.namespace.links()
    with node.expecting(watch_pb2.EVENT_TYPE_NETWORK_DRIFTED):
        node.namespace("ip", "address", "flush", "dev", bridge, "scope", "global")
    assert node.namespace.addresses(bridge) == {"192.168.177.1/24"}
    uid = new_uid()
    node.reserve("demo", "d1-lan", uid)
    tap = node.plug(f"{NODE}/networks/demo/ports/d1-lan", uid).tap.interface_name
    assert node.namespace.links()[tap]["master"] == bridge
    node.unplug(f"{NODE}/networks/demo/ports/d1-lan", uid)
    node.start_launcher()
    node.stop("demo")
    assert bridge not in node.namespace.links()
    assert node.dnsmasq(network.uid) == 0


def test_a_start_whose_undoing_fails_leaves_nothing_in_the_end(bare_node: Node) -> None:
    node = bare_node
    nft = node.folder / "nft"
    # Makes rules once, and refuses all that comes later until it is told otherwise.
    nft.write_text(
        f'#!/bin/sh\n[ "$1" = -j ] && exec /usr/sbin/nft "$@"\n[ -e {node.folder}/used ] && exit 1\n'
        f'touch {node.folder}/used\nexec /usr/sbin/nft "$@"\n'
    )
    nft.chmod(0o755)
    node.settings |= {"nft": str(nft)}
    node.start_launcher()
    node.start_service()
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
    # What the caller hears is why it does not start, not why that could not be undone.
    assert "Address already in use" in refused.value.message
    # The bridge went, although the rules before it did not.
    assert set(node.namespace.links()) == {"lo"}
    assert node.namespace.tables() == {"inet virtfleet"}
    (node.folder / "used").unlink()
    deadline = time.monotonic() + 10
    while node.namespace.tables():
        assert time.monotonic() < deadline, "the rules stay"
        time.sleep(0.1)

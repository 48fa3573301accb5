"""The files of dnsmasq: a full disk, a word that was lost, garbage in the leases, a directory that somebody removed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.network.rig import NODE, Node, Refusal, nat, new_uid
from virtfleet.network.v1 import network_pb2, watch_pb2

ADDED = watch_pb2.EVENT_TYPE_LEASE_ADDED
RESTORED = watch_pb2.EVENT_TYPE_NETWORK_RESTORED


def until(holds: Callable[[], object], what: str, seconds: float = 15) -> None:
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, what
        time.sleep(0.1)


@pytest.fixture
def full(bare_node: Node) -> Iterator[tuple[Node, Path]]:
    """A node whose dnsmasq has its files on a disk of 64 KiB that is filled by hand."""
    place = bare_node.folder / "state" / "dnsmasq"
    place.mkdir(parents=True)
    (bare_node.folder / "state").chmod(0o711)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=711", "tmpfs", place], check=True)
    try:
        bare_node.start_launcher()
        bare_node.start_service()
        yield bare_node, place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def fill(place: Path) -> Path:
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(512))
        except OSError:
            return filler


def test_a_full_disk_is_told_and_what_else_there_is_is_mended(full: tuple[Node, Path]) -> None:
    node, place = full
    network = node.create("demo", nat())
    node.create("more", nat("10.9.0.0/24", None))
    filler = fill(place)
    with pytest.raises(Refusal) as refused:
        node.create("late", nat("10.8.0.0/24"))
    assert (refused.value.reason, refused.value.metadata["cause"]) == ("BACKEND_FAILED", "ENOSPC")
    assert network.status.bridge_name in node.namespace.links()
    # A port is a reservation first: it is made, and DHCP hears of it when there is room.
    port = node.reserve("demo", "d1-lan", new_uid())
    # And the rules of all networks are mended meanwhile.
    with node.expecting(watch_pb2.EVENT_TYPE_NETWORK_DRIFTED) as events:
        node.namespace("nft", "flush", "ruleset")
    assert "RULES_CHANGED" in {event.reason for event in events if event.type == watch_pb2.EVENT_TYPE_NETWORK_DRIFTED}
    until(lambda: "inet virtfleet" in node.namespace.tables(), "the rules are gone")
    until(lambda: node.get("demo").status.state == network_pb2.NETWORK_STATE_DEGRADED, "nothing is told")
    assert "No space left" in node.get("demo").status.state_message
    filler.unlink()
    until(lambda: node.get("demo").status.state == network_pb2.NETWORK_STATE_RUNNING, "it does not recover")
    guest = node.guest(network.status.bridge_name, port.mac_address)
    assert [guest.dhcp()["ip"]] == list(port.addresses)


def test_dnsmasq_hears_of_a_port_although_the_launcher_was_away(node: Node) -> None:
    network = node.create("demo", nat())
    pid = node.dnsmasq(network.uid)
    node.end("launcher", signal.SIGKILL)
    # The lists are written; nobody can tell dnsmasq.
    port = node.reserve("demo", "d1-lan", new_uid())
    node.start_launcher()
    guest = node.guest(network.status.bridge_name, port.mac_address)

    def served() -> bool:
        return [guest.dhcp()["ip"]] == list(port.addresses)

    until(served, "dnsmasq gives another address than the port's")
    assert node.dnsmasq(network.uid) == pid


def test_dnsmasq_hears_of_a_port_whose_service_died_before_it_could_tell(node: Node) -> None:
    network = node.create("demo", nat())
    hosts = node.folder / "state" / "dnsmasq" / network.uid / "dhcp-hosts"
    node.end("service", signal.SIGKILL)
    # As far as a service has come that was killed between the two steps.
    hosts.write_text("52:54:00:00:00:77,192.168.177.77\n")
    os.kill(node.dnsmasq(network.uid), signal.SIGHUP)
    time.sleep(0.5)
    hosts.write_text("")
    node.start_service()
    guest = node.guest(network.status.bridge_name, "52:54:00:00:00:77")
    until(lambda: guest.dhcp()["ip"] != "192.168.177.77", "dnsmasq serves what is not in its files any more")


def test_garbage_in_the_leases_costs_no_lease(node: Node) -> None:
    network = node.create("demo", nat())
    guest = node.guest(network.status.bridge_name)
    with node.expecting(ADDED):
        lease = guest.dhcp()
    file = node.folder / "state" / "dnsmasq" / network.uid / "var" / "leases"
    good = file.read_bytes()
    for garbage in (b"\xc2\xb2 a b c d\n", b"9" * 5000 + b" 52:54:00:00:00:01 192.168.177.9 x *\n", b"\xff\0\n" * 100):
        file.write_bytes(garbage + good)
        time.sleep(1)
        assert [one.status.address for one in node.leases("demo")] == [lease["ip"]]
    # What cannot be read is not the same as no leases.
    makers: tuple[Callable[[Path], None], ...] = (os.mkfifo, lambda path: path.symlink_to("/etc/passwd"), Path.mkdir)
    for make in makers:
        odd, away = file.with_name("odd"), file.with_name("away")
        make(odd)
        file.rename(away)
        odd.rename(file)
        time.sleep(1)
        assert [one.status.address for one in node.leases("demo")] == [lease["ip"]]
        file.rename(odd)
        away.rename(file)
        odd.rmdir() if odd.is_dir() and not odd.is_symlink() else odd.unlink()
    second = node.guest(network.status.bridge_name)
    with node.expecting(ADDED):
        second.dhcp()
    assert len(node.leases("demo")) == 2


def test_a_directory_that_somebody_removed_is_made_again_and_watched(node: Node) -> None:
    network = node.create("demo", nat())
    shutil.rmtree(node.folder / "state" / "dnsmasq" / network.uid)
    node.namespace("ip", "link", "del", network.status.bridge_name)
    until(lambda: network.status.bridge_name in node.namespace.links(), "no bridge")
    until(lambda: node.get("demo").status.state == network_pb2.NETWORK_STATE_RUNNING, "it does not recover")
    guest = node.guest(network.status.bridge_name)
    with node.expecting(ADDED):
        guest.dhcp()
    [found] = node.leases("demo")
    assert found.name.startswith(f"{NODE}/networks/demo/leases/")


def test_what_a_dnsmasq_that_was_taken_over_leaves_is_told_and_mended_when_it_is_gone(node: Node) -> None:
    network = node.create("demo", nat())
    other = node.create("other", nat("192.168.178.0/24"))
    pid = node.folder / "state" / "dnsmasq" / network.uid / "var" / "pid"
    pid.unlink()
    (pid / "in-the-way").mkdir(parents=True)
    os.kill(node.dnsmasq(network.uid), signal.SIGKILL)
    until(lambda: node.get("demo").status.state == network_pb2.NETWORK_STATE_DEGRADED, "nothing is told")
    assert "cannot be made" in node.get("demo").status.state_message
    # What else there is is looked after.
    with node.expecting(RESTORED):
        node.namespace("ip", "link", "del", other.status.bridge_name)
    assert other.status.bridge_name in node.namespace.links()
    assert "Traceback" not in node.log()
    shutil.rmtree(pid)
    until(lambda: node.get("demo").status.state == network_pb2.NETWORK_STATE_RUNNING, "it does not recover", 30)
    node.guest(network.status.bridge_name).dhcp()

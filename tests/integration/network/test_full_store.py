"""The disk of the service's own store is full for a while: networks run on, and so does the service."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.integration.network.rig import NODE, Node, Refusal, nat, new_uid
from virtfleet.network.v1 import network_pb2, watch_pb2
from virtfleet.node.v1 import plug_pb2

ADDED = watch_pb2.EVENT_TYPE_LEASE_ADDED


@pytest.fixture
def small(bare_node: Node) -> Iterator[tuple[Node, Path]]:
    """A node whose state is on a disk of 4 MiB."""
    place = bare_node.folder / "state"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=711", "tmpfs", place], check=True)
    try:
        bare_node.start_launcher()
        bare_node.start_service()
        yield bare_node, place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def fill(place: Path) -> Path:
    """Take all room in one go."""
    filler = place / "filler"
    descriptor = os.open(filler, os.O_WRONLY | os.O_CREAT)
    try:
        while os.write(descriptor, bytes(8 << 20)):
            pass
    except OSError:
        return filler
    finally:
        os.close(descriptor)
    return filler


def until(holds: Callable[[], object], what: str, seconds: float = 15) -> None:
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, what
        time.sleep(0.1)


def alive(node: Node) -> bool:
    return node.processes["service"].poll() is None


def test_a_lease_that_expires_while_the_store_is_full_is_ended_later(small: tuple[Node, Path]) -> None:
    node, place = small
    network = node.create("demo", nat())
    file = place / "dnsmasq" / network.uid / "var" / "leases"
    with node.expecting(ADDED):
        # As one that has all but run out; dnsmasq does not look at its file again.
        file.write_text(f"{int(time.time()) + 4} 52:54:00:00:00:01 192.168.177.9 web *\n")
    filler = fill(place)
    time.sleep(10)
    assert alive(node)
    with pytest.raises(Refusal) as refused:
        node.create("more", nat("10.9.0.0/24"))
    assert refused.value.reason == "BACKEND_FAILED"
    assert [one.status.hostname for one in node.leases("demo")] == ["web"]
    filler.unlink()
    until(lambda: node.leases("demo") == [], "the lease stays")
    assert node.get("demo").status.state == network_pb2.NETWORK_STATE_RUNNING
    node.create("more", nat("10.9.0.0/24"))


def test_links_that_go_while_the_store_is_full_cost_nothing(small: tuple[Node, Path]) -> None:
    node, place = small
    node.create("demo", nat())
    for _ in range(5):
        domain_uid = new_uid()
        node.reserve("demo", "d1-lan", domain_uid)
        port = f"{NODE}/networks/demo/ports/d1-lan"
        tap = node.plug(port, domain_uid).tap.interface_name
        node.unplug(port, domain_uid)
        # Between the answer and the end of the link, which takes 20 ms.
        filler = fill(place)
        until(partial(gone, node, tap), "the link stays")
        time.sleep(0.5)
        assert alive(node)
        filler.unlink()
        until(partial(given_up, node, domain_uid), "the port cannot be given up")


def gone(node: Node, tap: str) -> bool:
    return tap not in node.namespace.links()


def given_up(node: Node, domain_uid: str) -> bool:
    request = plug_pb2.UnreservePortRequest(name=f"{NODE}/networks/demo/ports/d1-lan", domain_uid=domain_uid)
    try:
        node.peer("UnreservePort", request)
    except Refusal:
        return False
    return True

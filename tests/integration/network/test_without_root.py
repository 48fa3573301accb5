"""In a user namespace that maps one id alone, as an ordinary user has it: networks, leases and taps all the same."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.network.rig import NODE, Guest, Namespace, Node, nat, new_uid


class Entered(Namespace):
    """The namespaces of a process."""

    def __init__(self, pid: int) -> None:
        self.name = str(pid)
        self.prefix = ("nsenter", "--preserve-credentials", "-t", self.name, "-U", "-n")
        self("ip", "link", "set", "lo", "up")

    def remove(self) -> None:
        """Leave it to the end of its process."""


@pytest.fixture
def node() -> Iterator[Node]:
    # Its end of the pipe holds the namespaces; nothing else runs in it.
    holder = subprocess.Popen(
        ["unshare", "-Urn", "--map-root-user", "sh", "-c", "echo ready; read -r _"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    node = Node()
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        node.namespace.remove()
        node.namespace = Entered(holder.pid)
        node.prefix = list(node.namespace.prefix)
        node.start_launcher("--single-user")
        node.start_service()
        yield node
    finally:
        node.close()
        with contextlib.suppress(BrokenPipeError):
            holder.communicate(b"\n", timeout=10)


def test_a_network_gives_leases_and_taps(node: Node) -> None:
    network = node.create("demo", nat())
    status = Path(f"/proc/{node.dnsmasq(network.uid)}/status").read_text()
    assert "Uid:\t0\t0\t0\t0" in status
    domain_uid = new_uid()
    node.reserve("demo", "d1-lan", domain_uid)
    tap = node.plug(f"{NODE}/networks/demo/ports/d1-lan", domain_uid, run_as_uid=0).tap.interface_name
    assert node.namespace.links()[tap]["master"] == network.status.bridge_name
    guest = Guest(node, network.status.bridge_name)
    node.extra.append(guest.namespace)
    assert guest.dhcp()["ip"].startswith("192.168.177.")
    node.unplug(f"{NODE}/networks/demo/ports/d1-lan", domain_uid)
    node.stop("demo")
    assert node.all_dnsmasq() == []
    assert node.namespace.tables() == set()

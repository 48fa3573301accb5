"""A real guest in the fleet that otherwise runs guests of the in-memory driver: the main road, as the demo walks it."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

import pytest

from tests.fleet.rig import kill
from tools import demo
from virtfleet.compute.v1 import domain_pb2
from virtfleet.network.v1 import network_pb2
from virtfleet.storage.v1 import pool_pb2
from virtfleet_client import Fleet


def guests(run_folder: Path, node: str) -> list[int]:
    """Return the processes of the node's guests, as the kernel has them."""
    base = str(Path(json.loads((run_folder / "fleet.json").read_text())["folder"]) / node)
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # it has ended
        if "qemu-system" in arguments[0] and any(base in argument for argument in arguments):
            found.append(int(process.name))
    return found


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("made_whole")
def test_a_guest_boots_computes_is_found_again_and_stops(fleet: Fleet, nodes: list[str], run_folder: Path) -> None:
    node = nodes[1].removeprefix("nodes/")
    seen: list[list[int]] = []

    def lose_compute() -> int:
        seen.append(guests(run_folder, node))
        after = kill(run_folder, f"{node}/compute")
        seen.append(guests(run_folder, node))
        return after

    demo.run_guest(fleet, node, secrets.token_hex(8), lose_compute, demo.Steps())
    assert len(seen[0]) == 1
    assert seen[1] == seen[0], "the guest does not notice"
    assert not guests(run_folder, node)
    assert not Path(f"/proc/{seen[0][0]}").exists()
    assert not fleet.domains.ListDomains(domain_pb2.ListDomainsRequest(parent=nodes[1])).domains
    assert not fleet.networks.ListNetworks(network_pb2.ListNetworksRequest(parent=nodes[1])).networks
    assert not fleet.pools.ListPools(pool_pb2.ListPoolsRequest(parent=nodes[1])).pools

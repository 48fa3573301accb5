"""What is: from /proc, the kernel's links and rules and the files; the services' word only for what they keep."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from google.longrunning import operations_pb2

from tests.chaos.checker import Resource, Truth
from tests.chaos.writer import NODE, PLACE
from tools import fleet as development
from virtfleet.compute.v1 import domain_pb2
from virtfleet.network.v1 import network_pb2
from virtfleet.storage.v1 import volume_pb2
from virtfleet_client import AsyncFleet

_NO_PART: Final = re.compile(r"\.db(-wal|-shm|\.lock)?$|\.log$|/state/identity/")
"""Files below a node's folder that belong to its services and not to a resource."""
_SIZE_IN_HEADER: Final = slice(24, 32)
"""Where a QCOW2 file says how large its disk is."""


async def read(fleet: development.Fleet, admin: AsyncFleet, killed_guests: frozenset[str]) -> Truth:
    """Return what is."""
    resources: dict[str, Resource] = {}
    bridges: dict[str, str] = {}
    domains = domain_pb2.ListDomainsRequest(parent=NODE, page_size=500)
    async for domain in admin.pages(admin.domains.ListDomains, domains):
        active = domain.status.active
        process = int(active and domain.spec.driver == "qemu")
        resources[domain.name] = Resource(domain.uid, domain.generation, active, process)
    networks = network_pb2.ListNetworksRequest(parent=NODE, page_size=500)
    async for network in admin.pages(admin.networks.ListNetworks, networks):
        active = network.status.state > network_pb2.NETWORK_STATE_INACTIVE
        if active:
            bridges[network.status.bridge_name] = network.uid
        # Each that the rounds make has a bridge and a daemon.
        resources[network.name] = Resource(network.uid, network.generation, active, 2 * active)
    volumes = volume_pb2.ListVolumesRequest(parent=f"{NODE}/pools/{PLACE}", page_size=500)
    folder = fleet.folder / "n1/pools" / PLACE
    files = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    async for volume in admin.pages(admin.volumes.ListVolumes, volumes):
        identity = volume.name.rsplit("/", 1)[1]
        capacity = _capacity(folder / identity)
        files.discard(identity)
        resources[volume.name] = Resource(volume.uid, volume.generation, capacity=capacity)
    parts = Counter({uid: len(pids) for uid, pids in (guests_of(fleet) | daemons_of(fleet)).items()})
    left = [f"the file {name}" for name in sorted(files)]
    for link in _links(fleet, "type", "bridge"):
        if link in bridges:
            parts[bridges[link]] += 1
        else:
            left.append(f"the bridge {link}")
    return Truth(resources, parts, await running_operations(admin), left, killed_guests)


async def running_operations(admin: AsyncFleet) -> list[str]:
    """Return the names of operations that have not ended, on any service."""
    found: list[str] = []
    for service in ("compute", "storage", "network"):
        request = operations_pb2.ListOperationsRequest(name=f"{NODE}/services/{service}", filter="done=false")
        found += [one.name async for one in admin.pages(admin.operations.ListOperations, request)]
    return found


def guests_of(fleet: development.Fleet) -> dict[str, list[int]]:
    """Return the processes of guests by uid."""
    return _by_uid(fleet, re.compile(r"^\S*qemu\S* .*-uuid ([0-9a-f-]{36})"))


def daemons_of(fleet: development.Fleet) -> dict[str, list[int]]:
    """Return the processes of dnsmasq by the uid of their network."""
    return _by_uid(fleet, re.compile(r"^\S*dnsmasq .*/dnsmasq/([0-9a-f-]{36})/"))


def _by_uid(fleet: development.Fleet, pattern: re.Pattern[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for pid, line in _commands():
        matched = pattern.match(line)
        if matched and _below(pid, fleet):
            found.setdefault(matched[1], []).append(pid)
    return found


def _commands() -> Iterator[tuple[int, str]]:
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if line:
                yield int(path.name), line


def _below(pid: int, fleet: development.Fleet) -> bool:
    """Tell whether a process is in a namespace of the fleet."""
    try:
        inode = Path(f"/proc/{pid}/ns/net").stat().st_ino
    except FileNotFoundError:
        return False
    return inode in {Path(f"/run/netns/{fleet.networks[node].namespace}").stat().st_ino for node in fleet.nodes}


def _capacity(path: Path) -> int:
    try:
        with path.open("rb") as file:
            return int.from_bytes(file.read(_SIZE_IN_HEADER.stop)[_SIZE_IN_HEADER], "big")
    except FileNotFoundError:
        return 0


def _links(fleet: development.Fleet, *which: str) -> list[str]:
    links = json.loads(_output("ip", "-n", fleet.networks["n1"].namespace, "-j", "link", "show", *which) or "[]")
    return [link["ifname"] for link in links if link]


def host(fleet: development.Fleet) -> frozenset[str]:
    """Return what the host has that must belong to a resource: links, rules, processes, control groups, files."""
    command = ("ip", "netns", "exec", fleet.networks["n1"].namespace, "nft", "-j", "list", "ruleset")
    rules = json.loads(_output(*command))["nftables"]
    found = {f"link {link}" for link in _links(fleet)}
    found |= {
        "rule " + re.sub(r'"(handle|packets|bytes)": \d+', "", json.dumps(rule, sort_keys=True)) for rule in rules
    }
    found |= {f"process of {uid}" for uid in guests_of(fleet) | daemons_of(fleet)}
    base = fleet.folder / "n1"
    for path in base.rglob("*"):
        if not _NO_PART.search(str(path)):
            found.add(f"file {path.relative_to(base)}")
    if fleet.cgroup_parent is not None:
        found |= {f"control group {path}" for path in fleet.cgroup_parent.rglob("*") if path.is_dir()}
    return frozenset(found)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout

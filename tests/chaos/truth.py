"""What is: from /proc, the kernel's links and rules, the files and the services' stores; nothing by the API's word alone."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from tests.chaos.checker import Resource, Truth
from tests.chaos.lives import PLACE
from tools import fleet as development
from virtfleet.compute.v1 import domain_pb2
from virtfleet.fleet.v1 import enrollment_pb2
from virtfleet.network.v1 import network_pb2, port_pb2
from virtfleet.storage.v1 import pool_pb2, volume_pb2
from virtfleet_client import AsyncFleet

STORES: Final = {
    "compute": "n1/state/compute.db",
    "storage": "n1/state/storage.db",
    "network": "n1/state/network.db",
    "gateway": "gateway/gateway.db",
}
_KINDS: Final[dict[str, Any]] = {
    "domain": domain_pb2.Domain,
    "network": network_pb2.Network,
    "port": port_pb2.Port,
    "pool": pool_pb2.Pool,
    "volume": volume_pb2.Volume,
    "join_token": enrollment_pb2.JoinToken,
    "certificate": enrollment_pb2.Certificate,
}
_NO_PART: Final = re.compile(r"\.db(-wal|-shm|\.lock|\.before-\d+)?$|\.log$|/state/identity/")
"""Files below a node's folder that belong to its services and not to a resource."""
_SIZE_IN_HEADER: Final = slice(24, 32)
"""Where a QCOW2 file says how large its disk is."""
_UID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_START_TICKS: Final = 19
"""Where `/proc/PID/stat` says, behind the command, when a process began."""


async def read(fleet: development.Fleet, admin: AsyncFleet, killed_guests: frozenset[str]) -> Truth:
    """Return what is."""
    listed = await _listed(admin)
    stored: dict[str, list[Any]] = {kind: [] for kind in _KINDS}
    for store in STORES:
        for kind, resource in _resources(fleet, store):
            stored[kind].append(resource)
    guests, daemons = guests_of(fleet), daemons_of(fleet)
    parts = Counter({uid: len(pids) for uid, pids in (guests | daemons).items()})
    left: list[str] = []
    resources = _domains(stored["domain"], guests)
    resources |= _networks(fleet, stored["network"], parts, left)
    resources |= {port.name: Resource(port.uid, port.generation) for port in stored["port"]}
    uids = {domain.uid for domain in stored["domain"]}
    for port in stored["port"]:
        owner = port.status.owner.domain_uid or port.status.holder.domain_uid
        if owner and owner not in uids:
            left.append(f"{port.name} is of the domain {owner}, which is not there")
    for volume in stored["volume"]:
        left += [
            f"{volume.name} is attached to {one.domain}, which is not there"
            for one in volume.status.attachments
            if one.domain not in resources
        ]
    resources |= _storage(fleet, stored["pool"], stored["volume"], parts, left)
    resources |= {token.name: Resource(token.uid, token.generation) for token in stored["join_token"]}
    users, doubled = _users(fleet, stored["certificate"], left)
    return Truth(
        resources | users, parts, running_operations(fleet), left, killed_guests, doubled=doubled, listed=listed
    )


# The stores.


def _rows(fleet: development.Fleet, store: str, query: str) -> list[tuple[Any, ...]]:
    path = fleet.folder / STORES[store]
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as connection:
        return connection.execute(query).fetchall()


def _resources(fleet: development.Fleet, store: str) -> Iterator[tuple[str, Any]]:
    for kind, body in _rows(fleet, store, "SELECT kind, body FROM resources"):
        if kind in _KINDS:
            yield kind, _KINDS[kind].FromString(body)


def running_operations(fleet: development.Fleet) -> list[str]:
    """Return the names of operations that have not ended, in any service."""
    return [name for store in STORES for (name,) in _rows(fleet, store, "SELECT id FROM operations WHERE done = 0")]


async def _listed(admin: AsyncFleet) -> dict[str, tuple[str, int]]:
    """Return what the gateway lists of all nodes, out of its index: names, uids, generations."""
    lists: tuple[tuple[Any, Any], ...] = (
        (admin.domains.ListDomains, domain_pb2.ListDomainsRequest(parent="nodes/-", page_size=500)),
        (admin.networks.ListNetworks, network_pb2.ListNetworksRequest(parent="nodes/-", page_size=500)),
        (admin.pools.ListPools, pool_pb2.ListPoolsRequest(parent="nodes/-", page_size=500)),
        (admin.volumes.ListVolumes, volume_pb2.ListVolumesRequest(parent="nodes/-/pools/-", page_size=500)),
    )
    return {
        one.name: (one.uid, one.generation) for method, request in lists async for one in admin.pages(method, request)
    }


# What the host has of them.


def _domains(domains: list[Any], guests: dict[str, list[int]]) -> dict[str, Resource]:
    found = {}
    for domain in domains:
        active = domain.status.active
        process = int(active and domain.spec.driver == "qemu")
        born = max((born_seconds(pid) for pid in guests.get(domain.uid, ())), default=0.0)
        found[domain.name] = Resource(domain.uid, domain.generation, active, process, born=born)
    return found


def _networks(
    fleet: development.Fleet, networks: list[Any], parts: Counter[str], left: list[str]
) -> dict[str, Resource]:
    found, bridges = {}, {}
    for network in networks:
        active = network.status.state > network_pb2.NETWORK_STATE_INACTIVE
        if active:
            bridges[network.status.bridge_name] = network.uid
        # Each that the rounds make has a bridge and a daemon.
        found[network.name] = Resource(network.uid, network.generation, active, 2 * active)
    for link in _links(fleet, "type", "bridge"):
        if link in bridges:
            parts[bridges[link]] += 1
        else:
            left.append(f"the bridge {link}")
    return found


def _storage(
    fleet: development.Fleet, pools: list[Any], volumes: list[Any], parts: Counter[str], left: list[str]
) -> dict[str, Resource]:
    """Return pools and volumes: what is in their files, and whose mark a pool's folder has."""
    folders = fleet.folder / "n1/pools"
    found = {}
    for pool in pools:
        active = pool.status.state > pool_pb2.POOL_STATE_INACTIVE
        found[pool.name] = Resource(pool.uid, pool.generation, active, 1)
    for mark in folders.glob("*/.virtfleet/pool"):
        owner = _UID.search(mark.read_text(errors="replace"))
        parts[owner[0] if owner else str(mark)] += 1
    files = {path.name for path in (folders / PLACE).iterdir() if not path.name.startswith(".")}
    for volume in volumes:
        identity = volume.name.rsplit("/", 1)[1]
        files.discard(identity)
        content = _content(folders / PLACE / identity)
        found[volume.name] = Resource(volume.uid, volume.generation, content=content)
    left += [f"the file {name}" for name in sorted(files)]
    return found


def _content(path: Path) -> str:
    """Return what is in the file of a volume, as the writer tells it of one of its format."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return "nothing"
    if data.startswith(b"QFI\xfb"):
        return f"{int.from_bytes(data[_SIZE_IN_HEADER], 'big')} bytes"
    if not any(data):
        # No upload has replaced it: it has its first size.
        return f"{len(data)} bytes"
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _users(
    fleet: development.Fleet, certificates: list[Any], left: list[str]
) -> tuple[dict[str, Resource], frozenset[str]]:
    """Return the users with a certificate that is good, and those who have several."""
    found: dict[str, Resource] = {}
    several: set[str] = set()
    revoked: dict[str, str] = {}
    for one in certificates:
        _, is_user, user = one.status.identity.rpartition("/user/")
        name = f"users/{user}"
        if is_user and one.status.state == enrollment_pb2.CERTIFICATE_STATE_REVOKED:
            revoked[one.status.serial_number] = user
        elif is_user:
            several |= {name} & found.keys()
            found[name] = Resource(one.name, one.generation)
    for place in ("gateway/identity/denied", "n1/state/identity/denied"):
        denied = _denied(fleet.folder / place)
        left += [
            f"{place} does not deny {user}, revoked as {one}" for one, user in revoked.items() if one not in denied
        ]
    return found, frozenset(several)


def _denied(path: Path) -> set[str]:
    signed = enrollment_pb2.SignedDenialList.FromString(path.read_bytes() if path.exists() else b"")
    return {one.serial_number for one in enrollment_pb2.DenialList.FromString(signed.content).certificates}


# Processes.


def guests_of(fleet: development.Fleet) -> dict[str, list[int]]:
    """Return the processes of guests by uid."""
    return _by_uid(fleet, re.compile(r"^\S*qemu\S* .*-uuid ([0-9a-f-]{36})"))


def daemons_of(fleet: development.Fleet) -> dict[str, list[int]]:
    """Return the processes of dnsmasq by the uid of their network."""
    return _by_uid(fleet, re.compile(r"^\S*dnsmasq .*/dnsmasq/([0-9a-f-]{36})/"))


def born_seconds(pid: int) -> float:
    """Return when a process began, as `time.time()` would have told it; 0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    since_boot = int(fields[_START_TICKS]) / os.sysconf("SC_CLK_TCK")
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot


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


# The host.


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

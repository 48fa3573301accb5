"""One round: a writer and two watchers at work, seeded deaths under them, then everything held against everything."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
from google.longrunning import operations_pb2
from google.protobuf import empty_pb2

from bench.stage import credentials
from tests.chaos.checker import Finding, Truth, check
from tests.chaos.writer import NODE, PLACE
from tools import fleet as development
from tools.paths import ROOT
from virtfleet.compute.v1 import domain_pb2
from virtfleet.fleet.v1 import node_pb2
from virtfleet.network.v1 import network_pb2
from virtfleet.storage.v1 import pool_pb2, volume_pb2
from virtfleet_client import AsyncFleet, VirtfleetError, connect_async
from virtfleet_service.failpoints import VARIABLE

KINDS: Final = ("gateway", "compute", "storage", "network", "launcher", "dnsmasq", "guest")
FAILPOINTS: Final = {
    "compute": (
        "operations.accepted",
        "operations.worked",
        "operations.recorded",
        "compute.create.intent",
        "compute.create.volume",
        "compute.create.made",
        "compute.start.intent",
        "compute.start.connected",
        "compute.start.started",
        "compute.stop.ended",
        "compute.delete.undone",
    ),
    "storage": (
        "storage.volume.create.staged",
        "storage.volume.create.published",
        "storage.volume.delete.removed",
        "storage.attach.recorded",
        "storage.release.recorded",
    ),
    "network": ("port.plug.begun", "port.plug.done", "port.unplug.recorded"),
}
"""Between an intent, its effect and its commit; passed by what the writer does."""

SETTLE_SECONDS: Final = 60.0
_ACKNOWLEDGEMENTS: Final = 12
"""How many there must be before the first death, and after each return."""


@dataclass(slots=True)
class World:
    """Is the fleet with a pool and a network for the rounds.

    Attributes:
        fleet: Its processes.
        admin: A connection to the gateway.
        folder: Where records are kept.
    """

    fleet: development.Fleet
    admin: AsyncFleet
    folder: Path
    number: int = 0

    def environment(self) -> dict[str, str]:
        """Return the variables of clients."""
        return {**os.environ, **self.fleet.environment(), "PYTHONPATH": str(ROOT)}


@asynccontextmanager
async def world(folder: Path) -> AsyncIterator[World]:
    """Make the fleet; at the end all that the rounds made is gone, and so is the fleet."""
    async with AsyncExitStack() as stack:
        fleet = await stack.enter_async_context(development.Fleet.running(development.Plan(driver="qemu")))
        admin = await stack.enter_async_context(connect_async(f"tls://{fleet.address}", credentials(fleet)))
        pool = pool_pb2.CreatePoolRequest(parent=NODE, pool_id=PLACE, start=True)
        pool.pool.spec.dir.SetInParent()
        await admin.wait(await admin.pools.CreatePool(pool), pool_pb2.Pool)
        network = network_pb2.CreateNetworkRequest(parent=NODE, network_id=PLACE, start=True)
        network.network.spec.nat.SetInParent()
        lan = network.network.spec.subnets["lan"]
        lan.prefix = "192.168.179.0/24"
        lan.dhcp.ranges.add(first="192.168.179.10", last="192.168.179.250")
        await admin.wait(await admin.networks.CreateNetwork(network), network_pb2.Network)
        yield World(fleet, admin, folder)


@dataclass(slots=True)
class Round:
    """Is what a round has found.

    Attributes:
        seed: Repeats what was decided (not when the kernel ran what).
        deaths: Who was killed, in order.
        acknowledged: How many changes were acknowledged.
        findings: What should not be.
    """

    seed: str
    deaths: list[str] = field(default_factory=list)
    acknowledged: int = 0
    findings: list[Finding] = field(default_factory=list)


async def run(
    world: World,
    kind: str,
    seed: str,
    *,
    deaths: int = 2,
    failpoint: bool = True,
    patience_seconds: float = 25.0,
) -> Round:
    """Run a round in which processes of one kind die.

    Raises:
        AssertionError: The fleet does not come back.
    """
    world.number += 1
    chance = random.Random(f"{seed}/{kind}")
    result = Round(seed)
    stem = world.folder / f"round-{world.number}"
    record, tag = stem.with_suffix(".writer"), f"r{world.number}"
    before = _host(world.fleet)
    killed_guests: set[str] = set()
    watches = {"gateway": stem.with_suffix(".gateway"), "compute": stem.with_suffix(".compute")}
    socket = world.fleet.folder / "n1/run/compute/viewer.sock"
    watchers = [
        _process(world, "watcher", str(watches["gateway"]), "nodes/-"),
        _process(world, "watcher", str(watches["compute"]), NODE, f"unix://{socket}"),
    ]
    writer = _process(world, "writer", str(record), tag, f"{seed}/{kind}")
    try:
        await _acknowledged(record, _ACKNOWLEDGEMENTS, writer)
        for number in range(deaths):
            point = failpoint and number == 0 and kind in FAILPOINTS
            result.deaths.append(await _kill(world, kind, chance, killed_guests, failpoint=point))
            await settle(world)
            await _acknowledged(record, _ACKNOWLEDGEMENTS, writer)
        await _end(writer)
        lines = list(_lines(record))
        result.acknowledged = sum(line["say"] == "ack" for line in lines)
        truth = await _truth(world, tag, frozenset(killed_guests))
        result.findings = await _settled(
            lambda: check(lines, {key: list(_lines(path)) for key, path in watches.items()}, truth), patience_seconds
        )
        await _clean(world, tag)
        left = await _settled(lambda: _left(before, _host(world.fleet)), patience_seconds)
        result.findings += left
    finally:
        for process in (writer, *watchers):
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
    return result


def _process(world: World, module: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", f"tests.chaos.{module}", *arguments],
        stdin=subprocess.PIPE if module == "writer" else subprocess.DEVNULL,
        env=world.environment(),
        cwd=ROOT,
    )


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


async def _acknowledged(record: Path, more: int, writer: subprocess.Popen[bytes]) -> None:
    """Wait until so many more changes have been acknowledged."""
    start = sum(line["say"] == "ack" for line in _lines(record))
    ends_at = time.monotonic() + 90
    while sum(line["say"] == "ack" for line in _lines(record)) < start + more:
        assert writer.poll() is None, "the writer has ended"
        assert time.monotonic() < ends_at, "changes are no longer acknowledged"
        await asyncio.sleep(0.05)


async def _end(writer: subprocess.Popen[bytes]) -> None:
    if writer.stdin is not None:
        writer.stdin.close()
    ends_at = time.monotonic() + 90
    while writer.poll() is None:
        assert time.monotonic() < ends_at, "the writer does not end"
        await asyncio.sleep(0.05)
    assert writer.returncode == 0


# Deaths.


async def _kill(world: World, kind: str, chance: random.Random, killed: set[str], *, failpoint: bool) -> str:
    """Kill a process of a kind; returns what was done."""
    await asyncio.sleep(chance.uniform(0, 0.3))
    if kind == "guest":
        guests = sorted(guests_of(world.fleet).items())
        if not guests:
            return "no guest"
        uid, pids = chance.choice(guests)
        killed.add(uid)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return f"guest {uid}"
    if kind == "dnsmasq":
        for pid in _daemons(world.fleet):
            os.kill(pid, signal.SIGKILL)
        return "dnsmasq"
    name = kind if kind == "gateway" else f"n1/{kind}"
    program = world.fleet.supervisor.programs[name]
    if not failpoint:
        world.fleet.supervisor.kill(name)
        return name
    point = f"{chance.choice(FAILPOINTS[kind])}:{chance.randint(1, 3)}"
    clean = program.environment
    program.environment = {**clean, VARIABLE: point}
    world.fleet.supervisor.kill(name)
    starts = program.starts
    ends_at = time.monotonic() + 12
    while program.starts < starts + 2 and time.monotonic() < ends_at:
        if program.starts > starts:
            # The one that is to die runs: whoever comes after it is a plain one.
            program.environment = clean
        await asyncio.sleep(0.02)
    program.environment = clean
    if program.starts < starts + 2:
        # Nobody passed the place: it goes by itself.
        world.fleet.supervisor.kill(name)
        return f"{name} (did not reach {point})"
    return f"{name} at {point}"


async def settle(world: World) -> None:
    """Wait until the node is ready again."""
    ends_at = time.monotonic() + 60
    while True:
        with contextlib.suppress(VirtfleetError):
            node = await world.admin.nodes.GetNode(node_pb2.GetNodeRequest(name=NODE), timeout=5)
            if node.status.state == node_pb2.NODE_STATE_READY:
                return
        assert time.monotonic() < ends_at, "the node does not come back"
        await asyncio.sleep(0.1)


# What is.


def guests_of(fleet: development.Fleet) -> dict[str, list[int]]:
    """Return the processes of guests by uid: from /proc."""
    found: dict[str, list[int]] = {}
    for pid, line in _commands():
        uid = re.search(r"-uuid ([0-9a-f-]{36})", line)
        if uid and "qemu" in line and _below(pid, fleet):
            found.setdefault(uid[1], []).append(pid)
    return found


def _daemons(fleet: development.Fleet) -> list[int]:
    return [pid for pid, line in _commands() if "dnsmasq" in line.split(" ")[0] and str(fleet.folder) in line]


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


def _host(fleet: development.Fleet) -> frozenset[str]:
    """Return what the host has that must belong to a resource: links, rules, guests, files."""
    namespace = fleet.networks["n1"].namespace
    links = json.loads(_output("ip", "-n", namespace, "-j", "link"))
    rules = json.loads(_output("ip", "netns", "exec", namespace, "nft", "-j", "list", "ruleset"))["nftables"]
    found = {f"link {link['ifname']}" for link in links}
    found |= {
        "rule " + re.sub(r'"(handle|packets|bytes)": \d+', "", json.dumps(rule, sort_keys=True)) for rule in rules
    }
    found |= {f"guest {uid}" for uid in guests_of(fleet)}
    base = fleet.folder / "n1"
    for folder in (base / "pools", base / "run/launcher/guests"):
        found |= {f"file {path.relative_to(base)}" for path in folder.rglob("*")} if folder.is_dir() else set()
    return frozenset(found)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


def _left(before: frozenset[str], after: frozenset[str]) -> list[Finding]:
    return [Finding("LEFT", what) for what in sorted(after - before)] + [
        Finding("LOST", f"{what} is gone from the host") for what in sorted(before - after)
    ]


async def _truth(world: World, tag: str, killed: frozenset[str]) -> Truth:
    """Read what is, when all operations have ended."""
    ends_at = time.monotonic() + SETTLE_SECONDS
    running: list[str] = []
    while time.monotonic() < ends_at:
        running = await _running_operations(world)
        if not running:
            break
        await asyncio.sleep(0.2)
    request = domain_pb2.ListDomainsRequest(parent=NODE, page_size=500)
    domains = {
        one.name: (one.uid, one.generation, one.status.active)
        async for one in world.admin.pages(world.admin.domains.ListDomains, request)
        if one.name.startswith(f"{NODE}/domains/{tag}-")
    }
    guests = Counter({uid: len(pids) for uid, pids in guests_of(world.fleet).items()})
    return Truth(domains, guests, running, (), killed)


async def _running_operations(world: World) -> list[str]:
    found: list[str] = []
    for service in ("compute", "storage", "network"):
        request = operations_pb2.ListOperationsRequest(name=f"{NODE}/services/{service}", filter="done=false")
        found += [one.name async for one in world.admin.pages(world.admin.operations.ListOperations, request)]
    return found


async def _settled(look: Callable[[], list[Finding]], seconds: float) -> list[Finding]:
    """Look until there is nothing to find; what is still there after so long is found."""
    ends_at = time.monotonic() + seconds
    while True:
        findings = look()
        if not findings or time.monotonic() > ends_at:
            return findings
        await asyncio.sleep(0.3)


async def _clean(world: World, tag: str) -> None:
    """Delete what the round made, by the API."""
    admin = world.admin
    request = domain_pb2.ListDomainsRequest(parent=NODE, page_size=500)
    names = [one.name async for one in admin.pages(admin.domains.ListDomains, request)]
    for name in names:
        delete = domain_pb2.DeleteDomainRequest(name=name, stop=True, delete_volumes=True, allow_missing=True)
        await _insist(lambda delete=delete: admin.domains.DeleteDomain(delete), admin)  # type: ignore[misc]  # bound at once
    volumes = volume_pb2.ListVolumesRequest(parent=f"{NODE}/pools/{PLACE}", page_size=500)
    for volume in [one.name async for one in admin.pages(admin.volumes.ListVolumes, volumes)]:
        if f"/volumes/{tag}-" in volume:
            # Of a creation that was cut, or of a domain that was made again: a volume of nobody is an operator's to delete.
            gone = volume_pb2.DeleteVolumeRequest(name=volume, allow_missing=True)
            await _insist(lambda gone=gone: admin.volumes.DeleteVolume(gone), admin)  # type: ignore[misc]  # bound at once


async def _insist(call: Callable[[], Any], admin: AsyncFleet) -> None:
    ends_at = time.monotonic() + 40
    while True:
        try:
            await admin.wait(await call(), empty_pb2.Empty, timeout_seconds=30)
        except VirtfleetError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return
            if time.monotonic() > ends_at:
                raise
            await asyncio.sleep(0.3)
        else:
            return

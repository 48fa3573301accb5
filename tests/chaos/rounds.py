"""One round: a writer and two watchers at work, seeded deaths under them, then everything held against everything."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
from google.protobuf import empty_pb2
from google.protobuf.message import Message

from bench.stage import credentials
from tests.chaos import truth
from tests.chaos.checker import FAULT, GAP, LEFT, LOST, Finding, check
from tests.chaos.killer import Killer
from tests.chaos.lives import NODE, PLACE
from tools import fleet as development
from tools.paths import ROOT
from virtfleet.compute.v1 import domain_pb2
from virtfleet.fleet.v1 import node_pb2
from virtfleet.network.v1 import network_pb2
from virtfleet.storage.v1 import pool_pb2, volume_pb2
from virtfleet_client import AsyncFleet, VirtfleetError, connect_async

SERVICES: Final = ("compute", "storage", "network")
SETTLE_SECONDS: Final = 60.0
"""So long after the return of its service no operation may run that ran before."""
_NEVER_CUT: Final = frozenset({"gateway", "launcher", "dnsmasq", "guest"})
"""Whose deaths do not cut the watcher at the node. The one at the gateway may fall behind at any time: the gateway thins
out what waits for a reader, at a node only the log's length does."""
_ACKNOWLEDGEMENTS: Final = 25
"""How many there must be before the first death, and after each return."""
_LULL_SECONDS: Final = (0.5, 2.0)
"""For so long a watcher is frozen once a round: it falls behind, and must be told all the same."""

Disturb = Callable[["Scene"], Awaitable[None]]


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
async def world(folder: Path, **settings: dict[str, Any]) -> AsyncIterator[World]:
    """Make the fleet; at the end all that the rounds made is gone, and so is the fleet.

    Args:
        folder: Where records are kept.
        settings: What services have set otherwise, by their names.
    """
    async with AsyncExitStack() as stack:
        plan = development.Plan(driver="qemu,test", settings=settings)
        fleet = await stack.enter_async_context(development.Fleet.running(plan))
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


@dataclass(slots=True)
class Scene:
    """Is a round while it goes on.

    Attributes:
        world: Where.
        killer: Kills.
        result: What is found.
        returned_seconds: When the last process that died had come back, as `time.time()`.
    """

    world: World
    killer: Killer
    result: Round
    record: Path
    writer: subprocess.Popen[bytes]
    returned_seconds: float = 0.0

    async def settle(self) -> None:
        """Wait until the node is ready again."""
        await settle(self.world)
        self.returned_seconds = time.time()

    async def more(self, count: int = _ACKNOWLEDGEMENTS) -> None:
        """Wait until so many more changes have been acknowledged."""
        await _acknowledged(self.record, count, self.writer)


async def run(
    world: World,
    kind: str,
    seed: str,
    *,
    part: int = 0,
    deaths: int = 2,
    failpoint: bool = True,
    patience_seconds: float = 25.0,
) -> Round:
    """Run a round in which processes of one kind die.

    Args:
        world: The fleet.
        kind: One of `killer.KINDS`.
        seed: Decides who dies when.
        part: Which of a service's named places, if it is to die at those.
        deaths: How many there are otherwise.
        failpoint: Whether the first of them is at a named place.
        patience_seconds: How long what is found may take to vanish.

    Raises:
        AssertionError: The fleet does not come back.
    """
    process, _, places = kind.partition(" ")

    async def at_places(scene: Scene) -> None:
        for point in scene.killer.places(process, part):
            reached = await scene.killer.kill_at(process, point)
            scene.result.deaths.append(f"at {point}")
            if not reached:
                scene.result.findings.append(Finding(FAULT, f"nothing that the writer does passes {point}"))
            await scene.settle()
            await scene.more(5)

    async def rolling(scene: Scene) -> None:
        for name in list(world.fleet.supervisor.programs):
            code = await scene.killer.restart(name)
            scene.result.deaths.append(name)
            if code != 0:
                scene.result.findings.append(Finding(FAULT, f"{name} was asked to end and ended with {code}"))
            await scene.settle()
            await scene.more(10)

    async def some(scene: Scene) -> None:
        for number in range(deaths):
            scene.result.deaths.append(await scene.killer.kill(kind, failpoint=failpoint and number == 0))
            await scene.settle()
            await scene.more()

    disturb = at_places if places else rolling if kind == "restart" else some
    never_away = frozenset({"node"}) if kind in _NEVER_CUT else frozenset[str]()
    return await under(world, seed, disturb, lives=kind, never_away=never_away, patience_seconds=patience_seconds)


async def under(
    world: World,
    seed: str,
    disturb: Disturb,
    *,
    lives: str,
    never_away: frozenset[str] = frozenset(),
    faultless: bool = False,
    patience_seconds: float = 25.0,
) -> Round:
    """Run a writer and two watchers, have something happen to the fleet under them, and hold all against all.

    In the middle of it one of the watchers is killed and started again, and the other is frozen for a while.

    Args:
        world: The fleet.
        seed: Decides.
        disturb: What happens.
        lives: What the writer does: see `lives.lives_of`.
        never_away: The watchers that it does not cut off.
        faultless: Whether it may cost no call.
        patience_seconds: How long what is found may take to vanish.
    """
    world.number += 1
    result = Round(seed)
    killer = Killer(world.fleet, random.Random(f"{seed}/{lives}"))
    stem = world.folder / f"round-{world.number}"
    record = stem.with_suffix(".writer")
    before = await _at_rest(world)
    sockets = [f"{service}=unix://{world.fleet.folder}/n1/run/{service}/viewer.sock" for service in SERVICES]
    watches = {
        "gateway": [str(stem.with_suffix(".gateway")), "nodes/-"],
        "node": [str(stem.with_suffix(".node")), NODE, *sockets],
    }
    watchers = {key: _process(world, "watcher", *arguments) for key, arguments in watches.items()}
    victim = killer.chance.choice(sorted(watches))
    writer = None
    try:
        # What is before their snapshot, watchers are not told step by step.
        await _following({Path(arguments[0]): len(SERVICES) + (key == "gateway") for key, arguments in watches.items()})
        writer = _process(world, "writer", str(record), f"r{world.number}", f"{seed}/{lives}", lives)
        scene = Scene(world, killer, result, record, writer)
        await scene.more()
        harm = asyncio.create_task(_harm(world, killer.chance, watchers, watches, victim))
        await disturb(scene)
        await harm
        await _end(writer)
        lines = list(_lines(record))
        result.acknowledged = sum(line["say"] == "ack" for line in lines)
        # What the writer began last may take as long as what a crash has cut.
        await _operations_ended(world, max(scene.returned_seconds + SETTLE_SECONDS, time.time() + 5))

        async def look() -> list[Finding]:
            told = {key: list(_lines(Path(arguments[0]))) for key, arguments in watches.items()}
            try:
                is_so = await truth.read(world.fleet, world.admin, frozenset(killer.killed_guests))
            except VirtfleetError as error:
                return [Finding(GAP, f"the gateway cannot list the fleet: {error!r}")]
            return check(lines, told, is_so, never_away - {victim}, faultless=faultless)

        result.findings += await _settled(look, patience_seconds)
        await _clean(world)
        result.findings += await _settled(lambda: _left(world, before), patience_seconds)
    finally:
        for process in (writer, *watchers.values()):
            if process is not None:
                process.kill()
                process.wait()
                if process.stdin is not None:
                    process.stdin.close()
    return result


async def _harm(
    world: World,
    chance: random.Random,
    watchers: dict[str, subprocess.Popen[bytes]],
    watches: dict[str, list[str]],
    victim: str,
) -> None:
    """Freeze a watcher for a while, and kill another and start it again."""
    frozen = next(process for key, process in watchers.items() if key != victim)
    frozen.send_signal(signal.SIGSTOP)
    await asyncio.sleep(chance.uniform(*_LULL_SECONDS))
    frozen.send_signal(signal.SIGCONT)
    await _end(watchers[victim], kill=True)
    watchers[victim] = _process(world, "watcher", *watches[victim])


async def _at_rest(world: World) -> frozenset[str]:
    """Return what the host has when nothing is on its way: the same three times."""
    ends_at = time.monotonic() + 20
    looks = [truth.host(world.fleet)]
    while len(set(looks[-3:])) > 1 or len(looks) < 3:
        assert time.monotonic() < ends_at, f"the host does not come to rest: {sorted(looks[-1] ^ looks[-2])}"
        await asyncio.sleep(0.2)
        looks.append(truth.host(world.fleet))
    return looks[-1]


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


async def _following(records: Mapping[Path, int]) -> None:
    """Wait until all watchers have had all their snapshots."""
    ends_at = time.monotonic() + 60
    while any(
        sum(line["kind"] == "snapshot" for answer in _lines(path) for line in answer["told"]) < count
        for path, count in records.items()
    ):
        assert time.monotonic() < ends_at, "the watchers do not come up"
        await asyncio.sleep(0.05)


async def _acknowledged(record: Path, more: int, writer: subprocess.Popen[bytes]) -> None:
    """Wait until so many more changes have been acknowledged."""
    start = sum(line["say"] == "ack" for line in _lines(record))
    ends_at = time.monotonic() + 90
    while sum(line["say"] == "ack" for line in _lines(record)) < start + more:
        assert writer.poll() is None, "the writer has ended"
        assert time.monotonic() < ends_at, "changes are no longer acknowledged"
        await asyncio.sleep(0.05)


async def _end(process: subprocess.Popen[bytes], *, kill: bool = False) -> None:
    """Have a process end by itself, or by SIGKILL."""
    if kill:
        process.kill()
    elif process.stdin is not None:
        process.stdin.close()
    ends_at = time.monotonic() + 120
    while process.poll() is None:
        assert time.monotonic() < ends_at, f"{process.args!r} does not end"
        await asyncio.sleep(0.05)
    assert kill or process.returncode == 0, f"{process.args!r}: {process.returncode}"


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


async def _operations_ended(world: World, until_seconds: float) -> None:
    """Wait until no operation runs, or until it is so late that each that does is a finding."""
    while truth.running_operations(world.fleet) and time.time() < until_seconds:
        await asyncio.sleep(0.2)


async def _settled(look: Callable[[], Awaitable[list[Finding]]], seconds: float) -> list[Finding]:
    """Look until there is nothing to find; what is still there after so long is found."""
    ends_at = time.monotonic() + seconds
    while True:
        findings = await look()
        if not findings or time.monotonic() > ends_at:
            return findings
        await asyncio.sleep(0.3)


async def _left(world: World, before: frozenset[str]) -> list[Finding]:
    """Hold the host against what it was before the round."""
    after = truth.host(world.fleet)
    return [Finding(LEFT, what) for what in sorted(after - before)] + [
        Finding(LOST, f"{what} is gone from the host") for what in sorted(before - after)
    ]


async def _clean(world: World) -> None:
    """Delete what the round made, by the API: what was kept, and what a creation that was cut left to the operator."""
    admin = world.admin
    domains = domain_pb2.ListDomainsRequest(parent=NODE, page_size=500)
    for name in [one.name async for one in admin.pages(admin.domains.ListDomains, domains)]:
        request = domain_pb2.DeleteDomainRequest(name=name, stop=True, delete_volumes=True, allow_missing=True)
        await _insist(admin, admin.domains.DeleteDomain, request)
    pools = pool_pb2.ListPoolsRequest(parent=NODE, page_size=500)
    for name in [one.name async for one in admin.pages(admin.pools.ListPools, pools)]:
        if name != f"{NODE}/pools/{PLACE}":
            await _insist(admin, admin.pools.StopPool, pool_pb2.StopPoolRequest(name=name), pool_pb2.Pool)
            retired = pool_pb2.DeletePoolRequest(name=name, allow_missing=True)
            await _insist(admin, admin.pools.DeletePool, retired)
    volumes = volume_pb2.ListVolumesRequest(parent=f"{NODE}/pools/{PLACE}", page_size=500)
    for name in [one.name async for one in admin.pages(admin.volumes.ListVolumes, volumes)]:
        gone = volume_pb2.DeleteVolumeRequest(name=name, allow_missing=True)
        await _insist(admin, admin.volumes.DeleteVolume, gone)
    networks = network_pb2.ListNetworksRequest(parent=NODE, page_size=500)
    for name in [one.name async for one in admin.pages(admin.networks.ListNetworks, networks)]:
        if name != f"{NODE}/networks/{PLACE}":
            end = network_pb2.DeleteNetworkRequest(name=name, allow_missing=True, force=True)
            await _insist(admin, admin.networks.DeleteNetwork, end)


async def _insist(
    admin: AsyncFleet, method: Callable[..., Any], request: Any, kind: type[Message] = empty_pb2.Empty
) -> None:
    ends_at = time.monotonic() + 40
    while True:
        request.request_id = str(uuid.uuid4())
        try:
            await admin.wait(await method(request), kind, timeout_seconds=30)
        except VirtfleetError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return
            if time.monotonic() > ends_at:
                raise
            await asyncio.sleep(0.3)
        else:
            return

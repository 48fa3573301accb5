"""Guests come and go, and nothing of them stays: not on the host, and not in the processes that made them."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio

from bench.stage import NODE, credentials
from tests.endurance import census, cycles
from tests.endurance.census import Census
from tools import fleet as development
from virtfleet_client import connect_async

COUNT = int(os.environ.get("CYCLES") or 100)
WARM_UP_LIVES = max(300, 2 * COUNT)
"""The launcher's heap settles over its first thousand lives, by 0.9 MiB in all, with Python 3.13 over its first two."""

WARM_UP_CHANGES = 300
"""Fill what is kept in memory on purpose: caches of pages and rows, the newest changes for watchers."""

WATCH_MEMORY_BYTES = 64 << 10
TOLERANCE = 0.02
SETTLE_SECONDS = 20.0

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def fleet() -> AsyncIterator[development.Fleet]:
    """Yield a fleet that keeps little for watchers, so that it is full soon."""
    servers = ("gateway", "compute", "storage", "network")
    settings = {server: {"watch_memory_bytes": WATCH_MEMORY_BYTES} for server in servers}
    async with development.Fleet.running(development.Plan(driver="qemu,test", settings=settings)) as made:
        yield made


async def settled(fleet: development.Fleet, before: Census | None = None) -> Census:
    """Take a census once all that was to be given back has been: the same three times, or the same as before."""
    ends_at = time.monotonic() + SETTLE_SECONDS
    last = await asyncio.to_thread(census.take, fleet)
    same = 0
    lowest = dict(last.private_bytes)
    while time.monotonic() < ends_at and same < 2:
        await asyncio.sleep(0.5)
        now = await asyncio.to_thread(census.take, fleet)
        same = 0 if last.differences(now) or (before is not None and before.differences(now)) else same + 1
        # The garbage collector runs when it likes: what counts is what is left after it.
        lowest = {name: min(lowest[name], found) for name, found in now.private_bytes.items()}
        last = now
    last.private_bytes.update(lowest)
    return last


@pytest.mark.timeout(120 + 2 * COUNT)
async def test_lives_of_guests_leave_nothing(fleet: development.Fleet) -> None:
    async with connect_async(f"tls://{fleet.address}", credentials(fleet)) as connection:
        async with cycles.ground(connection) as ground:
            await cycles.churn(ground, WARM_UP_CHANGES)
            await ground.lives(WARM_UP_LIVES)
            before = await settled(fleet)
            began = time.monotonic()
            await ground.lives(COUNT)
            took = time.monotonic() - began
            after = await settled(fleet, before)
        bare = await settled(fleet)
    print(f"{COUNT} lives in {took:.1f} s")
    for name, was in before.private_bytes.items():
        print(f"{name:12} {was / census.MIB:7.2f} MiB, then {after.private_bytes[name] / census.MIB:7.2f} MiB")
    assert not before.differences(after)
    grown = {
        name: (was, after.private_bytes[name])
        for name, was in before.private_bytes.items()
        if abs(after.private_bytes[name] - was) > TOLERANCE * was
    }
    assert not grown
    # Pool and network took their link, rules, daemon and folder with them.
    assert not [command for command in bare.processes if "dnsmasq" in command or "qemu-system" in command]
    assert {name for _, name, _ in bare.links} == {"lo", "uplink"}
    assert not [name for name in bare.files if "guests/" in name or "pools/" in name]


async def test_the_census_sees_what_is_forgotten(fleet: development.Fleet) -> None:
    """Shown to bite: a process, a link, rules, a folder and a descriptor that nobody accounts for."""
    before = await settled(fleet)
    network = fleet.networks[NODE]
    inside = ("ip", "netns", "exec", network.namespace)
    forgotten = fleet.folder / NODE / "forgotten"
    tap = ("dev", "tap-forgotten", "mode", "tap")
    for command in (
        ("ip", "-n", network.namespace, "tuntap", "add", *tap),
        (*inside, "nft", "add", "table", "inet", "forgotten"),
        ("mkdir", str(forgotten)),
    ):
        await run(*command)
    sleeper = await asyncio.create_subprocess_exec(*network.enter("sleep", "100"))
    _, writer = await asyncio.open_connection("127.0.0.1", fleet.port)
    try:
        await asyncio.sleep(0.2)
        found = before.differences(await asyncio.to_thread(census.take, fleet))
    finally:
        writer.close()
        sleeper.kill()
        await sleeper.wait()
        await run("ip", "-n", network.namespace, "tuntap", "del", *tap)
        await run(*inside, "nft", "delete", "table", "inet", "forgotten")
        forgotten.rmdir()
    seen = [line.partition(":")[0] for line in found]
    assert seen == ["processes", "links", "rules", "files", "descriptors"], found
    assert not before.differences(await settled(fleet, before))


async def test_the_census_tells_a_process_that_was_started_again() -> None:
    """Its memory is new, and whatever the one before it had leaked is gone."""
    before = Census(frozenset({("n1/storage", 7)}), Counter(), frozenset(), (), frozenset(), frozenset(), {}, {})
    after = replace(before, programs=frozenset({("n1/storage", 8)}))
    assert [line.partition(":")[0] for line in before.differences(after)] == ["programs"]


async def run(*command: str) -> None:
    """Run a command that must succeed."""
    process = await asyncio.create_subprocess_exec(*command)
    assert await process.wait() == 0, command

"""The checker names bugs that are really there: each is planted in a service of a live fleet, and a round is run."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.chaos import rounds
from tests.chaos.checker import GAP, LEFT, LOST
from tests.chaos.rounds import World
from tools.paths import ROOT

SEED = os.environ.get("SEED") or secrets.token_hex(4)

ROUND_LIMIT = 3
"""Whether a death falls into the moment in which a bug shows is for chance; three rounds in a row miss it hardly ever."""

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]


@pytest_asyncio.fixture(loop_scope="function")
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with rounds.world(tmp_path) as made:
        yield made
    for path in Path("/dev/shm").glob("virtfleet-planted-*"):
        shutil.rmtree(path)


async def plant(world: World, service: str, bug: str) -> None:
    """Have a service run with a bug from now on."""
    program = world.fleet.supervisor.programs[f"n1/{service}"]
    command = list(program.command)
    place = command.index(f"virtfleet_{service}")
    program.command = [*command[:place], "tests.chaos.planted", bug, *command[place:]]
    program.environment = {**program.environment, "PYTHONPATH": str(ROOT)}
    world.fleet.supervisor.kill(f"n1/{service}")
    ends_at = time.monotonic() + 20
    while program.starts < 2:
        assert time.monotonic() < ends_at
        await asyncio.sleep(0.05)
    await rounds.settle(world)


@pytest.mark.asyncio(loop_scope="function")
@pytest.mark.parametrize(
    ("bug", "service", "kind", "finding"),
    [
        ("acknowledge-before-commit", "compute", "compute", LOST),
        ("dropped-event", "compute", "guest", GAP),
        ("forgotten-tap", "network", "guest", LEFT),
    ],
)
async def test_a_planted_bug_is_named(world: World, bug: str, service: str, kind: str, finding: str) -> None:
    await plant(world, service, bug)
    seen = []
    for number in range(ROUND_LIMIT):
        seed = f"{SEED}-{number}"
        result = await rounds.run(world, kind, seed, failpoint=False, patience_seconds=8)
        found = {one.kind for one in result.findings}
        print(f"SEED={seed} {bug}: {sorted(found)}, {len(result.findings)} findings")
        if finding in found:
            return
        seen.append((seed, result.findings))
    raise AssertionError(f"{bug} goes unseen: {seen}")

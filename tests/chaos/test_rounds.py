"""Rounds of chaos: `make test` runs one of each kind, `ROUNDS=n SEED=n make chaos` more of them."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.chaos import rounds
from tests.chaos.killer import KINDS, PROCESSES
from tests.chaos.rounds import World

SEED = os.environ.get("SEED") or secrets.token_hex(4)
ROUNDS = int(os.environ.get("ROUNDS") or len(PROCESSES))

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with rounds.world(tmp_path_factory.mktemp("chaos")) as made:
        yield made


@pytest.mark.parametrize("number", range(ROUNDS))
async def test_nothing_acknowledged_is_lost_done_twice_or_left(world: World, number: int) -> None:
    kind = KINDS[number % len(KINDS)]
    result = await rounds.run(world, kind, f"{SEED}/{number}", part=number // len(KINDS))
    print(f"SEED={SEED} round {number}: {result.acknowledged} changes, {'; '.join(result.deaths)}")
    for finding in result.findings:
        print(f"    {finding.kind}: {finding.text}")
    assert not result.findings, f"SEED={SEED} round {number}: {len(result.findings)} findings"

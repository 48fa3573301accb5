from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from tests.integration.gateway.real import RealFleet, real_fleet


@pytest_asyncio.fixture
async def fleet() -> AsyncIterator[RealFleet]:
    # A short path: the sockets of the processes lie in it.
    with tempfile.TemporaryDirectory(prefix="vfg") as folder:
        async with real_fleet(Path(folder)) as made:
            yield made

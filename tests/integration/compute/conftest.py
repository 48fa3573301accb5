from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.compute.rig import Service, folder, service


@pytest.fixture
async def place() -> AsyncIterator[Path]:
    async with folder() as path:
        yield path


@pytest.fixture
async def node(place: Path) -> AsyncIterator[Service]:
    async with service(place) as made:
        yield made

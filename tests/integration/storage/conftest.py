from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.integration.storage.rig import Rig, rig


@pytest.fixture
async def node() -> AsyncIterator[Rig]:
    async with rig() as made:
        yield made

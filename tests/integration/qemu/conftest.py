"""A node with a driver, and the small guest."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.integration.qemu import running
from tests.integration.qemu.running import Node
from tools import guest_image


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    async with running.node() as made:
        await made.enter()
        yield made


@pytest.fixture(scope="session")
def image() -> guest_image.GuestImage:
    return guest_image.make()

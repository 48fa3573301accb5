"""The launcher and a client of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.launcher.running import Launcher
from virtfleet_service.launcher import LauncherClient


@pytest.fixture
async def launcher(tmp_path: Path) -> AsyncIterator[Launcher]:
    running = Launcher(tmp_path)
    running.start()
    try:
        yield running
    finally:
        await asyncio.to_thread(running.clean)
    failed = [message for message in running.messages() if message["level"] == "error"]
    assert running.expected_errors or not failed, failed


@pytest.fixture
def compute(launcher: Launcher) -> LauncherClient:
    return launcher.client()

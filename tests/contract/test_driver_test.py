from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from virtfleet.compute.v1 import domain_spec_pb2
from virtfleet_compute.drivers.api import DomainRef, DriverEnvironment, StartPlan
from virtfleet_compute.drivers.test import create
from virtfleet_compute.testing import contract


class TestTheTestDriver(
    contract.DriverContract,
    contract.GracefulStopContract,
    contract.SuspendContract,
    contract.ResetContract,
    contract.RebootContract,
    contract.LiveUpdateContract,
    contract.StatsContract,
    contract.ConsoleContract,
):
    @pytest.fixture
    async def rig(self, tmp_path: Path) -> AsyncIterator[contract.Rig]:
        driver = create(DriverEnvironment("n1", tmp_path / "state", tmp_path / "run", None))
        spec = domain_spec_pb2.DomainSpec()
        spec.serials["con"].SetInParent()

        async def plan(given: StartPlan) -> StartPlan:
            return given

        async def end_inside(domain: DomainRef) -> None:
            session = await driver.open_console(domain, "con", writable=True, force=True, epoch="", offset=None)
            await session.write(b"poweroff\n")
            await session.close()

        await driver.probe()
        async with driver.running():
            yield contract.Rig(driver, spec, plan, end_inside)

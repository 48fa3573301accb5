"""The QEMU driver keeps the promises of drivers, over a real launcher and real guests."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from tests.integration.launcher.running import UID
from tests.integration.qemu import running, sectors
from tests.integration.qemu.running import FileConnection, consoles
from virtfleet.compute.v1 import domain_spec_pb2
from virtfleet_compute.drivers.api import DomainRef, StartPlan
from virtfleet_compute.testing import contract

# mov dx, 0x3fd; again: in al, dx; test al, 1; jz again
_WAIT_FOR_A_BYTE = b"\xba\xfd\x03\xec\xa8\x01\x74\xfb"


class TestTheQemuDriver(
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
    async def rig(self) -> AsyncIterator[contract.Rig]:
        async with running.node() as node:
            disk = node.folder / "boot.raw"
            sectors.write_disk(disk, sectors.say("A\n") + _WAIT_FOR_A_BYTE + sectors.POWER_OFF)
            users = itertools.count(UID)
            driver = await node.enter(listen=False)
            spec = domain_spec_pb2.DomainSpec()
            spec.memory.maximum_bytes = 16 * running.MIB
            spec.serials["con"].SetInParent()
            spec.disks["root"].volume = "pools/p/volumes/root"
            spec.disks["root"].shareable = True

            async def plan(given: StartPlan) -> StartPlan:
                return replace(given, run_as_uid=next(users), disks={"root": FileConnection(str(disk), "raw")})

            async def end_inside(domain: DomainRef) -> None:
                session = await consoles(driver).open_console(
                    domain, "con", writable=True, force=True, epoch="", offset=None
                )
                await session.write(b"x")
                await session.close()

            def leftovers() -> list[str]:
                return [path.name for path in (node.launcher.run / "guests").iterdir()]

            yield contract.Rig(driver, spec, plan, end_inside, leftovers)

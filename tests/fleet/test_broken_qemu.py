"""A QEMU that is broken in every way, under the whole of a fleet: the caller is told, and neither node nor stores keep a trace.

What the driver does about it alone is in `tests/integration/qemu/test_faults.py`; here volumes, ports and users come and go
with it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import pytest_asyncio
from google.protobuf import empty_pb2

from bench.stage import credentials
from tests.chaos import truth
from tests.fleet.test_failed_starts import processes_of
from tests.integration.qemu.test_faults import FAKE
from tools import fleet as development
from virtfleet.compute.v1 import domain_pb2
from virtfleet.network.v1 import network_pb2, port_pb2
from virtfleet.storage.v1 import pool_pb2, volume_pb2
from virtfleet_client import AsyncFleet, VirtfleetError, connect_async

NODE = "nodes/n1"
DOMAIN = f"{NODE}/domains/web"
DISK = f"{NODE}/pools/place/volumes/web"
MIB = 1 << 20

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]


@dataclass(frozen=True, slots=True)
class Ground:
    """Is a fleet whose QEMU is as `mode` says, with a stopped domain that has a disk and a port."""

    fleet: development.Fleet
    admin: AsyncFleet
    folder: Path
    domain: domain_pb2.Domain

    @property
    def ended(self) -> bool:
        """Whether a run has ended and is on record."""
        return (self.fleet.folder / f"n1/run/launcher/guests/qemu-{self.domain.uid}/exit").exists()

    def mode(self, value: str) -> None:
        """Make the QEMU be as it is from now on."""
        (self.folder / "mode").write_text(value)

    async def start(self) -> domain_pb2.Domain:
        """Start the domain."""
        operation = await self.admin.domains.StartDomain(domain_pb2.StartDomainRequest(name=DOMAIN), timeout=20)
        return await self.admin.wait(operation, domain_pb2.Domain)

    async def get(self) -> domain_pb2.Domain:
        """Read the domain."""
        found: domain_pb2.Domain = await self.admin.domains.GetDomain(
            domain_pb2.GetDomainRequest(name=DOMAIN), timeout=5
        )
        return found

    async def stop(self) -> None:
        """Stop the domain."""
        stop = domain_pb2.StopDomainRequest(name=DOMAIN, mode=domain_pb2.STOP_MODE_FORCE)
        await self.admin.wait(await self.admin.domains.StopDomain(stop), domain_pb2.Domain)


Place = tuple[development.Fleet, AsyncFleet, Path]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def place() -> AsyncIterator[Place]:
    """Yield a fleet with a pool and a network that run, a connection to it, and where its QEMU is."""
    with tempfile.TemporaryDirectory(prefix="vf-fake-qemu-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        binary = folder / "qemu"
        binary.write_text(FAKE)
        binary.chmod(0o755)
        (folder / "mode").write_text("real")
        driver = {"binary": str(binary), "start_seconds": 1.5, "command_seconds": 1.5}
        settings: dict[str, dict[str, object]] = {
            "compute": {"drivers": {"qemu": driver}},
            "launcher": {"executables": [str(binary), shutil.which("dnsmasq")]},
        }
        plan = development.Plan(driver="qemu", settings=settings)
        async with (
            development.Fleet.running(plan) as fleet,
            connect_async(f"tls://{fleet.address}", credentials(fleet)) as admin,
        ):
            pool = pool_pb2.CreatePoolRequest(parent=NODE, pool_id="place", start=True)
            pool.pool.spec.dir.SetInParent()
            await admin.wait(await admin.pools.CreatePool(pool), pool_pb2.Pool)
            network = network_pb2.CreateNetworkRequest(parent=NODE, network_id="place", start=True)
            network.network.spec.isolated.SetInParent()
            await admin.wait(await admin.networks.CreateNetwork(network), network_pb2.Network)
            yield fleet, admin, folder


@pytest_asyncio.fixture(loop_scope="module")
async def ground(place: Place) -> AsyncIterator[Ground]:
    """Yield the ground; what the domain had on the node goes with it."""
    fleet, admin, folder = place
    bare = truth.host(fleet)
    create = domain_pb2.CreateDomainRequest(parent=NODE, domain_id="web")
    spec = create.domain.spec
    spec.driver, spec.memory.maximum_bytes = "qemu", 64 * MIB
    disk = create.new_volumes.add(pool="pools/place", volume_id="web")
    disk.spec.format, disk.spec.capacity_bytes = volume_pb2.VOLUME_FORMAT_QCOW2, 4 * MIB
    spec.disks["root"].volume = "pools/place/volumes/web"
    spec.interfaces["lan"].network = "networks/place"
    made = await admin.wait(await admin.domains.CreateDomain(create), domain_pb2.Domain)
    yield Ground(fleet, admin, folder, made)
    delete = domain_pb2.DeleteDomainRequest(name=DOMAIN, stop=True, delete_volumes=True)
    await admin.wait(await admin.domains.DeleteDomain(delete), empty_pb2.Empty)
    assert not truth.host(fleet) ^ bare


class Traces(NamedTuple):
    """Is what a run leaves on its node: read from the kernel and the files."""

    host: frozenset[str]
    access: tuple[int, int, int, list[str]]
    processes: list[str]


def traces(ground: Ground) -> Traces:
    """Look."""
    file = ground.fleet.folder / "n1/pools/place/web"
    status = file.stat()
    access = (status.st_uid, status.st_gid, status.st_mode, os.listxattr(file))
    # How the last run ended stands in the run directories until the domain starts again or goes.
    uid = ground.domain.uid
    records = (f"/guests/qemu-{uid}", f"/qemu/{uid}/end") if ground.ended else ()
    host = frozenset(
        one
        for one in truth.host(ground.fleet)
        if not any(record in one for record in records) and not (records and one.endswith(f"/qemu/{uid}"))
    )
    return Traces(host, access, processes_of(ground.domain.uid))


async def nothing_is_left(ground: Ground, before: Traces) -> None:
    """Wait until the node is as it was."""
    ends_at = time.monotonic() + 10
    while (now := traces(ground)) != before:
        changed = sorted(now.host ^ before.host), now.access, before.access, now.processes
        assert time.monotonic() < ends_at, changed
        await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("exit", "QEMU ended with exit code 3; it said: fake: cannot start, password=…"),
        ("crash", "QEMU was ended by signal 11"),
        ("hang", "no greeting in"),
        ("garbage", "no greeting"),
        ("greets", "QEMU ended with exit code 5"),
        ("silent", "no answer to cont"),
    ],
)
async def test_a_start_on_a_broken_qemu_tells_why_and_leaves_nothing(ground: Ground, how: str, text: str) -> None:
    before = traces(ground)
    assert not before.processes
    ground.mode(how)
    with pytest.raises(VirtfleetError) as failed:
        await ground.start()
    error = failed.value
    assert (error.code().name, error.reason, error.fields) == ("INTERNAL", "HYPERVISOR_FAILED", ()), error
    assert error.metadata["resource"] == DOMAIN
    assert text in (error.details() or "")
    after = await ground.get()
    assert after.status.state == domain_pb2.DOMAIN_STATE_SHUT_OFF
    assert text in after.status.last_failure.message
    assert (after.spec, after.generation) == (ground.domain.spec, ground.domain.generation)
    await nothing_is_left(ground, before)
    disk = await ground.admin.volumes.GetVolume(volume_pb2.GetVolumeRequest(name=DISK), timeout=5)
    assert not disk.status.attachments
    [port] = (await ground.admin.ports.ListPorts(port_pb2.ListPortsRequest(parent=f"{NODE}/networks/place"))).ports
    assert port.status.state == port_pb2.PORT_STATE_UNPLUGGED
    # And it is no obstacle.
    ground.mode("real")
    assert (await ground.start()).status.state == domain_pb2.DOMAIN_STATE_RUNNING
    assert len(processes_of(ground.domain.uid)) == 1
    await ground.stop()
    await nothing_is_left(ground, before)


async def test_a_qemu_that_dies_later_is_told_and_leaves_nothing(ground: Ground) -> None:
    before = traces(ground)
    ground.mode("real")
    started = await ground.start()
    [process] = processes_of(ground.domain.uid)
    assert started.status.pid == int(process)
    os.kill(int(process), signal.SIGKILL)
    await nothing_is_left(ground, before)
    ends_at = time.monotonic() + 10
    while (after := await ground.get()).status.active:
        assert time.monotonic() < ends_at
        await asyncio.sleep(0.05)
    assert after.status.state == domain_pb2.DOMAIN_STATE_SHUT_OFF
    assert after.status.state_reason == domain_pb2.DOMAIN_STATE_REASON_HYPERVISOR_DIED
    disk = await ground.admin.volumes.GetVolume(volume_pb2.GetVolumeRequest(name=DISK), timeout=5)
    assert not disk.status.attachments
    assert (await ground.start()).status.runtime_id != started.status.runtime_id
    await ground.stop()

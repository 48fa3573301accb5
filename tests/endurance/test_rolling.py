"""Restarts, rotations, revocations and another gateway, while callers change things and watchers follow."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio
from cryptography import x509

from bench.stage import NODE, credentials, pid_of
from tests.endurance import load
from tests.fleet.rig import SERVICES
from tools import fleet as development
from tools.paths import ROOT
from virtfleet.compute.v1 import watch_pb2
from virtfleet.fleet.v1 import enrollment_pb2
from virtfleet_client import AsyncFleet, Credentials, VirtfleetError, connect_async

CERTIFICATE_SECONDS = 40
PROGRAMS = ("gateway", *(f"{NODE}/{service}" for service in SERVICES), f"{NODE}/launcher")

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(150)]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def fleet() -> AsyncIterator[development.Fleet]:
    """Yield a fleet whose nodes renew their certificates twice a minute."""
    settings = {"gateway": {"node_certificate_seconds": CERTIFICATE_SECONDS}}
    async with development.Fleet.running(development.Plan(driver="test", settings=settings)) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def admin(fleet: development.Fleet) -> AsyncIterator[AsyncFleet]:
    """Yield a connection to the gateway."""
    async with connect_async(f"tls://{fleet.address}", credentials(fleet)) as connection:
        yield connection


async def until(holds: Callable[[], object], seconds: float, what: str) -> None:
    """Look until something holds."""
    ends_at = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends_at, f"{what} does not hold after {seconds} s"
        await asyncio.sleep(0.05)


def serial(fleet: development.Fleet, service: str) -> int:
    """Return the serial number of the certificate that a service of the node has."""
    content = (fleet.folder / NODE / "state/identity" / f"{service}.crt").read_bytes()
    return x509.load_pem_x509_certificate(content).serial_number


async def test_a_rolling_restart_of_all_services_costs_no_call(fleet: development.Fleet, admin: AsyncFleet) -> None:
    async with load.running(admin) as running:
        for program in PROGRAMS:
            await running.more()
            before = pid_of(fleet, program)
            os.kill(before, signal.SIGTERM)
            await until(lambda program=program, before=before: pid_of(fleet, program) != before, 20, program)  # type: ignore[misc]  # bound at once
            await running.more()
    print(running.truth.calls, "calls;", dict(running.truth.retried))


async def test_certificates_are_rotated_under_load(fleet: development.Fleet, admin: AsyncFleet) -> None:
    before = {service: serial(fleet, service) for service in SERVICES}
    async with load.running(admin) as running:
        await until(
            lambda: all(serial(fleet, service) != before[service] for service in SERVICES),
            CERTIFICATE_SECONDS,
            "all certificates are new",
        )
        # And the calls and watches that began with the old ones go on with the new ones.
        await running.more(60)
    assert not running.truth.retried


async def test_a_revocation_ends_one_caller_and_nobody_else(fleet: development.Fleet, admin: AsyncFleet) -> None:
    folder = fleet.folder / "guest"
    arguments = ("authority", "issue", "guest", "--role", "viewer", "--directory", str(fleet.folder / "authority"))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "virtfleet_cli", *arguments, "--output", str(folder), stdout=asyncio.subprocess.DEVNULL
    )
    assert await process.wait() == 0
    files = Credentials(*(folder / name for name in ("ca.crt", "guest.crt", "guest.key")))
    number = x509.load_pem_x509_certificate(files.certificate_file.read_bytes()).serial_number
    async with load.running(admin) as running, connect_async(f"tls://{fleet.address}", files) as guest:
        told = asyncio.Event()
        following = asyncio.create_task(follow(guest, told))
        await asyncio.wait_for(told.wait(), 20)
        request = enrollment_pb2.RevokeCertificateRequest(name=f"certificates/c{number:x}", allow_missing=True)
        await admin.enrollment.RevokeCertificate(request, timeout=5)
        with pytest.raises(VirtfleetError) as ended:
            await asyncio.wait_for(following, 10)
        assert ended.value.reason == "CERTIFICATE_REVOKED"
        await running.more(40)
    assert not running.truth.retried


def identity(file: Path) -> str:
    """Return whose certificate a file holds."""
    certificate = x509.load_pem_x509_certificate(file.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    found: str = names.get_values_for_type(x509.UniformResourceIdentifier)[0]
    return found


async def follow(fleet: AsyncFleet, told: asyncio.Event) -> None:
    """Follow the fleet until that is refused."""
    async for _ in fleet.watch(watch_pb2.WatchResourcesRequest(parent="nodes/-")):
        told.set()


async def test_another_gateway_takes_the_place_of_the_first_on_its_store(
    fleet: development.Fleet, admin: AsyncFleet
) -> None:
    settings = str(fleet.folder / "gateway.toml")
    second = (sys.executable, "-m", "virtfleet_gateway", "--config", settings, "--name", "g2")
    shown = fleet.folder / "gateway/identity/gateway.crt"
    assert identity(shown) == "spiffe://virtfleet.dev/gateway/g1"
    async with load.running(admin) as running:
        await running.more()
        # As long as the first one lives there is no second one on its store.
        process = await asyncio.create_subprocess_exec(
            *second, "--listen", "127.0.0.1:0", "--enrollment-listen", "", cwd=ROOT,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        out, _ = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 1, out.decode()
        assert b"is open in another process: only one service may use it" in out
        assert identity(shown) == "spiffe://virtfleet.dev/gateway/g1"
        await running.more()
        program = fleet.supervisor.programs["gateway"]
        await fleet.supervisor.stop("gateway")
        program.command = second
        await fleet.supervisor.start(program)
        await running.more(40)
    assert identity(shown) == "spiffe://virtfleet.dev/gateway/g2"
    print(running.truth.calls, "calls;", dict(running.truth.retried))

"""Restarts, rotations, revocations and another gateway, under the writer and the watchers of chaos."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio
from cryptography import x509

from bench.stage import NODE
from tests.chaos import rounds, truth
from tests.chaos.rounds import Scene, World
from tests.endurance import stores
from tests.fleet.rig import SERVICES
from tools import fleet as development
from tools.paths import ROOT
from tools.supervisor import Program
from virtfleet.compute.v1 import watch_pb2
from virtfleet.fleet.v1 import enrollment_pb2
from virtfleet_client import AsyncFleet, Credentials, VirtfleetError, connect_async

CERTIFICATE_SECONDS = 40
SEED = os.environ.get("SEED") or secrets.token_hex(4)

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(200)]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """Yield a fleet whose nodes renew their certificates twice a minute."""
    folder = tmp_path_factory.mktemp("rolling")
    async with rounds.world(folder, gateway={"node_certificate_seconds": CERTIFICATE_SECONDS}) as made:
        yield made


def nothing_found(result: rounds.Round) -> None:
    """Print what happened, and see that nothing is as it should not be."""
    print(f"SEED={SEED}: {result.acknowledged} changes; {'; '.join(result.deaths)}")
    assert not result.findings, "\n".join(f"{one.kind}: {one.text}" for one in result.findings)


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


async def test_a_rolling_restart_of_all_services(world: World) -> None:
    nothing_found(await rounds.run(world, "restart", SEED))


async def test_certificates_are_rotated_under_load(world: World) -> None:
    fleet = world.fleet
    before = {service: serial(fleet, service) for service in SERVICES}

    async def rotated(scene: Scene) -> None:
        await until(
            lambda: all(serial(fleet, service) != before[service] for service in SERVICES),
            CERTIFICATE_SECONDS,
            "all certificates are new",
        )
        # And the calls and watches that began with the old ones go on with the new ones.
        await scene.more(60)

    nothing_found(await rounds.under(world, SEED, rotated, lives="", never_away=frozenset({"node"}), faultless=True))


async def test_a_revocation_ends_one_caller_and_nobody_else(world: World) -> None:
    fleet = world.fleet
    folder = fleet.folder / "guest"
    arguments = ("authority", "issue", "guest", "--role", "viewer", "--directory", str(fleet.folder / "authority"))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "virtfleet_cli", *arguments, "--output", str(folder), stdout=asyncio.subprocess.DEVNULL
    )
    assert await process.wait() == 0
    files = Credentials(*(folder / name for name in ("ca.crt", "guest.crt", "guest.key")))
    number = x509.load_pem_x509_certificate(files.certificate_file.read_bytes()).serial_number

    async def revoked(scene: Scene) -> None:
        async with connect_async(f"tls://{fleet.address}", files) as guest:
            told = asyncio.Event()
            following = asyncio.create_task(follow(guest, told))
            await asyncio.wait_for(told.wait(), 20)
            request = enrollment_pb2.RevokeCertificateRequest(name=f"certificates/c{number:x}", allow_missing=True)
            await world.admin.enrollment.RevokeCertificate(request, timeout=5)
            with pytest.raises(VirtfleetError) as ended:
                await asyncio.wait_for(following, 10)
            assert ended.value.reason == "CERTIFICATE_REVOKED"
        await scene.more(40)

    nothing_found(await rounds.under(world, SEED, revoked, lives="", never_away=frozenset({"node"}), faultless=True))


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


async def test_another_gateway_takes_the_place_of_the_first_on_its_store(world: World) -> None:
    fleet = world.fleet
    settings = str(fleet.folder / "gateway.toml")
    second = (sys.executable, "-m", "virtfleet_gateway", "--config", settings, "--name", "g2")
    shown = fleet.folder / "gateway/identity/gateway.crt"
    assert identity(shown) == "spiffe://virtfleet.dev/gateway/g1"

    async def replaced(scene: Scene) -> None:
        # As long as the first one lives there is no second one on its store.
        process = await asyncio.create_subprocess_exec(
            *second, "--listen", "127.0.0.1:0", "--enrollment-listen", "", cwd=ROOT,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        out, _ = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 1, out.decode()
        assert b"is open in another process: only one service may use it" in out
        assert identity(shown) == "spiffe://virtfleet.dev/gateway/g1"
        await scene.more()

        def become_the_second(program: Program) -> None:
            program.command = second

        await scene.killer.restart("gateway", become_the_second)
        await scene.settle()
        await scene.more(40)

    nothing_found(await rounds.under(world, SEED, replaced, lives="gateway", never_away=frozenset({"node"})))
    assert identity(shown) == "spiffe://virtfleet.dev/gateway/g2"


async def test_an_upgrade_of_all_stores_and_the_step_back(world: World) -> None:
    """Each store is expanded as by the first start of a later release, and this one, a step back, goes on with it."""

    async def upgraded(scene: Scene) -> None:
        for name, place in truth.STORES.items():
            store = world.fleet.folder / place

            def expand(_program: Program, store: Path = store) -> None:
                stores.migrate(store, stores.EXPAND, release="99.0.0")

            await scene.killer.restart("gateway" if name == "gateway" else f"{NODE}/{name}", expand)
            assert store.with_name(f"{store.name}.before-{stores.NEXT}").exists(), "it was copied first"
            await scene.settle()
            await scene.more()

    nothing_found(await rounds.under(world, SEED, upgraded, lives="restart"))

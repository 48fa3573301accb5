"""`virtfleet authority issue` beside a real gateway: what it issues is listed, and ends within five seconds."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography import x509

from tests.integration.gateway.nodes import details_of
from tests.ports import free_port
from virtfleet.fleet.v1 import enrollment_pb2, enrollment_pb2_grpc, node_pb2, node_pb2_grpc, watch_pb2, watch_pb2_grpc
from virtfleet.type.v1 import watch_pb2 as type_watch_pb2
from virtfleet_gateway.app import App, running
from virtfleet_gateway.authority import Authority
from virtfleet_gateway.settings import FleetSettings

WITHIN_SECONDS = 5
"""What is promised."""


async def command(*arguments: str, failpoint: str = "") -> tuple[int, str]:
    """Run `virtfleet authority …`; returns its exit code and what it printed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "virtfleet_cli",
        "authority",
        *arguments,
        # Wide, so that no path is broken over lines.
        env={**os.environ, "VIRTFLEET_FAILPOINT": failpoint, "COLUMNS": "500"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode is not None
    return process.returncode, output.decode()


class Site:
    """A machine with an authority and a gateway that can be stopped and started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = folder / "authority"
        self.listen = f"127.0.0.1:{free_port()}"
        self._gateway = contextlib.AsyncExitStack()
        self.app: App

    async def start(self) -> None:
        settings = FleetSettings(
            name="g1",
            state_dir=self.folder / "state",
            run_dir=self.folder / "run",
            authority_dir=self.authority,
            listen=self.listen,
            drain_seconds=0.5,
        )
        self.app = await self._gateway.enter_async_context(running(settings))

    async def stop(self) -> None:
        await self._gateway.aclose()

    async def issue(self, name: str, role: str, *, directory: Path | None = None, failpoint: str = "") -> int:
        code, output = await command(
            "issue", name, "--role", role, "--directory", str(directory or self.authority),
            "--output", str(self.folder / name), failpoint=failpoint,
        )  # fmt: skip
        assert code in (0, -signal.SIGKILL), output
        return code

    def serial(self, name: str) -> str:
        pem = (self.folder / name / f"{name}.crt").read_bytes()
        return f"{x509.load_pem_x509_certificate(pem).serial_number:x}"

    def connect(self, name: str) -> grpc.aio.Channel:
        files = [self.folder / name / file for file in ("ca.crt", f"{name}.key", f"{name}.crt")]
        credentials = grpc.ssl_channel_credentials(*(file.read_bytes() for file in files))
        return grpc.aio.secure_channel(self.listen, credentials, options=[("grpc.use_local_subchannel_pool", 1)])


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    made = Site(tmp_path)
    code, output = await command("init", "--directory", str(made.authority))
    assert code == 0, output
    await made.issue("root", "admin")
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


async def listed(channel: grpc.aio.Channel) -> dict[str, enrollment_pb2.Certificate]:
    answer = await enrollment_pb2_grpc.EnrollmentServiceStub(channel).ListCertificates(
        enrollment_pb2.ListCertificatesRequest()
    )
    return {one.status.serial_number: one for one in answer.certificates}


async def shown(channel: grpc.aio.Channel, serial: str) -> enrollment_pb2.Certificate:
    ends_at = time.monotonic() + WITHIN_SECONDS
    while serial not in (found := await listed(channel)):
        assert time.monotonic() < ends_at, f"{serial} is not listed: {sorted(found)}"
        await asyncio.sleep(0.05)
    return found[serial]


async def revoke(channel: grpc.aio.Channel, serial: str, **fields: Any) -> enrollment_pb2.Certificate:
    return await enrollment_pb2_grpc.EnrollmentServiceStub(channel).RevokeCertificate(
        enrollment_pb2.RevokeCertificateRequest(name=f"certificates/c{serial}", **fields)
    )


async def refused(channel: grpc.aio.Channel) -> grpc.aio.AioRpcError:
    """Call until the call is refused; fails where it still passes after the promised time."""
    ends_at = time.monotonic() + WITHIN_SECONDS
    while True:
        try:
            await node_pb2_grpc.NodeServiceStub(channel).ListNodes(node_pb2.ListNodesRequest(), timeout=10)
        except grpc.aio.AioRpcError as error:
            return error
        assert time.monotonic() < ends_at, "the call still passes"
        await asyncio.sleep(0.05)


def is_revocation(error: grpc.aio.AioRpcError) -> bool:
    return (error.code(), details_of(error)["reason"]) == (grpc.StatusCode.UNAUTHENTICATED, "CERTIFICATE_REVOKED")


def open_stream(channel: grpc.aio.Channel) -> Any:
    return watch_pb2_grpc.WatchServiceStub(channel).WatchResources(
        watch_pb2.WatchResourcesRequest(snapshot=type_watch_pb2.WatchSnapshot())
    )


async def end_of(stream: Any) -> grpc.aio.AioRpcError:
    async def read() -> None:
        while await stream.read() is not grpc.aio.EOF:
            pass

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(read(), WITHIN_SECONDS)
    return caught.value


async def test_a_certificate_of_the_command_is_listed_and_ends_with_its_open_streams(site: Site) -> None:
    async with site.connect("root") as root:
        # What was issued before the first start is there at once, the gateway's own too.
        kinds = {one.status.identity: one.status.kind for one in (await listed(root)).values()}
        assert kinds == {
            "spiffe://virtfleet.dev/user/root": enrollment_pb2.CERTIFICATE_KIND_USER,
            "spiffe://virtfleet.dev/gateway/g1": enrollment_pb2.CERTIFICATE_KIND_GATEWAY,
        }
        await site.issue("eve", "viewer")
        certificate = await shown(root, site.serial("eve"))
        assert (certificate.status.identity, list(certificate.status.roles)) == (
            "spiffe://virtfleet.dev/user/eve",
            ["viewer"],
        )
        async with site.connect("eve") as eve:
            stream = open_stream(eve)
            await stream.read()
            assert (await revoke(root, site.serial("eve"), reason="lost")).status.revoke_reason == "lost"
            assert is_revocation(await refused(eve))
            assert is_revocation(await end_of(stream))
        assert (await listed(root))[site.serial("eve")].status.state == enrollment_pb2.CERTIFICATE_STATE_REVOKED


async def test_a_denial_outlives_a_restart_and_what_was_issued_meanwhile_is_known(site: Site) -> None:
    await site.issue("eve", "viewer")
    async with site.connect("root") as root:
        await shown(root, site.serial("eve"))
        await revoke(root, site.serial("eve"))
    await site.stop()
    await site.issue("mallory", "viewer")
    await site.start()
    async with site.connect("root") as root, site.connect("eve") as eve, site.connect("mallory") as mallory:
        assert is_revocation(await refused(eve))
        states = {serial: one.status.state for serial, one in (await listed(root)).items()}
        assert states[site.serial("eve")] == enrollment_pb2.CERTIFICATE_STATE_REVOKED
        assert states[site.serial("mallory")] == enrollment_pb2.CERTIFICATE_STATE_VALID
        await node_pb2_grpc.NodeServiceStub(mallory).ListNodes(node_pb2.ListNodesRequest())
        await revoke(root, site.serial("mallory"))
        assert is_revocation(await refused(mallory))


async def test_a_cut_between_record_and_hand_out_leaves_a_certificate_that_nobody_has(site: Site) -> None:
    code = await site.issue("eve", "viewer", failpoint="authority.issue.recorded")
    assert code == -signal.SIGKILL
    assert list((site.folder / "eve").iterdir()) == []
    async with site.connect("root") as root:
        ends_at = time.monotonic() + WITHIN_SECONDS
        while not (of_eve := [one for one in (await listed(root)).values() if one.display_name == "eve"]):
            assert time.monotonic() < ends_at
            await asyncio.sleep(0.05)
        await revoke(root, of_eve[0].status.serial_number)
        # The command can be given again.
        assert await site.issue("eve", "viewer") == 0
        assert site.serial("eve") != of_eve[0].status.serial_number
        await shown(root, site.serial("eve"))
        async with site.connect("eve") as eve:
            await node_pb2_grpc.NodeServiceStub(eve).ListNodes(node_pb2.ListNodesRequest())


async def test_nothing_is_issued_where_it_cannot_be_recorded_or_handed_out(site: Site) -> None:
    before = sorted((site.authority / "issued").iterdir())
    code, output = await command(
        "issue", "root", "--role", "admin", "--directory", str(site.authority), "--output", str(site.folder / "root")
    )
    assert code == 2
    assert "exists" in output
    assert sorted((site.authority / "issued").iterdir()) == before
    records = site.authority / "issued"
    records.rename(site.authority / "kept")
    records.write_bytes(b"no folder")
    code, output = await command(
        "issue", "eve", "--role", "admin", "--directory", str(site.authority), "--output", str(site.folder / "eve")
    )
    assert code == 2
    assert str(records) in output
    assert list((site.folder / "eve").iterdir()) == []
    records.unlink()
    (site.authority / "kept").rename(records)


async def test_an_authority_on_another_machine_is_served_by_serial_number_or_by_its_record(site: Site) -> None:
    away = site.folder / "away"
    away.mkdir()
    for file in ("ca.key", "ca.crt"):
        (away / file).write_bytes((site.authority / file).read_bytes())
    assert Authority.load(away).key_hash == Authority.load(site.authority).key_hash
    for name in ("eve", "mallory"):
        await site.issue(name, "viewer", directory=away)
    async with site.connect("root") as root, site.connect("eve") as eve, site.connect("mallory") as mallory:
        await node_pb2_grpc.NodeServiceStub(eve).ListNodes(node_pb2.ListNodesRequest())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await revoke(root, site.serial("eve"))
        assert (caught.value.code(), details_of(caught.value)["reason"]) == (
            grpc.StatusCode.NOT_FOUND,
            "RESOURCE_NOT_FOUND",
        )
        stream = open_stream(eve)
        await stream.read()
        await revoke(root, site.serial("eve"), allow_missing=True)
        assert is_revocation(await refused(eve))
        assert is_revocation(await end_of(stream))
        record = f"{site.serial('mallory')}.pem"
        (site.authority / "issued" / record).write_bytes((away / "issued" / record).read_bytes())
        await shown(root, site.serial("mallory"))
        await revoke(root, site.serial("mallory"))
        assert is_revocation(await refused(mallory))


async def test_a_gateway_whose_own_certificate_is_revoked_goes_on_with_another(site: Site) -> None:
    async with site.connect("root") as root:
        (own,) = (one for one in (await listed(root)).values() if one.display_name == "g1")
        await revoke(root, own.status.serial_number)
        ends_at = time.monotonic() + WITHIN_SECONDS
        while not [
            one
            for one in (await listed(root)).values()
            if one.display_name == "g1" and one.status.state == enrollment_pb2.CERTIFICATE_STATE_VALID
        ]:
            assert time.monotonic() < ends_at
            await asyncio.sleep(0.05)
    shown_now = x509.load_pem_x509_certificate((site.folder / "state/identity/gateway.crt").read_bytes())
    assert f"{shown_now.serial_number:x}" != own.status.serial_number
    async with site.connect("root") as root:
        await node_pb2_grpc.NodeServiceStub(root).ListNodes(node_pb2.ListNodesRequest())

"""Joining a real gateway over its enrolment port, and staying a member: what a node does, without a node's services."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

from tests.integration.gateway.nodes import details_of
from tests.ports import free_port
from virtfleet.fleet.v1 import enrollment_pb2, enrollment_pb2_grpc, node_pb2, node_pb2_grpc
from virtfleet_gateway.app import App, running
from virtfleet_gateway.authority import Authority, new_request
from virtfleet_gateway.settings import FleetSettings
from virtfleet_service import enrollment
from virtfleet_service.denial import Denials
from virtfleet_service.enrollment import Fleet, JoinToken, Membership
from virtfleet_service.errors import BackendUnreachable, CredentialsInvalid, DocumentInvalid, JoinTokenInvalid

ENDPOINTS = {"compute": "127.0.0.1:1", "storage": "127.0.0.1:2", "network": "127.0.0.1:3"}


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[App]:
    Authority.create(tmp_path / "authority")
    settings = FleetSettings(
        name="g1",
        state_dir=tmp_path / "state",
        run_dir=tmp_path / "run",
        authority_dir=tmp_path / "authority",
        listen=f"127.0.0.1:{free_port()}",
        enrollment_listen=f"127.0.0.1:{free_port()}",
        drain_seconds=0.5,
    )
    async with running(settings) as app:
        yield app


@pytest.fixture
async def admin(gateway: App) -> AsyncIterator[grpc.aio.Channel]:
    authority = Authority.load(gateway.settings.authority_dir)
    key, request = new_request("root")
    issued = authority.issue_user(request, "root", ["admin"], dt.timedelta(hours=1))
    credentials = grpc.ssl_channel_credentials(authority.certificate_pem, key, issued.pem)
    async with grpc.aio.secure_channel(gateway.settings.listen, credentials) as channel:
        yield channel


async def token(admin: grpc.aio.Channel, node: str = "n1") -> JoinToken:
    request = enrollment_pb2.CreateJoinTokenRequest()
    request.join_token.spec.node = f"nodes/{node}"
    made = await enrollment_pb2_grpc.EnrollmentServiceStub(admin).CreateJoinToken(request)
    return JoinToken.parse(made.token)


async def test_a_node_joins_and_is_in_the_registry(gateway: App, admin: grpc.aio.Channel, tmp_path: Path) -> None:
    fleet = await enrollment.join(
        gateway.settings.enrollment_listen, await token(admin), ENDPOINTS, tmp_path / "n1", labels={"rack": "r1"}
    )
    assert fleet == Fleet("n1", "virtfleet.dev", (gateway.settings.listen,), ("spiffe://virtfleet.dev/gateway/",))
    assert Fleet.load(tmp_path / "n1") == fleet
    for service in ENDPOINTS:
        assert (tmp_path / f"n1/{service}.key").stat().st_mode & 0o777 == 0o600
    node = await node_pb2_grpc.NodeServiceStub(admin).GetNode(node_pb2.GetNodeRequest(name="nodes/n1"))
    assert {service.service: service.endpoint for service in node.status.services} == ENDPOINTS
    assert dict(node.labels) == {"rack": "r1"}
    assert node.status.boot_id == enrollment.boot_id()


async def test_a_gateway_without_the_key_of_the_token_gets_nothing(
    gateway: App, admin: grpc.aio.Channel, tmp_path: Path
) -> None:
    good = await token(admin)
    with pytest.raises(CredentialsInvalid):
        await enrollment.join(
            gateway.settings.enrollment_listen, JoinToken(good.text, "n1", "0" * 64), ENDPOINTS, tmp_path / "n1"
        )
    assert list((tmp_path / "n1").iterdir()) == []
    # The token was not shown to anybody: it is still good.
    await enrollment.join(gateway.settings.enrollment_listen, good, ENDPOINTS, tmp_path / "n1")


async def test_a_used_token_and_a_gateway_that_is_away_are_told_apart(
    gateway: App, admin: grpc.aio.Channel, tmp_path: Path
) -> None:
    used = await token(admin)
    await enrollment.join(gateway.settings.enrollment_listen, used, ENDPOINTS, tmp_path / "first")
    with pytest.raises(JoinTokenInvalid):
        await enrollment.join(gateway.settings.enrollment_listen, used, ENDPOINTS, tmp_path / "second")
    assert Fleet.load(tmp_path / "second") is None
    with pytest.raises(BackendUnreachable):
        await enrollment.join(f"127.0.0.1:{free_port()}", await token(admin), ENDPOINTS, tmp_path / "third")


async def test_no_secret_is_in_a_log(
    gateway: App, admin: grpc.aio.Channel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither that of a token, used well or badly, nor a key."""
    caplog.set_level(logging.DEBUG)
    good = await token(admin)
    for folder in ("first", "second"):
        with contextlib.suppress(JoinTokenInvalid):
            await enrollment.join(gateway.settings.enrollment_listen, good, ENDPOINTS, tmp_path / folder)
    secret = good.text.split(".")[2]
    other = JoinToken.parse(good.text.replace(f".{secret}.", ".guessed-by-me."))
    with pytest.raises(JoinTokenInvalid):
        await enrollment.join(gateway.settings.enrollment_listen, other, ENDPOINTS, tmp_path / "third")
    state = gateway.settings.state_dir
    audit = "".join((state / name).read_text() for name in ("gateway.audit.log", "gateway.audit.refused.log"))
    assert "EnrollNode" in audit
    assert "CreateJoinToken" in audit
    kept = b"".join(path.read_bytes() for path in state.glob("gateway.db*"))
    for text in (secret, "guessed-by-me", "PRIVATE KEY"):
        assert text not in audit
        assert text not in caplog.text
        assert text.encode() not in kept


async def test_the_enrolment_port_serves_enrolment_alone(gateway: App) -> None:
    ca = (gateway.settings.authority_dir / "ca.crt").read_bytes()
    async with grpc.aio.secure_channel(gateway.settings.enrollment_listen, grpc.ssl_channel_credentials(ca)) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await node_pb2_grpc.NodeServiceStub(channel).ListNodes(node_pb2.ListNodesRequest())
    assert caught.value.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAUTHENTICATED)


async def test_no_denial_list_is_taken_on_the_enrolment_port(gateway: App) -> None:
    ca = (gateway.settings.authority_dir / "ca.crt").read_bytes()
    brought = enrollment_pb2.SignedDenialList(content=bytes(1 << 20), key_sha256="0" * 64)
    async with grpc.aio.secure_channel(gateway.settings.enrollment_listen, grpc.ssl_channel_credentials(ca)) as channel:
        bundle = await enrollment_pb2_grpc.EnrollmentServiceStub(channel).GetTrustBundle(
            enrollment_pb2.GetTrustBundleRequest(denial_list=brought)
        )
    assert bundle.ca_certificates == [ca.decode()]


async def test_a_member_renews_its_certificate_and_hears_of_a_revocation(
    gateway: App, admin: grpc.aio.Channel, tmp_path: Path
) -> None:
    folder = tmp_path / "n1"
    await enrollment.join(gateway.settings.enrollment_listen, await token(admin), ENDPOINTS, folder)
    before = (folder / "compute.crt").read_bytes()
    changes: asyncio.Queue[None] = asyncio.Queue()
    said: list[str] = []
    member = Membership(folder, "compute", changed=lambda: changes.put_nowait(None), note=said.append)
    member._renew_at = dt.datetime.now(dt.UTC)
    running_member = asyncio.create_task(member.run())
    try:
        await asyncio.wait_for(changes.get(), 10)
        after = x509.load_pem_x509_certificate((folder / "compute.crt").read_bytes())
        assert (folder / "compute.crt").read_bytes() != before
        old = x509.load_pem_x509_certificate(before)
        stub = enrollment_pb2_grpc.EnrollmentServiceStub(admin)
        await stub.RevokeCertificate(
            enrollment_pb2.RevokeCertificateRequest(name=f"certificates/c{old.serial_number:x}", reason="test")
        )
        await asyncio.wait_for(changes.get(), 10)
        denials = Denials.load(folder / "denied", x509.load_pem_x509_certificates((folder / "ca.crt").read_bytes()))
        identity = "spiffe://virtfleet.dev/node/n1/compute"
        assert denials.denies(f"{old.serial_number:x}", identity, old.not_valid_before_utc)
        assert not denials.denies(f"{after.serial_number:x}", identity, after.not_valid_before_utc)
    finally:
        running_member.cancel()
        await asyncio.gather(running_member, return_exceptions=True)
    assert said == []


async def test_a_member_that_cannot_renew_hears_of_revocations_all_the_same(
    gateway: App, admin: grpc.aio.Channel, tmp_path: Path
) -> None:
    folder = tmp_path / "n1"
    await enrollment.join(gateway.settings.enrollment_listen, await token(admin), ENDPOINTS, folder)
    # As after a restore of the gateway: its certificates are good, and nobody renews them.
    await gateway.store.write(lambda tx: tx.delete("nodes/n1", cause="test"))
    before = (folder / "compute.crt").read_bytes()
    changes: asyncio.Queue[None] = asyncio.Queue()
    said: list[str] = []
    member = Membership(folder, "compute", changed=lambda: changes.put_nowait(None), note=said.append)
    member._renew_at = dt.datetime.now(dt.UTC)
    running_member = asyncio.create_task(member.run())
    try:
        await enrollment_pb2_grpc.EnrollmentServiceStub(admin).RevokeCertificate(
            enrollment_pb2.RevokeCertificateRequest(name="certificates/cabc", allow_missing=True)
        )
        await asyncio.wait_for(changes.get(), 10)
    finally:
        running_member.cancel()
        await asyncio.gather(running_member, return_exceptions=True)
    denials = Denials.load(folder / "denied", x509.load_pem_x509_certificates((folder / "ca.crt").read_bytes()))
    assert denials.denies("abc", "", dt.datetime.now(dt.UTC))
    assert (folder / "compute.crt").read_bytes() == before
    assert len(said) == 1
    assert "join again" in said[0]


class Impostor:
    """Has the certificate of a gateway, and answers what no gateway would.

    Args:
        authority: The fleet's.
        service: For which the certificate is said to be.
        chain: The certificate.
    """

    def __init__(self, authority: Authority, service: str, chain: str) -> None:
        self.authority = authority
        self.certificate = enrollment_pb2.IssuedCertificate(service=service, certificate_chain=chain)
        self.bundle = enrollment_pb2.TrustBundle(
            trust_domain="virtfleet.dev", ca_certificates=[authority.certificate_pem.decode()]
        )

    def __getattr__(self, name: str) -> Any:  # the methods that nobody calls
        return None

    async def GetTrustBundle(self, _request: Any, _context: Any) -> enrollment_pb2.TrustBundle:  # noqa: N802  # gRPC's
        return self.bundle

    async def EnrollNode(self, _request: Any, _context: Any) -> enrollment_pb2.EnrollNodeResponse:  # noqa: N802  # gRPC's
        return enrollment_pb2.EnrollNodeResponse(certificates=[self.certificate], trust_bundle=self.bundle)


@pytest.mark.parametrize("service", ["compute", "../elsewhere"])
async def test_what_no_gateway_would_issue_is_written_nowhere(tmp_path: Path, service: str) -> None:
    authority = Authority.create(tmp_path / "authority")
    strangers = authority.issue_node(new_request("compute")[1], "n1", "compute", dt.timedelta(days=1)).pem.decode()
    key, request = new_request("g1")
    own = authority.issue_gateway(request, "g1", ["localhost", "127.0.0.1"], dt.timedelta(days=1))
    server = grpc.aio.server()
    impostor: Any = Impostor(authority, service, strangers)
    enrollment_pb2_grpc.add_EnrollmentServiceServicer_to_server(impostor, server)
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, own.pem)]))
    await server.start()
    folder = tmp_path / "n1"
    try:
        with pytest.raises(DocumentInvalid):
            await enrollment.join(
                f"127.0.0.1:{port}", JoinToken("vf1.n1.x.y", "n1", authority.key_hash), ENDPOINTS, folder
            )
    finally:
        await server.stop(0)
    assert {path.name for path in folder.iterdir()} == {f"{name}.key" for name in ENDPOINTS}
    assert not (tmp_path / "elsewhere.crt").exists()


async def test_a_revoked_user_is_refused_within_five_seconds(gateway: App, admin: grpc.aio.Channel) -> None:
    key, request = new_request("eve")
    made = await enrollment_pb2_grpc.EnrollmentServiceStub(admin).IssueUserCertificate(
        enrollment_pb2.IssueUserCertificateRequest(user="eve", roles=["viewer"], certificate_request=request.decode())
    )
    ca = (gateway.settings.authority_dir / "ca.crt").read_bytes()
    credentials = grpc.ssl_channel_credentials(ca, key, made.certificate.certificate_chain.encode())
    async with grpc.aio.secure_channel(gateway.settings.listen, credentials) as channel:
        nodes = node_pb2_grpc.NodeServiceStub(channel)
        await nodes.ListNodes(node_pb2.ListNodesRequest())
        await enrollment_pb2_grpc.EnrollmentServiceStub(admin).RevokeCertificate(
            enrollment_pb2.RevokeCertificateRequest(name=made.certificate.certificate)
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await nodes.ListNodes(node_pb2.ListNodesRequest())
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "CERTIFICATE_REVOKED" in str(caught.value.trailing_metadata())


async def test_a_bad_request_for_a_certificate_is_told_with_its_field(
    gateway: App, admin: grpc.aio.Channel, tmp_path: Path
) -> None:
    before = len((await listed(admin)).certificates)
    user = enrollment_pb2.IssueUserCertificateRequest(user="eve", roles=["viewer"], certificate_request="no request")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await enrollment_pb2_grpc.EnrollmentServiceStub(admin).IssueUserCertificate(user)
    assert problem(caught.value) == (grpc.StatusCode.INVALID_ARGUMENT, "DOCUMENT_INVALID", "certificate_request")

    good = await token(admin)
    ca = (gateway.settings.authority_dir / "ca.crt").read_bytes()
    enroll = enrollment_pb2.EnrollNodeRequest(name="nodes/n1", token=good.text)
    enroll.services.add(
        service="compute", endpoint="127.0.0.1:1", certificate_request=new_request("compute")[1].decode()
    )
    enroll.services.add(service="storage", endpoint="127.0.0.1:2", certificate_request="no request")
    async with grpc.aio.secure_channel(gateway.settings.enrollment_listen, grpc.ssl_channel_credentials(ca)) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await enrollment_pb2_grpc.EnrollmentServiceStub(channel).EnrollNode(enroll)
    field = "services[1].certificate_request"
    assert problem(caught.value) == (grpc.StatusCode.INVALID_ARGUMENT, "DOCUMENT_INVALID", field)
    assert len((await listed(admin)).certificates) == before

    # The token is still good; and a member that renews is told the same.
    folder = tmp_path / "n1"
    await enrollment.join(gateway.settings.enrollment_listen, good, ENDPOINTS, folder)
    files = [(folder / name).read_bytes() for name in ("ca.crt", "compute.key", "compute.crt")]
    async with grpc.aio.secure_channel(gateway.settings.listen, grpc.ssl_channel_credentials(*files)) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await enrollment_pb2_grpc.EnrollmentServiceStub(channel).RenewCertificate(
                enrollment_pb2.RenewCertificateRequest(certificate_request="no request")
            )
    assert problem(caught.value) == (grpc.StatusCode.INVALID_ARGUMENT, "DOCUMENT_INVALID", "certificate_request")
    assert len((await listed(admin)).certificates) == before + len(ENDPOINTS)


async def listed(admin: grpc.aio.Channel) -> enrollment_pb2.ListCertificatesResponse:
    return await enrollment_pb2_grpc.EnrollmentServiceStub(admin).ListCertificates(
        enrollment_pb2.ListCertificatesRequest()
    )


def problem(error: grpc.aio.AioRpcError) -> tuple[grpc.StatusCode, str, str]:
    details = details_of(error)
    return error.code(), details["reason"], details["metadata"].get("field", "")

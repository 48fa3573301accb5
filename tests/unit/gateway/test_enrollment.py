from __future__ import annotations

import base64
import datetime as dt
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from virtfleet.fleet.v1 import enrollment_pb2, node_pb2
from virtfleet_gateway import authority as authorities
from virtfleet_gateway.authority import Authority, new_request
from virtfleet_gateway.certificates import Certificates
from virtfleet_gateway.denial_list import DenialList
from virtfleet_gateway.enrollment import Enrollment, Terms
from virtfleet_gateway.join_tokens import JoinTokens
from virtfleet_service.authorization import Authorizer
from virtfleet_service.call import Call, Caller
from virtfleet_service.denial import Denials, public_key_sha256
from virtfleet_service.enrollment import take_trust_bundle, unknown_to_gateway
from virtfleet_service.errors import (
    DocumentInvalid,
    FieldConflict,
    FieldOutOfRange,
    FieldRequired,
    JoinTokenInvalid,
    NameMalformed,
    PermissionMissing,
    ResourceExists,
)
from virtfleet_service.methods import FOREIGN_RULES, facts_of
from virtfleet_service.store import Store


class Desk:
    """An enrolment desk on a store of its own, with what its server would be told."""

    def __init__(self, store: Store, authority: Authority, folder: Path) -> None:
        self.store = store
        self.authority = authority
        self.denied_file = folder / "denied"
        self.told = 0
        terms = Terms(("10.0.0.1:7443",), ("spiffe://virtfleet.dev/gateway/",))
        self.denial_list = DenialList(store, authority, self.denied_file, changed=self._tell)
        self.certificates = Certificates(store, authority, self.denial_list)
        self.tokens = JoinTokens(store, authority.key_hash)
        self.enrollment = Enrollment(store, authority, terms, self.certificates, self.denial_list)

    def _tell(self, _denials: Denials) -> None:
        self.told += 1

    async def token(self, node: str = "n1", lifetime_seconds: int | None = None) -> str:
        made = enrollment_pb2.CreateJoinTokenRequest()
        made.join_token.spec.node = f"nodes/{node}"
        if lifetime_seconds is not None:
            made.join_token.spec.lifetime.seconds = lifetime_seconds
        return (await self.tokens.create(made, CALL)).token

    @property
    def authority_certificate(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.authority.certificate_pem)

    def denials(self) -> Denials:
        return Denials.load(self.denied_file, [self.authority_certificate])


_SERVICE = enrollment_pb2.DESCRIPTOR.services_by_name["EnrollmentService"]
CALL = Call(
    facts_of(_SERVICE.methods_by_name["CreateJoinToken"], FOREIGN_RULES),
    Caller("spiffe://virtfleet.dev/user/admin", ("admin",), "tls"),
    Authorizer(),
)


KINDS = {
    "node": node_pb2.Node,
    "certificate": enrollment_pb2.Certificate,
    "join_token": enrollment_pb2.JoinToken,
}


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with Store.open(tmp_path / "g.db", package="virtfleet.fleet.v1", resource_types=KINDS) as store:
        yield Desk(store, Authority.create(tmp_path / "ca"), tmp_path)


def enroll(token: str, node: str = "n1") -> enrollment_pb2.EnrollNodeRequest:
    request = enrollment_pb2.EnrollNodeRequest(name=f"nodes/{node}", token=token, boot_id="b", version="1")
    for port, service in enumerate(("compute", "storage", "network"), start=7101):
        request.services.add(
            service=service,
            endpoint=f"10.0.0.2:{port}",
            certificate_request=new_request(service)[1].decode(),
        )
    return request


async def test_a_token_admits_its_node_once(desk: Desk) -> None:
    request = enroll(await desk.token())
    answer = await desk.enrollment.enroll_node(request)
    assert [issued.identity for issued in answer.certificates] == [
        f"spiffe://virtfleet.dev/node/n1/{service}" for service in ("compute", "storage", "network")
    ]
    ca = x509.load_pem_x509_certificate(desk.authority.certificate_pem)
    for issued in answer.certificates:
        leaf = x509.load_pem_x509_certificate(issued.certificate_chain.encode())
        leaf.verify_directly_issued_by(ca)
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.UniformResourceIdentifier) == [issued.identity]
        assert names.get_values_for_type(x509.DNSName) == [f"{issued.service}.n1.virtfleet.dev"]
    node = node_pb2.Node.FromString(desk.store.need("nodes/n1").body)
    assert [service.endpoint for service in node.status.services] == [f"10.0.0.2:{port}" for port in (7101, 7102, 7103)]

    with pytest.raises(JoinTokenInvalid) as caught:
        await desk.enrollment.enroll_node(enroll(request.token))
    assert caught.value.reason == "JOIN_TOKEN_INVALID"


async def test_a_token_without_a_lifetime_of_its_own_says_none(desk: Desk) -> None:
    wanted = enrollment_pb2.CreateJoinTokenRequest()
    wanted.join_token.spec.node = "nodes/n1"
    made = await desk.tokens.create(wanted, CALL)
    kept = enrollment_pb2.JoinToken.FromString(desk.store.need(made.name).body)
    assert not made.spec.HasField("lifetime")
    assert not kept.spec.HasField("lifetime")
    left = made.status.expire_time.ToDatetime(dt.UTC) - dt.datetime.now(dt.UTC)
    assert dt.timedelta(minutes=59) < left <= dt.timedelta(hours=1)


async def test_a_plan_of_a_token_looks_at_what_is_taken(desk: Desk) -> None:
    wanted = enrollment_pb2.CreateJoinTokenRequest(join_token_id="t1")
    wanted.join_token.spec.node = "nodes/n1"
    await desk.tokens.create(wanted, CALL)
    for plan in (True, False):
        wanted.validate_only = plan
        with pytest.raises(ResourceExists):
            await desk.tokens.create(wanted, CALL)


async def test_a_lost_answer_costs_nothing(desk: Desk) -> None:
    request = enroll(await desk.token())
    first = await desk.enrollment.enroll_node(request)
    again = await desk.enrollment.enroll_node(request)
    assert again == first
    assert len(desk.store.list("certificate")) == 3


async def test_a_token_of_another_node_an_unknown_one_and_an_expired_one_are_refused(desk: Desk) -> None:
    token = await desk.token("n1")
    with pytest.raises(JoinTokenInvalid, match="another node"):
        await desk.enrollment.enroll_node(enroll(token, "n2"))
    with pytest.raises(JoinTokenInvalid, match="another node"):
        await desk.enrollment.enroll_node(enroll(token.replace("vf1.n1.", "vf1.n2."), "n2"))
    with pytest.raises(JoinTokenInvalid, match="unknown"):
        await desk.enrollment.enroll_node(enroll(f"vf1.n1.guessed.{'0' * 64}"))
    short = await desk.token("n3", lifetime_seconds=0)
    with pytest.raises(JoinTokenInvalid, match="expired"):
        await desk.enrollment.enroll_node(enroll(short, "n3"))
    assert desk.store.list("certificate") == []
    assert desk.store.get("nodes/n2") is None


async def test_the_secret_of_a_token_is_not_in_the_store(desk: Desk) -> None:
    secret = (await desk.token()).split(".")[2]
    content = b"".join(path.read_bytes() for path in desk.store.path.parent.glob("g.db*"))
    assert secret.encode() not in content


async def test_a_machine_that_joins_anew_ends_the_certificates_before(desk: Desk) -> None:
    first = await desk.enrollment.enroll_node(enroll(await desk.token()))
    before = node_pb2.Node.FromString(desk.store.need("nodes/n1").body)
    second = await desk.enrollment.enroll_node(enroll(await desk.token()))
    after = node_pb2.Node.FromString(desk.store.need("nodes/n1").body)
    assert after.uid == before.uid
    denials = desk.denials()
    for issued, denied in [(one, True) for one in first.certificates] + [(one, False) for one in second.certificates]:
        leaf = x509.load_pem_x509_certificate(issued.certificate_chain.encode())
        assert denials.denies(f"{leaf.serial_number:x}", issued.identity, leaf.not_valid_before_utc) is denied
    assert desk.told == 1


async def test_revoking_reaches_the_file_and_the_trust_bundle(desk: Desk) -> None:
    answer = await desk.enrollment.enroll_node(enroll(await desk.token()))
    assert desk.denial_list.trust_bundle(enrollment_pb2.GetTrustBundleRequest()).denial_list_number == 0
    request = enrollment_pb2.RevokeCertificateRequest(name=answer.certificates[0].certificate, reason="lost")
    revoked = await desk.certificates.revoke(request, CALL)
    assert revoked.status.state == enrollment_pb2.CERTIFICATE_STATE_REVOKED
    assert revoked.generation == 2
    assert desk.denials().denies(revoked.status.serial_number, revoked.status.identity, dt.datetime.now(dt.UTC))
    bundle = desk.denial_list.trust_bundle(enrollment_pb2.GetTrustBundleRequest())
    number = bundle.denial_list_number
    assert number > 0
    known = enrollment_pb2.GetTrustBundleRequest(known_denial_list_number=number, known_ca_digest=bundle.ca_digest)
    unchanged = desk.denial_list.trust_bundle(known)
    assert not unchanged.HasField("denial_list")
    assert not unchanged.ca_certificates
    # Once more changes nothing.
    await desk.certificates.revoke(request, CALL)
    assert desk.denials().number == number


async def test_a_member_takes_only_newer_lists_that_the_authority_has_signed(desk: Desk, tmp_path: Path) -> None:
    member = tmp_path / "member"
    member.mkdir()
    answer = await desk.enrollment.enroll_node(enroll(await desk.token()))
    take_trust_bundle(answer.trust_bundle, member)
    for issued in answer.certificates[:2]:
        await desk.certificates.revoke(enrollment_pb2.RevokeCertificateRequest(name=issued.certificate), CALL)
    newest = desk.denial_list.trust_bundle(enrollment_pb2.GetTrustBundleRequest())
    assert take_trust_bundle(newest, member)
    ca = [x509.load_pem_x509_certificate(desk.authority.certificate_pem)]
    assert Denials.load(member / "denied", ca).number == newest.denial_list_number

    old = enrollment_pb2.TrustBundle()
    old.CopyFrom(newest)
    content = enrollment_pb2.DenialList(number=1).SerializeToString()
    old.denial_list.content = content
    old.denial_list.signature = desk.authority.sign(content)
    assert not take_trust_bundle(old, member)
    assert Denials.load(member / "denied", ca).number == newest.denial_list_number

    forged = enrollment_pb2.TrustBundle()
    forged.CopyFrom(newest)
    forged.denial_list.content = enrollment_pb2.DenialList(number=1 << 62).SerializeToString()
    with pytest.raises(DocumentInvalid):
        take_trust_bundle(forged, member)
    stranger = Authority.create(tmp_path / "stranger")
    forged.denial_list.signature = stranger.sign(forged.denial_list.content)
    forged.denial_list.key_sha256 = public_key_sha256(x509.load_pem_x509_certificate(stranger.certificate_pem))
    del forged.ca_certificates[:]
    with pytest.raises(DocumentInvalid, match="not signed by an authority"):
        take_trust_bundle(forged, member)


def serials(issued: Iterable[enrollment_pb2.IssuedCertificate]) -> list[str]:
    return [one.certificate.removeprefix("certificates/c") for one in issued]


async def member_of(desk: Desk, folder: Path, *, revoked: int) -> tuple[Path, list[enrollment_pb2.IssuedCertificate]]:
    """Return the folder of a member, and its certificates, of which the first ones have been revoked."""
    folder.mkdir()
    answer = await desk.enrollment.enroll_node(enroll(await desk.token()))
    take_trust_bundle(answer.trust_bundle, folder)
    for issued in answer.certificates[:revoked]:
        await desk.certificates.revoke(enrollment_pb2.RevokeCertificateRequest(name=issued.certificate), CALL)
    assert take_trust_bundle(desk.denial_list.trust_bundle(enrollment_pb2.GetTrustBundleRequest()), folder)
    return folder, list(answer.certificates)


@pytest.mark.parametrize("again", ["at once", "after another revocation"])
async def test_a_restored_gateway_learns_from_a_member_what_it_has_denied(
    desk: Desk, tmp_path: Path, again: str
) -> None:
    member, issued = await member_of(desk, tmp_path / "member", revoked=2)
    first, second, third = serials(issued)
    async with Store.open(tmp_path / "empty.db", package="virtfleet.fleet.v1", resource_types=KINDS) as store:
        # The copy was made before anything was: it does not even know the certificates.
        restored = Desk(store, desk.authority, tmp_path / "restored")
        restored.denied_file.parent.mkdir()
        if again == "after another revocation":
            named = enrollment_pb2.RevokeCertificateRequest(name=f"certificates/c{third}", allow_missing=True)
            await restored.certificates.revoke(named, CALL)
        bundle = restored.denial_list.trust_bundle(enrollment_pb2.GetTrustBundleRequest())
        # Neither is the older list taken, nor a newer one that would set the two free.
        assert not take_trust_bundle(bundle, member)
        held = unknown_to_gateway(bundle, member)
        assert held is not None
        await restored.certificates.take_in(held, "spiffe://virtfleet.dev/node/n1/compute")
        merged = restored.denial_list.trust_bundle(enrollment_pb2.GetTrustBundleRequest())
        assert take_trust_bundle(merged, member)
        assert unknown_to_gateway(merged, member) is None
        denied = {first, second} | ({third} if again != "at once" else set())
        for denials in (restored.denials(), Denials.load(member / "denied", [restored.authority_certificate])):
            found = {one for one in (first, second, third) if denials.denies(one, "", dt.datetime.now(dt.UTC))}
            assert found == denied
        known = enrollment_pb2.Certificate.FromString(store.need(f"certificates/c{first}").body)
        assert known.status.state == enrollment_pb2.CERTIFICATE_STATE_REVOKED
        assert known.status.revoke_reason == "denied before a restore"
        # Once more changes nothing.
        number = restored.denials().number
        await restored.certificates.take_in(held, "spiffe://virtfleet.dev/node/n1/compute")
        assert restored.denials().number == number


async def test_a_gateway_takes_in_no_list_that_its_authority_has_not_signed(desk: Desk, tmp_path: Path) -> None:
    stranger = Authority.create(tmp_path / "stranger")
    content = enrollment_pb2.DenialList(number=1 << 60)
    content.certificates.add(serial_number="1").expire_time.FromDatetime(dt.datetime.now(dt.UTC) + dt.timedelta(days=1))
    forged = enrollment_pb2.SignedDenialList(content=content.SerializeToString())
    forged.signature = stranger.sign(forged.content)
    for key in (stranger, desk.authority):
        forged.key_sha256 = public_key_sha256(x509.load_pem_x509_certificate(key.certificate_pem))
        with pytest.raises(DocumentInvalid):
            await desk.certificates.take_in(forged, "anybody")
    assert not desk.denials().number
    assert not desk.told


async def test_a_gateway_learns_from_its_own_file_when_its_store_is_put_back(desk: Desk, tmp_path: Path) -> None:
    _, issued = await member_of(desk, tmp_path / "member", revoked=1)
    before = desk.denials()
    async with Store.open(tmp_path / "empty.db", package="virtfleet.fleet.v1", resource_types=KINDS) as store:
        restored = Desk(store, desk.authority, tmp_path)
        await restored.certificates.restore_denials("spiffe://virtfleet.dev/gateway/g1")
        after = restored.denials()
        assert after.number > before.number
        assert not before.missing_in(after)
        assert after.denies(serials(issued)[0], "", dt.datetime.now(dt.UTC))
        # A damaged file is written again.
        restored.denied_file.write_bytes(b"\xff")
        await restored.certificates.restore_denials("spiffe://virtfleet.dev/gateway/g1")
        assert restored.denials().number == after.number


def _signed(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.PEM)


def _of_version(number: int) -> bytes:
    """Return a request that says to be of another version than the one there is."""
    der = bytearray(x509.load_pem_x509_csr(new_request("a")[1]).public_bytes(serialization.Encoding.DER))
    der[der.index(b"\x02\x01\x00") + 2] = number
    text = base64.encodebytes(der)
    return b"-----BEGIN CERTIFICATE REQUEST-----\n" + text + b"-----END CERTIFICATE REQUEST-----\n"


@pytest.mark.parametrize(
    "document",
    [
        b"",
        _of_version(1),
        b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
        b"x" * 20_000,
        _signed(rsa.generate_private_key(65537, 1024)),
        _signed(ec.generate_private_key(ec.SECP192R1())),
    ],
    ids=["empty", "version", "garbage", "huge", "rsa-1024", "p-192"],
)
async def test_bad_requests_for_certificates_are_refused_and_do_not_use_the_token_up(
    desk: Desk, document: bytes
) -> None:
    request = enroll(await desk.token())
    good = request.services[1].certificate_request
    request.services[1].certificate_request = document.decode()
    with pytest.raises(DocumentInvalid) as caught:
        await desk.enrollment.enroll_node(request)
    assert caught.value.field == "services[1].certificate_request"
    request.services[1].certificate_request = good
    assert len((await desk.enrollment.enroll_node(request)).certificates) == 3


async def test_a_request_signed_by_another_key_is_refused(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "ca")
    der = x509.load_pem_x509_csr(new_request("a")[1]).public_bytes(serialization.Encoding.DER)
    broken = bytearray(der)
    broken[-3] ^= 1
    try:
        pem = x509.load_der_x509_csr(bytes(broken)).public_bytes(serialization.Encoding.PEM)
    except ValueError:
        pem = bytes(broken)
    with pytest.raises(DocumentInvalid) as caught:
        authority.issue_node(pem, "n1", "compute", dt.timedelta(hours=1))
    assert caught.value.field == "certificate_request"
    with pytest.raises(DocumentInvalid) as caught:
        authority.issue_user(pem, "alice", ["viewer"], dt.timedelta(hours=1))
    assert caught.value.field == "certificate_request"


async def test_services_and_names_are_checked(desk: Desk) -> None:
    request = enroll(await desk.token())
    request.services[1].service = "compute"
    with pytest.raises(FieldConflict):
        await desk.enrollment.enroll_node(request)
    for name in (
        "n1",
        "nodes/",
        "nodes/N1",
        "nodes/n1/x",
        "nodes/6f1c2d3e-0000-4000-8000-000000000000",
        "nodes/n\u0430",
    ):
        bad = enrollment_pb2.CreateJoinTokenRequest()
        bad.join_token.spec.node = name
        with pytest.raises(NameMalformed):
            await desk.tokens.create(bad, CALL)
    with pytest.raises(FieldRequired) as refused:
        await desk.tokens.create(enrollment_pb2.CreateJoinTokenRequest(), CALL)
    assert refused.value.field == "join_token.spec.node"


def test_an_authority_is_never_replaced(tmp_path: Path) -> None:
    first = Authority.create(tmp_path / "ca")
    with pytest.raises(FileExistsError):
        Authority.create(tmp_path / "ca")
    assert Authority.load(tmp_path / "ca").key_hash == first.key_hash
    assert (tmp_path / "ca/ca.key").stat().st_mode & 0o777 == 0o600


def test_a_users_certificate_carries_roles_and_cannot_serve(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "ca")
    issued = authority.issue_user(new_request("x")[1], "alice", ["viewer", "operator"], dt.timedelta(days=1))
    leaf = x509.load_pem_x509_certificate(issued.pem)
    organisations = [str(part.value) for part in leaf.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)]
    assert organisations == [f"{authorities.ROLE_PREFIX}viewer", f"{authorities.ROLE_PREFIX}operator"]
    usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]


def test_an_authority_whose_key_others_can_read_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Authority.create(tmp_path / "ca")
    Authority.load(tmp_path / "ca")
    assert caplog.messages == []
    (tmp_path / "ca/ca.key").chmod(0o640)
    Authority.load(tmp_path / "ca")
    assert ["can be read by others" in message for message in caplog.messages] == [True]


@pytest.mark.parametrize("role", ["viewer", "operator", "admin"])
async def test_nobody_gives_a_role_that_they_do_not_have(desk: Desk, role: str) -> None:
    holder = Call(CALL.method, Caller("spiffe://virtfleet.dev/user/op", ("operator",), "tls"), CALL._authorizer)
    request = enrollment_pb2.IssueUserCertificateRequest(
        user="eve", roles=[role], certificate_request=new_request("eve")[1].decode()
    )
    if role == "operator":
        await desk.store.write(lambda tx: desk.enrollment.issue_user(tx, request, holder))
        return
    with pytest.raises(PermissionMissing, match=f"cannot give the role {role}"):
        await desk.store.write(lambda tx: desk.enrollment.issue_user(tx, request, holder))
    assert desk.store.list("certificate") == []


@pytest.mark.parametrize("role", ["service", "admin@nodes/n1/", "Admin", ""])
async def test_a_role_that_is_none_is_not_given_by_an_administrator_either(desk: Desk, role: str) -> None:
    request = enrollment_pb2.IssueUserCertificateRequest(
        user="eve", roles=["viewer", role], certificate_request=new_request("eve")[1].decode()
    )
    with pytest.raises(FieldOutOfRange) as caught:
        await desk.store.write(lambda tx: desk.enrollment.issue_user(tx, request, CALL))
    assert caught.value.field == "roles[1]"

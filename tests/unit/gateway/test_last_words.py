"""Removal and denial are final: whatever a node asks for at that moment, and whatever the disk does."""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cryptography import x509

from tests.unit.gateway.test_enrollment import CALL, KINDS, Desk, enroll
from virtfleet.fleet.v1 import enrollment_pb2
from virtfleet_gateway.authority import Authority, new_request
from virtfleet_gateway.servicers.nodes import remove
from virtfleet_service.call import Call, Caller
from virtfleet_service.denial import Denials
from virtfleet_service.enrollment import take_trust_bundle
from virtfleet_service.errors import CertificateRevoked, DocumentInvalid, NodeUnknown
from virtfleet_service.identity import parse_certificate
from virtfleet_service.store import Store

WHOLE = enrollment_pb2.GetTrustBundleRequest()


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with Store.open(tmp_path / "g.db", package="virtfleet.fleet.v1", resource_types=KINDS) as store:
        yield Desk(store, Authority.create(tmp_path / "ca"), tmp_path)


async def joined(desk: Desk) -> tuple[list[enrollment_pb2.IssuedCertificate], Call]:
    """Let a node join; return what it got, and the call of its compute service that was let in a moment ago."""
    answer = await desk.enrollment.enroll_node(enroll(await desk.token()))
    peer = parse_certificate(answer.certificates[0].certificate_chain.encode(), "virtfleet.dev")
    call = Call(CALL.method, Caller(peer.uri, ("node",), "tls"), CALL._authorizer, peer=peer)
    return list(answer.certificates), call


def renewal() -> enrollment_pb2.RenewCertificateRequest:
    return enrollment_pb2.RenewCertificateRequest(certificate_request=new_request("compute")[1].decode())


async def renew(desk: Desk, call: Call) -> None:
    await desk.store.write(lambda tx: desk.enrollment.renew(tx, renewal(), call))


async def test_a_call_that_was_let_in_renews_nothing_after_its_node_was_expelled(desk: Desk) -> None:
    certificates, call = await joined(desk)
    await renew(desk, call)
    count = len(desk.store.list("certificate"))
    await desk.certificates.expel("n1", "root")
    with pytest.raises(CertificateRevoked):
        await renew(desk, call)
    await desk.store.write(lambda tx: remove(tx, "nodes/n1"))
    assert len(desk.store.list("certificate")) == count
    assert certificates


async def test_a_node_that_the_fleet_does_not_know_renews_nothing(desk: Desk) -> None:
    _, call = await joined(desk)
    await desk.store.write(lambda tx: remove(tx, "nodes/n1"))
    with pytest.raises(NodeUnknown, match="join again"):
        await renew(desk, call)


async def test_a_denial_counts_though_its_file_cannot_be_written(desk: Desk) -> None:
    told: list[Denials] = []
    desk.denial_list._changed = told.append
    certificates, _ = await joined(desk)
    desk.denied_file.mkdir()
    name = certificates[0].certificate
    answer = await desk.certificates.revoke(enrollment_pb2.RevokeCertificateRequest(name=name), CALL)
    assert answer.status.state == enrollment_pb2.CERTIFICATE_STATE_REVOKED
    leaf = x509.load_pem_x509_certificate(certificates[0].certificate_chain.encode())
    assert told[-1].denies(f"{leaf.serial_number:x}", certificates[0].identity, leaf.not_valid_before_utc)
    desk.denied_file.rmdir()
    desk.denial_list.settle()
    assert desk.denials().number == told[-1].number
    count = len(told)
    desk.denial_list.settle()
    assert len(told) == count


async def test_a_member_whose_list_is_damaged_gets_it_again(desk: Desk, tmp_path: Path) -> None:
    certificates, _ = await joined(desk)
    member = tmp_path / "member"
    member.mkdir()
    await desk.certificates.revoke(
        enrollment_pb2.RevokeCertificateRequest(name=certificates[0].certificate, reason="lost"), CALL
    )
    take_trust_bundle(desk.denial_list.trust_bundle(WHOLE), member)
    (member / "denied").write_bytes(b"\xff\xff")
    assert take_trust_bundle(desk.denial_list.trust_bundle(WHOLE), member)
    held = Denials.load(member / "denied", [desk.authority_certificate])
    assert held.number == desk.denials().number
    assert held.denies(certificates[0].certificate.removeprefix("certificates/c"), "", dt.datetime.now(dt.UTC))


async def test_what_is_no_ca_certificate_never_takes_the_place_of_one(desk: Desk, tmp_path: Path) -> None:
    member = tmp_path / "member"
    member.mkdir()
    good = desk.denial_list.trust_bundle(WHOLE)
    take_trust_bundle(good, member)
    with pytest.raises(DocumentInvalid):
        take_trust_bundle(enrollment_pb2.TrustBundle(ca_certificates=["no certificate"]), member)
    assert (member / "ca.crt").read_bytes() == desk.authority.certificate_pem

from __future__ import annotations

import datetime as dt
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cryptography import x509

from virtfleet.fleet.v1 import enrollment_pb2
from virtfleet_gateway import certificates, issued
from virtfleet_gateway.authority import Authority, Certificate, new_request
from virtfleet_gateway.certificates import Certificates
from virtfleet_gateway.credentials import OwnCertificate
from virtfleet_gateway.denial_list import DenialList
from virtfleet_gateway.issued import IssuedFolder
from virtfleet_service.authorization import Authorizer
from virtfleet_service.call import Call, Caller
from virtfleet_service.denial import Denials
from virtfleet_service.errors import (
    DocumentInvalid,
    EtagMismatch,
    FieldConflict,
    NameMalformed,
    ResourceNotFound,
)
from virtfleet_service.methods import FOREIGN_RULES, facts_of
from virtfleet_service.store import Store

_SERVICE = enrollment_pb2.DESCRIPTOR.services_by_name["EnrollmentService"]
CALL = Call(
    facts_of(_SERVICE.methods_by_name["RevokeCertificate"], FOREIGN_RULES),
    Caller("spiffe://virtfleet.dev/user/admin", ("admin",), "tls"),
    Authorizer(),
)
REVOKED = enrollment_pb2.CERTIFICATE_STATE_REVOKED
VALID = enrollment_pb2.CERTIFICATE_STATE_VALID


class Office:
    """An authority, its folder, and the store of a gateway beside it."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store = store
        self.directory = folder / "ca"
        self.authority = Authority.create(self.directory)
        self.denied_file = folder / "denied"
        self.certificates = Certificates(
            store, self.authority, DenialList(store, self.authority, self.denied_file, changed=lambda _: None)
        )
        self.folder = IssuedFolder(self.directory, self.certificates)

    def issue(self, name: str, days: float = 1) -> Certificate:
        return self.authority.issue_user(new_request(name)[1], name, ["viewer"], dt.timedelta(days=days))

    def listed(self) -> dict[str, enrollment_pb2.Certificate]:
        rows = (enrollment_pb2.Certificate.FromString(row.body) for row in self.store.list("certificate"))
        return {row.status.serial_number: row for row in rows}

    def denies(self, certificate: Certificate) -> bool:
        denials = Denials.load(self.denied_file, [x509.load_pem_x509_certificate(self.authority.certificate_pem)])
        return denials.denies(certificate.serial, certificate.subject, dt.datetime.now(dt.UTC))

    async def revoke(self, name: str, **fields: object) -> enrollment_pb2.Certificate:
        request = enrollment_pb2.RevokeCertificateRequest(name=name, **fields)  # type: ignore[arg-type]  # of any type
        return await self.certificates.revoke(request, CALL)


@pytest.fixture
async def office(tmp_path: Path) -> AsyncIterator[Office]:
    kinds = {"certificate": enrollment_pb2.Certificate}
    async with Store.open(tmp_path / "g.db", package="virtfleet.fleet.v1", resource_types=kinds) as store:
        yield Office(store, tmp_path)


async def test_what_is_in_the_folder_is_listed_once(office: Office) -> None:
    certificate = office.issue("alice")
    path = issued.write(office.directory, certificate)
    assert path.name == f"{certificate.serial}.pem"
    assert path.stat().st_mode & 0o777 == 0o644
    assert path.parent.stat().st_mode & 0o777 == 0o755
    assert sorted(path.parent.iterdir()) == [path]
    assert await office.folder.look() == 1
    assert await office.folder.look() == 0
    assert await IssuedFolder(office.directory, office.certificates).look() == 0, "as after a restart"
    (listed,) = office.listed().values()
    assert listed.name == f"certificates/c{certificate.serial}"
    assert listed.display_name == "alice"
    status = listed.status
    assert (status.state, status.kind) == (VALID, enrollment_pb2.CERTIFICATE_KIND_USER)
    assert (status.identity, list(status.roles)) == ("spiffe://virtfleet.dev/user/alice", ["viewer"])
    assert status.expire_time.ToDatetime(dt.UTC) == certificate.not_after
    assert status.principal == issued.PRINCIPAL


async def test_no_folder_is_nothing_issued(office: Office) -> None:
    assert await office.folder.look() == 0
    assert not (office.directory / "issued").exists()


async def test_bad_files_keep_nobody_out_and_are_told_once(
    office: Office, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = Authority.create(tmp_path / "stranger")
    foreign = stranger.issue_user(new_request("eve")[1], "eve", ["admin"], dt.timedelta(days=1))
    issued.write(office.directory, foreign)
    folder = office.directory / "issued"
    (folder / "garbage.pem").write_bytes(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    (folder / "huge.pem").write_bytes(b"x" * 100_000)
    (folder / "authority.pem").write_bytes(office.authority.certificate_pem)
    (folder / "folder.pem").mkdir()
    (folder / ".half.pem.1").write_bytes(b"-----BEGIN")
    (folder / "notes.txt").write_bytes(b"mine")
    good = office.issue("alice")
    issued.write(office.directory, good)
    with caplog.at_level(logging.ERROR):
        assert await office.folder.look() == 1
        assert await office.folder.look() == 0
    assert list(office.listed()) == [good.serial]
    told = sorted(getattr(record, "file", "") for record in caplog.records)
    assert told == sorted([f"{foreign.serial}.pem", "garbage.pem", "huge.pem", "authority.pem", "folder.pem"])
    # A file that has become good is taken.
    better = office.issue("bob")
    (folder / "garbage.pem").write_bytes(better.pem)
    assert await office.folder.look() == 1


async def test_a_certificate_that_has_long_ended_is_not_listed(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    issued.write(office.directory, office.issue("old", days=1))
    issued.write(office.directory, office.issue("late", days=2))
    later = dt.datetime.now(dt.UTC) + dt.timedelta(days=2.5)
    monkeypatch.setattr(certificates, "_now", lambda: later)
    assert await office.folder.look() == 1
    assert [one.display_name for one in office.listed().values()] == ["late"]


async def test_what_is_listed_can_be_revoked_and_stays_so_after_another_look(office: Office) -> None:
    certificate = office.issue("alice")
    other = office.issue("alice")
    for one in (certificate, other):
        issued.write(office.directory, one)
    await office.folder.look()
    answer = await office.revoke(f"certificates/c{certificate.serial}", reason="lost")
    assert (answer.status.state, answer.status.revoke_reason) == (REVOKED, "lost")
    assert office.denies(certificate)
    assert not office.denies(other)
    os.utime(office.directory / "issued" / f"{certificate.serial}.pem", (1, 1))
    assert await office.folder.look() == 0
    assert office.listed()[certificate.serial] == answer
    await office.revoke(f"certificates/c{certificate.serial}", whole_identity=True)
    assert office.denies(other)


async def test_a_serial_number_that_nobody_has_seen_is_denied_if_asked_for(office: Office) -> None:
    certificate = office.issue("alice")
    name = f"certificates/c{certificate.serial}"
    with pytest.raises(ResourceNotFound):
        await office.revoke(name)
    assert not office.denied_file.exists()
    tried = await office.revoke(name, allow_missing=True, validate_only=True)
    assert tried.status.state == REVOKED
    assert office.listed() == {}
    with pytest.raises(FieldConflict) as conflict:
        await office.revoke(name, allow_missing=True, whole_identity=True)
    assert conflict.value.field == "whole_identity"
    with pytest.raises(EtagMismatch):
        await office.revoke(name, allow_missing=True, etag="another")
    assert office.listed() == {}, "a refusal leaves nothing"

    answer = await office.revoke(name, allow_missing=True, reason="lost")
    assert (answer.name, answer.status.state, answer.status.identity) == (name, REVOKED, "")
    assert office.denies(certificate)
    again = await office.revoke(name, allow_missing=True)
    assert again == answer
    # It is shown later on: the identity is known then, and the denial stands.
    issued.write(office.directory, certificate)
    assert await office.folder.look() == 1
    listed = office.listed()[certificate.serial]
    assert (listed.status.identity, listed.status.state) == (certificate.subject, REVOKED)
    assert (listed.uid, listed.status.revoke_reason) == (answer.uid, "lost")
    assert listed.status.revoke_time == answer.status.revoke_time
    assert office.denies(certificate)


@pytest.mark.parametrize("name", ["certificates/alice", "certificates/c", "certificates/cXY", "certificates/c01", "x"])
async def test_a_name_without_a_serial_number_is_refused(office: Office, name: str) -> None:
    with pytest.raises(NameMalformed) as caught:
        await office.revoke(name, allow_missing=True)
    assert caught.value.field == "name"
    assert office.listed() == {}


async def test_only_certificates_of_the_authority_are_entered(office: Office) -> None:
    with pytest.raises(DocumentInvalid):
        await office.certificates.adopt(office.authority.certificate_pem, "x")
    with pytest.raises(DocumentInvalid):
        await office.certificates.adopt(b"", "x")
    assert office.listed() == {}


async def test_a_gateway_whose_certificate_is_denied_takes_another(office: Office, tmp_path: Path) -> None:
    own = OwnCertificate(office.authority, tmp_path, "g1", ["localhost"], lambda: None)
    own.ensure()
    first = own.certificate_file.read_bytes()
    own.ensure()
    assert own.certificate_file.read_bytes() == first
    await office.certificates.adopt(first, own.identity)
    (listed,) = office.listed().values()
    assert listed.status.kind == enrollment_pb2.CERTIFICATE_KIND_GATEWAY
    assert own.denied_file == office.denied_file
    await office.revoke(listed.name)
    key = own.key_file.read_bytes()
    own.ensure()
    second = own.certificate_file.read_bytes()
    assert second != first
    assert own.key_file.read_bytes() != key
    own.ensure()
    assert own.certificate_file.read_bytes() == second

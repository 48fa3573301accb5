"""What a server believes, when the files cannot be read for a moment, are damaged, or are no text."""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from tests.pki import Pki
from virtfleet.fleet.v1 import enrollment_pb2
from virtfleet_service.authorization import Authorizer, PolicyError, parse_policy
from virtfleet_service.denial import public_key_sha256
from virtfleet_service.enrollment import Fleet
from virtfleet_service.errors import DocumentInvalid
from virtfleet_service.settings import ServiceSettings, SettingsError, TlsSettings
from virtfleet_service.trust import Trust

BINDING = '[[binding]]\nsubject = "spiffe://virtfleet.dev/user/ci"\nrole = "viewer"\n'


class Desk:
    """Is the files of a server, with the authority that signs them."""

    def __init__(self, folder: Path) -> None:
        self.pki = Pki(folder / "pki")
        self.issued = self.pki.service("n1", "compute")
        self.issued.key_file.chmod(0o600)
        self.denied = folder / "denied"
        self.policy = folder / "policy.toml"
        self.policy.write_text("")
        self.settings = ServiceSettings(
            node="n1",
            policy_file=self.policy,
            tls=TlsSettings(
                certificate_file=self.issued.certificate_file,
                key_file=self.issued.key_file,
                ca_file=self.pki.ca_file,
                denial_list_file=self.denied,
            ),
        )
        self.authorizer = Authorizer()

    def trust(self) -> Trust:
        return Trust(self.settings, "compute", self.authorizer, node_role="", needed=True)

    def deny(self, number: int) -> None:
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        content = enrollment_pb2.DenialList(number=number)
        content.certificates.add(serial_number="abc", expire_time=Timestamp(seconds=4_000_000_000))
        encoded = content.SerializeToString()
        signed = enrollment_pb2.SignedDenialList(
            content=encoded,
            signature=self.pki.key.sign(encoded, ec.ECDSA(hashes.SHA256())),
            key_sha256=public_key_sha256(self.pki.certificate),
        )
        self.denied.write_bytes(signed.SerializeToString())


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@contextmanager
def without_descriptors() -> Iterator[None]:
    """Let no file be opened in the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_could_not_be_read_for_a_moment_is_read_a_moment_later(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    desk.deny(1)
    trust = desk.trust()
    before = trust.credentials
    assert before is not None
    desk.issued = desk.pki.service("n1", "compute")
    desk.deny(2)
    desk.policy.write_text(BINDING)
    caplog.set_level(logging.ERROR)
    with without_descriptors():
        for _ in range(3):
            trust.refresh()
    assert (trust.credentials, trust.denial_list_number) == (before, 1)
    assert len(caplog.messages) == 3
    trust.refresh()
    assert trust.credentials is not None
    assert trust.credentials.certificate == desk.issued.certificate
    assert trust.denial_list_number == 2
    assert desk.authorizer.bound_roles("spiffe://virtfleet.dev/user/ci") == ("viewer",)


def test_a_policy_that_cannot_be_used_leaves_the_old_one_and_is_told_once(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    desk.policy.write_text(BINDING)
    trust = desk.trust()
    caplog.set_level(logging.ERROR)
    for count, content in enumerate(
        (b"[[binding]\n", b"\xff\xfe", b"a = " + b"[" * 100_000, b'[[binding]]\nrole = "x"\n'), 1
    ):
        desk.policy.write_bytes(content)
        for _ in range(3):
            trust.refresh()
        assert len(caplog.messages) == count
        assert desk.authorizer.bound_roles("spiffe://virtfleet.dev/user/ci") == ("viewer",)
    desk.policy.unlink()
    trust.refresh()
    assert desk.authorizer.bound_roles("spiffe://virtfleet.dev/user/ci") == ("viewer",)
    desk.policy.write_text("")
    trust.refresh()
    assert desk.authorizer.bound_roles("spiffe://virtfleet.dev/user/ci") == ()


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a = " + b"[" * 100_000, b"x" * (2 << 20)])
def test_a_policy_that_is_no_text_keeps_a_server_from_starting_with_a_line(desk: Desk, content: bytes) -> None:
    desk.policy.write_bytes(content)
    with pytest.raises(SettingsError, match="policy_file"):
        desk.trust()


def test_a_policy_that_is_nested_without_end_is_refused() -> None:
    with pytest.raises(PolicyError, match="too deep"):
        parse_policy("a = " + "[" * 100_000, ["viewer"])


def test_a_list_that_is_handed_over_is_obeyed_before_it_is_in_the_file(desk: Desk) -> None:
    desk.deny(5)
    trust = desk.trust()
    newest = trust.authenticator.denials
    assert newest is not None
    desk.deny(4)
    older = replace(desk.settings, policy_file=None)
    trust.take_denials(Trust(older, "compute", Authorizer(), node_role="", needed=True).authenticator.denials or newest)
    assert trust.denial_list_number == 5


def test_a_key_that_everybody_may_read_is_told(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    for mode, told in ((0o600, 0), (0o640, 0), (0o644, 1)):
        desk.issued.key_file.chmod(mode)
        caplog.clear()
        desk.trust()
        assert len([one for one in caplog.messages if "open to everybody" in one]) == told


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b'node = "n1', b'node = "n1"\n', b"node = 1\n", b"x = " + b"[" * 5000], ids=repr
)
def test_a_damaged_memory_of_the_fleet_is_told_in_a_line(desk: Desk, tmp_path: Path, content: bytes) -> None:
    fleet = Fleet("n1", "virtfleet.dev", ("127.0.0.1:1",), ("spiffe://virtfleet.dev/gateway/",))
    fleet.save(tmp_path)
    assert Fleet.load(tmp_path) == fleet
    (tmp_path / "fleet.toml").write_bytes(content)
    desk.settings = replace(desk.settings, identity_dir=tmp_path)
    with pytest.raises(DocumentInvalid, match=r"fleet\.toml is damaged .*: join again with a new token"):
        desk.trust()


def test_certificates_that_nobody_renews_are_told(desk: Desk, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    desk.settings = replace(desk.settings, identity_dir=tmp_path)
    desk.trust()
    assert [one.message for one in caplog.records if one.levelno == logging.WARNING] == [
        f"{tmp_path}/fleet.toml is missing: nobody renews the certificates beside it, so join again before they end"
    ]


def test_a_pipe_in_the_place_of_a_file_stops_nobody(desk: Desk, tmp_path: Path) -> None:
    """Who opened it waited for a writer, with all calls of the server."""
    trust = desk.trust()
    for path in (desk.policy, desk.denied, desk.issued.certificate_file, desk.issued.key_file, desk.pki.ca_file):
        held = tmp_path / "held"
        if path.exists():
            path.rename(held)
        os.mkfifo(path)
        trust.refresh()
        path.unlink()
        if held.exists():
            held.rename(path)
    os.mkfifo(tmp_path / "fleet.toml")
    with pytest.raises(OSError, match="is a pipe"):
        Fleet.load(tmp_path)

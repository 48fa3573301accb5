"""The authority's folder, damaged: what is said of it, and that nothing takes its place."""

from __future__ import annotations

import datetime as dt
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from virtfleet_gateway.authority import Authority, new_request
from virtfleet_service.errors import BackendFailed


def own_certificate(key: ec.EllipticCurvePrivateKey, *extensions: x509.ExtensionType) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    now = dt.datetime.now(dt.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + dt.timedelta(days=1))
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize("damage", ["passphrase", "empty", "no names", "no identity", "another key"])
def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path, damage: str) -> None:
    Authority.create(tmp_path)
    key_file, certificate_file = tmp_path / "ca.key", tmp_path / "ca.crt"
    key = serialization.load_pem_private_key(key_file.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    named = "ca.crt"
    if damage == "passphrase":
        named = "ca.key"
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
        key_file.write_bytes(key.private_bytes(*form, serialization.BestAvailableEncryption(b"secret")))
    elif damage == "empty":
        certificate_file.write_bytes(b"")
    elif damage == "no names":
        certificate_file.write_bytes(own_certificate(key))
    elif damage == "no identity":
        certificate_file.write_bytes(own_certificate(key, x509.SubjectAlternativeName([x509.DNSName("x")])))
    else:
        fleet = x509.SubjectAlternativeName([x509.UniformResourceIdentifier("spiffe://x")])
        certificate_file.write_bytes(own_certificate(ec.generate_private_key(ec.SECP256R1()), fleet))
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}.*{named}.*put the copy"):
        Authority.load(tmp_path)


def test_a_lost_key_is_not_replaced_by_another(tmp_path: Path) -> None:
    """Who took the advice to make an authority had one that no node believed, in place of the certificate."""
    Authority.create(tmp_path)
    (tmp_path / "ca.key").unlink()
    before = (tmp_path / "ca.crt").read_bytes()
    with pytest.raises(FileExistsError, match=r"ca\.crt"):
        Authority.create(tmp_path)
    assert (tmp_path / "ca.crt").read_bytes() == before
    assert not (tmp_path / "ca.key").exists()


def test_what_could_not_be_made_whole_does_not_stand_in_the_way(tmp_path: Path) -> None:
    program = (
        "import pathlib, resource, signal, sys\n"
        "from virtfleet_gateway.authority import Authority\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)\n"
        "Authority.create(pathlib.Path(sys.argv[1]))\n"
    )
    # Neither key nor certificate; the key alone.
    for limit_bytes in (100, 400):
        # Its trace goes into a pipe, which has no limit, whatever the tests' own output goes into.
        command = [sys.executable, "-c", program, str(tmp_path), str(limit_bytes)]
        done = subprocess.run(command, check=False, capture_output=True)
        assert done.returncode == 1
        assert b"File too large" in done.stderr
        assert list(tmp_path.iterdir()) == []
    Authority.create(tmp_path)


def test_an_authority_that_has_ended_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway ended with a trace of the library, as it did when the clock of its machine was years ahead."""
    monkeypatch.setattr("virtfleet_gateway.authority._AUTHORITY_LIFETIME", dt.timedelta(seconds=-1))
    authority = Authority.create(tmp_path)
    _, request = new_request("g1")
    with pytest.raises(BackendFailed, match=r"the authority of the fleet ended at .*, or the clock"):
        authority.issue_gateway(request, "g1", ["127.0.0.1"], dt.timedelta(days=7))

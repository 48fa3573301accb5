"""Files that a process reads after its death: whole, and a key that fits its certificate, wherever it died."""

from __future__ import annotations

import asyncio
import datetime as dt
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from virtfleet_gateway import credentials
from virtfleet_gateway.authority import Authority, new_request
from virtfleet_gateway.credentials import OwnCertificate
from virtfleet_service import durable
from virtfleet_service.failpoints import VARIABLE
from virtfleet_service.settings import TlsSettings
from virtfleet_service.tls import read_credentials

DAY = dt.timedelta(days=1)

RENEWAL = """
import datetime as dt, sys
from pathlib import Path
from virtfleet_gateway import credentials
from virtfleet_gateway.authority import Authority, new_request
from virtfleet_service import durable

folder = Path(sys.argv[1])
key, request = new_request("compute")
issued = Authority.load(folder / "ca").issue_node(request, "n1", "compute", dt.timedelta(days=1))
durable.write_pair(folder / "compute.crt", issued.pem, folder / "compute.key", key)
"""


@pytest.fixture
def pair(tmp_path: Path) -> TlsSettings:
    """Write a certificate with its key as a member has them."""
    authority = Authority.create(tmp_path / "ca")
    key, request = new_request("compute")
    files = TlsSettings(
        certificate_file=tmp_path / "compute.crt", key_file=tmp_path / "compute.key", ca_file=tmp_path / "ca/ca.crt"
    )
    issued = authority.issue_node(request, "n1", "compute", DAY)
    durable.write_pair(tmp_path / "compute.crt", issued.pem, tmp_path / "compute.key", key)
    return files


def renew(folder: Path, failpoint: str = "") -> int:
    environment = {**os.environ, VARIABLE: failpoint}
    return subprocess.run([sys.executable, "-c", RENEWAL, str(folder)], env=environment, check=False).returncode


def test_a_file_is_there_whole_with_its_mode_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for mode in (0o600, 0o644):
        durable.write(path, b"content", mode=mode)
        assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"content", mode)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="directory"):
        durable.write(tmp_path / "folder", b"content", mode=0o600)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("failpoint", ["pair.key_written", "pair.certificate_written", ""])
def test_a_renewal_that_is_cut_leaves_a_key_that_fits(pair: TlsSettings, tmp_path: Path, failpoint: str) -> None:
    before = read_credentials(pair)
    assert renew(tmp_path, failpoint) == (-signal.SIGKILL if failpoint else 0)
    after = read_credentials(pair)
    assert (after.certificate == before.certificate) is (failpoint == "pair.key_written")
    assert durable.fits(after.certificate, after.key)
    # The next start finishes what is left, and the next renewal goes through.
    durable.finish_pair(tmp_path / "compute.crt", tmp_path / "compute.key")
    assert durable.fits(after.certificate, (tmp_path / "compute.key").read_bytes())
    assert renew(tmp_path) == 0
    assert read_credentials(pair).certificate != after.certificate
    assert stat.S_IMODE((tmp_path / "compute.key").stat().st_mode) == 0o600


def test_a_gateway_that_was_cut_while_it_renewed_has_a_certificate(tmp_path: Path) -> None:
    """It found a certificate that was good, and a key that was not its own, and did not start again."""
    authority = Authority.create(tmp_path / "ca")
    own = OwnCertificate(authority, tmp_path / "identity", "g1", ["localhost"], lambda: None)
    own.ensure()
    files = TlsSettings(certificate_file=own.certificate_file, key_file=own.key_file, ca_file=own.ca_file)
    own.key_file.write_bytes(new_request("g1")[0])
    own.ensure()
    assert durable.fits(own.certificate_file.read_bytes(), own.key_file.read_bytes())
    present = read_credentials(files).certificate
    own.key_file.replace(own.key_file.with_name("gateway.key.next"))
    own.key_file.write_bytes(new_request("g1")[0])
    own.ensure()
    assert read_credentials(files).certificate == present


def test_a_damaged_denial_list_does_not_keep_a_gateway_from_its_certificate(tmp_path: Path) -> None:
    own = OwnCertificate(Authority.create(tmp_path / "ca"), tmp_path / "identity", "g1", ["localhost"], lambda: None)
    own.ensure()
    own.denied_file.write_bytes(b"\xff")
    own.ensure()


async def test_a_gateway_that_cannot_write_its_certificate_goes_on_and_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credentials, "_RETRY_SECONDS", 0.05)
    changes: list[None] = []
    own = OwnCertificate(
        Authority.create(tmp_path / "ca"), tmp_path / "identity", "g1", ["localhost"], lambda: changes.append(None)
    )
    own.ensure()
    before = own.certificate_file.read_bytes()
    entered: list[bytes] = []

    async def enter(pem: bytes) -> None:
        entered.append(pem)

    in_the_way = own.key_file.with_name("gateway.key.next")
    in_the_way.mkdir()
    own._hosts = ("localhost", "gateway.example.com")
    running = asyncio.create_task(own.run(enter))
    await asyncio.sleep(0.3)
    assert not running.done()
    assert own.certificate_file.read_bytes() == before
    in_the_way.rmdir()
    async with asyncio.timeout(5):
        while len(entered) < 1:
            await asyncio.sleep(0.01)
    assert entered != [before]
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)

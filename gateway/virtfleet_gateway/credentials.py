"""The gateway's own certificate: issued by the authority beside it, renewed at half of its life or once denied."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from cryptography import x509

from virtfleet_gateway.authority import Authority, new_request
from virtfleet_service import durable, files
from virtfleet_service.denial import Denials
from virtfleet_service.errors import DocumentInvalid, VirtfleetError

_log = logging.getLogger(__name__)

LIFETIME = dt.timedelta(days=7)
_LOOK_SECONDS = 60.0
_RETRY_SECONDS = 5.0


class OwnCertificate:
    """Keeps `gateway.crt`, `gateway.key` and `ca.crt` of one gateway good.

    Args:
        authority: What signs.
        directory: Where the files are kept (0700).
        name: The gateway's name.
        hosts: The DNS names and addresses under which clients and nodes reach it.
        changed: Is called after the files have changed, so that the server reads them at once.
    """

    def __init__(
        self, authority: Authority, directory: Path, name: str, hosts: Sequence[str], changed: Callable[[], object]
    ) -> None:
        self._authority = authority
        self._name = name
        self._hosts = tuple(hosts)
        self._changed = changed
        self._wake = asyncio.Event()
        self.denied_file = directory / "denied"
        self.certificate_file = directory / "gateway.crt"
        self.key_file = directory / "gateway.key"
        self.ca_file = directory / "ca.crt"

    @property
    def identity(self) -> str:
        """Who it is: `spiffe://{trust domain}/gateway/{name}`."""
        return f"spiffe://{self._authority.trust_domain}/gateway/{self._name}"

    def ensure(self) -> None:
        """Issue a certificate unless there is a good one.

        It is good with its own key, for the same authority, name and hosts, in its first half, and while it is not
        denied.

        Raises:
            OSError: A file cannot be read or written.
        """
        durable.finish_pair(self.certificate_file, self.key_file)
        if self._is_good():
            return
        self.ca_file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        key, request = new_request(self._name)
        certificate = self._authority.issue_gateway(request, self._name, self._hosts, LIFETIME)
        durable.write(self.ca_file, self._authority.certificate_pem, mode=0o644)
        durable.write_pair(self.certificate_file, certificate.pem, self.key_file, key)

    def _is_good(self) -> bool:
        if not (self.certificate_file.exists() and self.key_file.exists() and self.ca_file.exists()):
            return False
        if files.read_kept(self.ca_file) != self._authority.certificate_pem:
            return False
        if not durable.fits(files.read_kept(self.certificate_file), files.read_kept(self.key_file)):
            return False
        certificate = x509.load_pem_x509_certificate(files.read_kept(self.certificate_file))
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        known = {str(address) for address in names.get_values_for_type(x509.IPAddress)}
        known.update(names.get_values_for_type(x509.DNSName))
        life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
        # A tenth earlier or later by chance, so that replicas do not all renew at once.
        ends_at = certificate.not_valid_before_utc + life * random.uniform(0.45, 0.55)  # noqa: S311  # spread
        if not set(self._hosts) <= known or dt.datetime.now(dt.UTC) >= ends_at:
            return False
        uri = names.get_values_for_type(x509.UniformResourceIdentifier)[0]
        if uri != self.identity:
            return False
        try:
            denials = Denials.load(self.denied_file, [x509.load_pem_x509_certificate(self._authority.certificate_pem)])
        except DocumentInvalid:
            # It is written again from the store, and then looked at once more.
            return True
        return not denials.denies(f"{certificate.serial_number:x}", uri, certificate.not_valid_before_utc)

    def look(self) -> None:
        """Have `run` look at once, because the denial list has changed."""
        self._wake.set()

    async def run(self, issued: Callable[[bytes], Awaitable[object]]) -> None:
        """Renew in time, until cancelled.

        Args:
            issued: Is given each certificate, the present one too, so that it is known and can be revoked.
        """
        known = b""
        said = ""
        while True:
            pause_seconds = _LOOK_SECONDS
            try:
                await asyncio.to_thread(self.ensure)
                present = files.read_kept(self.certificate_file)
                if present != known:
                    if known:
                        self._changed()
                    await issued(present)
                    known = present
                said = ""
            except (OSError, VirtfleetError) as error:
                # A full disk: the certificate at hand is good for days.
                pause_seconds = _RETRY_SECONDS
                if said != str(error):
                    said = str(error)
                    _log.error("the gateway's own certificate could not be renewed or entered: %s", error)
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_seconds):
                    await self._wake.wait()

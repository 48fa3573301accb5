"""The gateway's own certificate: issued by the authority beside it, renewed at half of its life."""

from __future__ import annotations

import asyncio
import datetime as dt
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from cryptography import x509

from virtfleet_gateway.authority import Authority, new_request

LIFETIME = dt.timedelta(days=7)
_LOOK_SECONDS = 60.0


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
        self.certificate_file = directory / "gateway.crt"
        self.key_file = directory / "gateway.key"
        self.ca_file = directory / "ca.crt"

    def ensure(self) -> None:
        """Issue a certificate unless there is one for the same authority and hosts that is in its first half.

        Raises:
            OSError: A file cannot be written.
        """
        if self._is_good():
            return
        self.ca_file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        key, request = new_request(self._name)
        certificate = self._authority.issue_gateway(request, self._name, self._hosts, LIFETIME)
        # A reader between the writes finds a key that does not fit, keeps what it has, and looks again.
        for path, content, mode in (
            (self.ca_file, self._authority.certificate_pem, 0o644),
            (self.key_file, key, 0o600),
            (self.certificate_file, certificate.pem, 0o644),
        ):
            staged = path.with_name(f".{path.name}.{os.getpid()}")
            descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            staged.replace(path)

    def _is_good(self) -> bool:
        if not (self.certificate_file.exists() and self.key_file.exists() and self.ca_file.exists()):
            return False
        if self.ca_file.read_bytes() != self._authority.certificate_pem:
            return False
        certificate = x509.load_pem_x509_certificate(self.certificate_file.read_bytes())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        known = {str(address) for address in names.get_values_for_type(x509.IPAddress)}
        known.update(names.get_values_for_type(x509.DNSName))
        life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
        # A tenth earlier or later by chance, so that replicas do not all renew at once.
        ends_at = certificate.not_valid_before_utc + life * random.uniform(0.45, 0.55)  # noqa: S311  # spread
        return set(self._hosts) <= known and dt.datetime.now(dt.UTC) < ends_at

    async def run(self) -> None:
        """Renew in time, until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            before = self.certificate_file.read_bytes()
            await asyncio.to_thread(self.ensure)
            if self.certificate_file.read_bytes() != before:
                self._changed()

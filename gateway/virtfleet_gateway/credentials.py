"""The gateway's own certificate: issued by the authority beside it, renewed at half of its life or once denied."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import random
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from cryptography import x509

from virtfleet_gateway.authority import Authority, new_request
from virtfleet_service.denial import Denials

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

        It is good for the same authority, name and hosts, in its first half, and while it is not denied.

        Raises:
            OSError: A file cannot be written.
            DocumentInvalid: The file of the denial list is damaged.
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
        if not set(self._hosts) <= known or dt.datetime.now(dt.UTC) >= ends_at:
            return False
        uri = names.get_values_for_type(x509.UniformResourceIdentifier)[0]
        if uri != self.identity:
            return False
        denials = Denials.load(self.denied_file, [x509.load_pem_x509_certificate(self._authority.certificate_pem)])
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
        while True:
            await asyncio.to_thread(self.ensure)
            present = self.certificate_file.read_bytes()
            if present != known:
                await issued(present)
                if known:
                    self._changed()
                known = present
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await self._wake.wait()

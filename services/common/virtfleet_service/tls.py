"""Certificates of this process: read, checked as a whole, and exchanged without dropping a connection."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from virtfleet_service import durable, files
from virtfleet_service.errors import BackingMissing

if TYPE_CHECKING:
    import datetime as dt
    from pathlib import Path

    from virtfleet_service.settings import TlsSettings

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Credentials:
    """Is a key, its certificate chain and the authorities to trust, checked to belong together.

    Attributes:
        certificate: PEM, the leaf first.
        key: PEM.
        authorities: PEM.
        identity: The URI name in the certificate; empty: none.
        not_after: When the certificate ends.
    """

    certificate: bytes
    key: bytes
    authorities: bytes
    identity: str
    not_after: dt.datetime


def read_credentials(settings: TlsSettings) -> Credentials:
    """Read the files of the settings.

    Raises:
        BackingMissing: A file is absent or does not parse, or the key is not that of the certificate.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    certificate_pem = _read(settings.certificate_file, "certificate")
    key_pem = _read_key(settings.key_file, certificate_pem)
    authorities_pem = _read(settings.ca_file, "trust bundle")
    try:
        certificate = x509.load_pem_x509_certificates(certificate_pem)[0]
    except (ValueError, IndexError) as error:
        raise _unusable("certificate", settings.certificate_file, "holds no certificate") from error
    try:
        serialization.load_pem_private_key(key_pem, None)
    except (ValueError, TypeError) as error:
        # The text of the error could quote the file; it stays out of the message.
        raise _unusable("key", settings.key_file, "holds no private key without passphrase") from error
    try:
        x509.load_pem_x509_certificates(authorities_pem)
    except ValueError as error:
        raise _unusable("trust bundle", settings.ca_file, "holds no certificates") from error
    if not durable.fits(certificate_pem, key_pem):
        raise _unusable("key", settings.key_file, "is not that of the certificate")
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = [str(uri) for uri in names.get_values_for_type(x509.UniformResourceIdentifier)]
    except x509.ExtensionNotFound:
        uris = []
    return Credentials(
        certificate_pem, key_pem, authorities_pem, uris[0] if uris else "", certificate.not_valid_after_utc
    )


def _read(path: Path | None, what: str) -> bytes:
    if path is None:
        raise BackingMissing(f"the settings name no {what} file", file="", cause="not set")
    try:
        return files.read_kept(path)
    except OSError as error:
        raise _unusable(what, path, f"cannot be read: {error.strerror}") from error


def _read_key(path: Path | None, certificate: bytes) -> bytes:
    if path is None:
        return _read(path, "key")
    try:
        return durable.fitting_key(certificate, path)
    except OSError as error:
        raise _unusable("key", path, f"cannot be read: {error.strerror}") from error


def _unusable(what: str, path: Path | None, cause: str) -> BackingMissing:
    return BackingMissing(f"the {what} file {path} {cause}", file=path, cause=cause)


def _warn_of_open_key(path: Path | None) -> None:
    found = None if path is None or not path.exists() else path.stat()
    if found is not None and found.st_mode & 0o007:
        _log.warning("the key %s is open to everybody on this machine: take it away from others (chmod o-rwx)", path)


def fingerprint(*paths: Path | None) -> tuple[tuple[int, int, int] | None, ...]:
    """Return what changes when one of the files is replaced or rewritten."""
    return tuple(_stat(path) for path in paths)


def _stat(path: Path | None) -> tuple[int, int, int] | None:
    if path is None:
        return None
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


class CertificateSource:
    """Holds the credentials in use and reads them again when their files change.

    Args:
        settings: Where the files are.

    Raises:
        BackingMissing: See `read_credentials`.
    """

    def __init__(self, settings: TlsSettings) -> None:
        self._settings = settings
        self._seen = self._fingerprint()
        self._said = ""
        self.current = read_credentials(settings)
        self.generation = 1
        _warn_of_open_key(settings.key_file)

    def _fingerprint(self) -> tuple[tuple[int, int, int] | None, ...]:
        settings = self._settings
        return fingerprint(settings.certificate_file, settings.key_file, settings.ca_file)

    def check(self) -> None:
        """Check what the files hold now without taking it.

        Raises:
            BackingMissing: See `read_credentials`.
        """
        read_credentials(self._settings)

    def reload(self) -> bool:
        """Take what the files hold now; returns whether it is new. Existing connections keep what they have.

        Raises:
            BackingMissing: See `read_credentials`; the old ones stay in use.
        """
        # Taken before the files are read: one that changes meanwhile is found changed again.
        seen = self._fingerprint()
        fresh = read_credentials(self._settings)
        self._seen, self._said = seen, ""
        if fresh == self.current:
            return False
        self.current = fresh
        self.generation += 1
        _log.info("certificates reloaded", extra={"identity": fresh.identity, "not_after": fresh.not_after.isoformat()})
        return True

    def reload_if_changed(self) -> bool:
        """Take changed files; returns whether anything is new. What cannot be used is logged, the old ones stay.

        It is tried again with each call: the process may only have been short of descriptors, and a new certificate
        that is passed over is missed when the old one ends.
        """
        if self._fingerprint() == self._seen:
            return False
        try:
            return self.reload()
        except BackingMissing as error:
            # Also in the middle of a rotation, between certificate and key; the second file makes it right.
            if self._said != error.message:
                self._said = error.message
                _log.error("new certificates cannot be used, the old ones stay: %s", error.message)
            return False

    def server_credentials(self, *, require_client_certificate: bool = True) -> grpc.ServerCredentials:
        """Return credentials of a listening port that takes new certificates with each new connection."""
        given = self.generation

        def fetch() -> Any:  # noqa: ANN401  # a configuration or None, for "as before"; the stubs forget None
            # Called by gRPC from a thread of its own before each handshake.
            nonlocal given
            if given == self.generation:
                return None
            given = self.generation
            return self._configuration()

        return grpc.dynamic_ssl_server_credentials(
            self._configuration(), fetch, require_client_authentication=require_client_certificate
        )

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        current = self.current
        return grpc.ssl_server_certificate_configuration(
            [(current.key, current.certificate)], root_certificates=current.authorities
        )

    def client_credentials(self) -> grpc.ChannelCredentials:
        """Return credentials of a client channel, which keeps them: make another one after a rotation."""
        current = self.current
        return grpc.ssl_channel_credentials(current.authorities, current.key, current.certificate)


def client_credentials(settings: TlsSettings) -> grpc.ChannelCredentials:
    """Return credentials of a client channel from the files of the settings.

    Raises:
        BackingMissing: See `read_credentials`.
    """
    return CertificateSource(settings).client_credentials()

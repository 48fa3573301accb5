"""The certificate authority of a fleet: one key, and what it signs.

Every leaf has one URI SAN, its identity (`spiffe://<trust domain>/…`, SPIFFE X.509-SVID), and the DNS SAN that gRPC
demands of a server. The names in a request for a certificate are never taken over: the caller of this module says who
the certificate is for.
"""

from __future__ import annotations

import datetime as dt
import errno
import ipaddress
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from virtfleet_service import durable, files
from virtfleet_service.errors import BackendFailed, DocumentInvalid

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_log = logging.getLogger(__name__)

DEFAULT_TRUST_DOMAIN = "virtfleet.dev"
ROLE_PREFIX = "virtfleet:"
"""Marks the organisations of a user's certificate that are roles."""

USER_LIFETIME_LIMIT = dt.timedelta(days=366)
"""Nothing that people and controllers are given lives longer."""

NODE_SERVICES = ("compute", "storage", "network")

_AUTHORITY_LIFETIME = dt.timedelta(days=3650)
_CLOCK_SKEW = dt.timedelta(minutes=5)
"""A certificate begins a little in the past, since no two clocks agree."""

_PUT_BACK = "put the copy of the authority's folder back"

_REQUEST_LIMIT_BYTES = 16 << 10
REQUEST_FIELD = "certificate_request"
"""Where requests for certificates stand in the messages of the API."""

PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey


@dataclass(frozen=True, slots=True)
class Certificate:
    """Is a certificate that the authority has signed.

    Attributes:
        pem: The certificate (PEM).
        serial: Its serial number in lower-case hexadecimal digits.
        subject: Its identity, `spiffe://…`.
        not_after: When it ends.
    """

    pem: bytes
    serial: str
    subject: str
    not_after: dt.datetime


class Authority:
    """Signs certificates and denial lists with the key of a fleet.

    Args:
        key: The private key.
        certificate: The certificate of the authority itself.
    """

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self._certificate = certificate
        self.trust_domain: str = _uris(certificate)[0].removeprefix("spiffe://")

    @classmethod
    def create(cls, directory: Path, trust_domain: str = DEFAULT_TRUST_DOMAIN) -> Authority:
        """Make a new authority and write `ca.key` (mode 0600) and `ca.crt` into a directory.

        Raises:
            FileExistsError: There is an authority already, or half of one; it is left alone.
            OSError: The directory cannot be written.
        """
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if (directory / "ca.crt").exists():
            # What it has signed is in use, though its key is lost: another authority in its place would end the fleet.
            raise FileExistsError(errno.EEXIST, "is the certificate of an authority", str(directory / "ca.crt"))
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"virtfleet authority of {trust_domain}")])
        now = dt.datetime.now(dt.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _CLOCK_SKEW)
            .not_valid_after(now + _AUTHORITY_LIFETIME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(certificate_authority=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{trust_domain}")]),
                critical=False,
            )
            .sign(key, hashes.SHA256())
        )
        # The key first, and only where none is: a second `create` must never replace it.
        write_private(directory / "ca.key", private_pem(key))
        try:
            durable.write(directory / "ca.crt", certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)
        except BaseException:
            # It has signed nothing yet, and would keep the next call from making one.
            (directory / "ca.key").unlink()
            raise
        return cls(key, certificate)

    @classmethod
    def load(cls, directory: Path) -> Authority:
        """Read the authority that `create` wrote.

        Raises:
            OSError: A file cannot be read.
            ValueError: A file is not what it should be.
        """
        key_file = directory / "ca.key"
        if files.open_to_others(key_file):
            _log.warning(
                "the key of the fleet's authority %s can be read by others: whoever has it is everybody", key_file
            )
        certificate_file = directory / "ca.crt"
        try:
            key = serialization.load_pem_private_key(files.read_kept(key_file), password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            # The text of the error could quote the file; it stays out of the message.
            raise ValueError(f"{key_file} holds no private key without passphrase; {_PUT_BACK}") from error
        try:
            certificate = x509.load_pem_x509_certificate(files.read_kept(certificate_file))
            named = bool(_uris(certificate))
        except ValueError as error:
            raise ValueError(f"{certificate_file} holds no certificate; {_PUT_BACK}") from error
        if not named:
            raise ValueError(f"{certificate_file} is not that of an authority of virtfleet; {_PUT_BACK}")
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise ValueError(f"{directory}: ca.key is not the key of ca.crt; {_PUT_BACK}")
        return cls(key, certificate)

    @property
    def certificate_pem(self) -> bytes:
        """The certificate of the authority (PEM)."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def not_after(self) -> dt.datetime:
        """When the authority ends; nothing that it signs lives longer."""
        return self._certificate.not_valid_after_utc

    @property
    def key_hash(self) -> str:
        """The SHA-256 of the public key (SubjectPublicKeyInfo, DER) in hexadecimal digits, as join tokens carry it."""
        return key_hash(self._certificate)

    def issue_node(
        self,
        request_pem: bytes,
        node: str,
        service: str,
        lifetime: dt.timedelta,
        *,
        field: str = REQUEST_FIELD,
    ) -> Certificate:
        """Sign the certificate of one service of a node, for serving and for calling the gateway.

        Args:
            request_pem: The request (PKCS #10, PEM).
            node: The node.
            service: Its service.
            lifetime: How long it is good.
            field: Where the request stood, for the error.

        Raises:
            DocumentInvalid: The request does not parse, is not signed by its key, or the key is weak.
        """
        return self._issue(
            _checked_key(request_pem, field),
            subject=f"spiffe://{self.trust_domain}/node/{node}/{service}",
            common_name=f"{service}.{node}",
            dns_names=[f"{service}.{node}.{self.trust_domain}"],
            usages=[ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH],
            lifetime=lifetime,
        )

    def issue_gateway(self, request_pem: bytes, name: str, hosts: Iterable[str], lifetime: dt.timedelta) -> Certificate:
        """Sign the certificate of a gateway that clients reach under `hosts` (DNS names and IP addresses).

        Raises:
            DocumentInvalid: As for `issue_node`.
        """
        dns_names, addresses = [f"{name}.gateway.{self.trust_domain}"], []
        for host in hosts:
            try:
                addresses.append(ipaddress.ip_address(host))
            except ValueError:
                dns_names.append(host)
        return self._issue(
            _checked_key(request_pem, REQUEST_FIELD),
            subject=f"spiffe://{self.trust_domain}/gateway/{name}",
            common_name=name,
            dns_names=dns_names,
            addresses=addresses,
            usages=[ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH],
            lifetime=lifetime,
        )

    def issue_user(self, request_pem: bytes, name: str, roles: Sequence[str], lifetime: dt.timedelta) -> Certificate:
        """Sign the certificate of a person or controller, with its roles; for calling only.

        Raises:
            DocumentInvalid: As for `issue_node`.
        """
        return self._issue(
            _checked_key(request_pem, REQUEST_FIELD),
            subject=f"spiffe://{self.trust_domain}/user/{name}",
            common_name=name,
            organisations=[f"{ROLE_PREFIX}{role}" for role in roles],
            dns_names=[],
            usages=[ExtendedKeyUsageOID.CLIENT_AUTH],
            lifetime=lifetime,
        )

    def _issue(
        self,
        key: PublicKey,
        *,
        subject: str,
        common_name: str,
        dns_names: list[str],
        usages: list[x509.ObjectIdentifier],
        lifetime: dt.timedelta,
        organisations: Iterable[str] = (),
        addresses: Iterable[ipaddress.IPv4Address | ipaddress.IPv6Address] = (),
    ) -> Certificate:
        now = dt.datetime.now(dt.UTC)
        not_after = min((now + lifetime).replace(microsecond=0), self._certificate.not_valid_after_utc)
        if not_after <= now:
            raise BackendFailed(
                f"the authority of the fleet ended at {not_after.isoformat()}, or the clock of this machine is wrong:"
                " nothing can be signed",
                cause="ended",
            )
        serial = x509.random_serial_number()
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(subject)]
        names += [x509.DNSName(name) for name in dns_names]
        names += [x509.IPAddress(address) for address in addresses]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(
                x509.Name(
                    [x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation) for organisation in organisations]
                    # A common name has at most 64 characters (RFC 5280, ub-common-name).
                    + [x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])]
                )
            )
            .issuer_name(self._certificate.subject)
            .public_key(key)
            .serial_number(serial)
            .not_valid_before(now - _CLOCK_SKEW)
            .not_valid_after(not_after)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(certificate_authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return Certificate(
            pem=certificate.public_bytes(serialization.Encoding.PEM),
            serial=f"{serial:x}",
            subject=subject,
            not_after=not_after,
        )

    def sign(self, document: bytes) -> bytes:
        """Return the signature (ECDSA, SHA-256, DER) of a document that every process of the fleet will believe."""
        return self._key.sign(document, ec.ECDSA(hashes.SHA256()))


def key_hash(certificate: x509.Certificate) -> str:
    """Return the SHA-256 of the public key of a certificate in hexadecimal digits."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(
        certificate.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return digest.finalize().hex()


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key as PEM (PKCS 8, not encrypted: the file's mode guards it)."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read, durably.

    Raises:
        FileExistsError: The file exists; it is left alone.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink()
        raise


def new_request(common_name: str) -> tuple[bytes, bytes]:
    """Make a key and a request for a certificate of it.

    Returns:
        The private key and the request, both PEM.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])]))
        .sign(key, hashes.SHA256())
    )
    return private_pem(key), request.public_bytes(serialization.Encoding.PEM)


def _checked_key(request_pem: bytes, field: str) -> PublicKey:
    """Return the key of a request after looking at all that a stranger could have sent."""
    if len(request_pem) > _REQUEST_LIMIT_BYTES:
        raise DocumentInvalid(
            f"a certificate request has at most {_REQUEST_LIMIT_BYTES} bytes",
            field=field,
            limit_bytes=_REQUEST_LIMIT_BYTES,
        )
    try:
        request = x509.load_pem_x509_csr(request_pem)
        signed = request.is_signature_valid
        key = request.public_key()
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise DocumentInvalid("the certificate request does not parse as PEM PKCS #10", field=field) from error
    if not signed:
        raise DocumentInvalid("the certificate request is not signed by its own key", field=field)
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, (ec.SECP256R1, ec.SECP384R1)):
        return key
    if isinstance(key, rsa.RSAPublicKey) and 2048 <= key.key_size <= 8192:
        return key
    raise DocumentInvalid("the key must be ECDSA P-256 or P-384, or RSA of 2048 to 8192 bits", field=field)


def _uris(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return list(names.get_values_for_type(x509.UniformResourceIdentifier))


def _key_usage(*, certificate_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificate_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=certificate_authority,
        crl_sign=certificate_authority,
        encipher_only=False,
        decipher_only=False,
    )

"""A small authority for tests: certificates with SPIFFE ids, as short-lived or as wrong as a test wants them."""

from __future__ import annotations

import datetime as dt
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

TRUST_DOMAIN = "virtfleet.dev"


@dataclass(frozen=True, slots=True)
class Issued:
    """Is a certificate with its key, in memory and as files."""

    certificate: bytes
    key: bytes
    certificate_file: Path
    key_file: Path
    serial_number: str
    identity: str


class Pki:
    """Is a CA with its own folder.

    Args:
        folder: Where files are written.
        trust_domain: What SPIFFE ids begin with.
    """

    def __init__(self, folder: Path, trust_domain: str = TRUST_DOMAIN) -> None:
        self.folder = folder
        self.trust_domain = trust_domain
        folder.mkdir(parents=True, exist_ok=True)
        self.key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
        now = dt.datetime.now(dt.UTC)
        identifier = x509.SubjectKeyIdentifier.from_public_key(self.key.public_key())
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=True,
                    content_commitment=False,
                    key_encipherment=False,
                    data_encipherment=False,
                    key_agreement=False,
                    key_cert_sign=True,
                    crl_sign=True,
                    encipher_only=False,
                    decipher_only=False,
                ),
                critical=True,
            )
            .add_extension(identifier, critical=False)
            .sign(self.key, hashes.SHA256())
        )
        self.pem = self.certificate.public_bytes(serialization.Encoding.PEM)
        self.ca_file = folder / "ca.crt"
        self.ca_file.write_bytes(self.pem)

    def issue(
        self,
        path: str,
        *,
        file: str = "",
        roles: tuple[str, ...] = (),
        dns: tuple[str, ...] = ("localhost",),
        lifetime: dt.timedelta = dt.timedelta(hours=1),
        begin: dt.timedelta = dt.timedelta(minutes=-5),
        uris: tuple[str, ...] | None = None,
    ) -> Issued:
        """Issue a certificate.

        Args:
            path: Of the SPIFFE id: `user/alice`, `node/n1/compute`, `gateway/g1`.
            file: The stem of its files; empty: made from the path.
            roles: Become organisations of the subject.
            dns: DNS names beside the SPIFFE id; 127.0.0.1 is always there too.
            lifetime: From now on; may be negative.
            begin: When it begins, from now.
            uris: URI names in place of the one SPIFFE id.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        identity = f"spiffe://{self.trust_domain}/{path}"
        now = dt.datetime.now(dt.UTC)
        serial = x509.random_serial_number()
        subject = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, f"virtfleet:{role}") for role in roles]
        subject.append(x509.NameAttribute(NameOID.COMMON_NAME, path[:64]))
        names: list[x509.GeneralName] = [x509.DNSName(name) for name in dns]
        names.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
        names += [x509.UniformResourceIdentifier(uri) for uri in ((identity,) if uris is None else uris)]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name(subject))
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(serial)
            .not_valid_before(now + min(begin, lifetime - dt.timedelta(seconds=1)))
            .not_valid_after(now + lifetime)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
            .sign(self.key, hashes.SHA256())
        )
        stem = file or path.replace("/", "-")
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        key_pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        issued = Issued(pem, key_pem, self.folder / f"{stem}.crt", self.folder / f"{stem}.key", f"{serial:x}", identity)
        issued.certificate_file.write_bytes(pem)
        issued.key_file.write_bytes(key_pem)
        return issued

    def user(self, name: str = "alice", *roles: str) -> Issued:
        """Issue the certificate of a person with roles."""
        return self.issue(f"user/{name}", roles=roles)

    def gateway(self, name: str = "g1") -> Issued:
        """Issue the certificate of a gateway."""
        return self.issue(f"gateway/{name}", dns=("localhost", f"gateway.{self.trust_domain}"))

    def service(self, node: str = "n1", service: str = "compute") -> Issued:
        """Issue the certificate of a node's service."""
        return self.issue(f"node/{node}/{service}", dns=("localhost", f"{service}.{node}.{self.trust_domain}"))

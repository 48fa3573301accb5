"""The denial list: which certificates a process no longer believes.

The authority signs a numbered list (`virtfleet.fleet.v1.SignedDenialList`); gateways hand it out with the trust bundle,
and every process keeps the newest one that it has seen in a file. A list is taken only if a CA of the trust bundle
signed it, its number is higher than that of the one in force, and it denies all that the one in force does, so neither
a stranger nor an old gateway nor one whose store was put back from a copy can set a certificate free again. A member
that holds more than a gateway hands its list over (`missing_in`), and the gateway takes in what is missing.
"""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from google.protobuf.message import DecodeError

from virtfleet.fleet.v1 import enrollment_pb2
from virtfleet_service import durable, files
from virtfleet_service.errors import DocumentInvalid

if TYPE_CHECKING:
    from collections.abc import Iterable

_LIMIT_BYTES: Final = 64 << 20
"""What the file of a list may have: some hundred thousand denied certificates."""


def public_key_sha256(certificate: x509.Certificate) -> str:
    """Return the SHA-256 of the public key of a certificate (SubjectPublicKeyInfo, DER), lower-case hex."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(
        certificate.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return digest.finalize().hex()


class Denials:
    """Is one denial list that has been verified, ready to be asked.

    Args:
        content: The list.
        signed: Its signed form as it was received, for the file; None: the empty list of a process that has seen none.
    """

    def __init__(
        self, content: enrollment_pb2.DenialList, signed: enrollment_pb2.SignedDenialList | None = None
    ) -> None:
        self.number: int = content.number
        self.content = content
        self.signed = signed
        self._serials = frozenset(entry.serial_number for entry in content.certificates)
        self._identities: dict[str, dt.datetime | None] = {}
        self._prefixes: list[tuple[str, dt.datetime | None]] = []
        for entry in content.identities:
            until = entry.until_time.ToDatetime(dt.UTC) if entry.HasField("until_time") else None
            if entry.identity.endswith("/"):
                self._prefixes.append((entry.identity, until))
            else:
                self._identities[entry.identity] = until

    @classmethod
    def empty(cls) -> Denials:
        """Return the list that denies nobody, number 0."""
        return cls(enrollment_pb2.DenialList())

    @classmethod
    def verify(cls, signed: enrollment_pb2.SignedDenialList, authorities: Iterable[x509.Certificate]) -> Denials:
        """Return the list in a signed one.

        Raises:
            DocumentInvalid: No given authority has signed it, or it does not parse.
        """
        for authority in authorities:
            if public_key_sha256(authority) != signed.key_sha256:
                continue
            key = authority.public_key()
            try:
                if isinstance(key, ec.EllipticCurvePublicKey):
                    key.verify(signed.signature, signed.content, ec.ECDSA(hashes.SHA256()))
                elif isinstance(key, ed25519.Ed25519PublicKey):
                    key.verify(signed.signature, signed.content)
                else:
                    continue
                return cls(enrollment_pb2.DenialList.FromString(signed.content), signed)
            except (InvalidSignature, DecodeError) as error:
                raise DocumentInvalid("the denial list is not what the authority has signed") from error
        raise DocumentInvalid(
            "the denial list is not signed by an authority of the fleet", key_sha256=signed.key_sha256
        )

    @classmethod
    def load(cls, path: Path, authorities: Iterable[x509.Certificate]) -> Denials:
        """Read the list that `save` wrote; the empty one if there is no file.

        Raises:
            DocumentInvalid: The file is damaged or not signed by an authority of the fleet.
            OSError: It cannot be read.
        """
        try:
            content = files.read_kept(path, _LIMIT_BYTES)
        except FileNotFoundError:
            return cls.empty()
        try:
            signed = enrollment_pb2.SignedDenialList.FromString(content)
        except DecodeError as error:
            raise DocumentInvalid(f"{path} holds no denial list", path=path) from error
        return cls.verify(signed, authorities)

    def save(self, path: Path) -> None:
        """Write the list durably in place of the one before.

        Raises:
            OSError: It cannot be written; the old file stands.
        """
        if self.signed is None:
            return
        durable.write(path, self.signed.SerializeToString(), mode=0o644)

    def missing_in(self, other: Denials) -> list[enrollment_pb2.DeniedCertificate]:
        """Return what this list denies and another one does not; certificates that have ended are left out."""
        now = dt.datetime.now(dt.UTC)
        return [
            entry
            for entry in self.content.certificates
            if entry.serial_number not in other._serials and entry.expire_time.ToDatetime(dt.UTC) > now
        ]

    def replaces(self, other: Denials) -> bool:
        """Tell whether this list is newer than another and sets nothing free that the other denies."""
        return self.number > other.number and not other.missing_in(self)

    def denies(self, serial_number: str, identity: str, not_before: dt.datetime) -> bool:
        """Tell whether a certificate is no longer good.

        Args:
            serial_number: In lower-case hexadecimal digits.
            identity: Its URI SAN.
            not_before: When it begins, with a time zone.
        """
        if serial_number in self._serials:
            return True
        if identity in self._identities:
            until = self._identities[identity]
            return until is None or not_before <= until
        return any(
            identity.startswith(prefix) and (until is None or not_before <= until) for prefix, until in self._prefixes
        )

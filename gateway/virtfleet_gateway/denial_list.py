"""The denial list that the authority signs, as the gateway keeps it and hands it out with the trust bundle.

It is made, numbered and signed in the transaction that revokes certificates, stored with them, and written to the file
that the gateway's own server obeys after the commit: a crash between the two is made good at the next start.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from typing import TYPE_CHECKING, Final

from cryptography import x509

from virtfleet.fleet.v1 import enrollment_pb2
from virtfleet_service.denial import Denials, public_key_sha256

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from virtfleet_gateway.authority import Authority
    from virtfleet_service.store import Store, Transaction

DENIED_AFTER_END: Final = dt.timedelta(days=1)
"""How long a certificate stays on the list after its end."""

_KIND: Final = "denials"
_KEY: Final = "signed"


class DenialList:
    """Keeps the denial list of a fleet.

    Args:
        store: The gateway's store.
        authority: What signs.
        file: Where this gateway keeps the list that its own server obeys.
        changed: Is called after the list has changed and its file is written.
    """

    def __init__(self, store: Store, authority: Authority, file: Path, *, changed: Callable[[], object]) -> None:
        self._store = store
        self._authority = authority
        self._file = file
        self._changed = changed
        self._ca_digest = hashlib.sha256(authority.certificate_pem).hexdigest()

    def add(self, transaction: Transaction, entries: Iterable[enrollment_pb2.DeniedCertificate]) -> Denials:
        """Put certificates on the list and sign it; what has ended long ago leaves it.

        Returns:
            The new list, for `publish` after the commit.
        """
        now = dt.datetime.now(dt.UTC)
        signed = transaction.get_record(_KIND, _KEY)
        previous = enrollment_pb2.DenialList()
        if signed is not None:
            previous.ParseFromString(enrollment_pb2.SignedDenialList.FromString(signed).content)
        content = enrollment_pb2.DenialList(number=previous.number + 1)
        content.create_time.FromDatetime(now)
        kept = {
            entry.serial_number: entry
            for entry in previous.certificates
            if entry.expire_time.ToDatetime(dt.UTC) > now - DENIED_AFTER_END
        }
        kept |= {entry.serial_number: entry for entry in entries}
        content.certificates.extend(kept[serial] for serial in sorted(kept))
        serialised = content.SerializeToString()
        document = enrollment_pb2.SignedDenialList(
            content=serialised,
            signature=self._authority.sign(serialised),
            key_sha256=public_key_sha256(x509.load_pem_x509_certificate(self._authority.certificate_pem)),
        )
        transaction.put_record(_KIND, _KEY, document.SerializeToString())
        return Denials(content, document)

    def publish(self, denials: Denials | None) -> None:
        """Write a list that has been committed to its file and tell of it; None: nothing has changed."""
        if denials is not None:
            denials.save(self._file)
            self._changed()

    def restore_file(self) -> None:
        """Write the list of the store to its file; at start, when a crash may have left an old one.

        Raises:
            OSError: The file cannot be written.
        """
        signed = self._store.get_record(_KIND, _KEY)
        if signed is not None:
            document = enrollment_pb2.SignedDenialList.FromString(signed)
            Denials(enrollment_pb2.DenialList.FromString(document.content), document).save(self._file)

    def trust_bundle(self, request: enrollment_pb2.GetTrustBundleRequest) -> enrollment_pb2.TrustBundle:
        """Return the CA certificates and the denial list, each only if the caller has another one."""
        bundle = self._bundle(self._store.get_record(_KIND, _KEY))
        if request.known_ca_digest == bundle.ca_digest:
            del bundle.ca_certificates[:]
        if request.known_denial_list_number == bundle.denial_list_number:
            bundle.ClearField("denial_list")
        return bundle

    def bundle_in(self, transaction: Transaction) -> enrollment_pb2.TrustBundle:
        """Return the whole trust bundle as a transaction sees it."""
        return self._bundle(transaction.get_record(_KIND, _KEY))

    def _bundle(self, signed: bytes | None) -> enrollment_pb2.TrustBundle:
        bundle = enrollment_pb2.TrustBundle(
            trust_domain=self._authority.trust_domain,
            ca_certificates=[self._authority.certificate_pem.decode()],
            ca_digest=self._ca_digest,
        )
        if signed is not None:
            bundle.denial_list.ParseFromString(signed)
            bundle.denial_list_number = enrollment_pb2.DenialList.FromString(bundle.denial_list.content).number
        return bundle

"""The denial list that the authority signs, as the gateway keeps it and hands it out with the trust bundle.

It is made, numbered and signed in the transaction that revokes certificates, stored with them, and written to the file
that the gateway's own server obeys after the commit: a crash between the two is made good at the next start, and if
the disk refuses the file, the server is handed the list all the same and the file is tried again. Its number comes from
the clock: a store that was put back from a copy must not give a number again that members have seen.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import logging
from typing import TYPE_CHECKING, Final

from cryptography import x509

from virtfleet.fleet.v1 import enrollment_pb2
from virtfleet_service.denial import Denials, public_key_sha256
from virtfleet_service.errors import DocumentInvalid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from virtfleet_gateway.authority import Authority
    from virtfleet_service.store import Store, Transaction

_log = logging.getLogger(__name__)

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
        changed: Is called with each new list, once more for as long as its file cannot be written.
    """

    def __init__(self, store: Store, authority: Authority, file: Path, *, changed: Callable[[Denials], object]) -> None:
        self._store = store
        self._authority = authority
        self._file = file
        self._changed = changed
        # What the file does not hold yet.
        self._unsaved: Denials | None = None
        self._said = ""
        self._ca_digest = hashlib.sha256(authority.certificate_pem).hexdigest()
        self._certificate = x509.load_pem_x509_certificate(authority.certificate_pem)

    def add(
        self, transaction: Transaction, entries: Iterable[enrollment_pb2.DeniedCertificate], *, above: int = 0
    ) -> Denials:
        """Put certificates on the list and sign it; what has ended long ago leaves it.

        Args:
            transaction: Where the list is read and written.
            entries: The certificates.
            above: A number that has been seen, which the new one must exceed.

        Returns:
            The new list, for `publish` after the commit.
        """
        now = dt.datetime.now(dt.UTC)
        previous = self.current_in(transaction).content
        number = max(previous.number + 1, above + 1, int(now.timestamp() * 1e6))
        content = enrollment_pb2.DenialList(number=number)
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
            key_sha256=public_key_sha256(self._certificate),
        )
        transaction.put_record(_KIND, _KEY, document.SerializeToString())
        return Denials(content, document)

    def publish(self, denials: Denials | None) -> None:
        """Write a list that has been committed to its file and tell of it; None: nothing has changed."""
        if denials is not None:
            self._unsaved = denials
            self.settle()

    def settle(self) -> None:
        """Write and tell what could not be written yet; does nothing if all is."""
        denials = self._unsaved
        if denials is None:
            return
        try:
            denials.save(self._file)
        except OSError as error:
            # What is denied is denied, and committed: who asked for it must not be told that it failed.
            if self._said != str(error):
                self._said = str(error)
                _log.error("the denial list cannot be written to its file, it is obeyed all the same: %s", error)
        else:
            self._unsaved, self._said = None, ""
        self._changed(denials)

    def current(self) -> Denials:
        """Return the list in force."""
        signed = self._store.get_record(_KIND, _KEY)
        if signed is None:
            return Denials.empty()
        document = enrollment_pb2.SignedDenialList.FromString(signed)
        return Denials(enrollment_pb2.DenialList.FromString(document.content), document)

    def current_in(self, transaction: Transaction) -> Denials:
        """Return the list in force as a transaction sees it."""
        signed = transaction.get_record(_KIND, _KEY)
        if signed is None:
            return Denials.empty()
        document = enrollment_pb2.SignedDenialList.FromString(signed)
        return Denials(enrollment_pb2.DenialList.FromString(document.content), document)

    def file_content(self) -> enrollment_pb2.SignedDenialList | None:
        """Return the list in the file: newer than that of the store if the store was put back from a copy.

        A damaged file is as good as none: it is written again from the store.
        """
        try:
            return Denials.load(self._file, [self._certificate]).signed
        except DocumentInvalid as error:
            _log.error("the denial list in the file cannot be used, that of the store is put in its place: %s", error)
            return None

    def verify(self, signed: enrollment_pb2.SignedDenialList) -> Denials:
        """Return a list that somebody brings.

        Raises:
            DocumentInvalid: This authority has not signed it.
        """
        return Denials.verify(signed, [self._certificate])

    def restore_file(self) -> None:
        """Write the list of the store to its file, unless that holds it."""
        current = self.current()
        if current.signed is not None and self.file_content() != current.signed:
            self.publish(current)

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

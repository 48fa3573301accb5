"""The certificates that a gateway knows of: those it issued, those in the authority's folder, and their end."""

from __future__ import annotations

import datetime as dt
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes

from virtfleet.fleet.v1 import enrollment_pb2, watch_pb2
from virtfleet_gateway.authority import USER_LIFETIME_LIMIT
from virtfleet_service import failpoints, identity, requests, resources
from virtfleet_service.errors import CredentialsInvalid, DocumentInvalid, FieldConflict, NameMalformed, ResourceNotFound

if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtfleet_gateway.authority import Authority
    from virtfleet_gateway.denial_list import DenialList
    from virtfleet_service.call import Call
    from virtfleet_service.denial import Denials
    from virtfleet_service.store import Store, Transaction

KIND: Final = "certificate"
LISTED_AFTER_END: Final = dt.timedelta(days=1)
"""How long certificates stay listed after their end."""

_CAUSE: Final = "virtfleet.fleet.v1.EnrollmentService."
_ADOPTED: Final = "issued by command"
_ENDED: Final = "expired"
_LAPSE_SLICE: Final = 500
_NEWEST: Final = "newestCertificate"
"""The space of records that name, by its identity, the certificate that ends last, until its end has been announced."""
_ENDING_RATIO: Final = 0.2
"""What is left of the life of a certificate that should have been renewed: its holder does so at half of it."""
_NAME = re.compile(r"certificates/c([1-9a-f][0-9a-f]{0,39})")
_KINDS: Final = {
    identity.NODE: enrollment_pb2.CERTIFICATE_KIND_NODE,
    identity.GATEWAY: enrollment_pb2.CERTIFICATE_KIND_GATEWAY,
    identity.USER: enrollment_pb2.CERTIFICATE_KIND_USER,
}


@dataclass(slots=True)
class _Signed:
    """Carries the denial list out of the transaction that made it."""

    denials: Denials | None = field(default=None)


class Certificates:
    """Records, finds and revokes certificates.

    Args:
        store: The gateway's store.
        authority: What has signed them.
        denial_list: Takes what is revoked.
    """

    def __init__(self, store: Store, authority: Authority, denial_list: DenialList) -> None:
        self._store = store
        self._authority = x509.load_pem_x509_certificate(authority.certificate_pem)
        self._trust_domain = authority.trust_domain
        self._denial_list = denial_list

    # What is known

    def record(self, transaction: Transaction, pem: bytes, *, principal: str, method: str) -> None:
        """Write down a certificate that is being issued.

        Args:
            transaction: The one that issues it.
            pem: The certificate.
            principal: Who asked for it.
            method: By which method of the EnrollmentService.
        """
        resource = self._resource(pem, principal)
        renewed = method == "RenewCertificate"
        self._put(transaction, resource, f"{_CAUSE}{method}", renewed=renewed)

    async def adopt(self, pem: bytes, principal: str) -> bool:
        """Enter a certificate that was issued elsewhere with the authority's key; one that is known stays as it is.

        One that has ended long ago is left out. One that was revoked by its serial number alone gets its identity.

        Returns:
            Whether it is new.

        Raises:
            DocumentInvalid: It is no certificate of this authority.
        """
        resource = self._resource(pem, principal)
        if resource.status.expire_time.ToDatetime(dt.UTC) < _now() - LISTED_AFTER_END or self._complete(resource.name):
            return False

        def work(transaction: Transaction) -> None:
            row = transaction.get(resource.name)
            if row is None:
                self._put(transaction, resource, _ADOPTED, renewed=False)
                return
            known = enrollment_pb2.Certificate.FromString(row.body)
            before = known.generation
            resource.status.state = known.status.state
            resource.status.revoke_time.CopyFrom(known.status.revoke_time)
            resource.status.revoke_reason = known.status.revoke_reason
            known.display_name = resource.display_name
            known.status.CopyFrom(resource.status)
            resources.touch(known)
            transaction.put(KIND, known, cause=_ADOPTED, old_generation=before)

        await self._store.write(work)
        return True

    def _complete(self, name: str) -> bool:
        row = self._store.get(name)
        return row is not None and bool(enrollment_pb2.Certificate.FromString(row.body).status.identity)

    def _resource(self, pem: bytes, principal: str) -> enrollment_pb2.Certificate:
        """Return what stands for a certificate.

        Raises:
            DocumentInvalid: It is no certificate of this authority.
        """
        try:
            parsed = x509.load_pem_x509_certificate(pem)
            parsed.verify_directly_issued_by(self._authority)
            who = identity.parse_certificate(pem, self._trust_domain)
        except (ValueError, TypeError, InvalidSignature, CredentialsInvalid) as error:
            raise DocumentInvalid("this is no certificate that the authority of this fleet has signed") from error
        resource = enrollment_pb2.Certificate(display_name=who.uri.rsplit("/", 1)[-1])
        resources.create_head(resource, f"certificates/c{who.serial_number}")
        status = resource.status
        status.state = enrollment_pb2.CERTIFICATE_STATE_VALID
        status.kind = _KINDS[who.kind]
        status.identity = who.uri
        status.serial_number = who.serial_number
        status.begin_time.FromDatetime(parsed.not_valid_before_utc)
        status.expire_time.FromDatetime(parsed.not_valid_after_utc)
        status.roles.extend(who.roles)
        status.node = f"nodes/{who.name}" if who.kind == identity.NODE else ""
        status.principal = principal
        status.fingerprint_sha256 = parsed.fingerprint(hashes.SHA256()).hex()
        return resource

    @staticmethod
    def _put(transaction: Transaction, resource: enrollment_pb2.Certificate, cause: str, *, renewed: bool) -> None:
        transaction.put(KIND, resource, cause=cause)
        _note_newest(transaction, resource)
        kind = watch_pb2.EVENT_TYPE_CERTIFICATE_RENEWED if renewed else watch_pb2.EVENT_TYPE_CERTIFICATE_ISSUED
        ends = resource.status.expire_time.ToDatetime(dt.UTC)
        transaction.event(
            watch_pb2.Event(
                resource=resource.name,
                uid=resource.uid,
                type=kind,
                time=resource.create_time,
                reason="RENEWED" if renewed else "ISSUED",
                message=f"{resource.status.identity}, good until {ends:%Y-%m-%d %H:%M:%S} UTC",
            )
        )

    @staticmethod
    def _all(transaction: Transaction) -> list[enrollment_pb2.Certificate]:
        return [enrollment_pb2.Certificate.FromString(row.body) for row in transaction.list(KIND)]

    def of_node(self, transaction: Transaction, node: str) -> list[enrollment_pb2.Certificate]:
        """Return the certificates of a node."""
        return [certificate for certificate in self._all(transaction) if certificate.status.node == f"nodes/{node}"]

    @staticmethod
    def lapse(transaction: Transaction, after: str) -> str:
        """Say of some certificates that have ended that they have; drop those that ended long ago.

        Args:
            transaction: Where they are.
            after: The name behind which to go on; empty: from the first on.

        Returns:
            The name behind which to go on; empty: there are no more.
        """
        now = _now()
        rows = transaction.list(KIND, after=after, limit=_LAPSE_SLICE)
        for row in rows:
            certificate = enrollment_pb2.Certificate.FromString(row.body)
            ends = certificate.status.expire_time.ToDatetime(dt.UTC)
            if ends < now - LISTED_AFTER_END:
                transaction.delete(certificate.name, cause=_ENDED)
                _take_from_newest(transaction, certificate)
            elif certificate.status.state != enrollment_pb2.CERTIFICATE_STATE_VALID:
                continue
            elif ends <= now:
                certificate.status.state = enrollment_pb2.CERTIFICATE_STATE_EXPIRED
                transaction.put(KIND, certificate, cause=_ENDED)
            elif _is_ending(certificate, now) and _take_from_newest(transaction, certificate):
                transaction.event(_ending(certificate, now))
        return rows[-1].name if len(rows) == _LAPSE_SLICE else ""

    # Their end

    async def revoke(self, request: enrollment_pb2.RevokeCertificateRequest, call: Call) -> enrollment_pb2.Certificate:
        """Put a certificate, or all of its identity, on the denial list.

        Raises:
            ResourceNotFound: There is no such certificate, and `allow_missing` is not set.
            NameMalformed: There is none, and the name holds no serial number.
            FieldConflict: All of the identity of a certificate are asked for that nobody has seen.
            EtagMismatch: It has changed.
        """
        out = _Signed()

        def work(transaction: Transaction) -> enrollment_pb2.Certificate:
            certificate = self._revocable(transaction, request, call)
            resources.check_preconditions(certificate, etag=request.etag, expected_uid=request.expected_uid)
            targets = [certificate]
            if request.whole_identity:
                if not certificate.status.identity:
                    raise FieldConflict(
                        f"nobody knows the identity of {request.name}: deny it alone", field="whole_identity"
                    )
                targets = [
                    other for other in self._all(transaction) if other.status.identity == certificate.status.identity
                ]
            if request.validate_only:
                certificate.status.state = enrollment_pb2.CERTIFICATE_STATE_REVOKED
                return certificate
            out.denials = self.deny(transaction, targets, request.reason, call.caller.subject)
            row = transaction.get(request.name)
            return enrollment_pb2.Certificate.FromString(row.body) if row is not None else certificate

        answer = await requests.once(self._store, call, request, work)
        self._denial_list.publish(out.denials)
        return answer

    @staticmethod
    def _revocable(
        transaction: Transaction, request: enrollment_pb2.RevokeCertificateRequest, call: Call
    ) -> enrollment_pb2.Certificate:
        """Return the certificate that is meant; for one that nobody has seen, what stands for its serial number."""
        row = transaction.get(request.name)
        if row is not None and row.kind == KIND:
            return enrollment_pb2.Certificate.FromString(row.body)
        if not request.allow_missing:
            raise ResourceNotFound(f"there is no {request.name}", resource=request.name)
        found = _NAME.fullmatch(request.name)
        if found is None:
            raise NameMalformed(
                "name must be certificates/c and the serial number in lower-case hexadecimal digits",
                field="name",
                name=request.name,
            )
        certificate = enrollment_pb2.Certificate()
        resources.create_head(certificate, request.name)
        certificate.status.state = enrollment_pb2.CERTIFICATE_STATE_VALID
        certificate.status.serial_number = found.group(1)
        # Its end is not known: nothing that people are given lives longer.
        certificate.status.expire_time.FromDatetime(_now() + USER_LIFETIME_LIMIT)
        certificate.status.principal = call.caller.subject
        if not request.validate_only:
            transaction.put(KIND, certificate, cause=f"{_CAUSE}RevokeCertificate")
        return certificate

    async def expel(self, node: str, principal: str) -> None:
        """Deny every certificate of a node that has been removed."""
        out = _Signed()

        def work(transaction: Transaction) -> None:
            out.denials = self.deny(transaction, self.of_node(transaction, node), "node removed", principal)

        await self._store.write(work)
        failpoints.reach("certificates.expelled")
        self._denial_list.publish(out.denials)

    async def take_in(self, signed: enrollment_pb2.SignedDenialList, principal: str) -> None:
        """Deny what a list of this authority denies that the store does not know: it was put back from an older copy.

        Whoever brings the list can only repeat what the authority has said before. The list in force gets a number that
        is higher than that of the one brought, so that members take it.

        Raises:
            DocumentInvalid: This authority has not signed it.
        """
        brought = self._denial_list.verify(signed)
        current = self._denial_list.current()
        if not brought.number or current.signed == signed or current.replaces(brought):
            return
        out = _Signed()

        def work(transaction: Transaction) -> None:
            current = self._denial_list.current_in(transaction)
            if current.signed == signed or current.replaces(brought):
                return
            targets = [self._denied(transaction, entry, principal) for entry in brought.missing_in(current)]
            out.denials = self.deny(transaction, targets, "denied before a restore", principal, above=brought.number)
            if out.denials is None:
                out.denials = self._denial_list.add(transaction, [], above=brought.number)

        await self._store.write(work)
        self._denial_list.publish(out.denials)

    async def restore_denials(self, principal: str) -> None:
        """Bring the list of the store and that of the file together; at start, when either may be the older one.

        Raises:
            OSError: The file cannot be written.
        """
        left = self._denial_list.file_content()
        if left is not None:
            await self.take_in(left, principal)
        self._denial_list.restore_file()

    def _denied(
        self, transaction: Transaction, entry: enrollment_pb2.DeniedCertificate, principal: str
    ) -> enrollment_pb2.Certificate:
        """Return the certificate that an entry of a list means; one that nobody has seen is made from the entry."""
        name = f"certificates/c{entry.serial_number}"
        row = transaction.get(name)
        if row is not None:
            return enrollment_pb2.Certificate.FromString(row.body)
        certificate = enrollment_pb2.Certificate()
        resources.create_head(certificate, name)
        certificate.status.state = enrollment_pb2.CERTIFICATE_STATE_VALID
        certificate.status.serial_number = entry.serial_number
        certificate.status.expire_time.CopyFrom(entry.expire_time)
        certificate.status.principal = principal
        transaction.put(KIND, certificate, cause=f"{_CAUSE}GetTrustBundle")
        return certificate

    def deny(
        self,
        transaction: Transaction,
        targets: Sequence[enrollment_pb2.Certificate],
        reason: str,
        principal: str,
        *,
        above: int = 0,
    ) -> Denials | None:
        """Deny certificates by their serial numbers.

        By serial and not by identity and time: clocks differ, and the certificate that replaces a denied one must be
        good at once.

        Returns:
            The new list, to be published after the commit; None if all were denied already.
        """
        fresh = [
            target
            for target in targets
            if target.status.state != enrollment_pb2.CERTIFICATE_STATE_REVOKED
            and target.status.expire_time.ToDatetime(dt.UTC) > _now()
        ]
        if not fresh:
            return None
        for certificate in fresh:
            before = certificate.generation
            certificate.status.state = enrollment_pb2.CERTIFICATE_STATE_REVOKED
            certificate.status.revoke_time.FromDatetime(_now())
            certificate.status.revoke_reason = reason
            resources.touch(certificate)
            transaction.put(KIND, certificate, cause=f"{_CAUSE}RevokeCertificate", old_generation=before)
            who = certificate.status.identity or f"the serial number {certificate.status.serial_number}"
            transaction.event(
                watch_pb2.Event(
                    resource=certificate.name,
                    uid=certificate.uid,
                    type=watch_pb2.EVENT_TYPE_CERTIFICATE_REVOKED,
                    time=certificate.update_time,
                    reason="REVOKED",
                    message=f"{who} by {principal}: {reason or 'no reason given'}",
                )
            )
        return self._denial_list.add(
            transaction,
            [
                enrollment_pb2.DeniedCertificate(
                    serial_number=certificate.status.serial_number, expire_time=certificate.status.expire_time
                )
                for certificate in fresh
            ],
            above=above,
        )


def _note_newest(transaction: Transaction, certificate: enrollment_pb2.Certificate) -> None:
    """Note a certificate as the newest of its identity unless another one ends later."""
    identity_ = certificate.status.identity
    known = transaction.get_record(_NEWEST, identity_)
    row = transaction.get(known.decode()) if known is not None else None
    if row is not None:
        other = enrollment_pb2.Certificate.FromString(row.body).status.expire_time
        if other.ToNanoseconds() > certificate.status.expire_time.ToNanoseconds():
            return
    transaction.put_record(_NEWEST, identity_, certificate.name.encode())


def _take_from_newest(transaction: Transaction, certificate: enrollment_pb2.Certificate) -> bool:
    """Forget that a certificate is the newest of its identity; tells whether it was."""
    if transaction.get_record(_NEWEST, certificate.status.identity) != certificate.name.encode():
        return False
    return transaction.delete_record(_NEWEST, certificate.status.identity)


def _is_ending(certificate: enrollment_pb2.Certificate, now: dt.datetime) -> bool:
    ends = certificate.status.expire_time.ToDatetime(dt.UTC)
    life = ends - certificate.status.begin_time.ToDatetime(dt.UTC)
    return ends - now < life * _ENDING_RATIO


def _ending(certificate: enrollment_pb2.Certificate, now: dt.datetime) -> watch_pb2.Event:
    ends = certificate.status.expire_time.ToDatetime(dt.UTC)
    event = watch_pb2.Event(
        resource=certificate.name,
        uid=certificate.uid,
        type=watch_pb2.EVENT_TYPE_CERTIFICATE_EXPIRING,
        reason="NOT_RENEWED",
        message=f"{certificate.status.identity} ends at {ends:%Y-%m-%d %H:%M:%S} UTC and has not been renewed",
    )
    event.time.FromDatetime(now)
    return event


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)

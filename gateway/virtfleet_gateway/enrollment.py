"""Who belongs to the fleet: join tokens, admission of nodes, certificates and their end.

Everything is decided inside one transaction of the gateway's store, signatures included (a tenth of a millisecond
each), so a
token is used once however many nodes try it at the same moment, and a crash leaves either nothing or all of it.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import random
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from virtfleet.fleet.v1 import enrollment_pb2, node_pb2, watch_pb2
from virtfleet_gateway.authority import NODE_SERVICES, Authority, Certificate
from virtfleet_service import names, requests, resources
from virtfleet_service.denial import Denials, public_key_sha256
from virtfleet_service.errors import (
    FieldConflict,
    FieldOutOfRange,
    JoinTokenInvalid,
    NameMalformed,
    PermissionMissing,
    ResourceExists,
    ResourceNotFound,
    WrongState,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from virtfleet_service.call import Call
    from virtfleet_service.store import Store, Transaction

TOKEN_LIFETIME = dt.timedelta(hours=1)
NODE_LIFETIME = dt.timedelta(hours=24)
USER_LIFETIME = dt.timedelta(days=90)
LISTED_AFTER_END = dt.timedelta(days=1)
"""How long ended tokens and certificates stay listed, and denied ones on the denial list."""

_CAUSE = "virtfleet.fleet.v1.EnrollmentService."
_NODE_PREFIX = "nodes/"


@dataclass(frozen=True, slots=True)
class Terms:
    """Is what every member is told and given.

    Attributes:
        gateway_endpoints: Where members reach gateways, `host:port`.
        gateway_identities: Whose word about callers nodes take.
        node_lifetime: How long a node's certificate is good.
        denied_file: Where this gateway keeps the denial list that its own server obeys.
    """

    gateway_endpoints: tuple[str, ...]
    gateway_identities: tuple[str, ...]
    denied_file: Path
    node_lifetime: dt.timedelta = NODE_LIFETIME


@dataclass(slots=True)
class _Signed:
    """Carries the denial list out of the transaction that made it."""

    denials: Denials | None = field(default=None)


class Enrollment:
    """Admits, renews and expels, in the store of a gateway.

    Args:
        store: The gateway's store.
        authority: What signs.
        terms: What members are told.
        denials_changed: Is called after the denial list has changed and its file is written.
    """

    def __init__(
        self, store: Store, authority: Authority, terms: Terms, *, denials_changed: Callable[[], object]
    ) -> None:
        self._store = store
        self._authority = authority
        self._terms = terms
        self._denials_changed = denials_changed
        self._ca_digest = hashlib.sha256(authority.certificate_pem).hexdigest()

    # ---- join tokens -------------------------------------------------------------------------------------------

    async def create_join_token(
        self, request: enrollment_pb2.CreateJoinTokenRequest, call: Call
    ) -> enrollment_pb2.JoinToken:
        """Make a token; the answer alone holds its secret.

        What is remembered for a repetition of the call lacks the secret, as everything that is stored does: a
        repetition is refused.

        Raises:
            NameMalformed: The node or the id has a wrong form.
            ResourceExists: A token of that id exists, or the call is a repetition.
        """
        node = _node_id(request.join_token.spec.node, "join_token.spec.node")
        secret = secrets.token_urlsafe(32)
        token = enrollment_pb2.JoinToken(
            display_name=request.join_token.display_name,
            labels=request.join_token.labels,
            annotations=request.join_token.annotations,
        )
        token_id = request.join_token_id or f"t-{secrets.token_hex(8)}"
        resources.create_head(token, f"joinTokens/{names.check_id(token_id, 'join_token_id')}")
        token.spec.node = f"{_NODE_PREFIX}{node}"
        lifetime = request.join_token.spec.lifetime
        token.spec.lifetime.CopyFrom(lifetime)
        ends = _now() + (lifetime.ToTimedelta() if request.join_token.spec.HasField("lifetime") else TOKEN_LIFETIME)
        token.status.state = enrollment_pb2.JOIN_TOKEN_STATE_ACTIVE
        token.status.expire_time.FromDatetime(ends)
        token.status.ca_key_sha256 = self._authority.key_hash
        if request.validate_only:
            return token

        made = False

        def work(transaction: Transaction) -> enrollment_pb2.JoinToken:
            nonlocal made
            self._forget_old_tokens(transaction)
            if transaction.get(token.name) is not None:
                raise ResourceExists(f"{token.name} exists", resource=token.name)
            transaction.put("join_token", token, cause=f"{_CAUSE}CreateJoinToken")
            transaction.put_record("tokenHash", _hash(secret), token.name.encode())
            made = True
            return token

        kept = await requests.once(self._store, call, request, work)
        if not made:
            raise ResourceExists(
                f"{kept.name} was made by the first of these calls; its secret was in that answer alone",
                resource=kept.name,
            )
        answer = enrollment_pb2.JoinToken()
        answer.CopyFrom(token)
        answer.token = f"vf1.{node}.{secret}.{self._authority.key_hash}"
        return answer

    def delete_join_token(
        self, transaction: Transaction, request: enrollment_pb2.DeleteJoinTokenRequest
    ) -> enrollment_pb2.DeleteJoinTokenResponse:
        """Forget a token, inside a transaction that remembers the request_id.

        Raises:
            ResourceNotFound: There is none, and `allow_missing` is not set.
        """
        row = transaction.get(request.name)
        if row is None or row.kind != "join_token":
            if request.allow_missing:
                return enrollment_pb2.DeleteJoinTokenResponse()
            raise ResourceNotFound(f"there is no {request.name}", resource=request.name)
        token = enrollment_pb2.JoinToken.FromString(row.body)
        resources.check_preconditions(token, etag=request.etag, expected_uid=request.expected_uid)
        if not request.validate_only:
            self._delete_token(transaction, token, cause=f"{_CAUSE}DeleteJoinToken")
        return enrollment_pb2.DeleteJoinTokenResponse()

    @staticmethod
    def _delete_token(transaction: Transaction, token: enrollment_pb2.JoinToken, *, cause: str) -> None:
        transaction.delete(token.name, cause=cause)
        for key, body in transaction.list_records("tokenHash"):
            if body.decode() == token.name:
                transaction.delete_record("tokenHash", key)
                transaction.delete_record("admission", key)

    def _forget_old_tokens(self, transaction: Transaction) -> None:
        for row in transaction.list("join_token"):
            token = enrollment_pb2.JoinToken.FromString(row.body)
            if token.status.expire_time.ToDatetime(dt.UTC) + LISTED_AFTER_END < _now():
                self._delete_token(transaction, token, cause="expired")

    # ---- nodes -------------------------------------------------------------------------------------------------

    async def enroll_node(self, request: enrollment_pb2.EnrollNodeRequest) -> enrollment_pb2.EnrollNodeResponse:
        """Admit a node for a token.

        Raises:
            JoinTokenInvalid: The token is unknown, used with other keys, expired, or of another node.
            DocumentInvalid: A request for a certificate is refused.
            FieldConflict: A service occurs twice.
        """
        node = _node_id(request.name, "name")
        services = [service.service for service in request.services]
        if len(set(services)) != len(services):
            raise FieldConflict("each service may occur once", field="services")
        parts = request.token.split(".")
        if len(parts) != 4 or parts[0] != "vf1":
            raise JoinTokenInvalid("this is no join token")
        digest = _hash(parts[2])
        requests_digest = _hash(
            "\n".join(f"{service.service} {service.certificate_request}" for service in request.services)
        )
        out = _Signed()

        def work(transaction: Transaction) -> enrollment_pb2.EnrollNodeResponse:
            token = self._usable_token(transaction, digest, node, parts[1])
            if token.status.state == enrollment_pb2.JOIN_TOKEN_STATE_USED:
                kept = transaction.get_record("admission", digest)
                if kept is None or not hmac.compare_digest(kept[:64], requests_digest.encode()):
                    raise JoinTokenInvalid("the join token has been used", node=node)
                return enrollment_pb2.EnrollNodeResponse.FromString(kept[64:])
            issued = [
                self._authority.issue_node(
                    service.certificate_request.encode(), node, service.service, self._terms.node_lifetime
                )
                for service in request.services
            ]
            if request.validate_only:
                return enrollment_pb2.EnrollNodeResponse()
            # A machine that joins under a known name takes its place: what the old one held is worth nothing now.
            out.denials = self._deny(transaction, self._certificates_of(transaction, node), "joined anew", "enrolment")
            answer = enrollment_pb2.EnrollNodeResponse(
                gateway_identities=self._terms.gateway_identities, gateway_endpoints=self._terms.gateway_endpoints
            )
            answer.node.CopyFrom(self._put_node(transaction, node, request))
            for service, certificate in zip(request.services, issued, strict=True):
                self._record(transaction, certificate, node=node, principal="enrolment", renewed=False)
                answer.certificates.append(self._issued(certificate, service.service))
            answer.trust_bundle.CopyFrom(self._bundle(transaction.get_record("denials", "signed")))
            token.status.state = enrollment_pb2.JOIN_TOKEN_STATE_USED
            token.status.use_time.FromDatetime(_now())
            transaction.put("join_token", token, cause=f"{_CAUSE}EnrollNode")
            transaction.put_record("admission", digest, requests_digest.encode() + answer.SerializeToString())
            return answer

        answer = await self._store.write(work)
        self._publish(out)
        return answer

    @staticmethod
    def _usable_token(transaction: Transaction, digest: str, node: str, named: str) -> enrollment_pb2.JoinToken:
        name = transaction.get_record("tokenHash", digest)
        row = transaction.get(name.decode()) if name is not None else None
        if row is None:
            raise JoinTokenInvalid("the join token is unknown", node=node)
        token = enrollment_pb2.JoinToken.FromString(row.body)
        if token.spec.node != f"{_NODE_PREFIX}{node}" or named != node:
            raise JoinTokenInvalid("the join token is of another node", node=node)
        if token.status.expire_time.ToDatetime(dt.UTC) <= _now():
            raise JoinTokenInvalid("the join token has expired", node=node)
        return token

    @staticmethod
    def _put_node(transaction: Transaction, node_id: str, request: enrollment_pb2.EnrollNodeRequest) -> node_pb2.Node:
        node = node_pb2.Node()
        row = transaction.get(request.name)
        if row is not None:
            node.ParseFromString(row.body)
        else:
            resources.create_head(node, f"{_NODE_PREFIX}{node_id}")
            node.display_name = node_id
            node.labels.update(request.labels)
            node.spec.schedulable = True
        node.status.state = node_pb2.NODE_STATE_JOINING
        node.status.reason = "ENROLLED"
        node.status.state_change_time.FromDatetime(_now())
        node.status.observed_generation = node.generation
        node.status.boot_id = request.boot_id
        del node.status.services[:]
        for service in request.services:
            node.status.services.add(service=service.service, endpoint=service.endpoint, version=request.version)
        transaction.put("node", node, cause=f"{_CAUSE}EnrollNode", old_generation=node.generation if row else 0)
        transaction.event(
            watch_pb2.Event(
                resource=node.name,
                uid=node.uid,
                type=watch_pb2.EVENT_TYPE_NODE_JOINED,
                time=node.status.state_change_time,
                reason="ENROLLED",
                message=f"{node.name} has joined with {len(request.services)} services",
            )
        )
        return node

    # ---- certificates ------------------------------------------------------------------------------------------

    def renew(
        self, transaction: Transaction, request: enrollment_pb2.RenewCertificateRequest, call: Call
    ) -> enrollment_pb2.RenewCertificateResponse:
        """Issue a new certificate for the caller's own identity, in a transaction that remembers the request_id.

        Raises:
            PermissionMissing: The call names a certificate of another identity.
            WrongState: The identity is a user's.
            DocumentInvalid: The request for a certificate is refused.
        """
        subject = call.peer.uri if call.peer is not None else ""
        prefix = f"spiffe://{self._authority.trust_domain}/node/"
        parts = subject.removeprefix(prefix).split("/")
        if not subject.startswith(prefix) or len(parts) != 2 or parts[1] not in NODE_SERVICES:
            raise WrongState("only services of nodes renew their certificates themselves", subject=subject)
        node, service = parts
        if request.name:
            row = transaction.get(request.name)
            if row is None:
                raise ResourceNotFound(f"there is no {request.name}", resource=request.name)
            if enrollment_pb2.Certificate.FromString(row.body).status.identity != subject:
                raise PermissionMissing(
                    f"{request.name} is not of {subject}", resource=request.name, permission="certificates.renew"
                )
        certificate = self._authority.issue_node(
            request.certificate_request.encode(), node, service, self._terms.node_lifetime
        )
        answer = enrollment_pb2.RenewCertificateResponse()
        if request.validate_only:
            return answer
        self._forget_old_certificates(transaction)
        self._record(transaction, certificate, node=node, principal=subject, renewed=True)
        if request.endpoint:
            self._move_service(transaction, f"{_NODE_PREFIX}{node}", service, request.endpoint)
        answer.certificate.CopyFrom(self._issued(certificate, service))
        answer.trust_bundle.CopyFrom(self._bundle(transaction.get_record("denials", "signed")))
        return answer

    @staticmethod
    def _move_service(transaction: Transaction, name: str, service: str, endpoint: str) -> None:
        row = transaction.get(name)
        if row is None:
            raise ResourceNotFound(f"there is no {name}", resource=name)
        node = node_pb2.Node.FromString(row.body)
        for known in node.status.services:
            if known.service == service and known.endpoint != endpoint:
                known.endpoint = endpoint
                transaction.put("node", node, cause=f"{_CAUSE}RenewCertificate", old_generation=node.generation)

    def issue_user(
        self, transaction: Transaction, request: enrollment_pb2.IssueUserCertificateRequest, call: Call
    ) -> enrollment_pb2.IssueUserCertificateResponse:
        """Issue a certificate for a person or controller, inside a transaction that remembers the request_id.

        Raises:
            PermissionMissing: The caller gives a role that they do not have.
            DocumentInvalid: The request for a certificate is refused.
            FieldOutOfRange: A role is unknown.
        """
        names.check_id(request.user, "user")
        for role in request.roles:
            if role not in ("viewer", "operator", "admin"):
                raise FieldOutOfRange(f"there is no role {role!r}", field="roles", role=role)
            if role not in call.caller.roles and "admin" not in call.caller.roles:
                raise PermissionMissing(
                    f"{call.caller.subject} cannot give the role {role}", permission="certificates.create", role=role
                )
        lifetime = request.lifetime.ToTimedelta() if request.HasField("lifetime") else USER_LIFETIME
        certificate = self._authority.issue_user(
            request.certificate_request.encode(), request.user, request.roles, lifetime
        )
        answer = enrollment_pb2.IssueUserCertificateResponse()
        if request.validate_only:
            return answer
        self._forget_old_certificates(transaction)
        self._record(transaction, certificate, roles=request.roles, principal=call.caller.subject, renewed=False)
        answer.certificate.CopyFrom(self._issued(certificate, ""))
        answer.trust_bundle.CopyFrom(self._bundle(transaction.get_record("denials", "signed")))
        return answer

    async def revoke(self, request: enrollment_pb2.RevokeCertificateRequest, call: Call) -> enrollment_pb2.Certificate:
        """Put a certificate, or all of its identity, on the denial list.

        Raises:
            ResourceNotFound: There is no such certificate.
            EtagMismatch: It has changed.
        """
        out = _Signed()

        def work(transaction: Transaction) -> enrollment_pb2.Certificate:
            row = transaction.get(request.name)
            if row is None or row.kind != "certificate":
                raise ResourceNotFound(f"there is no {request.name}", resource=request.name)
            certificate = enrollment_pb2.Certificate.FromString(row.body)
            resources.check_preconditions(certificate, etag=request.etag, expected_uid=request.expected_uid)
            targets = [certificate]
            if request.whole_identity:
                targets = [
                    other
                    for other in self._certificates(transaction)
                    if other.status.identity == certificate.status.identity
                ]
            if request.validate_only:
                certificate.status.state = enrollment_pb2.CERTIFICATE_STATE_REVOKED
                return certificate
            out.denials = self._deny(transaction, targets, request.reason, call.caller.subject)
            row = transaction.get(request.name)
            return enrollment_pb2.Certificate.FromString(row.body) if row is not None else certificate

        answer = await requests.once(self._store, call, request, work)
        self._publish(out)
        return answer

    async def expel(self, node: str, principal: str) -> None:
        """Deny every certificate of a node that has been removed."""
        out = _Signed()

        def work(transaction: Transaction) -> None:
            out.denials = self._deny(transaction, self._certificates_of(transaction, node), "node removed", principal)

        await self._store.write(work)
        self._publish(out)

    def restore_file(self) -> None:
        """Write the denial list of the store to its file; at start, when a crash may have left an old one.

        Raises:
            OSError: The file cannot be written.
        """
        signed = self._store.get_record("denials", "signed")
        if signed is not None:
            document = enrollment_pb2.SignedDenialList.FromString(signed)
            Denials(enrollment_pb2.DenialList.FromString(document.content), document).save(self._terms.denied_file)

    def trust_bundle(self, request: enrollment_pb2.GetTrustBundleRequest) -> enrollment_pb2.TrustBundle:
        """Return the CA certificates and the denial list, each only if the caller has another one."""
        bundle = self._bundle(self._store.get_record("denials", "signed"))
        if request.known_ca_digest == bundle.ca_digest:
            del bundle.ca_certificates[:]
        if request.known_denial_list_number == bundle.denial_list_number:
            bundle.ClearField("denial_list")
        return bundle

    # ---- inside ------------------------------------------------------------------------------------------------

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

    def _issued(self, certificate: Certificate, service: str) -> enrollment_pb2.IssuedCertificate:
        issued = enrollment_pb2.IssuedCertificate(
            service=service,
            certificate_chain=certificate.pem.decode(),
            certificate=f"certificates/c{certificate.serial}",
            identity=certificate.subject,
        )
        issued.expire_time.FromDatetime(certificate.not_after)
        life = certificate.not_after - _now()
        issued.renew_time.FromDatetime(_now() + life * random.uniform(0.45, 0.55))  # noqa: S311  # spread
        return issued

    def _record(
        self,
        transaction: Transaction,
        certificate: Certificate,
        *,
        principal: str,
        renewed: bool,
        node: str = "",
        roles: Sequence[str] = (),
    ) -> None:
        """Write down a certificate that has been issued."""
        parsed = x509.load_pem_x509_certificate(certificate.pem)
        resource = enrollment_pb2.Certificate(display_name=certificate.subject.rsplit("/", 1)[-1])
        resources.create_head(resource, f"certificates/c{certificate.serial}")
        status = resource.status
        status.state = enrollment_pb2.CERTIFICATE_STATE_VALID
        status.kind = enrollment_pb2.CERTIFICATE_KIND_NODE if node else enrollment_pb2.CERTIFICATE_KIND_USER
        status.identity = certificate.subject
        status.serial_number = certificate.serial
        status.begin_time.FromDatetime(parsed.not_valid_before_utc)
        status.expire_time.FromDatetime(certificate.not_after)
        status.roles.extend(roles)
        status.node = f"{_NODE_PREFIX}{node}" if node else ""
        status.principal = principal
        status.fingerprint_sha256 = parsed.fingerprint(hashes.SHA256()).hex()
        transaction.put("certificate", resource, cause=f"{_CAUSE}{'RenewCertificate' if renewed else 'EnrollNode'}")
        kind = watch_pb2.EVENT_TYPE_CERTIFICATE_RENEWED if renewed else watch_pb2.EVENT_TYPE_CERTIFICATE_ISSUED
        transaction.event(
            watch_pb2.Event(
                resource=resource.name,
                uid=resource.uid,
                type=kind,
                time=resource.create_time,
                reason="RENEWED" if renewed else "ISSUED",
                message=f"{certificate.subject}, good until {certificate.not_after:%Y-%m-%d %H:%M:%S} UTC",
            )
        )

    @staticmethod
    def _certificates(transaction: Transaction) -> list[enrollment_pb2.Certificate]:
        return [enrollment_pb2.Certificate.FromString(row.body) for row in transaction.list("certificate")]

    def _certificates_of(self, transaction: Transaction, node: str) -> list[enrollment_pb2.Certificate]:
        name = f"{_NODE_PREFIX}{node}"
        return [certificate for certificate in self._certificates(transaction) if certificate.status.node == name]

    def _forget_old_certificates(self, transaction: Transaction) -> None:
        limit = _now() - LISTED_AFTER_END
        for certificate in self._certificates(transaction):
            if certificate.status.expire_time.ToDatetime(dt.UTC) < limit:
                transaction.delete(certificate.name, cause="expired")

    def _deny(
        self,
        transaction: Transaction,
        targets: Sequence[enrollment_pb2.Certificate],
        reason: str,
        principal: str,
    ) -> Denials | None:
        """Deny certificates by their serial numbers and sign the new list.

        By serial and not by identity and time: clocks differ, and the certificate that replaces a denied one must be
        good at once.

        Returns:
            The new list; None if all were denied already.
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
            transaction.put("certificate", certificate, cause=f"{_CAUSE}RevokeCertificate", old_generation=before)
            transaction.event(
                watch_pb2.Event(
                    resource=certificate.name,
                    uid=certificate.uid,
                    type=watch_pb2.EVENT_TYPE_CERTIFICATE_REVOKED,
                    time=certificate.update_time,
                    reason="REVOKED",
                    message=f"{certificate.status.identity} by {principal}: {reason or 'no reason given'}",
                )
            )
        signed = transaction.get_record("denials", "signed")
        previous = enrollment_pb2.DenialList()
        if signed is not None:
            previous.ParseFromString(enrollment_pb2.SignedDenialList.FromString(signed).content)
        content = enrollment_pb2.DenialList(number=previous.number + 1)
        content.create_time.FromDatetime(_now())
        limit = _now() - LISTED_AFTER_END
        entries = {
            entry.serial_number: entry
            for entry in previous.certificates
            if entry.expire_time.ToDatetime(dt.UTC) > limit
        }
        for certificate in fresh:
            entries[certificate.status.serial_number] = enrollment_pb2.DeniedCertificate(
                serial_number=certificate.status.serial_number, expire_time=certificate.status.expire_time
            )
        content.certificates.extend(entries[serial] for serial in sorted(entries))
        serialised = content.SerializeToString()
        document = enrollment_pb2.SignedDenialList(
            content=serialised,
            signature=self._authority.sign(serialised),
            key_sha256=public_key_sha256(x509.load_pem_x509_certificate(self._authority.certificate_pem)),
        )
        transaction.put_record("denials", "signed", document.SerializeToString())
        return Denials(content, document)

    def _publish(self, out: _Signed) -> None:
        if out.denials is not None:
            out.denials.save(self._terms.denied_file)
            self._denials_changed()


def _node_id(name: str, path: str) -> str:
    """Return the id in `nodes/{node}`."""
    node = name.removeprefix(_NODE_PREFIX)
    if not name.startswith(_NODE_PREFIX) or not names.is_id(node):
        raise NameMalformed(f"{path} must be nodes/ and an id", field=path)
    return node


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)

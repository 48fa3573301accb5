"""Who belongs to the fleet: admission of nodes, and the certificates that they and people are given.

Everything is decided inside one transaction of the gateway's store, signatures included (a tenth of a millisecond
each), so a token is used once however many nodes try it at the same moment, and a crash leaves either nothing or all
of it.
"""

from __future__ import annotations

import datetime as dt
import hmac
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from virtfleet.fleet.v1 import enrollment_pb2, node_pb2, watch_pb2
from virtfleet_gateway.authority import NODE_SERVICES, Authority, Certificate
from virtfleet_gateway.join_tokens import NODE_PREFIX, JoinTokens, node_id, secret_hash
from virtfleet_service import failpoints, names, resources
from virtfleet_service.errors import (
    CertificateRevoked,
    FieldConflict,
    FieldOutOfRange,
    JoinTokenInvalid,
    NodeUnknown,
    PermissionMissing,
    ResourceNotFound,
    WrongState,
)

if TYPE_CHECKING:
    from virtfleet_gateway.certificates import Certificates
    from virtfleet_gateway.denial_list import DenialList
    from virtfleet_service.call import Call
    from virtfleet_service.denial import Denials
    from virtfleet_service.store import Store, Transaction

NODE_LIFETIME = dt.timedelta(hours=24)
USER_LIFETIME = dt.timedelta(days=90)

_CAUSE = "virtfleet.fleet.v1.EnrollmentService."


@dataclass(frozen=True, slots=True)
class Terms:
    """Is what every member is told and given.

    Attributes:
        gateway_endpoints: Where members reach gateways, `host:port`.
        gateway_identities: Whose word about callers nodes take.
        node_lifetime: How long a node's certificate is good.
    """

    gateway_endpoints: tuple[str, ...]
    gateway_identities: tuple[str, ...]
    node_lifetime: dt.timedelta = NODE_LIFETIME


@dataclass(slots=True)
class _Signed:
    """Carries the denial list out of the transaction that made it."""

    denials: Denials | None = field(default=None)


class Enrollment:
    """Admits nodes and issues certificates, in the store of a gateway.

    Args:
        store: The gateway's store.
        authority: What signs.
        terms: What members are told.
        certificates: Records what is issued.
        denial_list: Takes what a node held that joins anew.
    """

    def __init__(
        self, store: Store, authority: Authority, terms: Terms, certificates: Certificates, denial_list: DenialList
    ) -> None:
        self._store = store
        self._authority = authority
        self._terms = terms
        self._certificates = certificates
        self._denial_list = denial_list

    async def enroll_node(self, request: enrollment_pb2.EnrollNodeRequest) -> enrollment_pb2.EnrollNodeResponse:
        """Admit a node for a token.

        Raises:
            JoinTokenInvalid: The token is unknown, used with other keys, expired, or of another node.
            DocumentInvalid: A request for a certificate is refused.
            FieldConflict: A service occurs twice.
        """
        node = node_id(request.name, "name")
        services = [service.service for service in request.services]
        if len(set(services)) != len(services):
            raise FieldConflict("each service may occur once", field="services")
        parts = request.token.split(".")
        if len(parts) != 4 or parts[0] != "vf1" or not all(parts):
            raise JoinTokenInvalid("this is no join token")
        digest = secret_hash(parts[2])
        requests_digest = secret_hash(
            "\n".join(f"{service.service} {service.certificate_request}" for service in request.services)
        )
        out = _Signed()

        def work(transaction: Transaction) -> enrollment_pb2.EnrollNodeResponse:
            token = JoinTokens.usable(transaction, digest, node, parts[1])
            if token.status.state == enrollment_pb2.JOIN_TOKEN_STATE_USED:
                kept = transaction.get_record("admission", digest)
                if kept is None or not hmac.compare_digest(kept[:64], requests_digest.encode()):
                    raise JoinTokenInvalid("the join token has been used", node=f"nodes/{node}")
                return enrollment_pb2.EnrollNodeResponse.FromString(kept[64:])
            issued = [
                self._authority.issue_node(
                    service.certificate_request.encode(),
                    node,
                    service.service,
                    self._terms.node_lifetime,
                    field=f"services[{index}].certificate_request",
                )
                for index, service in enumerate(request.services)
            ]
            if request.validate_only:
                return enrollment_pb2.EnrollNodeResponse()
            # A machine that joins under a known name takes its place: what the old one held is worth nothing now.
            out.denials = self._certificates.deny(
                transaction, self._certificates.of_node(transaction, node), "joined anew", "enrolment"
            )
            answer = enrollment_pb2.EnrollNodeResponse(
                gateway_identities=self._terms.gateway_identities, gateway_endpoints=self._terms.gateway_endpoints
            )
            answer.node.CopyFrom(self._put_node(transaction, node, request))
            for service, certificate in zip(request.services, issued, strict=True):
                self._certificates.record(transaction, certificate.pem, principal="enrolment", method="EnrollNode")
                answer.certificates.append(self._issued(certificate, service.service))
            answer.trust_bundle.CopyFrom(self._denial_list.bundle_in(transaction))
            token.status.state = enrollment_pb2.JOIN_TOKEN_STATE_USED
            token.status.use_time.FromDatetime(_now())
            transaction.put("join_token", token, cause=f"{_CAUSE}EnrollNode")
            transaction.put_record("admission", digest, requests_digest.encode() + answer.SerializeToString())
            return answer

        answer = await self._store.write(work)
        failpoints.reach("enrollment.recorded")
        self._denial_list.publish(out.denials)
        return answer

    @staticmethod
    def _put_node(transaction: Transaction, id_: str, request: enrollment_pb2.EnrollNodeRequest) -> node_pb2.Node:
        node = node_pb2.Node()
        row = transaction.get(request.name)
        if row is not None:
            node.ParseFromString(row.body)
        else:
            resources.create_head(node, f"{NODE_PREFIX}{id_}")
            node.display_name = id_
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

    def renew(
        self, transaction: Transaction, request: enrollment_pb2.RenewCertificateRequest, call: Call
    ) -> enrollment_pb2.RenewCertificateResponse:
        """Issue a new certificate for the caller's own identity, in a transaction that remembers the request_id.

        Raises:
            PermissionMissing: The call names a certificate of another identity.
            WrongState: The identity is a user's.
            CertificateRevoked: It has been denied since the call came in.
            NodeUnknown: The fleet has no such node any more.
            DocumentInvalid: The request for a certificate is refused.
        """
        subject = call.peer.uri if call.peer is not None else ""
        prefix = f"spiffe://{self._authority.trust_domain}/node/"
        parts = subject.removeprefix(prefix).split("/")
        if not subject.startswith(prefix) or len(parts) != 2 or parts[1] not in NODE_SERVICES:
            raise WrongState("only services of nodes renew their certificates themselves", subject=subject)
        node, service = parts
        # Here and not only before: a node that is being removed, and renews all the time, must not have the last word.
        if call.peer is not None and self._denial_list.current_in(transaction).denies(
            call.peer.serial_number, call.peer.uri, call.peer.not_before
        ):
            raise CertificateRevoked(f"the certificate of `{subject}` has been revoked", subject=subject)
        if transaction.get(f"{NODE_PREFIX}{node}") is None:
            raise NodeUnknown(f"The fleet has no node {node}: it must join again", node=f"nodes/{node}")
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
        self._certificates.record(transaction, certificate.pem, principal=subject, method="RenewCertificate")
        if request.endpoint:
            self._move_service(transaction, f"{NODE_PREFIX}{node}", service, request.endpoint)
        answer.certificate.CopyFrom(self._issued(certificate, service))
        answer.trust_bundle.CopyFrom(self._denial_list.bundle_in(transaction))
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
        for index, role in enumerate(request.roles):
            if role not in ("viewer", "operator", "admin"):
                raise FieldOutOfRange(f"there is no role {role!r}", field=f"roles[{index}]", role=role)
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
        self._certificates.record(
            transaction, certificate.pem, principal=call.caller.subject, method="IssueUserCertificate"
        )
        answer.certificate.CopyFrom(self._issued(certificate, ""))
        answer.trust_bundle.CopyFrom(self._denial_list.bundle_in(transaction))
        return answer

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


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)

"""Who is at the other end: certificates with SPIFFE ids, local sockets with one role each, conveyed callers."""

from __future__ import annotations

import datetime as dt
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from google.protobuf.message import DecodeError

from virtfleet.node.v1 import caller_pb2
from virtfleet_service.call import Caller
from virtfleet_service.errors import CertificateRevoked, CredentialsInvalid, PermissionMissing

if TYPE_CHECKING:
    from collections.abc import Iterable

    from virtfleet_service.authorization import Authorizer
    from virtfleet_service.denial import Denials

USER: Final = "user"
NODE: Final = "node"
GATEWAY: Final = "gateway"
ROLE_ORGANISATION_PREFIX: Final = "virtfleet:"
"""A user's certificate carries each of its roles as an organisation of its subject: `O=virtfleet:operator`."""

_CACHE_LIMIT: Final = 1024


@dataclass(frozen=True, slots=True)
class Identity:
    """Is what a certificate says about its holder.

    Attributes:
        uri: `spiffe://{trust domain}/user/{name}`, `…/node/{node}/{service}`, `…/gateway/{name}`.
        kind: `user`, `node` or `gateway`.
        name: The user, node or gateway.
        service: The service of the node; empty for others.
        roles: The roles in its subject.
        serial_number: In lower-case hexadecimal digits.
        not_before: When it begins.
        not_after_seconds: When it ends, as seconds of the epoch.
    """

    uri: str
    kind: str
    name: str
    service: str
    roles: tuple[str, ...]
    serial_number: str
    not_before: dt.datetime
    not_after_seconds: float


def parse_spiffe(uri: str, trust_domain: str) -> tuple[str, str, str]:
    """Return kind, name and service of a SPIFFE id of the trust domain.

    Raises:
        CredentialsInvalid: It is none, of another trust domain, or of an unknown form.
    """
    parts = urlsplit(uri)
    if parts.scheme != "spiffe" or parts.query or parts.fragment:
        raise CredentialsInvalid("the certificate has no SPIFFE id", identity=uri)
    if parts.netloc != trust_domain:
        raise CredentialsInvalid(
            f"the certificate is of the trust domain `{parts.netloc}`, not `{trust_domain}`",
            identity=uri,
            trust_domain=trust_domain,
        )
    match parts.path.split("/")[1:]:
        case [("user" | "gateway") as kind, name] if name:
            return kind, name, ""
        case ["node", name, service] if name and service:
            return NODE, name, service
    raise CredentialsInvalid("the SPIFFE id of the certificate has an unknown form", identity=uri)


def parse_certificate(pem: bytes, trust_domain: str) -> Identity:
    """Read a certificate that TLS has verified.

    Raises:
        CredentialsInvalid: It carries no single SPIFFE id of the trust domain.
    """
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    try:
        certificate = x509.load_pem_x509_certificate(pem)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound) as error:
        raise CredentialsInvalid("the certificate has no subject alternative names that can be read") from error
    uris = [str(uri) for uri in names.get_values_for_type(x509.UniformResourceIdentifier)]
    if len(uris) != 1:
        raise CredentialsInvalid(f"the certificate has {len(uris)} URI names; one SPIFFE id is needed", count=len(uris))
    kind, name, service = parse_spiffe(uris[0], trust_domain)
    organisations = [
        str(attribute.value) for attribute in certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    ]
    return Identity(
        uri=uris[0],
        kind=kind,
        name=name,
        service=service,
        roles=tuple(
            organisation.removeprefix(ROLE_ORGANISATION_PREFIX)
            for organisation in organisations
            if organisation.startswith(ROLE_ORGANISATION_PREFIX)
        )
        if kind == USER
        else (),
        serial_number=f"{certificate.serial_number:x}",
        not_before=certificate.not_valid_before_utc,
        not_after_seconds=certificate.not_valid_after_utc.timestamp(),
    )


class _Known:
    """Is a certificate that has been read, with the caller that it makes."""

    __slots__ = ("caller", "identity", "passed")

    def __init__(self, identity: Identity, caller: Caller) -> None:
        self.identity = identity
        self.caller = caller
        # The denial list that it has passed; compared by object, so that the usual call costs one comparison.
        self.passed: Denials | None = None


class Authenticator:
    """Finds out who calls; what certificates say is cached by their bytes.

    Args:
        trust_domain: The trust domain of the fleet.
        authorizer: Adds the roles of the policy file.
        node_role: The role of callers with a node's certificate; empty: they are refused.
        gateways: Whose word about callers is taken: SPIFFE ids, or prefixes that end with `/`; empty: all gateways'.
    """

    def __init__(
        self, trust_domain: str, authorizer: Authorizer, *, node_role: str = "", gateways: tuple[str, ...] = ()
    ) -> None:
        self._trust_domain = trust_domain
        self._authorizer = authorizer
        self._node_role = node_role
        self._gateways = gateways
        self._known: dict[bytes, _Known] = {}
        self._conveyed: dict[tuple[bytes, str], Caller] = {}
        self.denials: Denials | None = None

    def forget(self) -> None:
        """Drop what is cached, because policy or trust has changed."""
        self._known.clear()
        self._conveyed.clear()

    def by_certificate(self, pem: bytes) -> tuple[Caller, Identity]:
        """Return the caller that a verified certificate makes.

        Raises:
            CredentialsInvalid: The certificate has no identity of the fleet, or has ended.
            CertificateRevoked: It is on the denial list.
            PermissionMissing: It is that of a node, which is no client here.
        """
        known = self._known.get(pem)
        if known is None:
            known = self._read(pem)
        self.recheck(known.identity, known)
        return known.caller, known.identity

    def may_convey(self, identity: Identity) -> bool:
        """Tell whether the word of a peer about its caller is taken."""
        if identity.kind != GATEWAY:
            return False
        return not self._gateways or any(
            identity.uri.startswith(known) if known.endswith("/") else identity.uri == known for known in self._gateways
        )

    def _read(self, pem: bytes) -> _Known:
        identity = parse_certificate(pem, self._trust_domain)
        roles: tuple[str, ...]
        if identity.kind == NODE:
            if not self._node_role:
                raise PermissionMissing(
                    f"`{identity.uri}` is a node, which is no client of this server",
                    subject=identity.uri,
                    permission="servers.call",
                )
            roles = (self._node_role,)
        elif identity.kind == GATEWAY:
            # What a gateway asks for itself (health, watches for its index) reads only; all else it asks for the caller
            # it conveys.
            roles = ("viewer",)
        else:
            roles = self._roles_of(identity)
        if len(self._known) >= _CACHE_LIMIT:
            self._known.clear()
        known = self._known[pem] = _Known(identity, Caller(identity.uri, roles, "tls"))
        return known

    def _roles_of(self, user: Identity) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*user.roles, *self._authorizer.bound_roles(user.uri))))

    def recheck_roles(self, identity: Identity, caller: Caller, permission: str, resource_name: str) -> None:
        """Check again what a policy that was replaced has taken from a user whose call is open.

        Args:
            identity: The certificate of the connection.
            caller: The caller that it made when the call began.
            permission: What the method needs.
            resource_name: What the call is about, for the error.

        Raises:
            PermissionMissing: The caller had it on something that it lacks it on now.
        """
        if identity.kind != USER or not permission or caller.via:
            return
        now = replace(caller, roles=self._roles_of(identity))
        if now.roles != caller.roles and self._authorizer.narrows(caller, now, permission):
            raise self._authorizer.refusal(now, permission, resource_name)

    def recheck(self, identity: Identity, known: _Known | None = None) -> None:
        """Check again what may have changed since the connection was made: time and the denial list.

        Raises:
            CredentialsInvalid: The certificate has ended.
            CertificateRevoked: It is on the denial list.
        """
        if identity.not_after_seconds < time.time():
            ended = dt.datetime.fromtimestamp(identity.not_after_seconds, dt.UTC).isoformat()
            raise CredentialsInvalid(
                f"the certificate of `{identity.uri}` ended at {ended}; connect again with a new one",
                subject=identity.uri,
                expire_time=ended,
            )
        denials = self.denials
        if denials is None or (known is not None and known.passed is denials):
            return
        if denials.denies(identity.serial_number, identity.uri, identity.not_before):
            raise _revoked(identity.uri, identity.serial_number)
        if known is not None:
            known.passed = denials

    def recheck_subject(self, caller: Caller) -> None:
        """Check that a conveyed caller has not been denied since.

        The gateway judges the caller's certificate; here its identity is all that is known, so only a denial without a
        time counts.

        Raises:
            CertificateRevoked: It is on the denial list.
        """
        if self.denials is not None and self.denials.denies("", caller.subject, dt.datetime.max.replace(tzinfo=dt.UTC)):
            raise _revoked(caller.subject, "")

    def conveyed(self, encoded: bytes, transport: str, via: str) -> Caller:
        """Return the caller that a gateway or a service of the same node conveys.

        Args:
            encoded: The serialised `ConveyedCaller`.
            transport: How the call came.
            via: The identity of the gateway; empty: what the message says.

        Raises:
            CredentialsInvalid: It does not parse, or names nobody.
            CertificateRevoked: The caller is on the denial list.
        """
        key = (encoded, via)
        caller = self._conveyed.get(key)
        if caller is None:
            caller = decode_caller(encoded, transport, via)
            if len(self._conveyed) >= _CACHE_LIMIT:
                self._conveyed.clear()
            self._conveyed[key] = caller
        if self.denials is not None:
            self.recheck_subject(caller)
        return caller


def _revoked(subject: str, serial_number: str) -> CertificateRevoked:
    return CertificateRevoked(
        f"the certificate of `{subject}` has been revoked", subject=subject, serial_number=serial_number
    )


def decode_caller(encoded: bytes, transport: str, via: str) -> Caller:
    """Read a conveyed caller.

    Raises:
        CredentialsInvalid: It does not parse, or names nobody.
    """
    try:
        message = caller_pb2.ConveyedCaller.FromString(encoded)
    except DecodeError as error:
        raise CredentialsInvalid("the conveyed caller does not parse") from error
    if not message.subject:
        raise CredentialsInvalid("the conveyed caller has no subject")
    return Caller(message.subject, tuple(message.roles), transport, via or message.via, tuple(message.name_prefixes))


def encode_caller(caller: Caller, *, via: str = "") -> bytes:
    """Return a caller as it is conveyed in metadata.

    Args:
        caller: The caller.
        via: The identity of the gateway that conveys it; empty: what the caller has.
    """
    return caller_pb2.ConveyedCaller(
        subject=caller.subject,
        roles=caller.roles,
        name_prefixes=caller.name_prefixes,
        via=via or caller.via,
    ).SerializeToString(deterministic=True)


@lru_cache(maxsize=8)
def local_caller(role: str) -> Caller:
    """Return the caller of a local socket."""
    return Caller(f"local:{role}", (role,), "unix")


def organisations_of(roles: Iterable[str]) -> list[str]:
    """Return roles as the organisations of a certificate's subject."""
    return [ROLE_ORGANISATION_PREFIX + role for role in roles]

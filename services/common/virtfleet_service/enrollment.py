"""How a node joins its fleet and stays a member of it.

`join` trades a token for certificates, once. `Membership` then renews one service's certificate at half of its life and
fetches the trust bundle every two seconds, so that a revocation is known everywhere within five. Everything is kept in
one directory:

    ca.crt            the certificates of the fleet's authorities
    {service}.crt     the certificate of the service, then what stands between it and the authority
    {service}.key     its private key (0600); it never leaves this machine
    denied            the newest denial list that was seen, signed
    fleet.toml        the node's name, the trust domain, and where gateways are reached

A node without a gateway goes on with what it has.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import os
import random
import socket
import ssl
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from virtfleet.fleet.v1 import enrollment_pb2
from virtfleet_service import durable, files
from virtfleet_service.denial import Denials, public_key_sha256
from virtfleet_service.errors import BackendUnreachable, CredentialsInvalid, DocumentInvalid, JoinTokenInvalid

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

TRUST_BUNDLE_INTERVAL_SECONDS = 2.0
CALL_SECONDS = 10.0
_SERVICE = "/virtfleet.fleet.v1.EnrollmentService/"


@dataclass(frozen=True, slots=True)
class JoinToken:
    """Is a join token taken apart: `vf1.{node}.{secret}.{SHA-256 of the CA's public key}`.

    Attributes:
        text: The whole token.
        node: The only node that may use it.
        ca_key_sha256: Proves the gateway to the node.
    """

    text: str
    node: str
    ca_key_sha256: str

    @classmethod
    def parse(cls, text: str) -> JoinToken:
        """Take a token apart.

        Raises:
            JoinTokenInvalid: It has another form.
        """
        parts = text.strip().split(".")
        if len(parts) != 4 or parts[0] != "vf1" or not all(parts) or len(parts[3]) != 64:
            raise JoinTokenInvalid("this is no join token of virtfleet: vf1.NODE.SECRET.HASH")
        return cls(text=text.strip(), node=parts[1], ca_key_sha256=parts[3])


@dataclass(frozen=True, slots=True)
class Fleet:
    """Is what a member remembers of its fleet (`fleet.toml`).

    Attributes:
        node: The node's id.
        trust_domain: The host part of every identity.
        gateway_endpoints: Where gateways are reached, `host:port`.
        gateway_identities: Whose word about callers is taken, as SPIFFE ids or prefixes that end in `/`.
    """

    node: str
    trust_domain: str
    gateway_endpoints: tuple[str, ...]
    gateway_identities: tuple[str, ...]

    @classmethod
    def load(cls, directory: Path) -> Fleet | None:
        """Read `fleet.toml`; None where the node has not joined.

        Raises:
            OSError: The file cannot be read.
            DocumentInvalid: It is damaged.
        """
        path = directory / "fleet.toml"
        try:
            content = files.read_kept(path)
        except FileNotFoundError:
            return None
        try:
            table = tomllib.loads(content.decode())
            return cls(
                node=_text(table["node"]),
                trust_domain=_text(table["trust_domain"]),
                gateway_endpoints=_texts(table["gateway_endpoints"]),
                gateway_identities=_texts(table["gateway_identities"]),
            )
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DocumentInvalid(f"{path} is damaged ({error!r}): join again with a new token", path=path) from error

    def save(self, directory: Path) -> None:
        """Write `fleet.toml`."""
        lines = [f"node = {_quoted(self.node)}", f"trust_domain = {_quoted(self.trust_domain)}"]
        lines += [
            f"{key} = [{', '.join(map(_quoted, values))}]"
            for key, values in (
                ("gateway_endpoints", self.gateway_endpoints),
                ("gateway_identities", self.gateway_identities),
            )
        ]
        durable.write(directory / "fleet.toml", ("\n".join(lines) + "\n").encode(), mode=0o644)


async def join(
    gateway: str,
    token: JoinToken,
    endpoints: Mapping[str, str],
    directory: Path,
    *,
    version: str = "",
    labels: Mapping[str, str] | None = None,
) -> Fleet:
    """Join a fleet: make the keys, prove both sides to each other, and write the directory.

    A repetition after a lost answer uses the keys that are there and gets the same certificates.

    Args:
        gateway: The enrolment port of a gateway, `host:port`.
        token: The join token.
        endpoints: Where gateways will reach each service of this node: `{"compute": "host:port", …}`.
        directory: Where to keep what the node gets; made if missing (0700).
        version: The release of this node.
        labels: Labels for a node that is new.

    Raises:
        BackendUnreachable: The gateway does not answer.
        CredentialsInvalid: The gateway does not have the key that the token names: it is not the one that made the
            token.
        JoinTokenInvalid: The gateway refuses the token.
        OSError: The directory cannot be written.
    """
    os.makedirs(directory, mode=0o700, exist_ok=True)  # noqa: PTH103  # once, before anything else runs
    authority_pem = await _authority_of(gateway, token)
    request = enrollment_pb2.EnrollNodeRequest(
        name=f"nodes/{token.node}", token=token.text, version=version, boot_id=boot_id(), labels=labels or {}
    )
    for service, endpoint in endpoints.items():
        key = _kept_key(directory / f"{service}.key")
        request.services.add(
            service=service, endpoint=endpoint, certificate_request=_certificate_request(key, service).decode()
        )
    credentials = grpc.ssl_channel_credentials(root_certificates=authority_pem)
    async with grpc.aio.secure_channel(gateway, credentials) as channel:
        enroll = channel.unary_unary(
            f"{_SERVICE}EnrollNode",
            request_serializer=enrollment_pb2.EnrollNodeRequest.SerializeToString,
            response_deserializer=enrollment_pb2.EnrollNodeResponse.FromString,
        )
        try:
            answer = await enroll(request, timeout=CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise JoinTokenInvalid(
                    error.details() or "the gateway refuses the token", node=f"nodes/{token.node}"
                ) from error
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise BackendUnreachable(f"gateway {gateway}: {error.details()}", gateway=gateway) from error
            raise
    for issued in answer.certificates:
        if issued.service not in endpoints:
            raise DocumentInvalid(f"gateway {gateway} has issued a certificate that nobody asked for", gateway=gateway)
        chain = _checked_chain(issued, (directory / f"{issued.service}.key").read_bytes())
        durable.write(directory / f"{issued.service}.crt", chain, mode=0o644)
    take_trust_bundle(answer.trust_bundle, directory)
    fleet = Fleet(
        node=token.node,
        trust_domain=answer.trust_bundle.trust_domain,
        gateway_endpoints=tuple(answer.gateway_endpoints),
        gateway_identities=tuple(answer.gateway_identities),
    )
    # Last: its presence says that the node is a member.
    fleet.save(directory)
    return fleet


def take_trust_bundle(bundle: enrollment_pb2.TrustBundle, directory: Path, *, seen: bool = False) -> bool:
    """Write what is new in a trust bundle.

    A denial list that is not signed by an authority already trusted here, that is not newer, or that sets free what the
    one held here denies changes nothing. New CA certificates are believed because they came over a connection that the
    old ones vouch for.

    Args:
        bundle: The trust bundle.
        directory: Where it is kept.
        seen: Whether the gateway has been given the list that is held here: what its own, newer one has left out then
            is left out for good.

    Returns:
        Whether a file changed.
    """
    changed = False
    if bundle.ca_certificates:
        content = "".join(bundle.ca_certificates).encode()
        path = directory / "ca.crt"
        if not path.exists() or path.read_bytes() != content:
            try:
                x509.load_pem_x509_certificates(content)
            except ValueError as error:
                # Written down it would leave nothing to believe the next bundle by.
                raise DocumentInvalid("the CA certificates in the trust bundle do not parse") from error
            durable.write(path, content, mode=0o644)
            changed = True
    if bundle.HasField("denial_list"):
        authorities = x509.load_pem_x509_certificates((directory / "ca.crt").read_bytes())
        offered = Denials.verify(bundle.denial_list, authorities)
        held = _held(directory, authorities)
        if offered.replaces(held) or (seen and offered.number > held.number):
            offered.save(directory / "denied")
            changed = True
    return changed


def unknown_to_gateway(bundle: enrollment_pb2.TrustBundle, directory: Path) -> enrollment_pb2.SignedDenialList | None:
    """Return the denial list that is held here if the gateway that sent the bundle lacks something of it.

    Its store has then been put back from a copy that is older than the list.
    """
    authorities = x509.load_pem_x509_certificates((directory / "ca.crt").read_bytes())
    held = _held(directory, authorities)
    if bundle.denial_list_number < held.number:
        return held.signed
    if bundle.HasField("denial_list") and held.missing_in(Denials.verify(bundle.denial_list, authorities)):
        return held.signed
    return None


def _held(directory: Path, authorities: list[x509.Certificate]) -> Denials:
    """Return the denial list that is kept; one that is damaged is as good as none: the gateway sends it whole."""
    try:
        return Denials.load(directory / "denied", authorities)
    except DocumentInvalid:
        return Denials.empty()


def _checked_chain(issued: enrollment_pb2.IssuedCertificate, key: bytes) -> bytes:
    """Return a certificate that has been issued (PEM), if it is one of the key; it takes the place of one that serves.

    Raises:
        DocumentInvalid: It is not.
    """
    chain = issued.certificate_chain.encode()
    if not durable.fits(chain, key):
        raise DocumentInvalid(
            f"the certificate that was issued for {issued.service or 'this service'} is not of its key"
        )
    return chain


class Membership:
    """Keeps one service of a node a member: renews its certificate and fetches the trust bundle.

    Args:
        directory: What `join` has written.
        service: The service whose certificate is kept.
        changed: Is called after a file has changed, so that the server reads it at once.
        note: Is told what went wrong, for the log; the next round tries again.
    """

    def __init__(
        self, directory: Path, service: str, *, changed: Callable[[], object], note: Callable[[str], object]
    ) -> None:
        self._directory = directory
        self._service = service
        self._certificate_file = directory / f"{service}.crt"
        self._key_file = directory / f"{service}.key"
        self._changed = changed
        self._note = note
        durable.finish_pair(self._certificate_file, self._key_file)
        self._renew_at = self._planned_renewal()
        self._known_digest = ""
        self._channel: grpc.aio.Channel | None = None
        self._turn = 0

    async def run(self) -> None:
        """Go on until cancelled. Never raises for what a gateway does or does not do."""
        said = ""
        try:
            while True:
                try:
                    await self._round()
                    said = ""
                except (grpc.aio.AioRpcError, DocumentInvalid, OSError, ValueError) as error:
                    text = (
                        f"{error.code().name}: {error.details()}"
                        if isinstance(error, grpc.aio.AioRpcError)
                        else str(error)
                    )
                    if text != said:
                        self._note(f"no trust bundle or no new certificate from the gateway: {text}")
                        said = text
                    await self._forget_channel()
                await asyncio.sleep(TRUST_BUNDLE_INTERVAL_SECONDS * random.uniform(0.9, 1.1))  # noqa: S311  # spread
        finally:
            await self._forget_channel()

    async def _round(self) -> None:
        fleet = Fleet.load(self._directory)
        if fleet is None or not fleet.gateway_endpoints:
            return
        if self._channel is None:
            endpoint = fleet.gateway_endpoints[self._turn % len(fleet.gateway_endpoints)]
            self._turn += 1
            self._channel = grpc.aio.secure_channel(
                endpoint,
                grpc.ssl_channel_credentials(
                    root_certificates=(self._directory / "ca.crt").read_bytes(),
                    private_key=self._key_file.read_bytes(),
                    certificate_chain=self._certificate_file.read_bytes(),
                ),
            )
        refusal: Exception | None = None
        if dt.datetime.now(dt.UTC) >= self._renew_at:
            try:
                await self._renew(self._channel)
                return  # the next round connects with the new certificate
            except (grpc.aio.AioRpcError, DocumentInvalid, OSError) as error:
                # A gateway that can issue nothing (its disk is full) still tells who is denied.
                refusal = error
        await self._fetch_trust_bundle(self._channel)
        if refusal is not None:
            raise refusal

    async def _fetch_trust_bundle(self, channel: grpc.aio.Channel) -> None:
        authorities = x509.load_pem_x509_certificates((self._directory / "ca.crt").read_bytes())
        known = _held(self._directory, authorities).number
        get = channel.unary_unary(
            f"{_SERVICE}GetTrustBundle",
            request_serializer=enrollment_pb2.GetTrustBundleRequest.SerializeToString,
            response_deserializer=enrollment_pb2.TrustBundle.FromString,
        )
        request = enrollment_pb2.GetTrustBundleRequest(
            known_denial_list_number=known, known_ca_digest=self._known_digest
        )
        bundle = await get(request, timeout=CALL_SECONDS)
        changed = take_trust_bundle(bundle, self._directory)
        held = unknown_to_gateway(bundle, self._directory)
        if held is not None:
            self._note("the gateway lacks denials that are known here, as after a restore: it is given them")
            request.denial_list.CopyFrom(held)
            changed = take_trust_bundle(await get(request, timeout=CALL_SECONDS), self._directory, seen=True) or changed
        if changed:
            self._changed()
        self._known_digest = bundle.ca_digest

    async def _renew(self, channel: grpc.aio.Channel) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        renew = channel.unary_unary(
            f"{_SERVICE}RenewCertificate",
            request_serializer=enrollment_pb2.RenewCertificateRequest.SerializeToString,
            response_deserializer=enrollment_pb2.RenewCertificateResponse.FromString,
        )
        answer = await renew(
            enrollment_pb2.RenewCertificateRequest(
                certificate_request=_certificate_request(key, self._service).decode()
            ),
            timeout=CALL_SECONDS,
        )
        private = _private_pem(key)
        chain = _checked_chain(answer.certificate, private)
        durable.write_pair(self._certificate_file, chain, self._key_file, private)
        self._renew_at = self._planned_renewal()
        self._changed()
        await self._forget_channel()

    async def _forget_channel(self) -> None:
        if self._channel is not None:
            channel, self._channel = self._channel, None
            await channel.close()

    def _planned_renewal(self) -> dt.datetime:
        """Return half of the certificate's life, a tenth of it earlier or later by chance.

        The life counts from when the certificate was written here: it begins some minutes before it was issued, which
        is most of a short life.
        """
        file = self._certificate_file
        certificate = x509.load_pem_x509_certificate(file.read_bytes())
        begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        written = dt.datetime.fromtimestamp(file.stat().st_mtime, dt.UTC)
        if begin <= written <= dt.datetime.now(dt.UTC):
            begin = min(written, end)
        return begin + (end - begin) * random.uniform(0.45, 0.55)  # noqa: S311  # spreads members


async def _authority_of(gateway: str, token: JoinToken) -> bytes:
    """Get the CA certificates of a gateway and check them against the token.

    The first connection believes whatever certificate the gateway shows: the answer proves itself by the hash.
    """
    loop = asyncio.get_running_loop()
    try:
        shown = await loop.run_in_executor(None, _shown_certificate, gateway)
    except OSError as error:
        raise BackendUnreachable(f"gateway {gateway}: {error}", gateway=gateway) from error
    names = x509.load_pem_x509_certificate(shown).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    options = [("grpc.ssl_target_name_override", names.get_values_for_type(x509.DNSName)[0])]
    # gRPC takes a leaf as its own root (partial chains), so the channel goes to the holder of this certificate's key
    # and nobody else.
    async with grpc.aio.secure_channel(
        gateway, grpc.ssl_channel_credentials(root_certificates=shown), options=options
    ) as channel:
        get = channel.unary_unary(
            f"{_SERVICE}GetTrustBundle",
            request_serializer=enrollment_pb2.GetTrustBundleRequest.SerializeToString,
            response_deserializer=enrollment_pb2.TrustBundle.FromString,
        )
        try:
            bundle = await get(enrollment_pb2.GetTrustBundleRequest(), timeout=CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise BackendUnreachable(f"gateway {gateway}: {error.details()}", gateway=gateway) from error
    for pem in bundle.ca_certificates:
        if public_key_sha256(x509.load_pem_x509_certificate(pem.encode())) == token.ca_key_sha256:
            return pem.encode()
    raise CredentialsInvalid(
        f"gateway {gateway} does not have the authority that the token names; do not join it", gateway=gateway
    )


def _shown_certificate(address: str) -> bytes:
    """Return the certificate that a TLS server shows, unverified (PEM)."""
    host, _, port = address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host.strip("[]"), int(port)), timeout=CALL_SECONDS) as connection,
        context.wrap_socket(connection) as wrapped,
    ):
        shown = wrapped.getpeercert(binary_form=True)
    if shown is None:
        raise BackendUnreachable(f"gateway {address} shows no certificate", gateway=address)
    return ssl.DER_cert_to_PEM_cert(shown).encode()


def boot_id() -> str:
    """Return the boot id of this machine (`/proc/sys/kernel/random/boot_id`)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _kept_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return the key in a file, made at the first call."""
    if path.exists():
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        if isinstance(key, ec.EllipticCurvePrivateKey):
            return key
    made = ec.generate_private_key(ec.SECP256R1())
    durable.write(path, _private_pem(made), mode=0o600)
    return made


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _certificate_request(key: ec.EllipticCurvePrivateKey, name: str) -> bytes:
    request = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    )
    return request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r} is no name")
    return value


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is no list")
    return tuple(_text(item) for item in value)


def _quoted(text: str) -> str:
    """Return a TOML basic string; none of these values holds a quote, a backslash or a control character."""
    if any(character in text for character in '"\\') or not text.isprintable():
        raise DocumentInvalid(f"{text!r} cannot stand in fleet.toml")
    return f'"{text}"'

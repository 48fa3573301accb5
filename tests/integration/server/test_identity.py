"""Who may call at all: certificates good and bad, conveyed callers, local sockets."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import ssl
from pathlib import Path

import grpc
import pytest

from tests.integration.server import rig as rigs
from tests.integration.server.rig import ask, refused, running
from tests.pki import Pki
from virtfleet.common.v1 import admin_pb2
from virtfleet.compute.v1 import domain_pb2
from virtfleet.fleet.v1 import enrollment_pb2
from virtfleet.node.v1 import attachment_pb2, caller_pb2
from virtfleet.storage.v1 import volume_pb2
from virtfleet_service.denial import public_key_sha256

WHO = admin_pb2.WhoAmIRequest()
GET = domain_pb2.GetDomainRequest(name="nodes/n1/domains/web")


def conveyed(subject: str, *roles: str, prefixes: tuple[str, ...] = ()) -> tuple[tuple[str, bytes], ...]:
    caller = caller_pb2.ConveyedCaller(subject=subject, roles=roles, name_prefixes=prefixes)
    return (("x-virtfleet-caller-bin", caller.SerializeToString()),)


def deny(pki: Pki, path: Path, number: int, *, serial: str = "", identity: str = "") -> None:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    content = enrollment_pb2.DenialList(number=number)
    if serial:
        content.certificates.add(serial_number=serial)
    if identity:
        content.identities.add(identity=identity)
    signed = enrollment_pb2.SignedDenialList(
        content=content.SerializeToString(), key_sha256=public_key_sha256(pki.certificate)
    )
    signed.signature = pki.key.sign(signed.content, ec.ECDSA(hashes.SHA256()))
    staged = path.with_suffix(".new")
    staged.write_bytes(signed.SerializeToString())
    staged.replace(path)


async def test_a_user_is_known_by_certificate_and_has_the_roles_in_it(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        user = rig.pki.user("alice", "viewer", "operator")
        answer = await ask(rig.channel(user), rigs.WHO_AM_I, WHO, admin_pb2.WhoAmIResponse)
        assert answer.subject == "spiffe://virtfleet.dev/user/alice"
        assert list(answer.roles) == ["viewer", "operator"]
        assert answer.transport == "tls"
        assert answer.via == ""
        assert "domains.start" in answer.permissions
        assert "hostPaths.use" not in answer.permissions


async def test_a_caller_without_roles_learns_who_it_is_and_nothing_else(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        nobody = rig.pki.user("bob")
        assert (await ask(rig.channel(nobody), rigs.WHO_AM_I, WHO, admin_pb2.WhoAmIResponse)).permissions == []
        error = await refused(ask(rig.channel(nobody), rigs.GET_DOMAIN, GET))
        assert error.short == ("PERMISSION_DENIED", "PERMISSION_MISSING")
        assert error.metadata["permission"] == "domains.get"
        assert error.metadata["resource"] == "nodes/n1/domains/web"


@pytest.mark.parametrize(
    ("uris", "text"),
    [
        ((), "0 URI names"),
        (("spiffe://virtfleet.dev/user/a", "spiffe://virtfleet.dev/user/b"), "2 URI names"),
        (("spiffe://elsewhere.dev/user/alice",), "trust domain"),
        (("https://virtfleet.dev/user/alice",), "no SPIFFE id"),
        (("spiffe://virtfleet.dev/robot/alice",), "unknown form"),
        (("spiffe://virtfleet.dev/user/",), "unknown form"),
        (("spiffe://virtfleet.dev/user/a/b",), "unknown form"),
    ],
)
async def test_a_certificate_without_an_identity_of_the_fleet_is_refused(
    tmp_path: Path, uris: tuple[str, ...], text: str
) -> None:
    async with running(tmp_path) as rig:
        odd = rig.pki.issue("user/odd", uris=uris, roles=("admin",))
        error = await refused(ask(rig.channel(odd), rigs.WHO_AM_I, WHO))
        assert error.short == ("UNAUTHENTICATED", "CREDENTIALS_INVALID")
        assert text in error.message
        assert rig.audit()[-1] | {"time": ""} == rig.audit()[-1] | {"time": "", "event": "refused"}


async def test_no_foreign_or_missing_certificate_gets_a_connection(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        stranger = Pki(tmp_path / "stranger").user("alice", "admin")
        for issued in (stranger, None):
            error = await refused(ask(rig.channel(issued), rigs.WHO_AM_I, WHO, timeout=5))
            assert error.code is grpc.StatusCode.UNAVAILABLE
            # It is there, for those whom it knows.
            await ask(rig.channel(rig.pki.user("alice", "admin")), rigs.WHO_AM_I, WHO, timeout=5)
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionResetError, ssl.SSLError):
                reader, _ = await asyncio.open_connection("localhost", rig.server.port, ssl=_trusting(rig))
                assert await reader.read() == b"", "not a byte of HTTP/2"


def _trusting(rig: rigs.Rig) -> ssl.SSLContext:
    """Return what a client needs that knows the server and has no certificate of its own."""
    context = ssl.create_default_context(cadata=rig.pki.pem.decode())
    context.set_alpn_protocols(["h2"])
    return context


async def test_a_node_is_no_client_of_a_service(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        node = rig.pki.service("n2", "compute")
        error = await refused(ask(rig.channel(node), rigs.WHO_AM_I, WHO))
        assert error.short == ("PERMISSION_DENIED", "PERMISSION_MISSING")
        assert rig.audit()[-1]["subject"] == "spiffe://virtfleet.dev/node/n2/compute"


async def test_roles_in_the_certificate_of_a_node_or_gateway_count_for_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        gateway = rig.pki.issue("gateway/g1", roles=("admin",))
        answer = await ask(rig.channel(gateway), rigs.WHO_AM_I, WHO, admin_pb2.WhoAmIResponse)
        assert list(answer.roles) == ["viewer"]


async def test_a_gateway_conveys_its_caller(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        metadata = conveyed("spiffe://virtfleet.dev/user/carol", "operator", prefixes=("nodes/n1/domains/a-",))
        channel = rig.channel(rig.pki.gateway())
        answer = await ask(channel, rigs.WHO_AM_I, WHO, admin_pb2.WhoAmIResponse, metadata=metadata)
        assert answer.subject == "spiffe://virtfleet.dev/user/carol"
        assert list(answer.roles) == ["operator"]
        assert list(answer.name_prefixes) == ["nodes/n1/domains/a-"]
        assert answer.via == "spiffe://virtfleet.dev/gateway/g1"


async def test_nobody_but_a_gateway_conveys_a_caller(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        metadata = conveyed("spiffe://virtfleet.dev/user/root", "admin")
        for channel in (rig.channel(rig.pki.user("mallory", "admin")), rig.socket("admin")):
            error = await refused(ask(channel, rigs.WHO_AM_I, WHO, metadata=metadata))
            assert error.short == ("UNAUTHENTICATED", "CREDENTIALS_INVALID")
        assert [entry["event"] for entry in rig.audit()] == ["refused", "refused"]
        assert rig.audit()[0]["subject"] == "spiffe://virtfleet.dev/user/mallory"


@pytest.mark.parametrize(
    "metadata",
    [
        conveyed("", "admin"),
        (("x-virtfleet-caller-bin", b"\xff\xff"),),
        conveyed("a", "viewer") + conveyed("b", "admin"),
    ],
)
async def test_a_conveyed_caller_that_means_nobody_is_refused(
    tmp_path: Path, metadata: tuple[tuple[str, bytes], ...]
) -> None:
    async with running(tmp_path) as rig:
        error = await refused(ask(rig.channel(rig.pki.gateway()), rigs.WHO_AM_I, WHO, metadata=metadata))
        assert error.short == ("UNAUTHENTICATED", "CREDENTIALS_INVALID")


async def test_the_peer_socket_demands_a_caller_and_serves_its_own_services_only(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        request = attachment_pb2.AttachVolumeRequest(
            name="nodes/n1/pools/p/volumes/v",
            domain_uid="6ff0a01c-53f3-4c5c-9bb6-0f7bd16c2f1d",
            device_id="root",
            mode=attachment_pb2.ATTACHMENT_MODE_EXCLUSIVE,
        )
        error = await refused(ask(rig.socket("peer"), rigs.ATTACH, request))
        assert error.short == ("UNAUTHENTICATED", "CREDENTIALS_INVALID")
        metadata = conveyed("spiffe://virtfleet.dev/user/carol", "operator")
        await ask(rig.socket("peer"), rigs.ATTACH, request, metadata=metadata)
        assert rig.attachments.calls[0].caller.subject == "spiffe://virtfleet.dev/user/carol"
        error = await refused(ask(rig.socket("peer"), rigs.GET_DOMAIN, GET, metadata=metadata))
        assert error.short == ("UNIMPLEMENTED", "METHOD_NOT_IMPLEMENTED")
        for channel in (rig.socket("admin"), rig.channel(rig.pki.user("root", "admin"))):
            error = await refused(ask(channel, rigs.ATTACH, request))
            assert error.short == ("UNIMPLEMENTED", "METHOD_NOT_IMPLEMENTED")


async def test_the_peer_socket_authorises_the_conveyed_caller(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        request = attachment_pb2.AttachVolumeRequest(
            name="nodes/n1/pools/p/volumes/secret",
            domain_uid="6ff0a01c-53f3-4c5c-9bb6-0f7bd16c2f1d",
            device_id="root",
            mode=attachment_pb2.ATTACHMENT_MODE_EXCLUSIVE,
        )
        metadata = conveyed("user", "operator", prefixes=("nodes/n1/pools/p/volumes/a-",))
        error = await refused(ask(rig.socket("peer"), rigs.ATTACH, request, metadata=metadata))
        assert error.short == ("PERMISSION_DENIED", "PERMISSION_MISSING")
        assert rig.attachments.calls == []


@pytest.mark.parametrize(("role", "reason"), [("viewer", "READ_ONLY_SOCKET"), ("operator", "PERMISSION_MISSING")])
async def test_a_local_socket_gives_one_role(tmp_path: Path, role: str, reason: str) -> None:
    async with running(tmp_path) as rig:
        answer = await ask(rig.socket(role), rigs.WHO_AM_I, WHO, admin_pb2.WhoAmIResponse)
        assert answer.subject == f"local:{role}"
        assert list(answer.roles) == [role]
        assert answer.transport == "unix"
        error = await refused(ask(rig.socket(role), rigs.RELOAD, admin_pb2.ReloadCertificatesRequest()))
        assert error.short == ("PERMISSION_DENIED", reason)


async def test_an_ended_certificate_loses_its_next_call_and_its_stream(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        user = rig.pki.issue("user/brief", roles=("operator",), lifetime=dt.timedelta(seconds=3))
        channel = rig.channel(user)
        method = channel.unary_stream(rigs.DOWNLOAD)
        stream = method(b"\x0a\x1anodes/n1/pools/p/volumes/v", timeout=20)
        assert await stream.read() is not grpc.aio.EOF
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        assert rigs.Refused(caught.value).short == ("UNAUTHENTICATED", "CREDENTIALS_INVALID")
        error = await refused(ask(channel, rigs.WHO_AM_I, WHO))
        assert error.short == ("UNAUTHENTICATED", "CREDENTIALS_INVALID")
        assert "expire_time" in error.metadata


async def test_a_denied_certificate_loses_calls_and_open_streams_within_five_seconds(tmp_path: Path) -> None:
    rig = rigs.Rig(tmp_path)
    denied = tmp_path / "denied"
    from dataclasses import replace

    async with rig.make(tls=replace(rig.settings.tls, denial_list_file=denied)):
        user, other = rig.pki.user("eve", "operator"), rig.pki.user("alice", "operator")
        channel, kept = rig.channel(user), rig.channel(other)
        request = b"\x0a\x1anodes/n1/pools/p/volumes/v"
        stream, good = (each.unary_stream(rigs.DOWNLOAD)(request, timeout=20) for each in (channel, kept))
        assert await stream.read() is not grpc.aio.EOF
        assert await good.read() is not grpc.aio.EOF
        deny(rig.pki, denied, 2, serial=user.serial_number)
        async with asyncio.timeout(5):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stream.read()
        assert rigs.Refused(caught.value).short == ("UNAUTHENTICATED", "CERTIFICATE_REVOKED")
        error = await refused(ask(channel, rigs.WHO_AM_I, WHO))
        assert error.short == ("UNAUTHENTICATED", "CERTIFICATE_REVOKED")
        assert error.metadata["serial_number"] == user.serial_number
        rig.volumes.go_on.set()
        assert await good.read() is not grpc.aio.EOF
        assert await good.read() is grpc.aio.EOF
        await kept.close()


async def test_a_denial_list_never_goes_back_and_must_be_signed(tmp_path: Path) -> None:
    rig = rigs.Rig(tmp_path)
    denied = tmp_path / "denied"
    from dataclasses import replace

    user = rig.pki.user("eve", "viewer")
    deny(rig.pki, denied, 7, identity=user.identity)
    async with rig.make(tls=replace(rig.settings.tls, denial_list_file=denied)) as server:
        assert server.denial_list_number == 7
        deny(rig.pki, denied, 6)
        server.refresh()
        assert server.denial_list_number == 7
        deny(Pki(tmp_path / "stranger"), denied, 8)
        server.refresh()
        assert server.denial_list_number == 7
        error = await refused(ask(rig.channel(user), rigs.WHO_AM_I, WHO))
        assert error.short == ("UNAUTHENTICATED", "CERTIFICATE_REVOKED")


async def test_a_denied_subject_is_refused_through_a_gateway_too(tmp_path: Path) -> None:
    rig = rigs.Rig(tmp_path)
    denied = tmp_path / "denied"
    from dataclasses import replace

    async with rig.make(tls=replace(rig.settings.tls, denial_list_file=denied)) as server:
        metadata = conveyed("spiffe://virtfleet.dev/user/eve", "admin")
        gateway = rig.pki.gateway()
        await ask(rig.channel(gateway), rigs.WHO_AM_I, WHO, metadata=metadata)
        deny(rig.pki, denied, 1, identity="spiffe://virtfleet.dev/user/eve")
        server.refresh()
        error = await refused(ask(rig.channel(gateway), rigs.WHO_AM_I, WHO, metadata=metadata))
        assert error.short == ("UNAUTHENTICATED", "CERTIFICATE_REVOKED")


async def test_the_policy_file_binds_roles_and_is_read_again(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("")
    async with running(tmp_path, policy_file=policy) as rig:
        user = rig.pki.user("ci")
        assert (await refused(ask(rig.channel(user), rigs.GET_DOMAIN, GET))).reason == "PERMISSION_MISSING"
        policy.write_text(
            '[[binding]]\nsubject = "spiffe://virtfleet.dev/user/ci"\nrole = "viewer"\nnames = ["nodes/n1/domains/w"]\n'
        )
        rig.server.refresh()
        await ask(rig.channel(user), rigs.GET_DOMAIN, GET)
        policy.write_text("[[binding]]\nnonsense = 1\n")
        rig.server.refresh()
        await ask(rig.channel(user), rigs.GET_DOMAIN, GET)


async def test_a_policy_that_takes_a_permission_ends_the_streams_that_need_it(tmp_path: Path) -> None:
    """And those alone: who keeps it, or has more now, goes on."""
    policy = tmp_path / "policy.toml"
    users = ("loses", "narrowed", "kept", "widened")

    def bind(**names: str | None) -> None:
        policy.write_text(
            "\n".join(
                f'[[binding]]\nsubject = "spiffe://virtfleet.dev/user/{user}"\nrole = "operator"\n'
                + (f'names = ["{prefix}"]\n' if prefix else "")
                for user, prefix in names.items()
            )
        )

    volumes = "nodes/n1/pools/p/volumes/"
    bind(loses=None, narrowed=None, kept=volumes, widened=volumes)
    async with running(tmp_path, policy_file=policy) as rig:
        channels = {user: rig.channel(rig.pki.user(user)) for user in users}
        request = volume_pb2.DownloadVolumeRequest(name=f"{volumes}v").SerializeToString()
        calls = {user: channel.unary_stream(rigs.DOWNLOAD)(request, timeout=20) for user, channel in channels.items()}
        for call in calls.values():
            await call.read()
        rig.server.refresh()
        bind(narrowed=f"{volumes}v", kept=volumes, widened=None)
        rig.server.refresh()
        for user in ("loses", "narrowed"):
            error = await refused(calls[user].read())
            assert error.short == ("PERMISSION_DENIED", "PERMISSION_MISSING")
        rig.volumes.go_on.set()
        for user in ("kept", "widened"):
            assert await calls[user].read() is not grpc.aio.EOF
            assert await calls[user].read() is grpc.aio.EOF
        for channel in channels.values():
            await channel.close()
    ended = [one for one in rig.audit() if one.get("code") == "PERMISSION_DENIED"]
    assert sorted(one["subject"].rpartition("/")[2] for one in ended) == ["loses", "narrowed"]

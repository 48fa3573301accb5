"""Who calls: roles, forged metadata, certificates that are no client's, and those that are no longer believed."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.fleet.rig import (
    Metadata,
    State,
    Wire,
    caller,
    creation,
    credentials_of,
    domain,
    get,
    issue,
    refused,
    small_spec,
    unique,
    until,
)
from tests.fleet.stand import (
    DOMAINS,
    Stand,
    everything,
)
from tests.pki import Pki
from virtfleet.common.v1 import admin_pb2
from virtfleet.compute.v1 import console_pb2, console_pb2_grpc, domain_pb2, watch_pb2, watch_pb2_grpc
from virtfleet.fleet.v1 import enrollment_pb2, node_pb2
from virtfleet.node.v1 import caller_pb2
from virtfleet.storage.v1 import pool_pb2, volume_pb2, volume_pb2_grpc
from virtfleet.type.v1 import watch_pb2 as type_watch_pb2
from virtfleet_client import Credentials, Fleet
from virtfleet_client.errors import Unavailable, VirtfleetError

FORGED = (
    (
        "x-virtfleet-caller-bin",
        caller_pb2.ConveyedCaller(subject="spiffe://virtfleet.dev/user/root", roles=["admin"]).SerializeToString(),
    ),
)


def upload(fleet: Fleet, stand: Stand, metadata: Metadata) -> object:
    """Call a method whose client streams."""
    request = volume_pb2.UploadVolumeRequest(name=f"{stand.node}/pools/none/volumes/none")
    return volume_pb2_grpc.VolumeServiceStub(fleet.channel).UploadVolume(iter([request]), metadata=metadata, timeout=10)


def console(fleet: Fleet, stand: Stand, metadata: Metadata) -> object:
    """Call a method in which both sides stream."""
    request = console_pb2.OpenConsoleRequest(name=stand.domain.name)
    stub = console_pb2_grpc.ConsoleServiceStub(fleet.channel)
    return list(stub.OpenConsole(iter([request]), metadata=metadata, timeout=10))


def watch(fleet: Fleet, parent: str, metadata: Metadata) -> object:
    """Call a method whose server streams."""
    request = watch_pb2.WatchResourcesRequest(parent=parent, snapshot=type_watch_pb2.WatchSnapshot())
    return list(watch_pb2_grpc.WatchServiceStub(fleet.channel).WatchResources(request, metadata=metadata, timeout=10))


def reflect(fleet: Fleet, metadata: Metadata) -> object:
    """Call a method of the gateway itself in which both sides stream."""
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    stub = reflection_pb2_grpc.ServerReflectionStub(fleet.channel)
    return list(stub.ServerReflectionInfo(iter([request]), metadata=metadata, timeout=10))


FORGERIES: list[tuple[str, Callable[[Fleet, Stand, Metadata], object]]] = [
    ("own unary", lambda f, _, m: f.access.WhoAmI(admin_pb2.WhoAmIRequest(), metadata=m)),
    ("own list", lambda f, _, m: f.domains.ListDomains(domain_pb2.ListDomainsRequest(parent="nodes/-"), metadata=m)),
    ("own server stream", lambda f, _, m: watch(f, "nodes/-", m)),
    ("own both", lambda f, _, m: reflect(f, m)),
    (
        "forwarded unary",
        lambda f, s, m: f.domains.DeleteDomain(domain_pb2.DeleteDomainRequest(name=s.domain.name), metadata=m),
    ),
    (
        "forwarded read",
        lambda f, s, m: f.access.WhoAmI(admin_pb2.WhoAmIRequest(name=f"{s.node}/services/compute"), metadata=m),
    ),
    ("forwarded server stream", lambda f, s, m: watch(f, s.node, m)),
    ("forwarded client stream", upload),
    ("forwarded both", console),
    ("health of a node", lambda f, s, m: health(f, (*m, ("x-virtfleet-node", s.node.removeprefix("nodes/"))))),
    (
        "health of a service",
        lambda f, s, m: health(f, (*m, ("x-virtfleet-node", f"{s.node.removeprefix('nodes/')}/compute"))),
    ),
    (
        "reflection of a service",
        lambda f, s, m: reflect(f, (*m, ("x-virtfleet-node", f"{s.node.removeprefix('nodes/')}/compute"))),
    ),
]


def health(fleet: Fleet, metadata: Metadata) -> object:
    """Ask for the health of what the metadata say."""
    stub = health_pb2_grpc.HealthStub(fleet.channel)
    return stub.Check(health_pb2.HealthCheckRequest(), metadata=metadata, timeout=10)


@pytest.mark.parametrize("call", [row[1] for row in FORGERIES], ids=[row[0] for row in FORGERIES])
def test_a_caller_cannot_name_another(
    stand: Stand,
    environment: dict[str, str],
    people: dict[str, Credentials],
    call: Callable[[Fleet, Stand, Metadata], object],
) -> None:
    with caller(environment, people["admin"]) as admin:
        before = everything(stand.fleet, stand.node)
        error = refused(lambda: call(admin, stand, FORGED))
        assert (error.code().name, error.reason) == ("UNAUTHENTICATED", "CREDENTIALS_INVALID"), error
        error = refused(lambda: call(admin, stand, FORGED + FORGED))
        assert (error.code().name, error.reason) == ("UNAUTHENTICATED", "CREDENTIALS_INVALID"), error
    assert get(stand.fleet, stand.domain.name) == stand.domain
    assert everything(stand.fleet, stand.node) == before


def test_a_node_is_told_of_the_caller_by_its_certificate(
    stand: Stand, environment: dict[str, str], people: dict[str, Credentials]
) -> None:
    with caller(environment, people["viewer"]) as viewer:
        me = viewer.access.WhoAmI(admin_pb2.WhoAmIRequest())
        there = viewer.access.WhoAmI(admin_pb2.WhoAmIRequest(name=f"{stand.node}/services/compute"))
    assert "/user/viewer-" in me.subject
    assert list(me.roles) == list(there.roles) == ["viewer"]
    assert there.subject == me.subject


VIEWERS: list[tuple[str, str, Callable[[Fleet, Stand], object]]] = [
    ("create", "domains.create", lambda f, s: f.domains.CreateDomain(creation(s.node))),
    ("start", "domains.start", lambda f, s: f.domains.StartDomain(domain_pb2.StartDomainRequest(name=s.domain.name))),
    (
        "update",
        "domains.update",
        lambda f, s: f.domains.UpdateDomain(
            domain_pb2.UpdateDomainRequest(domain=domain_pb2.Domain(name=s.domain.name, display_name="mine"))
        ),
    ),
    (
        "delete",
        "domains.delete",
        lambda f, s: f.domains.DeleteDomain(domain_pb2.DeleteDomainRequest(name=s.domain.name)),
    ),
    (
        "dry run",
        "domains.delete",
        lambda f, s: f.domains.DeleteDomain(domain_pb2.DeleteDomainRequest(name=s.domain.name, validate_only=True)),
    ),
    (
        "batch",
        "domains.delete",
        lambda f, s: f.domains.BatchDeleteDomains(
            domain_pb2.BatchDeleteDomainsRequest(
                parent=s.node, requests=[domain_pb2.DeleteDomainRequest(name=s.domain.name)]
            )
        ),
    ),
    ("cordon", "nodes.cordon", lambda f, s: f.nodes.CordonNode(node_pb2.CordonNodeRequest(name=s.node))),
    (
        "token",
        "joinTokens.create",
        lambda f, _: f.enrollment.CreateJoinToken(
            enrollment_pb2.CreateJoinTokenRequest(
                join_token=enrollment_pb2.JoinToken(spec=enrollment_pb2.JoinTokenSpec(node="nodes/n9"))
            )
        ),
    ),
    (
        "pool",
        "pools.create",
        lambda f, s: f.pools.CreatePool(
            pool_pb2.CreatePoolRequest(
                parent=s.node, pool_id="mine", pool=pool_pb2.Pool(spec=pool_pb2.PoolSpec(dir=pool_pb2.DirBackend()))
            )
        ),
    ),
]


@pytest.mark.parametrize(("permission", "call"), [row[1:] for row in VIEWERS], ids=[row[0] for row in VIEWERS])
def test_a_viewer_changes_nothing(
    stand: Stand,
    environment: dict[str, str],
    people: dict[str, Credentials],
    permission: str,
    call: Callable[[Fleet, Stand], object],
) -> None:
    before = everything(stand.fleet, stand.node)
    with caller(environment, people["viewer"]) as viewer:
        assert get(viewer, stand.domain.name) == stand.domain
        error = refused(lambda: call(viewer, stand))
    assert (error.code().name, error.reason) == ("PERMISSION_DENIED", "PERMISSION_MISSING"), error
    assert error.metadata["permission"] == permission
    assert everything(stand.fleet, stand.node) == before


def test_an_operator_runs_domains_but_not_the_fleet(
    stand: Stand, environment: dict[str, str], people: dict[str, Credentials]
) -> None:
    with caller(environment, people["operator"]) as operator:
        with domain(operator, stand.node, start="running") as made_by_operator:
            assert made_by_operator.status.state == State.DOMAIN_STATE_RUNNING
        wanted = small_spec()
        wanted.disks["root"].host_path = "/etc/shadow"
        error = refused(lambda: operator.domains.CreateDomain(creation(stand.node, spec=wanted)))
        assert (error.reason, error.metadata["permission"]) == ("PERMISSION_MISSING", "hostPaths.use"), error
        error = refused(lambda: operator.nodes.CordonNode(node_pb2.CordonNodeRequest(name=stand.node)))
        assert error.reason == "PERMISSION_MISSING"


def test_a_node_is_no_client(environment: dict[str, str], run_folder: Path, nodes: list[str]) -> None:
    folder = Path(json.loads((run_folder / "fleet.json").read_text())["folder"])
    identity = folder / nodes[0].removeprefix("nodes/") / "state/identity"
    files = str(identity / "compute.crt"), str(identity / "compute.key")
    stranger = Wire(environment, *files)
    try:
        error = refused(lambda: stranger(f"{DOMAINS}/ListDomains", domain_pb2.ListDomainsRequest(parent=nodes[0])))
        assert (error.code().name, error.reason) == ("PERMISSION_DENIED", "PERMISSION_MISSING"), error
        error = refused(lambda: stranger("virtfleet.fleet.v1.NodeService/ListNodes", b""))
        assert (error.code().name, error.reason) == ("PERMISSION_DENIED", "PERMISSION_MISSING"), error
    finally:
        stranger.close()


def test_a_foreign_certificate_is_not_let_in(environment: dict[str, str], tmp_path: Path, nodes: list[str]) -> None:
    own = credentials_of(environment)
    other = Pki(tmp_path / "other").issue("user/admin", file="admin")
    stranger = Wire(environment, str(other.certificate_file), str(other.key_file))
    try:
        error = refused(lambda: stranger(f"{DOMAINS}/ListDomains", domain_pb2.ListDomainsRequest(parent=nodes[0])))
    finally:
        stranger.close()
    assert isinstance(error, Unavailable), "the handshake fails"
    # A server is there, and says not a byte of HTTP/2 to whom it does not know.
    assert heard(environment, other.certificate_file, other.key_file) == b""
    assert heard(environment, None, None) == b""
    assert heard(environment, own.certificate_file, own.key_file)[3:4] == b"\4", "settings"


def heard(environment: dict[str, str], certificate: Path | None, key: Path | None) -> bytes:
    """Return the first that the gateway says on a connection with a certificate; nothing if it hangs up."""
    host, _, port = environment["VIRTFLEET_ADDRESS"].rpartition(":")
    context = ssl.create_default_context(cafile=environment["VIRTFLEET_CA_FILE"])
    context.check_hostname = False
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(socket.create_connection((host, int(port)), timeout=5)) as connection:
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
            return connection.recv(4096)
    except (ConnectionError, ssl.SSLError):
        return b""


def test_a_revoked_certificate_is_refused_within_5_seconds(
    fleet: Fleet, environment: dict[str, str], tmp_path: Path, nodes: list[str]
) -> None:
    user = unique("gone")
    credentials = issue(fleet, tmp_path, user, "viewer")
    with caller(environment, credentials) as person:
        stream = person.channel.unary_stream(
            "/virtfleet.compute.v1.WatchService/WatchResources",
            request_serializer=watch_pb2.WatchResourcesRequest.SerializeToString,
            response_deserializer=watch_pb2.WatchResourcesResponse.FromString,
        )(watch_pb2.WatchResourcesRequest(parent=nodes[0], snapshot=type_watch_pb2.WatchSnapshot()))
        next(stream)
        mine = [
            certificate
            for certificate in fleet.pages(fleet.enrollment.ListCertificates, enrollment_pb2.ListCertificatesRequest())
            if certificate.status.identity.endswith(f"/user/{user}")
        ]
        assert len(mine) == 1
        fleet.enrollment.RevokeCertificate(enrollment_pb2.RevokeCertificateRequest(name=mine[0].name))

        def away() -> VirtfleetError | None:
            try:
                person.nodes.ListNodes(node_pb2.ListNodesRequest(), timeout=5)
            except VirtfleetError as error:
                return error
            return None

        error = until(away, 5, "the call is refused")
        assert (error.code().name, error.reason) == ("UNAUTHENTICATED", "CERTIFICATE_REVOKED"), error
        error = refused(lambda: list(stream))
        assert (error.code().name, error.reason) == ("UNAUTHENTICATED", "CERTIFICATE_REVOKED"), error

"""Who calls: roles, forged metadata, certificates that are no client's, and those that are no longer believed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fleet.rig import (
    State,
    Wire,
    caller,
    creation,
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
from virtfleet.compute.v1 import domain_pb2, watch_pb2
from virtfleet.fleet.v1 import enrollment_pb2, node_pb2
from virtfleet.node.v1 import caller_pb2
from virtfleet.storage.v1 import pool_pb2
from virtfleet.type.v1 import watch_pb2 as type_watch_pb2
from virtfleet_client import Credentials, Fleet
from virtfleet_client.errors import Unavailable, VirtfleetError


def test_a_caller_cannot_name_another(
    stand: Stand, environment: dict[str, str], people: dict[str, Credentials]
) -> None:
    forged = caller_pb2.ConveyedCaller(subject="spiffe://virtfleet.dev/user/root", roles=["admin"]).SerializeToString()
    metadata = (("x-virtfleet-caller-bin", forged),)
    with caller(environment, people["viewer"]) as viewer:
        error = refused(lambda: viewer.access.WhoAmI(admin_pb2.WhoAmIRequest(), metadata=metadata))
        assert (error.code().name, error.reason) == ("UNAUTHENTICATED", "CREDENTIALS_INVALID"), error
        me = viewer.access.WhoAmI(admin_pb2.WhoAmIRequest())
        there = viewer.access.WhoAmI(admin_pb2.WhoAmIRequest(name=f"{stand.node}/services/compute"), metadata=metadata)
        error = refused(
            lambda: viewer.domains.DeleteDomain(
                domain_pb2.DeleteDomainRequest(name=stand.domain.name), metadata=metadata
            )
        )
    assert "/user/viewer-" in me.subject
    assert list(me.roles) == list(there.roles) == ["viewer"]
    assert there.subject == me.subject
    assert (error.code().name, error.reason) == ("PERMISSION_DENIED", "PERMISSION_MISSING"), error
    assert get(stand.fleet, stand.domain.name) == stand.domain


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
    other = Pki(tmp_path / "other").issue("user/admin", file="admin")
    stranger = Wire(environment, str(other.certificate_file), str(other.key_file))
    try:
        error = refused(lambda: stranger(f"{DOMAINS}/ListDomains", domain_pb2.ListDomainsRequest(parent=nodes[0])))
    finally:
        stranger.close()
    assert isinstance(error, Unavailable), "the handshake fails"


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

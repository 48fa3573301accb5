"""Where a field is at fault, the error says where it stands in the request as the client sent it: in every service."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from google.protobuf import field_mask_pb2
from google.protobuf.message import Message

from tests.fleet.rig import MIB, create, creation, delete, refused, small_spec, unique, until, verb
from tests.fleet.stand import Stand
from virtfleet.compute.v1 import domain_pb2, stats_pb2
from virtfleet.fleet.v1 import enrollment_pb2, node_pb2
from virtfleet.network.v1 import network_pb2
from virtfleet.storage.v1 import pool_pb2, volume_pb2
from virtfleet.type.v1 import resource_pb2
from virtfleet_client.errors import from_status

M = TypeVar("M", bound=Message)

_SEGMENT = re.compile(r"`((?:[^`]|``)+)`|([A-Za-z0-9_-]+)((?:\[\d+\])?)|(#\d+)")


def segments(path: str) -> list[str]:
    """Split a path at the dots that are not in backquotes."""
    found: list[str] = []
    position = 0
    while True:
        match = _SEGMENT.match(path, position)
        assert match, f"{path} has no segment at {position}"
        found.append(match.group())
        position = match.end()
        if position == len(path):
            return found
        assert path[position] == ".", path
        position += 1


def assert_leads_somewhere(request: type[Message], path: str) -> None:
    """Walk a path through the descriptor of a request."""
    where: Any = request.DESCRIPTOR
    rest = segments(path)
    while rest:
        assert where is not None, f"{path} leads into a scalar of {request.DESCRIPTOR.name}"
        name, _, index = rest.pop(0).partition("[")
        if name.startswith("#"):
            assert not rest
            return
        field = where.fields_by_name.get(name)
        assert field is not None, f"{path}: {where.full_name} has no field {name}"
        where = field.message_type
        if where is not None and where.GetOptions().map_entry:
            where = where.fields_by_name["value"].message_type
            if rest:
                rest.pop(0)
        else:
            assert not index or field.is_repeated, path


def of(kind: type[M], **fields: Any) -> M:
    """Return a message whose parts are given as dictionaries."""
    return kind(**fields)


def with_volumes(stand: Stand, *volumes: domain_pb2.NewVolume) -> domain_pb2.CreateDomainRequest:
    """Return a request for a domain with volumes."""
    request = creation(stand.node, spec=small_spec())
    for volume in volumes:
        request.new_volumes.append(volume)
    return request


def updating(stand: Stand, *paths: str, **spec: Any) -> domain_pb2.UpdateDomainRequest:
    """Return a request for a change of the domain."""
    request = domain_pb2.UpdateDomainRequest(update_mask=field_mask_pb2.FieldMask(paths=paths))
    request.domain.name = stand.domain.name
    request.domain.spec.CopyFrom(small_spec(**spec))
    return request


def network(change: Callable[[network_pb2.NetworkSpec], object], parent: str) -> network_pb2.CreateNetworkRequest:
    """Return a request for a network."""
    request = network_pb2.CreateNetworkRequest(parent=parent, network_id=unique("net"))
    request.network.spec.nat.SetInParent()
    request.network.spec.subnets["lan"].prefix = "192.168.185.0/24"
    change(request.network.spec)
    return request


def join_token(node: str) -> enrollment_pb2.CreateJoinTokenRequest:
    """Return a request for a join token."""
    request = enrollment_pb2.CreateJoinTokenRequest()
    request.join_token.spec.node = node
    return request


ROWS: list[tuple[str, str, Callable[[Stand], Message], str]] = [
    (
        "a rule of the proto, in a map",
        "domains.CreateDomain",
        lambda s: creation(s.node, labels={"example.com/team": "x" * 5000}),
        "domain.labels.`example.com/team`",
    ),
    (
        "what a driver cannot do",
        "domains.CreateDomain",
        lambda s: creation(s.node, spec={"driver": "test", "cpu": {"vcpu_count": 4, "maximum_vcpu_count": 2}}),
        "domain.spec.cpu.vcpu_count",
    ),
    (
        "a field that is fixed",
        "domains.UpdateDomain",
        lambda s: of(
            domain_pb2.UpdateDomainRequest,
            domain={"name": s.domain.name, "spec": {"driver": "qemu"}},
            update_mask={"paths": ["spec.driver"]},
        ),
        "domain.spec.driver",
    ),
    (
        "a volume that is to be made, by a rule",
        "domains.CreateDomain",
        lambda s: with_volumes(s, domain_pb2.NewVolume(pool="pools/none", volume_id="Root")),
        "new_volumes[0].volume_id",
    ),
    (
        "an item of a batch, as a whole",
        "domains.BatchStartDomains",
        lambda s: domain_pb2.BatchStartDomainsRequest(
            parent=s.node,
            requests=[
                domain_pb2.StartDomainRequest(name=s.domain.name),
                domain_pb2.StartDomainRequest(name=f"{s.node}/domains/other", request_id="own"),
            ],
        ),
        "requests[1].request_id",
    ),
    (
        "a kind that is fixed",
        "pools.UpdatePool",
        lambda s: of(pool_pb2.UpdatePoolRequest, pool={"name": f"{s.node}/pools/x y"}),
        "pool.name",
    ),
    (
        "a path of a pool",
        "pools.CreatePool",
        lambda s: of(
            pool_pb2.CreatePoolRequest,
            parent=s.node,
            pool_id=unique("pool"),
            pool={"spec": {"dir": {}, "target_path": "/tmp/../etc"}},
        ),
        "pool.spec.target_path",
    ),
    (
        "a range of a subnet",
        "networks.CreateNetwork",
        lambda s: network(lambda spec: spec.subnets["lan"].dhcp.ranges.add(first="10.0.0.1", last="10.0.0.2"), s.node),
        "network.spec.subnets.lan.dhcp.ranges[0]",
    ),
    (
        "the node of a token",
        "enrollment.CreateJoinToken",
        lambda _: join_token("nodes/Not"),
        "join_token.spec.node",
    ),
    (
        "a role",
        "enrollment.IssueUserCertificate",
        lambda _: enrollment_pb2.IssueUserCertificateRequest(
            user="eve", roles=["viewer", "emperor"], certificate_request="x"
        ),
        "roles[1]",
    ),
    (
        "the name of a node",
        "nodes.UpdateNode",
        lambda _: of(node_pb2.UpdateNodeRequest, node={"name": "nodes/Not"}),
        "node.name",
    ),
    (
        "one of several names",
        "stats.BatchGetDomainStats",
        lambda s: stats_pb2.BatchGetDomainStatsRequest(parent=s.node, names=[s.domain.name, "web"]),
        "names[1]",
    ),
]


@pytest.mark.parametrize(("method", "request_of", "wanted"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_a_field_is_told_as_the_client_sent_it(
    stand: Stand, method: str, request_of: Callable[[Stand], Message], wanted: str
) -> None:
    services, name = method.split(".")
    request = request_of(stand)

    def call() -> object:
        answer = getattr(getattr(stand.fleet, services), name)(request)
        if hasattr(answer, "done") and hasattr(answer, "metadata"):
            return stand.fleet.wait(answer, domain_pb2.Domain)
        return list(answer) if hasattr(answer, "__next__") else answer

    error = refused(call)
    assert error.code().name == "INVALID_ARGUMENT", error
    assert error.fields == (wanted,), error
    assert error.metadata.get("field", wanted) == wanted, error
    assert_leads_somewhere(type(request), wanted)


def test_a_volume_that_storage_refuses_is_told_as_the_client_sent_it(stand: Stand) -> None:
    fleet = stand.fleet
    pool = pool_pb2.CreatePoolRequest(parent=stand.node, pool_id=unique("pool"), start=True)
    pool.pool.spec.dir.SetInParent()
    made = fleet.wait(fleet.pools.CreatePool(pool), pool_pb2.Pool)
    try:
        request = creation(stand.node)
        for format_ in (volume_pb2.VOLUME_FORMAT_QCOW2, volume_pb2.VOLUME_FORMAT_RAW):
            new = request.new_volumes.add(pool=f"pools/{pool.pool_id}", volume_id=f"disk{format_}")
            new.spec.format = format_
            new.spec.capacity_bytes = MIB
            new.spec.cluster_size_bytes = 65536
        error = refused(lambda: fleet.wait(fleet.domains.CreateDomain(request), domain_pb2.Domain))
        assert (error.code().name, error.reason) == ("INVALID_ARGUMENT", "FIELD_CONFLICT"), error
        assert error.fields == ("new_volumes[1].spec.cluster_size_bytes",), error
        assert_leads_somewhere(type(request), error.fields[0])
        listed = volume_pb2.ListVolumesRequest(parent=made.name)
        assert not fleet.volumes.ListVolumes(listed).volumes, "the first one is undone"
    finally:
        fleet.wait(fleet.pools.StopPool(pool_pb2.StopPoolRequest(name=made.name)), pool_pb2.Pool)
        fleet.pools.DeletePool(pool_pb2.DeletePoolRequest(name=made.name))


def test_what_cannot_go_live_is_told_as_the_client_sent_it(stand: Stand) -> None:
    verb(stand.fleet, "StartDomain", stand.domain.name)
    request = updating(stand, "spec.memory.maximum_bytes")
    request.domain.spec.memory.maximum_bytes = 128 * MIB
    request.scope = resource_pb2.CHANGE_SCOPE_LIVE_AND_CONFIG
    error = refused(lambda: stand.fleet.domains.UpdateDomain(request))
    assert (error.code().name, error.fields) == ("FAILED_PRECONDITION", ("domain.spec.memory.maximum_bytes",))
    assert error.metadata["paths"] == "spec.memory.maximum_bytes", "as masks and pending changes say it"
    assert_leads_somewhere(type(request), error.fields[0])


def test_an_item_of_a_batch_is_told_as_the_client_sent_it(stand: Stand) -> None:
    """One item fails alone; its status names the field from the request of the batch."""
    good, bad = unique(), unique()
    wrong = small_spec()
    wrong.driver = "none"
    request = domain_pb2.BatchCreateDomainsRequest(
        parent=stand.node, requests=[creation("", good), creation("", bad, spec=wrong)]
    )
    answer = stand.fleet.wait(stand.fleet.domains.BatchCreateDomains(request), domain_pb2.BatchCreateDomainsResponse)
    try:
        assert answer.results[0].status.code == 0
        error = from_status(answer.results[1].status)
        assert (error.code().name, error.fields) == ("INVALID_ARGUMENT", ("requests[1].domain.spec.driver",))
        assert_leads_somewhere(type(request), error.fields[0])
    finally:
        delete(stand.fleet, f"{stand.node}/domains/{good}")


def test_names_that_are_missing_have_a_reason_each(stand: Stand) -> None:
    other = create(stand.fleet, stand.node)
    names = [other.name, f"{stand.node}/domains/none", "nodes/n77/domains/none"]
    try:
        for live in (False, True):
            request = domain_pb2.BatchGetDomainsRequest(parent="nodes/-", names=names, read_through=live)

            def reasons(request: domain_pb2.BatchGetDomainsRequest = request) -> list[str]:
                answer = stand.fleet.domains.BatchGetDomains(request)
                return [from_status(one.status).reason if one.status.code else "" for one in answer.results]

            until(lambda reasons=reasons: reasons()[0] == "", 5, "the fleet knows the domain")  # type: ignore[misc]  # the round's own
            assert reasons() == ["", "RESOURCE_NOT_FOUND", "NODE_UNKNOWN"], live
    finally:
        delete(stand.fleet, other.name)

"""The table of errors of pools, volumes, networks, ports and the fleet's own resources, through the gateway."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from google.protobuf import empty_pb2, field_mask_pb2

from tests.fleet.rig import MIB, Refusal, Wire, field, refusal_of, refused, seconds, unique
from tests.fleet.stand import INVALID, everything
from virtfleet.fleet.v1 import enrollment_pb2, node_pb2
from virtfleet.network.v1 import network_pb2, port_pb2
from virtfleet.storage.v1 import pool_pb2, volume_pb2
from virtfleet_client import Fleet

EVE = "00000000-0000-4000-8000-00000000e4e4"
SELF = "{self}"
"""Stands for the name of the resource of the row."""


@dataclass(frozen=True, slots=True)
class Ground:
    """Is what a row works with: a running pool with one volume, a defined network with one port."""

    fleet: Fleet
    wire: Wire
    node: str
    pool: pool_pb2.Pool
    volume: volume_pb2.Volume
    network: network_pb2.Network
    port: port_pb2.Port


@pytest.fixture(scope="module")
def ground(fleet: Fleet, wire: Wire, nodes: list[str]) -> Iterator[Ground]:
    """Yield the ground; the rows change nothing on it."""
    node = nodes[0]
    pool_request = pool_pb2.CreatePoolRequest(parent=node, pool_id=unique("pool"), start=True)
    pool_request.pool.spec.dir.SetInParent()
    pool = fleet.wait(fleet.pools.CreatePool(pool_request), pool_pb2.Pool)
    volume = fleet.wait(fleet.volumes.CreateVolume(a_volume(pool.name, "disk")), volume_pb2.Volume)
    network = fleet.wait(fleet.networks.CreateNetwork(a_network(node, unique("net"))), network_pb2.Network)
    port = fleet.wait(
        fleet.ports.CreatePort(port_pb2.CreatePortRequest(parent=network.name, port_id="p1", port=port_pb2.Port())),
        port_pb2.Port,
    )
    yield Ground(fleet, wire, node, pool, volume, network, port)
    gone = network_pb2.DeleteNetworkRequest(name=network.name, force=True)
    fleet.wait(fleet.networks.DeleteNetwork(gone), empty_pb2.Empty)
    fleet.wait(fleet.volumes.DeleteVolume(volume_pb2.DeleteVolumeRequest(name=volume.name)), empty_pb2.Empty)
    fleet.wait(fleet.pools.DeletePool(pool_pb2.DeletePoolRequest(name=pool.name)), empty_pb2.Empty)


def a_volume(parent: str, id_: str, **spec: Any) -> volume_pb2.CreateVolumeRequest:
    """Return a request for a raw volume of 1 MiB."""
    request = volume_pb2.CreateVolumeRequest(parent=parent, volume_id=id_)
    request.volume.spec.CopyFrom(
        volume_pb2.VolumeSpec(**{"capacity_bytes": MIB, "format": volume_pb2.VOLUME_FORMAT_RAW, **spec})
    )
    return request


def a_network(
    parent: str, id_: str, change: Callable[[network_pb2.NetworkSpec], object] = lambda _: None
) -> network_pb2.CreateNetworkRequest:
    """Return a request for a network."""
    request = network_pb2.CreateNetworkRequest(parent=parent, network_id=id_)
    spec = request.network.spec
    spec.nat.SetInParent()
    spec.subnets["lan"].prefix = "192.168.183.0/24"
    change(spec)
    return request


def new_network(g: Ground, change: Callable[[network_pb2.NetworkSpec], object], id_: str = "") -> object:
    """Make a network from a spec that is wrong."""
    request = a_network(g.node, id_ or unique("net"), change)
    request.network.spec.subnets["lan"].prefix = request.network.spec.subnets["lan"].prefix.replace("183", "184")
    return g.fleet.wait(g.fleet.networks.CreateNetwork(request), network_pb2.Network)


def new_pool(g: Ground, id_: str = "", **spec: Any) -> object:
    """Make a pool."""
    request = pool_pb2.CreatePoolRequest(parent=g.node, pool_id=id_ or unique("pool"), start=True)
    request.pool.spec.CopyFrom(pool_pb2.PoolSpec(**spec))
    request.pool.spec.dir.SetInParent()
    return g.fleet.wait(g.fleet.pools.CreatePool(request), pool_pb2.Pool)


def new_volume(g: Ground, id_: str = "", parent: str = "", **spec: Any) -> object:
    """Make a volume."""
    request = a_volume(parent or g.pool.name, id_ or unique("vol"), **spec)
    return g.fleet.wait(g.fleet.volumes.CreateVolume(request), volume_pb2.Volume)


def bare(number: int, value: bytes | int) -> Callable[[Ground], object]:
    """Make a pool whose spec has a field as bytes."""
    return lambda g: g.wire(
        "virtfleet.storage.v1.PoolService/CreatePool",
        field(1, g.node.encode()) + field(2, field(10, field(number, value))) + field(3, unique("pool").encode()),
    )


Row = tuple[str, Refusal, Callable[[Ground], object]]

ROWS: list[Row] = [
    # Pools.
    (
        "pool: id taken",
        Refusal("ALREADY_EXISTS", "RESOURCE_EXISTS"),
        lambda g: new_pool(g, g.pool.name.rpartition("/")[2]),
    ),
    ("pool: id malformed", Refusal(INVALID, "NAME_MALFORMED", ("pool_id",)), lambda g: new_pool(g, "Pool")),
    (
        "pool: unknown",
        Refusal("NOT_FOUND", "RESOURCE_NOT_FOUND"),
        lambda g: g.fleet.pools.StartPool(pool_pb2.StartPoolRequest(name=f"{g.node}/pools/none")),
    ),
    ("pool: unknown field of the spec", Refusal(INVALID, "UNKNOWN_FIELD", ("pool.spec.#900",)), bare(900, 1)),
    ("pool: unknown enum number", Refusal(INVALID, "UNKNOWN_FIELD", ("pool.spec.autostart",)), bare(2, 99)),
    (
        "pool: path with dots",
        Refusal(INVALID, "FIELD_OUT_OF_RANGE", ("pool.spec.target_path",)),
        lambda g: new_pool(g, target_path="/tmp/../etc"),
    ),
    (
        "pool: relative path",
        Refusal(INVALID, "FIELD_OUT_OF_RANGE", ("pool.spec.target_path",)),
        lambda g: new_pool(g, target_path="etc"),
    ),
    (
        "pool: etag of another time",
        Refusal("ABORTED", "ETAG_MISMATCH"),
        lambda g: g.fleet.pools.StopPool(pool_pb2.StopPoolRequest(name=g.pool.name, etag="old")),
    ),
    (
        "pool: uid of another",
        Refusal("FAILED_PRECONDITION", "UID_MISMATCH", (SELF,)),
        lambda g: g.fleet.pools.DeletePool(pool_pb2.DeletePoolRequest(name=g.pool.name, expected_uid=EVE)),
    ),
    (
        "pool: mask path unknown",
        Refusal(INVALID, "MASK_PATH_UNKNOWN", ("update_mask",)),
        lambda g: g.fleet.pools.UpdatePool(
            pool_pb2.UpdatePoolRequest(
                pool=pool_pb2.Pool(name=g.pool.name), update_mask=field_mask_pb2.FieldMask(paths=["spec.nothing"])
            )
        ),
    ),
    # Volumes.
    ("volume: id taken", Refusal("ALREADY_EXISTS", "RESOURCE_EXISTS"), lambda g: new_volume(g, "disk")),
    (
        "volume: pool unknown",
        Refusal("NOT_FOUND", "RESOURCE_NOT_FOUND"),
        lambda g: new_volume(g, parent=f"{g.node}/pools/none"),
    ),
    (
        "volume: negative capacity",
        Refusal(INVALID, "FIELD_OUT_OF_RANGE", ("volume.spec.capacity_bytes",)),
        lambda g: new_volume(g, capacity_bytes=-1),
    ),
    (
        "volume: backing of another node",
        Refusal(INVALID, "REFERENCE_OTHER_NODE", ("volume.spec.backing.volume",)),
        lambda g: new_volume(
            g,
            format=volume_pb2.VOLUME_FORMAT_QCOW2,
            backing=volume_pb2.VolumeBacking(volume="nodes/n77/pools/p/volumes/v"),
        ),
    ),
    (
        "volume: backing that is not there",
        Refusal("NOT_FOUND", "RESOURCE_NOT_FOUND"),
        lambda g: new_volume(
            g, format=volume_pb2.VOLUME_FORMAT_QCOW2, backing=volume_pb2.VolumeBacking(volume="pools/none/volumes/v")
        ),
    ),
    (
        "volume: etag of another time",
        Refusal("ABORTED", "ETAG_MISMATCH"),
        lambda g: g.fleet.volumes.DeleteVolume(volume_pb2.DeleteVolumeRequest(name=g.volume.name, etag="old")),
    ),
    (
        "volume: size zero",
        Refusal(INVALID, "FIELD_OUT_OF_RANGE", ("capacity_bytes",)),
        lambda g: g.fleet.volumes.ResizeVolume(volume_pb2.ResizeVolumeRequest(name=g.volume.name)),
    ),
    (
        "volume: upload without a beginning",
        Refusal(INVALID, "FIELD_REQUIRED", ("content",)),
        lambda g: g.fleet.volumes.UploadVolume(iter([volume_pb2.UploadVolumeRequest(name=g.volume.name)])),
    ),
    (
        "volume: upload without a name",
        Refusal(INVALID, "FIELD_REQUIRED", ("name",)),
        lambda g: g.fleet.volumes.UploadVolume(iter([volume_pb2.UploadVolumeRequest()])),
    ),
    (
        "volume: lookup by nothing",
        Refusal(INVALID, "FIELD_REQUIRED", ("by",)),
        lambda g: g.fleet.volumes.LookupVolume(volume_pb2.LookupVolumeRequest(parent=g.node)),
    ),
    # Networks.
    (
        "network: id taken",
        Refusal("ALREADY_EXISTS", "RESOURCE_EXISTS"),
        lambda g: new_network(g, lambda _: None, g.network.name.rpartition("/")[2]),
    ),
    (
        "network: bridge name too long",
        Refusal(INVALID, "FIELD_OUT_OF_RANGE", ("network.spec.bridge_name",)),
        lambda g: new_network(g, lambda s: setattr(s, "bridge_name", "b" * 16)),
    ),
    (
        "network: prefix with host bits",
        Refusal(INVALID, "FIELD_OUT_OF_RANGE", ("network.spec.subnets.lan.prefix",)),
        lambda g: new_network(g, lambda s: setattr(s.subnets["lan"], "prefix", "192.168.9.1/24")),
    ),
    (
        "network: range outside of its prefix",
        Refusal(INVALID, "FIELD_OUT_OF_RANGE", ("network.spec.subnets.lan.dhcp.ranges[0]",)),
        lambda g: new_network(g, lambda s: s.subnets["lan"].dhcp.ranges.add(first="10.0.0.1", last="10.0.0.2")),
    ),
    (
        "network: a kind that is not built",
        Refusal("UNIMPLEMENTED", "CAPABILITY_MISSING"),
        lambda g: new_network(g, lambda s: s.macvtap.SetInParent()),
    ),
    (
        "network: uid of another",
        Refusal("FAILED_PRECONDITION", "UID_MISMATCH", (SELF,)),
        lambda g: g.fleet.networks.StartNetwork(network_pb2.StartNetworkRequest(name=g.network.name, expected_uid=EVE)),
    ),
    (
        "network: it has ports",
        Refusal("FAILED_PRECONDITION", "HAS_CHILDREN", (SELF,)),
        lambda g: g.fleet.networks.DeleteNetwork(network_pb2.DeleteNetworkRequest(name=g.network.name)),
    ),
    (
        "leases of a network that is not there",
        Refusal("NOT_FOUND", "RESOURCE_NOT_FOUND"),
        lambda g: g.fleet.networks.ListLeases(network_pb2.ListLeasesRequest(parent=f"{g.node}/networks/none")),
    ),
    # Ports.
    (
        "port: id taken",
        Refusal("ALREADY_EXISTS", "RESOURCE_EXISTS"),
        lambda g: g.fleet.ports.CreatePort(
            port_pb2.CreatePortRequest(parent=g.network.name, port_id="p1", port=port_pb2.Port())
        ),
    ),
    (
        "port: address outside of the network",
        Refusal(INVALID, "FIELD_OUT_OF_RANGE", ("port.spec.addresses[0]",)),
        lambda g: g.fleet.ports.CreatePort(
            port_pb2.CreatePortRequest(
                parent=g.network.name,
                port_id="p2",
                port=port_pb2.Port(spec=port_pb2.PortSpec(addresses=["10.9.9.9"])),
            )
        ),
    ),
    # The fleet.
    (
        "node: cordon of an unknown one",
        Refusal("NOT_FOUND", "NODE_UNKNOWN"),
        lambda g: g.fleet.nodes.CordonNode(node_pb2.CordonNodeRequest(name="nodes/n77")),
    ),
    (
        "node: malformed",
        Refusal(INVALID, "NAME_MALFORMED", ("name",)),
        lambda g: g.fleet.nodes.GetNode(node_pb2.GetNodeRequest(name="n1")),
    ),
    (
        "join token: of nothing",
        Refusal(INVALID, "FIELD_REQUIRED", ("join_token",)),
        lambda g: g.fleet.enrollment.CreateJoinToken(enrollment_pb2.CreateJoinTokenRequest()),
    ),
    (
        "join token: two hours",
        Refusal(INVALID, "FIELD_OUT_OF_RANGE", ("join_token.spec.lifetime",)),
        lambda g: g.fleet.enrollment.CreateJoinToken(
            enrollment_pb2.CreateJoinTokenRequest(
                join_token=enrollment_pb2.JoinToken(
                    spec=enrollment_pb2.JoinTokenSpec(node="nodes/n77", lifetime=seconds(7200))
                )
            )
        ),
    ),
    (
        "certificate: unknown role",
        Refusal(INVALID, "FIELD_OUT_OF_RANGE", ("roles[0]",)),
        lambda g: g.fleet.enrollment.IssueUserCertificate(
            enrollment_pb2.IssueUserCertificateRequest(user="eve", roles=["emperor"], certificate_request="x")
        ),
    ),
    (
        "certificate: no request",
        Refusal(INVALID, "DOCUMENT_INVALID", ("certificate_request",)),
        lambda g: g.fleet.enrollment.IssueUserCertificate(
            enrollment_pb2.IssueUserCertificateRequest(user="eve", roles=["viewer"], certificate_request="x")
        ),
    ),
    (
        "certificate: unknown",
        Refusal("NOT_FOUND", "RESOURCE_NOT_FOUND"),
        lambda g: g.fleet.enrollment.RevokeCertificate(
            enrollment_pb2.RevokeCertificateRequest(name="certificates/none")
        ),
    ),
    (
        "enrolment with a token that nobody has given",
        Refusal("UNAUTHENTICATED", "JOIN_TOKEN_INVALID"),
        lambda g: g.fleet.enrollment.EnrollNode(
            enrollment_pb2.EnrollNodeRequest(
                name="nodes/n77",
                token="vf1.nothing",
                services=[
                    enrollment_pb2.ServiceEnrollment(service="compute", certificate_request="x", endpoint="127.0.0.1:1")
                ],
            )
        ),
    ),
]


@pytest.mark.parametrize(("wanted", "call"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_refused_and_nothing_changed(ground: Ground, wanted: Refusal, call: Callable[[Ground], object]) -> None:
    before = everything(ground.fleet, ground.node)
    error = refused(lambda: call(ground))
    names = {ground.pool.name, ground.network.name}
    got = refusal_of(error)
    fields = tuple(SELF if part in names else part for part in got.fields)
    assert Refusal(got.code, got.reason, fields) == wanted, error
    assert everything(ground.fleet, ground.node) == before
    assert not list(ground.fleet.nodes.ListNodes(node_pb2.ListNodesRequest(filter='name="nodes/n77"')).nodes)

from __future__ import annotations

import pytest
from google.longrunning import operations_pb2
from google.protobuf import descriptor_pb2, descriptor_pool
from hypothesis import given
from hypothesis import strategies as st

from virtfleet.compute.v1 import domain_pb2
from virtfleet_gateway import wire
from virtfleet_gateway.routing import (
    OWN,
    Destination,
    Target,
    allows_missing,
    build_table,
    parse_stated,
    routing_field,
    routing_name,
    target_of,
)
from virtfleet_service.errors import FieldConflict, FieldRequired, NameMalformed
from virtfleet_service.methods import facts_of, routing_number

TABLE = build_table()
GET = TABLE["/virtfleet.compute.v1.DomainService/GetDomain"]
UPDATE = TABLE["/virtfleet.compute.v1.DomainService/UpdateDomain"]
SERVER = TABLE["/virtfleet.common.v1.AdminService/GetServer"]
LIST_OPERATIONS = TABLE["/google.longrunning.Operations/ListOperations"]
GET_OPERATION = TABLE["/google.longrunning.Operations/GetOperation"]


def test_every_method_of_nodes_is_known_and_none_of_their_inner_ones() -> None:
    packages = {route.descriptor.containing_service.file.package for route in TABLE.values()}
    assert packages == {
        "virtfleet.compute.v1",
        "virtfleet.storage.v1",
        "virtfleet.network.v1",
        "virtfleet.common.v1",
        "virtfleet.fleet.v1",
        "google.longrunning",
    }
    assert not any("virtfleet.node.v1" in path for path in TABLE)


def test_the_table_agrees_with_what_servers_read_from_the_descriptors() -> None:
    for route in TABLE.values():
        facts = facts_of(route.descriptor)
        assert route.field_path == routing_number(route.descriptor.input_type), route.full_name
        assert route.permission == facts.permission, route.full_name
        assert route.mutates == facts.mutation, route.full_name


def test_a_member_of_a_oneof_routes_no_call() -> None:
    # A parser forgets it when another member follows; the scanner would still see it.
    file = descriptor_pb2.FileDescriptorProto(name="oneof_route.proto", package="oneof_route", syntax="proto3")
    request = file.message_type.add(name="Request")
    request.oneof_decl.add(name="target")
    kind = descriptor_pb2.FieldDescriptorProto
    for number, name in enumerate(("name", "parent"), start=1):
        request.field.add(name=name, number=number, type=kind.TYPE_STRING, label=kind.LABEL_OPTIONAL, oneof_index=0)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    with pytest.raises(ValueError, match="a later member takes it back"):
        routing_field(pool.FindMessageTypeByName("oneof_route.Request"))


def test_volume_data_has_a_lane_of_its_own_and_nothing_else() -> None:
    assert {route.descriptor.name for route in TABLE.values() if route.bulk} == {"UploadVolume", "DownloadVolume"}
    assert {route.descriptor.name for route in TABLE.values() if route.creates_domains} == {
        "CreateDomain",
        "BatchCreateDomains",
    }
    (applied,) = (route for route in TABLE.values() if route.applies_domains)
    number = applied.descriptor.input_type.fields_by_name["allow_missing"].number
    for wanted in (True, False):
        assert allows_missing(domain_pb2.UpdateDomainRequest(allow_missing=wanted).SerializeToString()) is wanted
    assert number == 96
    assert not allows_missing(b"\x80\x06")
    assert not allows_missing(b"\x80\x06\x01\x80\x06\x00"), "the last one counts, as for a parser"


def test_fleet_methods_are_the_gateways_own() -> None:
    fleet = [
        route for route in TABLE.values() if route.descriptor.containing_service.file.package == "virtfleet.fleet.v1"
    ]
    assert fleet
    assert all(route.destination is Destination.GATEWAY for route in fleet)


def test_names_are_read_from_where_the_method_has_them() -> None:
    name = "nodes/n1/domains/web"
    assert routing_name(GET, domain_pb2.GetDomainRequest(name=name).SerializeToString()) == name
    update = domain_pb2.UpdateDomainRequest(domain=domain_pb2.Domain(name=name, uid="x"))
    assert routing_name(UPDATE, update.SerializeToString()) == name
    operations = operations_pb2.ListOperationsRequest(name="nodes/n2/services/storage", filter="nodes/n1/services/x")
    assert routing_name(LIST_OPERATIONS, operations.SerializeToString()) == "nodes/n2/services/storage"
    with pytest.raises(NameMalformed):
        routing_name(GET, wire.delimited(1, b"nodes/n1/domains/a") * 2)
    with pytest.raises(NameMalformed):
        routing_name(GET, wire.delimited(1, b"a" * 5000))


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("nodes/n1/domains/web", Target("n1", "compute")),
        ("nodes/n1", Target("n1", "compute")),
        ("nodes/-/domains/web", Target("-", "compute")),
        ("nodes/" + "a" * 63, Target("a" * 63, "compute")),
    ],
)
def test_names_of_nodes(name: str, target: Target) -> None:
    assert target_of(GET, name) == target


@pytest.mark.parametrize(
    "name",
    [
        "nodes",
        "nodes/",
        "nodes/-x",
        "nodes/N",
        "/nodes/n1",
        "node/n1",
        "nodes/n1 ",
        "nodes/\uff4e1",
        "nodes/" + "a" * 64,
    ],
)
def test_what_is_no_name_of_a_node(name: str) -> None:
    with pytest.raises(NameMalformed):
        target_of(GET, name)


def test_no_name_at_all() -> None:
    with pytest.raises(FieldRequired):
        target_of(GET, "")


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("", OWN),
        ("operations/1", OWN),
        ("gateways/g1", OWN),
        ("nodes/n1/services/network", Target("n1", "network")),
        ("nodes/n1/services/storage/operations/1", Target("n1", "storage")),
    ],
)
def test_names_of_processes(name: str, target: Target) -> None:
    assert target_of(SERVER, name) == target
    assert target_of(LIST_OPERATIONS, name) == target


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("nodes/-/services/-", Target("-", "-")),
        ("nodes/-/services/compute", Target("-", "compute")),
        ("nodes/n1/services/-", Target("-", "-")),
    ],
)
def test_lists_alone_may_ask_many_processes(name: str, target: Target) -> None:
    assert target_of(LIST_OPERATIONS, name) == target
    for route in (SERVER, GET_OPERATION):
        with pytest.raises(NameMalformed):
            target_of(route, name)


@pytest.mark.parametrize(
    "name", ["nodes/n1", "nodes/n1/services", "nodes/n1/services/x", "nodes/-/services/compute-", "nodes/n1/services/-"]
)
def test_what_is_no_name_of_a_process(name: str) -> None:
    with pytest.raises(NameMalformed):
        target_of(SERVER, name)


def test_the_metadata_may_say_the_same_and_nothing_else() -> None:
    name = "nodes/n1/domains/web"
    assert target_of(GET, name, "n1") == target_of(GET, name, "n1/compute") == Target("n1", "compute")
    for stated in ("n2", "n1/storage", "n2/compute"):
        with pytest.raises(FieldConflict):
            target_of(GET, name, stated)
    assert target_of(SERVER, "", "n1/compute") == Target("n1", "compute")
    with pytest.raises(FieldConflict):
        target_of(SERVER, "gateways/g1", "n1")


@given(st.text(max_size=30))
def test_stated_nodes_are_ids(text: str) -> None:
    try:
        target = parse_stated(text)
    except NameMalformed:
        return
    assert text in (target.node, f"{target.node}/{target.service}")

"""The table of errors: what is wrong in itself is refused with code, reason and field, and leaves everything as it was."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import field_mask_pb2

from tests.fleet.rig import (
    MIB,
    Refusal,
    State,
    Wire,
    caller,
    create,
    creation,
    delete,
    domain,
    field,
    get,
    issue,
    mac,
    refusal_of,
    refused,
    seconds,
    small_spec,
    unique,
    until,
    verb,
)
from tests.pki import Pki
from virtfleet.common.v1 import admin_pb2
from virtfleet.compute.v1 import domain_pb2, domain_spec_pb2, watch_pb2
from virtfleet.fleet.v1 import enrollment_pb2, node_pb2
from virtfleet.network.v1 import network_pb2
from virtfleet.node.v1 import caller_pb2
from virtfleet.storage.v1 import pool_pb2, volume_pb2
from virtfleet.type.v1 import resource_pb2
from virtfleet.type.v1 import watch_pb2 as type_watch_pb2
from virtfleet_client import Credentials, Fleet
from virtfleet_client.errors import Unavailable, VirtfleetError

DOMAINS = "virtfleet.compute.v1.DomainService"
CREATE = f"{DOMAINS}/CreateDomain"
INVALID = "INVALID_ARGUMENT"
DOMAIN = "{domain}"
"""Stands for the name of the domain of the row."""
EVE = "00000000-0000-4000-8000-00000000e4e4"


@dataclass(frozen=True, slots=True)
class Stand:
    """Is what a row of the tables works with."""

    fleet: Fleet
    wire: Wire
    node: str
    other_node: str
    domain: domain_pb2.Domain


@pytest.fixture
def stand(fleet: Fleet, wire: Wire, nodes: list[str]) -> Iterator[Stand]:
    """Yield a stopped domain on the first node."""
    with domain(fleet, nodes[0], spec=small_spec(), labels={"row": "errors"}) as made:
        yield Stand(fleet, wire, nodes[0], nodes[1], made)


def everything(fleet: Fleet, node: str) -> list[bytes]:
    """Return all that a node has, as bytes."""
    lists: list[tuple[Any, Any]] = [
        (fleet.domains.ListDomains, domain_pb2.ListDomainsRequest),
        (fleet.pools.ListPools, pool_pb2.ListPoolsRequest),
        (fleet.networks.ListNetworks, network_pb2.ListNetworksRequest),
    ]
    return [
        resource.name.encode() + resource.etag.encode() + resource.spec.SerializeToString(deterministic=True)
        for method, request in lists
        for resource in fleet.pages(method, request(parent=node))
    ]


def update(stand: Stand, *paths: str, changed: domain_pb2.Domain | None = None, **fields: Any) -> object:
    """Change the domain of the stand."""
    wanted = changed or domain_pb2.Domain(name=stand.domain.name)
    mask = field_mask_pb2.FieldMask(paths=paths)
    return stand.fleet.domains.UpdateDomain(
        domain_pb2.UpdateDomainRequest(domain=wanted, update_mask=mask, **fields), timeout=10
    )


def listed(stand: Stand, **fields: Any) -> object:
    """List the domains of the node."""
    fields.setdefault("parent", stand.node)
    return stand.fleet.domains.ListDomains(domain_pb2.ListDomainsRequest(**fields), timeout=10)


def page_token(stand: Stand, **fields: Any) -> str:
    """Return the token of the second page of a list."""
    fields.setdefault("parent", stand.node)
    others = [create(stand.fleet, stand.node, unique("page")) for _ in range(2)]
    try:
        answer = stand.fleet.domains.ListDomains(domain_pb2.ListDomainsRequest(page_size=1, **fields), timeout=10)
    finally:
        for made in others:
            delete(stand.fleet, made.name)
    token: str = answer.next_page_token
    assert token
    return token


def made(stand: Stand, domain_id: str = "", parent: str = "", **fields: Any) -> object:
    """Make a domain."""
    return stand.fleet.domains.CreateDomain(creation(parent or stand.node, domain_id, **fields), timeout=10)


def raw(stand: Stand, *parts: bytes, domain_id: str = "") -> object:
    """Make a domain from the bytes of its message."""
    request = field(1, stand.node.encode()) + field(2, b"".join(parts)) + field(3, (domain_id or unique()).encode())
    return stand.wire(CREATE, request)


def spec(*parts: bytes) -> bytes:
    """Return `spec` of a domain as bytes."""
    return field(10, small_spec().SerializeToString() + b"".join(parts))


Row = tuple[str, Refusal, Callable[[Stand], object]]

REQUESTS: list[Row] = [
    # Names.
    (
        "node unknown",
        Refusal("NOT_FOUND", "NODE_UNKNOWN"),
        lambda s: get(s.fleet, "nodes/n99/domains/web"),
    ),
    (
        "domain unknown",
        Refusal("NOT_FOUND", "RESOURCE_NOT_FOUND"),
        lambda s: get(s.fleet, f"{s.node}/domains/none"),
    ),
    (
        "uid unknown in the fleet",
        Refusal("NOT_FOUND", "RESOURCE_NOT_FOUND"),
        lambda s: get(s.fleet, f"nodes/-/domains/{EVE}"),
    ),
    (
        "name without its collection",
        Refusal(INVALID, "NAME_MALFORMED", ("name",)),
        lambda s: get(s.fleet, f"{s.node}/web"),
    ),
    (
        "name of another kind",
        Refusal(INVALID, "NAME_MALFORMED", ("name",)),
        lambda s: get(s.fleet, f"{s.node}/pools/web"),
    ),
    (
        "name with an empty part",
        Refusal(INVALID, "NAME_MALFORMED", ("name",)),
        lambda s: get(s.fleet, f"{s.node}/domains/"),
    ),
    ("name empty", Refusal(INVALID, "FIELD_REQUIRED", ("name",)), lambda s: get(s.fleet, "")),
    ("name that is none", Refusal(INVALID, "NAME_MALFORMED", ("name",)), lambda s: get(s.fleet, "web")),
    (
        "name with two slashes",
        Refusal(INVALID, "NAME_MALFORMED", ("name",)),
        lambda s: get(s.fleet, f"{s.node}//domains/web"),
    ),
    (
        "name with dots for a path",
        Refusal(INVALID, "NAME_MALFORMED", ("name",)),
        lambda s: get(s.fleet, f"{s.node}/domains/../domains/web"),
    ),
    (
        "name of 5000 characters",
        Refusal(INVALID, "NAME_MALFORMED", ("name",)),
        lambda s: get(s.fleet, f"{s.node}/domains/{'a' * 5000}"),
    ),
    (
        "node of 64 characters",
        Refusal(INVALID, "NAME_MALFORMED", ("name",)),
        lambda s: get(s.fleet, f"nodes/{'n' * 64}/domains/web"),
    ),
    (
        "Cyrillic letter in a name",
        Refusal(INVALID, "NAME_MALFORMED", ("name",)),
        lambda s: get(s.fleet, f"{s.node}/domains/w\u0435b"),
    ),
    # Ids.
    *(
        (
            f"id: {what}",
            Refusal(INVALID, "NAME_MALFORMED", ("domain_id",)),
            lambda s, id_=id_: made(s, id_),
        )
        for what, id_ in (
            ("64 characters", "a" * 64),
            ("capital", "Web"),
            ("underscore", "web_1"),
            ("dot", "web.1"),
            ("slash", "web/1"),
            ("digit first", "1web"),
            ("hyphen last", "web-"),
            ("the fleet's hyphen", "-"),
            ("blank", "web 1"),
            ("newline last", "web\n"),
            ("NUL", "web\0"),
            ("Cyrillic look-alike", "w\u0435b"),
            ("full width", "\uff57eb"),
            ("dotless i", "w\u0131b"),
            ("right-to-left mark", "we\u200fb"),
            ("UUID", "a0000000-0000-4000-8000-000000000000"),
        )
    ),
    (
        "id missing",
        Refusal(INVALID, "FIELD_REQUIRED", ("domain_id",)),
        lambda s: s.wire(CREATE, field(1, s.node.encode()) + field(2, spec())),
    ),
    (
        "domain missing",
        Refusal(INVALID, "FIELD_REQUIRED", ("domain",)),
        lambda s: s.wire(CREATE, field(1, s.node.encode()) + field(3, b"web")),
    ),
    (
        "fleet as parent of a mutation",
        Refusal(INVALID, "NAME_MALFORMED", ("parent",)),
        lambda s: made(s, parent="nodes/-"),
    ),
    # Fields that this server does not know.
    (
        "unknown field of the request",
        Refusal(INVALID, "UNKNOWN_FIELD", ("#9000",)),
        lambda s: s.wire(CREATE, creation(s.node).SerializeToString() + field(9000, b"x")),
    ),
    (
        "unknown field of the spec",
        Refusal(INVALID, "UNKNOWN_FIELD", ("domain.spec.#9000",)),
        lambda s: raw(s, spec(field(9000, 1))),
    ),
    (
        "unknown field in a device",
        Refusal(INVALID, "UNKNOWN_FIELD", ("domain.spec.disks.root.#9000",)),
        lambda s: raw(s, spec(field(40, field(1, b"root") + field(2, field(9000, 1))))),
    ),
    (
        "unknown enum number in the spec",
        Refusal(INVALID, "UNKNOWN_FIELD", ("domain.spec.autostart",)),
        lambda s: raw(s, spec(field(5, 99))),
    ),
    (
        "unknown enum number in a device",
        Refusal(INVALID, "UNKNOWN_FIELD", ("domain.spec.disks.root.bus",)),
        lambda s: raw(s, spec(field(40, field(1, b"root") + field(2, field(3, b"") + field(11, 99))))),
    ),
    (
        "unknown enum number of the request",
        Refusal(INVALID, "UNKNOWN_FIELD", ("mode",)),
        lambda s: s.wire(f"{DOMAINS}/StopDomain", field(1, s.domain.name.encode()) + field(2, 99)),
    ),
    # Values.
    (
        "memory below the least",
        Refusal(INVALID, "FIELD_OUT_OF_RANGE", ("domain.spec.memory.maximum_bytes",)),
        lambda s: made(s, spec={"driver": "test", "memory": {"maximum_bytes": 1}}),
    ),
    (
        "negative page size",
        Refusal(INVALID, "FIELD_OUT_OF_RANGE", ("page_size",)),
        lambda s: listed(s, page_size=-1),
    ),
    (
        "65 labels",
        Refusal(INVALID, "FIELD_OUT_OF_RANGE", ("domain.labels",)),
        lambda s: made(s, labels={f"l{number}": "" for number in range(65)}),
    ),
    (
        "display name of 300 characters",
        Refusal(INVALID, "FIELD_OUT_OF_RANGE", ("domain.display_name",)),
        lambda s: made(s, display_name="x" * 300),
    ),
    (
        "annotations of 100 KiB together",
        Refusal(INVALID, "FIELD_OUT_OF_RANGE", ("annotations",)),
        lambda s: made(s, annotations={"a": "x" * 50_000, "b": "x" * 50_000}),
    ),
    (
        "MAC in capitals",
        Refusal(INVALID, "FIELD_OUT_OF_RANGE", ("domain.spec.interfaces.lan.mac_address",)),
        lambda s: made(s, spec=with_interface("06:02:AA:00:00:01")),
    ),
    (
        "MAC of a group",
        Refusal(INVALID, "FIELD_OUT_OF_RANGE", ("domain.spec.interfaces.lan.mac_address",)),
        lambda s: made(s, spec=with_interface("01:00:5e:00:00:01")),
    ),
    (
        "driver that is not there",
        Refusal(INVALID, "FIELD_OUT_OF_RANGE", ("domain.spec.driver",)),
        lambda s: made(s, spec={"driver": "none"}),
    ),
    (
        "reference to another node",
        Refusal(INVALID, "REFERENCE_OTHER_NODE", ("domain.spec.disks.root.volume",)),
        lambda s: made(s, spec=with_disk(f"{s.other_node}/pools/p/volumes/v")),
    ),
    (
        "reference of another kind",
        Refusal(INVALID, "NAME_MALFORMED", ("domain.spec.disks.root.volume",)),
        lambda s: made(s, spec=with_disk("networks/n")),
    ),
    (
        "inline wait of an hour",
        Refusal(INVALID, "FIELD_OUT_OF_RANGE", ("inline_wait",)),
        lambda s: s.fleet.domains.StartDomain(
            domain_pb2.StartDomainRequest(name=s.domain.name, inline_wait=seconds(3600))
        ),
    ),
    # Masks, filters, tokens.
    (
        "mask path unknown",
        Refusal(INVALID, "MASK_PATH_UNKNOWN", ("update_mask",)),
        lambda s: update(s, "spec.nothing"),
    ),
    (
        "immutable field",
        Refusal(INVALID, "FIELD_CONFLICT", ("spec.driver",)),
        lambda s: update(
            s,
            "spec.driver",
            changed=domain_pb2.Domain(name=s.domain.name, spec=domain_spec_pb2.DomainSpec(driver="qemu")),
        ),
    ),
    (
        "filter without a value",
        Refusal(INVALID, "FILTER_SYNTAX", ("filter",)),
        lambda s: listed(s, filter='labels.row="errors" AND display_name='),
    ),
    (
        "filter on a field that is not there",
        Refusal(INVALID, "FILTER_SYNTAX", ("filter",)),
        lambda s: listed(s, filter='nothing="x"'),
    ),
    (
        "filter of the fleet's list",
        Refusal(INVALID, "FILTER_SYNTAX", ("filter",)),
        lambda s: listed(s, parent="nodes/-", filter="(("),
    ),
    (
        "filter with an unknown enum name",
        Refusal(INVALID, "FILTER_SYNTAX", ("filter",)),
        lambda s: listed(s, filter="status.state=DANCING"),
    ),
    (
        "page token that is garbage",
        Refusal(INVALID, "PAGE_TOKEN_INVALID", ("page_token",)),
        lambda s: listed(s, page_token="Z2FyYmFnZQ=="),
    ),
    (
        "page token of another filter",
        Refusal(INVALID, "PAGE_TOKEN_INVALID", ("page_token",)),
        lambda s: listed(s, page_token=page_token(s), filter='labels.row="errors"'),
    ),
    (
        "page token of another node",
        Refusal(INVALID, "PAGE_TOKEN_INVALID", ("page_token",)),
        lambda s: listed(s, parent=s.other_node, page_token=page_token(s)),
    ),
    (
        "page token of the fleet's list at a node",
        Refusal(INVALID, "PAGE_TOKEN_INVALID", ("page_token",)),
        lambda s: listed(s, page_token=page_token(s, parent="nodes/-", allow_stale=True)),
    ),
    (
        "page token of a node's list at the fleet",
        Refusal(INVALID, "PAGE_TOKEN_INVALID", ("page_token",)),
        lambda s: listed(s, parent="nodes/-", page_token=page_token(s)),
    ),
    (
        "page token of another kind",
        Refusal(INVALID, "PAGE_TOKEN_INVALID", ("page_token",)),
        lambda s: s.fleet.pools.ListPools(pool_pb2.ListPoolsRequest(parent=s.node, page_token=page_token(s))),
    ),
    # What is there, and what the caller thinks is there.
    (
        "id taken",
        Refusal("ALREADY_EXISTS", "RESOURCE_EXISTS"),
        lambda s: made(s, s.domain.name.rpartition("/")[2]),
    ),
    (
        "uid taken",
        Refusal("ALREADY_EXISTS", "IDENTITY_IN_USE"),
        lambda s: made(s, uid=s.domain.uid),
    ),
    (
        "etag of another time, delete",
        Refusal("ABORTED", "ETAG_MISMATCH"),
        lambda s: s.fleet.domains.DeleteDomain(domain_pb2.DeleteDomainRequest(name=s.domain.name, etag="old")),
    ),
    (
        "etag of another time, update",
        Refusal("ABORTED", "ETAG_MISMATCH"),
        lambda s: update(
            s, "display_name", changed=domain_pb2.Domain(name=s.domain.name, etag="old", display_name="x")
        ),
    ),
    (
        "uid of another, start",
        Refusal("FAILED_PRECONDITION", "UID_MISMATCH", (DOMAIN,)),
        lambda s: s.fleet.domains.StartDomain(domain_pb2.StartDomainRequest(name=s.domain.name, expected_uid=EVE)),
    ),
    (
        "uid of another, delete",
        Refusal("FAILED_PRECONDITION", "UID_MISMATCH", (DOMAIN,)),
        lambda s: s.fleet.domains.DeleteDomain(domain_pb2.DeleteDomainRequest(name=s.domain.name, expected_uid=EVE)),
    ),
    (
        "uid of another, update",
        Refusal("FAILED_PRECONDITION", "UID_MISMATCH", (DOMAIN,)),
        lambda s: update(s, "display_name", changed=domain_pb2.Domain(name=s.domain.name, uid=EVE, display_name="x")),
    ),
    # The way through the gateway.
    (
        "name twice",
        Refusal(INVALID, "NAME_MALFORMED", ("name",)),
        lambda s: s.wire(f"{DOMAINS}/DeleteDomain", field(1, s.domain.name.encode()) * 2),
    ),
    (
        "name twice, another node second",
        Refusal(INVALID, "NAME_MALFORMED", ("name",)),
        lambda s: s.wire(
            f"{DOMAINS}/GetDomain",
            field(1, s.domain.name.encode()) + field(1, s.domain.name.replace(s.node, s.other_node).encode()),
        ),
    ),
    (
        "resource of an update twice",
        Refusal(INVALID, "NAME_MALFORMED", ("domain.name",)),
        lambda s: s.wire(f"{DOMAINS}/UpdateDomain", field(1, field(1, s.domain.name.encode())) * 2),
    ),
    (
        "bytes that are no message",
        Refusal(INVALID, "NAME_MALFORMED", ("name",)),
        lambda s: s.wire(f"{DOMAINS}/GetDomain", b"\xff\xff\xff\xff"),
    ),
    (
        "metadata of another node",
        Refusal(INVALID, "FIELD_CONFLICT", ("name",)),
        lambda s: s.fleet.domains.GetDomain(
            domain_pb2.GetDomainRequest(name=s.domain.name),
            metadata=(("x-virtfleet-node", s.other_node.removeprefix("nodes/")),),
        ),
    ),
    (
        "metadata of an unknown node",
        Refusal(INVALID, "FIELD_CONFLICT", ("name",)),
        lambda s: s.fleet.domains.GetDomain(
            domain_pb2.GetDomainRequest(name=s.domain.name), metadata=(("x-virtfleet-node", "n99"),)
        ),
    ),
    (
        "method unknown",
        Refusal("UNIMPLEMENTED", "METHOD_NOT_IMPLEMENTED"),
        lambda s: s.wire(f"{DOMAINS}/TeleportDomain", field(1, s.domain.name.encode())),
    ),
    (
        "service unknown",
        Refusal("UNIMPLEMENTED", "METHOD_NOT_IMPLEMENTED"),
        lambda s: s.wire("virtfleet.compute.v1.TeleportService/Teleport", field(1, s.domain.name.encode())),
    ),
    (
        "method of the node's own package",
        Refusal("UNIMPLEMENTED", "METHOD_NOT_IMPLEMENTED"),
        lambda s: s.wire("virtfleet.node.v1.PlugService/PlugPort", field(1, f"{s.node}/networks/n/ports/p".encode())),
    ),
    # Operations.
    (
        "operation unknown",
        Refusal("NOT_FOUND", "RESOURCE_NOT_FOUND"),
        lambda s: s.wire(
            "google.longrunning.Operations/GetOperation",
            field(1, f"{s.node}/services/compute/operations/none".encode()),
        ),
    ),
    (
        "operation of a service that no node has",
        Refusal(INVALID, "NAME_MALFORMED", ("name",)),
        lambda s: s.wire(
            "google.longrunning.Operations/GetOperation",
            field(1, f"{s.node}/services/weather/operations/none".encode()),
        ),
    ),
    (
        "server of an unknown node",
        Refusal("NOT_FOUND", "NODE_UNKNOWN"),
        lambda s: s.fleet.servers.GetServer(admin_pb2.GetServerRequest(name="nodes/n99/services/compute")),
    ),
    (
        "node of the gateway unknown",
        Refusal("NOT_FOUND", "NODE_UNKNOWN"),
        lambda s: s.fleet.nodes.GetNode(node_pb2.GetNodeRequest(name="nodes/n99")),
    ),
    # Watches.
    (
        "resume token that is garbage",
        Refusal(INVALID, "PAGE_TOKEN_INVALID", ("resume_token",)),
        lambda s: next(
            s.fleet.channel.unary_stream(
                "/virtfleet.compute.v1.WatchService/WatchResources",
                request_serializer=watch_pb2.WatchResourcesRequest.SerializeToString,
            )(watch_pb2.WatchResourcesRequest(parent=s.node, resume_token="garbage"), timeout=10)
        ),
    ),
]


def with_interface(address: str) -> Any:
    """Return a spec with one interface."""
    found = small_spec()
    found.interfaces["lan"].mac_address = address
    return found


def with_disk(volume: str) -> Any:
    """Return a spec with one disk."""
    found = small_spec()
    found.disks["root"].volume = volume
    return found


@pytest.mark.parametrize(("wanted", "call"), [row[1:] for row in REQUESTS], ids=[row[0] for row in REQUESTS])
def test_refused_and_nothing_changed(stand: Stand, wanted: Refusal, call: Callable[[Stand], object]) -> None:
    before = everything(stand.fleet, stand.node)
    error = refused(lambda: call(stand))
    fields = tuple(stand.domain.name if part == DOMAIN else part for part in wanted.fields)
    assert refusal_of(error) == Refusal(wanted.code, wanted.reason, fields), error
    assert everything(stand.fleet, stand.node) == before
    assert get(stand.fleet, stand.domain.name) == stand.domain


def test_a_filter_says_where_it_is_wrong(stand: Stand) -> None:
    text = 'labels.row="errors" AND ) OR display_name="x"'
    error = refused(lambda: listed(stand, filter=text))
    assert refusal_of(error) == Refusal(INVALID, "FILTER_SYNTAX", ("filter",))
    assert int(error.metadata["position"]) == text.index(")"), error.metadata


@pytest.mark.parametrize("size_bytes", [5 * MIB, 1 * MIB])
def test_a_huge_label_is_refused_and_the_connection_lives_on(stand: Stand, size_bytes: int) -> None:
    before = everything(stand.fleet, stand.node)
    error = refused(lambda: made(stand, labels={"big": "x" * size_bytes}))
    assert error.code().name in ("RESOURCE_EXHAUSTED", INVALID)
    if error.code().name == INVALID:
        assert refusal_of(error) == Refusal(INVALID, "FIELD_OUT_OF_RANGE", ("domain.labels.big",))
    assert everything(stand.fleet, stand.node) == before


def test_a_field_that_only_the_server_sets_is_passed_over_in_a_mask(stand: Stand) -> None:
    changed = domain_pb2.Domain(name=stand.domain.name)
    changed.status.state = State.DOMAIN_STATE_RUNNING
    update(stand, "status.state", "generation", changed=changed)
    assert get(stand.fleet, stand.domain.name) == stand.domain


# Identities that are taken.


def test_a_mac_address_is_given_once(stand: Stand) -> None:
    address = mac()
    parent = stand.node
    network = network_pb2.CreateNetworkRequest(parent=parent, network_id=unique("net"))
    network.network.spec.isolated.SetInParent()
    lan = stand.fleet.wait(stand.fleet.networks.CreateNetwork(network), network_pb2.Network)
    reference = lan.name.removeprefix(f"{parent}/")
    wanted = small_spec()
    wanted.interfaces["lan"].network = reference
    wanted.interfaces["lan"].mac_address = address
    try:
        with domain(stand.fleet, parent, spec=wanted) as first:
            before = everything(stand.fleet, parent)
            error = refused(lambda: stand.fleet.wait(made(stand, spec=wanted), domain_pb2.Domain))  # type: ignore[arg-type]  # an operation
            assert (error.code().name, error.reason) == ("ALREADY_EXISTS", "IDENTITY_IN_USE"), error
            assert error.metadata["holder"], error.metadata
            assert everything(stand.fleet, parent) == before
            assert get(stand.fleet, first.name) == first
        with domain(stand.fleet, parent, spec=wanted) as second:
            assert second.status.resolved_spec.interfaces["lan"].mac_address == address
    finally:
        stand.fleet.networks.DeleteNetwork(network_pb2.DeleteNetworkRequest(name=lan.name), timeout=10)


# Repetition of a call.


def repeatable(stand: Stand, request_id: str, domain_id: str, **fields: Any) -> domain_pb2.CreateDomainRequest:
    """Return a request that may be sent again."""
    request = creation(stand.node, domain_id, **fields)
    request.request_id = request_id
    return request


def test_a_repeated_call_has_one_effect_and_one_answer(stand: Stand) -> None:
    id_, request_id = unique(), str(uuid.uuid4())
    request = repeatable(stand, request_id, id_, labels={"a": "1", "b": "2"}, start="running")
    first = stand.fleet.wait(stand.fleet.domains.CreateDomain(request), domain_pb2.Domain)
    try:
        again = stand.fleet.domains.CreateDomain(request)
        assert stand.fleet.wait(again, domain_pb2.Domain).uid == first.uid
        assert get(stand.fleet, first.name).status.runtime_id == first.status.runtime_id
    finally:
        delete(stand.fleet, first.name)
    # Also after the domain has gone: the call has been answered.
    assert stand.fleet.wait(stand.fleet.domains.CreateDomain(request), domain_pb2.Domain).uid == first.uid
    assert refused(lambda: get(stand.fleet, first.name)).reason == "RESOURCE_NOT_FOUND"


def test_maps_in_another_order_are_the_same_call(stand: Stand) -> None:
    id_, request_id = unique(), str(uuid.uuid4())
    entries = [field(1, key) + field(2, value) for key, value in ((b"a", b"1"), (b"b", b"2"), (b"c", b"3"))]

    def encoded(labels: list[bytes]) -> bytes:
        body = b"".join(field(4, entry) for entry in labels) + spec()
        tail = field(3, id_.encode()) + field(91, request_id.encode())
        return field(1, stand.node.encode()) + field(2, body) + tail

    first = stand.wire(CREATE, encoded(entries))
    try:
        assert stand.wire(CREATE, encoded(entries[::-1])) == first
    finally:
        delete(stand.fleet, f"{stand.node}/domains/{id_}")


def test_a_request_id_is_of_one_body(stand: Stand) -> None:
    id_, request_id = unique(), str(uuid.uuid4())
    name = f"{stand.node}/domains/{id_}"
    stand.fleet.domains.CreateDomain(repeatable(stand, request_id, id_))
    try:
        before = get(stand.fleet, name)
        other = repeatable(stand, request_id, id_, labels={"other": "body"})
        error = refused(lambda: stand.fleet.domains.CreateDomain(other))
        assert refusal_of(error) == Refusal(INVALID, "REQUEST_ID_REUSED", ("request_id",))
        assert get(stand.fleet, name) == before
        # Of another method it is another one.
        start = domain_pb2.StartDomainRequest(name=name, request_id=request_id)
        started = stand.fleet.wait(stand.fleet.domains.StartDomain(start), domain_pb2.Domain)
        assert started.status.state == State.DOMAIN_STATE_RUNNING
    finally:
        delete(stand.fleet, name)


def test_a_request_id_is_of_one_caller(
    stand: Stand, environment: dict[str, str], people: dict[str, Credentials]
) -> None:
    id_, request_id = unique(), str(uuid.uuid4())
    request = repeatable(stand, request_id, id_)
    first = stand.fleet.wait(stand.fleet.domains.CreateDomain(request), domain_pb2.Domain)
    try:
        with caller(environment, people["admin"]) as other:
            error = refused(lambda: other.domains.CreateDomain(request))
        assert error.reason == "RESOURCE_EXISTS", "what another caller got is not told"
        assert get(stand.fleet, first.name) == first
    finally:
        delete(stand.fleet, first.name)


# Starts and changes that cannot be.


def test_a_change_that_cannot_go_live_is_refused_as_a_whole(stand: Stand) -> None:
    running = verb(stand.fleet, "StartDomain", stand.domain.name)
    wanted = domain_pb2.Domain(name=running.name, spec=domain_spec_pb2.DomainSpec(title="x"))
    wanted.spec.memory.maximum_bytes = 128 * MIB
    paths = ("spec.memory.maximum_bytes", "spec.title")
    for scope in (resource_pb2.CHANGE_SCOPE_LIVE_AND_CONFIG, resource_pb2.CHANGE_SCOPE_LIVE):
        mask = paths if scope == resource_pb2.CHANGE_SCOPE_LIVE_AND_CONFIG else paths[:1]
        error = refused(lambda scope=scope, mask=mask: update(stand, *mask, changed=wanted, scope=scope))  # type: ignore[misc]  # binds the round's own
        assert refusal_of(error) == Refusal(
            "FAILED_PRECONDITION", "NOT_LIVE_UPDATABLE", ("spec.memory.maximum_bytes",)
        ), error
        assert get(stand.fleet, running.name) == running
    planned = update(stand, *paths, changed=wanted)
    assert planned.done  # type: ignore[attr-defined]  # an operation
    after = get(stand.fleet, running.name)
    assert [change.path for change in after.status.pending_changes] == ["spec.memory.maximum_bytes"]
    assert after.status.active_spec.memory.maximum_bytes == 64 * MIB
    assert after.spec.memory.maximum_bytes == 128 * MIB


def start(stand: Stand, name: str) -> object:
    """Start a domain and wait for the end."""
    return stand.fleet.wait(
        stand.fleet.domains.StartDomain(domain_pb2.StartDomainRequest(name=name), timeout=20), domain_pb2.Domain
    )


def test_a_start_without_its_volume(stand: Stand) -> None:
    pool = pool_pb2.CreatePoolRequest(parent=stand.node, pool_id=unique("pool"), start=True)
    pool.pool.spec.dir.SetInParent()
    made_pool = stand.fleet.wait(stand.fleet.pools.CreatePool(pool), pool_pb2.Pool)
    volume = volume_pb2.CreateVolumeRequest(parent=made_pool.name, volume_id="disk")
    volume.volume.spec.capacity_bytes = MIB
    volume.volume.spec.format = volume_pb2.VOLUME_FORMAT_RAW
    disk = stand.fleet.wait(stand.fleet.volumes.CreateVolume(volume), volume_pb2.Volume)
    try:
        with domain(stand.fleet, stand.node, spec=with_disk(disk.name)) as stopped:
            assert stopped.spec.disks["root"].volume == disk.name.removeprefix(f"{stand.node}/")
            started = verb(stand.fleet, "StartDomain", stopped.name)
            assert started.status.state == State.DOMAIN_STATE_RUNNING
            held = stand.fleet.volumes.GetVolume(volume_pb2.GetVolumeRequest(name=disk.name))
            assert [(one.domain, one.device_id) for one in held.status.attachments] == [(stopped.name, "root")]
            with domain(stand.fleet, stand.node, spec=with_disk(disk.name)) as second:
                error = refused(lambda: start(stand, second.name))
                assert (error.code().name, error.reason) == ("FAILED_PRECONDITION", "RESOURCE_IN_USE"), error
                assert stopped.name in error.metadata["holder"], error.metadata
                assert get(stand.fleet, second.name).status.state == State.DOMAIN_STATE_SHUT_OFF
            for call in (
                lambda: stand.fleet.volumes.DeleteVolume(volume_pb2.DeleteVolumeRequest(name=disk.name)),
                lambda: stand.fleet.pools.StopPool(pool_pb2.StopPoolRequest(name=made_pool.name)),
            ):
                error = refused(call)
                assert (error.code().name, error.reason) == ("FAILED_PRECONDITION", "RESOURCE_IN_USE"), error
            verb(stand.fleet, "StopDomain", stopped.name, mode=domain_pb2.STOP_MODE_FORCE)
            held = stand.fleet.volumes.GetVolume(volume_pb2.GetVolumeRequest(name=disk.name))
            assert not held.status.attachments

            stand.fleet.wait(stand.fleet.pools.StopPool(pool_pb2.StopPoolRequest(name=made_pool.name)), pool_pb2.Pool)
            error = refused(lambda: start(stand, stopped.name))
            assert (error.code().name, error.reason) == ("FAILED_PRECONDITION", "WRONG_STATE"), error
            assert error.metadata["resource"] == made_pool.name, error.metadata
            assert get(stand.fleet, stopped.name).status.state == State.DOMAIN_STATE_SHUT_OFF

            stand.fleet.wait(stand.fleet.pools.StartPool(pool_pb2.StartPoolRequest(name=made_pool.name)), pool_pb2.Pool)
            stand.fleet.volumes.DeleteVolume(volume_pb2.DeleteVolumeRequest(name=disk.name))
            error = refused(lambda: start(stand, stopped.name))
            assert (error.code().name, error.reason) == ("NOT_FOUND", "RESOURCE_NOT_FOUND"), error
            assert error.metadata["resource"] == disk.name, error.metadata
            after = get(stand.fleet, stopped.name)
            assert after.status.state == State.DOMAIN_STATE_SHUT_OFF
            assert after.status.last_failure.message
    finally:
        stand.fleet.pools.StopPool(pool_pb2.StopPoolRequest(name=made_pool.name), timeout=20)
        stand.fleet.pools.DeletePool(pool_pb2.DeletePoolRequest(name=made_pool.name), timeout=20)


def test_an_interface_without_its_network(stand: Stand) -> None:
    wanted = small_spec()
    wanted.interfaces["lan"].network = "networks/absent"
    before = everything(stand.fleet, stand.node)
    error = refused(lambda: stand.fleet.wait(made(stand, spec=wanted), domain_pb2.Domain))  # type: ignore[arg-type]  # an operation
    assert (error.code().name, error.reason) == ("NOT_FOUND", "RESOURCE_NOT_FOUND"), error
    assert error.metadata["resource"] == f"{stand.node}/networks/absent"
    assert everything(stand.fleet, stand.node) == before


def test_a_network_that_does_not_run(stand: Stand) -> None:
    network = network_pb2.CreateNetworkRequest(parent=stand.node, network_id=unique("net"))
    network.network.spec.isolated.SetInParent()
    lan = stand.fleet.wait(stand.fleet.networks.CreateNetwork(network), network_pb2.Network)
    wanted = small_spec()
    wanted.interfaces["lan"].network = lan.name
    try:
        with domain(stand.fleet, stand.node, spec=wanted) as stopped:
            error = refused(lambda: start(stand, stopped.name))
            assert (error.code().name, error.reason) == ("FAILED_PRECONDITION", "WRONG_STATE"), error
            assert error.metadata["resource"] == lan.name, error.metadata
            assert get(stand.fleet, stopped.name).status.state == State.DOMAIN_STATE_SHUT_OFF
    finally:
        stand.fleet.networks.DeleteNetwork(network_pb2.DeleteNetworkRequest(name=lan.name), timeout=10)


# Who calls.


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

"""The table of errors: what is wrong in itself is refused with code, reason and field, and leaves everything as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.fleet.rig import (
    MIB,
    Refusal,
    State,
    creation,
    field,
    get,
    refusal_of,
    refused,
    seconds,
)
from tests.fleet.stand import (
    CREATE,
    DOMAINS,
    INVALID,
    Stand,
    everything,
    listed,
    made,
    page_token,
    raw,
    spec,
    update,
    with_disk,
    with_interface,
)
from virtfleet.common.v1 import admin_pb2
from virtfleet.compute.v1 import domain_pb2, domain_spec_pb2, watch_pb2
from virtfleet.fleet.v1 import node_pb2
from virtfleet.storage.v1 import pool_pb2

DOMAIN = "{domain}"
"""Stands for the name of the domain of the row."""
EVE = "00000000-0000-4000-8000-00000000e4e4"


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
        Refusal(INVALID, "FIELD_OUT_OF_RANGE", ("domain.annotations",)),
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
        Refusal(INVALID, "FIELD_CONFLICT", ("domain.spec.driver",)),
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
        Refusal(INVALID, "DOCUMENT_INVALID"),
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


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        (5 * MIB, Refusal("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE")),
        (1 * MIB, Refusal(INVALID, "FIELD_OUT_OF_RANGE", ("domain.labels.big",))),
    ],
)
def test_a_huge_label_is_refused_and_the_connection_lives_on(stand: Stand, size: int, wanted: Refusal) -> None:
    before = everything(stand.fleet, stand.node)
    error = refused(lambda: made(stand, labels={"big": "x" * size}))
    assert refusal_of(error) == wanted
    assert everything(stand.fleet, stand.node) == before


def test_a_field_that_only_the_server_sets_is_passed_over_in_a_mask(stand: Stand) -> None:
    changed = domain_pb2.Domain(name=stand.domain.name)
    changed.status.state = State.DOMAIN_STATE_RUNNING
    update(stand, "status.state", "generation", changed=changed)
    assert get(stand.fleet, stand.domain.name) == stand.domain

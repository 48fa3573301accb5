"""A call that is repeated: one effect, one answer, for one caller and one body."""

from __future__ import annotations

import uuid
from typing import Any

from tests.fleet.rig import (
    Refusal,
    State,
    caller,
    creation,
    delete,
    field,
    get,
    refusal_of,
    refused,
    unique,
)
from tests.fleet.stand import (
    CREATE,
    INVALID,
    Stand,
    spec,
)
from virtfleet.compute.v1 import domain_pb2
from virtfleet_client import Credentials


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

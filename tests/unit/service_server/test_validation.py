"""Requests that this server does not understand, or that break their rules."""

from __future__ import annotations

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from virtfleet.compute.v1 import domain_pb2
from virtfleet.node.v1 import attachment_pb2
from virtfleet_service import errors
from virtfleet_service.validation import ENUMS, RequestCheck, descriptor_of, has_rules, unknown_fields

CREATE = RequestCheck(domain_pb2.CreateDomainRequest, mutation=True)
ATTACH = RequestCheck(attachment_pb2.AttachVolumeRequest, mutation=True)


def attach(**changes: object) -> attachment_pb2.AttachVolumeRequest:
    request = attachment_pb2.AttachVolumeRequest(
        name="nodes/n1/pools/p/volumes/v",
        domain_uid="6ff0a01c-53f3-4c5c-9bb6-0f7bd16c2f1d",
        device_id="root",
        mode=attachment_pb2.ATTACHMENT_MODE_EXCLUSIVE,
    )
    for name, value in changes.items():
        setattr(request, name, value)
    return request


def checked(check: RequestCheck, request: Message) -> None:
    encoded = request.SerializeToString()
    check.check(check.decode(encoded), encoded)


def test_a_good_request_passes() -> None:
    checked(ATTACH, attach())


@pytest.mark.parametrize(
    ("changes", "kind", "path"),
    [
        ({"name": ""}, errors.FieldRequired, "name"),
        ({"device_id": ""}, errors.FieldRequired, "device_id"),
        ({"domain_uid": "x"}, errors.NameMalformed, "domain_uid"),
        ({"mode": 0}, errors.FieldRequired, "mode"),
        ({"mode": 9}, errors.UnknownField, "mode"),
    ],
)
def test_each_broken_rule_has_its_reason(
    changes: dict[str, object], kind: type[errors.VirtfleetError], path: str
) -> None:
    with pytest.raises(kind) as caught:
        checked(ATTACH, attach(**changes))
    assert caught.value.field == path


@pytest.mark.parametrize(
    ("seconds", "nanos"), [(1, 1_000_000_000), (1, -1), (-1, 1), (0, -(1 << 31)), (315_576_000_001, 0)]
)
def test_what_no_program_could_write_as_a_duration_is_refused(seconds: int, nanos: int) -> None:
    request = domain_pb2.CreateDomainRequest(parent="nodes/n1", domain_id="web")
    for delay in (request.domain.spec.test.crash_delay, request.inline_wait):
        delay.seconds, delay.nanos = seconds, nanos
    with pytest.raises(errors.FieldOutOfRange) as caught:
        checked(CREATE, request)
    assert caught.value.field == "domain.spec.test.crash_delay"
    assert [path for path, _ in caught.value.violations] == ["domain.spec.test.crash_delay", "inline_wait"]


@pytest.mark.parametrize(("seconds", "nanos"), [(0, 0), (1, 999_999_999), (0, 1), (30, 0)])
def test_a_duration_passes(seconds: int, nanos: int) -> None:
    request = domain_pb2.CreateDomainRequest(parent="nodes/n1", domain_id="web")
    request.domain.spec.test.crash_delay.seconds, request.domain.spec.test.crash_delay.nanos = seconds, nanos
    checked(CREATE, request)


def test_all_broken_rules_are_listed() -> None:
    with pytest.raises(errors.FieldRequired) as caught:
        checked(ATTACH, attach(name="", domain_uid="x"))
    assert [path for path, _ in caught.value.violations] == ["name", "domain_uid"]


def test_a_value_out_of_range_names_its_path_through_a_map() -> None:
    request = domain_pb2.CreateDomainRequest(parent="nodes/n1", domain_id="web")
    request.domain.labels["k"] = "x" * 300
    with pytest.raises(errors.FieldOutOfRange) as caught:
        checked(CREATE, request)
    assert caught.value.field == "domain.labels.k"


def test_types_without_rules_are_known() -> None:
    assert has_rules(descriptor_of(domain_pb2.CreateDomainRequest))
    assert not has_rules(descriptor_of(attachment_pb2.ReleaseVolumeResponse))
    assert not ENUMS.of(descriptor_of(attachment_pb2.ReleaseVolumeRequest))
    assert ENUMS.of(descriptor_of(attachment_pb2.AttachVolumeRequest))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


@given(st.lists(st.sampled_from([2, 10, 12]), max_size=3), st.integers(min_value=1000, max_value=100_000))
def test_an_unknown_field_is_found_wherever_it_stands(path: list[int], number: int) -> None:
    # Bytes of our own, not of the classes: they could not write what they do not know.
    extra = _varint(number << 3) + b"\x01"
    names = {2: "domain", 10: "spec", 12: "memory"}
    path = path if path == [2, 10, 12][: len(path)] else []
    for field in reversed(path):
        extra = _varint(field << 3 | 2) + _varint(len(extra)) + extra
    encoded = domain_pb2.CreateDomainRequest(parent="nodes/n1", domain_id="web").SerializeToString() + extra
    with pytest.raises(errors.UnknownField) as caught:
        CREATE.check(CREATE.decode(encoded), encoded)
    assert caught.value.field == "".join(f"{names[field]}." for field in path) + f"#{number}"


@given(st.binary(max_size=200))
def test_the_quick_look_and_the_walk_agree(encoded: bytes) -> None:
    try:
        message = CREATE.decode(encoded)
    except errors.DocumentInvalid:
        return
    quick = CREATE._has_unknown(encoded)
    slow = bool(list(unknown_fields(message)))
    # The quick look also sees what is unknown inside map entries, which the walk cannot reach.
    assert quick or not slow


def test_a_field_that_is_unknown_inside_a_map_entry_is_refused_too() -> None:
    entry = b"\x0a\x01k\x12\x01v" + _varint(900 << 3) + b"\x01"
    domain = _varint(4 << 3 | 2) + _varint(len(entry)) + entry
    encoded = domain_pb2.CreateDomainRequest(parent="nodes/n1", domain_id="web").SerializeToString()
    encoded += _varint(2 << 3 | 2) + _varint(len(domain)) + domain
    message = CREATE.decode(encoded)
    if CREATE._has_unknown(encoded):
        with pytest.raises(errors.UnknownField):
            CREATE.check(message, encoded)

from __future__ import annotations

from collections.abc import Callable

import pytest
from google.longrunning import operations_pb2
from google.protobuf import descriptor_pb2, message
from hypothesis import given
from hypothesis import strategies as st

from virtfleet_gateway import wire

# Two messages with strings at known numbers: ServiceOptions-free, plain and old, so that the real parser is the judge.
LIST = operations_pb2.ListOperationsRequest  # filter 1, page_size 2, page_token 3, name 4


def varint(value: int) -> bytes:
    return wire.varint(value)


def overlong(value: int, extra: int) -> bytes:
    encoded = bytearray(varint(value))
    for _ in range(extra):
        encoded[-1] |= 0x80
        encoded.append(0)
    return bytes(encoded)


texts = st.text(max_size=40)
numbers = st.one_of(st.integers(1, 8), st.integers(1, (1 << 29) - 1))


@st.composite
def field(draw: st.DrawFn, depth: int = 0) -> bytes:
    number = draw(numbers)
    kind = draw(st.sampled_from([0, 1, 2, 2, 2, 3, 5] if depth < 2 else [0, 1, 2, 5]))
    tag = overlong(number << 3 | kind, draw(st.integers(0, 1)))
    if kind == 0:
        return tag + varint(draw(st.integers(0, (1 << 64) - 1)))
    if kind == 1:
        return tag + draw(st.binary(min_size=8, max_size=8))
    if kind == 5:
        return tag + draw(st.binary(min_size=4, max_size=4))
    if kind == 2:
        payload = draw(st.one_of(texts.map(str.encode), st.binary(max_size=20)))
        return tag + overlong(len(payload), draw(st.integers(0, 1))) + payload
    inner = b"".join(draw(st.lists(field(depth + 1), max_size=3)))
    return tag + inner + varint(number << 3 | 4)


def judge(data: bytes, path: tuple[int, ...], parse: type[message.Message], read: str) -> None:
    """What the scanner accepts, the parser accepts with the same value."""
    try:
        found = wire.string_at(data, path)
    except wire.WireError:
        return
    parsed = parse()
    try:
        parsed.ParseFromString(data)
    except message.DecodeError:
        # The scanner looks at the way to one string only; the parser may refuse what stands elsewhere. That is the safe side.
        return
    value: object = parsed
    for part in read.split("."):
        value = getattr(value, part)
    assert found == value


@given(st.lists(field(), max_size=6).map(b"".join))
def test_agrees_with_the_parser_on_built_messages(data: bytes) -> None:
    judge(data, (1,), LIST, "filter")
    judge(data, (4,), LIST, "name")


@given(st.binary(max_size=60))
def test_agrees_with_the_parser_on_noise(data: bytes) -> None:
    judge(data, (1,), LIST, "filter")
    judge(data, (1,), descriptor_pb2.FileDescriptorProto, "name")


@given(st.lists(field(), max_size=4).map(b"".join), st.lists(field(), max_size=4).map(b"".join))
def test_agrees_with_the_parser_on_embedded_resources(inner: bytes, outer: bytes) -> None:
    # FileDescriptorProto.options (8) is a FileOptions whose field 1 is a string; neither is a member of a oneof.
    judge(wire.delimited(8, inner) + outer, (8, 1), descriptor_pb2.FileDescriptorProto, "options.java_package")


@given(st.lists(field(), max_size=6).map(b"".join), st.integers(0, 400))
def test_a_cut_message_is_never_read_differently(data: bytes, cut: int) -> None:
    judge(data[:cut], (4,), LIST, "name")


@given(texts, texts, texts, st.integers(-(1 << 31), (1 << 31) - 1))
def test_finds_what_an_encoder_wrote(filter_text: str, token: str, name: str, size: int) -> None:
    data = LIST(filter=filter_text, page_token=token, name=name, page_size=size).SerializeToString()
    assert wire.string_at(data, (4,)) == name
    assert wire.string_at(data, (1,)) == filter_text


@given(st.lists(field(), max_size=6).map(b"".join))
def test_several_fields_in_one_pass_are_those_of_one_pass_each(data: bytes) -> None:
    def read(one: Callable[[], list[str]]) -> list[str] | type[wire.WireError]:
        try:
            return one()
        except wire.WireError as error:
            return type(error)

    alone = read(lambda: [wire.string_at(data, (1,)), wire.string_at(data, (4,))])
    together = read(lambda: wire.strings_in(data, (1, 4)))
    # Of two faults either may be told.
    assert together == alone or (isinstance(alone, type) and isinstance(together, type))


def test_a_field_that_occurs_twice_is_refused() -> None:
    once = wire.delimited(1, b"nodes/n1/domains/a")
    with pytest.raises(wire.FieldTwiceError):
        wire.string_at(once + wire.delimited(1, b"nodes/n2/domains/a"), (1,))
    with pytest.raises(wire.FieldTwiceError):
        wire.string_at(wire.delimited(1, once) + wire.delimited(1, b""), (1, 1))
    with pytest.raises(wire.FieldTwiceError):
        wire.string_at(wire.delimited(1, once + once), (1, 1))
    # The same tag in more bytes than it needs is the same field.
    with pytest.raises(wire.FieldTwiceError):
        wire.string_at(once + overlong(1 << 3 | 2, 2) + b"\x01x", (1,))


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a",
        b"\x0a\x05abc",
        b"\x0a\x02\xff\xfe",
        b"\x0a\x01a\x00",
        b"\x0a\x01a\x06",
        b"\x0a\x01a\x0b\x14",
        b"\x0a\x01a\x0b",
        b"\x0a\x01a\x0c",
        b"\x0a\x01a\x10" + b"\xff" * 11,
        b"\x0a\xff\xff\xff\xff\xff\x0f",
        b"\x0a\x01a\x11\x00",
        b"\x0a\x01a" + b"\x0b" * 200,
        b"\x0a\x01a\xfa\xff\xff\xff\xff\xff\x01\x00",
    ],
)
def test_malformed_messages_are_refused(data: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.string_at(data, (1,))
    with pytest.raises(message.DecodeError):
        LIST().ParseFromString(data)


def test_unset_is_empty_and_groups_are_skipped() -> None:
    assert wire.string_at(b"", (1,)) == ""
    assert wire.string_at(b"\x1b\x08\x01\x1c\x0a\x01a", (1,)) == "a"
    assert wire.string_at(b"\x08\x01", (1,)) == ""


@given(st.lists(field(), max_size=6).map(b"".join))
def test_fields_cover_the_whole_message(data: bytes) -> None:
    try:
        found = list(wire.fields(data))
    except wire.WireError:
        return
    ends = [0, *(end for *_, end in found)]
    assert ends[-1] == len(data)
    assert ends == sorted(ends)

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtfleet_storage.backends.dir.qcow2 import HeaderError, parse_header

SIZE = 1 << 20


def image(*, version: int = 3, backing: bytes = b"", format: bytes = b"", size: int = SIZE) -> bytes:
    extensions = b""
    if format:
        padded = format + bytes(-len(format) % 8)
        extensions += struct.pack(">II", 0xE2792ACA, len(format)) + padded
    extensions += bytes(8)
    length = 104 if version == 3 else 72
    backing_offset = length + len(extensions) if backing else 0
    fixed = struct.pack(
        ">4sIQIIQIIQQIIQ",
        b"QFI\xfb",
        version,
        backing_offset,
        len(backing),
        16,
        size,
        0,
        1,
        0x30000,
        0x10000,
        1,
        0,
        0,
    )
    more = struct.pack(">QQQII", 0, 0, 0, 4, 104) if version == 3 else b""
    return (fixed + more + extensions + backing).ljust(0x40000, b"\0")


@pytest.mark.parametrize("version", [2, 3])
def test_a_header_says_what_is_below(version: int) -> None:
    data = image(version=version, backing=b"base image", format=b"raw")
    found = parse_header(data[:65536], len(data))
    assert (found.version, found.virtual_size_bytes, found.cluster_size_bytes) == (version, SIZE, 65536)
    assert (found.backing, found.backing_format, found.refusal) == ("base image", "raw", "")


def test_an_image_alone() -> None:
    data = image()
    found = parse_header(data[:65536], len(data))
    assert (found.backing, found.backing_format) == ("", "")


@pytest.mark.parametrize("length", [0, 4, 71, 72, 100, 103])
def test_a_cut_header_is_none(length: int) -> None:
    with pytest.raises(HeaderError):
        parse_header(image()[:length], 0x40000)


def test_a_name_that_is_no_text() -> None:
    with pytest.raises(HeaderError, match="no text"):
        parse_header(image(backing=b"\xff\xfe"), 0x40000)


@pytest.mark.parametrize("length", [16, 60_000])
def test_a_format_without_end(length: int) -> None:
    with pytest.raises(HeaderError, match="no end"):
        parse_header(image(backing=b"base", format=b"q" * length), 0x40000)
    assert parse_header(image(backing=b"base", format=b"q" * 15), 0x40000).backing_format == "q" * 15


@given(st.binary(max_size=4096))
def test_any_bytes_parse_or_are_refused(data: bytes) -> None:
    for candidate in (data, b"QFI\xfb" + data):
        try:
            found = parse_header(candidate, len(candidate))
        except HeaderError:
            continue
        assert found.virtual_size_bytes <= 1 << 46


@given(st.integers(0, 103), st.binary(min_size=1, max_size=8))
def test_a_damaged_header_parses_or_is_refused(at: int, damage: bytes) -> None:
    data = bytearray(image(backing=b"base", format=b"qcow2"))
    data[at : at + len(damage)] = damage
    try:
        found = parse_header(bytes(data[:65536]), len(data))
    except HeaderError:
        return
    assert 512 <= found.cluster_size_bytes <= 2 << 20

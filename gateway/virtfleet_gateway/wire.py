"""Fields out of serialised protobuf messages, without decoding them.

The gateway routes a call by one string and leaves the rest of the message alone. What it reads must be what the node's
parser will read, or a caller could show the gateway one name and the node another. Hence: whatever this scanner
accepts, the real parser accepts with the same value; a field that occurs twice (the parser takes the last one, or
merges) is refused; the message is scanned to its end. A member of a oneof must not be on the way: another member of it
behind takes it back, and here nothing is known of oneofs (`routing` sees to it).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_VARINT = 0
_FIXED64 = 1
BYTES = 2
_GROUP = 3
_GROUP_END = 4
_FIXED32 = 5

_GROUP_DEPTH_LIMIT = 32
"""The parsers of all languages stop at 100; nobody nests groups at all."""


class WireError(ValueError):
    """The bytes are no message that a parser would take, or one that two parsers could read differently."""


class FieldTwiceError(WireError):
    """The field occurs more than once."""


class NoTextError(WireError):
    """A string is not UTF-8."""


def _varint(data: bytes, position: int, limit_bytes: int) -> tuple[int, int]:
    value = shift = 0
    for count in range(limit_bytes):
        byte = data[position + count]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position + count + 1
        shift += 7
    raise WireError("a number is too long")


def _skip_group(data: bytes, position: int, number: int, depth: int) -> int:
    """Return the position behind the end of a group that has just begun."""
    if depth > _GROUP_DEPTH_LIMIT:
        raise WireError("groups are nested too deeply")
    while True:
        tag, position = _varint(data, position, 5)
        if tag & 7 == _GROUP_END:
            if tag >> 3 != number:
                raise WireError("a group ends that did not begin")
            return position
        position = _skip(data, position, tag, depth)


def _skip(data: bytes, position: int, tag: int, depth: int = 0) -> int:
    """Return the position behind the value of a field whose tag has been read."""
    if not 0 < tag >> 3 < 1 << 29:
        raise WireError("a field has no valid number")
    kind = tag & 7
    if kind == BYTES:
        length, position = _varint(data, position, 5)
        position += length
    elif kind == _VARINT:
        _, position = _varint(data, position, 10)
    elif kind == _FIXED64:
        position += 8
    elif kind == _FIXED32:
        position += 4
    elif kind == _GROUP:
        position = _skip_group(data, position, tag >> 3, depth + 1)
    else:
        raise WireError("a field has no valid kind")
    if position > len(data):
        raise WireError("the message is cut")
    return position


def single_field(data: bytes, number: int) -> bytes | None:
    """Return the bytes of the one length-delimited field of that number; None if it does not occur.

    Raises:
        FieldTwiceError: It occurs more than once.
        WireError: The message is malformed anywhere at its top level.
    """
    return single_fields(data, (number,))[0]


def single_fields(data: bytes, numbers: tuple[int, ...]) -> list[bytes | None]:
    """Return what `single_field` returns for each of several fields, in one pass.

    Raises:
        FieldTwiceError: One occurs more than once.
        WireError: The message is malformed anywhere at its top level.
    """
    wanted = {number << 3 | BYTES: index for index, number in enumerate(numbers)}
    found: list[bytes | None] = [None] * len(numbers)
    position, end = 0, len(data)
    try:
        while position < end:
            tag = data[position]
            position += 1
            if tag >= 0x80:
                tag, position = _varint(data, position - 1, 5)
            if tag & 7 == BYTES and tag >= 8:
                length = data[position]
                position += 1
                if length >= 0x80:
                    length, position = _varint(data, position - 1, 5)
                start = position
                position += length
                if position > end:
                    raise WireError("the message is cut")
                if tag in wanted:
                    if found[wanted[tag]] is not None:
                        raise FieldTwiceError(f"field {tag >> 3} occurs twice")
                    found[wanted[tag]] = data[start:position]
                elif tag >= 1 << 32:
                    raise WireError("a field has no valid number")
            else:
                position = _skip(data, position, tag)
    except IndexError:
        raise WireError("the message is cut") from None
    return found


def strings_in(data: bytes, numbers: tuple[int, ...]) -> list[str]:
    """Return the strings in several fields of a message, in one pass; unset ones are empty.

    Raises:
        FieldTwiceError: One occurs more than once.
        WireError: The message is malformed, or a string is not UTF-8.
    """
    return ["" if found is None else _text(found) for found in single_fields(data, numbers)]


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise NoTextError("a name is not UTF-8") from None


def string_at(data: bytes, path: tuple[int, ...]) -> str:
    """Return the string at a path of field numbers: `(1,)` is field 1, `(1, 1)` is field 1 of the message in field 1.

    Unset strings are empty, as in proto3.

    Raises:
        FieldTwiceError: A field on the path occurs more than once.
        WireError: A message on the path is malformed, or the string is not UTF-8.
    """
    for number in path:
        found = single_field(data, number)
        if found is None:
            return ""
        data = found
    return _text(data)


def fields(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yield the top-level fields as (number, kind, start, end).

    For length-delimited fields (kind `BYTES`) start and end bound the payload, for others the value. A parser takes a
    field of another kind than its own for one that it does not know: so must whoever reads these.

    Raises:
        WireError: The message is malformed.
    """
    position, end = 0, len(data)
    try:
        while position < end:
            # Most tags and many lengths are one byte: no call for these.
            tag = data[position]
            position += 1
            if tag >= 0x80:
                tag, position = _varint(data, position - 1, 5)
            start = position
            if tag & 7 == BYTES:
                length = data[position]
                start += 1
                if length >= 0x80:
                    length, start = _varint(data, position, 5)
                position = start + length
                if position > end or not 0 < tag >> 3 < 1 << 29:
                    raise WireError("the message is cut")
            else:
                position = _skip(data, position, tag)
            yield tag >> 3, tag & 7, start, position
    except IndexError:
        raise WireError("the message is cut") from None


def read_varint(data: bytes, position: int) -> int:
    """Return the number that begins at a position."""
    return _varint(data, position, 10)[0]


def varint(value: int) -> bytes:
    """Encode a number that is not negative."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def delimited(number: int, payload: bytes) -> bytes:
    """Encode a length-delimited field."""
    return varint(number << 3 | BYTES) + varint(len(payload)) + payload

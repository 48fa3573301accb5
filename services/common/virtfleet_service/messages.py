"""Walks through messages by their descriptors, only into fields that hold messages: reading bytes would copy them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from google.protobuf.descriptor import FieldDescriptor
    from google.protobuf.message import Message

T = TypeVar("T")

_PLAIN: Final = re.compile(r"[A-Za-z0-9_-]+")

ONE: Final = "one"
LIST: Final = "list"
MAP: Final = "map"


def key_segment(key: object) -> str:
    """Return the key of a map as a segment of a path: a plain word as it is, others in backquotes."""
    text = str(key).lower() if isinstance(key, bool) else str(key)
    return text if _PLAIN.fullmatch(text) else "`" + text.replace("`", "``") + "`"


def map_value(field: FieldDescriptor) -> FieldDescriptor | None:
    """Return the field of the values of a map; None: the field is none."""
    if field.message_type is None or not field.message_type.GetOptions().map_entry:
        return None
    return field.message_type.fields_by_name["value"]


def shape(field: FieldDescriptor) -> tuple[str, FieldDescriptor]:
    """Return whether a field is `one`, a `list` or a `map`, and the field that describes its elements."""
    value = map_value(field)
    if value is not None:
        return MAP, value
    return (LIST if field.is_repeated else ONE), field


def elements(message: Message, name: str, kind: str, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield path and value of each element of a field; of a scalar also where it is unset."""
    value = getattr(message, name)
    if kind == ONE:
        yield prefix + name, value
    elif kind == LIST:
        for index, element in enumerate(value):
            yield f"{prefix}{name}[{index}]", element
    else:
        for key, element in value.items():
            yield f"{prefix}{name}.{key_segment(key)}", element


def inside(message: Message, parts: Sequence[tuple[str, str, T]], prefix: str) -> Iterator[tuple[str, Message, T]]:
    """Yield each message that is set in some fields: the path to what is in it, itself, what goes with the field.

    Args:
        message: The message.
        parts: Name, shape and what goes with it, of each field.
        prefix: The path to what is in the message.
    """
    for name, kind, beside in parts:
        if kind == ONE:
            # Asked first: reading a message that is unset would make one.
            if message.HasField(name):
                yield f"{prefix}{name}.", getattr(message, name), beside
        else:
            for path, element in elements(message, name, kind, prefix):
                yield path + ".", element, beside

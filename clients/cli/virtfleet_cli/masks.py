"""Paths of update masks: reading and writing the field that one names."""

from __future__ import annotations

import re
from typing import Any, Final

import click
from google.protobuf.descriptor import FieldDescriptor

_SEGMENT: Final = re.compile(r"`([^`]*)`|([^.`]+)")


def split(path: str) -> list[str]:
    """Return the segments of a path; keys of maps may stand in backquotes."""
    return [quoted or plain for quoted, plain in _SEGMENT.findall(path)]


def value_at(message: Any, path: str) -> Any:  # noqa: ANN401 - any value of a field
    """Return the value at a path; None: it is unset."""
    value: Any = message
    for segment in split(path):
        if hasattr(value, "DESCRIPTOR"):
            field = value.DESCRIPTOR.fields_by_name.get(segment)
            if field is None or (field.has_presence and not value.HasField(segment)):
                return None
            value = getattr(value, segment)
        else:
            if segment not in value:
                return None
            value = value[segment]
    return value


def assign(message: Any, path: str, text: str) -> None:  # noqa: ANN401 - any message
    """Set the field at a path to a value given as text.

    Raises:
        ClickException: There is no such field, or the value does not fit it.
    """
    from virtfleet_cli.documents import DocumentError, field_value

    *outer, last = split(path)
    value: Any = message
    for segment in outer:
        if hasattr(value, "DESCRIPTOR"):
            _field(value, segment, path)
            value = getattr(value, segment)
        else:
            value = value[segment]
    if not hasattr(value, "DESCRIPTOR"):
        value[last] = text
        return
    field = _field(value, last, path)
    if field.message_type is not None:
        raise click.ClickException(f"`{path}` is no single value: name one of its fields")
    try:
        setattr(value, last, field_value(field, path, text))
    except (DocumentError, TypeError, ValueError) as error:
        raise click.ClickException(f"{path}: {error}") from None


def _field(message: Any, name: str, path: str) -> FieldDescriptor:  # noqa: ANN401 - any message
    field = message.DESCRIPTOR.fields_by_name.get(name)
    if field is None:
        import difflib

        near = difflib.get_close_matches(name, list(message.DESCRIPTOR.fields_by_name), 1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        raise click.ClickException(f"`{path}`: {message.DESCRIPTOR.name} has no field `{name}`{hint}")
    found: FieldDescriptor = field
    return found

"""What the modules that read messages by their descriptors share: the types of both runtimes, and what a field is."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

from google.protobuf import descriptor
from google.protobuf.descriptor import FieldDescriptor

if TYPE_CHECKING:
    from google._upb import _message

    Message_: TypeAlias = descriptor.Descriptor | _message.Descriptor
    Field: TypeAlias = descriptor.FieldDescriptor | _message.FieldDescriptor
    Enum: TypeAlias = descriptor.EnumDescriptor | _message.EnumDescriptor

TIMESTAMP: Final = "google.protobuf.Timestamp"
DURATION: Final = "google.protobuf.Duration"


def options(described: Message_ | Field, extension: Any) -> Any:  # noqa: ANN401  # extensions have values of all types
    """Return what an option says about a message or field."""
    return cast("Any", described.GetOptions()).Extensions[extension]


def is_map(field: Field) -> bool:
    """Whether a field is a map."""
    return field.is_repeated and field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def key_of(field: Field) -> Field:
    """Return the field of the keys of a map."""
    return cast("Message_", field.message_type).fields_by_name["key"]


def value_of(field: Field) -> Field:
    """Return the field of the values of a map."""
    return cast("Message_", field.message_type).fields_by_name["value"]


def is_string(field: Field) -> bool:
    """Whether a field holds text."""
    return field.type == FieldDescriptor.TYPE_STRING


def behaviors(field: Field, extension: Any) -> Collection[int]:  # noqa: ANN401  # the stubs know no type for it
    """Return the `google.api.field_behavior` of a field."""
    found: Collection[int] = options(field, extension)
    return found

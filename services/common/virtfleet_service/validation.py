"""Checks of a request before anything acts on it: what this server does not know, what its proto forbids."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, cast

from buf.validate import validate_pb2
from google.api import field_behavior_pb2, resource_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from virtfleet_service import messages
from virtfleet_service.errors import (
    DocumentInvalid,
    FieldOutOfRange,
    FieldRequired,
    InvalidArgument,
    MessageTooLarge,
    NameMalformed,
    UnknownField,
)
from virtfleet_service.walks import Rule, Walks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf import duration_pb2
    from google.protobuf.message import Message
    from protovalidate import Validator, Violation

REQUEST_LIMIT_BYTES: Final = 4 << 20
"""The largest message that a server takes. gRPC itself is told to take more, so that the refusal carries our reason."""

REPLY_LIMIT_BYTES: Final = 3 << 20
"""The largest unary answer: clients of other languages take 4 MiB unless told otherwise."""

# The generated module has an extension of this name; its stubs see a module there.
_MESSAGE_RULES: Final[Any] = validate_pb2.message
_REFERENCE: Final[Any] = resource_pb2.resource_reference

_EMPTY_RULES: Final = frozenset({"string.min_len", "string.min_bytes", "bytes.min_len", "string.len"})
_ITEM_PARENT: Final = re.compile(r"\w+\[\d+\]\.parent")
_DURATION_LIMIT_SECONDS: Final = 315_576_000_000
_SECOND_NANOS: Final = 1_000_000_000
_FORM_RULES: Final = frozenset({"string.pattern", "string.max_len", "string.min_len", "string.max_bytes"})


def _rule_of_enum(field: FieldDescriptor) -> Rule | None:
    # Null values of google.protobuf.Struct and the like are no enums of anybody's API.
    if field.enum_type is None or field.enum_type.full_name.startswith("google.protobuf."):
        return None
    return frozenset(field.enum_type.values_by_number).__contains__


ENUMS: Final = Walks(_rule_of_enum)
"""Find enum numbers that have no name here."""


def _rule_of_duration(field: FieldDescriptor) -> Rule | None:
    inner = field.message_type
    return _is_duration if inner is not None and inner.full_name == "google.protobuf.Duration" else None


def _is_duration(duration: duration_pb2.Duration) -> bool:
    seconds, nanos = duration.seconds, duration.nanos
    return abs(seconds) <= _DURATION_LIMIT_SECONDS and abs(nanos) < _SECOND_NANOS and seconds * nanos >= 0


DURATIONS: Final = Walks(_rule_of_duration)
"""Find durations that are none.

On the wire seconds and nanoseconds are two numbers, and a rule of a proto judges their sum. What is no Duration in
itself (two signs, a second and more of nanoseconds) can be read and stored, but no program can write it as JSON: one in
a spec would break every list that it is in.
"""

_MESSAGE_FIELDS: dict[str, tuple[tuple[str, str, None], ...]] = {}


def _message_fields(message: Descriptor) -> tuple[tuple[str, str, None], ...]:
    known = _MESSAGE_FIELDS.get(message.full_name)
    if known is None:
        shapes = ((field.name, *messages.shape(field)) for field in message.fields)
        known = tuple((name, kind, None) for name, kind, leaf in shapes if leaf.message_type is not None)
        _MESSAGE_FIELDS[message.full_name] = known
    return known


def unknown_fields(message: Message, prefix: str = "") -> Iterator[str]:
    """Yield the path of every field that this server does not know, at any depth, as `path.#number`."""
    unknown: Any = UnknownFieldSet(message)  # a sequence, which its stubs do not say
    for field in unknown:
        yield f"{prefix}#{field.field_number}"
    for path, element, _ in messages.inside(message, _message_fields(descriptor_of(message)), prefix):
        yield from unknown_fields(element, path)


def descriptor_of(message: Message | type[Message]) -> Descriptor:
    """Return the descriptor of a message or of its class, which the stubs give as a union of two types."""
    return cast("Descriptor", message.DESCRIPTOR)


def has_rules(message: Descriptor, seen: set[str] | None = None) -> bool:
    """Tell whether protovalidate has anything to check in messages of a type."""
    seen = set() if seen is None else seen
    if message.full_name in seen:
        return False
    seen.add(message.full_name)
    if message.GetOptions().HasExtension(_MESSAGE_RULES):
        return True
    for oneof in message.oneofs:
        if oneof.GetOptions().HasExtension(validate_pb2.oneof):
            return True
    for field in message.fields:
        if field.GetOptions().HasExtension(validate_pb2.field):
            return True
        if field.message_type is not None and has_rules(field.message_type, seen):
            return True
    return False


_validator: Validator | None = None


def validator() -> Validator:
    """Return the validator of the process; the first call loads it (about 100 ms)."""
    global _validator  # noqa: PLW0603  # one compiled set of rules a process: 10 MiB
    if _validator is None:
        from protovalidate import Validator

        _validator = Validator()
    return _validator


_checks: dict[tuple[type[Message], bool], RequestCheck] = {}


def request_check(message_class: type[Message], *, mutation: bool) -> RequestCheck:
    """Return the check of a request type; servers in one process share it."""
    found = _checks.get((message_class, mutation))
    if found is None:
        found = _checks[message_class, mutation] = RequestCheck(message_class, mutation=mutation)
    return found


class RequestCheck:
    """Checks messages of one request type.

    Args:
        message_class: The class of the request.
        mutation: Whether what this server does not know is refused; reads ignore it.
    """

    __slots__ = ("_class", "_durations", "_enums", "_mutation", "_rules")

    def __init__(self, message_class: type[Message], *, mutation: bool) -> None:
        descriptor = descriptor_of(message_class)
        self._class = message_class
        self._mutation = mutation
        self._enums = ENUMS.of(descriptor)
        self._durations = DURATIONS.of(descriptor)
        self._rules = has_rules(descriptor)
        if self._rules:
            # Compiles the rules of the type now instead of in the first call.
            validator().collect_violations(message_class())

    def decode(self, encoded: bytes) -> Message:
        """Return the message.

        Raises:
            MessageTooLarge: It is larger than a server takes.
            DocumentInvalid: It is no message of the type.
        """
        if len(encoded) > REQUEST_LIMIT_BYTES:
            raise MessageTooLarge(
                f"the request has {len(encoded)} bytes; the limit is {REQUEST_LIMIT_BYTES}",
                size_bytes=len(encoded),
                limit_bytes=REQUEST_LIMIT_BYTES,
            )
        try:
            return self._class.FromString(encoded)
        except DecodeError as error:
            name = descriptor_of(self._class).full_name
            raise DocumentInvalid(f"the request is no valid message of type {name}", type=name) from error

    def check(self, message: Message, encoded: bytes) -> None:
        """Check a whole request.

        Raises:
            UnknownField: A mutation has a field or enum number that this server does not know.
            FieldRequired: A field is unset that must be set.
            NameMalformed: A name or id does not have its form.
            FieldOutOfRange: A rule of its proto is broken.
        """
        if self._mutation:
            if self._has_unknown(encoded):
                self._refuse_unknown(list(unknown_fields(message)))
            if self._enums:
                self._refuse_numbers(message)
        self._refuse_durations(message)
        if self._rules:
            self._refuse_violations(message)

    def check_piece(self, message: Message) -> None:
        """Check a further message of a stream without copying its data.

        Raises:
            UnknownField: See `check`.
            FieldRequired: See `check`.
            NameMalformed: See `check`.
            FieldOutOfRange: See `check`.
        """
        if self._mutation:
            self._refuse_unknown(list(unknown_fields(message)))
            if self._enums:
                self._refuse_numbers(message)
        self._refuse_durations(message)
        if self._rules:
            self._refuse_violations(message)

    def _refuse_durations(self, message: Message) -> None:
        found = [path for path, _ in self._durations.find(message)] if self._durations else []
        if found:
            text = "is no duration: seconds and nanos have one sign, and nanos are less than a second"
            raise FieldOutOfRange(f"`{found[0]}` {text}", field=found[0], violations=[(path, text) for path in found])

    @staticmethod
    def _refuse_violations(message: Message) -> None:
        violations = validator().collect_violations(message)
        if violations:
            # The parent of an item may be left out: it is that of its batch.
            violations = [violation for violation in violations if not _is_parent_of_item(violation)]
        if violations:
            raise refusal(message, violations)

    def _has_unknown(self, encoded: bytes) -> bool:
        # Two passes in C instead of a walk in Python: a message that shrinks when unknown fields are dropped had some.
        twin = self._class.FromString(encoded)
        before = twin.ByteSize()
        twin.DiscardUnknownFields()
        return before != twin.ByteSize()

    @staticmethod
    def _refuse_unknown(paths: list[str]) -> None:
        if paths:
            raise UnknownField(
                f"this server does not know field {paths[0]} of the request (# is its number); it may be too old",
                field=paths[0],
                violations=[(path, "is not known to this server") for path in paths],
            )

    def _refuse_numbers(self, message: Message) -> None:
        found = list(self._enums.find(message))
        if found:
            path, number = found[0]
            raise UnknownField(
                f"this server does not know the value {number} of `{path}`; it may be older than its client",
                field=path,
                violations=[(where, f"has no value {value} on this server") for where, value in found],
                number=number,
            )


def _path(violation: Violation) -> str:
    parts: list[str] = []
    for element in violation.proto.field.elements if violation.proto.field is not None else ():
        part = element.field_name or f"#{element.field_number}"
        subscript: Any = element.subscript
        if subscript is not None:
            value = subscript.value
            part += f"[{value}]" if subscript.field == "index" else f".{messages.key_segment(value)}"
        parts.append(part)
    return ".".join(parts)


def _field(message: Message, violation: Violation) -> FieldDescriptor | None:
    """Return the descriptor of the field that a violation is about; None: it is about a message as a whole."""
    where: Descriptor | None = descriptor_of(message)
    field: FieldDescriptor | None = None
    for element in violation.proto.field.elements if violation.proto.field is not None else ():
        if where is None:
            return None
        field = where.fields_by_name.get(element.field_name)
        if field is None:
            return None
        value = messages.map_value(field)
        where = value.message_type if value is not None else field.message_type
    return field


def _is_parent_of_item(violation: Violation) -> bool:
    return violation.field_value == "" and _ITEM_PARENT.fullmatch(_path(violation)) is not None


def _names_something(field: FieldDescriptor, violation: Violation) -> bool:
    if field.GetOptions().HasExtension(_REFERENCE):
        return True
    if field.name in ("name", "parent") or (field.name.endswith(("_id", "uid")) and field.name != "request_id"):
        return True
    # The keys of device maps are ids.
    return messages.map_value(field) is not None and violation.proto.for_key


def _is_required(field: FieldDescriptor) -> bool:
    return field_behavior_pb2.REQUIRED in field.GetOptions().Extensions[field_behavior_pb2.field_behavior]


def _class_of(message: Message, violation: Violation) -> type[InvalidArgument]:
    rule = violation.proto.rule_id
    field = _field(message, violation)
    if rule == "required" or rule.endswith(".required"):
        return FieldRequired
    value = violation.field_value
    if rule in _EMPTY_RULES and value in ("", b""):
        return FieldRequired
    if rule == "string.pattern" and value == "" and field is not None and _is_required(field):
        return FieldRequired
    if rule == "enum.not_in" and value == 0:
        return FieldRequired
    if field is not None and _names_something(field, violation) and (rule in _FORM_RULES or rule == "string.uuid"):
        return NameMalformed
    return FieldOutOfRange


def refusal(message: Message, violations: list[Violation]) -> InvalidArgument:
    """Return the error for broken rules: the first decides on the reason, all are listed."""
    listed = [(_path(violation), violation.proto.message or violation.proto.rule_id) for violation in violations]
    path, text = listed[0]
    kind = _class_of(message, violations[0])
    return kind(f"`{path}` {text}", field=path, violations=listed, rule=violations[0].proto.rule_id)

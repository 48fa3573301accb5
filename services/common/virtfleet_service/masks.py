"""Update masks: which fields of a resource a caller changes.

A path names fields as the proto does, joined by dots. Below a map comes the key:
`spec.disks.data1.throttle.iops_max`, `labels.env`; a key that is no plain word may stand in backquotes, and below a
map of strings the rest of the path is the key (`labels.example.com/team`). `*` stands for all keys of a map, and
alone for the whole resource. Lists are replaced whole.

Without a mask the fields that the request fills are changed (AIP-134), down to the single field: maps are merged by
key, lists replaced, and nothing is cleared. With the mask `*` the resource becomes what the request says, and what
it leaves unset is cleared. Fields that only the server sets are passed over; one that is fixed at creation must
keep its value.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

from google.api import field_behavior_pb2
from google.protobuf import field_mask_pb2
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from virtfleet_service import descriptors, errors, messages, resources
from virtfleet_service.descriptors import is_map, value_of

if TYPE_CHECKING:
    from virtfleet_service.descriptors import Field, Message_

PATHS_LIMIT: Final = 256
DEPTH_LIMIT: Final = 32

_QUOTED: Final = re.compile(r"`(?:[^`]|``)*`(?=\.|\Z)")

# The head and the status belong to the server, whatever the annotations say.
_OF_SERVER: Final = frozenset({"name", "uid", "generation", "etag", "create_time", "update_time", "status"})
_SERVER_BEHAVIORS: Final = frozenset({field_behavior_pb2.OUTPUT_ONLY, field_behavior_pb2.IDENTIFIER})


def apply_update(
    current: Message,
    update: Message,
    mask_paths: Iterable[str] | field_mask_pb2.FieldMask | None,
    *,
    immutable: Collection[str] = (),
) -> list[str]:
    """Change a resource in place as an Update request says.

    Args:
        current: The stored resource, decoded; after an error its content is undefined, so give a copy.
        update: The resource in the request.
        mask_paths: The update mask; empty or None: the fields that the request fills.
        immutable: Paths that may not change, beside those that the proto marks IMMUTABLE.

    Returns:
        The paths that are different now, down to single fields, sorted; empty: nothing has changed.

    Raises:
        MaskPathUnknown: A path names nothing that exists.
        FieldConflict: A field that is fixed at creation would change.
        FieldOutOfRange: The annotations would be too large.
    """
    paths = list(mask_paths.paths if isinstance(mask_paths, field_mask_pb2.FieldMask) else mask_paths or ())
    before = type(current)()
    before.CopyFrom(current)
    if len(paths) > PATHS_LIMIT:
        raise errors.MaskPathUnknown(f"the mask has {len(paths)} paths; at most {PATHS_LIMIT}", field="update_mask")
    if not paths:
        _merge(current, update, top=True)
    elif "*" in paths:
        if len(paths) > 1:
            raise errors.FieldConflict("the mask * stands alone", field="update_mask")
        _replace(current, update, top=True)
    else:
        for path in paths:
            _Path(path).apply(current, update)
    changed = diff(before, current)
    fixed = _fixed(before, changed, immutable)
    if fixed:
        # What the request leaves unset was not meant to change, unless the mask names it.
        field = f"{resources.field_of(current)}.{fixed}"
        raise errors.FieldConflict(f"{fixed} is fixed when the resource is made", field=field, path=fixed)
    resources.check_annotations(current)
    return changed


def split_path(path: str) -> list[str]:
    """Split a path at its dots; a segment in backquotes may hold any character, a backquote as two of them.

    Raises:
        MaskPathUnknown: It is empty, too deep, or a backquote is left open.
    """
    segments: list[str] = []
    rest = path
    while True:
        if rest.startswith("`"):
            quoted = _QUOTED.match(rest)
            if quoted is None:
                raise _unknown(path, "a backquote is left open")
            segments.append(quoted.group())
            rest = rest[quoted.end() :]
            more = rest.startswith(".")
            rest = rest[1:]
        else:
            segment, dot, rest = rest.partition(".")
            segments.append(segment)
            more = bool(dot)
        if not segments[-1]:
            raise _unknown(path, "a segment is empty")
        if not more:
            break
    if len(segments) > DEPTH_LIMIT:
        raise _unknown(path, "it is too deep")
    return segments


def diff(left: Message, right: Message, prefix: str = "") -> list[str]:
    """Return the paths in which two messages of one type differ, down to single fields, sorted.

    A map entry or a message that only one of them has is one path; a list is one path.
    """
    return sorted(_diff(left, right, prefix))


def _diff(left: Message, right: Message, prefix: str) -> Iterator[str]:
    for field in left.DESCRIPTOR.fields:
        path = prefix + field.name
        one, other = getattr(left, field.name), getattr(right, field.name)
        if is_map(field):
            yield from _diff_maps(field, one, other, path)
        elif field.is_repeated:
            if list(one) != list(other):
                yield path
        elif field.has_presence and left.HasField(field.name) != right.HasField(field.name):
            yield path
        elif _opens(field):
            yield from _diff(one, other, path + ".")
        elif one != other:
            yield path


def _diff_maps(field: Field, one: Any, other: Any, path: str) -> Iterator[str]:  # noqa: ANN401  # map containers have no common type
    deep = value_of(field).message_type is not None
    for key in sorted({*one, *other}, key=str):
        place = f"{path}.{messages.key_segment(key)}"
        if (key in one) != (key in other):
            yield place
        elif deep:
            yield from _diff(one[key], other[key], place + ".")
        elif one[key] != other[key]:
            yield place


def _merge(current: Message, update: Message, *, top: bool = False) -> None:
    """Take over what the update fills."""
    for field, value in update.ListFields():
        if _is_of_server(field, top=top):
            continue
        target = getattr(current, field.name)
        if is_map(field):
            _merge_map(field, target, value)
        elif field.is_repeated:
            _set(current, field, value)
        elif _opens(field):
            # Also an empty message counts as filled: it chooses a member of a oneof.
            target.SetInParent()
            _merge(target, value)
        else:
            _set(current, field, value)


def _merge_map(field: Field, target: Any, value: Any) -> None:  # noqa: ANN401  # map containers have no common type
    for key in value:
        if value_of(field).message_type is None:
            target[key] = value[key]
        elif key in target:
            _merge(target[key], value[key])
        else:
            target[key].CopyFrom(value[key])


def _replace(current: Message, update: Message, *, top: bool = False) -> None:
    """Make a message what the update says, except for what the server sets and what is fixed and left unset."""
    for field in current.DESCRIPTOR.fields:
        if _is_of_server(field, top=top):
            continue
        filled = bool(len(getattr(update, field.name))) if field.is_repeated else _is_filled(update, field)
        if not filled and _is_immutable(field):
            continue
        if not field.is_repeated and _opens(field) and filled and current.HasField(field.name):
            _replace(getattr(current, field.name), getattr(update, field.name))
        elif filled:
            _set(current, field, getattr(update, field.name))
        else:
            current.ClearField(field.name)


class _Path:
    """Is one path of a mask, applied from the top of a resource."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.segments = split_path(text)

    def apply(self, current: Message, update: Message) -> None:
        self._message(current, update, 0)

    def _message(self, current: Message, update: Message | None, index: int) -> None:
        segment = self.segments[index]
        field = current.DESCRIPTOR.fields_by_name.get(segment)
        if field is None:
            raise _unknown(self.text, f"{current.DESCRIPTOR.name} has no field {segment}")
        last = index + 1 == len(self.segments)
        if _is_of_server(field, top=index == 0):
            self._check_rest(field, index + 1)
        elif is_map(field):
            if last:
                _set_or_clear(current, update, field)
            else:
                self._map(current, update, field, index + 1)
        elif last:
            _set_or_clear(current, update, field)
        elif field.is_repeated:
            raise _unknown(self.text, f"{segment} is a list, which is replaced whole")
        elif not _opens(field):
            raise _unknown(self.text, f"{segment} has no fields")
        else:
            self._check_rest(field, index + 1)
            given = update is not None and update.HasField(field.name)
            if not given and not current.HasField(field.name):
                return
            below = getattr(update, field.name) if given else None
            self._message(getattr(current, field.name), below, index + 1)

    def _map(self, current: Message, update: Message | None, field: Field, index: int) -> None:
        target = getattr(current, field.name)
        source = getattr(update, field.name) if update is not None else {}
        value = value_of(field)
        segment = self.segments[index]
        if value.message_type is None:
            # Keys of labels have dots in them: all that is left of the path is the key.
            segment = ".".join(self.segments[index:])
            index = len(self.segments) - 1
        if value.message_type is not None and index + 1 < len(self.segments):
            self._check_type(value.message_type, index + 1)
        keys = sorted({*target, *source}, key=str) if segment == "*" else [self._key(field, segment)]
        for key in keys:
            if index + 1 == len(self.segments):
                _copy_entry(value, target, source, key)
            elif key in target:
                self._message(target[key], source.get(key), index + 1)
            elif key in source:
                self._message(target[key], source[key], index + 1)

    def _key(self, field: Field, segment: str) -> Any:  # noqa: ANN401  # maps have keys of several types
        text = segment[1:-1].replace("``", "`") if _QUOTED.fullmatch(segment) else segment
        key = descriptors.key_of(field)
        if key.type == FieldDescriptor.TYPE_STRING:
            return text
        if key.type == FieldDescriptor.TYPE_BOOL:
            if text not in ("true", "false"):
                raise _unknown(self.text, f"{text} is no key of {field.name}")
            return text == "true"
        try:
            return int(text)
        except ValueError as error:
            raise _unknown(self.text, f"{text} is no key of {field.name}") from error

    def _check_rest(self, field: Field, index: int) -> None:
        """Hold what follows a field against its type, so that a path with a typing error never passes in silence."""
        if index == len(self.segments):
            return
        if is_map(field):
            value = value_of(field)
            if value.message_type is not None and index + 1 < len(self.segments):
                self._check_type(value.message_type, index + 1)
        elif field.is_repeated or field.message_type is None:
            raise _unknown(self.text, f"{field.name} has no fields")
        else:
            self._check_type(field.message_type, index)

    def _check_type(self, descriptor: Message_, index: int) -> None:
        field = descriptor.fields_by_name.get(self.segments[index])
        if field is None:
            raise _unknown(self.text, f"{descriptor.name} has no field {self.segments[index]}")
        self._check_rest(field, index + 1)


def _copy_entry(value: Field, target: Any, source: Any, key: Any) -> None:  # noqa: ANN401  # map containers have no common type
    if key not in source:
        if key in target:
            del target[key]
    elif value.message_type is None:
        target[key] = source[key]
    else:
        target[key].CopyFrom(source[key])


def _set_or_clear(current: Message, update: Message | None, field: Field) -> None:
    if update is None:
        current.ClearField(field.name)
        return
    value = getattr(update, field.name)
    filled = bool(len(value)) if field.is_repeated else _is_filled(update, field)
    if not filled:
        current.ClearField(field.name)
    elif not field.is_repeated and _opens(field) and current.HasField(field.name):
        _replace(getattr(current, field.name), value)
    else:
        _set(current, field, value)


def _set(message: Message, field: Field, value: Any) -> None:  # noqa: ANN401  # fields have all types
    if not field.is_repeated and field.message_type is None:
        setattr(message, field.name, value)
        return
    message.ClearField(field.name)
    target = getattr(message, field.name)
    if field.is_repeated or is_map(field):
        target.MergeFrom(value)
    else:
        target.CopyFrom(value)
        target.SetInParent()


def _fixed(before: Message, changed: list[str], immutable: Collection[str]) -> str:
    """Return the first changed path that lies at or below something immutable; empty: none."""
    for path in changed:
        if any(path == fixed or path.startswith(fixed + ".") or fixed.startswith(path + ".") for fixed in immutable):
            return path
        descriptor: Message_ | None = before.DESCRIPTOR
        segments = iter(split_path(path))
        for segment in segments:
            field = descriptor.fields_by_name.get(segment) if descriptor is not None else None
            if field is None:
                break
            if _is_immutable(field):
                return path
            if is_map(field):
                descriptor = value_of(field).message_type
                next(segments, None)
            else:
                descriptor = field.message_type
    return ""


def _is_of_server(field: Field, *, top: bool) -> bool:
    return (top and field.name in _OF_SERVER) or any(
        one in _SERVER_BEHAVIORS for one in descriptors.behaviors(field, field_behavior_pb2.field_behavior)
    )


def _is_immutable(field: Field) -> bool:
    return field_behavior_pb2.IMMUTABLE in descriptors.behaviors(field, field_behavior_pb2.field_behavior)


def _opens(field: Field) -> bool:
    """Whether a path may go into the field: a message, but none of Google's, which are values."""
    return field.message_type is not None and not field.message_type.full_name.startswith("google.protobuf.")


def _is_filled(message: Message, field: Field) -> bool:
    if field.has_presence:
        return message.HasField(field.name)
    return bool(getattr(message, field.name) != field.default_value)


def _unknown(path: str, why: str) -> errors.MaskPathUnknown:
    return errors.MaskPathUnknown(f"the mask path {path} names nothing: {why}", field="update_mask", path=path)

"""The wire form of a package's changes, spliced from bytes.

A resource is serialised once, when it is stored. The log keeps whole `Change` messages around those bytes, and
every watcher gets them as they are: putting a message together is a matter of tags and lengths. The field numbers
come from the descriptors of the package, so one codec serves all packages that follow the pattern of
`WatchResourcesResponse`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from google.api import resource_pb2
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import Message
from google.rpc import status_pb2

from virtfleet_service import descriptors

if TYPE_CHECKING:
    from virtfleet_service.descriptors import Enum, Field, Message_

_NANOSECONDS = 1_000_000_000


def varint(value: int) -> bytes:
    """Encode a number that is not negative as protobuf does."""
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field_bytes(number: int, value: bytes) -> bytes:
    """Encode a field that has a length: bytes, a string or a message."""
    size = len(value)
    if number < 16 and size < 0x80:
        return bytes((number << 3 | 2, size)) + value
    return varint(number << 3 | 2) + varint(size) + value


def field_text(number: int, value: str) -> bytes:
    """Encode a string field; nothing if it is empty."""
    return field_bytes(number, value.encode()) if value else b""


@functools.lru_cache(maxsize=256)
def _cause_field(number: int, cause: str) -> bytes:
    """Encode a cause: the name of a method, of which there are some dozens."""
    return field_text(number, cause)


def field_integer(number: int, value: int) -> bytes:
    """Encode an integer field that is not negative; nothing if it is zero."""
    return varint(number << 3) + varint(value) if value else b""


def timestamp(time_ns: int) -> bytes:
    """Encode a `google.protobuf.Timestamp`."""
    seconds, nanoseconds = divmod(time_ns, _NANOSECONDS)
    return field_integer(1, seconds) + field_integer(2, nanoseconds)


class ChangeCodec:
    """Encodes and decodes the changes of one package.

    Args:
        package: `virtfleet.storage.v1`; holds `Change`, `ResourcePut`, `Event`, `WatchResourcesResponse`.
        resource_types: The kinds that are stored, by the name of their field in `ResourcePut.resource`.

    Raises:
        ValueError: A kind is not in `ResourcePut`, or is another type there.
    """

    def __init__(self, package: str, resource_types: Mapping[str, type[Message]]) -> None:
        self.package = package
        self.resource_types = dict(resource_types)
        self._pool = _pool(package, self.resource_types)
        change = self._descriptor("Change")
        put = self._descriptor("ResourcePut")
        response = self._descriptor("WatchResourcesResponse")
        self.change_class = self._class("Change")
        self.event_class = self._class("Event")
        self.events_response_class = self._class("ListEventsResponse")
        self.type_by_kind_number = _kinds_by_number(self._enum("ResourceType"))
        self.event_numbers: dict[str, int] = {
            value.name.removeprefix("EVENT_TYPE_"): value.number for value in self._enum("EventType").values
        }
        """The numbers of the event types by their names without the prefix: `OPERATION_DONE`."""
        numbers = change.fields_by_name
        self._time, self._put, self._delete, self._event, self._moved_out, self._moved_in = (
            numbers[name].number for name in ("time", "put", "delete", "event", "moved_out", "moved_in")
        )
        self._last_time = (-1, b"")
        self._cause = put.fields_by_name["cause"].number
        self._old_generation = put.fields_by_name["old_generation"].number
        self._resource = {kind: _resource_field(put, kind, of).number for kind, of in self.resource_types.items()}
        self._changes = response.fields_by_name["changes"].number
        self._token = response.fields_by_name["resume_token"].number
        self._bookmark = response.fields_by_name["bookmark"].number
        self._snapshot_end = response.fields_by_name["snapshot_end"].number
        self._kind_by_collection = {_collection(of.DESCRIPTOR, kind): kind for kind, of in self.resource_types.items()}

    def _descriptor(self, name: str) -> Message_:
        return cast("Message_", self._pool.FindMessageTypeByName(f"{self.package}.{name}"))

    def _class(self, name: str) -> type[Message]:
        return message_factory.GetMessageClass(cast("Any", self._descriptor(name)))

    def _enum(self, name: str) -> Enum:
        return cast("Enum", self._pool.FindEnumTypeByName(f"{self.package}.{name}"))

    def kind_of_name(self, name: str) -> str:
        """Return the kind that a resource of that name has; empty: not one of this package."""
        parts = name.split("/")
        return self._kind_by_collection.get(parts[-2] if len(parts) % 2 == 0 else parts[-1], "")

    def _at(self, time_ns: int) -> bytes:
        """Encode when a change was; those of one batch come one after the other with the same time."""
        last = self._last_time
        if last[0] != time_ns:
            last = self._last_time = time_ns, field_bytes(self._time, timestamp(time_ns))
        return last[1]

    def put(self, time_ns: int, kind: str, body: bytes, *, cause: str, old_generation: int = 0) -> bytes:
        """Encode a `Change` that holds a put of a serialised resource."""
        inner = _cause_field(self._cause, cause)
        if old_generation:
            inner += field_integer(self._old_generation, old_generation)
        return self._at(time_ns) + field_bytes(self._put, inner + field_bytes(self._resource[kind], body))

    def delete(self, time_ns: int, kind: str, name: str, uid: str, *, cause: str) -> bytes:
        """Encode a `Change` that holds a delete."""
        inner = field_text(1, kind) + field_text(2, name) + field_text(3, uid) + field_text(4, cause)
        return self._at(time_ns) + field_bytes(self._delete, inner)

    def moved_out(self, time_ns: int, kind: str, name: str, uid: str, new_name: str) -> bytes:
        """Encode a `Change` that tells that a resource has left for another node."""
        inner = field_text(1, kind) + field_text(2, name) + field_text(3, uid) + field_text(4, new_name)
        return self._at(time_ns) + field_bytes(self._moved_out, inner)

    def moved_in(self, time_ns: int, kind: str, name: str, uid: str, old_name: str) -> bytes:
        """Encode a `Change` that tells that a resource has come from another node."""
        inner = field_text(1, kind) + field_text(2, name) + field_text(3, uid) + field_text(4, old_name)
        return self._at(time_ns) + field_bytes(self._moved_in, inner)

    def event(self, time_ns: int, event: bytes) -> bytes:
        """Encode a `Change` that holds a serialised event."""
        return self._at(time_ns) + field_bytes(self._event, event)

    def response(self, changes: Sequence[bytes], token: str) -> bytes:
        """Encode a `WatchResourcesResponse` around encoded changes."""
        parts = [field_bytes(self._changes, change) for change in changes]
        parts.append(field_text(self._token, token))
        return b"".join(parts)

    def bookmark(self, time_ns: int, token: str, closing: status_pb2.Status | None = None) -> bytes:
        """Encode a response that says that all up to the token has been sent, and why the stream ends if it does."""
        return field_text(self._token, token) + field_bytes(self._bookmark, bookmark_body(time_ns, closing))

    def snapshot_end(self, token: str) -> bytes:
        """Encode the response that ends a snapshot."""
        return field_text(self._token, token) + field_bytes(self._snapshot_end, b"")

    def resource_in(self, change: bytes) -> tuple[Message, str, int] | None:
        """Decode a change; return the resource of a put with its cause and old generation, None for other changes."""
        decoded = self.change_class.FromString(change)
        if decoded.WhichOneof("kind") != "put":
            return None
        put = decoded.put  # type: ignore[attr-defined]  # the class is made from a descriptor at run time
        kind = put.WhichOneof("resource")
        return (getattr(put, kind), put.cause, put.old_generation) if kind else None

    def event_in(self, change: bytes) -> Message:
        """Decode the event of a change that holds one."""
        found: Message = self.change_class.FromString(change).event  # type: ignore[attr-defined]  # made at run time
        return found


def bookmark_body(time_ns: int, closing: status_pb2.Status | None = None) -> bytes:
    """Encode a `virtfleet.type.v1.WatchBookmark`."""
    body = field_bytes(1, timestamp(time_ns))
    return body + field_bytes(2, closing.SerializeToString()) if closing is not None else body


def _pool(package: str, resource_types: Mapping[str, type[Message]]) -> Any:  # noqa: ANN401  # of either runtime
    """Find the pool that knows the package; a package that is not loaded yet is imported."""
    found = next(iter(resource_types.values()), None)
    pool = cast("Any", descriptor_pool).Default() if found is None else found.DESCRIPTOR.file.pool
    try:
        pool.FindMessageTypeByName(f"{package}.Change")
    except KeyError:
        importlib.import_module(f"{package}.watch_pb2")
    return pool


def _resource_field(put: Message_, kind: str, of: type[Message]) -> Field:
    field = put.fields_by_name.get(kind)
    if field is None or field.message_type is None or field.message_type.full_name != of.DESCRIPTOR.full_name:
        raise ValueError(f"{put.full_name} has no field {kind} of type {of.DESCRIPTOR.full_name}")
    return field


def _kinds_by_number(enum: Enum) -> dict[int, str]:
    """Return `{1: "domain", …}`: the values of `ResourceType` are the kinds in capitals, behind a prefix."""
    return {value.number: value.name.removeprefix("RESOURCE_TYPE_").lower() for value in enum.values if value.number}


def _collection(descriptor: Message_, kind: str) -> str:
    """Return the name segment that marks a kind: the collection, or the last segment of a singleton."""
    patterns: Sequence[str] = descriptors.options(descriptor, resource_pb2.resource).pattern
    if patterns:
        parts = patterns[0].split("/")
        return parts[-2] if parts[-1].startswith("{") else parts[-1]
    head, *rest = kind.split("_")
    return head + "".join(part.capitalize() for part in rest) + "s"

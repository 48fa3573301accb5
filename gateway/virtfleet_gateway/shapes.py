"""The watch messages of the packages of a node, taken apart and put together as bytes.

The index keeps no decoded resource. A `Change` is split into what stands around the resource and the resource itself;
what is sent to clients is spliced from these parts. The numbers come from the descriptors of each package.

What a node says goes to the clients of the whole fleet as it is, so it must be something that every client can read:
each message is parsed once, and thrown away, before it is taken apart. One node that says rubbish is away, and breaks
nobody's list.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, Final, cast

from google.protobuf import message_factory
from google.protobuf.message import DecodeError

from virtfleet.compute.v1 import watch_pb2 as compute_watch
from virtfleet.network.v1 import watch_pb2 as network_watch
from virtfleet.storage.v1 import watch_pb2 as storage_watch
from virtfleet.type.v1 import resource_pb2
from virtfleet_gateway import wire
from virtfleet_service.changes import ChangeCodec, field_bytes, field_text
from virtfleet_service.names import NAME_LIMIT_CHARACTERS

if TYPE_CHECKING:
    from collections.abc import Callable

    from google.protobuf.descriptor import Descriptor, FieldDescriptor
    from google.protobuf.message import Message

BASIC: Final = resource_pb2.RESOURCE_VIEW_BASIC

_HEAD = (1, 2)
_SPEC = 10
_STATUS = 11
_LEFT_OUT_OF_STATUS = ("active_spec", "resolved_spec")
_FIRST_RESOURCE = 10

MESSAGE_LIMIT_BYTES: Final = 8 << 20
"""More than a node puts into one message of its watch: half a mebibyte and one resource."""
RESOURCE_LIMIT_BYTES: Final = 2 << 20
"""No larger resource is told on: one that does not fit into the page of a list would end the list for everybody."""
TOKEN_LIMIT_CHARACTERS: Final = 1024
"""The token of a fleet holds those of all its nodes: one node must not make it too large for the others."""
UID_LIMIT_CHARACTERS: Final = 64

_WATCH_FILES: Final = {"compute": compute_watch, "storage": storage_watch, "network": network_watch}


class Kind:
    """Is one kind of resource of a package.

    Attributes:
        name: Its singular noun: `domain`.
        number: Its number in `ResourceType`.
        put_tag: The tag of its field in `ResourcePut`.
        message: Its message class.
    """

    __slots__ = ("_dropped", "message", "name", "number", "put_tag")

    def __init__(self, field: FieldDescriptor, number: int) -> None:
        descriptor = cast("Descriptor", field.message_type)
        self.name = field.name
        self.number = number
        self.put_tag = wire.varint(field.number << 3 | 2)
        self.message: type[Message] = message_factory.GetMessageClass(descriptor)
        status = descriptor.fields_by_number.get(_STATUS)
        inner = status.message_type.fields_by_name if status is not None and status.message_type is not None else {}
        self._dropped = frozenset(inner[name].number for name in _LEFT_OUT_OF_STATUS if name in inner)

    def basic(self, full: bytes) -> bytes:
        """Return the BASIC view of a serialised resource: no spec, and no specs in the status."""
        parts: list[bytes] = []
        position = 0
        for number, kind, start, end in wire.fields(full):
            if number == _STATUS and kind == wire.BYTES and self._dropped:
                parts.append(field_bytes(_STATUS, self._without(full[start:end])))
            elif number != _SPEC:
                parts.append(full[position:end])
            position = end
        return b"".join(parts)

    def _without(self, status: bytes) -> bytes:
        parts: list[bytes] = []
        position = 0
        for number, _, _, end in wire.fields(status):
            if number not in self._dropped:
                parts.append(status[position:end])
            position = end
        return b"".join(parts)


class Entry:
    """Is one resource as a node has sent it; never changed."""

    __slots__ = ("_basic", "_listed", "_verdicts", "full", "kind", "name", "uid")

    def __init__(self, kind: Kind, full: bytes) -> None:
        self.kind = kind
        self.full = full
        self.name, self.uid = wire.strings_in(full, _HEAD)
        self._basic: bytes | None = None
        self._listed: bytes | None = None
        self._verdicts: dict[str, bool] | None = None

    def seen(self, view: int) -> bytes:
        """Return the serialised resource as a view shows it."""
        if view != BASIC:
            return self.full
        if self._basic is None:
            self._basic = self.kind.basic(self.full)
        return self._basic

    def holds(self, text: str, test: Callable[[Message], bool]) -> bool:
        """Tell whether a filter holds; the resource is decoded once a filter, not once a list."""
        if self._verdicts is None:
            self._verdicts = {}
        verdict = self._verdicts.get(text)
        if verdict is None:
            if len(self._verdicts) >= _VERDICTS_LIMIT:
                self._verdicts.clear()
            verdict = self._verdicts[text] = test(self.kind.message.FromString(self.full))
        return verdict


_VERDICTS_LIMIT = 4
_CHANGE_BYTES = 512
"""What a change takes beside its bytes: the object, the resource's, their texts."""


class Sort(enum.Enum):
    """Says what a change is."""

    PUT = "put"
    DELETE = "delete"
    EVENT = "event"
    MOVED = "moved"


class Change:
    """Is one change of a node, ready to be sent.

    Attributes:
        sort: What it is.
        kind: The name of the kind of resource that it is about; empty: none of the package.
        name: The name of that resource.
        uid: Its uid.
        entry: The resource after a put.
        previous: The resource before it, as the index had it, or the one that an event is about; None: it had none,
            or was not asked.
        event_type: The number of the event's type.
        new_name: The name after a move.
    """

    __slots__ = (
        "_head",
        "_inner",
        "_raw",
        "entry",
        "event_type",
        "kind",
        "name",
        "new_name",
        "previous",
        "sort",
        "uid",
    )

    def __init__(self, sort: Sort, kind: str, name: str, uid: str, *, raw: bytes = b"", new_name: str = "") -> None:
        self.sort = sort
        self.kind = kind
        self.name = name
        self.uid = uid
        self.new_name = new_name
        self.entry: Entry | None = None
        self.previous: Entry | None = None
        self.event_type = 0
        self._raw = raw
        self._head = self._inner = b""

    @property
    def size(self) -> int:
        """About how many bytes it takes in memory."""
        body = len(self.entry.full) if self.entry is not None else len(self._raw)
        return body + len(self._head) + len(self._inner) + _CHANGE_BYTES

    @classmethod
    def put(cls, entry: Entry, *, head: bytes, inner: bytes) -> Change:
        """Make a put.

        Args:
            entry: The resource.
            head: The fields of `Change` beside the put, serialised.
            inner: The fields of `ResourcePut` beside the resource, serialised.
        """
        change = cls(Sort.PUT, entry.kind.name, entry.name, entry.uid)
        change.entry, change._head, change._inner = entry, head, inner
        return change

    def encode(self, view: int) -> bytes:
        """Return the serialised `Change`."""
        if self.entry is None:
            return self._raw
        body = self.entry.seen(view)
        inner = b"".join((self._inner, self.entry.kind.put_tag, wire.varint(len(body)), body))
        return self._head + field_bytes(_PUT, inner)


_TIME, _PUT, _DELETE, _MOVED_OUT, _MOVED_IN, _EVENT, _MOVED = 1, 2, 3, 4, 5, 6, 7
_CHANGES, _TOKEN, _BOOKMARK, _SNAPSHOT_END, _SOURCE_STATUS = 1, 2, 3, 4, 5


class Shape:
    """Knows the watch messages of one package.

    Args:
        service: `compute`, `storage` or `network`.
    """

    def __init__(self, service: str) -> None:
        self.service = service
        self.package = f"virtfleet.{service}.v1"
        self.messages: Any = _WATCH_FILES[service]
        put = self.messages.ResourcePut.DESCRIPTOR
        types = self.messages.ResourceType
        self.kinds = {
            field.number: Kind(field, types.Value(f"RESOURCE_TYPE_{field.name.upper()}"))
            for field in put.oneofs_by_name["resource"].fields
        }
        self.kind_by_name = {kind.name: kind for kind in self.kinds.values()}
        self.codec = ChangeCodec(self.package, {kind.name: kind.message for kind in self.kinds.values()})
        self.watch_path = f"/{self.package}.WatchService/WatchResources"
        self._response_class: type[Message] = self.messages.WatchResourcesResponse

    def response(self, data: bytes) -> tuple[list[Change], str, int, bytes]:
        """Take a `WatchResourcesResponse` apart: its changes, token, and the number and bytes of its marker (0: none).

        Raises:
            WireError: It does not parse, or no release would say it.
        """
        if len(data) > MESSAGE_LIMIT_BYTES:
            raise wire.WireError(f"a message of its watch has {len(data)} bytes")
        try:
            self._response_class.FromString(data)
        except DecodeError as error:
            raise wire.WireError("a message of its watch does not parse") from error
        changes: list[Change] = []
        token, marker, body = "", 0, b""
        for number, kind, start, end in wire.fields(data):
            if kind != wire.BYTES:
                continue
            if number == _CHANGES:
                change = self._change(data[start:end])
                if change is not None:
                    changes.append(change)
            elif number == _TOKEN:
                token = data[start:end].decode()
            elif number in (_BOOKMARK, _SNAPSHOT_END, _SOURCE_STATUS):
                marker, body = number, data[start:end]
        if len(token) > TOKEN_LIMIT_CHARACTERS:
            raise wire.WireError(f"a token of its watch has {len(token)} characters")
        return changes, token, marker, body

    def _change(self, data: bytes) -> Change | None:
        position = 0
        head: list[bytes] = []
        sort, body = 0, b""
        for number, kind, start, end in wire.fields(data):
            if number == _TIME:
                head.append(data[position:end])
            elif _PUT <= number <= _MOVED and kind == wire.BYTES:
                sort, body = number, data[start:end]
            position = end
        if sort == _PUT:
            return self._put(b"".join(head), body)
        if sort == _EVENT:
            return self._event(data, body)
        if sort == _DELETE:
            of, name, uid = wire.strings_in(body, (1, 2, 3))
            return _bounded(Change(Sort.DELETE, of, name, uid, raw=data))
        if sort in (_MOVED_OUT, _MOVED_IN):
            return self._move(sort, b"".join(head), body)
        # A kind of change that a newer release knows: what it says cannot be judged, and puts tell the rest.
        return None

    def _put(self, head: bytes, body: bytes) -> Change | None:
        position = 0
        inner: list[bytes] = []
        entry: Entry | None = None
        for number, encoding, start, end in wire.fields(body):
            if number < _FIRST_RESOURCE:
                inner.append(body[position:end])
            elif encoding == wire.BYTES and number in self.kinds:
                entry = Entry(self.kinds[number], body[start:end])
            position = end
        if entry is None:
            return None
        if len(entry.full) > RESOURCE_LIMIT_BYTES:
            raise wire.WireError(f"a resource has {len(entry.full)} bytes")
        return _bounded(Change.put(entry, head=head, inner=b"".join(inner)))

    def _event(self, data: bytes, body: bytes) -> Change:
        name, uid = wire.strings_in(body, _HEAD)
        change = Change(Sort.EVENT, self.codec.kind_of_name(name), name, uid, raw=data)
        for number, kind, start, _ in wire.fields(body):
            if number == 3 and kind == 0:
                change.event_type = wire.read_varint(body, start)
        return _bounded(change)

    def _move(self, sort: int, head: bytes, body: bytes) -> Change:
        """Both halves of a move say all of it: either becomes the whole."""
        kind, name, uid, other = wire.strings_in(body, (1, 2, 3, 4))
        old, new = (name, other) if sort == _MOVED_OUT else (other, name)
        moved = field_text(1, kind) + field_text(2, uid) + field_text(3, old) + field_text(4, new)
        return _bounded(Change(Sort.MOVED, kind, old, uid, raw=head + field_bytes(_MOVED, moved), new_name=new))

    def snapshot_put(self, entry: Entry) -> Change:
        """Return the put that tells a resource in a snapshot."""
        return Change.put(entry, head=b"", inner=_SNAPSHOT_CAUSE)

    def filtered(self, change: Change) -> bytes:
        """Return the serialised delete that tells that a filter has ceased to hold."""
        inner = field_text(1, change.kind) + field_text(2, change.name) + field_text(3, change.uid)
        return change._head + field_bytes(_DELETE, inner + field_text(4, "filter"))  # noqa: SLF001

    def status(self, token: str, status: Message) -> bytes:
        """Return a serialised response that tells the state of a node."""
        return field_text(_TOKEN, token) + field_bytes(_SOURCE_STATUS, status.SerializeToString())


def _bounded(change: Change) -> Change:
    """Return a change whose names are such as can be.

    Raises:
        WireError: One is longer than any name is.
    """
    longest = max(len(change.name), len(change.new_name))
    if longest > NAME_LIMIT_CHARACTERS or len(change.uid) > UID_LIMIT_CHARACTERS:
        raise wire.WireError(f"a name has {longest} characters, a uid {len(change.uid)}")
    return change


_SNAPSHOT_CAUSE = field_text(1, "snapshot")

MARKER_BOOKMARK: Final = _BOOKMARK
MARKER_SNAPSHOT_END: Final = _SNAPSHOT_END

"""The merged news of one package over all nodes: a ring of what has happened lately, and the places in it.

Each node's stream goes into the ring in its own order; there is no order between nodes. Readers hold a number and are
woken when there is more. A place is told to clients as a map of the nodes' own resume tokens, so that any gateway, also
one that has just started, can go on from it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections import OrderedDict, deque
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from virtfleet_gateway import wire
from virtfleet_gateway.routing import is_id
from virtfleet_service.errors import PageTokenInvalid

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from google.protobuf.message import Message

    from virtfleet_gateway.shapes import Change, Entry

RING_LIMIT_CHANGES: Final = 20_000
"""How many changes the ring holds for readers that are behind; those further behind ask the nodes."""

RING_LIMIT_BYTES: Final = 16 * 1024 * 1024
"""How many bytes they may have: what a gateway needs must not hang on how large the resources of others are."""


PLACES_LIMIT: Final = 4096
"""How many places of one node the ring knows: in quiet times each bookmark may be one."""


class Item:
    """Is one step of a node: changes, or a new snapshot of it, or a change of how it stands.

    Attributes:
        number: Its place in the ring.
        node: The node.
        token: The node's own resume token after it.
        changes: What has changed, in order.
        snapshot: All resources of the node, if its history had a gap; None: it had none.
        status: What is told about the node; None: nothing.
        size: About how many bytes its changes take. Those of a snapshot are in the index anyway.
    """

    __slots__ = ("changes", "node", "number", "size", "snapshot", "status", "token")

    def __init__(
        self,
        number: int,
        node: str,
        token: str,
        changes: Sequence[Change] = (),
        *,
        snapshot: Sequence[Entry] | None = None,
        status: Message | None = None,
    ) -> None:
        self.number = number
        self.node = node
        self.token = token
        self.changes = changes
        self.snapshot = snapshot
        self.status = status
        self.size = sum(change.size for change in changes)


class Feed:
    """Is the ring of one package.

    Args:
        limit_changes: How many changes it holds.
        limit_bytes: How many bytes they have.
    """

    def __init__(self, limit_changes: int = RING_LIMIT_CHANGES, limit_bytes: int = RING_LIMIT_BYTES) -> None:
        self.head = 0
        """The number of the newest item."""
        self._items: deque[Item] = deque()
        self._changes = 0
        self._bytes = 0
        self._limit = limit_changes
        self._limit_bytes = limit_bytes
        self._wakers: set[asyncio.Event] = set()
        # Per node: the number after which each known token of the node stands.
        self._places: dict[str, OrderedDict[str, int]] = {}

    @property
    def tail(self) -> int:
        """The number of the item before the oldest one: readers at a lower one have lost the thread."""
        return self._items[0].number - 1 if self._items else self.head

    def append(
        self,
        node: str,
        token: str,
        changes: Sequence[Change] = (),
        *,
        snapshot: Sequence[Entry] | None = None,
        status: Message | None = None,
    ) -> None:
        """Add a step of a node and wake the readers."""
        self.head += 1
        item = Item(self.head, node, token, changes, snapshot=snapshot, status=status)
        self._items.append(item)
        self._changes += len(changes) + 1
        self._bytes += item.size
        if snapshot is not None:
            # What came before is of another history.
            self._places.pop(node, None)
        self.place(node, token)
        while (self._changes > self._limit or self._bytes > self._limit_bytes) and len(self._items) > 1:
            self._evict()
        for waker in self._wakers:
            waker.set()

    def _evict(self) -> None:
        oldest = self._items.popleft()
        self._changes -= len(oldest.changes) + 1
        self._bytes -= oldest.size
        places = self._places.get(oldest.node)
        while places:
            token, number = next(iter(places.items()))
            if number >= oldest.number:
                break
            del places[token]

    def place(self, node: str, token: str) -> None:
        """Note that a token of a node stands at the head."""
        if token:
            places = self._places.setdefault(node, OrderedDict())
            places[token] = self.head
            places.move_to_end(token)
            if len(places) > PLACES_LIMIT:
                places.popitem(last=False)

    def locate(self, node: str, token: str) -> int | None:
        """Return the number after which a token of a node stands; None: the ring does not reach back to it."""
        places = self._places.get(node)
        number = places.get(token) if places is not None else None
        return number if number is not None and number >= self.tail else None

    def forget(self, node: str) -> None:
        """Drop the places of a node that has been removed."""
        self._places.pop(node, None)

    def after(self, number: int) -> list[Item]:
        """Return the items behind a number, oldest first."""
        behind = self.head - number
        if behind <= 0:
            return []
        if behind >= len(self._items):
            return list(self._items)
        return [self._items[index] for index in range(len(self._items) - behind, len(self._items))]

    def subscribe(self) -> asyncio.Event:
        """Return an event that is set when there is more; give it back by `unsubscribe`."""
        waker = asyncio.Event()
        self._wakers.add(waker)
        return waker

    def unsubscribe(self, waker: asyncio.Event) -> None:
        """Stop waking a reader."""
        self._wakers.discard(waker)

    def wake(self) -> None:
        """Wake all readers, because the gateway drains."""
        for waker in self._wakers:
            waker.set()


TOKEN_LIMIT_CHARACTERS: Final = 1 << 20
"""Nobody has a fleet whose token is longer; what a client makes up must not keep the gateway busy."""

_VERSION: Final = b"\x01"
_RAW = 1
_TEXT = 2
_NODE = 3
_IN_SNAPSHOT = 4
_BINDING = 5
# These two stand before the nodes: a gateway that does not know them passes them over.


class Place:
    """Is a place in the watch of a fleet: the nodes' own tokens. As text it is what clients resume with.

    Args:
        tokens: The tokens by node.
        binding: Stands for the parameters of the watch; empty: it fits any.
        in_snapshot: Whether the snapshot with which the watch began has not been told to its end.
    """

    __slots__ = ("_in_snapshot", "_text", "_tokens", "binding")

    def __init__(self, tokens: Mapping[str, str] = {}, *, binding: bytes = b"", in_snapshot: bool = False) -> None:
        self.binding: Final = binding
        self._tokens = dict(tokens)
        self._in_snapshot = in_snapshot
        self._text: str | None = None

    @property
    def tokens(self) -> Mapping[str, str]:
        """The nodes' own tokens."""
        return self._tokens

    @property
    def in_snapshot(self) -> bool:
        """Whether the snapshot with which the watch began has not been told to its end."""
        return self._in_snapshot

    def end_snapshot(self) -> None:
        """Note that the snapshot has been told to its end."""
        self._in_snapshot = False
        self._text = None

    def __iter__(self) -> Iterator[str]:
        return iter(self._tokens)

    def set(self, node: str, token: str) -> None:
        """Note where a node stands."""
        if self._tokens.get(node) != token:
            self._tokens[node] = token
            self._text = None

    def drop(self, node: str) -> None:
        """Leave a node out: whoever goes on from here is told all of it anew."""
        if self._tokens.pop(node, None) is not None:
            self._text = None

    @property
    def text(self) -> str:
        """The place as clients hold it; made once for each place."""
        if self._text is None:
            self._text = encode_tokens(self._tokens, binding=self.binding, in_snapshot=self._in_snapshot)
        return self._text


def encode_tokens(tokens: Mapping[str, str], *, binding: bytes = b"", in_snapshot: bool = False) -> str:
    """Return the resume token of a fleet: an opaque text that holds the nodes' own."""
    head = [wire.delimited(_IN_SNAPSHOT, b"")] if in_snapshot else []
    if binding:
        head.append(wire.delimited(_BINDING, binding))
    parts = [_VERSION, *head, *map(_piece, tokens.keys(), tokens.values())]
    return base64.urlsafe_b64encode(b"".join(parts)).rstrip(b"=").decode()


@lru_cache(maxsize=8192)
def _piece(node: str, token: str) -> bytes:
    """Return the part of one node; every watcher and every list has the same ones at about the same time."""
    raw = _raw(token)
    own = wire.delimited(_TEXT, token.encode()) if raw is None else wire.delimited(_RAW, raw)
    return wire.delimited(_NODE, node.encode()) + own


def _raw(token: str) -> bytes | None:
    """Return what a token that is base64 itself stands for, to save a third of its length."""
    try:
        raw = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
    except (binascii.Error, ValueError):
        return None
    return raw if base64.urlsafe_b64encode(raw).rstrip(b"=").decode() == token else None


def decode_place(text: str) -> Place:
    """Return the place that the resume token of a fleet stands for.

    Raises:
        PageTokenInvalid: It is none.
    """
    try:
        if len(text) > TOKEN_LIMIT_CHARACTERS:
            raise ValueError("longer than any fleet's")
        data = base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
        if data[:1] != _VERSION:
            raise ValueError("another version")
        tokens: dict[str, str] = {}
        head: dict[int, bytes] = {}
        node = ""
        for number, kind, start, end in wire.fields(data[1:]):
            if kind != wire.BYTES:
                raise ValueError("not made here")
            value = data[1 + start : 1 + end]
            if number == _NODE:
                node = value.decode()
                if not is_id(node):
                    raise ValueError("not of a node")
            elif node:
                tokens[node] = (
                    base64.urlsafe_b64encode(value).rstrip(b"=").decode() if number == _RAW else value.decode()
                )
            else:
                head[number] = value
        return Place(tokens, binding=head.get(_BINDING, b""), in_snapshot=_IN_SNAPSHOT in head)
    except (binascii.Error, ValueError) as error:
        raise PageTokenInvalid(
            "The resume token is not one of a watch over all nodes; begin with a snapshot", field="resume_token"
        ) from error

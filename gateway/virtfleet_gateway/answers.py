"""What nodes answer, looked at before it becomes part of an answer for the fleet.

A list of the fleet is put together from bytes of many nodes. One message in it that does not parse would cost its
readers all of it, and a node that names what is another's would speak for that one. So the answer of a node is parsed
once, and whatever it names must be its own; one that is not so is no answer.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from google.protobuf import message_factory
from google.protobuf.message import DecodeError

from virtfleet_gateway import wire
from virtfleet_service.errors import Unexpected
from virtfleet_service.validation import REPLY_LIMIT_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from google.protobuf.descriptor import Descriptor
    from google.protobuf.message import Message

    from virtfleet_service.errors import VirtfleetError

TOKEN_LIMIT_CHARACTERS: Final = 4096
"""What is in the page token of a node stands in that of the fleet."""

_ITEMS: Final = 1
_NEXT: Final = 2


@dataclass(frozen=True, slots=True)
class Answer:
    """Is what one node answered: a serialised response, or why there is none.

    Attributes:
        node: The node.
        body: The response.
        items: Of a list: what is in its field 1.
        next_page_token: Of a list: where it goes on.
        error: Why there is no response; None: there is one.
        late: Whether it did not answer in its share of the time.
    """

    node: str
    body: bytes = b""
    items: Sequence[bytes] = ()
    next_page_token: str = ""
    error: VirtfleetError | None = None
    late: bool = False


@dataclass(frozen=True, slots=True)
class _Form:
    """Is what must be known of a response to find what it names: all of it stands in fields 1."""

    message: type[Message]
    item: str
    """The field of the items of a list; empty: the response is a resource itself."""
    name: str
    inner: str
    """The field of an item that holds the resource, in batches; empty: the item is it."""


@functools.cache
def _form(response: Descriptor) -> _Form:
    first = response.fields_by_number[_ITEMS]
    message = message_factory.GetMessageClass(response)
    if first.message_type is None:
        return _Form(message, "", first.name, "")
    item = first.message_type
    third = item.fields_by_number.get(3)
    inner = third.message_type if third is not None and not third.is_repeated else None
    holds = inner is not None and inner.full_name.startswith("virtfleet.") and "name" in inner.fields_by_name
    return _Form(message, first.name, item.fields_by_number[1].name, third.name if holds and third is not None else "")


def taken(node: str, body: bytes, response: Descriptor) -> Answer:
    """Return the answer of a node, or, in its place, that it is none.

    Args:
        node: The node.
        body: What it has sent.
        response: Of which type it should be.
    """
    if len(body) > REPLY_LIMIT_BYTES:
        return _refused(node, f"it has {len(body)} bytes")
    form = _form(response)
    try:
        decoded: Any = form.message.FromString(body)
        if not form.item:
            stranger = _stranger(node, (getattr(decoded, form.name),))
            return _refused(node, f"it names {stranger}") if stranger else Answer(node, body)
        found = getattr(decoded, form.item)
        names = [getattr(item, form.name) for item in found]
        if form.inner:
            names += [getattr(item, form.inner).name for item in found if item.HasField(form.inner)]
        stranger = _stranger(node, names)
        if stranger:
            return _refused(node, f"it names {stranger}")
        items, token = _page(body)
    except (DecodeError, ValueError):
        return _refused(node, "it does not parse")
    if len(token) > TOKEN_LIMIT_CHARACTERS:
        return _refused(node, f"its page token has {len(token)} characters")
    return Answer(node, body, items, token)


def _page(body: bytes) -> tuple[list[bytes], str]:
    """Return the items of a page, and where its list goes on."""
    items: list[bytes] = []
    token = ""
    for number, kind, start, end in wire.fields(body):
        # Of another kind it is a field that no parser knows.
        if number == _ITEMS and kind == wire.BYTES:
            items.append(body[start:end])
        elif number == _NEXT and kind == wire.BYTES:
            token = body[start:end].decode()
    return items, token


def _stranger(node: str, names: Sequence[str]) -> str:
    """Return the first name that is not of a node; empty: all are."""
    own, below = f"nodes/{node}", f"nodes/{node}/"
    return next((name for name in names if name and name != own and not name.startswith(below)), "")


def _refused(node: str, why: str) -> Answer:
    return Answer(node, error=Unexpected(f"What node {node} has answered is no answer: {why}", node=f"nodes/{node}"))

"""Lists in pages, straight from the stored bytes where nothing has to be left out.

The order is that of the names. A page ends at the page size, at 1 MiB, or when looking for matches has taken long
enough, so a page may be short or empty while `next_page_token` says that there is more.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from google.protobuf.message import Message

from virtfleet_service import errors, filters, tokens, views
from virtfleet_service.changes import field_text, varint
from virtfleet_service.transaction import Row

if TYPE_CHECKING:
    from virtfleet_service.call import Call
    from virtfleet_service.store import Store

DEFAULT_PAGE_SIZE: Final = 500
PAGE_SIZE_LIMIT: Final = 5000
PAGE_LIMIT_BYTES: Final = 1024 * 1024
SCAN_SECONDS: Final = 0.05
"""How long one page may keep the event loop with resources that do not match."""

_PLACE = struct.Struct(">QQ")
_ROWS_BETWEEN_LOOKS_AT_THE_CLOCK: Final = 32


@dataclass(slots=True)
class Page:
    """Is one page of a list.

    Attributes:
        items: The resources: bytes where they are as stored, messages where a view or filter had to open them.
        next_page_token: Continues the list; empty: this is the last page.
        resume_token: Starts a watch where the first page of the list was read.
    """

    items: list[bytes | Message]
    next_page_token: str
    resume_token: str


def page(
    store: Store,
    kind: str,
    parent: str,
    request: Message,
    *,
    decode: Callable[[bytes], Message] | None = None,
    view: int | None = None,
    call: Call | None = None,
) -> tuple[list[bytes | Message], str]:
    """Read a page as `read_page` does; return its items and its next_page_token."""
    found = read_page(store, kind, parent, request, decode=decode, view=view, call=call)
    return found.items, found.next_page_token


def read_page(
    store: Store,
    kind: str,
    parent: str,
    request: Message,
    *,
    decode: Callable[[bytes], Message] | None = None,
    view: int | None = None,
    call: Call | None = None,
) -> Page:
    """Read one page of the resources of a kind.

    Args:
        store: Where they are.
        kind: Their kind.
        parent: Only below this name; a segment `-` stands for any.
        request: The List request: page_size, page_token, filter and view are read from it.
        decode: Makes a message of stored bytes; None: that of the kind's class.
        view: How much of each resource; None: as the request says.
        call: Whose caller must be allowed to see a resource; None: everything is shown.

    Raises:
        PageTokenInvalid: The token is of another list.
        FilterSyntax: The filter does not parse.
        FieldOutOfRange: The page size is negative.
    """
    of = store.codec.resource_types[kind]
    decode = decode or of.FromString
    text: str = getattr(request, "filter", "")
    matches = filters.compile_filter(text, of) if text else None
    chosen: int = getattr(request, "view", 0) if view is None else view
    basic = chosen == views.BASIC
    sees = None if call is None or call.sees_all else call.may_see
    size = page_size_of(request)
    binding = tokens.binding_of("list", kind, parent, text, basic)
    seq, time_ns, after = _start(store, binding, getattr(request, "page_token", ""))

    items: list[bytes | Message] = []
    used, last, more = 0, after, False
    until = time.monotonic() + SCAN_SECONDS
    with closing(store.iterate(kind, parent=parent, after=after)) as rows:
        for number, row in enumerate(rows):
            if len(items) == size or (number % _ROWS_BETWEEN_LOOKS_AT_THE_CLOCK == 31 and time.monotonic() > until):
                more = True
                break
            item = _shown(row, sees, matches, decode, basic=basic)
            if item is not None:
                length = len(item) if isinstance(item, bytes) else item.ByteSize()
                if items and used + length > PAGE_LIMIT_BYTES:
                    more = True
                    break
                used += length
                items.append(item)
            last = row.name
    following = tokens.seal(store.token_key, binding, _PLACE.pack(seq, time_ns) + last.encode()) if more else ""
    return Page(items, following, tokens.ResumeToken(store.store_id, seq, time_ns).encode())


def list_reply(
    store: Store,
    kind: str,
    request: Message,
    response_class: type[Message],
    *,
    parent: str | None = None,
    call: Call | None = None,
) -> bytes:
    """Answer a List request with a serialised response: resources, next_page_token and resume_token.

    Args:
        store: Where the resources are.
        kind: Their kind.
        request: The request.
        response_class: The class of the response; its field 1 holds the resources.
        parent: Only below this name; None: as the request says.
        call: Whose caller must be allowed to see a resource; None: everything is shown.

    Raises:
        PageTokenInvalid: The token is of another list.
        FilterSyntax: The filter does not parse.
        FieldOutOfRange: The page size is negative.
    """
    below: str = request.parent if parent is None else parent  # type: ignore[attr-defined]  # field 1 of every List request
    found = read_page(store, kind, below, request, call=call)
    numbers = response_class.DESCRIPTOR.fields_by_name
    parts: list[bytes] = []
    for item in found.items:
        body = item if isinstance(item, bytes) else item.SerializeToString()
        # Field 1, with a length. In pieces: a page is copied once, when it is joined.
        parts += (b"\x0a", varint(len(body)), body)
    parts.append(field_text(numbers["next_page_token"].number, found.next_page_token))
    if "resume_token" in numbers:
        parts.append(field_text(numbers["resume_token"].number, found.resume_token))
    return b"".join(parts)


def page_size_of(request: Message) -> int:
    """Return how many items a page may have.

    Raises:
        FieldOutOfRange: The page size is negative.
    """
    wanted: int = getattr(request, "page_size", 0)
    if wanted < 0:
        raise errors.FieldOutOfRange("page_size must not be negative", field="page_size", page_size=wanted)
    return min(wanted or DEFAULT_PAGE_SIZE, PAGE_SIZE_LIMIT)


def _start(store: Store, binding: bytes, token: str) -> tuple[int, int, str]:
    """Return where the list began in the log, and the name after which it goes on."""
    if not token:
        return store.last_seq, store.last_ns, ""
    payload = tokens.unseal(store.token_key, binding, token)
    seq, time_ns = _PLACE.unpack_from(payload)
    return seq, time_ns, payload[_PLACE.size :].decode()


def _shown(
    row: Row,
    sees: Callable[[str], bool] | None,
    matches: Callable[[Message], bool] | None,
    decode: Callable[[bytes], Message],
    *,
    basic: bool,
) -> bytes | Message | None:
    if sees is not None and not sees(row.name):
        return None
    if matches is None and not basic:
        return row.body
    message = decode(row.body)
    if matches is not None and not matches(message):
        return None
    return views.apply_view(message, views.BASIC) if basic else row.body

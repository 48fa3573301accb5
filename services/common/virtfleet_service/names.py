"""Resource names: their form, their parts, and how references inside a spec become full names.

A full name is `nodes/{node}/domains/{domain}`; a node-relative one lacks `nodes/{node}/` and stands inside specs, so
that a spec can move to another node unchanged.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

from virtfleet_service.errors import NameMalformed, ReferenceOtherNode

ID: Final = r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?"
"""The form of an id: DNS-like, 1 to 63 characters."""

UID: Final = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
"""The form of a uid as servers write it."""

NAME_LIMIT_CHARACTERS: Final = 512
"""No name is longer; the deepest one of the API has six segments of ids."""

# ASCII digits and letters only (no `\w`, which takes look-alikes), and `fullmatch` only (`$` would take a final
# newline).
_ID = re.compile(ID)
_UID = re.compile(UID)
_ANY_CASE_UUID = re.compile(UID, re.IGNORECASE)
_SEGMENT: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_NAME = re.compile(rf"(?:-|{_SEGMENT})(?:/(?:-|{_SEGMENT}))*")


def is_id(text: str) -> bool:
    """Tell whether a text may be the id of a new resource: DNS-like and never of UUID form."""
    return _ID.fullmatch(text) is not None and _ANY_CASE_UUID.fullmatch(text) is None


def is_uid(text: str) -> bool:
    """Tell whether a text has the form of a uid."""
    return _UID.fullmatch(text) is not None


def is_name(text: str) -> bool:
    """Tell whether a text could be the name of any resource: segments of plain ASCII characters, not too long."""
    return len(text) <= NAME_LIMIT_CHARACTERS and _NAME.fullmatch(text) is not None


def check_id(text: str, field: str) -> str:
    """Return an id for a new resource.

    Raises:
        NameMalformed: It is not DNS-like, or has the form of a UUID; names the field.
    """
    if not is_id(text):
        raise NameMalformed(
            f"`{field}` must be 1 to 63 of a-z, 0-9 and `-`, begin with a letter, not end with `-`, and be no UUID",
            field=field,
        )
    return text


@lru_cache(maxsize=256)
def pattern_of(template: str, *, uid: bool, wildcard: bool) -> re.Pattern[str]:
    """Compile the template of a resource type into a pattern for `fullmatch`.

    Args:
        template: As in `google.api.resource`: `nodes/{node}/domains/{domain}`.
        uid: Whether the last segment may be a uid.
        wildcard: Whether a segment may be `-` (any).
    """
    one = f"(?:-|{ID})" if wildcard else ID
    segments = [one if part.startswith("{") else re.escape(part) for part in template.split("/")]
    # A UUID that begins with a letter has the form of an id too; it is never the id of a resource.
    no_uuid = rf"(?!(?:.*/)?{UID}(?:/|\Z))" if not uid else ""
    if uid and template.endswith("}"):
        segments[-1] = f"(?:{segments[-1]}|{UID})"
    return re.compile(no_uuid + "/".join(segments))


def parse(
    name: str, template: str, *, field: str = "name", uid: bool = False, wildcard: bool = False
) -> tuple[str, ...]:
    """Return the ids in a name, in the order of the braces of its template.

    Args:
        name: The name.
        template: Its form: `nodes/{node}/pools/{pool}`.
        field: The field that holds it, for the error.
        uid: Whether the last segment may be a uid.
        wildcard: Whether a segment may be `-` (any).

    Raises:
        NameMalformed: The name has another form.
    """
    if len(name) > NAME_LIMIT_CHARACTERS or not pattern_of(template, uid=uid, wildcard=wildcard).fullmatch(name):
        raise NameMalformed(f"`{field}` must be a name of the form `{template}`", field=field, template=template)
    given = name.split("/")
    return tuple(segment for segment, part in zip(given, template.split("/"), strict=True) if part.startswith("{"))


def node_of(name: str) -> str:
    """Return the id of the node in a full name; empty: the name has none."""
    if not name.startswith("nodes/"):
        return ""
    return name.split("/", 2)[1]


def id_of(name: str) -> str:
    """Return the last segment of a name."""
    return name.rpartition("/")[2]


def collection_of(name: str) -> str:
    """Return the collection that a resource is in: `nodes/n1/domains/web` is one of `domains`."""
    return name.rpartition("/")[0].rpartition("/")[2]


def parent_of(name: str) -> str:
    """Return the name of the parent: `nodes/n1` for `nodes/n1/domains/web`; empty: it has none."""
    return name.rpartition("/")[0].rpartition("/")[0]


def child(parent: str, collection: str, id_: str) -> str:
    """Return the name of a resource from its parent, collection and id; no parent: a name at the root."""
    return f"{parent}/{collection}/{id_}" if parent else f"{collection}/{id_}"


def absolute(reference: str, node: str, *, field: str = "") -> str:
    """Return the full name that a reference inside a spec means on a node.

    Raises:
        ReferenceOtherNode: It names another node.
    """
    if not reference.startswith("nodes/"):
        return f"nodes/{node}/{reference}"
    other = node_of(reference)
    if other != node:
        raise ReferenceOtherNode(
            f"`{reference}` is on node `{other}`; a spec refers to resources of its own node `{node}` only",
            field=field,
            reference=reference,
            node=f"nodes/{node}",
        )
    return reference


def relative(reference: str, node: str, *, field: str = "") -> str:
    """Return a reference as a spec stores it: without its node.

    Raises:
        ReferenceOtherNode: It names another node.
    """
    return absolute(reference, node, field=field).split("/", 2)[2]

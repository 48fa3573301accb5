"""Durations that are none, found in a request before they are kept.

On the wire seconds and nanoseconds are two numbers, and a rule of a proto judges their sum. What is no Duration in
itself (two signs, a second and more of nanoseconds) can be read and stored, but no program can write it as JSON: one in
a spec would break every list that it is in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from virtfleet_service import messages

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.descriptor import Descriptor
    from google.protobuf.message import Message

_DURATION: Final = "google.protobuf.Duration"
_SECONDS_LIMIT: Final = 315_576_000_000
_NANOS_LIMIT: Final = 999_999_999


class DurationWalk:
    """Finds durations that are none, in messages of one type; made once, asked often."""

    __slots__ = ("parts",)

    def __init__(self) -> None:
        self.parts: list[tuple[str, str, DurationWalk | None]] = []

    def __bool__(self) -> bool:
        return bool(self.parts)

    def find(self, message: Message, prefix: str = "") -> Iterator[str]:
        """Yield the path of each."""
        for path, element, walk in messages.inside(message, self.parts, prefix):
            if walk is not None:
                yield from walk.find(element, path)
            elif not _is_one(element):
                yield path.removesuffix(".")


def _is_one(duration: Any) -> bool:  # noqa: ANN401  # a Duration, which is told by its type's name alone
    seconds, nanos = duration.seconds, duration.nanos
    return bool(abs(seconds) <= _SECONDS_LIMIT and abs(nanos) <= _NANOS_LIMIT and seconds * nanos >= 0)


_WALKS: Final[dict[str, DurationWalk]] = {}


def duration_walk(message: Descriptor) -> DurationWalk:
    """Return the walk that finds durations that are none in messages of a type."""
    known = _WALKS.get(message.full_name)
    if known is not None:
        return known
    # Registered before it is filled, so that a type may contain itself.
    walk = _WALKS[message.full_name] = DurationWalk()
    for field in message.fields:
        kind, leaf = messages.shape(field)
        inner = leaf.message_type
        if inner is None:
            continue
        if inner.full_name == _DURATION:
            walk.parts.append((field.name, kind, None))
        elif _reaches(inner, set()):
            walk.parts.append((field.name, kind, duration_walk(inner)))
    return walk


def _reaches(message: Descriptor, seen: set[str]) -> bool:
    if message.full_name in seen:
        return False
    seen.add(message.full_name)
    inner = [leaf.message_type for _, leaf in map(messages.shape, message.fields) if leaf.message_type is not None]
    return any(one.full_name == _DURATION or _reaches(one, seen) for one in inner)

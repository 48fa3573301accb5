"""Finds what is wrong with single values of a message, at any depth: the way there is worked out once for each type."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from virtfleet_service import messages

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.descriptor import Descriptor, FieldDescriptor
    from google.protobuf.message import Message

Rule = Callable[[Any], bool]
"""Tells whether a value is right."""


class Walk:
    """Goes through messages of one type, only to where there is something to judge."""

    __slots__ = ("parts", "scalars")

    def __init__(self) -> None:
        self.scalars: list[tuple[str, str, Rule]] = []
        self.parts: list[tuple[str, str, Rule | Walk]] = []

    def __bool__(self) -> bool:
        return bool(self.scalars or self.parts)

    def find(self, message: Message, prefix: str = "") -> Iterator[tuple[str, Any]]:
        """Yield path and value of each that is not right."""
        for name, kind, right in self.scalars:
            for path, value in messages.elements(message, name, kind, prefix):
                if not right(value):
                    yield path, value
        for path, element, beyond in messages.inside(message, self.parts, prefix):
            if isinstance(beyond, Walk):
                yield from beyond.find(element, path)
            elif not beyond(element):
                yield path.removesuffix("."), element


class Walks:
    """Makes the walks of one kind of judgement, and keeps them: there are as many as types.

    Args:
        rule_of: Returns the rule for the values of a field, or of the elements of a list or map; None: it has none.
    """

    def __init__(self, rule_of: Callable[[FieldDescriptor], Rule | None]) -> None:
        self._rule_of = rule_of
        self._walks: dict[str, Walk] = {}

    def of(self, message: Descriptor) -> Walk:
        """Return the walk through messages of a type."""
        known = self._walks.get(message.full_name)
        if known is not None:
            return known
        # Registered before it is filled, so that a type may contain itself.
        walk = self._walks[message.full_name] = Walk()
        for field in message.fields:
            kind, leaf = messages.shape(field)
            rule = self._rule_of(leaf)
            if leaf.message_type is None:
                if rule is not None:
                    walk.scalars.append((field.name, kind, rule))
            elif rule is not None:
                walk.parts.append((field.name, kind, rule))
            elif self._reaches(leaf.message_type, set()):
                walk.parts.append((field.name, kind, self.of(leaf.message_type)))
        return walk

    def _reaches(self, message: Descriptor, seen: set[str]) -> bool:
        if message.full_name in seen:
            return False
        seen.add(message.full_name)
        leaves = [leaf for _, leaf in map(messages.shape, message.fields)]
        return any(
            self._rule_of(leaf) is not None
            or (leaf.message_type is not None and self._reaches(leaf.message_type, seen))
            for leaf in leaves
        )

"""YAML as a tree of nodes, bounded: a file that is small may stand for a tree that no memory holds.

Anchors make it so: ten lines of ten aliases each stand for ten thousand million nodes. What counts is the tree as it is
read, with each alias as what it stands for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import yaml

NODE_LIMIT: Final = 250_000
"""How many nodes the documents of a file may have together; a domain as `get -o yaml` writes it has some hundred."""

DEPTH_LIMIT: Final = 64
"""How deep they may be nested; a resource is less than ten deep."""


class _Loader(yaml.SafeLoader):
    """Composes nodes and counts them."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._count = 0
        self._depth = 0
        # How many nodes each stands for, and how deep they are nested, by identity; one that is not whole is not in it.
        self._known: dict[int, tuple[int, int]] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> Any:  # noqa: ANN401 - as in the class above
        """Compose a node.

        Raises:
            ComposerError: There are too many, they are nested too deep, or one contains itself.
        """
        event = self.peek_event()  # type: ignore[no-untyped-call]  # PyYAML has no types of its own
        mark = event.start_mark
        self._count += 1
        if self._count > NODE_LIMIT:
            raise _refusal(f"there are more than {NODE_LIMIT:,} values in it", mark)
        self._depth += 1
        if self._depth > DEPTH_LIMIT:
            raise _refusal(f"it is nested more than {DEPTH_LIMIT} deep", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._known:
                raise _refusal(f"`*{event.anchor}` stands inside of what it stands for", mark)
            return node
        self._known[id(node)] = self._measure(node, mark)
        return node

    def _measure(self, node: yaml.Node | None, mark: Any) -> tuple[int, int]:  # noqa: ANN401 - a yaml.Mark
        inner = [self._known[id(part)] for part in _parts(node)]
        count = 1 + sum(count for count, _ in inner)
        depth = 1 + max((depth for _, depth in inner), default=0)
        if count > NODE_LIMIT:
            raise _refusal(f"with its aliases it has more than {NODE_LIMIT:,} values", mark)
        if depth > DEPTH_LIMIT:
            raise _refusal(f"with its aliases it is nested more than {DEPTH_LIMIT} deep", mark)
        return count, depth


def _parts(node: yaml.Node | None) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair


def _refusal(text: str, mark: Any) -> yaml.MarkedYAMLError:  # noqa: ANN401 - a yaml.Mark
    return yaml.composer.ComposerError(None, None, text, mark)


def compose(text: str) -> Iterator[Any]:
    """Yield the node of each document of a text.

    Raises:
        YAMLError: It is no YAML, or too much of it.
    """
    loader = _Loader(text)
    try:
        while loader.check_node():
            yield loader.get_node()
    finally:
        loader.dispose()

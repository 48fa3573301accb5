"""A node with a launcher and a network service of its own for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.network.rig import Node


@pytest.fixture
def bare_node() -> Iterator[Node]:
    """A node without processes."""
    node = Node()
    try:
        yield node
    finally:
        node.close()


@pytest.fixture
def node(bare_node: Node) -> Node:
    """A node with its launcher and its network service."""
    bare_node.start_launcher()
    bare_node.start_service()
    return bare_node

"""The table of kinds of pools. A further kind is a line here, or an entry point of another distribution."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import metadata
from types import MappingProxyType

from virtfleet_storage.backends.api import PoolBackend
from virtfleet_storage.backends.dir.backend import DirBackend

ENTRY_POINTS = "virtfleet_storage.backends"
"""The group in which other distributions name a function that makes their `PoolBackend`."""

BUILT_IN: Mapping[str, Callable[[], PoolBackend]] = MappingProxyType({"dir": DirBackend})


def load() -> dict[str, PoolBackend]:
    """Make one backend of each kind: ours, and those of installed distributions under names that are free."""
    found = {kind: make() for kind, make in BUILT_IN.items()}
    for point in metadata.entry_points(group=ENTRY_POINTS):
        if point.name not in found:
            found[point.name] = point.load()()
    return found

"""What this process holds in memory of things that are gone: for services that run in the process of their test."""

from __future__ import annotations

import gc
from collections import deque


def containers_naming(text: str) -> list[object]:
    """Return the dicts, sets, lists and deques with an entry, or a key, in which a text occurs.

    Args:
        text: A word that occurs nowhere else.
    """
    gc.collect()
    # The collector does not track all containers, but those that hold them.
    held = {
        id(one): one
        for owner in gc.get_objects()
        for one in (owner, *gc.get_referents(owner))
        if isinstance(one, dict | set | list | deque)
    }
    return [one for one in held.values() if any(isinstance(entry, str) and text in entry for entry in tuple(one))]

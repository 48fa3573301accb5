"""Moves of resources from node to node: each is told by both, and watchers of the fleet are told once."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final

from virtfleet_gateway.shapes import Sort
from virtfleet_gateway.source import LIVE, node_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from virtfleet_gateway.shapes import Change, Entry
    from virtfleet_gateway.source import Source

WAIT_SECONDS: Final = 1.0
"""How long what a node says of a resource that has come to it waits for the node that it has left."""

_LIMIT: Final = 10_000


class Moves:
    """Joins the two halves of moves.

    Each node speaks of its own resources only, in a move too: what has left another one is gone from there when that
    one says so. Only while that one is away the word of its successor will do, and then only for that very resource.

    Args:
        sources: The nodes by their ids.
    """

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._sources = sources
        # Those of which one half has been heard, and whether watchers have been told.
        self._halves: dict[tuple[str, str, str], bool] = {}
        self._departure = asyncio.Event()

    async def departed(self, source: Source, changes: Sequence[Change]) -> None:
        """Wait a moment for the word of the nodes from which resources have come: a move is told before its put."""
        come = [change for change in changes if change.sort is Sort.MOVED and not source.owns(change.name)]
        if not any(map(self._lives_on, come)):
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WAIT_SECONDS):
                while any(map(self._lives_on, come)):
                    self._departure.clear()
                    await self._departure.wait()

    def is_news(self, source: Source, move: Change) -> bool:
        """Tell whether watchers are told of a move now.

        Args:
            source: Who says it, and has taken it into its own tables.
            move: The move.
        """
        key = move.uid, move.name, move.new_name
        told = self._halves.get(key)
        if source.owns(move.name):
            self._departure.set()
            if move.previous is None or move.previous.uid != move.uid:
                # Its successor's word has been taken, or it is not its own to give away.
                self._halves.pop(key, None)
                return False
            # Where another resource has the new name, as far as is known, the other node has the next word.
            self._note(key, told=not self._is_taken(move))
            return self._halves[key]
        if told is not None:
            del self._halves[key]
            return not told
        old, held = self._old(move)
        if old is None or held is None or held.uid != move.uid or old.state == LIVE:
            return False
        old.forget(move.kind, move.name)
        self._note(key, told=True)
        return True

    def _old(self, move: Change) -> tuple[Source | None, Entry | None]:
        """Return the node that a resource is said to have left, and what that one has under the old name."""
        old = self._sources.get(node_of(move.name))
        return old, old.tables.get(move.kind, {}).get(move.name) if old is not None else None

    def _lives_on(self, move: Change) -> bool:
        old, held = self._old(move)
        return old is not None and old.state == LIVE and held is not None and held.uid == move.uid

    def _is_taken(self, move: Change) -> bool:
        new = self._sources.get(node_of(move.new_name))
        held = new.tables.get(move.kind, {}).get(move.new_name) if new is not None else None
        return held is not None and held.uid != move.uid

    def _note(self, key: tuple[str, str, str], *, told: bool) -> None:
        self._halves[key] = told
        while len(self._halves) > _LIMIT:
            self._halves.pop(next(iter(self._halves)))

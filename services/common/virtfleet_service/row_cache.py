"""Rows of the store that stay in memory, as they are after the last commit."""

from __future__ import annotations

import threading
from collections import OrderedDict
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtfleet_service.transaction import Row


class RowCache:
    """Keeps rows that were read, never an older one than the last commit.

    Its epoch says which commit that is: even between commits, odd while one runs. Who has read the epoch, then begun to
    read the file, and finds the epoch as it was, has seen in the file what is kept here.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._used = 0
        self._rows: OrderedDict[str, Row] = OrderedDict()
        self._lock = threading.Lock()
        self.epoch = 0

    def get(self, name: str) -> Row | None:
        """Return a row if it is kept."""
        with self._lock:
            row = self._rows.get(name)
            if row is not None:
                self._rows.move_to_end(name)
            return row

    def at(self, name: str, epoch: int) -> Row | None:
        """Return a row if it is kept and the epoch is still that one; for whoever reads many rows of one state."""
        with self._lock:
            return self._rows.get(name) if epoch == self.epoch and not epoch % 2 else None

    def keep(self, row: Row, epoch: int) -> None:
        """Keep a row that was read at an epoch; a commit since then, or one under way, makes it void."""
        with self._lock:
            if epoch != self.epoch or epoch % 2:
                return
            self._put(row)
            while self._used > self._limit:
                _, oldest = self._rows.popitem(last=False)
                self._used -= len(oldest.body)

    def fill(self, row: Row, epoch: int) -> None:
        """Keep a row as `keep` does if there is room for it: a list longer than the cache must not wash it out."""
        with self._lock:
            if epoch == self.epoch and not epoch % 2 and self._used + len(row.body) <= self._limit:
                self._put(row)

    def _put(self, row: Row) -> None:
        before = self._rows.pop(row.name, None)
        self._used += len(row.body) - (len(before.body) if before else 0)
        self._rows[row.name] = row

    @contextmanager
    def commit(self, names: set[str]) -> Iterator[None]:
        """Forget rows while a commit changes them; the epoch is odd as long as it runs."""
        with self._lock:
            self.epoch += 1
            for name in names:
                row = self._rows.pop(name, None)
                if row is not None:
                    self._used -= len(row.body)
        try:
            yield
        finally:
            with self._lock:
                self.epoch += 1

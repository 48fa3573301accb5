"""How much a store keeps, and how the rest goes: the log, request ids, ended operations, names that were left.

Each function drops a slice in one transaction, so that writers go on in between, and says whether there is more.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from typing import Final

from virtfleet_service.transaction import MOVED, Transaction

_SLICE_ROWS: Final = 2000


@dataclass(frozen=True, slots=True)
class Limits:
    """Says how much a store keeps.

    Attributes:
        log_entries: How many entries of the log at most; the newest one always stays.
        log_seconds: How old they get at most.
        request_id_seconds: How long a request_id is remembered, in time served.
        operation_seconds: How long an ended operation stays listed.
        cache_bytes: How many bytes of resources stay in memory.
    """

    log_entries: int = 100_000
    log_seconds: float = 7 * 86_400.0
    request_id_seconds: float = 86_400.0
    operation_seconds: float = 7 * 86_400.0
    cache_bytes: int = 8 * 1024 * 1024


def log(tx: Transaction, limits: Limits) -> bool:
    """Drop the oldest entries of the log; the newest one stays."""
    surplus = tx.last_seq - limits.log_entries
    oldest_ns = _oldest_ns(limits.log_seconds)
    end = count = 0
    # From the old end up to the first that stays: none may go from the middle, and no look may read all of them.
    # The newest entry stays: a token that names it can still be held against its time.
    rows = tx.connection.execute(
        "SELECT seq, time_ns FROM changes WHERE seq < ? ORDER BY seq LIMIT ?", (tx.last_seq, _SLICE_ROWS)
    )
    with closing(rows):
        for seq, time_ns in rows:
            if seq > surplus and time_ns >= oldest_ns:
                break
            end, count = seq, count + 1
    tx.connection.execute("DELETE FROM changes WHERE seq <= ?", (end,))
    return count == _SLICE_ROWS


def requests(tx: Transaction, limits: Limits, served_seconds: float) -> bool:
    """Drop the oldest request ids, by the time that the store has served."""
    removed = tx.connection.execute(
        "DELETE FROM requests WHERE (subject, method, request_id) IN"
        " (SELECT subject, method, request_id FROM requests WHERE served_seconds < ? LIMIT ?)",
        (served_seconds - limits.request_id_seconds, _SLICE_ROWS),
    )
    return removed.rowcount == _SLICE_ROWS


def operations(tx: Transaction, limits: Limits) -> bool:
    """Drop the operations that ended long ago."""
    removed = tx.connection.execute(
        "DELETE FROM operations WHERE id IN (SELECT id FROM operations WHERE done = 1 AND end_ns < ? LIMIT ?)",
        (_oldest_ns(limits.operation_seconds), _SLICE_ROWS),
    )
    return removed.rowcount == _SLICE_ROWS


def moves(tx: Transaction, limits: Limits) -> None:
    """Drop the old names of resources that were renamed as long ago as the log goes back. They are few: all at once."""
    oldest_ns = _oldest_ns(limits.log_seconds)
    for name, body in list(tx.list_records(MOVED)):
        if int(body.partition(b" ")[0]) < oldest_ns:
            tx.delete_record(MOVED, name)


def _oldest_ns(seconds: float) -> int:
    return time.time_ns() - int(seconds * 1e9)

"""What an operation has done so far, written before each effect, for whoever must finish or undo it after a crash."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from virtfleet_service.transaction import Transaction


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """Is one step of an operation.

    Attributes:
        step: What was about to be done: `attach`, `start`.
        payload: What is needed to find or undo its effect.
    """

    step: str
    payload: bytes


def append(tx: Transaction, operation: str, step: str, payload: bytes) -> None:
    """Write a step of an operation."""
    tx.connection.execute(
        "INSERT INTO journal SELECT ?, coalesce(max(number), 0) + 1, ?, ? FROM journal WHERE operation = ?",
        (operation, step, payload, operation),
    )


def read(connection: sqlite3.Connection, operation: str) -> list[JournalEntry]:
    """Return the steps of an operation, first one first."""
    rows = connection.execute("SELECT step, payload FROM journal WHERE operation = ? ORDER BY number", (operation,))
    return [JournalEntry(step, bytes(payload)) for step, payload in rows]


def clear(tx: Transaction, operation: str) -> None:
    """Forget the steps of an operation that has ended."""
    tx.connection.execute("DELETE FROM journal WHERE operation = ?", (operation,))

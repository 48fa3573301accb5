"""How an operation stands in the store: its row, its entries in the log, and the events of its target."""

from __future__ import annotations

import logging
import re
import sqlite3
import time
from collections.abc import Callable, Sequence

from google.longrunning import operations_pb2
from google.protobuf.message import Message

from virtfleet.type.v1 import operation_pb2
from virtfleet_service import errors, journal, resources
from virtfleet_service.store import StoreUnwritable
from virtfleet_service.transaction import Transaction

_log = logging.getLogger(__name__)

OnFailure = Callable[[Transaction, errors.VirtfleetError], None]
"""Records the state after a failure, in the transaction that ends the operation."""


def refuse_conflict(tx: Transaction, target: str) -> None:
    """Refuse a second operation on a target.

    Raises:
        OperationConflict: One runs: metadata `operation`.
    """
    found = tx.connection.execute(
        "SELECT id, method FROM operations WHERE target = ? AND done = 0 AND exclusive = 1", (target,)
    ).fetchone()
    if found is not None:
        name, method = found
        raise errors.OperationConflict(
            f"{name} ({method.rpartition('.')[2]}) runs on {target}: wait for it or cancel it",
            resource=target,
            retry_delay_seconds=1.0,
            operation=name,
            method=method,
        )


def save(
    tx: Transaction,
    operation: operations_pb2.Operation,
    metadata: operation_pb2.OperationMetadata,
    *,
    exclusive: bool = True,
) -> None:
    """Record a new operation."""
    body = operation.SerializeToString()
    seq = tx.log_operation(operation.name, metadata.target, body)
    tx.connection.execute(
        "INSERT INTO operations (id, target, method, done, exclusive, seq, end_ns, body)"
        " VALUES (?, ?, ?, 0, ?, ?, 0, ?)",
        (operation.name, metadata.target, metadata.method, int(exclusive), seq, body),
    )
    tx.tell(
        "OPERATION_STARTED",
        metadata.target,
        metadata.target_uid,
        reason=_verb(metadata),
        message=f"{operation.name} started",
    )


def finish(
    tx: Transaction,
    operation: operations_pb2.Operation,
    metadata: operation_pb2.OperationMetadata,
    response: Message,
) -> None:
    """Record that an operation has ended well."""
    ended = operations_pb2.Operation(name=operation.name, done=True)
    ended.response.Pack(response)
    _end(tx, ended, metadata, ratio=1.0)


def fail(
    tx: Transaction,
    operation: operations_pb2.Operation,
    metadata: operation_pb2.OperationMetadata,
    error: errors.VirtfleetError,
    records: Sequence[OnFailure],
) -> None:
    """Record that an operation has failed, and the state after it."""
    for record in reversed(records):
        _record_failure(tx, operation.name, record, error)
    ended = operations_pb2.Operation(name=operation.name, done=True, error=error.to_status())
    _end(tx, ended, metadata)


def _verb(metadata: operation_pb2.OperationMetadata) -> str:
    """Return the method as a stable reason: `START_DOMAIN`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", metadata.method.rpartition(".")[2]).upper()


def _record_failure(tx: Transaction, name: str, record: OnFailure, error: errors.VirtfleetError) -> None:
    try:
        tx.attempt(lambda part: record(part, error))
    except (StoreUnwritable, sqlite3.Error):
        raise
    except Exception:  # noqa: BLE001  # the boundary of a record made after a failure
        # The operation must end all the same; what could not be recorded is left to reconciliation.
        _log.exception("the state after the failure of %s could not be recorded", name)


def _end(
    tx: Transaction,
    ended: operations_pb2.Operation,
    metadata: operation_pb2.OperationMetadata,
    *,
    ratio: float | None = None,
) -> None:
    final = operation_pb2.OperationMetadata()
    final.CopyFrom(metadata)
    final.cancellable = False
    final.ClearField("remaining")
    final.end_time.CopyFrom(resources.now())
    if ratio is not None:
        final.progress_ratio = ratio
    ended.metadata.Pack(final)
    body = ended.SerializeToString()
    seq = tx.log_operation(ended.name, final.target, body)
    tx.connection.execute(
        "UPDATE operations SET done = 1, end_ns = ?, seq = ?, body = ? WHERE id = ?",
        (time.time_ns(), seq, body, ended.name),
    )
    journal.clear(tx, ended.name)
    outcome = f"failed: {ended.error.message}" if ended.HasField("error") else "ended well"
    tx.tell("OPERATION_DONE", final.target, final.target_uid, reason=_verb(final), message=f"{ended.name} {outcome}")

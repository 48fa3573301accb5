"""Means of long work: progress told from threads, and claims that end with an operation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

from google.longrunning import operations_pb2
from google.protobuf.message import Message

from virtfleet.type.v1 import operation_pb2
from virtfleet_service.call import Call
from virtfleet_service.errors import VirtfleetError
from virtfleet_service.operations import Commit, Job, Operations, Work
from virtfleet_service.transaction import Transaction
from virtfleet_storage.claims import Claim

T = TypeVar("T")

_TOLD_SECONDS = 0.1


def progress_of(job: Job) -> Callable[[int, int], None]:
    """Return a function that tells the progress of a job, for threads, as often as makes sense."""
    loop = asyncio.get_running_loop()
    told = 0.0

    def tell(done_bytes: int, total_bytes: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= _TOLD_SECONDS or done_bytes == total_bytes:
            told = now
            loop.call_soon_threadsafe(lambda: job.progress(done_bytes=done_bytes, total_bytes=total_bytes))

    return tell


async def run_claimed(
    operations: Operations,
    call: Call,
    request: Message,
    *,
    target: str,
    claim: Claim,
    intent: Callable[[Transaction], str | None],
    work: Work,
    cancellable: bool = True,
) -> operations_pb2.Operation:
    """Run an operation that holds a claim: taken at the end of its intent, released in the transaction that ends it."""

    def claimed(tx: Transaction) -> str | None:
        try:
            return intent(tx)
        except BaseException:
            claim.release()
            raise

    async def guarded(job: Job) -> Commit:
        job.on_failure(lambda _tx, _error: claim.release())
        commit = await work(job)

        def commit_and_release(tx: Transaction) -> Message:
            response = commit(tx)
            claim.release()
            return response

        return commit_and_release

    try:
        return await operations.run(call, request, target=target, intent=claimed, work=guarded, cancellable=cancellable)
    except VirtfleetError:
        # It was not accepted. A caller that merely went away is a CancelledError: the work goes on and holds the claim.
        claim.release()
        raise


def metadata_of(operation: operations_pb2.Operation) -> operation_pb2.OperationMetadata:
    """Return the metadata of an operation."""
    metadata = operation_pb2.OperationMetadata()
    operation.metadata.Unpack(metadata)
    return metadata

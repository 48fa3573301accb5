"""Operations that start the domain `a`, quickly or behind a gate."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from google.longrunning import operations_pb2
from google.protobuf.message import Message

from tests.unit.service.rig import START
from virtfleet.compute.v1 import domain_pb2
from virtfleet_service import requests
from virtfleet_service.operations import Commit, Job, Operations
from virtfleet_service.store import Store, Transaction

TARGET = "nodes/n1/domains/a"


def start(
    request_id: str = "", *, inline_seconds: float | None = None, etag: str = ""
) -> domain_pb2.StartDomainRequest:
    request = domain_pb2.StartDomainRequest(name=TARGET, request_id=request_id, etag=etag)
    if inline_seconds is not None:
        request.inline_wait.FromNanoseconds(int(inline_seconds * 1e9))
    return request


def set_running(tx: Transaction) -> Message:
    current = domain_pb2.Domain.FromString(tx.need(TARGET).body)
    current.status.state = domain_pb2.DOMAIN_STATE_RUNNING
    tx.put("domain", current, cause=START)
    return current


async def quick(job: Job) -> Commit:
    job.progress(phase="starting", ratio=0.5)
    return set_running


def gated(gate: asyncio.Event, entered: asyncio.Event | None = None) -> Callable[[Job], Awaitable[Commit]]:
    async def work(job: Job) -> Commit:
        job.progress(phase="waiting", done_bytes=10, total_bytes=40)
        if entered is not None:
            entered.set()
        await gate.wait()
        return set_running

    return work


def state(store: Store) -> int:
    return domain_pb2.Domain.FromString(store.need(TARGET).body).status.state


def reason_of(operation: operations_pb2.Operation) -> str:
    return requests.error_of(operation.error).reason


async def ended(operations: Operations, name: str) -> operations_pb2.Operation:
    async with asyncio.timeout(5):
        return await operations.wait(name, 5)

"""What both clients do to every call: a request_id on each mutation, and repetition of exactly what is safe to repeat.

A call is repeated only when it was lost (UNAVAILABLE, or CANCELLED without a reason) and either changes nothing or
carries a request_id, with which the server answers a repetition without a second effect. Nothing else is ever repeated.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

import grpc
from google.protobuf import descriptor_pool

from virtfleet.type.v1 import method_pb2

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from virtfleet_client.errors import VirtfleetError

Sent = TypeVar("Sent", bound="Message")

ATTEMPTS = 4
_FIRST_DELAY_SECONDS = 0.1
_LONGEST_DELAY_SECONDS = 3.0


@lru_cache(maxsize=1024)
def effect_of(path: str) -> int | None:
    """Return the declared effect of the method at `/package.Service/Method`, None where there is none."""
    service_name, _, method_name = path.lstrip("/").partition("/")
    try:
        service = descriptor_pool.Default().FindServiceByName(service_name)
        options = service.methods_by_name[method_name].GetOptions()
    except KeyError:
        return None
    if not options.HasExtension(method_pb2.method):
        # The standard services have no rule of ours: their reads are named as such, everything else is never repeated.
        return method_pb2.EFFECT_NONE if method_name.startswith(("Get", "List", "Wait", "Check")) else None
    return options.Extensions[method_pb2.method].effect


def prepare(path: str, request: Sent) -> tuple[Sent, bool]:
    """Give a mutation its request_id if the caller has not.

    Returns:
        What is sent, and whether the call may be repeated once it was lost. The caller's message stays as it is: sent
        a second time it is a second call, not a repetition of the first.
    """
    if effect_of(path) == method_pb2.EFFECT_NONE:
        return request, True
    if "request_id" not in request.DESCRIPTOR.fields_by_name:
        return request, False
    if not request.request_id:  # type: ignore[attr-defined]  # every mutation has the field; the descriptor says so
        copy = type(request)()
        copy.CopyFrom(request)
        copy.request_id = str(uuid.uuid4())  # type: ignore[attr-defined]  # as above
        return copy, True
    return request, True


def is_lost(error: VirtfleetError) -> bool:
    """Tell whether a call was lost on its way, so that nobody knows how far it came.

    Every server of virtfleet gives a reason with CANCELLED. Without one it comes from gRPC itself, which ends so what
    still waits for a handler when a server stops. A caller who cancels a call is not told by a status.
    """
    code = error.code()
    return code is grpc.StatusCode.UNAVAILABLE or (code is grpc.StatusCode.CANCELLED and not error.reason)


def is_cut(error: VirtfleetError) -> bool:
    """Tell whether a stream was cut by what carries it: a lost one, or INTERNAL without a reason, as proxies say it."""
    return is_lost(error) or (error.code() is grpc.StatusCode.INTERNAL and not error.reason)


def prepare_first(path: str, requests: Iterable[Sent]) -> Iterator[Sent]:
    """Give the first message of a stream its request_id if the caller has not."""
    first = True
    for request in requests:
        yield prepare(path, request)[0] if first else request
        first = False


async def prepare_first_async(path: str, requests: AsyncIterable[Sent] | Iterable[Sent]) -> AsyncIterator[Sent]:
    """Give the first message of a stream its request_id if the caller has not."""
    first = True
    if isinstance(requests, AsyncIterable):
        async for request in requests:
            yield prepare(path, request)[0] if first else request
            first = False
        return
    for request in prepare_first(path, requests):
        yield request


def delay_seconds(attempt: int, asked: float | None) -> float:
    """Return how long to wait before repetition number `attempt`; `asked` is the server's RetryInfo."""
    longest = min(_FIRST_DELAY_SECONDS * 2.0 ** (attempt - 1), _LONGEST_DELAY_SECONDS)
    jittered = longest * random.uniform(0.5, 1.0)  # noqa: S311  # spreads callers; no secret
    return max(jittered, min(asked or 0.0, _LONGEST_DELAY_SECONDS))

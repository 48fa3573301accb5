"""One question to many nodes at once.

All nodes are asked side by side, each with the same share of the caller's time, so that a frozen one takes none from
the others: it is missing from the answer and named with its reason.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from virtfleet_gateway.answers import Answer, taken
from virtfleet_gateway.channels import unknown
from virtfleet_gateway.forward import CALLER_METADATA
from virtfleet_gateway.relay import DETAILS_METADATA, given_up, is_cancelled
from virtfleet_service.errors import NodeUnreachable, VirtfleetError
from virtfleet_service.identity import encode_caller
from virtfleet_service.requests import error_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from google.protobuf.descriptor import MethodDescriptor

    from virtfleet_gateway.channels import Channels, Lane
    from virtfleet_service.call import Call
    from virtfleet_service.telemetry import Tracer

SHARE_OF_DEADLINE: Final = 0.8
"""What of the caller's time the nodes get; the rest is for the answer."""
LIMIT_SECONDS: Final = 5.0
"""How long a node is waited for at most."""
_SIDE_BY_SIDE = 128


class FanOut:
    """Asks nodes.

    Args:
        channels: The lanes to them.
        identity: Returns the identity of this gateway, which conveys the caller.
        tracer: Returns what makes spans; None: nobody looks.
    """

    def __init__(
        self,
        channels: Channels,
        identity: Callable[[], str],
        tracer: Callable[[], Tracer | None] = lambda: None,
    ) -> None:
        self._tracer = tracer
        self._channels = channels
        self._identity = identity
        self._turns = asyncio.Semaphore(_SIDE_BY_SIDE)

    async def ask(
        self, method: MethodDescriptor, service: str, requests: Mapping[str, bytes], call: Call
    ) -> list[Answer]:
        """Ask nodes for the caller of a call; returns their answers in the order of the requests.

        Args:
            method: A unary method.
            service: The service that has it.
            requests: The serialised request for each node.
            call: Whose caller and time it is.
        """
        return await self.ask_services(method, {(node, service): request for node, request in requests.items()}, call)

    async def ask_services(
        self, method: MethodDescriptor, requests: Mapping[tuple[str, str], bytes], call: Call
    ) -> list[Answer]:
        """Ask services of nodes for the caller of a call; returns their answers in the order of the requests.

        Args:
            method: A unary method that each of them has.
            requests: The serialised request for each node and service.
            call: Whose caller and time it is.
        """
        remaining = call.remaining()
        seconds = LIMIT_SECONDS if remaining is None else min(remaining * SHARE_OF_DEADLINE, LIMIT_SECONDS)
        metadata: list[tuple[str, str | bytes]] = [(CALLER_METADATA, encode_caller(call.caller, via=self._identity()))]
        tracer = self._tracer()
        if tracer is not None:
            metadata += tracer.outgoing()
        return list(
            await asyncio.gather(
                *(
                    self._one(method, service, node, request, seconds, metadata)
                    for (node, service), request in requests.items()
                )
            )
        )

    async def _one(
        self,
        method: MethodDescriptor,
        service: str,
        node: str,
        request: bytes,
        seconds: float,
        metadata: Any,  # noqa: ANN401
    ) -> Answer:
        services = self._channels.node(node) or {}
        channels = services.get(service)
        if channels is None:
            return Answer(node, error=unknown(node))
        lane = channels.control
        try:
            async with asyncio.timeout(seconds):
                # Outside of the turns: nodes that are being connected to take none from those that are there.
                if not lane.is_up():
                    await lane.up(seconds)
                async with self._turns:
                    path = f"/{method.containing_service.full_name}/{method.name}"
                    start: Any = lane.callable(path, client_streaming=False, server_streaming=False)
                    body: bytes = await start(request, metadata=metadata)
            return taken(node, body, method.output_type)
        except NodeUnreachable as error:
            return Answer(node, error=error)
        except TimeoutError:
            late = lane.unreachable(sent=True, cause=f"no answer within {seconds:.1f} s")
            return Answer(node, error=late, late=True)
        except grpc.aio.AioRpcError as failure:
            return Answer(node, error=_error_of(failure, lane))
        except grpc.aio.BaseError as failure:
            return Answer(node, error=lane.unreachable(sent=True, cause=str(failure)))
        except asyncio.CancelledError:
            if is_cancelled():
                raise
            return Answer(node, error=given_up(lane))


def _error_of(failure: grpc.aio.AioRpcError, lane: Lane) -> VirtfleetError:
    cause = failure.details() or ""
    for key, value in failure.trailing_metadata() or ():
        if key == DETAILS_METADATA and isinstance(value, bytes):
            try:
                return error_of(status_pb2.Status.FromString(value))
            except DecodeError:
                cause = "its error does not parse"
    return lane.unreachable(sent=True, cause=cause)

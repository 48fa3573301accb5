"""Whether the services of nodes are there: a health watch each, and what a service says of itself when reached."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2

from virtfleet.common.v1 import admin_pb2
from virtfleet.fleet.v1 import node_pb2
from virtfleet_service.errors import VirtfleetError

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtfleet_gateway.channels import Channels, Lane

_log = logging.getLogger(__name__)

_HEALTH_WATCH: Final = "/grpc.health.v1.Health/Watch"
_GET_SERVER: Final = "/virtfleet.common.v1.AdminService/GetServer"
_CALL_SECONDS: Final = 5.0
_RETRY_SECONDS: Final = 0.1
_RETRY_LIMIT_SECONDS: Final = 5.0
_STEADY_SECONDS: Final = 10.0

TEXT_LIMIT_CHARACTERS: Final = 64
TIME_LIMIT_SECONDS: Final = 253_402_300_800
"""The end of the year 9999: what a `Timestamp` may hold."""

UNKNOWN: Final = node_pb2.SERVICE_STATE_UNSPECIFIED
SERVING: Final = node_pb2.SERVICE_STATE_SERVING
NOT_SERVING: Final = node_pb2.SERVICE_STATE_NOT_SERVING
UNREACHABLE: Final = node_pb2.SERVICE_STATE_UNREACHABLE


class Presence:
    """Is what is heard of one service of a node.

    Args:
        node: The node.
        service: `compute`, `storage` or `network`.
        channels: The lanes to it.
        changed: Called with the node when something is different.

    Attributes:
        state: What its health says.
        server: What it said of itself when it was last reached; None: it never was.
        error: Why it is unreachable; empty: it is not.
    """

    def __init__(self, node: str, service: str, channels: Channels, changed: Callable[[str], None]) -> None:
        self.node = node
        self.service = service
        self.state: node_pb2.ServiceState.ValueType = UNKNOWN
        self.server: admin_pb2.Server | None = None
        self.error = ""
        self._since = time.monotonic()
        self._channels = channels
        self._changed = changed

    @property
    def lane(self) -> Lane | None:
        """The lane of its calls; None: the node is gone."""
        channels = (self._channels.node(self.node) or {}).get(self.service)
        return channels.control if channels is not None else None

    @property
    def last_seen_seconds(self) -> float:
        """When it was last heard, as `time.time()`; 0: never."""
        lane = self.lane
        return lane.last_seen_seconds if lane is not None else 0.0

    @property
    def heard(self) -> bool:
        """Whether it has been heard in the life of this gateway."""
        lane = self.lane
        return lane is not None and lane.heard_seconds > 0

    @property
    def quiet_seconds(self) -> float:
        """For how long nothing has been heard of it, no longer than somebody has listened."""
        lane = self.lane
        return time.monotonic() - max(self._since, lane.heard_seconds if lane is not None else 0.0)

    async def follow(self) -> None:
        """Watch the health of the service for as long as the node is there."""
        pause = _RETRY_SECONDS
        while (lane := self.lane) is not None:
            begun = time.monotonic()
            try:
                await lane.up(None)
                await self._ask(lane)
                await self._watch(lane)
                self._set(UNREACHABLE, "the health watch ended")
            except VirtfleetError as error:
                self._set(UNREACHABLE, error.message)
            except grpc.aio.AioRpcError as error:
                self._set(UNREACHABLE, error.details() or error.code().name)
            except grpc.aio.UsageError:
                # The channel was replaced under the call.
                self._set(UNREACHABLE, "the connection is made anew")
            except DecodeError:
                # Of no release of it: it may be replaced by one that speaks.
                self._set(UNREACHABLE, "what it says does not parse")
                pause = _RETRY_LIMIT_SECONDS
            except Exception:  # noqa: BLE001  # the boundary to one node: what it says must not end the task
                _log.exception("what %s of node %s says cannot be taken", self.service, self.node)
                self._set(UNREACHABLE, "what it says cannot be taken")
                pause = _RETRY_LIMIT_SECONDS
            # A service that has stood is one that is there; one that flaps is asked less and less often.
            if time.monotonic() - begun > _STEADY_SECONDS:
                pause = _RETRY_SECONDS
            await asyncio.sleep(pause)
            pause = min(pause * 2, _RETRY_LIMIT_SECONDS)

    async def _ask(self, lane: Lane) -> None:
        ask: Any = lane.callable(_GET_SERVER, client_streaming=False, server_streaming=False)
        name = f"nodes/{self.node}/services/{self.service}"
        answer: bytes = await ask(admin_pb2.GetServerRequest(name=name).SerializeToString(), timeout=_CALL_SECONDS)
        server = _bounded(admin_pb2.Server.FromString(answer))
        lane.touch()
        if server != self.server:
            self.server = server
            self._changed(self.node)

    async def _watch(self, lane: Lane) -> None:
        start: Any = lane.callable(_HEALTH_WATCH, client_streaming=False, server_streaming=True)
        call = start(health_pb2.HealthCheckRequest().SerializeToString())
        try:
            while (data := await call.read()) is not grpc.aio.EOF:
                lane.touch()
                serving = (
                    health_pb2.HealthCheckResponse.FromString(data).status == health_pb2.HealthCheckResponse.SERVING
                )
                self._set(SERVING if serving else NOT_SERVING, "")
            code = await call.code()
            if code is not grpc.StatusCode.OK:
                raise grpc.aio.AioRpcError(
                    code, grpc.aio.Metadata(), await call.trailing_metadata(), await call.details()
                )
        finally:
            call.cancel()

    def _set(self, state: node_pb2.ServiceState.ValueType, error: str) -> None:
        changed = state != self.state
        self.state, self.error = state, error
        if changed:
            self._changed(self.node)


def _bounded(server: admin_pb2.Server) -> admin_pb2.Server:
    """Return what is kept of what a service says of itself: it goes into the gateway's store, at each change."""
    kept = admin_pb2.Server(
        version=server.version[:TEXT_LIMIT_CHARACTERS], boot_id=server.boot_id[:TEXT_LIMIT_CHARACTERS]
    )
    if 0 < server.certificate_expire_time.seconds < TIME_LIMIT_SECONDS:
        kept.certificate_expire_time.seconds = server.certificate_expire_time.seconds
    return kept

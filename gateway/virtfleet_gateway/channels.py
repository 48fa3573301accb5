"""The gateway's connections to the services of nodes.

Each service of a node has two lanes: one for calls and watches, one for volume data, each a connection of its own, so
that an upload never holds up a watch. A lane connects when it is first needed, notices a dead or frozen peer by HTTP/2
pings within five seconds, and says at once that a service is away instead of letting a caller wait for its deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Final

import grpc
import grpc.aio

from virtfleet_service.errors import NodeUnknown, NodeUnreachable
from virtfleet_service.memory import FLOW_OPTIONS

KEEPALIVE_INTERVAL_SECONDS: Final = 2.0
KEEPALIVE_TIMEOUT_SECONDS: Final = 2.5
"""With the interval: how long a frozen peer goes unnoticed."""

_CONNECT_TIMEOUT_SECONDS: Final = 4.0
_FIRST_BACKOFF_SECONDS: Final = 0.2
_BACKOFF_LIMIT_SECONDS: Final = 5.0

FIRST_PATIENCE_SECONDS: Final = 5.0
"""How long a call waits for a lane that has not been tried yet."""
PATIENCE_SECONDS: Final = 1.0
"""How long a call waits for a lane that has been up before and is being set up again."""

RETRY_DELAY_SECONDS: Final = 1.0
"""What callers are advised to wait before they try a service that is away again."""

MESSAGE_LIMIT_BYTES: Final = 16 << 20
"""What a lane carries in one message. Services keep their own, lower limits; this one never decides."""

_SETTLED: Final = frozenset(
    {
        grpc.ChannelConnectivity.READY,
        grpc.ChannelConnectivity.TRANSIENT_FAILURE,
        grpc.ChannelConnectivity.SHUTDOWN,
    }
)
"""What a connection is when there is nothing to wait for."""

_RETIREMENT_SECONDS: Final = 24 * 3600.0
"""How long calls may go on over a connection that was made with credentials that have been replaced."""

Multicallable = (
    grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]
    | grpc.aio.UnaryStreamMultiCallable[bytes, bytes]
    | grpc.aio.StreamUnaryMultiCallable[bytes, bytes]
    | grpc.aio.StreamStreamMultiCallable[bytes, bytes]
)


Connect = Callable[[str, str, str, bool], grpc.aio.Channel]
"""Makes the connection for a lane: of a node, its service, at an endpoint, and whether volume data go over it."""


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _options(tls_name: str, *, bulk: bool) -> list[tuple[str, int | str]]:
    options: list[tuple[str, int | str]] = [
        ("grpc.keepalive_time_ms", _milliseconds(KEEPALIVE_INTERVAL_SECONDS)),
        ("grpc.keepalive_timeout_ms", _milliseconds(KEEPALIVE_TIMEOUT_SECONDS)),
        # The timeout above ends nothing while a ping is under way; this one, a minute by default, does.
        ("grpc.http2.ping_timeout_ms", _milliseconds(KEEPALIVE_TIMEOUT_SECONDS)),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", _milliseconds(_FIRST_BACKOFF_SECONDS)),
        # Is the limit of one attempt too: a frozen peer accepts the connection and never answers the handshake.
        ("grpc.min_reconnect_backoff_ms", _milliseconds(_CONNECT_TIMEOUT_SECONDS)),
        ("grpc.max_reconnect_backoff_ms", _milliseconds(_BACKOFF_LIMIT_SECONDS)),
        ("grpc.max_receive_message_length", MESSAGE_LIMIT_BYTES),
        ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
        *FLOW_OPTIONS,
        # Channels to one address with equal options would share a connection.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        ("grpc.enable_http_proxy", 0),
        ("grpc.service_config_disable_resolution", 1),
    ]
    if tls_name:
        options.append(("grpc.ssl_target_name_override", tls_name))
    if bulk:
        options.append(("grpc.optimization_target", "throughput"))
    return options


def unknown(node: str, service: str = "") -> NodeUnknown:
    """Return the error for a node that the fleet does not have, or that does not have a service."""
    if service:
        return NodeUnknown(f"Node {node} has no service {service}", node=f"nodes/{node}", service=service)
    return NodeUnknown(f"The fleet has no node {node}", node=f"nodes/{node}")


class Lane:
    """Is one connection to one service of a node, made when first needed and again when lost.

    Args:
        node: The id of the node.
        service: `compute`, `storage` or `network`.
        channel: The channel.
    """

    def __init__(self, node: str, service: str, channel: grpc.aio.Channel) -> None:
        self.node = node
        self.service = service
        self.channel = channel
        self.last_seen_seconds = 0.0
        """When the lane was last known to work, as `time.time()`; 0: never. Is told, and never reckoned with."""
        self.heard_seconds = 0.0
        """The same as `time.monotonic()`, which nobody sets; 0: not in the life of this process."""
        self._calls: dict[str, Multicallable] = {}
        self._been_up = False

    def callable(self, path: str, *, client_streaming: bool, server_streaming: bool) -> Multicallable:
        """Return what starts calls of a method, without any encoding."""
        found = self._calls.get(path)
        if found is None:
            kind = f"{'stream' if client_streaming else 'unary'}_{'stream' if server_streaming else 'unary'}"
            found = self._calls[path] = getattr(self.channel, kind)(path)
        return found

    @property
    def state(self) -> grpc.ChannelConnectivity:
        """The state of the connection."""
        return self.channel.get_state()

    def is_up(self) -> bool:
        """Tell whether the connection stands; begins to connect where it does not."""
        if self.channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY:
            self._been_up = True
            return True
        return False

    async def up(self, remaining_seconds: float | None) -> None:
        """Return when the connection stands.

        Raises:
            NodeUnreachable: It does not, and will not soon. Nothing has been sent.
        """
        patience = PATIENCE_SECONDS if self._been_up else FIRST_PATIENCE_SECONDS
        if remaining_seconds is not None:
            # Leaves time for the answer that says so to arrive before the caller's own deadline.
            patience = min(patience, remaining_seconds * 0.8)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                # One look a round: a connection that stands between two looks would be waited for to end.
                while (state := self.channel.get_state(try_to_connect=True)) not in _SETTLED:
                    await self.channel.wait_for_state_change(state)
        if not self.is_up():
            raise self.unreachable(sent=False)

    def unreachable(self, *, sent: bool, cause: str = "") -> NodeUnreachable:
        """Return the error for a call that the service did not answer.

        Args:
            sent: Whether the service may have got the call, and done what it asks.
            cause: What the transport says.
        """
        what = (
            "did not answer; it may have done what the call asks"
            if sent
            else "cannot be reached; the call was not sent"
        )
        return NodeUnreachable(
            f"Service {self.service} of node {self.node} {what}",
            retry_delay_seconds=RETRY_DELAY_SECONDS,
            node=f"nodes/{self.node}",
            service=self.service,
            sent="true" if sent else "false",
            last_seen_time=_timestamp(self.last_seen_seconds) if self.last_seen_seconds else "never",
            cause=cause or "none",
        )

    def touch(self) -> None:
        """Note that the service has just been heard."""
        self.last_seen_seconds = time.time()
        self.heard_seconds = time.monotonic()

    def take_over(self, other: Lane) -> None:
        """Know what another lane to the same service knew of when it was heard."""
        self.last_seen_seconds, self.heard_seconds = other.last_seen_seconds, other.heard_seconds


def _timestamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


class ServiceChannels:
    """Is the pair of lanes to one service of a node."""

    def __init__(
        self, node: str, service: str, endpoint: str, connect: Callable[[str, str, str, bool], grpc.aio.Channel]
    ) -> None:
        self.node = node
        self.service = service
        self.endpoint = endpoint
        self._connect = connect
        self._control: Lane | None = None
        self._bulk: Lane | None = None

    @property
    def control(self) -> Lane:
        """The lane for calls and watches."""
        if self._control is None:
            self._control = Lane(self.node, self.service, self._connect(self.node, self.service, self.endpoint, False))
        return self._control

    @property
    def bulk(self) -> Lane:
        """The lane for volume data."""
        if self._bulk is None:
            self._bulk = Lane(self.node, self.service, self._connect(self.node, self.service, self.endpoint, True))
            self._bulk.take_over(self.control)
        return self._bulk

    def lane(self, *, bulk: bool) -> Lane:
        """Return the lane for a kind of call."""
        return self.bulk if bulk else self.control

    def retire(self) -> list[grpc.aio.Channel]:
        """Let go of the lanes, so that the next calls make new ones.

        Returns the channels, whose calls go on until they are closed.
        """
        old = [lane.channel for lane in (self._control, self._bulk) if lane is not None]
        before = self._control
        self._control = self._bulk = None
        if before is not None and before.last_seen_seconds:
            self.control.take_over(before)
        return old


class Channels:
    """Holds the lanes to all nodes.

    Args:
        credentials: Gives the gateway's present credentials; None for plain text (tests of the forwarder alone).
        tls_name: Gives the DNS name in the certificate of a service of a node.
        connect: Makes the connections instead; None: they go over the network.
    """

    def __init__(
        self,
        credentials: Callable[[], grpc.ChannelCredentials] | None,
        tls_name: Callable[[str, str], str],
        connect: Connect | None = None,
    ) -> None:
        self._credentials = credentials
        self._tls_name = tls_name
        self._connect = connect or self._open
        self._nodes: dict[str, dict[str, ServiceChannels]] = {}
        self._retired: set[asyncio.Task[None]] = set()

    def node(self, node: str) -> dict[str, ServiceChannels] | None:
        """Return the lanes of a node by service; None: there is no such node."""
        return self._nodes.get(node)

    def nodes(self) -> list[str]:
        """Return the ids of all nodes, sorted."""
        return sorted(self._nodes)

    def put(self, node: str, endpoints: dict[str, str]) -> None:
        """Make a node known, or tell where its services are now.

        Lanes to an endpoint that has changed are made anew.
        """
        present = self._nodes.setdefault(node, {})
        for service in [service for service in present if service not in endpoints]:
            self._retire(present.pop(service), at_once=True)
        for service, endpoint in endpoints.items():
            old = present.get(service)
            if old is not None and old.endpoint == endpoint:
                continue
            if old is not None:
                self._retire(old, at_once=True)
            present[service] = ServiceChannels(node, service, endpoint, self._connect)

    def remove(self, node: str) -> None:
        """Forget a node; its calls end."""
        for service in self._nodes.pop(node, {}).values():
            self._retire(service, at_once=True)

    def renew(self) -> None:
        """Make new connections with the present credentials for all calls from now on.

        Calls under way stay on the old ones.
        """
        for services in self._nodes.values():
            for service in services.values():
                self._retire(service, at_once=False)

    async def close(self) -> None:
        """End all calls and close all connections."""
        for node in list(self._nodes):
            self.remove(node)
        retired = list(self._retired)
        for task in retired:
            task.cancel()
        await asyncio.gather(*retired, return_exceptions=True)

    def _open(self, node: str, service: str, endpoint: str, bulk: bool) -> grpc.aio.Channel:  # noqa: FBT001 - a callback
        options = _options(self._tls_name(node, service) if self._credentials is not None else "", bulk=bulk)
        if self._credentials is None:
            return grpc.aio.insecure_channel(endpoint, options=options)
        return grpc.aio.secure_channel(endpoint, self._credentials(), options=options)

    def _retire(self, service: ServiceChannels, *, at_once: bool) -> None:
        for channel in service.retire():
            task = asyncio.get_running_loop().create_task(_close(channel, None if at_once else _RETIREMENT_SECONDS))
            self._retired.add(task)
            task.add_done_callback(self._retired.discard)


async def _close(channel: grpc.aio.Channel, grace_seconds: float | None) -> None:
    try:
        await channel.close(grace_seconds)
    except asyncio.CancelledError:
        await channel.close(None)
        raise

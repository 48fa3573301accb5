"""What nodes have told before the feed of the fleet begins: for readers whose tokens it does not reach back to.

After a restart of the gateway all its readers come at once, most of them with the same tokens: for each node and token
one stream is opened, from the node's own log, and all readers of that token are told from it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio

from virtfleet.type.v1 import resource_pb2
from virtfleet_gateway import wire
from virtfleet_gateway.channels import unknown
from virtfleet_gateway.index import GONE, HEARTBEAT_SECONDS, SILENCE_SECONDS
from virtfleet_service.errors import VirtfleetError

if TYPE_CHECKING:
    from virtfleet_gateway.channels import Channels
    from virtfleet_gateway.index import PackageIndex
    from virtfleet_gateway.shapes import Change

_log = logging.getLogger(__name__)

PART_BYTES: Final = 512 << 10
"""How much one stream gathers at most before it ends; readers that have been told all of it ask for the next part."""
STREAMS_LIMIT: Final = 64
"""How many such streams run at once, for all readers together."""
PART_SECONDS: Final = 10.0
LINGER_SECONDS: Final = 2.0

MET: Final = "met"
"""The feed knows the place that has been reached, and tells the rest."""
TOO_OLD: Final = "too old"
"""The node's log does not reach back to the token."""
PART: Final = "part"
"""There is more."""
FAILED: Final = "failed"


class CatchUp:
    """Is what one node has told since a token.

    Attributes:
        node: The node.
        token: The token.
        steps: What has been told so far: changes, and the node's token after them.
        end: Why there is no more: MET, TOO_OLD, PART or FAILED; empty: there may be.
        size: How many bytes it has.
    """

    __slots__ = ("end", "node", "readers", "size", "steps", "task", "token")

    def __init__(self, node: str, token: str) -> None:
        self.node = node
        self.token = token
        self.steps: list[tuple[list[Change], str]] = []
        self.end = ""
        self.size = 0
        self.readers: set[asyncio.Event] = set()
        self.task: asyncio.Task[None] | None = None

    @property
    def reached(self) -> str:
        """The node's token after all that has been told."""
        return self.steps[-1][1] if self.steps else self.token

    def wake(self) -> None:
        """Wake those who read it."""
        for reader in self.readers:
            reader.set()


class CatchUps:
    """Holds the streams that are open.

    Args:
        index: The index of the package.
        channels: The lanes to the nodes.
    """

    def __init__(self, index: PackageIndex, channels: Channels) -> None:
        self._index = index
        self._channels = channels
        self._open: dict[tuple[str, str], CatchUp] = {}
        self._turns = asyncio.Semaphore(STREAMS_LIMIT)
        self.opened_count = 0
        """How many streams have been opened."""

    def join(self, node: str, token: str, reader: asyncio.Event) -> CatchUp:
        """Return what a node tells from a token on; the reader is woken when there is more. `leave` gives it back."""
        found = self._open.get((node, token))
        if found is None:
            found = self._open[node, token] = CatchUp(node, token)
            found.task = asyncio.get_running_loop().create_task(self._run(found), name=f"catch up with {node}")
        found.readers.add(reader)
        return found

    def leave(self, catch_up: CatchUp, reader: asyncio.Event) -> None:
        """Wake a reader no more; what nobody reads ends."""
        catch_up.readers.discard(reader)
        if not catch_up.readers and not catch_up.end and catch_up.task is not None:
            catch_up.task.cancel()
            # A task that has not begun to run ends without a word.
            self._forget(catch_up)

    async def _run(self, one: CatchUp) -> None:
        try:
            one.end = await self._ask(one)
        except (VirtfleetError, grpc.aio.BaseError, grpc.aio.AioRpcError, wire.WireError, TimeoutError):
            # Away: the source of the index finds out when it is back.
            one.end = FAILED
        except Exception:  # noqa: BLE001 - the boundary of what a node says
            _log.exception("cannot take what %s says", one.node)
            one.end = FAILED
        finally:
            if one.end in (MET, PART):
                # For those who come a moment later.
                asyncio.get_running_loop().call_later(LINGER_SECONDS, self._forget, one)
            else:
                self._forget(one)
            one.wake()

    def _forget(self, one: CatchUp) -> None:
        if self._open.get((one.node, one.token)) is one:
            del self._open[one.node, one.token]

    async def _ask(self, one: CatchUp) -> str:
        channels = (self._channels.node(one.node) or {}).get(self._index.shape.service)
        if channels is None:
            raise unknown(one.node)
        lane = channels.control
        await lane.up(None)
        shape = self._index.shape
        request = shape.messages.WatchResourcesRequest(
            parent=f"nodes/{one.node}", view=resource_pb2.RESOURCE_VIEW_FULL, resume_token=one.token
        )
        request.bookmark_interval.FromSeconds(HEARTBEAT_SECONDS)
        async with self._turns:
            self.opened_count += 1
            start: Any = lane.callable(shape.watch_path, client_streaming=False, server_streaming=True)
            call = start(request.SerializeToString())
            try:
                return await self._read(one, call)
            except grpc.aio.AioRpcError as error:
                if error.code() in GONE:
                    return TOO_OLD
                raise
            finally:
                call.cancel()

    async def _read(self, one: CatchUp, call: Any) -> str:  # noqa: ANN401 - gRPC's own
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + PART_SECONDS
        while True:
            async with asyncio.timeout(SILENCE_SECONDS):
                data = await call.read()
            if data is grpc.aio.EOF:
                return PART if await call.code() is grpc.StatusCode.OK else FAILED
            changes, token, _, _ = self._index.shape.response(data)
            source = self._index.sources.get(one.node)
            own = [change for change in changes if source is not None and source.speaks_of(change)]
            one.steps.append((own, token or one.reached))
            one.size += len(data)
            one.wake()
            if self._index.feed.locate(one.node, one.reached) is not None:
                return MET
            if one.size >= PART_BYTES or loop.time() > ends_at:
                return PART

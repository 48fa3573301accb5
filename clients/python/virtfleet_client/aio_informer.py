"""The informer for asyncio; what it does is said at the blocking one (`informer`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Self

from virtfleet.type.v1 import resource_pb2
from virtfleet_client.resource_copy import Change, ChangeKind, ResourceT
from virtfleet_client.resource_reads import Reading

if TYPE_CHECKING:
    from types import TracebackType

    from virtfleet_client.aio import AsyncFleet


class AsyncInformer(Reading[ResourceT]):
    """Keeps the resources of one kind while entered; for asyncio. Arguments are those of `Informer`."""

    def __init__(
        self,
        fleet: AsyncFleet,
        kind: type[ResourceT],
        *,
        parent: str | None = None,
        filter_: str = "",
        view: resource_pb2.ResourceView.ValueType = resource_pb2.RESOURCE_VIEW_FULL,
    ) -> None:
        super().__init__(kind, parent=parent, filter_=filter_, view=view)
        self._fleet = fleet
        self._handlers: list[Callable[[Change[ResourceT]], None]] = []
        self._readers: list[asyncio.Queue[Change[ResourceT] | BaseException | None]] = []
        self._is_synced = asyncio.Event()
        self._failure: BaseException | None = None
        self._task: asyncio.Task[None] | None = None

    def handle(self, handler: Callable[[Change[ResourceT]], None]) -> None:
        """Have a function called with each change, in order; before the informer is entered."""
        self._handlers.append(handler)

    async def __aenter__(self) -> Self:
        """Begin to follow."""
        self._task = asyncio.create_task(self._follow())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop. What is known can still be read; it is not fresh any more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def wait_synced(self, timeout_seconds: float | None = None) -> None:
        """Wait until all that exists is known.

        Raises:
            TimeoutError: It is not in time; its cause is what stands in the way, if something does.
            VirtfleetError: The watch was refused.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._is_synced.wait()
        except TimeoutError:
            raise self._late(timeout_seconds) from self.obstacle
        if self._failure is not None:
            raise self._failure

    async def changes(self) -> AsyncIterator[Change[ResourceT]]:
        """Yield changes from now on, until the informer ends. What is there already comes first, as ADDED.

        Raises:
            VirtfleetError: The watch was refused.
        """
        news: asyncio.Queue[Change[ResourceT] | BaseException | None] = asyncio.Queue()
        known = [self._copy.by_name(name) for name in self._copy.names()]
        self._readers.append(news)
        try:
            for resource in known:
                yield Change(ChangeKind.ADDED, resource)
            if self._failure is not None:
                raise self._failure
            while self._task is not None and not (self._task.done() and news.empty()):
                change = await news.get()
                if change is None:
                    return
                if isinstance(change, BaseException):
                    raise change
                yield change
        finally:
            self._readers.remove(news)

    def _begin(self) -> None:
        self._copy.begin()

    def _connection(self, connected: bool) -> None:  # noqa: FBT001 - a callback
        self.connected = connected
        if connected:
            self.obstacle = None
        self._tell(Change(ChangeKind.CONNECTION))

    def _tell(self, change: Change[ResourceT]) -> None:
        for news in self._readers:
            news.put_nowait(change)
        for handler in self._handlers:
            handler(change)

    async def _follow(self) -> None:
        end: BaseException | None = None
        try:
            async for answer in self._fleet.follow(
                self._request,
                resnapshot=True,
                on_snapshot=self._begin,
                on_connection=self._connection,
                on_obstacle=self._hindered,
            ):
                for change in self._copy.take(answer):
                    self._tell(change)
                if self._copy.synced:
                    self._is_synced.set()
        except Exception as error:  # noqa: BLE001  # it is raised where somebody waits
            end = self._failure = error
        finally:
            self._is_synced.set()
            for news in self._readers:
                news.put_nowait(end)

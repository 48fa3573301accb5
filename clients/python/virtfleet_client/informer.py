"""A local copy of the resources of one kind, kept fresh by a watch, with indexes: what a controller reads from.

    with Informer(fleet, domain_pb2.Domain) as domains:
        domains.wait_synced(30)
        for change in domains.changes():
            print(change.kind, change.resource.name)

An informer never lists: the watch begins with a snapshot of all that exists and goes on by token over lost
connections, restarted gateways and drains. What is not known to be fresh is told per node (`source`). A resource that
moves to another node stays one object. `Informer` is for threads, `AsyncInformer` for asyncio.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Self

from virtfleet.type.v1 import resource_pb2
from virtfleet_client.resource_copy import ADDRESS, LABEL, MAC, NODE, VOLUME, Change, ChangeKind, ResourceT
from virtfleet_client.resource_reads import Reading

if TYPE_CHECKING:
    from types import TracebackType

    from virtfleet_client.sync import Fleet

__all__ = ["ADDRESS", "LABEL", "MAC", "NODE", "VOLUME", "Change", "ChangeKind", "Informer"]


class Informer(Reading[ResourceT]):
    """Keeps the resources of one kind while entered; for programs with threads.

    Args:
        fleet: The connection.
        kind: The class of the resources: `domain_pb2.Domain`.
        parent: One node (`nodes/n1`) instead of all.
        filter_: Only what this filter of lists holds for.
        view: How much of each is kept.
    """

    def __init__(
        self,
        fleet: Fleet,
        kind: type[ResourceT],
        *,
        parent: str | None = None,
        filter_: str = "",
        view: resource_pb2.ResourceView.ValueType = resource_pb2.RESOURCE_VIEW_FULL,
    ) -> None:
        super().__init__(kind, parent=parent, filter_=filter_, view=view)
        self._fleet = fleet
        self._handlers: list[Callable[[Change[ResourceT]], None]] = []
        self._readers: list[queue.SimpleQueue[Change[ResourceT] | BaseException | None]] = []
        self._is_synced = threading.Event()
        self._failure: BaseException | None = None
        self._ended = False
        self._watch: Any = None
        self._thread = threading.Thread(target=self._follow, name=f"informer {kind.DESCRIPTOR.name}", daemon=True)

    def handle(self, handler: Callable[[Change[ResourceT]], None]) -> None:
        """Have a function called with each change, in order, by the informer's thread; before it is entered."""
        self._handlers.append(handler)

    def __enter__(self) -> Self:
        """Begin to follow."""
        self._watch = self._fleet.follow(
            self._request,
            resnapshot=True,
            on_snapshot=self._begin,
            on_connection=self._connection,
            on_obstacle=self._hindered,
        )
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop. What is known can still be read; it is not fresh any more."""
        self.close()
        self._thread.join(30)

    def close(self) -> None:
        """Have it stop; `changes` end. Any thread may say so."""
        self._ended = True
        self._watch.close()

    def wait_synced(self, timeout_seconds: float | None = None) -> None:
        """Wait until all that exists is known.

        Raises:
            TimeoutError: It is not in time; its cause is what stands in the way, if something does.
            VirtfleetError: The watch was refused.
        """
        if not self._is_synced.wait(timeout_seconds):
            raise self._late(timeout_seconds)
        if self._failure is not None:
            raise self._failure

    def changes(self) -> Iterator[Change[ResourceT]]:
        """Yield changes from now on, until the informer ends. What is there already comes first, as ADDED.

        Raises:
            VirtfleetError: The watch was refused.
        """
        news: queue.SimpleQueue[Change[ResourceT] | BaseException | None] = queue.SimpleQueue()
        with self._lock:
            known = [self._copy.by_name(name) for name in self._copy.names()]
            ended, failure = self._ended or self._failure is not None, self._failure
            self._readers.append(news)
        try:
            yield from (Change(ChangeKind.ADDED, resource) for resource in known)
            if failure is not None:
                raise failure
            while not ended:
                change = news.get()
                if change is None:
                    return
                if isinstance(change, BaseException):
                    raise change
                yield change
        finally:
            with self._lock:
                self._readers.remove(news)

    def _begin(self) -> None:
        with self._lock:
            self._copy.begin()

    def _connection(self, connected: bool) -> None:  # noqa: FBT001 - a callback
        self.connected = connected
        if connected:
            self.obstacle = None
        if not self._ended:
            # That it breaks when it is closed is no news.
            self._tell([Change(ChangeKind.CONNECTION)])

    def _tell(self, told: list[Change[ResourceT]]) -> None:
        with self._lock:
            for news in self._readers:
                for change in told:
                    news.put(change)
        for change in told:
            for handler in self._handlers:
                handler(change)

    def _follow(self) -> None:
        end: BaseException | None = None
        try:
            for answer in self._watch:
                with self._lock:
                    told = self._copy.take(answer)
                self._tell(told)
                if self._copy.synced:
                    self._is_synced.set()
        except Exception as error:  # noqa: BLE001  # it is raised where somebody waits
            if not self._ended:
                end = self._failure = error
        self._is_synced.set()
        with self._lock:
            self._ended = True
            for news in self._readers:
                news.put(end)

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

import asyncio
import enum
import importlib
import queue
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import Message

from virtfleet.type.v1 import resource_pb2, watch_pb2
from virtfleet_client.errors import NodeUnknown, from_status

if TYPE_CHECKING:
    from types import TracebackType

    from virtfleet_client.aio import AsyncFleet
    from virtfleet_client.sync import Fleet

ResourceT = TypeVar("ResourceT", bound=Message)
Values = Callable[[Any], Iterable[str]]

NODE = "node"
"""Finds resources by their node: `nodes/n1`. Every kind has it but nodes."""
LABEL = "label"
"""Finds resources by a label and its value: `app=web`. Every kind has it."""
VOLUME = "volume"
"""Finds domains by a volume of their spec: `nodes/n1/pools/p/volumes/v`."""
MAC = "mac"
"""Finds domains and ports by a MAC address, asked for or given."""
ADDRESS = "address"
"""Finds domains and ports by an address of the guest."""


class ChangeKind(enum.Enum):
    """Says what a change is."""

    ADDED = "added"
    CHANGED = "changed"
    MOVED = "moved"
    DELETED = "deleted"
    SYNCED = "synced"
    """All that existed at the start is known."""
    SOURCE = "source"
    """The part of a node stands otherwise now."""


@dataclass(frozen=True, slots=True)
class Change(Generic[ResourceT]):
    """Is one change.

    Attributes:
        kind: What it is.
        resource: As it is now, or was last; None for SYNCED and SOURCE.
        before: As it was; None: it is new.
        source: For SOURCE: how the part of a node stands.
    """

    kind: ChangeKind
    resource: ResourceT | None = None
    before: ResourceT | None = None
    source: watch_pb2.WatchSourceStatus | None = None


def node_of(name: str) -> str:
    """Return the node of a name: `nodes/n1` of `nodes/n1/domains/web`."""
    return "/".join(name.split("/", 2)[:2])


def _labels(resource: Any) -> Iterable[str]:  # noqa: ANN401  # any resource has a head
    return (f"{key}={value}" for key, value in resource.labels.items())


def _volumes(domain: Any) -> Iterable[str]:  # noqa: ANN401  # a Domain
    for disk in domain.spec.disks.values():
        if disk.volume:
            yield disk.volume if disk.volume.startswith("nodes/") else f"{node_of(domain.name)}/{disk.volume}"


def _macs(resource: Any) -> Iterable[str]:  # noqa: ANN401  # a Domain or a Port
    if resource.DESCRIPTOR.name == "Port":
        cards = [resource.spec, resource.status]
    else:
        spec, resolved = resource.spec.interfaces, resource.status.resolved_spec.interfaces
        cards = [*spec.values(), *resolved.values(), *resource.status.interfaces]
    return {card.mac_address for card in cards if card.mac_address}


def _addresses(resource: Any) -> Iterable[str]:  # noqa: ANN401  # a Domain or a Port
    if resource.DESCRIPTOR.name == "Port":
        return {*resource.spec.addresses, *resource.status.addresses}
    return {address.address for address in resource.status.addresses}


_INDEXES: dict[str, dict[str, Values]] = {
    "Domain": {VOLUME: _volumes, MAC: _macs, ADDRESS: _addresses},
    "Port": {MAC: _macs, ADDRESS: _addresses},
}


class Copy(Generic[ResourceT]):
    """Is the local copy: resources by uid, as they are sent, with their indexes. Takes answers of a watch; pure.

    Args:
        kind: The class of the resources.
    """

    def __init__(self, kind: type[ResourceT]) -> None:
        self._kind = kind
        self._field = "_".join(_words(kind.DESCRIPTOR.name)).lower()
        self._bytes: dict[str, bytes] = {}
        self._names: dict[str, str] = {}
        self._uids: dict[str, str] = {}
        self._values: dict[str, dict[str, frozenset[str]]] = {}
        self._functions: dict[str, Values] = {LABEL: _labels, **_INDEXES.get(kind.DESCRIPTOR.name, {})}
        if kind.DESCRIPTOR.name != "Node":
            self._functions[NODE] = lambda resource: (node_of(resource.name),)
        self._found: dict[str, dict[str, set[str]]] = {name: defaultdict(set) for name in self._functions}
        self._snapshot: set[str] | None = None
        self._resyncs: dict[str, set[str]] = {}
        self.sources: dict[str, watch_pb2.WatchSourceStatus] = {}
        self.synced = False
        self.resync_count = 0

    def index(self, name: str, values: Values) -> None:
        """Add an index; before anything is known."""
        self._functions[name] = values
        self._found[name] = defaultdict(set)

    # Reading.

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._bytes)

    def get(self, uid: str) -> ResourceT | None:
        """Return the resource with a uid, the caller's own object; None: there is none."""
        data = self._bytes.get(uid)
        return self._kind.FromString(data) if data is not None else None

    def by_name(self, name: str) -> ResourceT | None:
        """Return the resource of a name; None: there is none."""
        uid = self._uids.get(name)
        return self.get(uid) if uid is not None else None

    def by(self, index: str, value: str) -> list[ResourceT]:
        """Return the resources that have a value in an index, by name.

        Raises:
            KeyError: There is no such index.
        """
        uids = self._found[index].get(value, ())
        return [self._kind.FromString(self._bytes[uid]) for uid in sorted(uids, key=self._names.__getitem__)]

    def count_by(self, index: str, value: str) -> int:
        """Return how many resources have a value in an index, without decoding them.

        Raises:
            KeyError: There is no such index.
        """
        return len(self._found[index].get(value, ()))

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self._uids)

    # What the watch tells.

    def begin(self) -> None:
        """Expect a snapshot."""
        self._snapshot = set()

    def take(self, answer: Any) -> list[Change[ResourceT]]:  # noqa: ANN401  # one of the response classes
        """Take an answer of the watch and return what has changed."""
        told: list[Change[ResourceT]] = []
        for change in answer.changes:
            match change.WhichOneof("kind"):
                case "put" if change.put.HasField(self._field):
                    self._put(getattr(change.put, self._field), told)
                case "delete":
                    uid = change.delete.uid
                    # Unknown, or it lives under another name by now.
                    if self._names.get(uid) == change.delete.name:
                        self._drop(uid, told)
                case "moved":
                    self._move(change.moved.uid, change.moved.new_name, told)
                case "moved_in":
                    self._move(change.moved_in.uid, change.moved_in.name, told)
                case "moved_out":
                    # Of a watch of one node: what has left it is gone for this watch.
                    self._drop(change.moved_out.uid, told)
        marker = answer.WhichOneof("marker")
        if marker == "snapshot_end":
            self._end_snapshot(told)
        elif marker == "source_status":
            self._source(answer.source_status, told)
        return told

    def _put(self, resource: ResourceT, told: list[Change[ResourceT]]) -> None:
        head: Any = resource
        uid, name = head.uid, head.name
        if self._snapshot is not None:
            self._snapshot.add(uid)
        seen = self._resyncs.get(node_of(name))
        if seen is not None:
            seen.add(uid)
        holder = self._uids.get(name)
        if holder is not None and holder != uid:
            # The deletion of a predecessor may be left out for a slow reader.
            self._drop(holder, told)
        data = resource.SerializeToString(deterministic=True)
        old = self._bytes.get(uid)
        if old == data:
            return
        old_name = self._names.get(uid)
        before = self._kind.FromString(old) if old is not None else None
        self._unindex(uid)
        if old_name is not None and self._uids.get(old_name) == uid:
            del self._uids[old_name]
        self._bytes[uid], self._names[uid], self._uids[name] = data, name, uid
        values = {index: frozenset(function(resource)) for index, function in self._functions.items()}
        self._values[uid] = values
        for index, found in values.items():
            for value in found:
                self._found[index][value].add(uid)
        kind = ChangeKind.ADDED if before is None else ChangeKind.MOVED if old_name != name else ChangeKind.CHANGED
        told.append(Change(kind, resource, before))

    def _unindex(self, uid: str) -> None:
        for index, values in self._values.pop(uid, {}).items():
            for value in values:
                uids = self._found[index][value]
                uids.discard(uid)
                if not uids:
                    del self._found[index][value]

    def _drop(self, uid: str, told: list[Change[ResourceT]]) -> None:
        data = self._bytes.pop(uid, None)
        if data is None:
            return
        self._unindex(uid)
        name = self._names.pop(uid)
        if self._uids.get(name) == uid:
            del self._uids[name]
        last = self._kind.FromString(data)
        told.append(Change(ChangeKind.DELETED, last, last))

    def _move(self, uid: str, name: str, told: list[Change[ResourceT]]) -> None:
        """Give a resource its new name at once; what else has changed is told by the put that follows."""
        resource: Any = self.get(uid)
        if resource is not None and resource.name != name:
            resource.name = name
            self._put(resource, told)

    def _end_snapshot(self, told: list[Change[ResourceT]]) -> None:
        seen = self._snapshot if self._snapshot is not None else set()
        for uid in [uid for uid in self._bytes if uid not in seen]:
            self._drop(uid, told)
        self._snapshot = None
        self.synced = True
        told.append(Change(ChangeKind.SYNCED))

    def _source(self, status: watch_pb2.WatchSourceStatus, told: list[Change[ResourceT]]) -> None:
        node = status.node
        removed = status.state == watch_pb2.SOURCE_STATE_LOST and isinstance(from_status(status.status), NodeUnknown)
        if status.state == watch_pb2.SOURCE_STATE_RESYNCING:
            self.resync_count += 1
            self._resyncs[node] = set()
        elif removed:
            self._resyncs.pop(node, None)
            self._drop_node(node, set(), told)
        elif node in self._resyncs:
            self._drop_node(node, self._resyncs.pop(node), told)
        if removed:
            self.sources.pop(node, None)
        else:
            kept = watch_pb2.WatchSourceStatus()
            kept.CopyFrom(status)
            self.sources[node] = kept
        told.append(Change(ChangeKind.SOURCE, source=status))

    def _drop_node(self, node: str, kept: set[str], told: list[Change[ResourceT]]) -> None:
        for uid in list(self._found.get(NODE, {}).get(node, ())):
            if uid not in kept:
                self._drop(uid, told)


def _words(name: str) -> list[str]:
    words: list[str] = []
    for letter in name:
        if letter.isupper() or not words:
            words.append("")
        words[-1] += letter
    return words


def watch_request(
    kind: type[Message], parent: str | None, filter_: str, view: resource_pb2.ResourceView.ValueType
) -> Message:
    """Return the request that watches all resources of a kind.

    Raises:
        KeyError: Resources of this class are not watched.
    """
    package = kind.DESCRIPTOR.file.package
    importlib.import_module(f"{package}.watch_pb2")
    pool = descriptor_pool.Default()
    method = pool.FindServiceByName(f"{package}.WatchService").methods_by_name["WatchResources"]
    types = pool.FindEnumTypeByName(f"{package}.ResourceType").values_by_name
    number = types["RESOURCE_TYPE_" + "_".join(_words(kind.DESCRIPTOR.name)).upper()].number
    request: Any = message_factory.GetMessageClass(method.input_type)(
        resource_types=[number], filter=filter_, view=view
    )
    request.parent = parent if parent is not None else "" if package == "virtfleet.fleet.v1" else "nodes/-"
    request.snapshot.SetInParent()
    return request  # type: ignore[no-any-return]  # made from its descriptor


class _Reading(Generic[ResourceT]):
    """Is what both informers have: reads of the copy under a lock."""

    def __init__(
        self,
        kind: type[ResourceT],
        *,
        parent: str | None,
        filter_: str,
        view: resource_pb2.ResourceView.ValueType,
    ) -> None:
        self._copy = Copy(kind)
        self._lock = threading.Lock()
        self._request = watch_request(kind, parent, filter_, view)

    def index(self, name: str, values: Values) -> None:
        """Add an index of one's own, before the informer is entered."""
        self._copy.index(name, values)

    def __len__(self) -> int:
        """Return how many resources there are."""
        with self._lock:
            return len(self._copy)

    @property
    def synced(self) -> bool:
        """Whether all that existed at the start is known."""
        return self._copy.synced

    @property
    def resync_count(self) -> int:
        """How often a part had to be read anew because its history was gone."""
        return self._copy.resync_count

    def get(self, uid: str) -> ResourceT | None:
        """Return the resource with a uid, the caller's own object; None: there is none."""
        with self._lock:
            return self._copy.get(uid)

    def by_name(self, name: str) -> ResourceT | None:
        """Return the resource of a name; None: there is none."""
        with self._lock:
            return self._copy.by_name(name)

    def by(self, index: str, value: str) -> list[ResourceT]:
        """Return the resources that have a value in an index, by name.

        Raises:
            KeyError: There is no such index.
        """
        with self._lock:
            return self._copy.by(index, value)

    def count_by(self, index: str, value: str) -> int:
        """Return how many resources have a value in an index, without decoding them.

        Raises:
            KeyError: There is no such index.
        """
        with self._lock:
            return self._copy.count_by(index, value)

    def names(self) -> list[str]:
        """Return the names of all, sorted."""
        with self._lock:
            return self._copy.names()

    def source(self, node: str) -> watch_pb2.WatchSourceStatus:
        """Return how the part of a node (`nodes/{node}`) stands; one that nothing was told of is live."""
        with self._lock:
            known = self._copy.sources.get(node)
        return known if known is not None else watch_pb2.WatchSourceStatus(node=node, state=watch_pb2.SOURCE_STATE_LIVE)


class Informer(_Reading[ResourceT]):
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
        self._watch = self._fleet.follow(self._request, resnapshot=True, on_snapshot=self._begin)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop. What is known can still be read; it is not fresh any more."""
        self._ended = True
        self._watch.close()
        self._thread.join(30)

    def wait_synced(self, timeout_seconds: float | None = None) -> None:
        """Wait until all that exists is known.

        Raises:
            TimeoutError: It is not in time.
            VirtfleetError: The watch was refused.
        """
        if not self._is_synced.wait(timeout_seconds):
            message = f"not all was known within {timeout_seconds} s"
            raise TimeoutError(message)
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

    def _follow(self) -> None:
        end: BaseException | None = None
        try:
            for answer in self._watch:
                with self._lock:
                    told = self._copy.take(answer)
                    for news in self._readers:
                        for change in told:
                            news.put(change)
                for change in told:
                    for handler in self._handlers:
                        handler(change)
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


class AsyncInformer(_Reading[ResourceT]):
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
            TimeoutError: It is not in time.
            VirtfleetError: The watch was refused.
        """
        async with asyncio.timeout(timeout_seconds):
            await self._is_synced.wait()
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

    async def _follow(self) -> None:
        end: BaseException | None = None
        try:
            async for answer in self._fleet.follow(self._request, resnapshot=True, on_snapshot=self._begin):
                for change in self._copy.take(answer):
                    for news in self._readers:
                        news.put_nowait(change)
                    for handler in self._handlers:
                        handler(change)
                if self._copy.synced:
                    self._is_synced.set()
        except Exception as error:  # noqa: BLE001  # it is raised where somebody waits
            end = self._failure = error
        finally:
            self._is_synced.set()
            for news in self._readers:
                news.put_nowait(end)

"""The local copy of an informer: resources by uid, with indexes, out of the answers of a watch. Pure."""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from virtfleet.type.v1 import watch_pb2
from virtfleet_client.errors import NodeUnknown, from_status

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
    CONNECTION = "connection"
    """The watch itself stands again, or is broken: `connected` of the informer says which."""


@dataclass(frozen=True, slots=True)
class Change(Generic[ResourceT]):
    """Is one change.

    Attributes:
        kind: What it is.
        resource: As it is now, or was last; None for SYNCED, SOURCE and CONNECTION.
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
        self._field = "_".join(words_of(kind.DESCRIPTOR.name)).lower()
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


def words_of(name: str) -> list[str]:
    """Return the words of a message's name."""
    words: list[str] = []
    for letter in name:
        if letter.isupper() or not words:
            words.append("")
        words[-1] += letter
    return words

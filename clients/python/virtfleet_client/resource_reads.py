"""What blocking and asyncio informers have in common: the request of the watch, and reads of the copy under a lock."""

from __future__ import annotations

import importlib
import threading
from typing import Any, Generic

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import Message

from virtfleet.type.v1 import resource_pb2, watch_pb2
from virtfleet_client.errors import VirtfleetError
from virtfleet_client.resource_copy import Copy, ResourceT, Values, words_of


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
    number = types["RESOURCE_TYPE_" + "_".join(words_of(kind.DESCRIPTOR.name)).upper()].number
    request: Any = message_factory.GetMessageClass(method.input_type)(
        resource_types=[number], filter=filter_, view=view
    )
    request.parent = parent if parent is not None else "" if package == "virtfleet.fleet.v1" else "nodes/-"
    request.snapshot.SetInParent()
    return request  # type: ignore[no-any-return]  # made from its descriptor


class Reading(Generic[ResourceT]):
    """Reads the copy of an informer."""

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
        self.connected = False
        """Whether the watch stands. While it does not, everything is as last seen."""
        self.obstacle: VirtfleetError | None = None
        """What stands in the way of the watch: a host that is not reached, say; None: nothing."""

    def _hindered(self, obstacle: VirtfleetError) -> None:
        self.obstacle = obstacle

    def _late(self, timeout_seconds: float | None) -> TimeoutError:
        """Return the error for what is not known in time."""
        message = f"not all was known within {timeout_seconds} s"
        error = TimeoutError(f"{message}: {self.obstacle}" if self.obstacle is not None else message)
        error.__cause__ = self.obstacle
        return error

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

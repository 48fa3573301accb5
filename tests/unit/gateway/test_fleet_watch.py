"""What a reader of the fleet's watch is told who has fallen behind the gateway's ring, but not out of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from virtfleet.compute.v1 import domain_pb2, watch_pb2
from virtfleet_gateway.index import PackageIndex
from virtfleet_gateway.source import LIVE, Source
from virtfleet_gateway.watch import COALESCE_CHANGES, FleetWatch

NODE = "n1"
WEB = f"nodes/{NODE}/domains/web"


class Node:
    """Speaks for a node: what it says goes through the index as from the wire."""

    def __init__(self) -> None:
        nowhere: Any = SimpleNamespace(node=lambda _: None)
        self.index = PackageIndex("compute", nowhere)
        self.source = self.index.sources[NODE] = Source(NODE, self.index.shape)
        self.source.synced, self.source.state = True, LIVE
        self.watch = FleetWatch(self.index, nowhere)
        self._number = 0

    def say(self, *changes: watch_pb2.Change) -> None:
        """Tell changes, each in a message of its own."""
        for change in changes:
            self._number += 1
            message = watch_pb2.WatchResourcesResponse(changes=[change], resume_token=f"token{self._number}")
            told, token, marker, _ = self.index.shape.response(message.SerializeToString())
            self.index._take(self.source, told, token, marker)


def put(uid: str, generation: int = 1, name: str = WEB) -> watch_pb2.Change:
    change = watch_pb2.Change()
    change.put.domain.CopyFrom(domain_pb2.Domain(name=name, uid=uid, generation=generation))
    return change


def gone(uid: str, name: str = WEB) -> watch_pb2.Change:
    change = watch_pb2.Change()
    change.delete.resource_type, change.delete.name, change.delete.uid = "domain", name, uid
    return change


@pytest.fixture
def node() -> Node:
    return Node()


async def told(node: Node, *changes: watch_pb2.Change) -> list[tuple[str, str, int]]:
    """Return what a reader is told who has not read while all of this was said."""
    call: Any = SimpleNamespace(sees_all=True)
    request = watch_pb2.WatchResourcesRequest(parent="nodes/-")
    request.snapshot.SetInParent()
    stream = node.watch.stream(request, call)
    first = watch_pb2.WatchResourcesResponse.FromString(await anext(stream))
    assert first.HasField("snapshot_end")
    node.say(*changes)
    node.watch.close()
    found = []
    async for answer in stream:
        for change in watch_pb2.WatchResourcesResponse.FromString(answer).changes:
            if change.HasField("put"):
                found.append(("put", change.put.domain.uid, change.put.domain.generation))
            else:
                found.append(("delete", change.delete.uid, 0))
    return found


def crowd() -> list[watch_pb2.Change]:
    """Return changes of others, so many that a reader counts as slow."""
    return [put("crowd", number, f"nodes/{NODE}/domains/crowd") for number in range(1, COALESCE_CHANGES + 1)]


async def test_the_end_of_a_resource_is_told_although_another_has_its_name(node: Node) -> None:
    found = await told(node, put("old", 1), put("old", 2), gone("old"), put("new", 1), *crowd())
    assert found == [("put", "old", 2), ("delete", "old", 0), ("put", "new", 1), ("put", "crowd", COALESCE_CHANGES)]


async def test_a_life_within_the_time_of_a_reader_who_is_behind_is_told(node: Node) -> None:
    found = await told(node, put("short", 1), put("short", 2), gone("short"), *crowd())
    assert found == [("put", "short", 2), ("delete", "short", 0), ("put", "crowd", COALESCE_CHANGES)]


async def test_whoever_is_not_far_behind_is_told_each_step(node: Node) -> None:
    found = await told(node, put("web", 1), put("web", 2), put("web", 3))
    assert found == [("put", "web", 1), ("put", "web", 2), ("put", "web", 3)]

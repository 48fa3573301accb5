"""The local copy of an informer: what each answer of a watch makes of it."""

from __future__ import annotations

from typing import Any

import pytest
from google.rpc import error_details_pb2, status_pb2

from virtfleet.compute.v1 import domain_pb2, watch_pb2
from virtfleet.network.v1 import port_pb2
from virtfleet.storage.v1 import volume_pb2
from virtfleet.type.v1 import resource_pb2
from virtfleet.type.v1 import watch_pb2 as type_pb2
from virtfleet_client.informer import ADDRESS, LABEL, MAC, NODE, VOLUME, Change
from virtfleet_client.resource_copy import Copy
from virtfleet_client.resource_reads import watch_request


def domain(name: str, uid: str, **fields: Any) -> domain_pb2.Domain:
    node, _, id_ = name.partition("/")
    return domain_pb2.Domain(name=f"nodes/{node}/domains/{id_}", uid=uid, **fields)


def put(*domains: domain_pb2.Domain) -> watch_pb2.WatchResourcesResponse:
    changes = [watch_pb2.Change(put=watch_pb2.ResourcePut(domain=one)) for one in domains]
    return watch_pb2.WatchResourcesResponse(changes=changes)


def end() -> watch_pb2.WatchResourcesResponse:
    answer = watch_pb2.WatchResourcesResponse()
    answer.snapshot_end.SetInParent()
    return answer


def source(node: str, state: type_pb2.SourceState.ValueType, reason: str = "") -> watch_pb2.WatchResourcesResponse:
    answer = watch_pb2.WatchResourcesResponse()
    answer.source_status.node, answer.source_status.state = f"nodes/{node}", state
    if reason:
        status = status_pb2.Status(code=5, message="gone")
        status.details.add().Pack(error_details_pb2.ErrorInfo(domain="virtfleet.dev", reason=reason))
        answer.source_status.status.CopyFrom(status)
    return answer


def told(changes: list[Change[domain_pb2.Domain]]) -> list[tuple[str, str]]:
    return [(change.kind.value, change.resource.uid if change.resource is not None else "") for change in changes]


@pytest.fixture
def copy() -> Copy[domain_pb2.Domain]:
    made = Copy(domain_pb2.Domain)
    made.begin()
    assert told(made.take(put(domain("n1/a", "A"), domain("n2/b", "B")))) == [("added", "A"), ("added", "B")]
    assert not made.synced
    assert told(made.take(end())) == [("synced", "")]
    return made


def test_all_is_known_after_the_snapshot(copy: Copy[domain_pb2.Domain]) -> None:
    assert copy.synced
    assert copy.names() == ["nodes/n1/domains/a", "nodes/n2/domains/b"]
    found = copy.by_name("nodes/n1/domains/a")
    assert found is not None
    assert found.uid == "A"
    found.uid = "the caller's own"
    again = copy.get("A")
    assert again is not None
    assert again.uid == "A"


def test_a_repetition_is_no_change(copy: Copy[domain_pb2.Domain]) -> None:
    assert not copy.take(put(domain("n1/a", "A")))
    changed = copy.take(put(domain("n1/a", "A", generation=2)))
    assert told(changed) == [("changed", "A")]
    assert changed[0].before is not None
    assert changed[0].before.generation == 0


def test_a_move_is_one_object(copy: Copy[domain_pb2.Domain]) -> None:
    moved = type_pb2.ResourceMoved(
        resource_type="domain", uid="A", old_name="nodes/n1/domains/a", new_name="nodes/n2/domains/a"
    )
    changes = copy.take(watch_pb2.WatchResourcesResponse(changes=[watch_pb2.Change(moved=moved)]))
    assert told(changes) == [("moved", "A")]
    assert not copy.take(put(domain("n2/a", "A")))
    late = type_pb2.ResourceDelete(resource_type="domain", name="nodes/n1/domains/a", uid="A")
    assert not copy.take(watch_pb2.WatchResourcesResponse(changes=[watch_pb2.Change(delete=late)]))
    assert copy.count_by(NODE, "nodes/n2") == 2
    assert copy.count_by(NODE, "nodes/n1") == 0


def test_another_uid_under_a_name_is_another_object(copy: Copy[domain_pb2.Domain]) -> None:
    assert told(copy.take(put(domain("n1/a", "A2")))) == [("deleted", "A"), ("added", "A2")]
    assert len(copy) == 2


def test_a_new_snapshot_drops_what_is_not_in_it(copy: Copy[domain_pb2.Domain]) -> None:
    copy.begin()
    assert not copy.take(put(domain("n2/b", "B")))
    assert told(copy.take(end())) == [("deleted", "A"), ("synced", "")]


def test_reading_a_node_anew_drops_what_it_no_longer_has(copy: Copy[domain_pb2.Domain]) -> None:
    copy.take(put(domain("n1/c", "C")))
    copy.take(source("n1", type_pb2.SOURCE_STATE_RESYNCING))
    assert copy.sources["nodes/n1"].state == type_pb2.SOURCE_STATE_RESYNCING
    assert not copy.take(put(domain("n1/c", "C")))
    assert told(copy.take(source("n1", type_pb2.SOURCE_STATE_LIVE))) == [("deleted", "A"), ("source", "")]
    assert copy.names() == ["nodes/n1/domains/c", "nodes/n2/domains/b"]


def test_a_node_that_is_away_keeps_its_part_and_one_removed_does_not(copy: Copy[domain_pb2.Domain]) -> None:
    assert told(copy.take(source("n1", type_pb2.SOURCE_STATE_STALE))) == [("source", "")]
    assert told(copy.take(source("n1", type_pb2.SOURCE_STATE_LOST))) == [("source", "")]
    assert len(copy) == 2
    removed = copy.take(source("n1", type_pb2.SOURCE_STATE_LOST, "NODE_UNKNOWN"))
    assert told(removed) == [("deleted", "A"), ("source", "")]
    assert "nodes/n1" not in copy.sources


def test_indexes_follow_changes() -> None:
    copy = Copy(domain_pb2.Domain)
    one = domain("n1/a", "A", labels={"app": "web"})
    one.spec.disks["vda"].volume = "pools/p/volumes/v"
    one.spec.interfaces["lan"].mac_address = "52:54:00:00:00:01"
    one.status.addresses.add(address="10.0.0.5")
    copy.take(put(one))
    for index, value in (
        (LABEL, "app=web"),
        (VOLUME, "nodes/n1/pools/p/volumes/v"),
        (MAC, "52:54:00:00:00:01"),
        (ADDRESS, "10.0.0.5"),
        (NODE, "nodes/n1"),
    ):
        assert [found.uid for found in copy.by(index, value)] == ["A"], index
    copy.take(put(domain("n1/a", "A", labels={"app": "db"})))
    assert not copy.by(LABEL, "app=web")
    assert not copy.by(VOLUME, "nodes/n1/pools/p/volumes/v")
    assert copy.count_by(LABEL, "app=db") == 1


@pytest.mark.parametrize(
    ("kind", "number"),
    [(domain_pb2.Domain, 1), (volume_pb2.Volume, 2), (port_pb2.Port, 2)],
    ids=["domain", "volume", "port"],
)
def test_each_kind_is_watched_in_its_package(kind: Any, number: int) -> None:
    request: Any = watch_request(kind, None, "", resource_pb2.RESOURCE_VIEW_FULL)
    assert request.DESCRIPTOR.file.package == kind.DESCRIPTOR.file.package
    assert list(request.resource_types) == [number]
    assert (request.parent, request.WhichOneof("start")) == ("nodes/-", "snapshot")

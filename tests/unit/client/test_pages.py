from __future__ import annotations

import grpc
import pytest
from google.longrunning import operations_pb2
from google.rpc import error_details_pb2, status_pb2

from virtfleet.compute.v1 import domain_pb2
from virtfleet.fleet.v1 import node_pb2
from virtfleet.type.v1 import resource_pb2
from virtfleet_client import PartialList
from virtfleet_client.pages import Pages


def away(node: str) -> resource_pb2.NodeFailure:
    status = status_pb2.Status(code=14, message=f"{node} does not answer")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="NODE_UNREACHABLE", domain="virtfleet.dev"))
    return resource_pb2.NodeFailure(node=node, status=status)


def test_the_pages_of_a_list_follow_its_tokens() -> None:
    first = domain_pb2.ListDomainsRequest(parent="nodes/-", page_size=1)
    pages = Pages(first)
    answer = domain_pb2.ListDomainsResponse(domains=[domain_pb2.Domain(name="a")], next_page_token="t")
    assert [domain.name for domain in pages.items(answer)] == ["a"]
    assert pages.goes_on(answer)
    assert pages.request == domain_pb2.ListDomainsRequest(parent="nodes/-", page_size=1, page_token="t")
    assert not first.page_token
    assert not pages.goes_on(domain_pb2.ListDomainsResponse())


def test_missing_nodes_are_told_at_the_end_once_each() -> None:
    pages = Pages(domain_pb2.ListDomainsRequest(parent="nodes/-"))
    for token in ("t", ""):
        answer = domain_pb2.ListDomainsResponse(next_page_token=token, unreachable=[away("nodes/n2"), away("nodes/n3")])
        assert list(pages.items(answer)) == []
        if token:
            assert pages.goes_on(answer)
    with pytest.raises(PartialList) as told:
        pages.goes_on(answer)
    assert [failure.node for failure in told.value.failures] == ["nodes/n2", "nodes/n3"]
    assert (told.value.code(), told.value.reason) == (grpc.StatusCode.UNAVAILABLE, "NODE_UNREACHABLE")
    assert "nothing new of nodes/n2, nodes/n3" in str(told.value)


def test_operations_that_are_missing_are_told_by_name() -> None:
    pages = Pages(operations_pb2.ListOperationsRequest(name="nodes/-/services/-"))
    answer = operations_pb2.ListOperationsResponse(unreachable=["nodes/n2/services/compute"])
    pages.items(answer)
    with pytest.raises(PartialList, match="nothing new of nodes/n2/services/compute") as told:
        pages.goes_on(answer)
    assert told.value.code() is grpc.StatusCode.UNAVAILABLE


def test_nodes_that_are_away_are_in_the_list_of_nodes() -> None:
    pages = Pages(node_pb2.ListNodesRequest())
    answer = node_pb2.ListNodesResponse(nodes=[node_pb2.Node()], unreachable=[away("nodes/n2")])
    assert len(list(pages.items(answer))) == 1
    assert not pages.goes_on(answer)


def test_who_takes_what_was_last_seen_is_not_told() -> None:
    pages = Pages(domain_pb2.ListDomainsRequest(parent="nodes/-", allow_stale=True))
    answer = domain_pb2.ListDomainsResponse(unreachable=[away("nodes/n2")])
    pages.items(answer)
    assert not pages.goes_on(answer)

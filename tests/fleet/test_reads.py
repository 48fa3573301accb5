"""What is read of the domains of a fleet: lists, pages, filters, views, by uid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.fleet.rig import (
    create,
    delete,
    domain,
    get,
    refused,
    unique,
    until,
)
from virtfleet.compute.v1 import domain_pb2
from virtfleet.type.v1 import resource_pb2
from virtfleet_client import Fleet
from virtfleet_client.errors import VirtfleetError, from_status


@pytest.fixture
def spread(fleet: Fleet, nodes: list[str]) -> Iterator[dict[str, domain_pb2.Domain]]:
    """Yield five domains on each node, of one label of their own, every second running."""
    label = unique("group")
    made: dict[str, domain_pb2.Domain] = {}
    try:
        for node in nodes:
            for number in range(5):
                found = create(
                    fleet,
                    node,
                    start="running" if number % 2 else "",
                    labels={"group": label, "number": str(number)},
                    display_name=f"Guest {number}",
                )
                made[found.name] = found
        yield made
    finally:
        for name in made:
            delete(fleet, name)


def group(spread: dict[str, domain_pb2.Domain]) -> str:
    """Return the filter that finds the domains of the test."""
    return f'labels.group="{next(iter(spread.values())).labels["group"]}"'


def fleet_list(fleet: Fleet, **fields: Any) -> list[Any]:
    """List domains, page by page."""
    fields.setdefault("parent", "nodes/-")
    return list(fleet.pages(fleet.domains.ListDomains, domain_pb2.ListDomainsRequest(**fields)))


def test_the_fleets_list_is_as_fresh_as_the_last_answer(fleet: Fleet, spread: dict[str, domain_pb2.Domain]) -> None:
    def caught_up() -> bool:
        found = {one.name: one for one in fleet_list(fleet, filter=group(spread))}
        return found == spread

    until(caught_up, 3, "the index has what was acknowledged")
    through = {one.name: one for one in fleet_list(fleet, filter=group(spread), read_through=True)}
    assert through == spread


@pytest.mark.parametrize("read_through", [False, True])
def test_small_pages_in_a_stable_order_over_two_nodes(
    fleet: Fleet, spread: dict[str, domain_pb2.Domain], *, read_through: bool
) -> None:
    until(lambda: len(fleet_list(fleet, filter=group(spread))) == len(spread), 3, "the index has all")
    request = domain_pb2.ListDomainsRequest(
        parent="nodes/-", page_size=3, filter=group(spread), read_through=read_through
    )
    names: list[str] = []
    while True:
        answer = fleet.domains.ListDomains(request)
        assert len(answer.domains) <= 3
        names += [one.name for one in answer.domains]
        assert not answer.unreachable
        if not answer.next_page_token:
            break
        request.page_token = answer.next_page_token
    assert names == sorted(spread), "each once, by node and name"


def test_pages_stay_in_order_while_domains_come_and_go(
    fleet: Fleet, nodes: list[str], spread: dict[str, domain_pb2.Domain]
) -> None:
    until(lambda: len(fleet_list(fleet, filter=group(spread))) == len(spread), 3, "the index has all")
    ordered = sorted(spread)
    request = domain_pb2.ListDomainsRequest(parent=nodes[0], page_size=2, filter=group(spread))
    first = fleet.domains.ListDomains(request)
    assert [one.name for one in first.domains] == ordered[:2]
    delete(fleet, ordered[1])
    with domain(fleet, nodes[0], "a-first", labels=dict(first.domains[0].labels)):
        request.page_token = first.next_page_token
        second = fleet.domains.ListDomains(request)
    assert [one.name for one in second.domains] == ordered[2:4]


FILTERS = [
    ('labels.number="3"', {3}),
    ("labels.number:*", {0, 1, 2, 3, 4}),
    ("status.state=DOMAIN_STATE_RUNNING", {1, 3}),
    ('status.state=DOMAIN_STATE_SHUT_OFF AND NOT labels.number="0"', {2, 4}),
    ('labels.number="0" OR labels.number="1"', {0, 1}),
    ('(labels.number="0" OR labels.number="1") AND status.active=true', {1}),
    ('display_name="Guest 2"', {2}),
    ('display_name:"Guest"', {0, 1, 2, 3, 4}),
    ("spec.memory.maximum_bytes>=67108864", {0, 1, 2, 3, 4}),
    ("spec.memory.maximum_bytes<67108864", set()),
    ("generation=1", {0, 1, 2, 3, 4}),
    ('create_time>"2020-01-01T00:00:00Z"', {0, 1, 2, 3, 4}),
]


@pytest.mark.parametrize(("text", "numbers"), FILTERS, ids=[row[0] for row in FILTERS])
def test_filters_hold_at_a_node_and_in_the_fleet(
    fleet: Fleet, nodes: list[str], spread: dict[str, domain_pb2.Domain], text: str, numbers: set[int]
) -> None:
    whole = f"{group(spread)} AND ({text})"
    wanted = {name for name, made in spread.items() if int(made.labels["number"]) in numbers}
    assert {one.name for one in fleet_list(fleet, parent=nodes[0], filter=whole)} == {
        name for name in wanted if name.startswith(nodes[0])
    }
    until(lambda: {one.name for one in fleet_list(fleet, filter=whole)} == wanted, 3, "the fleet finds the same")


@pytest.mark.parametrize("parent", ["nodes/-", "nodes/n1"])
def test_views(fleet: Fleet, spread: dict[str, domain_pb2.Domain], parent: str) -> None:
    until(lambda: len(fleet_list(fleet, filter=group(spread))) == len(spread), 3, "the index has all")
    basic = fleet_list(fleet, parent=parent, filter=group(spread), view=resource_pb2.RESOURCE_VIEW_BASIC)
    assert basic
    for one in basic:
        assert not one.HasField("spec")
        assert not one.status.HasField("active_spec")
        assert not one.status.HasField("resolved_spec")
        assert one.status.state == spread[one.name].status.state
        assert one.labels == spread[one.name].labels
    full = fleet_list(fleet, parent=parent, filter=group(spread), view=resource_pb2.RESOURCE_VIEW_FULL)
    assert all(one == spread[one.name] for one in full)


def test_a_domain_is_found_by_its_uid_wherever_it_is(
    fleet: Fleet, nodes: list[str], spread: dict[str, domain_pb2.Domain]
) -> None:
    until(lambda: len(fleet_list(fleet, filter=group(spread))) == len(spread), 3, "the index has all")
    for made in spread.values():
        assert get(fleet, f"nodes/-/domains/{made.uid}") == made
    here = next(made for made in spread.values() if made.name.startswith(nodes[0]))
    assert get(fleet, f"{nodes[0]}/domains/{here.uid}") == here
    error = refused(lambda: get(fleet, f"{nodes[1]}/domains/{here.uid}"))
    assert error.reason == "RESOURCE_NOT_FOUND"
    read = fleet.domains.BatchGetDomains(
        domain_pb2.BatchGetDomainsRequest(parent="nodes/-", names=[*sorted(spread), f"{nodes[1]}/domains/none"])
    )
    assert [result.domain for result in read.results[:-1]] == [spread[name] for name in sorted(spread)]
    assert from_status(read.results[-1].status).reason == "RESOURCE_NOT_FOUND"


def test_one_id_on_two_nodes_is_ambiguous_in_the_fleet(fleet: Fleet, nodes: list[str]) -> None:
    id_ = unique("twin")
    with domain(fleet, nodes[0], id_) as one, domain(fleet, nodes[1], id_) as other:

        def ambiguous() -> VirtfleetError | None:
            error = refused(lambda: get(fleet, f"nodes/-/domains/{id_}"))
            return error if error.reason == "AMBIGUOUS_NAME" else None

        until(
            lambda: len(fleet_list(fleet, filter=f'name="{one.name}" OR name="{other.name}"')) == 2,
            3,
            "the index has both",
        )
        error = until(ambiguous, 3, "the id is ambiguous")
        assert error.code().name == "FAILED_PRECONDITION"
        assert sorted(error.metadata["names"].split(", ")) == sorted([one.name, other.name])

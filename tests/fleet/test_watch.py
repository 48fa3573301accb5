"""Watches: a snapshot, then every change in order; no token loses one, whichever process is killed meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import field_mask_pb2

from tests.fleet.rig import (
    State,
    Watcher,
    create,
    creation,
    delete,
    domain,
    frozen,
    get,
    kill,
    refused,
    unique,
    verb,
    watching,
)
from virtfleet.compute.v1 import domain_pb2, watch_pb2
from virtfleet.fleet.v1 import node_pb2
from virtfleet.fleet.v1 import watch_pb2 as fleet_watch_pb2
from virtfleet.network.v1 import network_pb2
from virtfleet.network.v1 import watch_pb2 as network_watch_pb2
from virtfleet.storage.v1 import pool_pb2
from virtfleet.storage.v1 import watch_pb2 as storage_watch_pb2
from virtfleet.type.v1 import resource_pb2
from virtfleet.type.v1 import watch_pb2 as type_watch_pb2
from virtfleet_client import Fleet
from virtfleet_client.errors import DeadlineExceeded, Unavailable

LIVE, STALE = type_watch_pb2.SOURCE_STATE_LIVE, type_watch_pb2.SOURCE_STATE_STALE
RESYNCING, LOST = type_watch_pb2.SOURCE_STATE_RESYNCING, type_watch_pb2.SOURCE_STATE_LOST
DOMAIN = watch_pb2.RESOURCE_TYPE_DOMAIN

pytestmark = pytest.mark.usefixtures("made_whole")


def snapshot(parent: str, **fields: Any) -> watch_pb2.WatchResourcesRequest:
    """Return the request of a watch of domains that begins with what there is."""
    return watch_pb2.WatchResourcesRequest(
        parent=parent, resource_types=[DOMAIN], snapshot=type_watch_pb2.WatchSnapshot(), **fields
    )


def resumed(parent: str, token: str) -> watch_pb2.WatchResourcesRequest:
    """Return the request of a watch that goes on."""
    return watch_pb2.WatchResourcesRequest(parent=parent, resource_types=[DOMAIN], resume_token=token)


def label(fleet: Fleet, name: str, number: int) -> int:
    """Change a label; returns the generation that was acknowledged."""
    wanted = domain_pb2.Domain(name=name, labels={"number": str(number)})
    mask = field_mask_pb2.FieldMask(paths=["labels.number"])
    request = domain_pb2.UpdateDomainRequest(domain=wanted, update_mask=mask, request_id=unique("r"))
    return acknowledged(fleet, fleet.domains.UpdateDomain, request).generation


def acknowledged(fleet: Fleet, method: Any, request: Any) -> domain_pb2.Domain:
    """Make a call until it is answered: with its request_id it has one effect, however often it must be made."""
    ends_at = time.monotonic() + 20
    while True:
        try:
            return fleet.wait(method(request, timeout=5), domain_pb2.Domain)
        except (Unavailable, DeadlineExceeded):
            assert time.monotonic() < ends_at
            time.sleep(0.05)


class Writer:
    """Changes one domain and makes others beside it, and keeps what was acknowledged."""

    def __init__(self, fleet: Fleet, domain: domain_pb2.Domain) -> None:
        self.name = domain.name
        self.generation = domain.generation
        self.made: list[str] = []
        self._fleet = fleet
        self._parent = domain.name.rpartition("/domains/")[0]

    def write(self, times: int) -> None:
        """Write so many times."""
        for number in range(times):
            self.generation = label(self._fleet, self.name, self.generation + number)
            request = creation(self._parent)
            request.request_id = unique("r")
            self.made.append(acknowledged(self._fleet, self._fleet.domains.CreateDomain, request).name)

    def check(self, watcher: Watcher) -> None:
        """Hold what a watcher was told against what was acknowledged.

        A change that a later one of the same resource has overtaken may be left out for a reader that was away; the
        later one never, nor any other resource.
        """
        watcher.until(lambda: watcher.of(self.name)[-1:] == [self.generation], 20, "the last change")
        watcher.until(lambda: self.made[-1] in watcher.known, 20, "the last domain")
        told = watcher.of(self.name)
        assert told == sorted(told), "no order turned"
        assert [name for name in self.made if watcher.of(name) != [1]] == [], "each once, none left out"
        first_told = [name for kind, name, _ in watcher.history if kind == "put" and name in self.made]
        assert first_told == self.made, "in the order in which they were made"
        assert RESYNCING not in [state for _, state in watcher.statuses], "the history was there to resume from"

    def close(self) -> None:
        """Delete what was made."""
        for name in self.made:
            delete(self._fleet, name)


@contextmanager
def writing(fleet: Fleet, node: str) -> Iterator[Writer]:
    """Write for the length of a `with` block."""
    with domain(fleet, node) as made:
        writer = Writer(fleet, made)
        try:
            yield writer
        finally:
            writer.close()


@pytest.fixture
def one(fleet: Fleet, nodes: list[str]) -> Iterator[domain_pb2.Domain]:
    """Yield a domain on the first node."""
    with domain(fleet, nodes[0]) as made:
        yield made


# One node.


def test_a_snapshot_and_then_every_change_in_order(
    fleet: Fleet, environment: dict[str, str], nodes: list[str], one: domain_pb2.Domain
) -> None:
    with watching(environment, snapshot(nodes[0])) as watcher:
        watcher.until(lambda: watcher.snapshots_ended, 5, "the end of the snapshot")
        assert watcher.known[one.name] == one
        for number in range(10):
            label(fleet, one.name, number)
        verb(fleet, "StartDomain", one.name)
        with domain(fleet, nodes[0]) as other:
            pass
        watcher.until(lambda: ("delete", other.name, 0) in watcher.history, 5, "the last change")
        assert watcher.snapshots_ended == 1
        told = watcher.of(one.name)
        assert told == sorted(told)
        assert set(range(1, 12)) <= set(told), "every generation"
        assert watcher.known[one.name] == get(fleet, one.name)
        assert watcher.known[one.name].status.state == State.DOMAIN_STATE_RUNNING
        assert watch_pb2.EVENT_TYPE_DOMAIN_STATE_CHANGED in watcher.of(one.name, "event")
        assert watcher.of(other.name, "put", "delete") == [1, 0]


def test_a_token_loses_nothing(
    fleet: Fleet, environment: dict[str, str], nodes: list[str], one: domain_pb2.Domain
) -> None:
    with watching(environment, snapshot(nodes[0])) as watcher:
        watcher.until(lambda: watcher.snapshots_ended, 5, "the end of the snapshot")
        label(fleet, one.name, 0)
        watcher.until(lambda: watcher.of(one.name)[-1] == 2, 5, "the change")
        token = watcher.token
    for number in range(1, 6):
        label(fleet, one.name, number)
    gone = create(fleet, nodes[0])
    delete(fleet, gone.name)
    with watching(environment, resumed(nodes[0], token)) as again:
        again.until(lambda: ("delete", gone.name, 0) in again.history, 5, "what has happened meanwhile")
        assert again.of(one.name) == [3, 4, 5, 6, 7]
        assert again.of(gone.name, "put", "delete") == [1, 0]
        assert not again.snapshots_ended
        label(fleet, one.name, 9)
        again.until(lambda: again.of(one.name)[-1] == 8, 5, "what happens now")
    # The token may be used any number of times.
    with watching(environment, resumed(nodes[0], token)) as third:
        third.until(lambda: third.of(one.name)[-1:] == [8], 5, "all of it")
        assert third.of(one.name) == [3, 4, 5, 6, 7, 8]


def test_the_token_of_a_list_goes_on_where_the_list_stands(
    fleet: Fleet, environment: dict[str, str], nodes: list[str], one: domain_pb2.Domain
) -> None:
    listed = fleet.domains.ListDomains(domain_pb2.ListDomainsRequest(parent=nodes[0]))
    assert one in listed.domains
    label(fleet, one.name, 1)
    with watching(environment, resumed(nodes[0], listed.resume_token)) as watcher:
        watcher.until(lambda: watcher.of(one.name), 5, "the change after the list")
        assert watcher.of(one.name) == [2]


def test_filters_types_and_views_of_a_watch(
    fleet: Fleet, environment: dict[str, str], nodes: list[str], one: domain_pb2.Domain
) -> None:
    request = snapshot(nodes[0], filter='labels.number="1"', view=resource_pb2.RESOURCE_VIEW_BASIC)
    with watching(environment, request) as watcher:
        watcher.until(lambda: watcher.snapshots_ended, 5, "the end of the snapshot")
        assert one.name not in watcher.known
        label(fleet, one.name, 1)
        watcher.until(lambda: one.name in watcher.known, 5, "the domain that now matches")
        assert not watcher.known[one.name].HasField("spec")
        label(fleet, one.name, 2)
        watcher.until(lambda: one.name not in watcher.known, 5, "the domain that no longer does")
        assert ("delete", one.name, 0) in watcher.history


def test_bookmarks_come_in_quiet_times(environment: dict[str, str], nodes: list[str]) -> None:
    request = snapshot(nodes[1], bookmark_interval={"seconds": 1})
    with watching(environment, request) as watcher:
        watcher.until(lambda: watcher.bookmarks >= 2, 6, "two bookmarks")
        assert watcher.token


def test_events_are_listed_afterwards(fleet: Fleet, nodes: list[str], one: domain_pb2.Domain) -> None:
    verb(fleet, "StartDomain", one.name)
    verb(fleet, "StopDomain", one.name, mode=domain_pb2.STOP_MODE_FORCE)
    stub = fleet.channel.unary_unary(
        "/virtfleet.compute.v1.WatchService/ListEvents",
        watch_pb2.ListEventsRequest.SerializeToString,
        watch_pb2.ListEventsResponse.FromString,
    )
    for parent in (nodes[0], "nodes/-"):
        request = watch_pb2.ListEventsRequest(parent=parent, page_size=500)
        found = [event for event in fleet.pages(stub, request) if event.resource == one.name]
        states = [
            event.domain_state_changed.new_state
            for event in found
            if event.type == watch_pb2.EVENT_TYPE_DOMAIN_STATE_CHANGED
        ]
        assert State.DOMAIN_STATE_RUNNING in states
        assert states[-1] == State.DOMAIN_STATE_SHUT_OFF
        assert {event.uid for event in found} == {one.uid}


# The fleet.


def test_the_fleets_watch_says_where_each_node_stands(
    fleet: Fleet, environment: dict[str, str], nodes: list[str]
) -> None:
    with (
        domain(fleet, nodes[0]) as here,
        domain(fleet, nodes[1]) as there,
        watching(environment, snapshot("nodes/-")) as watcher,
    ):
        watcher.until(lambda: {here.name, there.name} <= set(watcher.known), 5, "the domains of both nodes")
        watcher.until(lambda: watcher.snapshots_ended, 5, "the end of the snapshot")
        assert all(state == LIVE for _, state in watcher.statuses), "both nodes are heard"
        for number in range(3):
            label(fleet, here.name, number)
            label(fleet, there.name, number)
        for made in (here, there):
            watcher.until(lambda name=made.name: watcher.of(name)[-1] == 4, 5, "the last change")  # type: ignore[misc]  # binds the round's own
            assert watcher.of(made.name) == [1, 2, 3, 4]


def test_nodes_are_watched_too(fleet: Fleet, environment: dict[str, str], nodes: list[str]) -> None:
    request = fleet_watch_pb2.WatchResourcesRequest(
        resource_types=[fleet_watch_pb2.RESOURCE_TYPE_NODE], snapshot=type_watch_pb2.WatchSnapshot()
    )
    with watching(environment, request) as watcher:
        watcher.until(lambda: watcher.snapshots_ended, 5, "the end of the snapshot")
        assert set(watcher.known) == set(nodes)
        try:
            fleet.nodes.CordonNode(node_pb2.CordonNodeRequest(name=nodes[1]))
            watcher.until(lambda: not watcher.known[nodes[1]].spec.schedulable, 5, "the cordon")
            error = refused(lambda: fleet.domains.CreateDomain(creation(nodes[1])))
            assert (error.code().name, error.reason) == ("FAILED_PRECONDITION", "NODE_CORDONED"), error
        finally:
            fleet.nodes.UncordonNode(node_pb2.UncordonNodeRequest(name=nodes[1]))
        watcher.until(lambda: watcher.known[nodes[1]].spec.schedulable, 5, "the end of it")
        with domain(fleet, nodes[1]):
            pass


def test_pools_and_networks_are_watched(fleet: Fleet, environment: dict[str, str], nodes: list[str]) -> None:
    begin = type_watch_pb2.WatchSnapshot()
    storage = storage_watch_pb2.WatchResourcesRequest(parent="nodes/-", snapshot=begin)
    network = network_watch_pb2.WatchResourcesRequest(parent="nodes/-", snapshot=begin)
    with watching(environment, storage) as pools, watching(environment, network) as networks:
        pools.until(lambda: pools.snapshots_ended, 5, "the end of the snapshot")
        networks.until(lambda: networks.snapshots_ended, 5, "the end of the snapshot")
        pool = pool_pb2.CreatePoolRequest(parent=nodes[0], pool_id=unique("pool"), start=True)
        pool.pool.spec.dir.SetInParent()
        lan = network_pb2.CreateNetworkRequest(parent=nodes[0], network_id=unique("net"))
        lan.network.spec.isolated.SetInParent()
        made_pool = fleet.wait(fleet.pools.CreatePool(pool), pool_pb2.Pool)
        made_network = fleet.wait(fleet.networks.CreateNetwork(lan), network_pb2.Network)
        fleet.pools.StopPool(pool_pb2.StopPoolRequest(name=made_pool.name))
        fleet.pools.DeletePool(pool_pb2.DeletePoolRequest(name=made_pool.name))
        fleet.networks.DeleteNetwork(network_pb2.DeleteNetworkRequest(name=made_network.name))
        for watcher, name in ((pools, made_pool.name), (networks, made_network.name)):
            watcher.until(lambda w=watcher, n=name: ("delete", n, 0) in w.history, 5, "the deletion")  # type: ignore[misc]  # binds the round's own
            assert watcher.of(name)[0] == 1


# Processes that die.


def states(watcher: Watcher, node: str) -> list[int]:
    """Return what was told about a node, in order."""
    return [state for told, state in watcher.statuses if told == node]


def test_a_killed_compute_service_leaves_no_gap_in_the_fleets_watch(
    fleet: Fleet, environment: dict[str, str], nodes: list[str], run_folder: Path
) -> None:
    with (
        writing(fleet, nodes[0]) as here,
        writing(fleet, nodes[1]) as there,
        watching(environment, snapshot("nodes/-")) as watcher,
    ):
        watcher.until(lambda: {here.name, there.name} <= set(watcher.known), 5, "the domains of both nodes")
        here.write(3)
        kill(run_folder, f"{nodes[0].removeprefix('nodes/')}/compute")
        there.write(5)
        here.write(5)
        here.check(watcher)
        there.check(watcher)
        watcher.until(lambda: states(watcher, nodes[0])[-1:] == [LIVE], 20, "that the node is back")
        assert STALE in states(watcher, nodes[0]), "it was told that the node was away"
        assert set(states(watcher, nodes[1])) <= {LIVE}


def test_a_killed_compute_service_leaves_no_gap_in_its_own_watch(
    fleet: Fleet, environment: dict[str, str], nodes: list[str], run_folder: Path
) -> None:
    with writing(fleet, nodes[1]) as writer, watching(environment, snapshot(nodes[1])) as watcher:
        watcher.until(lambda: watcher.snapshots_ended, 5, "the end of the snapshot")
        writer.write(3)
        kill(run_folder, f"{nodes[1].removeprefix('nodes/')}/compute")
        writer.write(3)
        writer.check(watcher)
        assert watcher.snapshots_ended == 1, "it went on from its token"


def test_a_killed_gateway_is_nothing_but_a_pause(
    fleet: Fleet, environment: dict[str, str], nodes: list[str], run_folder: Path
) -> None:
    with (
        writing(fleet, nodes[0]) as here,
        writing(fleet, nodes[1]) as there,
        watching(environment, snapshot("nodes/-")) as watcher,
        watching(environment, snapshot(nodes[0])) as own,
    ):
        watcher.until(lambda: watcher.snapshots_ended, 5, "the end of the snapshot")
        own.until(lambda: own.snapshots_ended, 5, "the end of the snapshot")
        here.write(3)
        there.write(3)
        kill(run_folder, "gateway")
        here.write(3)
        there.write(3)
        here.check(watcher)
        there.check(watcher)
        here.check(own)
        assert (watcher.snapshots_ended, own.snapshots_ended) == (1, 1), "both went on from their tokens"


def test_a_frozen_node_is_told_as_stale_and_its_changes_follow(
    fleet: Fleet, environment: dict[str, str], nodes: list[str], run_folder: Path
) -> None:
    with writing(fleet, nodes[1]) as there, watching(environment, snapshot("nodes/-")) as watcher:
        watcher.until(lambda: there.name in watcher.known, 5, "the domain")
        with frozen(run_folder, nodes[1].removeprefix("nodes/")):
            watcher.until(lambda: states(watcher, nodes[1])[-1:] == [STALE], 10, "that the node is silent")
        there.write(2)
        there.check(watcher)
        watcher.until(lambda: states(watcher, nodes[1])[-1:] == [LIVE], 20, "that the node is back")

"""What dies, freezes or goes away takes nothing else with it, and nothing is left undone."""

from __future__ import annotations

import os
import resource
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from google.longrunning import operations_pb2
from google.protobuf import duration_pb2

from tests.fleet.rig import (
    State,
    Wire,
    caller,
    create,
    creation,
    credentials_of,
    delete,
    descriptors,
    domain,
    frozen,
    get,
    kill,
    pid_of,
    refused,
    seconds,
    small_spec,
    unfinished,
    unique,
    until,
    verb,
)
from tests.fleet.stand import DOMAINS
from tests.fleet.test_failed_starts import processes_of
from virtfleet.compute.v1 import domain_pb2, stats_pb2
from virtfleet.fleet.v1 import node_pb2
from virtfleet.storage.v1 import pool_pb2
from virtfleet_client import Fleet
from virtfleet_client.errors import DeadlineExceeded, from_call, from_status
from virtfleet_client.operations import metadata_of

READY = node_pb2.NODE_STATE_READY

pytestmark = pytest.mark.usefixtures("made_whole")


def state_of(fleet: Fleet, node: str) -> int:
    """Return how the gateway sees a node."""
    found: int = fleet.nodes.GetNode(node_pb2.GetNodeRequest(name=node), timeout=5).status.state
    return found


# Processes that die.


@pytest.mark.parametrize(
    ("driver", "method", "reason"),
    [
        # A guest in the memory of the service ends with it, so it has stopped.
        ("test", "StopDomain", ""),
        ("test", "RebootDomain", "HYPERVISOR_FAILED"),
        # A real one has no system that would heed the button, and runs on.
        ("qemu", "StopDomain", "CHANGE_ROLLED_BACK"),
    ],
)
def test_an_operation_in_flight_is_settled_after_a_crash(
    fleet: Fleet, nodes: list[str], run_folder: Path, driver: str, method: str, reason: str
) -> None:
    spec = small_spec()
    spec.driver = driver
    if driver == "test":
        spec.test.power_button_delay.FromSeconds(600)
    with domain(fleet, nodes[0], spec=spec, start="running") as made:
        fields: dict[str, Any] = {"mode": domain_pb2.STOP_MODE_GRACEFUL} if method == "StopDomain" else {}
        request = getattr(domain_pb2, f"{method}Request")(
            name=made.name,
            request_id=unique("r"),
            grace_period=duration_pb2.Duration(seconds=600),
            inline_wait=duration_pb2.Duration(nanos=1_000_000),
            **fields,
        )
        operation = getattr(fleet.domains, method)(request)
        assert not operation.done
        guests = processes_of(made.uid)
        assert guests == ([str(made.status.pid)] if driver == "qemu" else [])
        kill(run_folder, f"{nodes[0].removeprefix('nodes/')}/compute")
        wanted = operations_pb2.GetOperationRequest(name=operation.name)
        ended = until(
            lambda: one if (one := fleet.operations.GetOperation(wanted, timeout=5)).done else None,
            60,
            "the operation is settled",
        )
        assert metadata_of(ended).target == made.name
        assert (from_status(ended.error).reason if ended.HasField("error") else "") == reason, ended
        after = get(fleet, made.name)
        runs_on = driver == "qemu"
        assert after.status.state == (State.DOMAIN_STATE_RUNNING if runs_on else State.DOMAIN_STATE_SHUT_OFF)
        assert processes_of(made.uid) == guests, "the same process, or none"
        # The same call again is told the same, and a new one is free to act.
        again = getattr(fleet.domains, method)(request)
        assert again.name == operation.name
        assert again.done
        running = verb(fleet, "StartDomain", made.name).status
        assert running.state == State.DOMAIN_STATE_RUNNING
        assert (running.runtime_id == made.status.runtime_id) == runs_on
        assert processes_of(made.uid) == guests


@pytest.mark.parametrize("place", ["n1/compute", "gateway"])
def test_a_process_that_is_asked_to_end_under_load_leaves_nothing_undone(
    fleet: Fleet, wire: Wire, nodes: list[str], run_folder: Path, place: str
) -> None:
    spec = small_spec()
    spec.test.power_button_delay.FromMilliseconds(1500)
    with ExitStack() as stack:
        made = [stack.enter_context(domain(fleet, nodes[0], spec=spec, start="running")) for _ in range(10)]
        calls = [
            wire.begin(
                "virtfleet.compute.v1.DomainService/StopDomain",
                domain_pb2.StopDomainRequest(name=one.name, mode=domain_pb2.STOP_MODE_GRACEFUL, inline_wait=seconds(9)),
            )
            for one in made
        ]
        until(lambda: len(unfinished(fleet, nodes[0])) == len(made), 5, "all are at work")
        kill(run_folder, place, signal.SIGTERM)
        for call in calls:
            failure = call.exception(timeout=20)
            if failure is None:
                answer = operations_pb2.Operation.FromString(call.result())
                assert answer.done
                assert not answer.HasField("error"), answer
            else:
                told = from_call(failure.code(), failure.details(), failure.trailing_metadata())
                assert (told.code().name, told.reason) == ("UNAVAILABLE", "SERVICE_DRAINING"), failure
        until(lambda: not unfinished(fleet, nodes[0]), 60, "every operation is settled")
        for one in made:
            after = until(
                lambda name=one.name: (  # type: ignore[misc]  # binds the round's own
                    found if (found := get(fleet, name)).status.state == State.DOMAIN_STATE_SHUT_OFF else None
                ),
                10,
                "the guest has stopped",
            )
            # By itself, and not with a service that did not wait for it.
            assert after.status.state_reason == domain_pb2.DOMAIN_STATE_REASON_GUEST_SHUTDOWN, after.status


def test_a_killed_service_comes_back_with_all_that_was_acknowledged(
    fleet: Fleet, nodes: list[str], run_folder: Path
) -> None:
    pool = pool_pb2.CreatePoolRequest(parent=nodes[1], pool_id=unique("pool"), start=True)
    pool.pool.spec.dir.SetInParent()
    made_pool = fleet.wait(fleet.pools.CreatePool(pool), pool_pb2.Pool)
    request = creation(nodes[1], labels={"a": "b"})
    request.request_id = unique("r")
    made = fleet.wait(fleet.domains.CreateDomain(request), domain_pb2.Domain)
    try:
        for service in ("compute", "storage", "network"):
            kill(run_folder, f"{nodes[1].removeprefix('nodes/')}/{service}")
        until(lambda: get(fleet, made.name) == made, 20, "the domain is as it was")
        again = fleet.wait(fleet.domains.CreateDomain(request), domain_pb2.Domain)
        assert again.uid == made.uid, "the same call is told the same"
        request.domain.labels["a"] = "c"
        error = refused(lambda: fleet.domains.CreateDomain(request))
        assert error.reason == "REQUEST_ID_REUSED", error

        def running() -> bool:
            found = fleet.pools.GetPool(pool_pb2.GetPoolRequest(name=made_pool.name), timeout=5)
            return bool(found.uid == made_pool.uid and found.status.state == pool_pb2.POOL_STATE_RUNNING)

        until(running, 20, "the pool runs again")
    finally:
        delete(fleet, made.name)
    until(lambda: state_of(fleet, nodes[1]) == READY, 30, "the node is ready")
    fleet.wait(fleet.pools.StopPool(pool_pb2.StopPoolRequest(name=made_pool.name)), pool_pb2.Pool)
    fleet.pools.DeletePool(pool_pb2.DeletePoolRequest(name=made_pool.name))


def test_the_others_answer_while_a_service_is_started_again(fleet: Fleet, nodes: list[str], run_folder: Path) -> None:
    node = nodes[0].removeprefix("nodes/")
    with domain(fleet, nodes[1]) as there:
        process = pid_of(run_folder, f"{node}/storage")
        kill(run_folder, f"{node}/storage")
        assert not Path(f"/proc/{process}").exists()
        assert get(fleet, there.name) == there
        listed = fleet.domains.ListDomains(domain_pb2.ListDomainsRequest(parent=nodes[0]), timeout=5)
        assert listed is not None, "compute answers without storage"
        until(
            lambda: fleet.pools.ListPools(pool_pb2.ListPoolsRequest(parent=nodes[0]), timeout=5) is not None,
            20,
            "storage is back",
        )


# A node that freezes.


def test_a_frozen_node_takes_nobodys_time(fleet: Fleet, wire: Wire, nodes: list[str], run_folder: Path) -> None:
    away, alive = nodes[1], nodes[0]
    with domain(fleet, alive) as here, domain(fleet, away) as there:
        request = domain_pb2.ListDomainsRequest(parent="nodes/-")
        until(
            lambda: {here.name, there.name} <= {one.name for one in fleet.domains.ListDomains(request).domains},
            5,
            "the fleet lists both",
        )
        with frozen(run_folder, away.removeprefix("nodes/")):
            began = time.monotonic()
            until(lambda: state_of(fleet, away) != READY, 7, "the node is seen as not ready")
            assert time.monotonic() - began < 7
            seen = fleet.nodes.GetNode(node_pb2.GetNodeRequest(name=away))
            assert seen.status.state == node_pb2.NODE_STATE_NOT_READY
            assert seen.status.reason
            assert time.time() - seen.status.last_seen_time.ToNanoseconds() / 1e9 < 15
            assert state_of(fleet, alive) == READY

            # Each service of the node is noticed by its own silence; the node is not ready with the first of them.
            until(lambda: fleet.domains.ListDomains(request).unreachable, 7, "its compute service is noticed too")
            began = time.monotonic()
            listed = fleet.domains.ListDomains(request, timeout=5)
            assert time.monotonic() - began < 1, "the list does not wait for the node"
            assert here.name in {one.name for one in listed.domains}
            assert there.name not in {one.name for one in listed.domains}
            assert [one.node for one in listed.unreachable] == [away]
            failure = from_status(listed.unreachable[0].status)
            assert (failure.code().name, failure.reason) == ("UNAVAILABLE", "NODE_UNREACHABLE"), failure
            assert listed.unreachable[0].last_seen_time.seconds
            assert {one.node for one in listed.freshness} == {alive}

            stale = fleet.domains.ListDomains(
                domain_pb2.ListDomainsRequest(parent="nodes/-", allow_stale=True), timeout=5
            )
            assert there.name in {one.name for one in stale.domains}

            began = time.monotonic()
            through = fleet.domains.ListDomains(
                domain_pb2.ListDomainsRequest(parent="nodes/-", read_through=True), timeout=3
            )
            assert time.monotonic() - began < 3, "the deadline is divided"
            assert here.name in {one.name for one in through.domains}
            assert [one.node for one in through.unreachable] == [away]

            counted = fleet.stats.BatchGetDomainStats(stats_pb2.BatchGetDomainStatsRequest(parent="nodes/-"), timeout=3)
            assert here.name in {one.name for one in counted.stats}
            assert [one.node for one in counted.unreachable] == [away]

            for _ in range(5):
                began = time.monotonic()
                verb(fleet, "StartDomain", here.name)
                verb(fleet, "StopDomain", here.name, mode=domain_pb2.STOP_MODE_FORCE)
                assert time.monotonic() - began < 1, "the other node does not notice"

            began = time.monotonic()
            error = refused(lambda: wire(f"{DOMAINS}/GetDomain", domain_pb2.GetDomainRequest(name=there.name)))
            assert (error.code().name, error.reason) == ("UNAVAILABLE", "NODE_UNREACHABLE"), error
            assert error.metadata["node"] == away
            assert time.monotonic() - began < 3
        until(lambda: state_of(fleet, away) == READY, 20, "the node is ready again")
        until(lambda: get(fleet, there.name) == there, 10, "its domain is as it was")
        until(
            lambda: (
                there.name in {one.name for one in fleet.domains.ListDomains(request).domains}
                and not fleet.domains.ListDomains(request).unreachable
            ),
            10,
            "the fleet lists it again",
        )


def test_a_start_that_is_asked_of_a_frozen_node_is_done_once(
    fleet: Fleet, wire: Wire, nodes: list[str], run_folder: Path
) -> None:
    """Before it is known that the node does not answer, and after; when it goes on there is one guest."""
    spec = small_spec()
    spec.driver = "qemu"
    with domain(fleet, nodes[1], spec=spec) as stopped:
        start = domain_pb2.StartDomainRequest(name=stopped.name, request_id=unique("r"))
        with frozen(run_folder, nodes[1].removeprefix("nodes/")):
            began = time.monotonic()
            error = refused(lambda: fleet.domains.StartDomain(start, timeout=1))
            assert error.code().name == "DEADLINE_EXCEEDED", error
            assert time.monotonic() - began < 2, "a slow node costs the deadline and no more"

            def away() -> bool:
                request = domain_pb2.ListDomainsRequest(parent="nodes/-")
                return [one.node for one in fleet.domains.ListDomains(request).unreachable] == [nodes[1]]

            until(away, 10, "the node is seen as away")

            def held_back() -> bool:
                error = refused(lambda: wire(f"{DOMAINS}/StartDomain", start))
                assert (error.code().name, error.reason) == ("UNAVAILABLE", "NODE_UNREACHABLE"), error
                return error.metadata["sent"] == "false"

            # Its silence is noticed first, its connection is given up a moment later: until then calls are sent.
            until(held_back, 10, "the start is not sent any more")
            assert processes_of(stopped.uid) == []
        started = until(
            lambda: fleet.wait(fleet.domains.StartDomain(start, timeout=5), domain_pb2.Domain), 20, "it starts"
        )
        assert processes_of(stopped.uid) == [str(started.status.pid)]
        assert get(fleet, stopped.name).status.runtime_id == started.status.runtime_id
        assert starts_of(fleet, nodes[1], stopped.name) == 1


def starts_of(fleet: Fleet, node: str, name: str) -> int:
    """Return how often a domain was to be started, as the operations of its service say."""
    request = operations_pb2.ListOperationsRequest(name=f"{node}/services/compute")
    listed = [metadata_of(one) for one in fleet.pages(fleet.operations.ListOperations, request)]
    return sum(one.target == name and one.method.endswith("StartDomain") for one in listed)


def test_one_frozen_service_leaves_the_others(fleet: Fleet, nodes: list[str], run_folder: Path) -> None:
    node = nodes[0].removeprefix("nodes/")
    process = pid_of(run_folder, f"{node}/network")
    os.kill(process, signal.SIGSTOP)
    try:
        with domain(fleet, nodes[0], start="running") as made:
            assert made.status.state == State.DOMAIN_STATE_RUNNING, "it needs no network"
        until(lambda: state_of(fleet, nodes[0]) == node_pb2.NODE_STATE_NOT_READY, 8, "the node is not ready")

        def states() -> dict[str, int]:
            seen = fleet.nodes.GetNode(node_pb2.GetNodeRequest(name=nodes[0]))
            return {one.service: one.state for one in seen.status.services}

        # Its silence is noticed first, its connection is given up a moment later.
        until(lambda: states()["network"] != node_pb2.SERVICE_STATE_SERVING, 8, "the service is not away")
        assert states()["compute"] == states()["storage"] == node_pb2.SERVICE_STATE_SERVING
    finally:
        os.kill(process, signal.SIGCONT)


# Clients that never speak.


@pytest.fixture
def many_files() -> Iterator[None]:
    """Let the process of the test open as many files as the system lets it."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("many_files")
def test_2000_connections_that_never_speak(
    fleet: Fleet, environment: dict[str, str], nodes: list[str], run_folder: Path
) -> None:
    host, _, port = environment["VIRTFLEET_ADDRESS"].rpartition(":")
    gateway = pid_of(run_folder, "gateway")
    opened = descriptors(gateway)
    silent: list[socket.socket] = []
    try:
        silent.extend(socket.create_connection((host, int(port)), timeout=5) for _ in range(2000))
        until(lambda: descriptors(gateway) >= opened + 2000, 20, "the gateway holds all of them")
        began = time.monotonic()
        with caller(environment, credentials_of(environment)) as person:
            with domain(person, nodes[0], start="running") as made:
                assert made.status.state == State.DOMAIN_STATE_RUNNING
            for _ in range(20):
                person.domains.ListDomains(domain_pb2.ListDomainsRequest(parent="nodes/-"), timeout=5)
        assert time.monotonic() - began < 20, "the others are served at once"
    finally:
        for connection in silent:
            connection.close()
    until(lambda: descriptors(gateway) < opened + 50, 20, "the gateway has let go of them")
    made = create(fleet, nodes[0])
    delete(fleet, made.name)


def test_a_deadline_that_passes_makes_no_second_domain(fleet: Fleet, nodes: list[str]) -> None:
    spec = small_spec()
    spec.driver = "qemu"
    request = creation(nodes[0], start="running", spec=spec)
    request.request_id = unique("r")
    # The last of them is over when the node is at work.
    for timeout in (0.0002, 0.001, 0.002, 0.004, 0.03):
        with suppress(DeadlineExceeded):  # whether the call has reached the node or not
            fleet.domains.CreateDomain(request, timeout=timeout)
    one = fleet.wait(fleet.domains.CreateDomain(request, timeout=10), domain_pb2.Domain)
    try:
        assert get(fleet, one.name).uid == one.uid
        assert get(fleet, one.name).status.runtime_id == one.status.runtime_id
        assert processes_of(one.uid) == [str(one.status.pid)]
    finally:
        delete(fleet, one.name)
    assert processes_of(one.uid) == []

"""Operations: what they tell, how they are waited for, cancelled, deleted and watched."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.longrunning import operations_pb2
from google.protobuf import duration_pb2, empty_pb2

from tests.fleet.rig import (
    SERVICES,
    Refusal,
    State,
    Wire,
    domain,
    frozen,
    get,
    refusal_of,
    refused,
    small_spec,
    unique,
    until,
    verb,
)
from virtfleet.common.v1 import operations_pb2 as common_pb2
from virtfleet.compute.v1 import domain_pb2, domain_spec_pb2
from virtfleet.storage.v1 import pool_pb2
from virtfleet.type.v1 import watch_pb2
from virtfleet_client import Fleet
from virtfleet_client.errors import from_status
from virtfleet_client.operations import metadata_of

RUNNING, SHUT_OFF = State.DOMAIN_STATE_RUNNING, State.DOMAIN_STATE_SHUT_OFF
GRACEFUL = domain_pb2.STOP_MODE_GRACEFUL


def stubborn(seconds: float = 3600) -> domain_spec_pb2.DomainSpec:
    """Return the spec of a domain that takes its time to heed the power button."""
    spec = small_spec()
    spec.test.power_button_delay.FromMilliseconds(int(seconds * 1000))
    return spec


@pytest.fixture
def stopping(fleet: Fleet, nodes: list[str]) -> Iterator[tuple[domain_pb2.Domain, operations_pb2.Operation]]:
    """Yield a domain that is long about to stop, and the operation that waits for it."""
    with domain(fleet, nodes[0], spec=stubborn(), start="running") as made:
        request = domain_pb2.StopDomainRequest(
            name=made.name,
            mode=GRACEFUL,
            grace_period=duration_pb2.Duration(seconds=600),
            inline_wait=duration_pb2.Duration(nanos=1_000_000),
        )
        operation = fleet.domains.StopDomain(request)
        assert not operation.done
        yield made, operation
        for name in running_on(fleet, made.name):
            fleet.operations.CancelOperation(operations_pb2.CancelOperationRequest(name=name))
            wait = operations_pb2.WaitOperationRequest(name=name, timeout=duration_pb2.Duration(seconds=10))
            assert fleet.operations.WaitOperation(wait).done


def running_on(fleet: Fleet, name: str) -> list[str]:
    """Return the operations that work on a domain."""
    service = "/".join([*name.split("/")[:2], "services/compute"])
    request = operations_pb2.ListOperationsRequest(name=service, filter="done=false")
    listed = fleet.pages(fleet.operations.ListOperations, request)
    return [one.name for one in listed if metadata_of(one).target == name]


Stopping = tuple[domain_pb2.Domain, operations_pb2.Operation]


def test_an_operation_tells_what_it_does(fleet: Fleet, nodes: list[str], stopping: Stopping) -> None:
    made, operation = stopping
    assert operation.name.startswith(f"{nodes[0]}/services/compute/operations/")
    metadata = metadata_of(operation)
    assert (metadata.target, metadata.target_uid) == (made.name, made.uid)
    assert metadata.method.endswith("DomainService.StopDomain")
    assert metadata.principal.endswith("/user/admin")
    assert metadata.request_id
    assert metadata.cancellable
    until(lambda: list(get(fleet, made.name).status.operations) == [operation.name], 5, "the domain shows it")
    got = fleet.operations.GetOperation(operations_pb2.GetOperationRequest(name=operation.name))
    assert got == operation
    began = time.monotonic()
    waited = fleet.operations.WaitOperation(
        operations_pb2.WaitOperationRequest(name=operation.name, timeout={"nanos": 300_000_000})
    )
    assert not waited.done
    assert 0.25 < time.monotonic() - began < 3
    listed = list(
        fleet.pages(
            fleet.operations.ListOperations,
            operations_pb2.ListOperationsRequest(name=f"{nodes[0]}/services/compute", filter="done=false", page_size=2),
        )
    )
    assert operation.name in [one.name for one in listed]
    assert not any(one.done for one in listed)


def test_a_second_operation_on_the_same_domain_is_told_the_first(fleet: Fleet, stopping: Stopping) -> None:
    made, operation = stopping
    before = get(fleet, made.name)
    error = refused(lambda: verb(fleet, "SuspendDomain", made.name))
    assert (error.code().name, error.reason) == ("ABORTED", "OPERATION_CONFLICT"), error
    assert error.metadata["operation"] == operation.name
    assert get(fleet, made.name) == before


def test_a_cancelled_operation_ends_and_leaves_the_guest(fleet: Fleet, stopping: Stopping) -> None:
    made, operation = stopping
    fleet.operations.CancelOperation(operations_pb2.CancelOperationRequest(name=operation.name))
    ended = fleet.operations.WaitOperation(
        operations_pb2.WaitOperationRequest(name=operation.name, timeout={"seconds": 5})
    )
    assert ended.done
    error = from_status(ended.error)
    assert (error.code().name, error.reason) == ("CANCELLED", "OPERATION_CANCELLED"), error
    after = get(fleet, made.name)
    assert (after.status.state, after.status.runtime_id) == (RUNNING, made.status.runtime_id)
    assert not after.status.operations
    fleet.operations.CancelOperation(
        operations_pb2.CancelOperationRequest(name=operation.name)
    )  # it has ended: no harm
    fleet.operations.DeleteOperation(operations_pb2.DeleteOperationRequest(name=operation.name))
    gone = operations_pb2.GetOperationRequest(name=operation.name)
    assert refused(lambda: fleet.operations.GetOperation(gone)).reason == "RESOURCE_NOT_FOUND"


def test_an_operation_outlives_its_caller(fleet: Fleet, wire: Wire, nodes: list[str]) -> None:
    with domain(fleet, nodes[0], spec=stubborn(1.0), start="running") as made:
        request = domain_pb2.StopDomainRequest(
            name=made.name, mode=GRACEFUL, inline_wait=duration_pb2.Duration(seconds=30)
        )
        call = wire.begin("virtfleet.compute.v1.DomainService/StopDomain", request)
        until(lambda: running_on(fleet, made.name), 5, "the operation runs")
        call.cancel()
        until(lambda: get(fleet, made.name).status.state == SHUT_OFF, 5, "the guest stops all the same")


def test_a_running_operation_is_not_deleted(fleet: Fleet, stopping: Stopping) -> None:
    _, operation = stopping
    request = operations_pb2.DeleteOperationRequest(name=operation.name)
    error = refused(lambda: fleet.operations.DeleteOperation(request))
    assert (error.code().name, error.reason) == ("FAILED_PRECONDITION", "WRONG_STATE"), error
    assert not fleet.operations.GetOperation(operations_pb2.GetOperationRequest(name=operation.name)).done


def test_operations_are_watched_from_their_beginning_to_their_end(fleet: Fleet, nodes: list[str]) -> None:
    with domain(fleet, nodes[0], spec=stubborn(0.5), start="running") as made:
        request = common_pb2.WatchOperationsRequest(
            parent=f"{nodes[0]}/services/compute", target=made.name, snapshot=watch_pb2.WatchSnapshot()
        )
        stream = fleet.operation_watches.WatchOperations(request, timeout=20)
        seen: list[operations_pb2.Operation] = []
        for answer in stream:
            if answer.WhichOneof("marker") == "snapshot_end":
                break
        stop = domain_pb2.StopDomainRequest(
            name=made.name, mode=GRACEFUL, inline_wait=duration_pb2.Duration(nanos=1_000_000)
        )
        operation = fleet.domains.StopDomain(stop)
        for answer in stream:
            seen += [one for one in answer.operations if one.name == operation.name]
            if seen and seen[-1].done:
                break
        stream.cancel()
        assert [one.done for one in seen] == sorted(one.done for one in seen), "done comes last"
        assert not seen[0].done
        found = domain_pb2.Domain()
        assert seen[-1].response.Unpack(found)
        assert found.status.state == SHUT_OFF


def listed(fleet: Fleet, name: str, **fields: Any) -> list[str]:
    """Return the names of the operations in all pages of a list."""
    request = operations_pb2.ListOperationsRequest(name=name, **fields)
    return [one.name for one in fleet.pages(fleet.operations.ListOperations, request)]


@pytest.fixture
def on_both(fleet: Fleet, nodes: list[str], stopping: Stopping) -> Iterator[str]:
    """Yield an operation that runs; leave ended operations of compute on both nodes, and of storage on the first."""
    pool = unique("p")
    with domain(fleet, nodes[0]), domain(fleet, nodes[1]):
        request = pool_pb2.CreatePoolRequest(
            parent=nodes[0], pool_id=pool, pool=pool_pb2.Pool(spec=pool_pb2.PoolSpec(dir=pool_pb2.DirBackend()))
        )
        made = fleet.wait(fleet.pools.CreatePool(request), pool_pb2.Pool)
        yield stopping[1].name
        fleet.wait(fleet.pools.DeletePool(pool_pb2.DeletePoolRequest(name=made.name)), empty_pb2.Empty)


@pytest.mark.usefixtures("on_both")
def test_operations_of_all_processes_are_one_list(fleet: Fleet, nodes: list[str]) -> None:
    single = {
        f"{node}/services/{service}": listed(fleet, f"{node}/services/{service}")
        for node in nodes
        for service in SERVICES
    }
    everything = [name for place in sorted(single) for name in single[place]]
    assert {name.split("/operations/")[0] for name in everything} >= {
        f"{nodes[0]}/services/compute",
        f"{nodes[0]}/services/storage",
        f"{nodes[1]}/services/compute",
    }
    assert listed(fleet, "nodes/-/services/-") == everything
    # A fleet that other tests have used keeps thousands of ended operations: pages in proportion.
    few = -(-len(everything) // 30)
    for size in (few, few + 1, few + 2):
        assert listed(fleet, "nodes/-/services/-", page_size=size) == everything
    of_compute = [name for name in everything if "/services/compute/" in name]
    assert listed(fleet, "nodes/-/services/compute", page_size=few) == of_compute
    of_first = [name for name in everything if name.startswith(f"{nodes[0]}/")]
    assert listed(fleet, f"{nodes[0]}/services/-", page_size=few) == of_first
    running = listed(fleet, "nodes/-/services/-", filter="done=false")
    assert running == [name for place in sorted(single) for name in listed(fleet, place, filter="done=false")]
    assert running


Mine = Callable[[list[str]], operations_pb2.ListOperationsRequest]

WRONG_LISTS: list[tuple[str, str, str, str, Mine]] = [
    ("no such node", "NOT_FOUND", "NODE_UNKNOWN", "", lambda _: ask("nodes/none/services/-")),
    ("no such service", "INVALID_ARGUMENT", "NAME_MALFORMED", "name", lambda _: ask("nodes/-/services/sound")),
    ("too long", "INVALID_ARGUMENT", "NAME_MALFORMED", "name", lambda _: ask("nodes/-/services/-/x/y")),
    ("filter", "INVALID_ARGUMENT", "FILTER_SYNTAX", "filter", lambda _: ask("nodes/-/services/-", filter="done=(")),
    (
        "token",
        "INVALID_ARGUMENT",
        "PAGE_TOKEN_INVALID",
        "page_token",
        lambda _: ask("nodes/-/services/-", page_token="x"),
    ),
]


def ask(name: str, **fields: Any) -> operations_pb2.ListOperationsRequest:
    """Return a request for a list."""
    return operations_pb2.ListOperationsRequest(name=name, **fields)


@pytest.mark.parametrize(
    ("code", "reason", "field", "mine"), [row[1:] for row in WRONG_LISTS], ids=[row[0] for row in WRONG_LISTS]
)
def test_lists_of_operations_that_mean_nothing_are_refused(
    fleet: Fleet, nodes: list[str], code: str, reason: str, field: str, mine: Mine
) -> None:
    error = refused(lambda: fleet.operations.ListOperations(mine(nodes)))
    assert (error.code().name, error.reason) == (code, reason), error
    assert error.fields == ((field,) if field else ())


@pytest.mark.usefixtures("on_both")
def test_a_token_is_of_its_own_list(fleet: Fleet) -> None:
    page = fleet.operations.ListOperations(ask("nodes/-/services/-", page_size=1))
    assert len(page.operations) == 1
    assert page.next_page_token
    for other in (
        ask("nodes/-/services/compute", page_token=page.next_page_token),
        ask("nodes/-/services/-", page_token=page.next_page_token, filter="done=true"),
    ):
        assert refused(lambda other=other: fleet.operations.ListOperations(other)).reason == "PAGE_TOKEN_INVALID"  # type: ignore[misc]  # bound at once


def test_one_process_is_asked_by_its_whole_name(fleet: Fleet, nodes: list[str]) -> None:
    for name in ("nodes/-/services/-/operations/none", f"{nodes[0]}/services/-/operations/none"):
        error = refused(lambda name=name: fleet.operations.GetOperation(operations_pb2.GetOperationRequest(name=name)))  # type: ignore[misc]  # bound at once
        assert refusal_of(error) == Refusal("INVALID_ARGUMENT", "NAME_MALFORMED", ("name",))


@pytest.mark.usefixtures("on_both", "made_whole")
def test_operations_of_a_frozen_node_are_missing_and_it_is_named(
    fleet: Fleet, nodes: list[str], run_folder: Path
) -> None:
    first = listed(fleet, f"{nodes[0]}/services/-", filter="done=false")
    with frozen(run_folder, nodes[1].removeprefix("nodes/")):
        began = time.monotonic()
        answer = fleet.operations.ListOperations(ask("nodes/-/services/-", filter="done=false"), timeout=4)
        assert time.monotonic() - began < 4
    assert [one.name for one in answer.operations] == first
    assert list(answer.unreachable) == [f"{nodes[1]}/services/{service}" for service in sorted(SERVICES)]

"""Operations: what they tell, how they are waited for, cancelled, deleted and watched."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from google.longrunning import operations_pb2
from google.protobuf import duration_pb2

from tests.fleet.rig import (
    State,
    Wire,
    domain,
    get,
    refused,
    small_spec,
    until,
    verb,
)
from virtfleet.common.v1 import operations_pb2 as common_pb2
from virtfleet.compute.v1 import domain_pb2, domain_spec_pb2
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

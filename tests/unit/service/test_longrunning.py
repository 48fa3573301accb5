from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from google.longrunning import operations_pb2
from google.protobuf import empty_pb2

from tests.unit.service.rig import call, domain, open_store, put
from tests.unit.service.work import TARGET, gated, quick, reason_of, start
from virtfleet.common.v1 import operations_pb2 as common_pb2
from virtfleet.compute.v1 import watch_pb2
from virtfleet.type.v1 import operation_pb2
from virtfleet_service import errors
from virtfleet_service.longrunning import OperationsService, metadata_of
from virtfleet_service.operations import Commit, Job, Operations
from virtfleet_service.store import Store
from virtfleet_service.watch import WatchHub, operation_watch_service


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with open_store(tmp_path / "c.db") as opened:
        await put(opened, domain("a"))
        yield opened


@pytest.fixture
async def operations(store: Store) -> AsyncIterator[Operations]:
    async with Operations(store, service="compute", node="n1").running(drain_seconds=1) as running:
        yield running


async def test_the_service_of_operations(operations: Operations) -> None:
    service = OperationsService(operations)
    gate = asyncio.Event()
    done = await operations.run(call(), start(), target=TARGET, work=quick)
    running = await operations.run(call(), start(inline_seconds=0), target=TARGET, work=gated(gate))
    listing = call("google.longrunning.Operations.ListOperations")

    async def names(filter_: str = "", **rest: object) -> list[str]:
        request = operations_pb2.ListOperationsRequest(name="nodes/n1/services/compute", filter=filter_, **rest)  # type: ignore[arg-type]  # keywords of any field
        return [operation.name for operation in (await service.list_operations(request, listing)).operations]

    assert await names() == [done.name, running.name]
    assert await names("done = true") == [done.name]
    assert await names(f'done = false AND target = "{TARGET}" AND phase = waiting') == [running.name]
    assert await names('target = "nodes/n1/domains/z"') == []
    first = await service.list_operations(
        operations_pb2.ListOperationsRequest(name="nodes/n1/services/compute", page_size=1), listing
    )
    assert len(first.operations) == 1
    assert await names(page_token=first.next_page_token) == [running.name]
    with pytest.raises(errors.PageTokenInvalid):
        await names("done = true", page_token=first.next_page_token)
    with pytest.raises(errors.NameMalformed):
        await service.list_operations(operations_pb2.ListOperationsRequest(name="nodes/n1/services/storage"), listing)

    got = await service.get_operation(
        operations_pb2.GetOperationRequest(name=running.name), call("google.longrunning.Operations.GetOperation")
    )
    assert metadata_of(got).phase == "waiting"
    deleting = call("google.longrunning.Operations.DeleteOperation")
    with pytest.raises(errors.WrongState):
        await service.delete_operation(operations_pb2.DeleteOperationRequest(name=running.name), deleting)
    await service.delete_operation(operations_pb2.DeleteOperationRequest(name=done.name), deleting)
    with pytest.raises(errors.ResourceNotFound):
        await service.delete_operation(operations_pb2.DeleteOperationRequest(name=done.name), deleting)
    waiting = operations_pb2.WaitOperationRequest(name=running.name)
    waiting.timeout.FromMilliseconds(10)
    wait_call = call("google.longrunning.Operations.WaitOperation")
    assert not (await service.wait_operation(waiting, wait_call)).done
    cancel = call("google.longrunning.Operations.CancelOperation")
    assert (
        await service.cancel_operation(operations_pb2.CancelOperationRequest(name=running.name), cancel)
        == empty_pb2.Empty()
    )
    waiting.timeout.FromSeconds(5)
    assert reason_of(await service.wait_operation(waiting, wait_call)) == "OPERATION_CANCELLED"


async def test_an_operation_without_a_name_is_that_of_a_plan_and_nowhere(operations: Operations) -> None:
    service = OperationsService(operations)
    asked = call("google.longrunning.Operations.GetOperation")
    for ask in (
        lambda: service.get_operation(operations_pb2.GetOperationRequest(), asked),
        lambda: service.wait_operation(operations_pb2.WaitOperationRequest(), asked),
        lambda: service.cancel_operation(operations_pb2.CancelOperationRequest(), asked),
        lambda: service.delete_operation(operations_pb2.DeleteOperationRequest(), asked),
    ):
        with pytest.raises(errors.FieldRequired) as refused:
            await ask()
        assert refused.value.field == "name"


@pytest.mark.parametrize(("prefix", "whose"), [(None, "nodes/n1/services/compute"), ("operations/", "the gateway")])
async def test_a_list_of_another_process_is_refused_by_the_name_that_was_asked_for(
    store: Store, prefix: str | None, whose: str
) -> None:
    service = OperationsService(Operations(store, service="compute", node="n1", prefix=prefix))
    request = operations_pb2.ListOperationsRequest(name="gateways/other")
    with pytest.raises(errors.NameMalformed) as refused:
        await service.list_operations(request, call("google.longrunning.Operations.ListOperations"))
    assert refused.value.metadata["name"] == "gateways/other"
    assert refused.value.message.endswith(f"those of {whose}")


async def test_operations_of_others_are_hidden(operations: Operations) -> None:
    service = OperationsService(operations)
    done = await operations.run(call(), start(), target=TARGET, work=quick)
    listing = call("google.longrunning.Operations.ListOperations", roles=("admin@nodes/n1/domains/b",))
    found = await service.list_operations(
        operations_pb2.ListOperationsRequest(name="nodes/n1/services/compute"), listing
    )
    assert not found.operations
    with pytest.raises(errors.PermissionMissing):
        await service.get_operation(
            operations_pb2.GetOperationRequest(name=done.name),
            call("google.longrunning.Operations.GetOperation", roles=("admin@nodes/n1/domains/b",)),
        )


@pytest.mark.parametrize("prefix", [None, "operations/"])
async def test_a_watch_is_of_this_process_alone(store: Store, prefix: str | None) -> None:
    operations = Operations(store, service="compute", node="n1", prefix=prefix)
    service = operation_watch_service(WatchHub(store), operations.owner)
    watcher = call("virtfleet.common.v1.OperationService.WatchOperations")
    for parent in ("", operations.owner):
        stream = service.watch_operations(common_pb2.WatchOperationsRequest(parent=parent), watcher)
        assert await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]  # an async generator
    request = common_pb2.WatchOperationsRequest(parent="nodes/n1/services/storage")
    with pytest.raises(errors.NameMalformed) as refused:
        service.watch_operations(request, watcher)
    assert refused.value.field == "parent"


async def test_a_watcher_sees_start_progress_and_end_in_order(store: Store, operations: Operations) -> None:
    hub = WatchHub(store)
    await operations.run(call(), start(), target="nodes/n1/domains/z", work=quick)
    stream = hub.stream_operations(common_pb2.WatchOperationsRequest(target=TARGET))
    first = common_pb2.WatchOperationsResponse.FromString(await anext(stream))
    assert first.WhichOneof("marker") == "snapshot_end"
    gate = asyncio.Event()
    running = await operations.run(call(), start(inline_seconds=0), target=TARGET, work=gated(gate))
    seen: list[operations_pb2.Operation] = []
    async with asyncio.timeout(5):
        while len(seen) < 2:
            seen += common_pb2.WatchOperationsResponse.FromString(await anext(stream)).operations
        gate.set()
        while not seen[-1].done:
            seen += common_pb2.WatchOperationsResponse.FromString(await anext(stream)).operations
    assert {operation.name for operation in seen} == {running.name}
    assert [metadata_of(operation).phase for operation in seen] == ["", "waiting", "waiting"]
    assert [operation.done for operation in seen] == [False, False, True]
    await stream.aclose()  # type: ignore[attr-defined]  # an async generator
    snapshot = hub.stream_operations(common_pb2.WatchOperationsRequest())
    listed = common_pb2.WatchOperationsResponse.FromString(await anext(snapshot))
    assert len(listed.operations) == 2
    await snapshot.aclose()  # type: ignore[attr-defined]  # an async generator


async def test_starts_and_ends_are_events_of_the_target(store: Store, operations: Operations) -> None:
    async def fails(_: Job) -> Commit:
        raise errors.HypervisorFailed("it said no")

    hub = WatchHub(store)
    await operations.run(call(), start(), target=TARGET, target_uid="u", work=quick)
    await operations.run(call(), start(), target=TARGET, target_uid="u", work=fails)
    events = watch_pb2.ListEventsResponse.FromString(
        hub.list_events(watch_pb2.ListEventsRequest(parent="nodes/n1"))
    ).events
    started, done = watch_pb2.EVENT_TYPE_OPERATION_STARTED, watch_pb2.EVENT_TYPE_OPERATION_DONE
    assert [event.type for event in events] == [started, done, started, done]
    assert {(event.resource, event.uid, event.reason) for event in events} == {(TARGET, "u", "START_DOMAIN")}
    assert "failed: it said no" in events[3].message


async def test_plan_is_done_and_recorded_nowhere(store: Store) -> None:
    planned = Operations.plan(domain("x"))
    assert planned.done
    assert not planned.name
    assert planned.metadata.Is(operation_pb2.OperationMetadata.DESCRIPTOR)
    assert store.reader.execute("SELECT count(*) FROM operations").fetchone() == (0,)


async def test_a_snapshot_of_operations_never_runs_ahead_of_the_log(store: Store, operations: Operations) -> None:
    hub = WatchHub(store)
    known: set[str] = set()
    for _ in range(20):
        stream = hub.stream_operations(common_pb2.WatchOperationsRequest())
        running = asyncio.create_task(operations.run(call(), start(), target=TARGET, work=quick))
        seen: dict[str, list[bool]] = {}
        async with asyncio.timeout(5):
            while not any(states[-1] for name, states in seen.items() if name not in known):
                message = common_pb2.WatchOperationsResponse.FromString(await anext(stream))
                for operation in message.operations:
                    seen.setdefault(operation.name, []).append(operation.done)
        known.add((await running).name)
        assert all(states == sorted(states) for states in seen.values())
        await stream.aclose()  # type: ignore[attr-defined]  # an async generator

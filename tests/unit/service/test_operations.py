from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from google.longrunning import operations_pb2
from google.protobuf.message import Message

from tests.unit.service.rig import START, TEST_CAUSE, call, domain, open_store, put
from tests.unit.service.work import TARGET, ended, gated, quick, reason_of, set_running, start, state
from virtfleet.compute.v1 import domain_pb2
from virtfleet_service import errors, requests
from virtfleet_service.longrunning import metadata_of
from virtfleet_service.operations import Commit, Job, Operations
from virtfleet_service.store import Store, StoreUnwritable, Transaction


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with open_store(tmp_path / "c.db") as opened:
        await put(opened, domain("a"))
        yield opened


@pytest.fixture
async def operations(store: Store) -> AsyncIterator[Operations]:
    async with Operations(store, service="compute", node="n1").running(drain_seconds=1) as running:
        yield running


async def test_quick_work_is_done_in_the_first_reply(store: Store, operations: Operations) -> None:
    done = await operations.run(call(), start(), target=TARGET, target_uid="u", work=quick)
    assert done.done
    assert done.name.startswith("nodes/n1/services/compute/operations/op")
    response = domain_pb2.Domain()
    assert done.response.Unpack(response)
    assert response.status.state == domain_pb2.DOMAIN_STATE_RUNNING
    assert state(store) == domain_pb2.DOMAIN_STATE_RUNNING
    metadata = metadata_of(done)
    assert (metadata.target, metadata.target_uid, metadata.method) == (TARGET, "u", START)
    assert metadata.principal == "spiffe://virtfleet.dev/user/a"
    assert metadata.HasField("end_time")
    assert metadata.progress_ratio == 1.0
    assert not metadata.cancellable
    assert operations.get(done.name) == done


async def test_long_work_answers_running_and_goes_on(store: Store, operations: Operations) -> None:
    gate = asyncio.Event()
    running = await operations.run(call(), start(inline_seconds=0.01), target=TARGET, work=gated(gate))
    assert not running.done
    metadata = metadata_of(running)
    assert (metadata.phase, metadata.done_bytes, metadata.progress_ratio) == ("waiting", 10, 0.25)
    assert metadata.cancellable
    gate.set()
    assert (await ended(operations, running.name)).done
    assert state(store) == domain_pb2.DOMAIN_STATE_RUNNING


async def test_the_work_survives_a_caller_that_goes_away(store: Store, operations: Operations) -> None:
    gate, entered = asyncio.Event(), asyncio.Event()
    task = asyncio.create_task(operations.run(call(), start(), target=TARGET, work=gated(gate, entered)))
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (name,) = (row[0] for row in store.reader.execute("SELECT id FROM operations"))
    gate.set()
    assert (await ended(operations, name)).done
    assert state(store) == domain_pb2.DOMAIN_STATE_RUNNING


@pytest.mark.parametrize("steps", range(6))
async def test_a_caller_that_goes_away_at_any_moment_leaves_no_operation_without_work(
    store: Store, operations: Operations, steps: int
) -> None:
    task = asyncio.create_task(operations.run(call(), start(), target=TARGET, work=quick))
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await operations.drain(2)
    assert store.reader.execute("SELECT count(*) FROM operations WHERE done = 0").fetchone() == (0,)


async def test_a_second_operation_on_the_target_conflicts(operations: Operations) -> None:
    gate = asyncio.Event()
    first = await operations.run(call(), start(inline_seconds=0), target=TARGET, work=gated(gate))
    with pytest.raises(errors.OperationConflict) as caught:
        await operations.run(call(), start("id"), target=TARGET, work=quick)
    assert caught.value.metadata["operation"] == first.name
    other = await operations.run(call(), start(), target="nodes/n1/domains/b", work=quick)
    shared = await operations.run(call(), start(inline_seconds=0), target=TARGET, work=quick, exclusive=False)
    assert other.done
    gate.set()
    await ended(operations, first.name)
    await ended(operations, shared.name)
    # ABORTED is not remembered: the same request_id may succeed now.
    assert (await operations.run(call(), start("id"), target=TARGET, work=quick)).done


async def test_a_failure_is_recorded_with_the_state_after_it(store: Store, operations: Operations) -> None:
    def crashed(tx: Transaction, error: errors.VirtfleetError) -> None:
        current = domain_pb2.Domain.FromString(tx.need(TARGET).body)
        current.status.state = domain_pb2.DOMAIN_STATE_CRASHED
        current.status.last_failure.CopyFrom(error.to_status())
        tx.put("domain", current, cause=START)

    async def work(job: Job) -> Commit:
        job.on_failure(crashed)
        raise errors.HypervisorFailed("it said no", exit_code=1)

    failed = await operations.run(call(), start(), target=TARGET, work=work)
    assert failed.done
    assert reason_of(failed) == "HYPERVISOR_FAILED"
    assert requests.error_of(failed.error).metadata == {"exit_code": "1"}
    assert state(store) == domain_pb2.DOMAIN_STATE_CRASHED


async def test_an_unexpected_error_shows_no_more_than_a_log_id(operations: Operations) -> None:
    async def work(_: Job) -> Commit:
        raise RuntimeError("secret")

    failed = await operations.run(call(), start(), target=TARGET, work=work)
    assert reason_of(failed) == "UNEXPECTED"
    assert "secret" not in str(failed)
    assert requests.error_of(failed.error).metadata["log_id"]


async def test_a_commit_that_refuses_fails_the_operation_and_undoes_its_writes(
    store: Store, operations: Operations
) -> None:
    async def work(_: Job) -> Commit:
        def commit(tx: Transaction) -> Message:
            set_running(tx)
            raise errors.WrongState("gone meanwhile", state="x")

        return commit

    failed = await operations.run(call(), start(), target=TARGET, work=work)
    assert reason_of(failed) == "WRONG_STATE"
    assert state(store) == domain_pb2.DOMAIN_STATE_SHUT_OFF


async def test_intent_runs_in_the_transaction_that_accepts(store: Store, operations: Operations) -> None:
    def refuse(tx: Transaction) -> None:
        tx.put_record("intent", "a", b"1")
        raise errors.WrongState("runs already", state="RUNNING")

    with pytest.raises(errors.WrongState):
        await operations.run(call(), start(), target=TARGET, work=quick, intent=refuse)
    assert store.get_record("intent", "a") is None
    assert store.reader.execute("SELECT count(*) FROM operations").fetchone() == (0,)

    def accept(tx: Transaction) -> str:
        tx.put_record("intent", "a", b"1")
        return "the-uid"

    done = await operations.run(call(), start(), target=TARGET, work=quick, intent=accept)
    assert metadata_of(done).target_uid == "the-uid"
    assert store.get_record("intent", "a") == b"1"


async def test_the_deadline_bounds_the_inline_wait(operations: Operations) -> None:
    gate = asyncio.Event()
    hurried = call().detached(deadline_seconds=0.1)
    began = asyncio.get_running_loop().time()
    running = await operations.run(hurried, start(), target=TARGET, work=gated(gate))
    assert not running.done
    assert asyncio.get_running_loop().time() - began < 0.1
    gate.set()
    await ended(operations, running.name)


async def test_a_timeout_of_the_work_fails_the_operation(operations: Operations) -> None:
    failed = await operations.run(call(), start(), target=TARGET, work=gated(asyncio.Event()), timeout=0.01)
    assert reason_of(failed) == "OPERATION_TIMED_OUT"


# Cancellation.


async def test_cancel_undoes_the_work(store: Store, operations: Operations) -> None:
    undone = asyncio.Event()
    entered = asyncio.Event()

    async def work(_: Job) -> Commit:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            undone.set()
        return set_running

    running = await operations.run(call(), start(inline_seconds=0), target=TARGET, work=work)
    await entered.wait()
    operations.cancel(running.name)
    done = await ended(operations, running.name)
    assert undone.is_set()
    assert reason_of(done) == "OPERATION_CANCELLED"
    assert metadata_of(done).cancel_requested
    assert state(store) == domain_pb2.DOMAIN_STATE_SHUT_OFF
    operations.cancel(running.name)


async def test_past_the_point_of_no_return_cancel_says_so(operations: Operations) -> None:
    gate, entered = asyncio.Event(), asyncio.Event()

    async def work(job: Job) -> Commit:
        job.cancellable = False
        return await gated(gate, entered)(job)

    running = await operations.run(call(), start(inline_seconds=0), target=TARGET, work=work)
    await entered.wait()
    with pytest.raises(errors.NotCancellable):
        operations.cancel(running.name)
    gate.set()
    done = await ended(operations, running.name)
    assert not done.HasField("error")
    with pytest.raises(errors.ResourceNotFound):
        operations.cancel("nodes/n1/services/compute/operations/none")


@pytest.mark.parametrize(
    ("exclusive", "says"), [(True, "its effects are undone"), (False, "what had ended before stays")]
)
async def test_a_cancelled_batch_does_not_say_that_all_is_undone(
    operations: Operations, *, exclusive: bool, says: str
) -> None:
    request = start(inline_seconds=0)
    running = await operations.run(call(), request, target=TARGET, work=gated(asyncio.Event()), exclusive=exclusive)
    operations.cancel(running.name)
    operation = await ended(operations, running.name)
    assert reason_of(operation) == "OPERATION_CANCELLED"
    assert says in operation.error.message


# request_id.


async def test_a_repeated_request_gets_the_same_operation_and_no_second_effect(operations: Operations) -> None:
    runs = 0

    async def work(job: Job) -> Commit:
        nonlocal runs
        runs += 1
        return await quick(job)

    first = await operations.run(call(), start("id"), target=TARGET, work=work)
    again = await operations.run(call(), start("id", inline_seconds=1), target=TARGET, work=work)
    assert again == first
    assert runs == 1


async def test_a_repetition_is_known_before_anything_is_looked_at(operations: Operations) -> None:
    assert await operations.repeated(call(), start()) is None
    assert await operations.repeated(call(), start("id")) is None
    first = await operations.run(call(), start("id"), target=TARGET, work=quick)
    assert await operations.repeated(call(), start("id", inline_seconds=1)) == first
    assert await operations.repeated(call(subject="spiffe://virtfleet.dev/user/b"), start("id")) is None
    with pytest.raises(errors.RequestIdReused):
        await operations.repeated(call(), start("id", etag="x"))
    plan = start("id")
    plan.validate_only = True
    assert await operations.repeated(call(), plan) is None, "a plan is never remembered"


async def test_a_duplicate_in_flight_waits_for_the_same_operation(operations: Operations) -> None:
    gate = asyncio.Event()
    both = [asyncio.create_task(operations.run(call(), start("id"), target=TARGET, work=gated(gate))) for _ in range(2)]
    await asyncio.sleep(0.05)
    assert not any(task.done() for task in both)
    gate.set()
    first, second = await asyncio.gather(*both)
    assert first == second
    assert first.done


async def test_another_request_under_the_same_id_is_refused_but_not_another_caller(operations: Operations) -> None:
    first = await operations.run(call(), start("id"), target=TARGET, work=quick)
    with pytest.raises(errors.RequestIdReused) as caught:
        await operations.run(call(), start("id", etag="x"), target=TARGET, work=quick)
    assert caught.value.field == "request_id"
    other = await operations.run(call(subject="spiffe://virtfleet.dev/user/b"), start("id"), target=TARGET, work=quick)
    assert other.name != first.name


async def test_final_errors_are_remembered_others_are_not(store: Store, operations: Operations) -> None:
    def final(tx: Transaction) -> None:
        tx.put_record("intent", "a", b"1")
        raise errors.WrongState("runs already", state="RUNNING", resource=TARGET)

    def passing(_: Transaction) -> None:
        raise errors.NodeMemoryShort("no room", free_bytes=1)

    with pytest.raises(errors.NodeMemoryShort):
        await operations.run(call(), start("one"), target=TARGET, work=quick, intent=passing)
    assert (await operations.run(call(), start("one"), target=TARGET, work=quick)).done
    with pytest.raises(errors.WrongState):
        await operations.run(call(), start("two"), target=TARGET, work=quick, intent=final)
    assert store.get_record("intent", "a") is None
    with pytest.raises(errors.WrongState) as caught:
        await operations.run(call(), start("two"), target=TARGET, work=quick)
    assert caught.value.to_status() == errors.WrongState("runs already", state="RUNNING", resource=TARGET).to_status()


async def test_request_ids_outlive_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "r.db"
    async with open_store(path) as store:
        await put(store, domain("a"))
        async with Operations(store, "compute", "n1").running() as operations:
            first = await operations.run(call(), start("id"), target=TARGET, work=quick)
    async with open_store(path) as store, Operations(store, "compute", "n1").running() as operations:
        assert await operations.run(call(), start("id"), target=TARGET, work=quick) == first


async def test_requests_are_compared_by_meaning() -> None:
    one, other = domain_pb2.UpdateDomainRequest(request_id="a"), domain_pb2.UpdateDomainRequest(request_id="b")
    for key in ("x", "y", "z"):
        one.domain.labels[key] = key
    for key in ("z", "x", "y"):
        other.domain.labels[key] = key
    other.inline_wait.FromSeconds(3)
    assert requests.digest_of(one) == requests.digest_of(other)
    other.domain.labels["w"] = ""
    assert requests.digest_of(one) != requests.digest_of(other)


async def test_request_ids_expire_by_time_served(store: Store, operations: Operations) -> None:
    first = await operations.run(call(), start("id"), target=TARGET, work=quick)
    await store.compact()
    assert (await operations.run(call(), start("id"), target=TARGET, work=quick)).name == first.name
    await store.write(
        lambda tx: tx.connection.execute("UPDATE requests SET served_seconds = served_seconds - 86401").rowcount
    )
    await store.compact()
    assert (await operations.run(call(), start("id"), target=TARGET, work=quick)).name != first.name


async def test_once_does_a_record_mutation_once(store: Store) -> None:
    times = 0

    def work(tx: Transaction) -> domain_pb2.Domain:
        nonlocal times
        times += 1
        current = domain_pb2.Domain.FromString(tx.need(TARGET).body)
        current.display_name = str(times)
        tx.put("domain", current, cause=TEST_CAUSE)
        return current

    request = start("id")
    first = await requests.once(store, call(), request, work)
    assert await requests.once(store, call(), request, work) == first
    assert first.display_name == "1"
    assert (await requests.once(store, call(), start(), work)).display_name == "2"

    def fails(tx: Transaction) -> domain_pb2.Domain:
        tx.delete(TARGET, cause=TEST_CAUSE)
        raise errors.HasChildren("has some", resource=TARGET)

    for _ in range(2):
        with pytest.raises(errors.HasChildren):
            await requests.once(store, call(), start("other"), fails)
    assert store.get(TARGET) is not None
    with pytest.raises(errors.RequestIdReused):
        await requests.once(store, call(), start("id", etag="e"), work)


async def test_once_remembers_no_plan(store: Store) -> None:
    plan = start("id")
    plan.validate_only = True
    looked = 0

    def work(tx: Transaction) -> domain_pb2.Domain:
        nonlocal looked
        looked += 1
        return domain_pb2.Domain.FromString(tx.need(TARGET).body)

    for _ in range(2):
        await requests.once(store, call(), plan, work)
    assert looked == 2, "a plan is of its moment"
    await requests.once(store, call(), start("id"), work)
    assert looked == 3, "the id is still free for what was planned"


# After a crash, and at the end.


async def crashed(path: Path, work: Callable[[Job], Awaitable[Commit]]) -> str:
    """Leave an unfinished operation behind as a process does that is killed."""
    async with open_store(path) as store:
        await put(store, domain("a"))
        operations = Operations(store, "compute", "n1")
        running = await operations.run(call(), start("id", inline_seconds=0.02), target=TARGET, work=work)
        await operations.drain(0)
        assert not operations.get(running.name).done
    return running.name


async def journalled(job: Job) -> Commit:
    await job.journal("attach", b"disk")
    await job.journal("start", b"guest")
    await asyncio.Event().wait()
    return set_running


async def test_settlement_finishes_with_the_journal(tmp_path: Path) -> None:
    name = await crashed(tmp_path / "x.db", journalled)
    seen: list[tuple[str, bytes]] = []

    async def handler(operation: operations_pb2.Operation, entries: object) -> Commit:
        assert operation.name == name
        seen.extend((entry.step, entry.payload) for entry in entries)  # type: ignore[attr-defined]  # keywords of any field
        return set_running

    async with open_store(tmp_path / "x.db") as store:
        operations = Operations(store, "compute", "n1")
        with pytest.raises(errors.OperationConflict):
            await operations.run(call(), start(), target=TARGET, work=quick)
        with pytest.raises(errors.NotCancellable):
            operations.cancel(name)
        assert await operations.settle({START: handler}) == 1
        assert seen == [("attach", b"disk"), ("start", b"guest")]
        assert operations.get(name).HasField("response")
        assert state(store) == domain_pb2.DOMAIN_STATE_RUNNING
        assert store.reader.execute("SELECT count(*) FROM journal").fetchone() == (0,)
        assert await operations.settle({}) == 0
        assert (await operations.run(call(), start("id"), target=TARGET, work=quick)).name == name


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errors.ChangeRolledBack("undone"), "CHANGE_ROLLED_BACK"),
        (RuntimeError("x"), "UNEXPECTED"),
        (None, "OPERATION_TIMED_OUT"),
    ],
)
async def test_settlement_fails_with_a_reason(tmp_path: Path, error: Exception | None, reason: str) -> None:
    name = await crashed(tmp_path / "x.db", journalled)

    async def handler(_: operations_pb2.Operation, __: object) -> Commit:
        if error is not None:
            raise error
        await asyncio.Event().wait()
        return set_running

    async with open_store(tmp_path / "x.db") as store:
        operations = Operations(store, "compute", "n1")
        await operations.settle({START: handler}, seconds=0.05)
        assert reason_of(operations.get(name)) == reason


async def test_without_a_handler_it_is_rolled_back(tmp_path: Path) -> None:
    name = await crashed(tmp_path / "x.db", journalled)
    async with open_store(tmp_path / "x.db") as store:
        operations = Operations(store, "compute", "n1")
        await operations.settle({})
        assert reason_of(operations.get(name)) == "CHANGE_ROLLED_BACK"


async def test_drain_refuses_new_work_and_waits_for_the_old(store: Store) -> None:
    operations = Operations(store, "compute", "n1")
    gate = asyncio.Event()
    running = await operations.run(call(), start(inline_seconds=0), target=TARGET, work=gated(gate))
    draining = asyncio.create_task(operations.drain(5))
    await asyncio.sleep(0)
    with pytest.raises(errors.ServiceDraining):
        await operations.run(call(), start(), target="nodes/n1/domains/b", work=quick)
    gate.set()
    await draining
    assert operations.get(running.name).done


async def test_the_end_of_an_operation_waits_for_a_full_disk(operations: Operations) -> None:
    gate = asyncio.Event()
    running = await operations.run(call(), start(inline_seconds=0), target=TARGET, work=gated(gate))
    broken = True

    def commit(tx: Transaction) -> Message:
        if broken:
            raise StoreUnwritable("full")
        return set_running(tx)

    async def work(_: Job) -> Commit:
        return commit

    gate.set()
    await ended(operations, running.name)
    waiting = await operations.run(call(), start(inline_seconds=0.1), target=TARGET, work=work)
    assert not waiting.done
    broken = False
    assert (await ended(operations, waiting.name)).HasField("response")

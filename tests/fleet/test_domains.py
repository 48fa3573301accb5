"""The life of a domain, many at once, and what is read of them, through the gateway."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from google.longrunning import operations_pb2
from google.protobuf import duration_pb2, empty_pb2, field_mask_pb2

from tests.fleet.rig import (
    MIB,
    State,
    Wire,
    create,
    creation,
    delete,
    domain,
    get,
    refused,
    small_spec,
    unique,
    until,
    verb,
)
from virtfleet.common.v1 import operations_pb2 as common_pb2
from virtfleet.compute.v1 import domain_pb2, domain_spec_pb2
from virtfleet.type.v1 import resource_pb2, watch_pb2
from virtfleet_client import Fleet
from virtfleet_client.errors import VirtfleetError, from_status
from virtfleet_client.operations import metadata_of

RUNNING, PAUSED, SHUT_OFF = State.DOMAIN_STATE_RUNNING, State.DOMAIN_STATE_PAUSED, State.DOMAIN_STATE_SHUT_OFF
FORCE, GRACEFUL = domain_pb2.STOP_MODE_FORCE, domain_pb2.STOP_MODE_GRACEFUL


def stubborn(seconds: float = 3600) -> domain_spec_pb2.DomainSpec:
    """Return the spec of a domain that takes its time to heed the power button."""
    spec = small_spec()
    spec.test.power_button_delay.FromMilliseconds(int(seconds * 1000))
    return spec


def deaf() -> domain_spec_pb2.DomainSpec:
    """Return the spec of a domain that does not heed the power button at all."""
    spec = small_spec()
    spec.test.obeys_power_button = False
    return spec


# The life of one.


@pytest.mark.parametrize(("start", "state"), [("", SHUT_OFF), ("running", RUNNING), ("paused", PAUSED)])
def test_a_domain_is_made_in_the_state_that_is_asked_for(
    fleet: Fleet, nodes: list[str], start: str, state: int
) -> None:
    with domain(fleet, nodes[0], start=start, labels={"a": "b"}, display_name="VM 01") as made:
        assert made.status.state == state
        assert made.status.active == bool(start)
        assert bool(made.status.runtime_id) == bool(start)
        assert (made.generation, made.status.observed_generation) == (1, 1)
        assert made.etag
        assert made.uid
        assert made.create_time == made.update_time
        assert made.status.resolved_spec.cpu.vcpu_count == 1, "what the server decided"
        assert not made.spec.cpu.HasField("vcpu_count"), "what was asked for"
        assert get(fleet, made.name) == made
    assert refused(lambda: get(fleet, made.name)).reason == "RESOURCE_NOT_FOUND"


def test_verbs_that_find_their_work_done_succeed_without_effect(fleet: Fleet, nodes: list[str]) -> None:
    with domain(fleet, nodes[0]) as made:
        assert verb(fleet, "StopDomain", made.name, mode=FORCE) == made, "it was stopped"
        started = verb(fleet, "StartDomain", made.name)
        again = verb(fleet, "StartDomain", made.name)
        assert again.status.runtime_id == started.status.runtime_id, "the same guest"
        assert verb(fleet, "ResumeDomain", made.name).status.state == RUNNING
        paused = verb(fleet, "SuspendDomain", made.name)
        assert verb(fleet, "SuspendDomain", made.name).status.state == PAUSED
        assert paused.status.runtime_id == started.status.runtime_id
        assert verb(fleet, "ResumeDomain", made.name).status.state == RUNNING
        assert get(fleet, made.name).etag == made.etag, "power is no part of what was asked for"


def test_a_reset_and_a_reboot_keep_the_guest(fleet: Fleet, nodes: list[str]) -> None:
    with domain(fleet, nodes[0], start="running") as made:
        for method in ("ResetDomain", "RebootDomain"):
            after = verb(fleet, method, made.name)
            assert after.status.state == RUNNING
            assert after.status.runtime_id == made.status.runtime_id


@pytest.mark.parametrize(
    ("spec", "mode", "seconds"),
    [
        (small_spec, domain_pb2.STOP_MODE_UNSPECIFIED, 5),
        (small_spec, GRACEFUL, 5),
        (deaf, FORCE, 5),
        (deaf, domain_pb2.STOP_MODE_GRACEFUL_THEN_FORCE, 5),
        (lambda: stubborn(0.3), GRACEFUL, 5),
    ],
    ids=["default", "graceful", "forced", "graceful, then forced", "slow"],
)
def test_the_ways_to_stop(fleet: Fleet, nodes: list[str], spec: Callable[[], Any], mode: Any, seconds: float) -> None:
    with domain(fleet, nodes[0], spec=spec(), start="running") as made:
        began = time.monotonic()
        stopped = verb(fleet, "StopDomain", made.name, mode=mode, grace_period=duration_pb2.Duration(seconds=1))
        assert time.monotonic() - began < seconds
        assert stopped.status.state == SHUT_OFF
        assert not stopped.status.active
        assert not stopped.status.HasField("active_spec")


def test_a_guest_that_does_not_comply_runs_on(fleet: Fleet, nodes: list[str]) -> None:
    with domain(fleet, nodes[0], spec=deaf(), start="running") as made:
        grace = duration_pb2.Duration(nanos=200_000_000)
        for method, fields in (("StopDomain", {"mode": GRACEFUL}), ("RebootDomain", {})):
            error = refused(
                lambda method=method, fields=fields: verb(fleet, method, made.name, grace_period=grace, **fields)  # type: ignore[misc]  # binds the round's own
            )
            assert (error.code().name, error.reason) == ("DEADLINE_EXCEEDED", "GUEST_DID_NOT_COMPLY"), error
        after = get(fleet, made.name)
        assert (after.status.state, after.status.runtime_id) == (RUNNING, made.status.runtime_id)


WRONG_STATES = [
    ("ResumeDomain", "", "SHUT_OFF"),
    ("SuspendDomain", "", "SHUT_OFF"),
    ("ResetDomain", "", "SHUT_OFF"),
    ("RebootDomain", "", "SHUT_OFF"),
    ("RebootDomain", "paused", "PAUSED"),
    ("DeleteDomain", "running", "RUNNING"),
    ("DeleteDomain", "paused", "PAUSED"),
]


@pytest.mark.parametrize(("method", "start", "state"), WRONG_STATES, ids=[f"{row[0]} {row[2]}" for row in WRONG_STATES])
def test_verbs_that_mean_nothing_in_a_state(
    fleet: Fleet, nodes: list[str], method: str, start: str, state: str
) -> None:
    with domain(fleet, nodes[0], start=start) as made:
        error = refused(lambda: verb(fleet, method, made.name))
        assert (error.code().name, error.reason) == ("FAILED_PRECONDITION", "WRONG_STATE"), error
        assert error.metadata["state"] == state
        assert error.metadata["resource"] == made.name
        assert get(fleet, made.name) == made


def test_a_domain_is_deleted_with_its_guest_when_told(fleet: Fleet, nodes: list[str]) -> None:
    made = create(fleet, nodes[0], start="running")
    delete(fleet, made.name, stop=True)
    assert refused(lambda: get(fleet, made.name)).reason == "RESOURCE_NOT_FOUND"
    gone = domain_pb2.DeleteDomainRequest(name=made.name)
    assert refused(lambda: fleet.domains.DeleteDomain(gone)).reason == "RESOURCE_NOT_FOUND"
    gone.allow_missing = True
    fleet.wait(fleet.domains.DeleteDomain(gone), empty_pb2.Empty)


def test_a_protected_domain_is_not_deleted(fleet: Fleet, nodes: list[str]) -> None:
    spec = small_spec()
    spec.deletion_protection = True
    made = create(fleet, nodes[0], spec=spec)
    error = refused(lambda: delete(fleet, made.name))
    assert (error.code().name, error.reason) == ("FAILED_PRECONDITION", "DELETION_PROTECTED"), error
    assert get(fleet, made.name) == made
    free = domain_pb2.Domain(name=made.name, etag=made.etag)
    free.spec.deletion_protection = False
    mask = field_mask_pb2.FieldMask(paths=["spec.deletion_protection"])
    fleet.wait(
        fleet.domains.UpdateDomain(domain_pb2.UpdateDomainRequest(domain=free, update_mask=mask)), domain_pb2.Domain
    )
    delete(fleet, made.name)


def test_a_transient_domain_goes_with_its_guest(fleet: Fleet, nodes: list[str]) -> None:
    spec = small_spec(lifetime=resource_pb2.LIFETIME_TRANSIENT)
    made = create(fleet, nodes[0], spec=spec, start="running")
    assert made.status.state == RUNNING
    stop = domain_pb2.StopDomainRequest(name=made.name, mode=FORCE)
    fleet.wait(fleet.domains.StopDomain(stop), domain_pb2.Domain)
    assert refused(lambda: get(fleet, made.name)).reason == "RESOURCE_NOT_FOUND"


def test_a_transient_domain_begins_with_its_guest(fleet: Fleet, nodes: list[str]) -> None:
    made = create(fleet, nodes[0], spec=small_spec(lifetime=resource_pb2.LIFETIME_TRANSIENT))
    assert made.status.state == RUNNING
    delete(fleet, made.name, stop=True)
    assert refused(lambda: get(fleet, made.name)).reason == "RESOURCE_NOT_FOUND"


def test_a_guest_that_crashes_is_seen(fleet: Fleet, nodes: list[str]) -> None:
    spec = small_spec()
    spec.test.crash_delay.FromMilliseconds(200)
    with domain(fleet, nodes[0], spec=spec, start="running") as made:
        until(lambda: get(fleet, made.name).status.state == State.DOMAIN_STATE_CRASHED, 5, "the crash is seen")


# Changes.


def test_generation_and_etag_follow_what_was_asked_for(fleet: Fleet, nodes: list[str]) -> None:
    with domain(fleet, nodes[0], start="running", labels={"keep": "1"}) as made:
        wanted = domain_pb2.Domain(name=made.name, etag=made.etag, display_name="new")
        wanted.labels["env"] = "test"
        mask = field_mask_pb2.FieldMask(paths=["display_name", "labels.env"])
        request = domain_pb2.UpdateDomainRequest(domain=wanted, update_mask=mask)
        changed = fleet.wait(fleet.domains.UpdateDomain(request), domain_pb2.Domain)
        assert (changed.generation, changed.status.observed_generation) == (2, 2)
        assert changed.etag != made.etag
        assert dict(changed.labels) == {"keep": "1", "env": "test"}
        assert changed.update_time.ToNanoseconds() > made.update_time.ToNanoseconds()
        assert changed.create_time == made.create_time
        wanted.etag = changed.etag
        request = domain_pb2.UpdateDomainRequest(domain=wanted, update_mask=mask)
        same = fleet.wait(fleet.domains.UpdateDomain(request), domain_pb2.Domain)
        assert (same.generation, same.etag) == (2, changed.etag), "nothing has changed"


@pytest.mark.parametrize("autostart", [resource_pb2.AUTOSTART_ALWAYS, resource_pb2.AUTOSTART_ONCE])
def test_autostart_is_kept_as_asked(fleet: Fleet, nodes: list[str], autostart: Any) -> None:
    with domain(fleet, nodes[0], spec=small_spec(autostart=autostart)) as made:
        assert made.spec.autostart == autostart
        assert made.status.state == SHUT_OFF, "it is for the next boot of the node"


def test_plans_change_nothing(fleet: Fleet, nodes: list[str]) -> None:
    request = creation(nodes[0], start="running")
    request.validate_only = True
    planned = fleet.domains.CreateDomain(request)
    assert planned.done
    plan = fleet.wait(planned, domain_pb2.Domain)
    assert plan.name == f"{nodes[0]}/domains/{request.domain_id}"
    assert plan.status.resolved_spec.memory.maximum_bytes == 64 * MIB
    assert refused(lambda: get(fleet, plan.name)).reason == "RESOURCE_NOT_FOUND"
    with domain(fleet, nodes[0], start="running") as made:
        wanted = domain_pb2.Domain(name=made.name)
        wanted.spec.memory.maximum_bytes = 128 * MIB
        update = domain_pb2.UpdateDomainRequest(domain=wanted, validate_only=True)
        plan = fleet.wait(fleet.domains.UpdateDomain(update), domain_pb2.Domain)
        assert plan.generation == 2
        paths = ["spec.memory.current_bytes", "spec.memory.maximum_bytes"]
        assert sorted(change.path for change in plan.status.pending_changes) == paths
        for method, fields in (
            ("StopDomain", {"mode": FORCE}),
            ("SuspendDomain", {}),
            ("ResetDomain", {}),
            ("RebootDomain", {}),
        ):
            plan = verb(fleet, method, made.name, validate_only=True, **fields)
            assert plan.name == made.name
        delete_plan = domain_pb2.DeleteDomainRequest(name=made.name, stop=True, validate_only=True)
        assert fleet.domains.DeleteDomain(delete_plan).done
        assert get(fleet, made.name) == made


# Many at once.


def statuses(response: Any) -> dict[str, str]:
    """Return the reason of each item of a batch, empty where it went well."""
    return {
        result.name.rpartition("/")[2]: from_status(result.status).reason if result.status.code else ""
        for result in response.results
    }


def test_one_bad_item_does_not_stand_in_the_way_of_the_others(fleet: Fleet, nodes: list[str]) -> None:
    prefix = unique("b")
    with domain(fleet, nodes[0], f"{prefix}-1") as taken:
        wanted = {f"{prefix}-{number}": "RESOURCE_EXISTS" if number == 1 else "" for number in range(4)}
        batch = domain_pb2.BatchCreateDomainsRequest(
            parent=nodes[0], requests=[creation("", id_, start="running") for id_ in wanted]
        )
        response = fleet.wait(fleet.domains.BatchCreateDomains(batch), domain_pb2.BatchCreateDomainsResponse)
        assert statuses(response) == wanted
        assert get(fleet, taken.name) == taken
        names = [f"{nodes[0]}/domains/{id_}" for id_ in [*wanted, f"{prefix}-none"]]
        wanted = dict.fromkeys(wanted, "") | {f"{prefix}-none": "RESOURCE_NOT_FOUND"}
        start = domain_pb2.BatchStartDomainsRequest(
            parent=nodes[0], requests=[domain_pb2.StartDomainRequest(name=name) for name in names]
        )
        started = fleet.wait(fleet.domains.BatchStartDomains(start), domain_pb2.BatchStartDomainsResponse)
        assert statuses(started) == wanted
        assert {r.domain.status.state for r in started.results if not r.status.code} == {RUNNING}
        read = fleet.domains.BatchGetDomains(domain_pb2.BatchGetDomainsRequest(parent=nodes[0], names=names))
        assert statuses(read) == wanted
        assert [result.name for result in read.results] == names, "in the order of the call"
        stop = domain_pb2.BatchStopDomainsRequest(
            parent=nodes[0], requests=[domain_pb2.StopDomainRequest(name=name, mode=FORCE) for name in names]
        )
        stopped = fleet.wait(fleet.domains.BatchStopDomains(stop), domain_pb2.BatchStopDomainsResponse)
        assert statuses(stopped) == wanted
        remove = domain_pb2.BatchDeleteDomainsRequest(
            parent=nodes[0], requests=[domain_pb2.DeleteDomainRequest(name=name) for name in names]
        )
        removed = fleet.wait(fleet.domains.BatchDeleteDomains(remove), domain_pb2.BatchDeleteDomainsResponse)
        assert statuses(removed) == wanted
        read = fleet.domains.BatchGetDomains(domain_pb2.BatchGetDomainsRequest(parent=nodes[0], names=names))
        assert set(statuses(read).values()) == {"RESOURCE_NOT_FOUND"}


def test_200_domains_live_and_die_in_four_calls(fleet: Fleet, nodes: list[str]) -> None:
    prefix = unique("many")
    ids = [f"{prefix}-{number:03}" for number in range(200)]
    names = [f"{nodes[0]}/domains/{id_}" for id_ in ids]
    seen: list[tuple[int, int]] = []

    def progress(metadata: Any) -> None:
        seen.append((metadata.batch.succeeded_count, metadata.batch.total_count))

    batch = domain_pb2.BatchCreateDomainsRequest(parent=nodes[0], requests=[creation("", id_) for id_ in ids])
    made = fleet.wait(fleet.domains.BatchCreateDomains(batch), domain_pb2.BatchCreateDomainsResponse, progress=progress)
    assert set(statuses(made).values()) == {""}
    assert seen[-1] == (200, 200)
    calls: list[tuple[Any, Any, Any]] = [
        (
            fleet.domains.BatchStartDomains,
            domain_pb2.BatchStartDomainsRequest(
                parent=nodes[0], requests=[domain_pb2.StartDomainRequest(name=name) for name in names]
            ),
            domain_pb2.BatchStartDomainsResponse,
        ),
        (
            fleet.domains.BatchStopDomains,
            domain_pb2.BatchStopDomainsRequest(
                parent=nodes[0], requests=[domain_pb2.StopDomainRequest(name=name, mode=FORCE) for name in names]
            ),
            domain_pb2.BatchStopDomainsResponse,
        ),
        (
            fleet.domains.BatchDeleteDomains,
            domain_pb2.BatchDeleteDomainsRequest(
                parent=nodes[0], requests=[domain_pb2.DeleteDomainRequest(name=name) for name in names]
            ),
            domain_pb2.BatchDeleteDomainsResponse,
        ),
    ]
    for method, request, kind in calls:
        response = fleet.wait(method(request), kind)
        assert len(response.results) == 200
        assert set(statuses(response).values()) == {""}


# What is read.


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


# Operations.


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

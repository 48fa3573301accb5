"""The life of a domain, many at once, and what is read of them, through the gateway."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf import duration_pb2, empty_pb2, field_mask_pb2

from tests.fleet.rig import (
    MIB,
    State,
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
from virtfleet.compute.v1 import domain_pb2, domain_spec_pb2
from virtfleet.type.v1 import resource_pb2
from virtfleet_client import Fleet
from virtfleet_client.errors import from_status

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

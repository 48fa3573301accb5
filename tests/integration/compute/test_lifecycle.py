from __future__ import annotations

import itertools
from typing import Any

import grpc
import pytest
from google.longrunning import operations_pb2

from tests.held import containers_naming
from tests.integration.compute.rig import PARENT, Reason, Refused, Service, State, name, seconds
from virtfleet.compute.v1 import domain_pb2, domain_spec_pb2
from virtfleet.type.v1 import resource_pb2
from virtfleet_compute import records, specs
from virtfleet_compute.context import ref


async def test_a_domain_is_defined_started_paused_resumed_stopped_and_deleted(node: Service) -> None:
    domain = await node.create("web", labels={"env": "test"})
    assert domain.name == name("web")
    assert domain.generation == 1
    assert domain.status.state == State.DOMAIN_STATE_SHUT_OFF
    assert domain.status.state_reason == Reason.DOMAIN_STATE_REASON_DEFINED
    assert domain.status.resolved_spec.os.machine == "test-1.0"
    assert not domain.spec.HasField("os"), "what was asked for is kept as it was asked for"

    domain = await node.start("web")
    assert domain.status.state == State.DOMAIN_STATE_RUNNING
    assert domain.status.active
    assert domain.status.active_spec == domain.status.resolved_spec
    first_run = domain.status.runtime_id
    assert (await node.verb("Suspend", "web")).status.state == State.DOMAIN_STATE_PAUSED
    assert (await node.verb("Resume", "web")).status.state == State.DOMAIN_STATE_RUNNING
    await node.verb("Reset", "web")
    await node.verb("Reboot", "web")
    domain = await node.stop("web", domain_pb2.STOP_MODE_GRACEFUL)
    assert domain.status.state == State.DOMAIN_STATE_SHUT_OFF
    assert domain.status.state_reason == Reason.DOMAIN_STATE_REASON_GUEST_SHUTDOWN
    assert not domain.status.HasField("active_spec")
    assert (await node.start("web")).status.runtime_id not in ("", first_run)
    assert domain.generation == 1, "power is no part of the spec"

    await node.stop("web")
    await node.delete("web")
    with pytest.raises(Refused) as refused:
        await node.get("web")
    assert refused.value.reason == "RESOURCE_NOT_FOUND"


async def test_of_domains_that_are_gone_nothing_is_kept_in_memory(node: Service) -> None:
    uids: tuple[str, ...] = ()
    for number in range(2):
        domain = await node.create(f"ephemeral-{number}", labels={"env": "test"}, start=True)
        uids += (domain.uid,)
        for verb in ("Suspend", "Resume", "Reboot"):
            await node.verb(verb, f"ephemeral-{number}")
        await node.stop(f"ephemeral-{number}")
        await node.delete(f"ephemeral-{number}")
    assert not containers_naming("ephemeral-")
    for uid in uids:
        assert not containers_naming(uid)


async def test_verbs_succeed_where_the_domain_is_as_asked(node: Service) -> None:
    await node.create("web", start=True)
    run = (await node.get("web")).status.runtime_id
    assert (await node.start("web")).status.runtime_id == run
    await node.verb("Resume", "web")
    await node.verb("Suspend", "web")
    await node.verb("Suspend", "web")
    assert (await node.start("web")).status.state == State.DOMAIN_STATE_PAUSED
    await node.stop("web")
    assert (await node.stop("web")).status.state == State.DOMAIN_STATE_SHUT_OFF
    await node.delete("web")
    await node.delete("web", allow_missing=True)


@pytest.mark.parametrize("verb", ["Reboot", "Reset", "Suspend", "Resume"])
async def test_verbs_that_mean_nothing_are_refused(node: Service, verb: str) -> None:
    await node.create("web")
    with pytest.raises(Refused) as refused:
        await node.verb(verb, "web")
    assert refused.value.reason == "WRONG_STATE"
    assert refused.value.metadata["state"] == "SHUT_OFF"


async def test_an_active_domain_is_not_deleted(node: Service) -> None:
    await node.create("web", start=True)
    with pytest.raises(Refused) as refused:
        await node.delete("web")
    assert refused.value.reason == "WRONG_STATE"
    assert refused.value.metadata["state"] == "RUNNING"


async def test_a_guest_that_does_not_comply(node: Service) -> None:
    spec = domain_spec_pb2.DomainSpec(test=domain_spec_pb2.TestOptions(obeys_power_button=False))
    await node.create("deaf", spec=spec, start=True)
    with pytest.raises(Refused) as refused:
        await node.stop("deaf", domain_pb2.STOP_MODE_GRACEFUL, grace_period=seconds(0.1))
    assert refused.value.reason == "GUEST_DID_NOT_COMPLY"
    assert (await node.get("deaf")).status.state == State.DOMAIN_STATE_RUNNING
    domain = await node.stop("deaf", domain_pb2.STOP_MODE_GRACEFUL_THEN_FORCE, grace_period=seconds(0.1))
    assert domain.status.state_reason == Reason.DOMAIN_STATE_REASON_DESTROYED


async def test_a_transient_domain_starts_at_once_and_vanishes_at_its_stop(node: Service) -> None:
    spec = domain_spec_pb2.DomainSpec(lifetime=resource_pb2.LIFETIME_TRANSIENT)
    domain = await node.create("guest", spec=spec)
    assert domain.status.state == State.DOMAIN_STATE_RUNNING
    stopped = await node.stop("guest")
    assert stopped.status.state == State.DOMAIN_STATE_SHUT_OFF
    assert not (await node.list()).domains


async def test_deletion_protection(node: Service) -> None:
    spec = domain_spec_pb2.DomainSpec(deletion_protection=True)
    domain = await node.create("db", spec=spec)
    with pytest.raises(Refused) as refused:
        await node.delete("db")
    assert refused.value.reason == "DELETION_PROTECTED"
    domain.spec.deletion_protection = False
    await node.update(domain, "spec.deletion_protection")
    await node.delete("db")


async def test_a_failed_start_says_why_and_leaves_the_domain_stopped(node: Service) -> None:
    await node.create("web")
    node.faults({"method": "start", "reason": "HYPERVISOR_FAILED", "message": "no such machine"})
    with pytest.raises(Refused) as refused:
        await node.start("web")
    assert refused.value.reason == "HYPERVISOR_FAILED"
    domain = await node.get("web")
    assert domain.status.state == State.DOMAIN_STATE_SHUT_OFF
    assert domain.status.state_reason == Reason.DOMAIN_STATE_REASON_START_FAILED
    assert domain.status.last_failure.message == "no such machine"
    assert node.app.context.admission.active_count == 0
    node.faults()
    domain = await node.start("web")
    assert not domain.status.HasField("last_failure")


async def test_a_failed_start_inside_create_undoes_the_domain(node: Service) -> None:
    node.faults({"method": "start", "reason": "HYPERVISOR_FAILED"})
    with pytest.raises(Refused) as refused:
        await node.create("web", start=True)
    assert refused.value.reason == "HYPERVISOR_FAILED"
    assert not (await node.list()).domains
    node.faults()
    await node.create("web", start=True)


async def test_a_start_whose_answer_was_lost_leaves_no_guest(node: Service) -> None:
    await node.create("web")
    node.faults({"method": "start", "reason": "HYPERVISOR_FAILED", "when": "after"})
    with pytest.raises(Refused):
        await node.start("web")
    observation = await node.driver.inspect(ref(await node.get("web")))
    assert not observation.active
    assert not (await node.get("web")).status.active


@pytest.mark.parametrize("verb", ["CreateDomain", "StartDomain"])
async def test_what_is_cancelled_before_its_turn_leaves_nothing_written_down(node: Service, verb: str) -> None:
    uid = "0b6cf1a4-5a0e-4f5e-9d0a-0d5f3c1f7a11"
    create = domain_pb2.CreateDomainRequest(parent=PARENT, domain_id="web", domain=domain_pb2.Domain(uid=uid))
    start = domain_pb2.StartDomainRequest(name=name("web"))
    if verb == "CreateDomain":
        create.start.SetInParent()
    else:
        await node.do(node.domains.CreateDomain, create, domain_pb2.Domain)
    request = create if verb == "CreateDomain" else start
    request.inline_wait.SetInParent()
    # As the sweep has it while it gives back what an earlier domain of this uid had.
    async with node.app.context.holds.held(uid):
        operation = await node.call(getattr(node.domains, verb), request)
        await node.call(node.operations.CancelOperation, operations_pb2.CancelOperationRequest(name=operation.name))
        assert Refused((await node.wait(operation)).error).reason == "OPERATION_CANCELLED"
    for space in (records.CREATE, records.START):
        assert not node.app.store.list_records(space)
    request.ClearField("inline_wait")
    domain = await node.do(getattr(node.domains, verb), request, domain_pb2.Domain)
    assert domain.status.state == State.DOMAIN_STATE_RUNNING


async def test_a_mac_that_nobody_asked_for_is_a_free_one(node: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = domain_spec_pb2.DomainSpec()
    spec.interfaces["net0"].mac_address = "52:54:00:00:00:01"
    await node.create("web", spec=spec)
    monkeypatch.setattr(specs, "_draws", itertools.count(1))
    spec.interfaces["net0"].ClearField("mac_address")
    made = await node.create("other", spec=spec)
    assert made.status.resolved_spec.interfaces["net0"].mac_address == "52:54:00:00:00:02"


async def test_ids_uids_and_macs_are_taken_once(node: Service) -> None:
    spec = domain_spec_pb2.DomainSpec()
    spec.interfaces["net0"].mac_address = "52:54:00:00:00:01"
    domain = await node.create("one", spec=spec)
    with pytest.raises(Refused) as refused:
        await node.create("one")
    taken = grpc.StatusCode.ALREADY_EXISTS.value[0]
    assert (refused.value.code, refused.value.reason) == (taken, "RESOURCE_EXISTS")
    claims: list[tuple[dict[str, Any], str]] = [
        ({"spec": spec}, "domain.spec.interfaces.net0.mac_address"),
        ({"uid": domain.uid}, "domain.uid"),
    ]
    for fields, field in claims:
        with pytest.raises(Refused) as refused:
            await node.create("two", **fields)
        assert (refused.value.code, refused.value.reason) == (taken, "IDENTITY_IN_USE")
        assert refused.value.metadata["holder"] == name("one")
        assert refused.value.metadata["field"] == field
    assert [row.name for row in node.app.store.list("domain")] == [name("one")]
    await node.delete("one")
    await node.create("two", spec=spec, uid=domain.uid)


@pytest.mark.parametrize(
    ("id_", "reason"),
    [
        *(
            (id_, "NAME_MALFORMED")
            for id_ in ("Web", "-a", "a" * 64, "wéb", "0a", "deadbeef-0000-4000-8000-000000000000")
        ),
        ("", "FIELD_REQUIRED"),
    ],
)
async def test_bad_ids(node: Service, id_: str, reason: str) -> None:
    with pytest.raises(Refused) as refused:
        await node.create(id_)
    assert (refused.value.code, refused.value.reason, refused.value.fields) == (
        grpc.StatusCode.INVALID_ARGUMENT.value[0],
        reason,
        ["domain_id"],
    )
    assert not node.app.store.list("domain")


async def test_get_by_uid_and_basic_view(node: Service) -> None:
    domain = await node.create("web", start=True)
    assert await node.get(domain.uid) == domain
    basic = await node.get("web", view=resource_pb2.RESOURCE_VIEW_BASIC)
    assert not basic.HasField("spec")
    assert not basic.status.HasField("active_spec")
    assert not basic.status.HasField("resolved_spec")
    assert basic.status.state == State.DOMAIN_STATE_RUNNING


async def test_memory_that_the_node_does_not_have(node: Service) -> None:
    report = node.app.context.hypervisors.report("test")
    object.__setattr__(report, "uses_host_memory", True)
    spec = domain_spec_pb2.DomainSpec()
    spec.memory.maximum_bytes = 1 << 44
    await node.create("big", spec=spec)
    with pytest.raises(Refused) as refused:
        await node.start("big")
    assert (refused.value.code, refused.value.reason) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED.value[0],
        "NODE_MEMORY_SHORT",
    )
    domain = await node.get("big")
    assert domain.status.state == State.DOMAIN_STATE_SHUT_OFF
    assert not (await node.driver.inspect(ref(domain))).active
    assert node.app.context.admission.active_count == 0
    assert not node.app.store.list_records(records.START)


async def test_lists_have_pages_filters_and_tokens(node: Service) -> None:
    for number in range(5):
        await node.create(f"d{number}", labels={"odd": str(number % 2)}, start=number == 3)
    first = await node.list(page_size=2)
    assert [domain.name for domain in first.domains] == [name("d0"), name("d1")]
    second = await node.list(page_size=10, page_token=first.next_page_token)
    assert [domain.name for domain in second.domains] == [name("d2"), name("d3"), name("d4")]
    assert [domain.name for domain in (await node.list(filter='labels.odd="1"')).domains] == [name("d1"), name("d3")]
    running = await node.list(filter="status.state=RUNNING")
    assert [domain.name for domain in running.domains] == [name("d3")]
    with pytest.raises(Refused) as refused:
        await node.list(filter="nonsense=")
    assert refused.value.reason == "FILTER_SYNTAX"
    request = domain_pb2.BatchGetDomainsRequest(parent=PARENT, names=[name("d1"), name("missing")])
    answer = await node.call(node.domains.BatchGetDomains, request)
    assert [result.status.code for result in answer.results] == [0, 5]
    assert answer.results[0].domain.labels["odd"] == "1"

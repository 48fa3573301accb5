"""Many domains in one call."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from google.longrunning import operations_pb2

from tests.integration.compute.rig import PARENT, Refused, Service, State, metadata, name, service
from virtfleet.compute.v1 import domain_pb2, domain_spec_pb2
from virtfleet_compute import records

COUNT = 1000


async def test_one_result_per_item(node: Service) -> None:
    await node.create("b")
    requests = [domain_pb2.CreateDomainRequest(domain_id=id_, domain=domain_pb2.Domain()) for id_ in ("a", "b", "c")]
    requests[2].start.SetInParent()
    batch = domain_pb2.BatchCreateDomainsRequest(parent=PARENT, requests=requests)
    operation = await node.wait(await node.call(node.domains.BatchCreateDomains, batch))
    response = domain_pb2.BatchCreateDomainsResponse()
    assert operation.response.Unpack(response)
    assert [result.name for result in response.results] == [name("a"), name("b"), name("c")]
    assert [result.status.code for result in response.results] == [0, 6, 0]
    assert response.results[2].domain.status.state == State.DOMAIN_STATE_RUNNING
    detail = metadata(operation).batch
    assert (detail.total_count, detail.succeeded_count, detail.failed_count) == (3, 2, 1)
    start = domain_pb2.BatchStartDomainsRequest(
        parent=PARENT, requests=[domain_pb2.StartDomainRequest(name=name(id_)) for id_ in ("a", "b", "gone")]
    )
    answer = await node.do(node.domains.BatchStartDomains, start, domain_pb2.BatchStartDomainsResponse)
    assert [result.status.code for result in answer.results] == [0, 0, 5]
    delete = domain_pb2.BatchDeleteDomainsRequest(
        parent=PARENT,
        requests=[
            domain_pb2.DeleteDomainRequest(name=name("a")),
            domain_pb2.DeleteDomainRequest(name=name("b"), stop=True),
            domain_pb2.DeleteDomainRequest(name=name("gone"), allow_missing=True),
        ],
    )
    deleted = await node.do(node.domains.BatchDeleteDomains, delete, domain_pb2.BatchDeleteDomainsResponse)
    assert [result.status.code for result in deleted.results] == [9, 0, 0]
    assert [domain.name for domain in (await node.list()).domains] == [name("a"), name("c")]


@pytest.mark.parametrize(
    "item",
    [
        domain_pb2.StartDomainRequest(name=name("a"), request_id="x"),
        domain_pb2.StartDomainRequest(name=name("a"), validate_only=True),
        domain_pb2.StartDomainRequest(name="nodes/n1/domains/b", inline_wait={"seconds": 1}),  # type: ignore[arg-type]  # a dict will do
    ],
    ids=["request_id", "validate_only", "inline_wait"],
)
async def test_what_steers_a_call_stands_in_the_batch(node: Service, item: domain_pb2.StartDomainRequest) -> None:
    batch = domain_pb2.BatchStartDomainsRequest(parent=PARENT, requests=[item])
    with pytest.raises(Refused) as refused:
        await node.call(node.domains.BatchStartDomains, batch)
    assert refused.value.reason == "FIELD_CONFLICT"


async def test_a_plan_of_a_batch(node: Service) -> None:
    requests = [domain_pb2.CreateDomainRequest(domain_id="a", domain=domain_pb2.Domain())]
    batch = domain_pb2.BatchCreateDomainsRequest(parent=PARENT, requests=requests, validate_only=True)
    answer = await node.do(node.domains.BatchCreateDomains, batch, domain_pb2.BatchCreateDomainsResponse)
    assert answer.results[0].domain.status.resolved_spec.os.machine
    assert not (await node.list()).domains


async def test_a_plan_says_what_the_batch_would(node: Service) -> None:
    await node.create("a")
    await node.create("on", start=True)
    mac = "52:54:00:00:00:01"
    card = domain_spec_pb2.DomainSpec()
    card.interfaces["net0"].mac_address = mac
    create = domain_pb2.BatchCreateDomainsRequest(
        parent=PARENT,
        requests=[
            domain_pb2.CreateDomainRequest(domain_id=id_, domain=domain_pb2.Domain(spec=spec))
            for id_, spec in (("a", None), ("b", card), ("c", card))
        ],
    )
    delete = domain_pb2.BatchDeleteDomainsRequest(
        parent=PARENT,
        requests=[
            domain_pb2.DeleteDomainRequest(name=name("a")),
            domain_pb2.DeleteDomainRequest(name=name("gone"), allow_missing=True),
            domain_pb2.DeleteDomainRequest(name=name("gone"[:3])),
            domain_pb2.DeleteDomainRequest(name=name("on")),
        ],
    )
    batches: list[tuple[Any, Any, Any]] = [
        (node.domains.BatchCreateDomains, create, domain_pb2.BatchCreateDomainsResponse),
        (node.domains.BatchDeleteDomains, delete, domain_pb2.BatchDeleteDomainsResponse),
    ]
    for method, batch, kind in batches:
        plan = type(batch)()
        plan.CopyFrom(batch)
        plan.validate_only = True
        planned = await node.do(method, plan, kind)
        done = await node.do(method, batch, kind)
        for one, other in zip(planned.results, done.results, strict=True):
            assert one.status.code == other.status.code, (one, other)
            assert one.HasField("domain") == other.HasField("domain"), one
    assert [domain.name for domain in (await node.list()).domains] == [name("b"), name("on")]


async def test_a_plan_of_one_domain_looks_at_what_is_taken(node: Service) -> None:
    domain = await node.create("a")
    request = domain_pb2.CreateDomainRequest(
        parent=PARENT, domain_id="b", domain=domain_pb2.Domain(uid=domain.uid), validate_only=True
    )
    apply = domain_pb2.UpdateDomainRequest(
        domain=domain_pb2.Domain(name=name("b"), uid=domain.uid), allow_missing=True, validate_only=True
    )
    for method, plan in ((node.domains.CreateDomain, request), (node.domains.UpdateDomain, apply)):
        with pytest.raises(Refused) as refused:
            await node.call(method, plan)
        assert (refused.value.reason, refused.value.metadata["field"]) == ("IDENTITY_IN_USE", "domain.uid")
    request.domain.ClearField("uid")
    operation = await node.call(node.domains.CreateDomain, request)
    assert metadata(operation).target == name("b")
    assert [one.name for one in (await node.list()).domains] == [name("a")]


async def test_an_item_that_occurs_twice_is_named_by_a_field_that_it_has(node: Service) -> None:
    twice = [domain_pb2.CreateDomainRequest(domain_id="a", domain=domain_pb2.Domain())] * 2
    batch = domain_pb2.BatchCreateDomainsRequest(parent=PARENT, requests=twice)
    with pytest.raises(Refused) as refused:
        await node.call(node.domains.BatchCreateDomains, batch)
    assert (refused.value.reason, refused.value.fields) == ("FIELD_CONFLICT", ["requests[1].domain_id"])


@pytest.mark.parametrize("verb", ["Create", "Start"])
async def test_a_batch_that_is_cancelled_at_any_moment_leaves_nothing_written_down(node: Service, verb: str) -> None:
    ids = [f"d{number}" for number in range(8)]
    request: domain_pb2.BatchCreateDomainsRequest | domain_pb2.BatchStartDomainsRequest
    if verb == "Create":
        creates = [
            domain_pb2.CreateDomainRequest(domain_id=id_, domain=domain_pb2.Domain(), start=domain_pb2.StartOptions())
            for id_ in ids
        ]
        request = domain_pb2.BatchCreateDomainsRequest(parent=PARENT, requests=creates)
    else:
        starts = [domain_pb2.StartDomainRequest(name=name(id_)) for id_ in ids]
        request = domain_pb2.BatchStartDomainsRequest(parent=PARENT, requests=starts)
        await asyncio.gather(*map(node.create, ids))
    request.inline_wait.SetInParent()
    for round_ in range(40):
        operation = await node.call(getattr(node.domains, f"Batch{verb}Domains"), request)
        await asyncio.sleep(round_ / 4000)
        with suppress(Refused):
            await node.call(node.operations.CancelOperation, operations_pb2.CancelOperationRequest(name=operation.name))
        await node.wait(operation)
        domains = (await node.list()).domains
        # What came to its end before has succeeded, and all of the rest is as if it had never been asked for.
        active = {domain.uid for domain in domains if domain.status.active}
        assert {guest.uid for guest in await node.driver.list() if guest.active} == active
        for space in (records.CREATE, records.START):
            assert not node.app.store.list_records(space)
        for domain in domains:
            id_ = domain.name.rpartition("/")[2]
            await (node.delete(id_, stop=True) if verb == "Create" else node.stop(id_))


async def test_a_thousand_at_once(place: Path) -> None:
    spec = domain_spec_pb2.DomainSpec()
    spec.interfaces["net0"].SetInParent()
    spec.serials["con"].SetInParent()
    async with service(place) as node:
        requests = [
            domain_pb2.CreateDomainRequest(domain_id=f"d{number:04}", domain=domain_pb2.Domain(spec=spec))
            for number in range(COUNT)
        ]
        began = time.perf_counter()
        create = domain_pb2.BatchCreateDomainsRequest(parent=PARENT, requests=requests)
        create.inline_wait.FromSeconds(20)
        answer = await node.do(node.domains.BatchCreateDomains, create, domain_pb2.BatchCreateDomainsResponse)
        defined = time.perf_counter()
        assert not [result.status.message for result in answer.results if result.status.code]
        start = domain_pb2.BatchStartDomainsRequest(
            parent=PARENT,
            requests=[domain_pb2.StartDomainRequest(name=name(f"d{number:04}")) for number in range(COUNT)],
        )
        start.inline_wait.FromSeconds(20)
        started_answer = await node.do(node.domains.BatchStartDomains, start, domain_pb2.BatchStartDomainsResponse)
        started = time.perf_counter()
        assert not [result.status.message for result in started_answer.results if result.status.code]
        print(f"define {defined - began:.3f} s, start {started - defined:.3f} s")
        assert node.app.context.admission.active_count == COUNT
        stop = domain_pb2.BatchStopDomainsRequest(
            parent=PARENT,
            requests=[
                domain_pb2.StopDomainRequest(name=name(f"d{number:04}"), mode=domain_pb2.STOP_MODE_FORCE)
                for number in range(COUNT)
            ],
        )
        stop.inline_wait.FromSeconds(20)
        stopped = await node.do(node.domains.BatchStopDomains, stop, domain_pb2.BatchStopDomainsResponse)
        assert not [result.status.message for result in stopped.results if result.status.code]

from __future__ import annotations

import asyncio
import json
import signal
import time
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.longrunning import operations_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.integration.gateway.client import Watcher, create, failure, list_all, names
from tests.integration.gateway.nodes import details_of
from tests.integration.gateway.real import RealFleet, eventually
from virtfleet.common.v1 import admin_pb2, admin_pb2_grpc
from virtfleet.compute.v1 import console_pb2, console_pb2_grpc, domain_pb2, domain_pb2_grpc, stats_pb2, stats_pb2_grpc
from virtfleet.compute.v1 import watch_pb2 as compute_watch
from virtfleet.compute.v1 import watch_pb2_grpc as compute_watch_grpc
from virtfleet.fleet.v1 import enrollment_pb2, enrollment_pb2_grpc, node_pb2, node_pb2_grpc
from virtfleet.fleet.v1 import watch_pb2 as fleet_watch
from virtfleet.fleet.v1 import watch_pb2_grpc as fleet_watch_grpc
from virtfleet.type.v1 import resource_pb2, watch_pb2
from virtfleet_gateway.authority import Authority, new_request
from virtfleet_gateway.credentials import OwnCertificate

pytestmark = pytest.mark.timeout(120)


# Nodes


async def test_a_node_shows_its_state_its_channels_and_its_room(fleet: RealFleet) -> None:
    node = await eventually(lambda: fleet.node("n1"), lambda node: node.status.HasField("index_observe_time"))
    assert node.status.state == node_pb2.NODE_STATE_READY
    assert node.status.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert {service.service for service in node.status.services} == {"compute", "storage", "network"}
    for service in node.status.services:
        assert service.channel_state == node_pb2.CHANNEL_STATE_READY
        assert service.state == node_pb2.SERVICE_STATE_SERVING
        assert service.certificate_expire_time.seconds > time.time()
    assert node.status.capacity.vcpu_count == 8
    assert node.status.allocatable.memory_bytes == 1 << 33
    assert node.status.allocated.domain_count == 3
    assert time.time() - node.status.last_seen_time.seconds < 5
    nodes = node_pb2_grpc.NodeServiceStub(fleet.channel)
    by_uid = await nodes.GetNode(node_pb2.GetNodeRequest(name=f"nodes/{node.uid}"))
    assert by_uid.name == "nodes/n1"
    listed = await nodes.ListNodes(node_pb2.ListNodesRequest())
    assert [node.name for node in listed.nodes] == ["nodes/n1", "nodes/n2"]
    assert not listed.unreachable
    error = await failure(nodes.GetNode(node_pb2.GetNodeRequest(name="nodes/n9")))
    assert (error.code(), details_of(error)["reason"]) == (grpc.StatusCode.NOT_FOUND, "NODE_UNKNOWN")


async def test_updates_and_cordons(fleet: RealFleet) -> None:
    nodes = node_pb2_grpc.NodeServiceStub(fleet.channel)
    node = await fleet.node("n1")
    update = node_pb2.UpdateNodeRequest(node=node_pb2.Node(name="nodes/n1", labels={"rack": "r1"}))
    update.update_mask.paths.append("labels")
    changed = await nodes.UpdateNode(update)
    assert changed.labels["rack"] == "r1"
    assert changed.generation == node.generation + 1
    stale = node_pb2.UpdateNodeRequest(node=node_pb2.Node(name="nodes/n1", etag=node.etag))
    error = await failure(nodes.UpdateNode(stale))
    assert details_of(error)["reason"] == "ETAG_MISMATCH"
    found = await nodes.ListNodes(node_pb2.ListNodesRequest(filter='labels.rack="r1"'))
    assert [node.name for node in found.nodes] == ["nodes/n1"]

    planned = await nodes.CordonNode(node_pb2.CordonNodeRequest(name="nodes/n1", validate_only=True))
    assert planned.spec.schedulable is False
    assert (await fleet.node("n1")).spec.schedulable is True
    cordoned = await nodes.CordonNode(node_pb2.CordonNodeRequest(name="nodes/n1", request_id="r1"))
    again = await nodes.CordonNode(node_pb2.CordonNodeRequest(name="nodes/n1", request_id="r1"))
    assert cordoned.generation == again.generation == changed.generation + 1
    error = await failure(create(fleet, "n1", "web"))
    assert (error.code(), details_of(error)["reason"]) == (grpc.StatusCode.FAILED_PRECONDITION, "NODE_CORDONED")
    apply = domain_pb2.UpdateDomainRequest(domain=domain_pb2.Domain(name="nodes/n1/domains/web"), allow_missing=True)
    domains = domain_pb2_grpc.DomainServiceStub(fleet.channel)
    error = await failure(domains.UpdateDomain(apply))
    assert details_of(error)["reason"] == "NODE_CORDONED"
    await create(fleet, "n2", "web")
    apply.domain.name = "nodes/n2/domains/web"
    assert (await domains.UpdateDomain(apply)).done
    await nodes.UncordonNode(node_pb2.UncordonNodeRequest(name="nodes/n1"))
    await create(fleet, "n1", "web")


async def test_a_frozen_node_is_not_ready_within_seconds_and_ready_again(fleet: RealFleet) -> None:
    await create(fleet, "n1", "a")
    await create(fleet, "n2", "b")
    await eventually(lambda: list_all(fleet), lambda answer: len(answer.domains) == 2)
    watcher = Watcher(fleet)
    await watcher.until(lambda watch: watch.snapshot_ended)
    fleet.nodes["n1"].send(signal.SIGSTOP)
    frozen = time.monotonic()
    # Stats are asked of the nodes: the frozen one takes nothing of the other's time.
    stats = stats_pb2_grpc.StatsServiceStub(fleet.channel)
    started = time.monotonic()
    counted = await stats.BatchGetDomainStats(stats_pb2.BatchGetDomainStatsRequest(parent="nodes/-"), timeout=2)
    assert time.monotonic() - started < 2
    assert [one.name for one in counted.stats] == ["nodes/n2/domains/b"]
    assert [one.node for one in counted.unreachable] == ["nodes/n1"]

    node = await fleet.wait_state("n1", node_pb2.NODE_STATE_NOT_READY, 10)
    assert time.monotonic() - frozen < 8
    assert node.status.reason in ("SERVICE_UNREACHABLE", "HEARTBEAT_MISSED")
    await watcher.until(lambda watch: ("nodes/n1", watch_pb2.SOURCE_STATE_STALE) in watch.statuses)
    # A call is refused at once, long before its deadline.
    started = time.monotonic()
    domains = domain_pb2_grpc.DomainServiceStub(fleet.channel)
    error = await failure(domains.GetDomain(domain_pb2.GetDomainRequest(name="nodes/n1/domains/a"), timeout=30))
    assert (error.code(), details_of(error)["reason"]) == (grpc.StatusCode.UNAVAILABLE, "NODE_UNREACHABLE")
    assert time.monotonic() - started < 3
    # Lists leave it out and say so; or give what was last seen, and say how old that is.
    answer = await list_all(fleet)
    assert names(answer) == ["nodes/n2/domains/b"]
    assert [one.node for one in answer.unreachable] == ["nodes/n1"]
    assert answer.unreachable[0].HasField("last_seen_time")
    assert not answer.unreachable[0].HasField("observe_time")
    answer = await list_all(fleet, allow_stale=True)
    assert names(answer) == ["nodes/n1/domains/a", "nodes/n2/domains/b"]
    assert answer.unreachable[0].HasField("observe_time")

    fleet.nodes["n1"].send(signal.SIGCONT)
    await fleet.wait_state("n1", node_pb2.NODE_STATE_READY, 20)
    await watcher.until(lambda watch: ("nodes/n1", watch_pb2.SOURCE_STATE_LIVE) in watch.statuses)
    await eventually(lambda: list_all(fleet), lambda answer: len(answer.domains) == 2 and not answer.unreachable)
    assert watch_pb2.SOURCE_STATE_RESYNCING not in [state for _, state in watcher.statuses]
    await watcher.stop()


async def test_a_killed_node_comes_back_without_a_gap(fleet: RealFleet) -> None:
    await create(fleet, "n1", "a")
    watcher = Watcher(fleet)
    await watcher.until(lambda watch: "nodes/n1/domains/a" in watch.known)
    await fleet.nodes["n1"].end()
    await fleet.wait_state("n1", node_pb2.NODE_STATE_NOT_READY)
    await watcher.until(lambda watch: ("nodes/n1", watch_pb2.SOURCE_STATE_STALE) in watch.statuses)
    await create(fleet, "n2", "b")
    await watcher.until(lambda watch: "nodes/n2/domains/b" in watch.known)
    await fleet.nodes["n1"].start()
    await fleet.wait_state("n1", node_pb2.NODE_STATE_READY, 30)
    await create(fleet, "n1", "c")
    await watcher.until(lambda watch: "nodes/n1/domains/c" in watch.known)
    assert watch_pb2.SOURCE_STATE_RESYNCING not in [state for _, state in watcher.statuses]
    assert sorted(watcher.known) == ["nodes/n1/domains/a", "nodes/n1/domains/c", "nodes/n2/domains/b"]
    await watcher.stop()


async def test_a_deleted_node_is_gone_and_its_certificates_too(fleet: RealFleet) -> None:
    await create(fleet, "n1", "a")
    watcher = Watcher(fleet)
    await watcher.until(lambda watch: "nodes/n1/domains/a" in watch.known)
    own = fleet_watch_grpc.WatchServiceStub(fleet.channel).WatchResources(fleet_watch.WatchResourcesRequest())
    nodes = node_pb2_grpc.NodeServiceStub(fleet.channel)
    node = await fleet.node("n1")
    error = await failure(nodes.DeleteNode(node_pb2.DeleteNodeRequest(name="nodes/n1", expected_uid=node.uid[::-1])))
    assert details_of(error)["reason"] == "UID_MISMATCH"
    request = node_pb2.DeleteNodeRequest(name="nodes/n1", expected_uid=node.uid, request_id="once")
    operation = await nodes.DeleteNode(request)
    assert operation.done
    last = node_pb2.Node()
    assert operation.response.Unpack(last)
    assert last.uid == node.uid
    get = fleet.channel.unary_unary(
        "/google.longrunning.Operations/GetOperation",
        request_serializer=operations_pb2.GetOperationRequest.SerializeToString,
        response_deserializer=operations_pb2.Operation.FromString,
    )
    kept = await get(operations_pb2.GetOperationRequest(name=operation.name))
    assert kept.done
    assert operation.name.startswith("operations/")
    await watcher.until(lambda watch: ("nodes/n1", watch_pb2.SOURCE_STATE_LOST) in watch.statuses)
    domains = domain_pb2_grpc.DomainServiceStub(fleet.channel)
    error = await failure(domains.GetDomain(domain_pb2.GetDomainRequest(name="nodes/n1/domains/a")))
    assert details_of(error)["reason"] == "NODE_UNKNOWN"
    assert names(await list_all(fleet)) == []
    removed = False
    async with asyncio.timeout(10):
        async for response in own:
            removed = removed or any(
                change.event.type == fleet_watch.EVENT_TYPE_NODE_REMOVED for change in response.changes
            )
            if removed:
                break
    own.cancel()
    assert await nodes.DeleteNode(request) == operation, "a repetition has the same answer"
    absent = node_pb2.DeleteNodeRequest(name="nodes/n1", allow_missing=True, request_id="absent")
    again = await nodes.DeleteNode(absent)
    assert again.done
    assert again.response.Unpack(last)
    assert last == node_pb2.Node(name="nodes/n1")
    assert await get(operations_pb2.GetOperationRequest(name=again.name)) == again, "an operation like any other"
    await fleet.enroll("n3")
    for name in ("nodes/n1", "nodes/n3"):
        absent.name = name
        absent.request_id = f"absent {name}"
        absent.validate_only = True
        planned = await nodes.DeleteNode(absent)
        assert (planned.name, planned.done) == ("", True)
    assert (await fleet.node("n3")).name == "nodes/n3"
    await watcher.stop()


# Calls


async def test_calls_reach_their_node_with_the_caller(fleet: RealFleet) -> None:
    await create(fleet, "n1", "a")
    domains = domain_pb2_grpc.DomainServiceStub(fleet.channel)
    found = await domains.GetDomain(domain_pb2.GetDomainRequest(name="nodes/n1/domains/a"))
    assert found.display_name == "domain a"
    error = await failure(domains.GetDomain(domain_pb2.GetDomainRequest(name="nodes/n2/domains/a")))
    assert (error.code(), details_of(error)["reason"]) == (grpc.StatusCode.NOT_FOUND, "RESOURCE_NOT_FOUND")
    watcher = Watcher(fleet)
    await watcher.until(lambda watch: watch.snapshot_ended)
    await domains.StartDomain(domain_pb2.StartDomainRequest(name="nodes/n1/domains/a"))
    await watcher.until(lambda watch: watch.events)
    assert watcher.events[0].message == "spiffe://virtfleet.dev/user/admin via spiffe://virtfleet.dev/gateway/g1"
    await watcher.stop()
    # What a caller says about itself is refused.
    forged = domains.GetDomain(
        domain_pb2.GetDomainRequest(name="nodes/n1/domains/a"), metadata=(("x-virtfleet-caller-bin", b"\x0a\x05admin"),)
    )
    error = await failure(forged)
    assert (error.code(), details_of(error)["reason"]) == (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_INVALID")
    console: Any = console_pb2_grpc.ConsoleServiceStub(fleet.channel).OpenConsole()
    await console.write(console_pb2.OpenConsoleRequest(name="nodes/n1/domains/a", data=b"one"))
    assert (await console.read()).data.data == b"one"
    await console.write(console_pb2.OpenConsoleRequest(data=b"two"))
    assert (await console.read()).data.data == b"two"
    await console.done_writing()
    assert await console.read() is grpc.aio.EOF


async def test_roles_hold_at_the_gateway(fleet: RealFleet) -> None:
    await create(fleet, "n1", "a")
    async with fleet.connect(fleet.issue("eve", "viewer")) as channel:
        domains = domain_pb2_grpc.DomainServiceStub(channel)
        assert (await domains.GetDomain(domain_pb2.GetDomainRequest(name="nodes/n1/domains/a"))).uid
        error = await failure(domains.DeleteDomain(domain_pb2.DeleteDomainRequest(name="nodes/n1/domains/a")))
        assert (error.code(), details_of(error)["reason"]) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")
        nodes = node_pb2_grpc.NodeServiceStub(channel)
        assert (await nodes.GetNode(node_pb2.GetNodeRequest(name="nodes/n1"))).uid
        error = await failure(nodes.CordonNode(node_pb2.CordonNodeRequest(name="nodes/n1")))
        assert details_of(error)["reason"] == "PERMISSION_MISSING"
    async with fleet.connect(fleet.issue("nobody")) as channel:
        domains = domain_pb2_grpc.DomainServiceStub(channel)
        error = await failure(domains.ListDomains(domain_pb2.ListDomainsRequest(parent="nodes/-")))
        assert details_of(error)["reason"] == "PERMISSION_MISSING"
    audit = (fleet.folder / "gateway/gateway.audit.refused.log").read_text().splitlines()
    refused = [entry for entry in map(json.loads, audit) if entry.get("reason") == "PERMISSION_MISSING"]
    assert any(entry["method"].endswith("DeleteDomain") for entry in refused)


async def test_methods_that_are_not_there(fleet: RealFleet) -> None:
    for path in (
        "/virtfleet.compute.v1.DomainService/DestroyEverything",
        "/virtfleet.node.v1.AttachmentService/AttachVolume",
        "/no.such.Service/Method",
    ):
        call: Any = fleet.channel.unary_unary(path)
        error = await failure(call(b"\x0a\x08nodes/n1"))
        assert (error.code(), details_of(error)["reason"]) == (
            grpc.StatusCode.UNIMPLEMENTED,
            "METHOD_NOT_IMPLEMENTED",
        ), path


async def test_the_gateways_own_common_methods_and_those_of_services(fleet: RealFleet) -> None:
    admin = admin_pb2_grpc.AdminServiceStub(fleet.channel)
    own = await admin.GetServer(admin_pb2.GetServerRequest())
    assert own.name == "gateways/g1"
    assert own.identity == "spiffe://virtfleet.dev/gateway/g1"
    compute = await admin.GetServer(admin_pb2.GetServerRequest(name="nodes/n1/services/compute"))
    assert compute.identity == "spiffe://virtfleet.dev/node/n1/compute"
    access = admin_pb2_grpc.AccessServiceStub(fleet.channel)
    me = await access.WhoAmI(admin_pb2.WhoAmIRequest())
    assert (me.subject, me.via) == ("spiffe://virtfleet.dev/user/admin", "")
    there = await access.WhoAmI(admin_pb2.WhoAmIRequest(name="nodes/n2/services/storage"))
    assert (there.subject, there.via) == ("spiffe://virtfleet.dev/user/admin", "spiffe://virtfleet.dev/gateway/g1")


async def test_health_and_reflection_of_the_gateway_a_node_and_a_service(fleet: RealFleet) -> None:
    health = health_pb2_grpc.HealthStub(fleet.channel)
    serving = health_pb2.HealthCheckResponse.SERVING
    for place in ((), (("x-virtfleet-node", "n1"),), (("x-virtfleet-node", "n1/storage"),)):
        assert (await health.Check(health_pb2.HealthCheckRequest(), metadata=place)).status == serving
    error = await failure(health.Check(health_pb2.HealthCheckRequest(), metadata=(("x-virtfleet-node", "n9"),)))
    assert details_of(error)["reason"] == "NODE_UNKNOWN"

    async def services(*place: tuple[str, str]) -> set[str]:
        call = reflection_pb2_grpc.ServerReflectionStub(fleet.channel).ServerReflectionInfo(metadata=place)
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        await call.done_writing()
        answer = await call.read()
        return {service.name for service in answer.list_services_response.service}

    union = await services()
    assert {"virtfleet.compute.v1.DomainService", "virtfleet.fleet.v1.NodeService"} <= union
    assert {"virtfleet.storage.v1.VolumeService", "google.longrunning.Operations"} <= union
    node = await services(("x-virtfleet-node", "n1"))
    assert {"virtfleet.compute.v1.DomainService", "virtfleet.storage.v1.WatchService"} <= node
    assert "virtfleet.fleet.v1.NodeService" not in node
    one = await services(("x-virtfleet-node", "n1/storage"))
    assert "virtfleet.storage.v1.WatchService" in one
    assert "virtfleet.compute.v1.DomainService" not in one


# Certificates


async def test_a_new_certificate_of_the_gateway_drops_no_call(fleet: RealFleet) -> None:
    await create(fleet, "n1", "a")
    console: Any = console_pb2_grpc.ConsoleServiceStub(fleet.channel).OpenConsole()
    await console.write(console_pb2.OpenConsoleRequest(name="nodes/n1/domains/a", data=b"one"))
    assert (await console.read()).data.data == b"one"
    watcher = Watcher(fleet)
    await watcher.until(lambda watch: watch.snapshot_ended)
    lanes = fleet.app.channels.node("n1")
    assert lanes is not None
    before = lanes["compute"].control
    identity = fleet.folder / "gateway/identity"
    serial = (identity / "gateway.crt").read_bytes()
    (identity / "gateway.crt").unlink()
    authority = Authority.load(fleet.folder / "authority")
    OwnCertificate(authority, identity, "g1", ("localhost", "127.0.0.1"), lambda: None).ensure()
    assert (identity / "gateway.crt").read_bytes() != serial
    async with asyncio.timeout(10):
        while lanes["compute"].control is before:
            await asyncio.sleep(0.05)
    await create(fleet, "n1", "b")
    await watcher.until(lambda watch: "nodes/n1/domains/b" in watch.known)
    await console.write(console_pb2.OpenConsoleRequest(data=b"two"))
    assert (await console.read()).data.data == b"two"
    console.cancel()
    assert not watcher.statuses
    await watcher.stop()


async def test_a_revoked_user_loses_the_streams_that_pass_through(fleet: RealFleet) -> None:
    await create(fleet, "n1", "a")
    key, csr = new_request("mallory")
    enrollment = enrollment_pb2_grpc.EnrollmentServiceStub(fleet.channel)
    issued = await enrollment.IssueUserCertificate(
        enrollment_pb2.IssueUserCertificateRequest(user="mallory", roles=["operator"], certificate_request=csr.decode())
    )
    ca = (fleet.folder / "authority/ca.crt").read_bytes()
    chain = issued.certificate.certificate_chain.encode()
    async with fleet.connect(grpc.ssl_channel_credentials(ca, key, chain)) as channel:
        console: Any = console_pb2_grpc.ConsoleServiceStub(channel).OpenConsole()
        await console.write(console_pb2.OpenConsoleRequest(name="nodes/n1/domains/a", data=b"one"))
        assert (await console.read()).data.data == b"one"
        revoked = time.monotonic()
        await enrollment.RevokeCertificate(enrollment_pb2.RevokeCertificateRequest(name=issued.certificate.certificate))
        error = await failure(asyncio.wait_for(console.read(), 10))
        assert time.monotonic() - revoked < 5
        assert (error.code(), details_of(error)["reason"]) == (grpc.StatusCode.UNAUTHENTICATED, "CERTIFICATE_REVOKED")
        domains = domain_pb2_grpc.DomainServiceStub(channel)
        error = await failure(domains.GetDomain(domain_pb2.GetDomainRequest(name="nodes/n1/domains/a")))
        assert details_of(error)["reason"] == "CERTIFICATE_REVOKED"


async def test_a_user_whose_certificate_ends_loses_calls_and_streams(fleet: RealFleet) -> None:
    """Those that pass through to a node and those that the gateway answers itself; nobody else notices."""
    await create(fleet, "n1", "a")
    lasting = Watcher(fleet)
    await lasting.until(lambda watch: watch.snapshot_ended)
    brief = fleet.issue("brief", "operator", seconds=6)
    get, everything = (
        domain_pb2.GetDomainRequest(name="nodes/n1/domains/a"),
        domain_pb2.ListDomainsRequest(parent="nodes/-"),
    )
    async with fleet.connect(brief) as channel:
        domains = domain_pb2_grpc.DomainServiceStub(channel)
        console: Any = console_pb2_grpc.ConsoleServiceStub(channel).OpenConsole()
        await console.write(console_pb2.OpenConsoleRequest(name="nodes/n1/domains/a", data=b"one"))
        assert (await console.read()).data.data == b"one"
        following = compute_watch_grpc.WatchServiceStub(channel).WatchResources(
            compute_watch.WatchResourcesRequest(parent="nodes/-")
        )
        await following.read()
        assert (await domains.GetDomain(get)).name == get.name

        async def cut_off() -> None:
            while await following.read() is not grpc.aio.EOF:
                pass

        for call in (
            lambda: asyncio.wait_for(console.read(), 15),
            lambda: asyncio.wait_for(cut_off(), 5),
            lambda: domains.GetDomain(get),
            lambda: domains.ListDomains(everything),
        ):
            error = await failure(call())
            told = details_of(error)
            assert (error.code(), told["reason"]) == (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_INVALID")
            assert "expire_time" in told["metadata"]
    async with fleet.connect(brief) as channel:
        error = await failure(domain_pb2_grpc.DomainServiceStub(channel).GetDomain(get, timeout=5))
        assert error.code() is grpc.StatusCode.UNAVAILABLE, "no connection is made"
    await create(fleet, "n1", "b")
    await lasting.until(lambda watch: "nodes/n1/domains/b" in watch.known)
    await lasting.stop()


# Lists over all nodes


async def test_lists_pages_filters_and_views(fleet: RealFleet) -> None:
    await create(fleet, "n1", *(f"d{number}" for number in range(5)), labels={"tier": "gold"})
    await create(fleet, "n2", *(f"d{number}" for number in range(4)))
    everything = [f"nodes/n1/domains/d{number}" for number in range(5)]
    everything += [f"nodes/n2/domains/d{number}" for number in range(4)]
    answer = await eventually(lambda: list_all(fleet), lambda answer: len(answer.domains) == 9)
    assert names(answer) == everything
    assert {one.node for one in answer.freshness} == {"nodes/n1", "nodes/n2"}
    assert all(time.time() - one.observe_time.seconds < 5 for one in answer.freshness)
    assert answer.domains[0].spec.title == "a title"
    paged, token = [], ""
    while True:
        answer = await list_all(fleet, page_size=2, page_token=token)
        assert len(answer.domains) <= 2
        paged += names(answer)
        token = answer.next_page_token
        if not token:
            break
    assert paged == everything
    first = await list_all(fleet, page_size=2)
    error = await failure(list_all(fleet, page_size=2, page_token=first.next_page_token, filter='labels.tier="gold"'))
    assert details_of(error)["reason"] == "PAGE_TOKEN_INVALID"
    error = await failure(list_all(fleet, page_token="x" + first.next_page_token))
    assert details_of(error)["reason"] == "PAGE_TOKEN_INVALID"
    error = await failure(list_all(fleet, filter="no such thing"))
    assert details_of(error)["reason"] == "FILTER_SYNTAX"
    assert names(await list_all(fleet, filter='labels.tier="gold"')) == everything[:5]
    basic = await list_all(fleet, view=resource_pb2.RESOURCE_VIEW_BASIC)
    assert names(basic) == everything
    assert not any(domain.HasField("spec") for domain in basic.domains)
    assert all(domain.status.state for domain in basic.domains)
    live = await list_all(fleet, read_through=True)
    assert names(live) == everything
    live = await list_all(fleet, read_through=True, page_size=3)
    assert names(live) == everything[:3]
    rest = await list_all(fleet, read_through=True, page_size=3, page_token=live.next_page_token)
    assert names(rest) == everything[3:6] or names(rest) == everything[3:5]


async def test_single_and_batch_reads_over_all_nodes(fleet: RealFleet) -> None:
    await create(fleet, "n1", "a", "both")
    await create(fleet, "n2", "b", "both")
    await eventually(lambda: list_all(fleet), lambda answer: len(answer.domains) == 4)
    domains = domain_pb2_grpc.DomainServiceStub(fleet.channel)
    a = await domains.GetDomain(domain_pb2.GetDomainRequest(name="nodes/-/domains/a"))
    assert a.name == "nodes/n1/domains/a"
    by_uid = await domains.GetDomain(domain_pb2.GetDomainRequest(name=f"nodes/-/domains/{a.uid}", read_through=True))
    assert by_uid == a
    error = await failure(domains.GetDomain(domain_pb2.GetDomainRequest(name="nodes/-/domains/both")))
    assert (error.code(), details_of(error)["reason"]) == (grpc.StatusCode.FAILED_PRECONDITION, "AMBIGUOUS_NAME")
    error = await failure(domains.GetDomain(domain_pb2.GetDomainRequest(name="nodes/-/domains/none")))
    assert details_of(error)["reason"] == "RESOURCE_NOT_FOUND"
    error = await failure(domains.DeleteDomain(domain_pb2.DeleteDomainRequest(name="nodes/-/domains/a")))
    assert details_of(error)["reason"] == "NAME_MALFORMED"
    wanted = ["nodes/n2/domains/b", "nodes/n1/domains/none", "nodes/n1/domains/a", "nodes/n9/domains/a"]
    for read_through in (False, True):
        batch = await domains.BatchGetDomains(
            domain_pb2.BatchGetDomainsRequest(parent="nodes/-", names=wanted, read_through=read_through)
        )
        assert [result.name for result in batch.results] == wanted
        assert [result.status.code for result in batch.results] == [0, 5, 0, 5]
        assert batch.results[2].domain == a
        assert {one.node for one in batch.freshness} == {"nodes/n1", "nodes/n2"}
        assert all(time.time() - one.observe_time.seconds < 10 for one in batch.freshness)
    stats = stats_pb2_grpc.StatsServiceStub(fleet.channel)
    answer = await stats.BatchGetDomainStats(stats_pb2.BatchGetDomainStatsRequest(parent="nodes/-"))
    assert [one.name for one in answer.stats] == [
        "nodes/n1/domains/a",
        "nodes/n1/domains/both",
        "nodes/n2/domains/b",
        "nodes/n2/domains/both",
    ]
    some = await stats.BatchGetDomainStats(
        stats_pb2.BatchGetDomainStatsRequest(parent="nodes/-", names=["nodes/n2/domains/b"])
    )
    assert [one.name for one in some.stats] == ["nodes/n2/domains/b"]


async def test_counters_of_all_nodes_come_in_rounds(fleet: RealFleet) -> None:
    await create(fleet, "n1", "a")
    await create(fleet, "n2", "b")
    stats = stats_pb2_grpc.StatsServiceStub(fleet.channel)
    request = stats_pb2.StreamDomainStatsRequest(parent="nodes/-")
    request.interval.FromMilliseconds(200)

    async def round_of(stream: Any, number: int) -> list[stats_pb2.StreamDomainStatsResponse]:
        found: list[stats_pb2.StreamDomainStatsResponse] = []
        async for message in stream:
            if message.round_number == number:
                found.append(message)
                if message.round_end:
                    break
        return found

    stream = stats.StreamDomainStats(request, timeout=60)
    for number in (1, 2):
        messages = await round_of(stream, number)
        assert [one.name for message in messages for one in message.stats] == [
            "nodes/n1/domains/a",
            "nodes/n2/domains/b",
        ]
        assert not any(message.unreachable for message in messages)
    stream.cancel()
    request.names.append("nodes/n2/domains/b")
    stream = stats.StreamDomainStats(request, timeout=60)
    named = await round_of(stream, 1)
    assert [one.name for message in named for one in message.stats] == ["nodes/n2/domains/b"]
    stream.cancel()

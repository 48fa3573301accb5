"""The fake fleet as a process: what its users' tests rely on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.longrunning import operations_pb2
from google.protobuf import duration_pb2, empty_pb2

from tests.integration.fake.fleet import Fake, running, typed
from virtfleet.common.v1 import admin_pb2
from virtfleet.compute.v1 import domain_pb2, domain_pb2_grpc, stats_pb2, watch_pb2
from virtfleet.fake.v1 import fake_pb2
from virtfleet.fleet.v1 import node_pb2
from virtfleet.type.v1 import watch_pb2 as type_watch_pb2
from virtfleet_client import Credentials, connect, errors

SEED = """
[[domains]]
id = "web-{number}"
count = 2
running = true
labels = { tier = "web" }
[domains.spec]
memory = { maximumBytes = "1073741824" }
[[domains]]
id = "spare"
[domains.spec]
memory = { maximumBytes = "1073741824" }
"""


SNAPSHOT = type_watch_pb2.WatchSnapshot()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fake]:
    seed = tmp_path_factory.mktemp("fake") / "seed.toml"
    seed.write_text(SEED)
    with running("--nodes", "3", "--seed-file", str(seed)) as fake:
        yield fake


@pytest.fixture
def fake(shared: Fake) -> Iterator[Fake]:
    yield shared
    shared.clear()


def get(fake: Fake, name: str, seconds: float = 5.0) -> domain_pb2.Domain:
    answer: domain_pb2.Domain = fake.fleet.domains.GetDomain(domain_pb2.GetDomainRequest(name=name), timeout=seconds)
    return answer


def stop(fake: Fake, name: str) -> None:
    request = domain_pb2.StopDomainRequest(name=name, mode=domain_pb2.STOP_MODE_FORCE)
    fake.fleet.wait(fake.fleet.domains.StopDomain(request), domain_pb2.Domain)
    assert get(fake, name).status.state == domain_pb2.DOMAIN_STATE_SHUT_OFF


def test_the_seed_is_there_on_every_node(fake: Fake) -> None:
    assert {name for name in fake.names() if not name.endswith("-0")} >= {
        f"nodes/n{node}/domains/{domain}" for node in (1, 2, 3) for domain in ("web-1", "spare")
    }
    domain = get(fake, "nodes/n2/domains/web-1")
    assert domain.status.state == domain_pb2.DOMAIN_STATE_RUNNING
    assert domain.labels["tier"] == "web"
    server = fake.fleet.servers.GetServer(admin_pb2.GetServerRequest(name="nodes/n2/services/compute"))
    assert server.pid == fake.process.pid


def test_the_first_list_is_whole_and_nodes_cost_no_threads_and_no_stores_on_disk() -> None:
    with running("--nodes", "60", "--domains", "15") as fake:
        assert set(fake.names()) == {
            f"nodes/n{node}/domains/d-{number:05d}" for node in range(1, 61) for number in range(15)
        }
        assert len(list(Path(f"/proc/{fake.process.pid}/task").iterdir())) < 60
        nodes = Path(fake.ready["ca_file"]).parent.parent / "nodes"
        assert len(list(nodes.iterdir())) == 60
        assert list(nodes.rglob("*.db*")) == []


def test_every_node_is_told_as_ready_from_the_first_moment_on() -> None:
    """Else what places by ready nodes places all on the one that is the first."""
    with running("--nodes", "5") as fake:
        nodes = fake.fleet.nodes.ListNodes(node_pb2.ListNodesRequest()).nodes
        assert [node.status.state for node in nodes] == [node_pb2.NODE_STATE_READY] * 5


def test_a_domain_lives_as_on_a_real_node(fake: Fake) -> None:
    name = "nodes/n1/domains/made"
    domain = domain_pb2.Domain()
    domain.spec.memory.maximum_bytes = 1 << 30
    request = domain_pb2.CreateDomainRequest(parent="nodes/n1", domain_id="made", domain=domain)
    fake.fleet.wait(fake.fleet.domains.CreateDomain(request), domain_pb2.Domain)
    fake.fleet.wait(fake.fleet.domains.StartDomain(domain_pb2.StartDomainRequest(name=name)), domain_pb2.Domain)
    assert get(fake, name).status.state == domain_pb2.DOMAIN_STATE_RUNNING
    stats = fake.fleet.stats.GetDomainStats(stats_pb2.GetDomainStatsRequest(name=name))
    assert stats.name == name
    with pytest.raises(errors.WrongState):
        fake.fleet.domains.DeleteDomain(domain_pb2.DeleteDomainRequest(name=name))
    fake.fleet.wait(
        fake.fleet.domains.DeleteDomain(domain_pb2.DeleteDomainRequest(name=name, stop=True)), empty_pb2.Empty
    )
    with pytest.raises(errors.NotFound):
        get(fake, name)
    # A list of the fleet may be a second behind.
    ends_at = time.monotonic() + 1
    while name in fake.names():
        assert time.monotonic() < ends_at


def test_roles_are_those_of_a_real_gateway(fake: Fake) -> None:
    folder = Path(fake.ready["ca_file"]).parent
    viewer = Credentials(folder / "ca.crt", folder / "viewer.crt", folder / "viewer.key")
    with connect(f"tls://{fake.ready['address']}", viewer) as fleet:
        assert fleet.domains.ListDomains(domain_pb2.ListDomainsRequest(parent="nodes/-")).domains
        with pytest.raises(errors.VirtfleetError) as told:
            fleet.domains.StartDomain(domain_pb2.StartDomainRequest(name="nodes/n1/domains/spare"))
    assert told.value.reason == "PERMISSION_MISSING"


def test_a_node_that_is_away_is_said_to_be_at_once(fake: Fake) -> None:
    fake.inject("n2", away=fake_pb2.Away())
    with pytest.raises(errors.VirtfleetError) as told:
        fake.fleet.domains.StartDomain(domain_pb2.StartDomainRequest(name="nodes/n2/domains/spare"), timeout=10)
    assert told.value.reason == "NODE_UNREACHABLE"
    assert told.value.metadata["sent"] == "false"
    answer = fake.fleet.domains.ListDomains(domain_pb2.ListDomainsRequest(parent="nodes/-"))
    assert [away.node for away in answer.unreachable] == ["nodes/n2"]
    fake.clear()
    assert get(fake, "nodes/n2/domains/spare").name


def test_a_frozen_node_answers_nothing_until_it_is_given_up(fake: Fake) -> None:
    fake.inject("n3", freeze=fake_pb2.Freeze())
    started = time.monotonic()
    with pytest.raises(grpc.RpcError) as told:
        get(fake, "nodes/n3/domains/spare", seconds=0.5)
    assert told.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - started < 3
    assert get(fake, "nodes/n1/domains/spare").name, "another node is not held up"


def test_latency_comes_on_top(fake: Fake) -> None:
    delay = {"delay": {"nanos": 300_000_000}}
    fake.inject("n1", latency=delay)
    started = time.monotonic()
    get(fake, "nodes/n1/domains/spare")
    assert time.monotonic() - started > 0.55, "there and back"


def test_a_call_fails_as_often_as_it_should(fake: Fake) -> None:
    fake.inject(
        "n1",
        error={"reason": "HYPERVISOR_FAILED", "method_pattern": "DomainService.Start*", "count": 1},
    )
    name = "nodes/n1/domains/spare"
    with pytest.raises(errors.VirtfleetError) as told:
        fake.fleet.domains.StartDomain(domain_pb2.StartDomainRequest(name=name))
    assert told.value.reason == "HYPERVISOR_FAILED"
    assert get(fake, name).status.state == domain_pb2.DOMAIN_STATE_SHUT_OFF
    fake.fleet.wait(fake.fleet.domains.StartDomain(domain_pb2.StartDomainRequest(name=name)), domain_pb2.Domain)
    stop(fake, name)


def test_an_answer_can_be_lost_after_the_effect(fake: Fake) -> None:
    name = "nodes/n2/domains/spare"
    fake.inject("n2", error={"reason": "SERVICE_DRAINING", "method_pattern": "*.StartDomain", "after_effect": True})
    with pytest.raises(grpc.RpcError):
        fake.fleet.domains.StartDomain(domain_pb2.StartDomainRequest(name=name), timeout=3)
    fake.clear()
    assert get(fake, name).status.state == domain_pb2.DOMAIN_STATE_RUNNING
    stop(fake, name)


@pytest.mark.parametrize(
    ("fault", "reason", "field"),
    [
        (fake_pb2.Fault(node="n1"), "FIELD_REQUIRED", "fault"),
        (fake_pb2.Fault(node="n9", freeze=fake_pb2.Freeze()), "RESOURCE_NOT_FOUND", ""),
        (
            fake_pb2.Fault(node="n1", error=fake_pb2.CallError(reason="NO_SUCH")),
            "FIELD_OUT_OF_RANGE",
            "fault.error.reason",
        ),
    ],
)
def test_a_fault_that_cannot_be_is_refused(fake: Fake, fault: fake_pb2.Fault, reason: str, field: str) -> None:
    with pytest.raises(grpc.RpcError) as told:
        fake.control.InjectFault(fake_pb2.InjectFaultRequest(fault=fault))
    error = typed(told.value)
    assert error.reason == reason
    assert error.fields == ((field,) if field else ())
    assert not fake.control.GetFake(fake_pb2.GetFakeRequest()).faults


def changes_until(watch: Iterator[Any], wanted: Callable[[Any], bool]) -> list[Any]:
    """Read a watch up to the change or marker that is waited for."""
    seen = []
    for response in watch:
        seen += response.changes
        if any(map(wanted, response.changes)) or wanted(response):
            return seen
    raise AssertionError("the watch has ended")


@pytest.mark.parametrize("what", ["cut", "killed", "drained"])
def test_a_watch_goes_on_without_a_new_list(fake: Fake, what: str) -> None:
    name = "nodes/n3/domains/web-1"
    watch = fake.fleet.watch(watch_pb2.WatchResourcesRequest(parent="nodes/-", snapshot=SNAPSHOT))
    changes_until(watch, lambda one: getattr(one, "snapshot_end", None) is not None and one.HasField("snapshot_end"))
    before = fake.control.GetFake(fake_pb2.GetFakeRequest())
    if what == "cut":
        assert fake.control.CutConnections(fake_pb2.CutConnectionsRequest()).connection_count
    else:
        fake.control.RestartGateway(fake_pb2.RestartGatewayRequest(drain=what == "drained"))
    label = f"label-{what}"
    update = domain_pb2.UpdateDomainRequest(domain=domain_pb2.Domain(name=name, labels={"seen": label}))
    update.update_mask.paths.append("labels")
    fake.fleet.domains.UpdateDomain(update)
    seen = changes_until(
        watch, lambda one: getattr(one, "put", None) is not None and one.put.domain.labels["seen"] == label
    )
    assert {one.put.domain.name for one in seen if one.HasField("put") and one.put.domain.name} == {name}
    after = fake.control.GetFake(fake_pb2.GetFakeRequest())
    assert after.resumed_watch_count > before.resumed_watch_count
    assert after.fresh_watch_count == before.fresh_watch_count


def test_a_compacted_log_is_told(fake: Fake) -> None:
    request = watch_pb2.WatchResourcesRequest(parent="nodes/n1", snapshot=SNAPSHOT)
    watch = fake.fleet.watch(request)
    changes_until(watch, lambda one: getattr(one, "snapshot_end", None) is not None and one.HasField("snapshot_end"))
    token = next(fake.fleet.watch(request)).resume_token
    update = domain_pb2.UpdateDomainRequest(domain=domain_pb2.Domain(name="nodes/n1/domains/web-1", labels={"a": "b"}))
    update.update_mask.paths.append("labels")
    fake.fleet.domains.UpdateDomain(update)
    update.domain.labels["a"] = "c"
    fake.fleet.domains.UpdateDomain(update)
    fake.control.CompactLogs(fake_pb2.CompactLogsRequest(name="nodes/n1"))
    with pytest.raises(errors.ResumeTokenCompacted):
        next(fake.fleet.watch(watch_pb2.WatchResourcesRequest(parent="nodes/n1", resume_token=token)))


def test_a_moved_domain_is_told_as_moved(fake: Fake) -> None:
    uid = get(fake, "nodes/n1/domains/web-0").uid
    runtime_id = get(fake, "nodes/n1/domains/web-0").status.runtime_id
    with pytest.raises(grpc.RpcError) as taken:
        fake.control.MoveDomain(fake_pb2.MoveDomainRequest(name="nodes/n1/domains/web-0", target_node="n2"))
    assert typed(taken.value).reason == "RESOURCE_EXISTS"
    gone = "nodes/n2/domains/web-0"
    fake.fleet.wait(
        fake.fleet.domains.DeleteDomain(domain_pb2.DeleteDomainRequest(name=gone, stop=True)), empty_pb2.Empty
    )
    watch = fake.fleet.watch(watch_pb2.WatchResourcesRequest(parent="nodes/-", snapshot=SNAPSHOT))
    changes_until(watch, lambda one: getattr(one, "snapshot_end", None) is not None and one.HasField("snapshot_end"))
    moved = fake.control.MoveDomain(fake_pb2.MoveDomainRequest(name="nodes/n1/domains/web-0", target_node="n2"))
    assert moved.new_name == gone
    changes = changes_until(watch, lambda one: hasattr(one, "moved") and one.HasField("moved"))
    assert [(one.moved.old_name, one.moved.new_name) for one in changes if one.HasField("moved")] == [
        ("nodes/n1/domains/web-0", gone)
    ]
    assert not any(one.HasField("delete") for one in changes)
    with pytest.raises(errors.VirtfleetError) as told:
        get(fake, "nodes/n1/domains/web-0")
    assert told.value.reason == "RESOURCE_MOVED"
    assert told.value.metadata["new_name"] == gone
    there = get(fake, gone)
    assert (there.uid, there.status.runtime_id) == (uid, runtime_id)
    assert there.status.state == domain_pb2.DOMAIN_STATE_RUNNING
    stop(fake, gone)


def known(fake: Fake, operation: str) -> bool:
    try:
        fake.fleet.operations.GetOperation(operations_pb2.GetOperationRequest(name=operation))
    except errors.ResourceNotFound:
        return False
    return True


def test_time_moves_for_all_of_the_fleet() -> None:
    with running("--nodes", "1", "--domains", "1") as fake:
        _move_time(fake)


def _move_time(fake: Fake) -> None:
    # Ended operations are forgotten after seven days.
    operation = fake.fleet.domains.SuspendDomain(domain_pb2.SuspendDomainRequest(name="nodes/n1/domains/d-00000"))
    fake.fleet.wait(operation, domain_pb2.Domain)
    answer = fake.control.AdvanceTime(fake_pb2.AdvanceTimeRequest(duration=duration_pb2.Duration(seconds=8 * 86400)))
    assert answer.time_offset.seconds >= 8 * 86400
    ends_at = time.monotonic() + 10
    while known(fake, operation.name):
        assert time.monotonic() < ends_at, "the operation is not forgotten"
        time.sleep(0.1)
    with pytest.raises(grpc.RpcError):
        fake.control.AdvanceTime(fake_pb2.AdvanceTimeRequest(duration=duration_pb2.Duration(seconds=-1)))


def test_what_a_killed_fleet_leaves_goes_with_the_next_one() -> None:
    command = [sys.executable, "-m", "virtfleet_fake", "--nodes", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        folder = Path(json.loads(first.stdout.readline())["ca_file"]).parent.parent
        with running("--nodes", "1"):
            assert folder.exists(), "it lives"
        first.kill()
    assert folder.exists()
    old = time.time() - 60
    os.utime(folder, (old, old))
    with running("--nodes", "1"):
        assert not folder.exists()


def test_faults_can_be_there_from_the_start_and_sigterm_leaves_nothing() -> None:
    with running("--nodes", "2", "--domains", "1", "--fault", "n2=away", "--fault", "n1=latency:10ms") as fake:
        faults = fake.control.GetFake(fake_pb2.GetFakeRequest()).faults
        assert [(fault.node, fault.WhichOneof("kind")) for fault in faults] == [("n2", "away"), ("n1", "latency")]
        answer = fake.fleet.domains.ListDomains(domain_pb2.ListDomainsRequest(parent="nodes/-"))
        assert [away.node for away in answer.unreachable] == ["nodes/n2"]
        nodes = {node.name: node.status for node in fake.fleet.nodes.ListNodes(node_pb2.ListNodesRequest()).nodes}
        # From the first moment on, and not after the services have looked at their hosts once more.
        assert nodes["nodes/n1"].capacity.vcpu_count
        assert nodes["nodes/n1"].allocated.domain_count == 1
        os.kill(fake.process.pid, signal.SIGTERM)
        fake.process.wait(10)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--fault", "n1"), "is no fault"),
        (("--fault", "n1=latency:fast"), "is no fault"),
        (("--fault", "n9=freeze"), "has no node n9"),
        (("--seed-file", "/nowhere.toml"), "cannot be used"),
        (("--listen", "127.0.0.1"), "is not host:port"),
        (("--control-listen", "0.0.0.0:0"), "is not on loopback"),
    ],
)
def test_bad_arguments_are_one_line(arguments: tuple[str, ...], says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "virtfleet_fake", *arguments], capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_unary_call_that_a_drain_ends_may_be_repeated(fake: Fake) -> None:
    """Not CANCELLED, as gRPC has it for calls that run on at its own end: no client repeats that."""
    files = [Path(fake.ready[key]).read_bytes() for key in ("ca_file", "key_file", "cert_file")]
    fake.inject("n3", freeze=fake_pb2.Freeze())
    with grpc.secure_channel(fake.ready["address"], grpc.ssl_channel_credentials(*files)) as channel:
        stub = domain_pb2_grpc.DomainServiceStub(channel)
        call = stub.GetDomain.future(domain_pb2.GetDomainRequest(name="nodes/n3/domains/spare"), timeout=30)
        time.sleep(0.3)
        fake.control.RestartGateway(fake_pb2.RestartGatewayRequest(drain=True))
        error = typed(call.exception())
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert error.reason in ("SERVICE_DRAINING", "NODE_UNREACHABLE")


def test_calls_are_counted_over_gateways(fake: Fake) -> None:
    def count() -> int:
        counts = fake.control.GetFake(fake_pb2.GetFakeRequest()).call_counts
        return sum(one.call_count for one in counts if one.method == "virtfleet.compute.v1.DomainService.GetDomain")

    before = count()
    get(fake, "nodes/n1/domains/spare")
    with pytest.raises(errors.ResourceNotFound):
        get(fake, "nodes/n1/domains/nobody")
    assert count() == before + 2, "the one that failed too"
    fake.control.RestartGateway(fake_pb2.RestartGatewayRequest())
    get(fake, "nodes/n2/domains/spare")
    assert count() == before + 3

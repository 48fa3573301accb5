"""The real grpcurl, through the gateway and of one node."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from google.protobuf import empty_pb2

from tests.integration.fake.fleet import Fake, running
from tools import grpcurl
from tools.paths import ROOT
from virtfleet.storage.v1 import pool_pb2, volume_pb2
from virtfleet_client import Fleet

Grpc = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def fake() -> Iterator[Fake]:
    with running("--nodes", "2", "--domains", "2") as fake:
        yield fake


@pytest.fixture(scope="module")
def grpc(fake: Fake) -> Grpc:
    program = grpcurl.build()
    ready = fake.ready
    files = ["-cacert", ready["ca_file"], "-cert", ready["cert_file"], "-key", ready["key_file"]]

    def call(*arguments: str, options: tuple[str, ...] = (), data: str = "") -> subprocess.CompletedProcess[str]:
        given = ["-d", data] if data else []
        return subprocess.run(
            [str(program), *files, *options, *given, ready["address"], *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return call


def test_the_union_of_services_is_listed(grpc: Grpc) -> None:
    listed = grpc("list").stdout.split()
    assert {
        "virtfleet.compute.v1.DomainService",
        "virtfleet.storage.v1.VolumeService",
        "virtfleet.network.v1.NetworkService",
        "virtfleet.fleet.v1.NodeService",
        "google.longrunning.Operations",
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
    } <= set(listed)
    assert "virtfleet.node.v1.AttachmentService" not in listed


@pytest.mark.parametrize(
    ("symbol", "says"),
    [
        ("virtfleet.compute.v1.DomainService", "Defines, changes, starts and stops domains"),
        ("virtfleet.compute.v1.DomainService.StopDomain", "Stops a domain"),
        ("virtfleet.compute.v1.Memory", "Is the memory of a guest"),
        ("virtfleet.storage.v1.Volume", "message Volume"),
        ("google.rpc.ErrorInfo", "message ErrorInfo"),
    ],
)
def test_everything_is_described_with_its_comments(grpc: Grpc, symbol: str, says: str) -> None:
    assert says in grpc("describe", symbol).stdout


@pytest.mark.parametrize(
    "options",
    [(), ("-H", "x-virtfleet-node: n1"), ("-protoset", str(ROOT / "protos/baseline.binpb"))],
    ids=["reflection", "reflection of a node", "descriptor set"],
)
def test_calls_with_every_source_of_descriptors(grpc: Grpc, options: tuple[str, ...]) -> None:
    done = grpc(
        "virtfleet.compute.v1.DomainService/GetDomain", options=options, data='{"name": "nodes/n1/domains/d-00000"}'
    )
    assert json.loads(done.stdout)["name"] == "nodes/n1/domains/d-00000", done.stderr


def test_calls_of_every_kind(grpc: Grpc) -> None:
    unary = grpc("virtfleet.common.v1.AccessService/WhoAmI")
    assert "spiffe://" in json.loads(unary.stdout)["subject"]
    watch = grpc(
        "virtfleet.compute.v1.WatchService/WatchResources", options=("-max-time", "3"), data='{"parent": "nodes/-"}'
    )
    assert "snapshotEnd" in watch.stdout
    assert (
        grpc(
            "virtfleet.compute.v1.DomainService/CreateDomain",
            data='{"parent": "nodes/n1", "domain_id": "tty", "start": {}, "domain": {"spec": {"serials": {"ser0": {}}, "memory": {"maximum_bytes": "67108864"}}}}',
        ).returncode
        == 0
    )
    hello = base64.b64encode(b"hello\n").decode()
    both_ways = grpc(
        "virtfleet.compute.v1.ConsoleService/OpenConsole",
        data=f'{{"name": "nodes/n1/domains/tty", "open": {{}}}} {{"data": "{hello}"}} {{"close": {{}}}}',
    )
    assert hello in both_ways.stdout
    assert "CONSOLE_CLOSE_REASON_CALLER" in both_ways.stdout
    gone = grpc(
        "virtfleet.compute.v1.DomainService/DeleteDomain", data='{"name": "nodes/n1/domains/tty", "stop": true}'
    )
    assert json.loads(gone.stdout)["done"] is True


def test_error_details_are_readable(grpc: Grpc) -> None:
    missing = grpc("virtfleet.compute.v1.DomainService/GetDomain", data='{"name": "nodes/n1/domains/nobody"}')
    assert missing.returncode != 0
    for text in (
        "Code: NotFound",
        "google.rpc.ErrorInfo",
        '"reason": "RESOURCE_NOT_FOUND"',
        '"domain": "virtfleet.dev"',
    ):
        assert text in missing.stderr
    bad = grpc(
        "virtfleet.compute.v1.DomainService/CreateDomain",
        data='{"parent": "nodes/n1", "domain_id": "x", "domain": {"spec": {"cpu": {"vcpu_count": 0}}}}',
    )
    assert '"field": "domain.spec.cpu.vcpu_count"' in bad.stderr
    assert "google.rpc.BadRequest" in bad.stderr
    away = grpc("virtfleet.compute.v1.DomainService/GetDomain", data='{"name": "nodes/n9/domains/x"}')
    assert '"reason": "NODE_UNKNOWN"' in away.stderr


def test_one_node_is_asked_by_metadata(grpc: Grpc) -> None:
    health = grpc("grpc.health.v1.Health/Check", options=("-H", "x-virtfleet-node: n2/compute"), data="{}")
    assert json.loads(health.stdout) == {"status": "SERVING"}
    assert grpc("grpc.health.v1.Health/Check", options=("-H", "x-virtfleet-node: n9"), data="{}").returncode != 0


def test_the_lines_that_make_up_prints_run(environment: dict[str, str]) -> None:
    program = grpcurl.build()
    log = (Path(environment["VIRTFLEET_RUN"]) / "up.log").read_text()
    printed = log.partition("In another terminal:")[2].splitlines()
    lines = [line for line in printed[1:] if line.startswith("    ") or not line]
    assert sum(line.strip().startswith("grpcurl") for line in lines) == 2
    done = subprocess.run(
        ["bash", "-eu"],
        input="\n".join(line.removeprefix("    ") for line in lines),
        cwd=ROOT,
        env={"PATH": f"{program.parent}:{os.environ['PATH']}", "HOME": os.environ.get("HOME", "/")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "virtfleet.compute.v1.DomainService" in done.stdout
    assert "NODE_STATE_READY" in done.stdout or "state: " in done.stdout


def test_a_volume_is_uploaded(environment: dict[str, str], fleet: Fleet, nodes: list[str]) -> None:
    program = grpcurl.build()
    request = pool_pb2.CreatePoolRequest(parent=nodes[0], pool_id="curl", start=True)
    request.pool.spec.dir.SetInParent()
    pool = fleet.wait(fleet.pools.CreatePool(request), pool_pb2.Pool)
    make = volume_pb2.CreateVolumeRequest(parent=pool.name, volume_id="data")
    make.volume.spec.format = volume_pb2.VOLUME_FORMAT_RAW
    make.volume.spec.capacity_bytes = 1 << 20
    volume = fleet.wait(fleet.volumes.CreateVolume(make), volume_pb2.Volume)
    content = os.urandom(1000)
    start = {
        "name": volume.name,
        "start": {"length_bytes": "1000", "digest": f"sha256:{hashlib.sha256(content).hexdigest()}"},
    }
    chunk = {"chunk": {"offset": "0", "data": base64.b64encode(content).decode()}}
    try:
        done = subprocess.run(
            [
                str(program),
                *("-cacert", environment["VIRTFLEET_CA_FILE"]),
                *("-cert", environment["VIRTFLEET_CERT_FILE"]),
                *("-key", environment["VIRTFLEET_KEY_FILE"]),
                *("-d", f"{json.dumps(start)} {json.dumps(chunk)}"),
                environment["VIRTFLEET_ADDRESS"],
                "virtfleet.storage.v1.VolumeService/UploadVolume",
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert Path(volume.status.path).read_bytes()[:1000] == content
    finally:
        fleet.wait(fleet.volumes.DeleteVolume(volume_pb2.DeleteVolumeRequest(name=volume.name)), empty_pb2.Empty)
        fleet.wait(fleet.pools.StopPool(pool_pb2.StopPoolRequest(name=pool.name)), pool_pb2.Pool)
        fleet.wait(fleet.pools.DeletePool(pool_pb2.DeletePoolRequest(name=pool.name)), empty_pb2.Empty)

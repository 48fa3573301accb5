"""The real grpcurl, through the gateway and of one node."""

from __future__ import annotations

import base64
import datetime as dt
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from tests.clients import doc_blocks
from tests.integration.fake.fleet import Fake, running
from tools import grpcurl
from tools.paths import ROOT
from virtfleet_gateway.authority import Authority, new_request

Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def fake() -> Iterator[Fake]:
    with running("--nodes", "2", "--domains", "2") as fake:
        yield fake


@pytest.fixture(scope="module")
def call(fake: Fake) -> Call:
    program = grpcurl.build()
    ready = fake.ready
    files = ["-cacert", ready["ca_file"], "-cert", ready["cert_file"], "-key", ready["key_file"]]

    def grpcurl_call(
        *arguments: str, options: tuple[str, ...] = (), data: str = ""
    ) -> subprocess.CompletedProcess[str]:
        given = ["-d", data] if data else []
        return subprocess.run(
            [str(program), *files, *options, *given, ready["address"], *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return grpcurl_call


def test_the_union_of_services_is_listed(call: Call) -> None:
    listed = call("list").stdout.split()
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
def test_everything_is_described_with_its_comments(call: Call, symbol: str, says: str) -> None:
    assert says in call("describe", symbol).stdout


@pytest.mark.parametrize(
    "options",
    [(), ("-H", "x-virtfleet-node: n1"), ("-protoset", str(ROOT / "protos/baseline.binpb"))],
    ids=["reflection", "reflection of a node", "descriptor set"],
)
def test_calls_with_every_source_of_descriptors(call: Call, options: tuple[str, ...]) -> None:
    done = call(
        "virtfleet.compute.v1.DomainService/GetDomain", options=options, data='{"name": "nodes/n1/domains/d-00000"}'
    )
    assert json.loads(done.stdout)["name"] == "nodes/n1/domains/d-00000", done.stderr


def test_calls_of_every_kind(call: Call) -> None:
    unary = call("virtfleet.common.v1.AccessService/WhoAmI")
    assert "spiffe://" in json.loads(unary.stdout)["subject"]
    watch = call(
        "virtfleet.compute.v1.WatchService/WatchResources", options=("-max-time", "3"), data='{"parent": "nodes/-"}'
    )
    assert "snapshotEnd" in watch.stdout
    assert (
        call(
            "virtfleet.compute.v1.DomainService/CreateDomain",
            data='{"parent": "nodes/n1", "domain_id": "tty", "start": {}, "domain": {"spec": {"serials": {"ser0": {}}, "memory": {"maximum_bytes": "67108864"}}}}',
        ).returncode
        == 0
    )
    hello = base64.b64encode(b"hello\n").decode()
    both_ways = call(
        "virtfleet.compute.v1.ConsoleService/OpenConsole",
        data=f'{{"name": "nodes/n1/domains/tty", "open": {{}}}} {{"data": "{hello}"}} {{"close": {{}}}}',
    )
    assert hello in both_ways.stdout
    assert "CONSOLE_CLOSE_REASON_CALLER" in both_ways.stdout
    gone = call(
        "virtfleet.compute.v1.DomainService/DeleteDomain", data='{"name": "nodes/n1/domains/tty", "stop": true}'
    )
    assert json.loads(gone.stdout)["done"] is True


def test_error_details_are_readable(call: Call) -> None:
    missing = call("virtfleet.compute.v1.DomainService/GetDomain", data='{"name": "nodes/n1/domains/nobody"}')
    assert missing.returncode != 0
    for text in (
        "Code: NotFound",
        "google.rpc.ErrorInfo",
        '"reason": "RESOURCE_NOT_FOUND"',
        '"domain": "virtfleet.dev"',
    ):
        assert text in missing.stderr
    bad = call(
        "virtfleet.compute.v1.DomainService/CreateDomain",
        data='{"parent": "nodes/n1", "domain_id": "x", "domain": {"spec": {"cpu": {"vcpu_count": 0}}}}',
    )
    assert '"field": "domain.spec.cpu.vcpu_count"' in bad.stderr
    assert "google.rpc.BadRequest" in bad.stderr
    away = call("virtfleet.compute.v1.DomainService/GetDomain", data='{"name": "nodes/n9/domains/x"}')
    assert '"reason": "NODE_UNKNOWN"' in away.stderr


def test_one_node_is_asked_by_metadata(call: Call) -> None:
    health = call("grpc.health.v1.Health/Check", options=("-H", "x-virtfleet-node: n2/compute"), data="{}")
    assert json.loads(health.stdout) == {"status": "SERVING"}
    assert call("grpc.health.v1.Health/Check", options=("-H", "x-virtfleet-node: n9"), data="{}").returncode != 0


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


def test_the_page_uploads_a_volume(environment: dict[str, str], tmp_path: Path) -> None:
    """docs/grpcurl.md on a real fleet: the fake one has no storage."""
    grpcurl.build()
    me = "tests/clients/test_grpcurl.py::test_the_page_uploads_a_volume"
    page = doc_blocks.blocks(ROOT / "docs" / "grpcurl.md")
    (connect,) = [block.text for block in page if block.text.startswith("grpc() {")]
    (upload,) = [block.text for block in page if block.why == me]
    said = doc_blocks.run_blocks("upload", [connect, upload], tmp_path, environment)
    assert '"complete": true' in said
    assert said.count('"done": true') == 5, said


# What is asked first.


REFLECTION = ("grpc.reflection.v1", "grpc.reflection.v1alpha")


@contextmanager
def without(method_package: str, fleet: grpc.Channel) -> Iterator[tuple[str, list[str]]]:
    """Serve what the fleet serves, but for one service of reflection; yields the address and what was called."""
    called: list[str] = []

    class Pass(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
            called.append(details.method)
            if details.method.startswith(f"/{method_package}."):
                return None
            onward: grpc.StreamStreamMultiCallable[bytes, bytes] = fleet.stream_stream(details.method)
            return grpc.stream_stream_rpc_method_handler(lambda requests, _context: onward(requests))

    server = grpc.server(ThreadPoolExecutor(4), handlers=[Pass()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}", called
    finally:
        server.stop(0).wait()


@pytest.mark.parametrize("version", REFLECTION)
def test_each_version_of_reflection_is_enough(fake: Fake, call: Call, version: str) -> None:
    """grpcurl asks v1 first and v1alpha after it: each is taken away once."""
    (other,) = set(REFLECTION) - {version}
    program = str(grpcurl.build())
    with channel(fake) as fleet, without(other, fleet) as served:
        address, called = served

        def plain(*arguments: str) -> str:
            done = subprocess.run(
                [program, "-plaintext", *arguments], capture_output=True, text=True, timeout=60, check=False
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        assert plain(address, "list") == call("list").stdout
        symbol = "virtfleet.compute.v1.DomainService"
        assert plain(address, "describe", symbol) == call("describe", symbol).stdout
        got = plain(
            "-d", '{"name": "nodes/n1/domains/d-00000"}', address, "virtfleet.compute.v1.DomainService/GetDomain"
        )
        assert json.loads(got)["name"] == "nodes/n1/domains/d-00000"
    assert f"/{version}.ServerReflection/ServerReflectionInfo" in called


def test_one_node_lists_and_describes_its_own(call: Call) -> None:
    node = ("-H", "x-virtfleet-node: n1")
    all_of_them, its = set(call("list").stdout.split()), set(call("list", options=node).stdout.split())
    assert "virtfleet.compute.v1.DomainService" in its
    assert its < all_of_them
    # The gateway's own, and those of services that this node has not.
    assert {name.split(".")[1] for name in all_of_them - its} == {"fleet", "storage", "network"}
    for symbol in ("virtfleet.compute.v1.DomainService", "virtfleet.compute.v1.Domain", "google.rpc.ErrorInfo"):
        assert call("describe", symbol, options=node).stdout == call("describe", symbol).stdout
    absent = call("list", options=("-H", "x-virtfleet-node: n9"))
    assert absent.returncode == 1
    assert "there is no node n9" in absent.stderr.lower() or "n9" in absent.stderr


@pytest.mark.parametrize("who", ["nobody", "a stranger", "a liar"])
def test_only_certificates_of_the_fleet_are_let_in(fake: Fake, tmp_path: Path, who: str) -> None:
    ready = fake.ready
    own, foreign = ["-cacert", ready["ca_file"]], tmp_path / "foreign"
    authority = Authority.create(foreign)
    key, request = new_request("root")
    (tmp_path / "root.key").write_bytes(key)
    (tmp_path / "root.crt").write_bytes(authority.issue_user(request, "root", ["admin"], dt.timedelta(hours=1)).pem)
    files = {
        "nobody": own,
        "a stranger": [*own, "-cert", str(tmp_path / "root.crt"), "-key", str(tmp_path / "root.key")],
        # The caller who trusts another authority takes this gateway for an impostor.
        "a liar": ["-cacert", str(foreign / "ca.crt"), "-cert", ready["cert_file"], "-key", ready["key_file"]],
    }[who]
    done = subprocess.run(
        [str(grpcurl.build()), "-connect-timeout", "2", *files, ready["address"], "list"],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    assert ("certificate signed by unknown authority" if who == "a liar" else "Failed to dial") in done.stderr


@contextmanager
def channel(fake: Fake) -> Iterator[grpc.Channel]:
    files = [Path(fake.ready[key]).read_bytes() for key in ("ca_file", "key_file", "cert_file")]
    with grpc.secure_channel(fake.ready["address"], grpc.ssl_channel_credentials(*files)) as made:
        yield made

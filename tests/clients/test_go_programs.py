"""Programs outside of the Go module, against the real fleet: clients/go/README.md as written, and the example controller."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.clients import doc_blocks
from tests.clients.test_go import LIMIT_SECONDS, MODULE, go
from tests.fleet.rig import create, delete, kill, until, whole
from tools import go_toolchain
from tools.paths import ROOT
from virtfleet.compute.v1 import domain_pb2
from virtfleet_client import Fleet

pytestmark = pytest.mark.timeout(LIMIT_SECONDS)

TEMPLATE = '{"spec": {"driver": "test", "memory": {"maximumBytes": "67108864"}}}'


@contextmanager
def running(command: list[str], environment: dict[str, str], output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program for the length of a `with` block."""
    with output.open("wb") as sink:
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=sink, stderr=sink)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


@contextmanager
def line_running(
    script: str, environment: dict[str, str], folder: Path, output: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run lines of a page that do not end by themselves, and interrupt them as Ctrl-C does, with all below them."""
    with output.open("wb") as sink:
        process = subprocess.Popen(
            ["bash", "-euc", script], cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(30)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_the_readme_runs_in_an_empty_folder(
    fleet: Fleet, environment: dict[str, str], nodes: list[str], run_folder: Path, tmp_path: Path
) -> None:
    """What clients/go/README.md says, line by line; its placeholder is replaced by where the repository is."""
    module, program, hello, replicas = [
        block.text.replace("/path/to/virtfleet", str(ROOT))
        for block in doc_blocks.blocks(MODULE / "README.md")
        if block.mark == "run by"
    ]
    environment = {**go_toolchain.environment(), **environment}
    environment["PATH"] = f"{go_toolchain.program().parent}{os.pathsep}{environment['PATH']}"
    doc_blocks.run_blocks("module", [module], tmp_path, environment)
    folder, output = tmp_path / "hello", tmp_path / "output"
    (folder / "main.go").write_text(program)
    # Waits are long: the first run compiles all of it.
    with line_running(hello, environment, folder, output) as process:
        before = create(fleet, "nodes/n1")
        until(lambda: f"{before.name} DOMAIN_STATE_SHUT_OFF" in output.read_text(), 240, "a new domain is printed")
        kill(run_folder, "gateway")
        until(lambda: whole(fleet, nodes), 30, "another gateway serves")
        delete(fleet, before.name)
        until(lambda: f"{before.uid} is gone" in output.read_text(), 30, "its end is printed")
        assert process.poll() is None
    with line_running(replicas, environment, folder, tmp_path / "replicas.log"):
        until(lambda: len(group(fleet, "web", running=True)) == 6, 240, "six run")
    for domain in group(fleet, "web"):
        delete(fleet, domain.name)


def group(fleet: Fleet, name: str, *, running: bool = False) -> list[domain_pb2.Domain]:
    request = domain_pb2.ListDomainsRequest(
        parent="nodes/-", filter=f'labels."replicas.example/group"="{name}"', allow_stale=True
    )
    found = list(fleet.pages(fleet.domains.ListDomains, request))
    return [one for one in found if not running or one.status.state == domain_pb2.DOMAIN_STATE_RUNNING]


@pytest.mark.usefixtures("made_whole")
def test_the_example_controller_keeps_its_count_on_a_real_fleet(
    fleet: Fleet, environment: dict[str, str], run_folder: Path, tmp_path: Path
) -> None:
    program = tmp_path / "replicas"
    done = go("build", "-o", program, "./examples/replicas")
    assert done.returncode == 0, done.stderr
    (tmp_path / "domain.json").write_text(TEMPLATE)

    def ours() -> list[domain_pb2.Domain]:
        return group(fleet, "pytest")

    def settled(count: int) -> bool:
        found = ours()
        return len(found) == count and all(domain.status.state == domain_pb2.DOMAIN_STATE_RUNNING for domain in found)

    command = [str(program), "-group", "pytest", "-count", "4", "-template", str(tmp_path / "domain.json")]
    try:
        with running(command, environment, tmp_path / "output") as process:
            until(lambda: settled(4), 30, "four run")
            nodes = {domain.name.partition("/domains/")[0] for domain in ours()}
            assert nodes == {"nodes/n1", "nodes/n2"}
            victim = ours()[0]
            fleet.wait(
                fleet.domains.StopDomain(
                    domain_pb2.StopDomainRequest(name=victim.name, mode=domain_pb2.STOP_MODE_FORCE)
                ),
                domain_pb2.Domain,
            )
            until(
                lambda: settled(4) and victim.uid not in {domain.uid for domain in ours()}, 30, "the dead is replaced"
            )
            before = {domain.uid for domain in ours()}
            kill(run_folder, "gateway")
            until(lambda: settled(4), 30, "four run after the gateway was killed")
            # Long enough for a controller that took the silence for a loss to have made more.
            time.sleep(3)
            assert {domain.uid for domain in ours()} == before
            assert process.poll() is None, (tmp_path / "output").read_text()
        assert process.returncode == 0, (tmp_path / "output").read_text()
    finally:
        for domain in ours():
            delete(fleet, domain.name)

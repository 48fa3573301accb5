"""Programs outside of the Java build, against the real fleet: the one of its README as written there, and the example controller."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fleet.rig import create, delete, kill, until, whole
from tools import maven
from virtfleet.compute.v1 import domain_pb2
from virtfleet_client import Fleet

pytestmark = pytest.mark.timeout(maven.LIMIT_SECONDS + 60)

TEMPLATE = '{"spec": {"driver": "test", "memory": {"maximumBytes": "67108864"}}}'


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    """Put the library into the local repository, as its README says."""
    maven.build("install")


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


def test_the_program_of_the_readme_works_in_an_empty_folder(
    fleet: Fleet, environment: dict[str, str], nodes: list[str], run_folder: Path, tmp_path: Path
) -> None:
    blocks = re.findall(
        r"^```\w+\n(.*?)^```", (maven.JAVA_CLIENT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL
    )
    (tmp_path / "pom.xml").write_text(next(block for block in blocks if block.startswith("<project")))
    source = tmp_path / "src/main/java/Hello.java"
    source.parent.mkdir(parents=True)
    source.write_text(next(block for block in blocks if "class Hello" in block))
    command = ["mvn", "--batch-mode", "--file", str(tmp_path), "compile", "exec:java", "-Dexec.mainClass=Hello"]
    output = tmp_path / "output"
    with running(command, environment, output) as process:
        before = create(fleet, "nodes/n1")
        until(lambda: f"{before.name} DOMAIN_STATE_SHUT_OFF" in output.read_text(), 120, "a new domain is printed")
        kill(run_folder, "gateway")
        until(lambda: whole(fleet, nodes), 30, "another gateway serves")
        delete(fleet, before.name)
        until(lambda: f"{before.uid} is gone" in output.read_text(), 30, "its end is printed")
        assert process.poll() is None


@pytest.mark.usefixtures("made_whole")
def test_the_example_controller_keeps_its_count_on_a_real_fleet(
    fleet: Fleet, environment: dict[str, str], run_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "domain.json").write_text(TEMPLATE)

    def ours() -> list[domain_pb2.Domain]:
        request = domain_pb2.ListDomainsRequest(
            parent="nodes/-", filter='labels."replicas.example/group"="pytest-java"', allow_stale=True
        )
        return list(fleet.pages(fleet.domains.ListDomains, request))

    def settled(count: int) -> bool:
        found = ours()
        return len(found) == count and all(domain.status.state == domain_pb2.DOMAIN_STATE_RUNNING for domain in found)

    program = "dev.virtfleet.examples.replicas.Replicas"
    command = [
        "java",
        "-cp",
        maven.classpath("examples/replicas"),
        program,
        "pytest-java",
        "4",
        str(tmp_path / "domain.json"),
    ]
    try:
        with running(command, environment, tmp_path / "output") as process:
            until(lambda: settled(4), 60, "four run")
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
        # 128 and SIGTERM: how a JVM tells that it ended in order after that signal.
        assert process.returncode == 128 + signal.SIGTERM, (tmp_path / "output").read_text()
    finally:
        for domain in ours():
            delete(fleet, domain.name)

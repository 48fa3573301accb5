"""Programs outside of the Java build, against the real fleet: the one of its README as written there, and the example controller."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from tests.clients import replicas
from tests.fleet.rig import create, delete, kill, until, whole
from tools import maven
from virtfleet_client import Fleet

pytestmark = pytest.mark.timeout(maven.LIMIT_SECONDS + 60)


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    """Put the library into the local repository, as its README says."""
    maven.build("install")


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
    with replicas.running(command, environment, output) as process:
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
    template, output = tmp_path / "domain.json", tmp_path / "output"
    template.write_text(replicas.TEMPLATE)
    program = "dev.virtfleet.examples.replicas.Replicas"
    command = ["java", "-cp", maven.classpath("examples/replicas"), program, "pytest-java", "4", str(template)]
    code = replicas.keeps_its_count(fleet, run_folder, command, "pytest-java", environment, output)
    # 128 and SIGTERM: how a JVM tells that it ended in order after that signal.
    assert code == 128 + signal.SIGTERM, output.read_text()

"""Programs outside of the Java build, against the real fleet: the one of its README as written there, and the example controller."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.clients import doc_blocks, replicas
from tests.fleet.rig import create, delete, kill, until, whole
from tools import maven
from tools.paths import ROOT
from virtfleet_client import Fleet

pytestmark = pytest.mark.timeout(maven.LIMIT_SECONDS + 60)


LINES = [
    block.text.replace("/path/to/virtfleet", str(ROOT))
    for block in doc_blocks.blocks(maven.JAVA_CLIENT / "README.md")
    if block.mark == "run by"
]


@pytest.fixture(scope="module", autouse=True)
def variables(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Install the library by the line of its README, into a repository of this build; returns what leads there."""
    maven.forget_installed()
    repository = maven.repository()
    variables = {**os.environ, **environment, "MAVEN_OPTS": f"-Dmaven.repo.local={repository}"}
    doc_blocks.run_blocks("install", LINES[:1], tmp_path_factory.mktemp("install"), variables, maven.LIMIT_SECONDS)
    assert (repository / "dev/virtfleet/virtfleet-client").is_dir()
    return variables


def test_the_readme_runs_in_an_empty_folder(
    fleet: Fleet, variables: dict[str, str], nodes: list[str], run_folder: Path, tmp_path: Path
) -> None:
    """What clients/java/README.md says, line by line; its placeholder is replaced by where the repository is."""
    _, project, program, hello, controller = LINES
    folder, output = tmp_path / "hello", tmp_path / "output"
    source = folder / "src/main/java/Hello.java"
    source.parent.mkdir(parents=True)
    (folder / "pom.xml").write_text(project)
    source.write_text(program)
    with doc_blocks.line_running(hello, variables, folder, output) as process:
        before = create(fleet, "nodes/n1")
        until(lambda: f"{before.name} DOMAIN_STATE_SHUT_OFF" in output.read_text(), 120, "a new domain is printed")
        kill(run_folder, "gateway")
        until(lambda: whole(fleet, nodes), 30, "another gateway serves")
        delete(fleet, before.name)
        until(lambda: f"{before.uid} is gone" in output.read_text(), 30, "its end is printed")
        assert process.poll() is None
    log = tmp_path / "replicas.log"
    with doc_blocks.line_running(controller, variables, folder, log):
        until(lambda: len(replicas.group(fleet, "web", running=True)) == 6, 120, "six run")
    for domain in replicas.group(fleet, "web"):
        delete(fleet, domain.name)


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

"""Programs outside of the Go module, against the real fleet: clients/go/README.md as written, and the example controller."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.clients import doc_blocks, replicas
from tests.clients.test_go import LIMIT_SECONDS, MODULE, go
from tests.fleet.rig import create, delete, kill, until, whole
from tools import go_toolchain
from tools.paths import ROOT
from virtfleet_client import Fleet

pytestmark = pytest.mark.timeout(LIMIT_SECONDS)


def test_the_readme_runs_in_an_empty_folder(
    fleet: Fleet, environment: dict[str, str], nodes: list[str], run_folder: Path, tmp_path: Path
) -> None:
    """What clients/go/README.md says, line by line; its placeholder is replaced by where the repository is."""
    module, program, hello, controller = [
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
    with doc_blocks.line_running(hello, environment, folder, output) as process:
        before = create(fleet, "nodes/n1")
        until(lambda: f"{before.name} DOMAIN_STATE_SHUT_OFF" in output.read_text(), 240, "a new domain is printed")
        kill(run_folder, "gateway")
        until(lambda: whole(fleet, nodes), 30, "another gateway serves")
        delete(fleet, before.name)
        until(lambda: f"{before.uid} is gone" in output.read_text(), 30, "its end is printed")
        assert process.poll() is None
    with doc_blocks.line_running(controller, environment, folder, tmp_path / "replicas.log"):
        until(lambda: len(replicas.group(fleet, "web", running=True)) == 6, 240, "six run")
    for domain in replicas.group(fleet, "web"):
        delete(fleet, domain.name)


@pytest.mark.usefixtures("made_whole")
def test_the_example_controller_keeps_its_count_on_a_real_fleet(
    fleet: Fleet, environment: dict[str, str], run_folder: Path, tmp_path: Path
) -> None:
    program = tmp_path / "replicas"
    done = go("build", "-o", program, "./examples/replicas")
    assert done.returncode == 0, done.stderr
    template, output = tmp_path / "domain.json", tmp_path / "output"
    template.write_text(replicas.TEMPLATE)
    command = [str(program), "-group", "pytest", "-count", "4", "-template", str(template)]
    code = replicas.keeps_its_count(fleet, run_folder, command, "pytest", environment, output)
    assert code == 0, output.read_text()

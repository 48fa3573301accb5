"""The Go module: its own tests with the race detector, against a fake fleet and the real one, and what tools say of its code.

`go test` runs once; each of its tests is a test here, by its name.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tools import go_stubs, go_toolchain
from tools.paths import ROOT

MODULE = ROOT / "clients" / "go"
# Compiling all of it with the race detector from nothing takes minutes on two cores.
LIMIT_SECONDS = 1500
STATICCHECK = ("staticcheck", "honnef.co/go/tools/cmd/staticcheck", "v0.8.2")
TAGS = "fleet"

pytestmark = pytest.mark.timeout(LIMIT_SECONDS + 60)


def names_of_tests(module: Path) -> list[str]:
    """List the tests and examples of the module, as `informer.TestIndexes`; the root package is `virtfleet`."""
    found = []
    for path in sorted(module.rglob("*_test.go")):
        package = path.parent.name if path.parent != module else "virtfleet"
        names = re.findall(r"^func ((?:Test|Example)\w*)\(", path.read_text(), flags=re.MULTILINE)
        found += [f"{package}.{name}" for name in names if name != "TestMain"]
    return found


def go(
    *arguments: str | Path, environment: dict[str, str] | None = None, folder: Path = MODULE
) -> subprocess.CompletedProcess[str]:
    """Run the go command in a folder."""
    command = [str(go_toolchain.program()), *map(str, arguments)]
    variables = {**go_toolchain.environment(), **(environment or {})}
    return subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )


class Outcomes:
    """What `go test` has said of each test."""

    def __init__(self, lines: str, complaint: str) -> None:
        self.actions: dict[str, str] = {}
        self.output: dict[str, list[str]] = {}
        self.complaint = complaint
        for line in lines.splitlines():
            if not line.startswith("{"):
                continue
            event = json.loads(line)
            package = event.get("Package", "").rpartition("/")[2]
            name, _, _ = event.get("Test", "").partition("/")
            test = f"{'virtfleet' if package == 'go' else package}.{name}"
            if event["Action"] == "output" or event["Action"] == "build-output":
                self.output.setdefault(test if name else "", []).append(event["Output"])
            elif name and "/" not in event["Test"]:
                self.actions[test] = event["Action"]


@pytest.fixture(scope="module")
def outcomes(environment: dict[str, str]) -> Outcomes:
    """Run every Go test once, with the fleet of the session beside the fake ones that they start."""
    command = str(ROOT / ".venv/bin/virtfleet")
    programs = {"VIRTFLEET_COMMAND": command, "VIRTFLEET_FAKE_COMMAND": f"{command} fake"}
    done = go(
        # Without vet, which has a test of its own and would look a second time, at what -race has compiled.
        *("test", "-race", "-vet=off", "-json", "-count=1", "-p=1", f"-timeout={LIMIT_SECONDS}s"),
        *(f"-tags={TAGS}", "./..."),
        environment={**environment, **programs},
    )
    return Outcomes(done.stdout, done.stderr)


@pytest.mark.parametrize("name", names_of_tests(MODULE))
def test_go(name: str, outcomes: Outcomes) -> None:
    said = "".join(outcomes.output.get(name, outcomes.output.get("", [])))
    assert outcomes.actions.get(name) == "pass", f"{said[-8000:]}\n{outcomes.complaint[-4000:]}"


def test_the_code_is_formatted() -> None:
    gofmt = go_toolchain.program().parent / "gofmt"
    done = subprocess.run([gofmt, "-l", "."], cwd=MODULE, capture_output=True, text=True, check=True)
    assert not done.stdout


def test_vet_and_staticcheck_find_nothing() -> None:
    vet = go("vet", f"-tags={TAGS}", "./...")
    assert vet.returncode == 0, vet.stderr
    program = go_stubs.build(*STATICCHECK)
    done = subprocess.run(
        [program, f"-tags={TAGS}", "./..."],
        cwd=MODULE, env=go_toolchain.environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_module_names_what_it_needs() -> None:
    done = go("mod", "tidy", "-diff")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_informer_of_the_bench_is_in_order() -> None:
    folder = ROOT / "bench" / "informer"
    vet, tidy = go("vet", "./...", folder=folder), go("mod", "tidy", "-diff", folder=folder)
    assert vet.returncode == tidy.returncode == 0, vet.stderr + tidy.stdout + tidy.stderr
    gofmt = go_toolchain.program().parent / "gofmt"
    assert not subprocess.run([gofmt, "-l", "."], cwd=folder, capture_output=True, text=True, check=True).stdout


def test_every_exported_name_is_documented() -> None:
    bare = []
    for path in sorted(MODULE.rglob("*.go")):
        if path.name.endswith((".pb.go", "_test.go")):
            continue
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines):
            declared = re.match(r"(?:func (?:\(\w+ \*?\w+(?:\[\w+\])?\) )?|type |const |var )([A-Z]\w*)", line)
            if declared and not lines[number - 1].startswith("//"):
                bare.append(f"{path.relative_to(MODULE)}:{number + 1}: {declared[1]}")
    assert not bare


def test_the_example_controller_is_short() -> None:
    assert len((MODULE / "examples/replicas/main.go").read_text().splitlines()) < 150

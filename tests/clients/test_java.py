"""The Java client: its own tests against fake fleets and the real one, its documentation, and what its build may name.

Maven runs once; each of its tests is a test here, by its class and method.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tools import maven
from tools.paths import ROOT

BUILD = maven.JAVA_CLIENT
EXAMPLE = BUILD / "examples/replicas/src/main/java/dev/virtfleet/examples/replicas/Replicas.java"

pytestmark = pytest.mark.timeout(maven.LIMIT_SECONDS + 60)


def names_of_tests(folder: Path) -> list[str]:
    """List the test methods of all modules, as `CallsTest.aDeadlineEndsACall`."""
    found = []
    for path in sorted(folder.glob("**/src/test/java/**/*Test.java")):
        marked = r"@(?:Test|ParameterizedTest)\n(?:    @.*\n)*    void (\w+)\("
        found += [f"{path.stem}.{name}" for name in re.findall(marked, path.read_text())]
    return found


class Outcomes:
    """What the reports of a run say of each test; of one with parameters all must have passed."""

    def __init__(self, reports: Iterable[Path], said: str) -> None:
        self.passed: dict[str, int] = {}
        self.complaints: dict[str, list[str]] = {}
        self.said = said
        for report in reports:
            for case in ET.parse(report).getroot().iter("testcase"):  # written by the run itself
                kind = case.get("classname", "").rpartition(".")[2]
                test = f"{kind}.{re.split(r'[({]', case.get('name', ''))[0]}"
                bad = [entry for entry in case if entry.tag in {"failure", "error", "skipped"}]
                if bad:
                    self.complaints.setdefault(test, []).extend(f"{case.get('name')}: {e.tag}: {e.text}" for e in bad)
                else:
                    self.passed[test] = self.passed.get(test, 0) + 1


@pytest.fixture(scope="module")
def outcomes(environment: dict[str, str], run_folder: Path) -> Outcomes:
    """Build the modules, run every test and write the documentation, once, with the fleet of the session."""
    for report in BUILD.glob("**/target/surefire-reports/TEST-*.xml"):
        report.unlink()
    command = str(ROOT / ".venv/bin/virtfleet")
    programs = {"VIRTFLEET_COMMAND": command, "VIRTFLEET_FAKE_COMMAND": f"{command} fake"}
    # A failure must not hide the tests of the modules after it.
    done = maven.run(
        "-Pdocumentation", "verify", "-Dmaven.test.failure.ignore=true",
        environment={**environment, **programs, "VIRTFLEET_RUN": str(run_folder)},
    )  # fmt: skip
    said = f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    assert done.returncode == 0, said
    return Outcomes(BUILD.glob("**/target/surefire-reports/TEST-*.xml"), said)


@pytest.mark.parametrize("name", names_of_tests(BUILD))
def test_java(name: str, outcomes: Outcomes) -> None:
    assert not outcomes.complaints.get(name), "\n".join(outcomes.complaints[name])[-8000:]
    assert outcomes.passed.get(name), f"it did not run: {outcomes.said}"


def test_the_documentation_is_whole(outcomes: Outcomes) -> None:
    # The build fails on a warning of javadoc; this is what it wrote.
    assert "[WARNING]" not in outcomes.said, outcomes.said
    for module, package in (("client", "client"), ("client", "client/informer"), ("testing", "testing")):
        assert (BUILD / module / "target/reports/apidocs/dev/virtfleet" / package / "package-summary.html").exists()


def test_versions_are_fixed_and_no_repository_is_named() -> None:
    text = "\n".join(path.read_text() for path in sorted(BUILD.glob("**/pom.xml")))
    assert "<repository>" not in text
    assert "<pluginRepository>" not in text
    versions = re.findall(r"<(?:[\w.]+\.)?version>([^<]+)</", text)
    assert versions
    assert not [version for version in versions if re.search(r"[\[(,]|LATEST|RELEASE", version)]


def test_no_stub_is_committed() -> None:
    assert not list(BUILD.glob("*/src/**/*Grpc.java"))


def test_every_public_class_says_which_threads_may_share_it() -> None:
    silent = []
    for path in sorted(BUILD.glob("*/src/main/java/dev/virtfleet/**/*.java")):
        declared = re.search(
            r"/\*\*(?P<comment>(?:(?!\*/).)*)\*/\s*(?:@\w+(?:\([^)]*\))?\s*)*public (?:final |abstract |sealed )*(?P<kind>class|record) ",
            path.read_text(),
            re.DOTALL,
        )
        exempt = re.search(r"Exception\.java$|package-info|Informers\.java$|Indexes\.java$", path.name)
        if declared and not exempt and not re.search(r"[Tt]hread|Immutable", declared["comment"]):
            silent.append(str(path.relative_to(BUILD)))
    assert not silent


def test_the_example_controller_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 150

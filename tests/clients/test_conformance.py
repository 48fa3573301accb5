"""Every client through every case of `cases.yaml`, on fake fleets and on the real one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.clients.conformance import agents, words
from tests.clients.conformance.stage import Stage
from tools import maven
from tools.paths import ROOT

CASES = words.read(ROOT / "tests/clients/cases.yaml")
AGENTS = agents.chosen()
NIGHTLY = bool(os.environ.get("VIRTFLEET_CONFORMANCE_SLOW"))
PAIRS = [
    pytest.param(case, world, id=f"{world}-{case.name}")
    for case in CASES
    for world in words.WORLDS
    if world in case.worlds and (NIGHTLY or not case.slow)
]

# The first test waits until Maven has fetched what the agent in Java is made of.
pytestmark = pytest.mark.timeout(maven.LIMIT_SECONDS + 60)


@pytest.fixture(scope="module")
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    """Yield what runs cases, with all agents started."""
    with Stage(AGENTS, lambda: request.getfixturevalue("environment")) as entered:
        yield entered


@pytest.mark.parametrize(("case", "world"), PAIRS)
@pytest.mark.parametrize("agent", list(AGENTS))
def test_a_client_gets_through(case: words.Case, world: str, agent: str, stage: Stage) -> None:
    failure = stage.outcome(case, world, agent)
    if failure is not None:
        raise failure

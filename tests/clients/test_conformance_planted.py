"""The suite finds what it is for: clients with a bug each fail the case that is about it, and no case passes an agent by."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.clients.conformance import words
from tests.clients.conformance.agents import PYTHON, Agent, AgentError
from tests.clients.conformance.door import Door
from tests.clients.conformance.interpreter import CaseFailed, Run
from tests.clients.conformance.truth import Truth
from tests.clients.conformance.worlds import FakeWorld
from tests.integration.fake.fleet import running
from tools.paths import ROOT

CASES = {case.name: case for case in words.read(ROOT / "tests/clients/cases.yaml")}

Place = tuple[FakeWorld, Door]


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with ExitStack() as stack:
        fake = stack.enter_context(running("--nodes", "2"))
        truth = stack.enter_context(Truth(fake.ready["address"], fake.ready))
        yield FakeWorld(fake.ready, fake.control, truth), stack.enter_context(Door(fake.ready["address"]))


@pytest.mark.parametrize(
    ("bug", "case", "says"),
    [
        ("repeats-without-request-id", "mutation-answer-lost", "RESOURCE_EXISTS"),
        ("repeats-what-is-unsafe", "what-cannot-be-told-apart-is-not-repeated", "it should fail with"),
        ("repeats-once-more", "not-five-attempts", "it should fail with"),
        ("forgets-its-token", "watch-over-lost-connections", "watches began afresh"),
        ("takes-a-move-for-a-deletion", "moved", "added is 2, not 1"),
        ("loses-types", "two-calls-are-two", "UNTYPED"),
        ("counts-a-deletion-twice", "token-compacted-begins-a-watch-anew", "deleted is 2, not 1"),
    ],
)
def test_a_client_with_a_bug_fails_the_case_about_it(bug: str, case: str, says: str, place: Place) -> None:
    command = [sys.executable, "-m", "tests.clients.conformance.planted_agent", bug]
    with Agent(bug, command) as agent:
        run = Run(CASES[case], *place, agent)
        run.patience_seconds = 3
        with pytest.raises(CaseFailed, match=says):
            run()


def test_an_agent_refuses_what_it_does_not_know() -> None:
    with Agent("python", PYTHON) as agent:
        agent.must_refuse_the_unknown()
    command = [sys.executable, "-m", "tests.clients.conformance.planted_agent", "passes-over-what-it-does-not-know"]
    with Agent("planted", command) as agent, pytest.raises(AgentError, match="does not refuse"):
        agent.must_refuse_the_unknown()


def test_an_agent_that_dies_is_told() -> None:
    command = [sys.executable, "-c", "import sys; sys.stdin.readline(); sys.exit('it broke')"]
    with pytest.raises(AgentError, match="it has ended in the middle"), Agent("dies", command) as agent:
        agent.call("get", name="nodes/n1/domains/web")
    with (
        pytest.raises(AssertionError, match="ends with 1 when its input ends\\nit broke"),
        Agent("dies", command) as agent,
    ):
        agent.begin("get")

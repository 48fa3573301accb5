"""All clients through one case at the same time: each on a fake fleet of its own, or side by side on the real one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Self

from tests.clients.conformance.agents import Agent
from tests.clients.conformance.door import Door
from tests.clients.conformance.interpreter import Run
from tests.clients.conformance.truth import Truth, until
from tests.clients.conformance.words import Case
from tests.clients.conformance.worlds import FakeWorld, RealWorld, SharedWorld, Together, World, files_of
from tests.integration.fake.fleet import running

Outcomes = dict[str, BaseException | None]


class Stage:
    """Runs cases while entered. What a case came to is kept, so that each client has a test of its own for it.

    Args:
        commands: How each agent is built and started, by its name.
        environment: The variables of the real fleet; asked for when the first case needs it.
    """

    def __init__(
        self, commands: Mapping[str, Callable[[], list[str]]], environment: Callable[[], Mapping[str, str]]
    ) -> None:
        self._commands = commands
        self._environment = environment
        self._stack = ExitStack()
        self._agents: dict[str, Agent] = {}
        self._fakes: dict[tuple[str, int, int], tuple[World, Door]] = {}
        self._real: tuple[RealWorld, dict[str, Door]] | None = None
        self._outcomes: dict[tuple[str, str], Outcomes] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        """Start the agents."""
        for name, command in self._commands.items():
            self._agents[name] = self._stack.enter_context(Agent(name, command()))
            self._agents[name].must_refuse_the_unknown()
        return self

    def __exit__(self, *_: object) -> None:
        """End all that was started."""
        self._stack.close()

    def outcome(self, case: Case, world: str, agent: str) -> BaseException | None:
        """Return how a client fails a case; None: it passes. The first to ask has all clients run it."""
        key = (case.name, world)
        if key not in self._outcomes:
            self._outcomes[key] = self._on_fakes(case) if world == "fake" else self._on_the_real_one(case)
        return self._outcomes[key][agent]

    def _on_fakes(self, case: Case) -> Outcomes:
        def run(agent: Agent) -> None:
            world, door = self._fake(agent.name, case)
            Run(case, world, door, agent)()

        return self._at_once(run)

    def _on_the_real_one(self, case: Case) -> Outcomes:
        if self._real is None:
            environment = self._environment()
            truth = self._stack.enter_context(Truth(environment["VIRTFLEET_ADDRESS"], files_of(environment)))
            world = RealWorld(environment, truth)
            doors = {name: self._stack.enter_context(Door(world.address)) for name in self._agents}
            self._real = (world, doors)
        world, doors = self._real
        together = Together(len(self._agents))
        shared = SharedWorld(world, together)

        def run(agent: Agent) -> None:
            try:
                Run(case, shared, doors[agent.name], agent)()
            finally:
                together.leave()

        try:
            return self._at_once(run)
        finally:
            world.heal()
            until(lambda: not world.truth.unreachable(), "the fleet is whole again")

    def _fake(self, agent: str, case: Case) -> tuple[World, Door]:
        key = (agent, case.nodes, case.domains)
        if key not in self._fakes:
            options = ("--nodes", str(case.nodes), "--domains", str(case.domains))
            with ExitStack() as stack:
                fake = stack.enter_context(running(*options))
                truth = stack.enter_context(Truth(fake.ready["address"], fake.ready))
                door = stack.enter_context(Door(fake.ready["address"]))
                with self._lock:
                    self._fakes[key] = (FakeWorld(fake.ready, fake.control, truth), door)
                    self._stack.push(stack.pop_all())
        return self._fakes[key]

    def _at_once(self, run: Callable[[Agent], None]) -> Outcomes:
        outcomes: Outcomes = {}

        def judge(agent: Agent) -> None:
            try:
                run(agent)
            except Exception as error:  # noqa: BLE001 - the test of this client raises it
                outcomes[agent.name] = error
            else:
                outcomes[agent.name] = None

        threads = [threading.Thread(target=judge, args=(agent,)) for agent in self._agents.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outcomes

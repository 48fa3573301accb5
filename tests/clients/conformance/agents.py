"""The agents: one program per client, driven over its standard streams. `README.md` says what they speak."""

from __future__ import annotations

import functools
import json
import os
import queue
import shlex
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tools import go_toolchain, maven
from tools.paths import ROOT

_END_SECONDS = 10.0
_CALL_SECONDS = 30.0
_BUILD_SECONDS = 600.0
PYTHON = [sys.executable, "-m", "tests.clients.conformance.python_agent"]
_GO = ROOT / "clients/go"

Json = dict[str, Any]


class AgentError(AssertionError):
    """The agent itself is at fault: it ended, or said what it may not say."""


@dataclass(slots=True)
class Pending:
    """Is a request that may have been answered.

    Attributes:
        what: The request.
    """

    what: Json
    _agent: Agent
    _answers: queue.Queue[Json] = field(default_factory=queue.Queue)

    def give(self, answer: Json) -> None:
        """Take the answer."""
        self._answers.put(answer)

    def answer(self, seconds: float) -> Json:
        """Wait for the answer: `result` or `error`.

        Raises:
            AgentError: There is none in time, or one that no agent may give.
        """
        try:
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            raise AgentError(f"{self._agent.name} does not answer {self.what} within {seconds} s") from None
        if ("result" in answer) == ("error" in answer):
            raise AgentError(f"{self._agent.name}: {self.what}: neither a result nor an error: {answer}")
        code = answer.get("error", {}).get("code", "")
        if code in ("UNKNOWN_STEP", "UNTYPED", "AGENT_ENDED"):
            raise AgentError(
                f"{self._agent.name}: {self.what}: {code}: {answer['error'].get('message')}\n{self._agent.said()}"
            )
        return answer


class Agent:
    """Is an agent that runs while entered.

    Args:
        name: The client: `go`.
        command: How it is started.
        environment: More variables.
    """

    def __init__(self, name: str, command: list[str], environment: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._command = command
        self._environment = {**os.environ, **(environment or {})}
        self._lock = threading.Lock()
        self._pending: dict[int, Pending] = {}
        self._last = 0
        self._said: deque[str] = deque(maxlen=100)
        self._ended = False

    def __enter__(self) -> Self:
        """Start it."""
        self._process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._readers = [threading.Thread(target=work, daemon=True) for work in (self._read, self._listen)]
        for reader in self._readers:
            reader.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """End it by the end of its input, which it must heed."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            code = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            code = None
        for reader in self._readers:
            reader.join()
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()
        if kind is None:
            assert code == 0, f"{self.name} ends with {code} when its input ends\n{self.said()}"

    def said(self) -> str:
        """Return the last of its standard error."""
        return "".join(self._said)

    def begin(self, do: str, **fields: Any) -> Pending:
        """Send a request."""
        with self._lock:
            self._last += 1
            request = {"id": self._last, "do": do, **fields}
            pending = Pending(request, self)
            self._pending[self._last] = pending
            if self._ended:
                pending.give({"error": {"code": "AGENT_ENDED", "message": "it runs no more"}})
                return pending
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
            except BrokenPipeError:
                pending.give({"error": {"code": "AGENT_ENDED", "message": "it takes nothing more"}})
        return pending

    def call(self, do: str, **fields: Any) -> Json:
        """Send a request that must succeed, and return its result."""
        answer = self.begin(do, **fields).answer(_CALL_SECONDS)
        if "error" in answer:
            raise AgentError(f"{self.name}: {do} {fields}: {answer['error']}")
        result: Json = answer["result"]
        return result

    def must_refuse_the_unknown(self) -> None:
        """Try whether it refuses a request, and a field, that the protocol has not: else a new word passes it by.

        Raises:
            AgentError: It does not.
        """
        for do, fields in (("no_such_request", {}), ("close", {"no_such_field": 1})):
            try:
                answer = self.begin(do, **fields).answer(_CALL_SECONDS)
            except AgentError as error:
                if "UNKNOWN_STEP" not in str(error):
                    raise
            else:
                raise AgentError(f"{self.name} does not refuse {do} {fields}: {answer}")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                answer = json.loads(line)
                pending = self._pending.pop(answer["id"])
            except (ValueError, KeyError, TypeError):
                self._said.append(f"(no answer of the protocol: {line!r})\n")
                continue
            pending.give(answer)
        with self._lock:
            self._ended = True
            for pending in self._pending.values():
                pending.give({"error": {"code": "AGENT_ENDED", "message": "it has ended in the middle"}})

    def _listen(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._said.append(line)


@functools.cache
def _go() -> list[str]:
    """Build the Go agent and return its command."""
    program = ROOT / "build/conformance/go-agent"
    program.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [go_toolchain.program(), "build", "-o", program, "./conformance"],
        cwd=_GO, env=go_toolchain.environment(), check=True, timeout=_BUILD_SECONDS,
    )  # fmt: skip
    return [str(program)]


AGENTS: dict[str, Callable[[], list[str]]] = {
    "go": _go,
    "java": functools.cache(maven.conformance_agent),
    "python": lambda: PYTHON,
    "asyncio": lambda: [*PYTHON, "--asyncio"],
}
"""How each client's agent is built, once in a run; gives its command."""


def chosen() -> dict[str, Callable[[], list[str]]]:
    """Return the agents of this run: all, or those that VIRTFLEET_CONFORMANCE_AGENTS names.

    `go;python` names some of ours, `mine=/path/to/agent --flag` one of one's own.

    Raises:
        ValueError: A name is none of ours and no command follows.
    """
    text = os.environ.get("VIRTFLEET_CONFORMANCE_AGENTS", "")
    found: dict[str, Callable[[], list[str]]] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, equals, command = part.partition("=")
        if equals:
            words = shlex.split(command)
            found[name.strip()] = lambda words=words: words  # type: ignore[misc]  # the default binds the list of this turn
        elif name in AGENTS:
            found[name] = AGENTS[name]
        else:
            raise ValueError(
                f"VIRTFLEET_CONFORMANCE_AGENTS: {name!r} is none of {', '.join(AGENTS)}; NAME=COMMAND names yours"
            )
    return found or AGENTS


def file_of(fleet: Mapping[str, str], key: str) -> str:
    """Return the path of a certificate file, absolute: the agent has a folder of its own."""
    return str(Path(fleet[key]).resolve())

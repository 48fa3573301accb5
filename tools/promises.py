"""Hold `tests/promises.toml` against what ran: every promise has tests, each of them ran and passed.

[[promise]]
source = "main road"             # document that promises it
text = "…"                       # the promise, in its words
tests = ["tests/fleet/test_x.py::test_y", "tests/contract"]     # a test, all its parameters, a file, a folder
"""

from __future__ import annotations

import json
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from tools.paths import BUILD, ROOT

PROMISES = ROOT / "tests" / "promises.toml"
RESULTS = BUILD / "results"


class PromiseFileError(Exception):
    """The file of promises is malformed; the text says where."""


@dataclass(frozen=True)
class Promise:
    """A sentence that a user may rely on, and the tests that hold it."""

    source: str
    text: str
    tests: tuple[str, ...]


def parse(content: str) -> list[Promise]:
    """Read promises from TOML.

    Raises:
        PromiseFileError: an entry lacks a part, has another one, or stands twice.
    """
    found: list[Promise] = []
    for number, entry in enumerate(tomllib.loads(content).get("promise", []), 1):
        if set(entry) != {"source", "text", "tests"} or not all(entry.values()):
            raise PromiseFileError(f"promise {number}: wants source, text and tests, not {sorted(entry)}")
        if not all(isinstance(test, str) and test.startswith("tests/") for test in entry["tests"]):
            raise PromiseFileError(f"promise {number}: tests are paths that begin with tests/")
        found.append(Promise(entry["source"], entry["text"], tuple(entry["tests"])))
    texts = [(promise.source, promise.text) for promise in found]
    twice = {text for text in texts if texts.count(text) > 1}
    if twice:
        raise PromiseFileError(f"stands twice: {sorted(twice)}")
    return found


def load(path: Path = PROMISES) -> list[Promise]:
    """Read the promises of the repository."""
    return parse(path.read_text())


def results(folder: Path = RESULTS) -> dict[str, str]:
    """Return the outcome of every test in the result files of the suites."""
    outcomes: dict[str, str] = {}
    for path in sorted(folder.rglob("*.json")):
        outcomes.update(json.loads(path.read_text()))
    return outcomes


def broken(promised: list[Promise], outcomes: dict[str, str]) -> list[str]:
    """List the promises that no test holds now, each with the reason."""
    found = []
    for promise in promised:
        for test in promise.tests:
            marks = (test + "[", test + "::", test.rstrip("/") + "/")
            ran = {name: outcome for name, outcome in outcomes.items() if name == test or name.startswith(marks)}
            bad = sorted(name for name, outcome in ran.items() if outcome != "passed")
            if not ran or bad:
                reason = f"{bad[0]} {ran[bad[0]]}" if bad else f"{test} did not run"
                found.append(f"promise broken: {promise.text} ({promise.source}): {reason}")
    return found


def main() -> int:
    """Print the broken promises; returns the exit code."""
    promised = load()
    found = broken(promised, results())
    print("\n".join(found) or f"{len(promised)} promises are held by tests that ran and passed")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

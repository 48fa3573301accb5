"""Run what needs no fleet, in parallel: `python -m tools.check [NAME…]`.

format, lint, types, imports, protos (lint, breaking, drift of the stubs) and the unit tests. Prints what failed, whole,
and one line for each part.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from tools.paths import BUILD, IMPORT_ROOTS, ROOT

_BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Part:
    """One check: a command and the variables that it needs."""

    name: str
    command: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a check ended."""

    part: Part
    code: int
    output: str
    seconds: float


def python_sources() -> list[str]:
    """List the folders with Python that is ours, those that exist."""
    roots = (*(root for root in IMPORT_ROOTS if "/gen/" not in root), "tools", "tests", "bench")
    return [root for root in roots if any((ROOT / root).rglob("*.py"))]


def parts() -> list[Part]:
    """List all checks, the longest first."""
    results = {"VIRTFLEET_TEST_RESULTS": str(BUILD / "results" / "unit.json")}
    python = sys.executable
    return [
        Part("types", (str(_BIN / "mypy"), *python_sources())),
        Part("unit", (python, "-m", "pytest", "-q", "tests/unit"), results),
        Part("protos", (python, "-m", "tools.protos", "lint", "breaking", "check")),
        Part("go", (python, "-m", "tools.go_stubs", "check")),
        Part("java", (python, "-m", "tools.java_services", "check")),
        Part("docs", (python, "-m", "tools.site")),
        Part("pages", (python, "-m", "tools.pages", "--check")),
        Part("imports", (str(_BIN / "lint-imports"), "--no-cache")),
        Part("lint", (str(_BIN / "ruff"), "check", "--quiet", ".")),
        Part("format", (str(_BIN / "ruff"), "format", "--check", "--quiet", ".")),
    ]


def run(part: Part) -> Outcome:
    """Run one check to its end."""
    start = time.monotonic()
    done = subprocess.run(
        part.command,
        cwd=ROOT,
        env={**os.environ, **part.variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return Outcome(part, done.returncode, done.stdout, time.monotonic() - start)


def main() -> int:
    """Run the checks named on the command line, all without names; returns the exit code."""
    known = {part.name: part for part in parts()}
    parser = argparse.ArgumentParser(prog="python -m tools.check")
    parser.add_argument("names", nargs="*", choices=[*known, []], metavar="NAME", help=" ".join(known))
    names = parser.parse_args().names or list(known)
    failed = []
    with ThreadPoolExecutor(max_workers=max(2, os.cpu_count() or 2)) as pool:
        for running in as_completed([pool.submit(run, known[name]) for name in names]):
            outcome = running.result()
            word = "FAILED" if outcome.code else "ok"
            closing = outcome.output.strip().splitlines()[-1:] if outcome.part.name == "unit" else []
            if outcome.code:
                failed.append(outcome.part.name)
                print(outcome.output.rstrip())
            print(
                f"check {outcome.part.name:9} {word:6} {outcome.seconds:5.1f} s  {''.join(closing)}".rstrip(),
                flush=True,
            )
    if failed:
        print(f"check: failed: {' '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

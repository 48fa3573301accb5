"""Run test suites one after the other and sum them up: `python -m tools.suites contract integration …`.

A suite is a folder below tests/. A folder without a test is a failure, as is a skipped test. At the end each promise of
tests/promises.toml that names tests of these suites is held against what ran (`--promises`).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from tools import promises
from tools.paths import BUILD, ROOT

RESULTS = BUILD / "results"


SECOND_LOOK_LIMIT = 3
"""So many failures of a suite are looked at again; more are no accident of timing."""


def run(suite: str) -> tuple[int, str, float]:
    """Run a suite with its output shown; returns pytest's exit code, its closing line and the seconds it took.

    On a crowded machine a test of timing may fail once. A few failures are therefore run once more, alone, and what
    passes then
    is named in the summary: a name that comes again is a fault to mend, not luck.
    """
    start = time.monotonic()
    code, closing, failed = _pytest([f"tests/{suite}"], RESULTS / f"{suite}.json")
    if code == 1 and 0 < len(failed) <= SECOND_LOOK_LIMIT:
        print(f"--- {suite}: once more, alone: {', '.join(failed)}", flush=True)
        code, second, _ = _pytest(failed, RESULTS / f"{suite}.second.json")
        closing = f"{closing}; at the second look {second}: {', '.join(failed)}"
    return code, closing, time.monotonic() - start


def _pytest(targets: list[str], results: Path) -> tuple[int, str, list[str]]:
    """Run pytest; returns its exit code, its closing line and the tests that failed."""
    variables = {**os.environ, "VIRTFLEET_TEST_RESULTS": str(results), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "pytest", *targets]
    closing = "no result"
    with subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True) as running:
        for line in running.stdout or ():
            print(line, end="", flush=True)
            if re.match(r"=+ .* in [\d.]+s.* =+$", line.strip()):
                closing = line.strip().strip("= ")
    outcomes = json.loads(results.read_text()) if results.exists() else {}
    return running.returncode, closing, sorted(name for name, outcome in outcomes.items() if outcome == "failed")


def main() -> int:
    """Run the suites named on the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.suites")
    parser.add_argument("suites", nargs="+")
    parser.add_argument("--check", action="store_true", help="run the checks that need no fleet first")
    parser.add_argument("--promises", action="store_true", help="also hold the promises against all results")
    options = parser.parse_args()
    rows = []
    if options.check:
        start = time.monotonic()
        code = subprocess.run([sys.executable, "-m", "tools.check"], cwd=ROOT, check=False).returncode
        rows.append(("check", code, "format, lint, types, imports, protos, unit tests", time.monotonic() - start))
    for suite in options.suites:
        print(f"--- {suite}", flush=True)
        rows.append((suite, *run(suite)))
    print("--- summary")
    for suite, code, closing, seconds in rows:
        print(f"{suite:12} {'FAILED' if code else 'ok':6} {seconds:6.1f} s  {closing}")
    failed = any(code for _, code, _, _ in rows)
    if options.promises:
        broken = promises.broken(promises.load(), promises.results())
        print("\n".join(broken) or "promises     ok")
        failed = failed or bool(broken)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

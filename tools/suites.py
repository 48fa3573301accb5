"""Run test suites one after the other and sum them up: `python -m tools.suites contract integration …`.

A suite is a folder below tests/. A folder without a test is a failure, as is a skipped test. At the end each promise of
tests/promises.toml that names tests of these suites is held against what ran (`--promises`).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time

from tools import promises
from tools.paths import BUILD, ROOT

RESULTS = BUILD / "results"


def run(suite: str) -> tuple[int, str, float]:
    """Run a suite with its output shown; returns pytest's exit code, its closing line and the seconds it took."""
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", f"tests/{suite}"]
    variables = {**os.environ, "VIRTFLEET_TEST_RESULTS": str(RESULTS / f"{suite}.json"), "PYTHONUNBUFFERED": "1"}
    closing = "no result"
    with subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True) as running:
        for line in running.stdout or ():
            print(line, end="", flush=True)
            if re.match(r"=+ .* in [\d.]+s.* =+$", line.strip()):
                closing = line.strip().strip("= ")
    return running.returncode, closing, time.monotonic() - start


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

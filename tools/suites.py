"""Run test suites and sum them up: `python -m tools.suites contract integration …`.

A suite is a folder below tests/. A folder without a test is a failure, as is a skipped test. Two suites run at a time
(`--lanes`): most of a suite is waiting for processes to start and for time to pass. What a suite prints is shown when
it ends. At the end each promise of tests/promises.toml that names tests of these suites is held against what ran
(`--promises`).
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tools import promises
from tools.paths import BUILD, ROOT

RESULTS = BUILD / "results"

SECOND_LOOK_LIMIT = 3
"""So many failures of a suite are looked at again; more are no accident of timing."""

BUDGET_SECONDS = {
    "check": 120,
    "integration": 1350,
    "fleet": 300,
    "clients": 950,
    "chaos": 270,
    "endurance": 180,
    "contract": 60,
}
"""What each may take on two cores while another runs beside it; `make test` as a whole stays below `LIMIT_SECONDS`.

Who adds a slow test finds its suite marked in the summary, and makes room in it or takes it from another here.
"""

LIMIT_SECONDS = 1800

_PROGRESS_SECONDS = 60.0


@dataclass(slots=True)
class Outcome:
    """Is how a suite ended.

    Attributes:
        suite: Its name.
        code: The exit code of pytest; 0: all passed.
        closing: pytest's last line.
        failed: The tests that failed.
        seconds: How long it took.
    """

    suite: str
    code: int
    closing: str
    failed: list[str]
    seconds: float


def run(suites: list[str], lanes: int, *, once: bool = False) -> list[Outcome]:
    """Run suites, some at a time, in the order in which they are named; what each prints is shown at its end.

    On a crowded machine a test of timing may fail once. A few failures are therefore run once more, alone, when all
    else has ended, and what passes then is named in the summary: a name that comes again is a fault to mend, not luck.
    With `once` a failure is one: what chaos finds in one round of fifty it does not find in the next.
    """
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for suite in suites:
        waiting.put(suite)
    outcomes: list[Outcome] = []
    running: set[str] = set()

    def lane() -> None:
        while True:
            try:
                suite = waiting.get_nowait()
            except queue.Empty:
                return
            running.add(suite)
            outcome = _pytest(suite, [f"tests/{suite}"], RESULTS / f"{suite}.json", RESULTS / f"{suite}.log")
            running.discard(suite)
            print(f"--- {suite}\n{(RESULTS / f'{suite}.log').read_text(errors='replace')}", flush=True)
            outcomes.append(outcome)

    RESULTS.mkdir(parents=True, exist_ok=True)
    threads = [threading.Thread(target=lane, name=f"lane {number}") for number in range(lanes)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for thread in threads:
            thread.join(_PROGRESS_SECONDS / len(threads))
        print("".join(f"... {suite} {_progress(suite)}\n" for suite in sorted(running)), end="", flush=True)
    outcomes.sort(key=lambda outcome: suites.index(outcome.suite))
    return outcomes if once else [_looked_at_again(outcome) for outcome in outcomes]


def _progress(suite: str) -> str:
    log = RESULTS / f"{suite}.log"
    marks = re.findall(r"\[ *(\d+)%\]$", log.read_text(errors="replace") if log.exists() else "", flags=re.MULTILINE)
    return f"{marks[-1]} %" if marks else "has begun"


def _looked_at_again(outcome: Outcome) -> Outcome:
    suite, failed = outcome.suite, outcome.failed
    if outcome.code != 1 or not 0 < len(failed) <= SECOND_LOOK_LIMIT:
        return outcome
    print(f"--- {suite}: once more, alone: {', '.join(failed)}", flush=True)
    log = RESULTS / f"{suite}.second.log"
    second = _pytest(suite, failed, RESULTS / f"{suite}.second.json", log)
    print(log.read_text(errors="replace"), flush=True)
    closing = f"{outcome.closing}; at the second look {second.closing}: {', '.join(failed)}"
    return Outcome(suite, second.code, closing, failed, outcome.seconds + second.seconds)


def _pytest(suite: str, targets: list[str], results: Path, log: Path) -> Outcome:
    start = time.monotonic()
    variables = {**os.environ, "VIRTFLEET_TEST_RESULTS": str(results), "PYTHONUNBUFFERED": "1"}
    # Each suite with a cache of its own: two that end at the same time would write the same file.
    command = [sys.executable, "-m", "pytest", "-o", f"cache_dir=.pytest_cache/{suite}", *targets]
    with log.open("wb") as sink:
        done = subprocess.run(command, cwd=ROOT, env=variables, stdout=sink, stderr=sink, check=False)
    closings = re.findall(r"^=+ (.* in [\d.]+s.*?) =+$", log.read_text(errors="replace"), flags=re.MULTILINE)
    outcomes = json.loads(results.read_text()) if results.exists() else {}
    failed = sorted(name for name, outcome in outcomes.items() if outcome == "failed")
    closing = closings[-1] if closings else "no result"
    return Outcome(suite, done.returncode, closing, failed, time.monotonic() - start)


def planned_seconds(suites: list[str], lanes: int) -> float:
    """Return how long suites take by their budgets, each begun in the lane that is free first."""
    ends = [0.0] * lanes
    for suite in suites:
        lane = ends.index(min(ends))
        ends[lane] += BUDGET_SECONDS[suite]
    return max(ends)


def _against(seconds: float, budget: float | None) -> str:
    if budget is None:
        return f"{seconds:6.1f} s"
    return f"{seconds:6.1f} s of {budget:4.0f}{' OVER' if seconds > budget else '     '}"


def main() -> int:
    """Run the suites named on the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.suites")
    parser.add_argument("suites", nargs="+")
    parser.add_argument("--check", action="store_true", help="run the checks that need no fleet first")
    parser.add_argument("--promises", action="store_true", help="also hold the promises against all results")
    parser.add_argument("--once", action="store_true", help="take no second look at what fails")
    parser.add_argument("--lanes", type=int, default=2, help="so many suites run at a time")
    options = parser.parse_args()
    outcomes = []
    began = time.monotonic()
    if options.check:
        code = subprocess.run([sys.executable, "-m", "tools.check"], cwd=ROOT, check=False).returncode
        what = "format, lint, types, imports, protos, unit tests"
        outcomes.append(Outcome("check", code, what, [], time.monotonic() - began))
    outcomes += run(options.suites, options.lanes, once=options.once)
    print("--- summary")
    for outcome in outcomes:
        state = "FAILED" if outcome.code else "ok"
        took = _against(outcome.seconds, BUDGET_SECONDS.get(outcome.suite))
        print(f"{outcome.suite:12} {state:6} {took}  {outcome.closing}")
    print(f"{'in all':12} {'':6} {_against(time.monotonic() - began, LIMIT_SECONDS)}")
    failed = any(outcome.code for outcome in outcomes)
    if options.promises:
        broken = promises.broken(promises.load(), promises.results())
        print("\n".join(broken) or "promises     ok")
        failed = failed or bool(broken)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

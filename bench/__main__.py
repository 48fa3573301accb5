"""Measure, print a table, write bench/results.json: `python -m bench [--only KEY …] [--quick]`.

A whole run also writes docs/performance.md with its plots.

Ends with 1 if a leg could not be measured or, with `--strict`, if a figure misses its mark.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime as dt
import logging
import random
import signal
import sys
import time

import uvloop

from bench import machine, report
from bench.figures import Failure, Figure
from bench.legs import Leg, chosen
from bench.stage import Stage, stage

_log = logging.getLogger("bench")


async def measure(legs: list[Leg], *, quick: bool, seed: int) -> tuple[list[Figure], list[Failure]]:
    """Run legs one after the other; one that fails does not keep the others from running."""
    figures: list[Figure] = []
    failures: list[Failure] = []
    async with stage(quick=quick, seed=seed) as on:
        for leg in legs:
            began = time.monotonic()
            print(f"{leg.name} …", flush=True)
            found = await _one(leg, on)
            if isinstance(found, Failure):
                failures.append(found)
                print(f"{leg.name}: FAILED: {found.error}", flush=True)
            else:
                figures += found
                print(f"{leg.name}: {time.monotonic() - began:.1f} s", flush=True)
    return figures, failures


async def _one(leg: Leg, on: Stage) -> list[Figure] | Failure:
    try:
        return await leg.measure(on)
    except Exception as error:  # noqa: BLE001  # the boundary of a leg
        # Whatever it is, it is reported, and the others go on.
        _log.debug("leg failed", exc_info=True)
        _log.debug("%s", on.log_tails())
        return Failure.of(leg.name, error)


def main() -> int:
    """Read the arguments and measure; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", nargs="+", default=[], metavar="KEY", help="figures, or names of legs")
    parser.add_argument("--quick", action="store_true", help="few measurements: shows that all legs work")
    parser.add_argument("--strict", action="store_true", help="end with 1 if a figure misses its mark")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="of the orders of variants")
    parser.add_argument("--debug", action="store_true", help="show where a leg failed")
    options = parser.parse_args()
    if options.debug:
        logging.basicConfig(format="%(message)s")
        _log.setLevel(logging.DEBUG)
    try:
        legs = chosen(options.only)
    except ValueError as error:
        parser.error(str(error))
    facts = machine.facts()
    # Whoever ends it gets a stage that is gone too, as with Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    print(f"seed {options.seed}, {facts['cpu_count']} cores, load {facts['load_before']:.2f}", flush=True)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        figures, failures = runner.run(measure(legs, quick=options.quick, seed=options.seed))
    run = report.Run(
        date=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        seed=options.seed,
        quick=options.quick,
        machine=facts,
        versions=machine.versions(),
        figures=figures,
        failures=failures,
    )
    report.write(run)
    if not options.only and not options.quick:
        report.write_document(run)
    print("\n" + report.table(figures))
    for failure in failures:
        print(f"NOT MEASURED  {failure.leg}: {failure.error}")
    print(f"\n{len(run.missed)} missed, {len(failures)} legs not measured; written to {report.RESULTS}")
    return 1 if failures or (options.strict and run.missed) else 0


if __name__ == "__main__":
    sys.exit(main())

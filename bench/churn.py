"""A fake fleet that changes its own domains at a rate: `python -m bench.churn --nodes N --domains N`.

It prints the line of `virtfleet fake`. For each line `RATE SECONDS` on its standard input it makes so many changes, and
prints how many. They are made where a service makes them, in the store of the domain's node: a caller's share would be
most of the work of this one process. The label `at` of a domain says when it was changed.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import time
from collections.abc import Iterator

from virtfleet_fake import fleet
from virtfleet_fake.clock import MovableLoop

from virtfleet.compute.v1 import domain_pb2
from virtfleet_compute.context import KIND
from virtfleet_service import logs, resources
from virtfleet_service.server import raise_descriptor_limit
from virtfleet_service.transaction import Transaction

_TICK_SECONDS = 0.02
_CAUSE = "bench"


def _touch(tx: Transaction, name: str) -> None:
    row = tx.need(name)
    domain = domain_pb2.Domain.FromString(row.body)
    domain.labels["at"] = str(time.time_ns())
    resources.touch(domain)
    tx.put(KIND, domain, cause=_CAUSE)


def _places(running: fleet.Fleet, domains: int) -> Iterator[tuple[str, str]]:
    """Yield node and name of all domains, again and again; neighbours live on different nodes."""
    while True:
        for number in range(domains):
            for node in running.nodes:
                yield node, f"nodes/{node}/domains/d-{number:05d}"


async def _churn(running: fleet.Fleet, places: Iterator[tuple[str, str]], rate: int, seconds: float) -> int:
    """Make changes at a rate; returns how many were made in time."""
    loop = asyncio.get_running_loop()
    began, made = loop.time(), 0
    while (passed := loop.time() - began) < seconds:
        due = min(int(passed * rate) + 1, int(seconds * rate)) - made
        changes = [
            running.nodes[node].app.store.write(lambda tx, name=name: _touch(tx, name))  # type: ignore[misc]  # bound here
            for node, name in itertools.islice(places, due)
        ]
        await asyncio.gather(*changes)
        made += due
        await asyncio.sleep(_TICK_SECONDS)
    return made


async def _run(nodes: int, domains: int) -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with fleet.running(fleet.Plan(nodes=nodes, domains=domains)) as running:
        print(json.dumps({"address": running.address, **running.files()}), flush=True)
        places = _places(running, domains)
        while line := await reader.readline():
            rate, seconds = line.split()
            made = await _churn(running, places, int(rate), float(seconds))
            print(json.dumps({"made": made}), flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.churn")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--domains", type=int, required=True)
    options = parser.parse_args()
    logs.configure("fake", "", "warning")
    raise_descriptor_limit()
    with asyncio.Runner(loop_factory=MovableLoop) as runner:
        runner.run(_run(options.nodes, options.domains))


if __name__ == "__main__":
    main()

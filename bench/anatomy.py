"""Where the time of a StartDomain goes: what the stores of the three services have logged, and when.

Every commit of a service stamps its events before it is written to the disk; all processes share one clock. So the
offsets between the client's call, the events in three files and the client's answer are measured, not guessed.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from bench import guests, samples, stage
from bench.figures import Figure
from bench.stage import Stage
from virtfleet.compute.v1 import watch_pb2 as compute_watch
from virtfleet.network.v1 import watch_pb2 as network_watch
from virtfleet.storage.v1 import watch_pb2 as storage_watch

PREFIX = "start_at_"
ANSWER = f"{PREFIX}answer_ms"
KEYS = (ANSWER,)
_TYPES: dict[str, Any] = {
    "compute": compute_watch.EventType,
    "storage": storage_watch.EventType,
    "network": network_watch.EventType,
}
_PAUSE_SECONDS = 0.05


async def leg(on: Stage) -> list[Figure]:
    """Start one guest again and again and read the logs of each start."""
    fleet = await on.fleet()
    direct = await on.connect(fleet, "compute")
    stores = {service: next((fleet.folder / stage.NODE).rglob(f"{service}.db")) for service in _TYPES}
    offsets: dict[str, list[float]] = {}
    count = on.times(20, 4)
    async with guests.defined(on, direct, 1) as names:
        for number in range(count + 1):
            await asyncio.sleep(_PAUSE_SECONDS)
            began = time.time_ns()
            await guests.start(direct, names[0])
            ended = time.time_ns()
            await asyncio.sleep(_PAUSE_SECONDS)
            await guests.stop(direct, names[0])
            if number:
                for key, at in _events(stores, began, ended).items():
                    offsets.setdefault(key, []).append((at - began) / 1e6)
                offsets.setdefault(ANSWER, []).append((ended - began) / 1e6)
    # What was not seen at each start is no part of every start.
    steady = {key: values for key, values in offsets.items() if len(values) == count}
    found = [Figure(key, samples.p50(values), "ms", count, "after the call was sent") for key, values in steady.items()]
    return sorted(found, key=lambda figure: figure.value)


def _events(stores: dict[str, Path], began: int, ended: int) -> dict[str, int]:
    """Return when each kind of event was logged last between two times."""
    found: dict[str, int] = {}
    for service, path in stores.items():
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as store:
            rows = store.execute(
                "SELECT time_ns, type FROM changes WHERE sort = 'event' AND time_ns BETWEEN ? AND ? ORDER BY seq",
                (began, ended),
            ).fetchall()
        for time_ns, number in rows:
            name = _TYPES[service].Name(number).removeprefix("EVENT_TYPE_").lower()
            found[f"{PREFIX}{service}_{name}_ms"] = time_ns
    return found

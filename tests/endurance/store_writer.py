"""A process that writes to a store and says what was acknowledged: `python -m tests.endurance.store_writer FOLDER MODE`.

It is recorded and its record is cut afterwards. MODE is FULL, which is what the store itself sets, or NORMAL or OFF:
less than what a store may do, to show that the cut is seen.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from tests.endurance.powercut import Acknowledgements
from tests.unit.service.rig import TEST_CAUSE, domain, open_store, put
from virtfleet.compute.v1 import domain_pb2
from virtfleet_service import resources
from virtfleet_service.store import Limits, Store
from virtfleet_service.transaction import Transaction

WRITERS = 4
CHANGES = 60
GOING, GONE = "going", "gone"
"""Stand for the generation of what is about to be deleted, and of what is."""


async def write(folder: Path, mode: str) -> None:
    """Make domains, change them and delete some, several at once, while old entries of the log are dropped."""
    told = Acknowledgements(Path(os.environ["POWERCUT_LOG"]))
    async with open_store(folder / "compute.db", Limits(log_entries=80)) as store:
        if mode != "FULL":
            # The writer waits for work, so nobody else uses its connection now.
            store._writer.execute(f"PRAGMA synchronous = {mode}")
        async with asyncio.TaskGroup() as group:
            for number in range(WRITERS):
                group.create_task(_writer(store, f"d{number}", told))
    told.close()


async def _writer(store: Store, domain_id: str, told: Acknowledgements) -> None:
    made = domain(domain_id)
    await put(store, made)
    told.add(f"{made.name} {made.generation}")
    for number in range(CHANGES):

        def change(tx: Transaction, number: int = number) -> int:
            row = tx.need(made.name)
            changed = domain_pb2.Domain.FromString(row.body)
            changed.annotations["note"] = f"{number} " + "n" * (number * 97 % 3000)
            resources.touch(changed)
            tx.put("domain", changed, cause=TEST_CAUSE, old_generation=row.generation)
            return changed.generation

        generation = await store.write(change)
        told.add(f"{made.name} {generation}")
        if number % 20 == 7:
            await store.compact()
        if number % 6 == 5:
            brief = domain(f"{domain_id}-{number}")
            await put(store, brief)
            told.add(f"{brief.name} {brief.generation}")
            told.add(f"{brief.name} {GOING}")

            def drop(tx: Transaction, name: str = brief.name) -> bool:
                return tx.delete(name, cause=TEST_CAUSE)

            await store.write(drop)
            told.add(f"{brief.name} {GONE}")


if __name__ == "__main__":
    asyncio.run(write(Path(sys.argv[1]), sys.argv[2]))

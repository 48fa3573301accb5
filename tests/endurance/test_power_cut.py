"""What a store has acknowledged is there after a power cut; shown to bite with a store that does not sync."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.endurance import powercut
from tests.endurance.powercut import Acknowledgements, Record
from tests.endurance.store_writer import GOING, GONE
from tests.fleet.rig import create, creation, delete, get, small_spec, until, verb
from tests.unit.service.rig import open_store
from tools.paths import ROOT
from virtfleet.compute.v1 import domain_pb2
from virtfleet_client import Fleet, VirtfleetError, connect
from virtfleet_service.store import StoreError

SEED = int(os.environ.get("SEED") or random.SystemRandom().randrange(1 << 32))
CUTS = int(os.environ.get("CUTS") or 80)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the recorder."""
    return powercut.build(tmp_path_factory.mktemp("recorder"))


def newest(told: Sequence[str]) -> dict[str, int]:
    """Return the newest generation that was acknowledged of each resource that must be there."""
    found: dict[str, int] = {}
    for line in told:
        name, _, generation = line.partition(" ")
        if generation == GOING:
            # Whether its end is on the disk nobody has been told.
            del found[name]
        elif generation != GONE:
            found[name] = max(found.get(name, 0), int(generation))
    return found


def gone(told: Sequence[str]) -> set[str]:
    """Return the resources whose deletion was acknowledged; none of them is made again."""
    return {line.partition(" ")[0] for line in told if line.endswith(f" {GONE}")}


async def verdict(image: Path, told: Sequence[str]) -> str:
    """Return what became of a store: `whole`, `lost` or `damaged`."""
    path = image / "compute.db"
    if not path.exists():
        return "lost" if told else "whole"
    try:
        async with open_store(path) as store:
            (intact,) = store.reader.execute("PRAGMA integrity_check").fetchone()
            generations = {row.name: row.generation for row in store.list("domain")}
            for row in store.list("domain"):
                domain_pb2.Domain.FromString(row.body)
    except (StoreError, sqlite3.DatabaseError):
        return "damaged"
    if intact != "ok":
        return "damaged"
    kept = all(generations.get(name, 0) >= generation for name, generation in newest(told).items())
    return "whole" if kept and not gone(told) & generations.keys() else "lost"


async def verdicts(records: Sequence[Record], folder: Path, count: int = CUTS) -> Counter[str]:
    """Cut at many places, build both images each time, and count what became of them."""
    found: Counter[str] = Counter()
    chance = random.Random(SEED)
    for place, told, disk in powercut.cuts(records, count, chance):
        for kind, torn in (("nothing", None), ("sectors", random.Random(chance.random()))):
            image = folder / f"{place}-{kind}"
            image.mkdir(parents=True)
            disk.image(image, torn)
            verdict_here = await verdict(image, told)
            found[verdict_here] += 1
            if verdict_here == "whole":
                shutil.rmtree(image)
    return found


def recorded(library: Path, folder: Path, mode: str) -> list[Record]:
    """Run the writer to its end and return its record."""
    place, log = folder / "store", folder / "record"
    place.mkdir()
    command = [sys.executable, "-m", "tests.endurance.store_writer", str(place), mode]
    variables = powercut.environment(library, place, log)
    variables["PYTHONPATH"] = str(ROOT)
    subprocess.run(command, cwd=ROOT, env=variables, check=True, timeout=60)
    return powercut.read(log)


async def test_nothing_acknowledged_is_lost_in_a_power_cut(library: Path, tmp_path: Path) -> None:
    print(f"SEED={SEED}")
    records = recorded(library, tmp_path, "FULL")
    kinds = Counter(record.kind for record in records)
    assert kinds[b"a"] > 200
    assert kinds[b"s"] > 50
    assert len(gone([record.data.decode() for record in records if record.kind == b"a"])) == 40
    # What the log file held has been folded into the store while it was written.
    assert {record.path for record in records if record.kind == b"w"} >= {"compute.db", "compute.db-wal"}
    found = await verdicts(records, tmp_path / "images")
    assert found == Counter(whole=2 * CUTS), (SEED, found)


@pytest.mark.parametrize("mode", ["NORMAL", "OFF"])
async def test_a_store_that_does_not_sync_is_seen_to_lose(library: Path, tmp_path: Path, mode: str) -> None:
    """Shown to bite: less than the store asks of the disk loses what was acknowledged."""
    print(f"SEED={SEED}")
    found = await verdicts(recorded(library, tmp_path, mode), tmp_path / "images", CUTS // 4)
    assert found["lost"] > CUTS // 8, (SEED, found)


@contextmanager
def compute(state: Path, run: Path, variables: dict[str, str]) -> Iterator[Fleet]:
    """Run the compute service by itself with the driver in memory; SIGKILL ends it."""
    command = [sys.executable, "-m", "virtfleet_compute", "--node", "n1", "--state-dir", str(state)]
    command += ["--run-dir", str(run), "--enabled-drivers", "test"]
    with (run.parent / "compute.log").open("ab") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=log)
    try:
        with connect(f"unix://{run}/compute/admin.sock") as fleet:
            until(lambda: fleet.domains.ListDomains(domain_pb2.ListDomainsRequest(parent="nodes/n1")) or 1, 30, "up")
            yield fleet
    finally:
        process.kill()
        process.wait()


async def test_the_compute_service_keeps_what_it_has_answered(library: Path, tmp_path: Path) -> None:
    print(f"SEED={SEED}")
    state, log = tmp_path / "state", tmp_path / "record"
    state.mkdir()
    with compute(state, tmp_path / "run", powercut.environment(library, state, log)) as fleet:
        told = Acknowledgements(log)
        for number in range(12):
            made = create(fleet, "nodes/n1", f"d{number}")
            told.add(f"{made.name} {made.generation}")
            verb(fleet, "StartDomain", made.name)
            changed = domain_pb2.UpdateDomainRequest(domain=domain_pb2.Domain(name=made.name, labels={"a": "b"}))
            changed.update_mask.paths.append("labels")
            made = fleet.wait(fleet.domains.UpdateDomain(changed), domain_pb2.Domain)
            told.add(f"{made.name} {made.generation}")
            if number % 3 == 2:
                told.add(f"{made.name} {GOING}")
                delete(fleet, made.name)
                told.add(f"{made.name} {GONE}")
        told.close()
    records = powercut.read(log)
    acknowledged = [record.data.decode() for record in records if record.kind == powercut.ACKNOWLEDGED]
    assert len(gone(acknowledged)) == 4
    assert len(acknowledged) == 32
    found = await verdicts(records, tmp_path / "images", CUTS // 4)
    assert found == Counter(whole=CUTS // 4 * 2), (SEED, found)
    # The last of all cuts: the service comes up on what is left, and answers with all of it.
    image = tmp_path / "last"
    image.mkdir()
    for _, _, disk in powercut.cuts(records, len(records), random.Random(SEED)):
        last = disk
    last.image(image, None)
    with compute(image, tmp_path / "again", dict(os.environ)) as fleet:
        for name, generation in newest(acknowledged).items():
            assert get(fleet, name).generation == generation
            assert get(fleet, name).labels == {"a": "b"}
        listed = fleet.domains.ListDomains(domain_pb2.ListDomainsRequest(parent="nodes/n1")).domains
        assert {one.name for one in listed} == newest(acknowledged).keys()
        with pytest.raises(VirtfleetError) as refused:
            fleet.domains.CreateDomain(creation("nodes/n1", "d0", spec=small_spec()))
        assert refused.value.reason == "RESOURCE_EXISTS"

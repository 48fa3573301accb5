"""What a killed run leaves is taken away by the next `make clean`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import leftovers
from tools.paths import ROOT

PROGRAM = """
import asyncio
from tools.fleet import Fleet, Plan

async def main() -> None:
    async with Fleet.running(Plan(driver="test")) as fleet:
        print(fleet.run_folder, flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.timeout(120)
def test_a_fleet_whose_run_was_killed_is_taken_away(tmp_path: Path) -> None:
    killed = subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with killed:
        assert killed.stdout is not None
        run_folder = Path(killed.stdout.readline().strip())
        record = json.loads((run_folder / "fleet.json").read_text())
        killed.kill()

    def look() -> leftovers.Leftovers:
        parent = Path(record["cgroup_parent"]) if record["cgroup_parent"] else None
        return leftovers.look(record["tag"], Path(record["folder"]), frozenset(record["namespace_inodes"]), parent)

    assert look().processes, "its services go on"
    # Nothing of a fleet that `make up` keeps is touched: that one has a folder of its own.
    clean = [sys.executable, "-m", "tools.fleet"]
    subprocess.run(clean, cwd=ROOT, env={**os.environ, "VIRTFLEET_RUN": str(tmp_path)}, check=True, timeout=60)
    assert not look()

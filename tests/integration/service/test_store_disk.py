from __future__ import annotations

import subprocess
from pathlib import Path

from tests.unit.service.rig import domain, open_store, put
from virtfleet_service.store import StoreUnwritable


async def test_a_full_file_system_is_survived(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], check=True)
    try:
        async with open_store(mount / "c.db") as store:
            acknowledged = []
            refused = 0
            for index in range(400):
                one = domain(f"d{index}")
                one.annotations["fill"] = "x" * 8000
                try:
                    await put(store, one)
                    acknowledged.append(one.name)
                except StoreUnwritable:
                    refused += 1
            assert acknowledged
            assert refused
            assert sorted(row.name for row in store.list("domain")) == sorted(acknowledged)
        async with open_store(mount / "c.db") as store:
            assert sorted(row.name for row in store.list("domain")) == sorted(acknowledged)
    finally:
        subprocess.run(["umount", str(mount)], check=True)

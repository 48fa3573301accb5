from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import pytest

from tests.unit.service.rig import domain, open_store, put
from virtfleet_service.store import StoreCorrupt, StoreError, StoreUnwritable


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


async def test_a_full_disk_at_the_start_is_no_damage(tmp_path: Path) -> None:
    """Who puts a copy back because the disk was full loses what came after the copy."""
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], check=True)
    try:
        async with open_store(mount / "c.db") as store:
            await put(store, domain("a"))
        with (mount / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(4096))
        with pytest.raises(StoreError, match="cannot be opened") as caught:
            async with open_store(mount / "c.db"):
                pass
        assert not isinstance(caught.value, StoreCorrupt)
        assert "full" in str(caught.value)
        (mount / "filler").unlink()
        async with open_store(mount / "c.db") as store:
            assert store.get("nodes/n1/domains/a") is not None
    finally:
        subprocess.run(["umount", str(mount)], check=True)

"""qemu-img that is missing, comes, goes and comes back while the service runs: each call finds what is there then."""

from __future__ import annotations

import asyncio
import os
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.storage.rig import MIB, PARENT, Process, Refused, Rig, info
from virtfleet.storage.v1 import pool_pb2, volume_pb2

TOOL = "/usr/bin/qemu-img"
RAW, QCOW2 = volume_pb2.VOLUME_FORMAT_RAW, volume_pb2.VOLUME_FORMAT_QCOW2


@pytest.fixture
async def without_tool() -> AsyncIterator[tuple[Rig, Process]]:
    """Run the service where a file that nobody can run hides the tool."""
    hide = f'mount --bind /dev/null {TOOL} && exec "$@"'
    with tempfile.TemporaryDirectory(prefix=f"vf-storage-{os.getpid()}-") as folder:
        Path(folder).chmod(0o711)
        rig = Rig(Path(folder))
        process = Process(rig, prefix=["unshare", "--mount", "sh", "-c", hide, "sh"])
        await process.start()
        try:
            async with rig.clients():
                yield rig, process
        finally:
            await process.kill()


def in_its_place(process: Process, *argv: str) -> None:
    """Run a command among the mounts of the service."""
    subprocess.run(["nsenter", "--target", str(process.process.pid), "--mount", "--", *argv], check=True)


async def kind(rig: Rig) -> pool_pb2.PoolBackend:
    answer = await rig.client.call(rig.client.pools.ListPoolBackends, pool_pb2.ListPoolBackendsRequest(parent=PARENT))
    found: pool_pb2.PoolBackend = answer.pool_backends[0]
    return found


async def test_a_tool_that_is_installed_later_is_found_at_the_next_use(without_tool: tuple[Rig, Process]) -> None:
    rig, process = without_tool
    client = rig.client
    seen = await kind(rig)
    # A directory needs no tool; images do.
    assert (seen.status.available, list(seen.status.volume_formats), seen.status.version) == (True, ["RAW"], "")
    assert "volume.format.qcow2" not in {one.id for one in seen.status.capabilities}
    await client.pool("images")
    await client.volume("images", "plain", capacity_bytes=MIB)
    await client.upload("pools/images/volumes/plain", b"p" * MIB)
    with pytest.raises(Refused) as refused:
        await client.volume("images", "image", capacity_bytes=MIB, format=QCOW2)
    assert (refused.value.code, refused.value.reason) == (14, "DRIVER_BROKEN")
    assert refused.value.metadata["cause"] == "QEMU_IMG_MISSING"
    assert sorted(path.name for path in (rig.root / "images").iterdir()) == [".virtfleet", "plain"]
    assert [path.name for path in (rig.root / "images" / ".virtfleet").iterdir()] == ["pool"]

    in_its_place(process, "umount", TOOL)
    # The same request again, with the service that could not do it before.
    await client.volume("images", "image", capacity_bytes=MIB, format=QCOW2)
    assert (await info(rig.root / "images" / "image", "qcow2"))["virtual-size"] == MIB
    seen = await kind(rig)
    assert list(seen.status.volume_formats) == ["RAW", "QCOW2"]
    assert seen.status.version.startswith("qemu-img ")

    in_its_place(process, "mount", "--bind", "/dev/null", TOOL)
    assert list((await kind(rig)).status.volume_formats) == ["RAW"]


async def test_a_tool_that_hangs_does_not_keep_the_service_from_starting() -> None:
    with tempfile.TemporaryDirectory(prefix=f"vf-storage-{os.getpid()}-") as folder:
        Path(folder).chmod(0o711)
        rig = Rig(Path(folder))
        tool = Path(folder) / "hangs"
        tool.write_text("#!/bin/sh\nexec sleep 1000\n")
        tool.chmod(0o755)
        hide = f'mount --bind {tool} {TOOL} && exec "$@"'
        process = Process(rig, prefix=["unshare", "--mount", "sh", "-c", hide, "sh"])
        try:
            async with asyncio.timeout(15):
                await process.start()
            async with rig.clients():
                assert list((await kind(rig)).status.volume_formats) == ["RAW"]
        finally:
            await process.kill()

"""Files that others make, change, replace and remove; images that want more than they may."""

from __future__ import annotations

import asyncio
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.storage.rig import MIB, PARENT, Refused, Rig, qemu_img
from virtfleet.storage.v1 import volume_pb2, watch_pb2
from virtfleet_service import errors

RAW = volume_pb2.VOLUME_FORMAT_RAW
QCOW2 = volume_pb2.VOLUME_FORMAT_QCOW2


@pytest.fixture
async def pool(node: Rig) -> Path:
    await node.client.pool("images")
    return node.root / "images"


async def until(node: Rig, holds: Callable[[dict[str, volume_pb2.Volume]], bool]) -> dict[str, volume_pb2.Volume]:
    """Wait until the volumes, by file name, are as wanted, for 10 s at most."""
    async with asyncio.timeout(10):
        while True:
            found = {Path(volume.status.path).name: volume for volume in await node.client.volumes_of("images")}
            if holds(found):
                return found
            await asyncio.sleep(0.05)


async def test_files_become_volumes_and_go_with_their_files(node: Rig, pool: Path) -> None:
    (pool / "Ubuntu 24.04.img").write_bytes(bytes(MIB))
    (pool / "7up").write_bytes(b"x")
    await qemu_img("create", "-q", "-f", "qcow2", pool / "disk.qcow2", "10M")
    (pool / ".hidden").write_bytes(b"x")
    (pool / "folder").mkdir()
    os.mkfifo(pool / "pipe")
    (pool / "link").symlink_to("/etc/passwd")
    (pool.parent / "elsewhere").write_bytes(b"x")
    (pool / "hard").hardlink_to(pool.parent / "elsewhere")
    found = await until(node, lambda volumes: len(volumes) >= 3)
    assert sorted(found) == ["7up", "Ubuntu 24.04.img", "disk.qcow2"]
    image = found["disk.qcow2"]
    assert image.name == f"{PARENT}/pools/images/volumes/disk-qcow2"
    assert image.display_name == "disk.qcow2"
    assert (image.spec.format, image.status.capacity_bytes) == (QCOW2, 10 * MIB)
    assert found["Ubuntu 24.04.img"].name.endswith("/volumes/ubuntu-24-04-img")
    assert found["7up"].name.rpartition("/")[2].startswith("v-7up-")
    (pool / "ubuntu-24.04.img").write_bytes(b"x")
    found = await until(node, lambda volumes: "ubuntu-24.04.img" in volumes)
    assert found["ubuntu-24.04.img"].name.rpartition("/")[2].startswith("ubuntu-24-04-img-")
    (pool / "7up").unlink()
    await until(node, lambda volumes: "7up" not in volumes)
    events = [(event.type, event.reason) for event in await node.client.events()]
    assert (watch_pb2.EVENT_TYPE_VOLUME_ADDED, "ADOPTED") in events
    assert (watch_pb2.EVENT_TYPE_VOLUME_DELETED, "VANISHED") in events


async def test_a_file_that_grows_is_seen(node: Rig, pool: Path) -> None:
    await node.client.volume("images", "disk", capacity_bytes=MIB)
    with (pool / "disk").open("r+b") as file:
        file.write(os.urandom(2 * MIB))
    found = await until(node, lambda volumes: volumes["disk"].status.capacity_bytes == 2 * MIB)
    assert found["disk"].status.allocation_bytes == (pool / "disk").stat().st_blocks * 512


async def test_a_guest_cannot_make_its_raw_disk_an_image(node: Rig, pool: Path) -> None:
    client = node.client
    await client.volume("images", "disk", capacity_bytes=4 * MIB)
    await client.volume("images", "twin", capacity_bytes=4 * MIB)
    evil = pool.parent / "evil.qcow2"
    await qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "/etc/passwd", "-F", "raw", evil, "4M")
    for name in ("disk", "twin"):
        with (pool / name).open("r+b") as file:
            file.write(evil.read_bytes())
    await client.refresh("images")
    volume = await client.get("pools/images/volumes/disk")
    assert (volume.spec.format, volume.status.state) == (RAW, volume_pb2.VOLUME_STATE_READY)
    attached = await node.attach("pools/images/volumes/disk")
    assert (attached.file.format, list(attached.file.backing_chain)) == ("raw", [])
    copy = await client.volume("images", "copy", source="pools/images/volumes/twin", format=QCOW2)
    assert copy.status.capacity_bytes == 4 * MIB
    await client.volume("images", "flat", source="pools/images/volumes/copy", format=RAW)
    assert (pool / "flat").read_bytes() == (pool / "twin").read_bytes()


async def make(pool: Path, name: str, backing: str, format: str = "raw") -> None:
    await qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", format, pool / name, "1M")


@pytest.mark.parametrize(
    "backing",
    [
        "/etc/passwd",
        "../../../../etc/passwd",
        "./base",
        "folder/base",
        "json:{}",
        "nbd:localhost:1",
        "file:/etc/passwd",
        "/proc/self/cwd/etc/passwd",
        "..",
        ".virtfleet",
    ],
)
async def test_an_image_that_points_elsewhere_is_refused(node: Rig, pool: Path, backing: str) -> None:
    client = node.client
    if ":" in backing and not backing.startswith("/"):
        # The tool would not write it as it is: put it into the header by hand.
        await make(pool, "evil", "x" * len(backing))
        data = bytearray((pool / "evil").read_bytes())
        offset, size = struct.unpack_from(">QI", data, 8)
        assert size == len(backing)
        data[offset : offset + size] = backing.encode()
        (pool / "evil").write_bytes(data)
    else:
        await make(pool, "evil", backing)
    await client.refresh("images")
    volume = await client.get("pools/images/volumes/evil")
    assert volume.status.state == volume_pb2.VOLUME_STATE_REFUSED
    assert volume.status.state_reason == "PATH_OUTSIDE_POOL"
    assert [one.type for one in volume.status.conditions] == ["Refused"]
    with pytest.raises(errors.PathOutsidePool):
        await node.attach("pools/images/volumes/evil")
    with pytest.raises(Refused) as refused:
        await client.volume("images", "copy", source="pools/images/volumes/evil")
    assert refused.value.reason == "PATH_OUTSIDE_POOL"
    with pytest.raises(Refused) as refused:
        await client.volume("images", "top", backing=volume_pb2.VolumeBacking(volume="pools/images/volumes/evil"))
    assert refused.value.reason == "PATH_OUTSIDE_POOL"
    assert sorted(path.name for path in pool.iterdir()) == [".virtfleet", "evil"]
    # The same bytes by upload into an image that is fine.
    await client.volume("images", "good", capacity_bytes=MIB, format=QCOW2)
    old = (pool / "good").read_bytes()
    with pytest.raises(Refused) as refused:
        await client.upload("pools/images/volumes/good", (pool / "evil").read_bytes())
    assert refused.value.reason == "PATH_OUTSIDE_POOL"
    assert (pool / "good").read_bytes() == old


def header(**changes: int) -> bytes:
    """Return a qcow2 header of version 3 with some fields changed."""
    fields = {
        "version": 3,
        "backing_offset": 0,
        "backing_size": 0,
        "cluster_bits": 16,
        "size": MIB,
        "crypt": 0,
        "l1_size": 1,
        "l1_offset": 0x30000,
        "table": 0x10000,
        "table_clusters": 1,
        "snapshots": 0,
        "snapshots_offset": 0,
        "incompatible": 0,
        "compatible": 0,
        "autoclear": 0,
        "refcount_order": 4,
        "length": 104,
    } | changes
    return b"QFI\xfb" + struct.pack(">IQIIQIIQQIIQQQQII", *fields.values()) + bytes(0x40000 - 104)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"incompatible": 4}, "PATH_OUTSIDE_POOL"),
        ({"incompatible": 2}, "IMAGE_CORRUPT"),
        ({"incompatible": 1 << 40}, "CAPABILITY_MISSING"),
        ({"crypt": 2}, "CAPABILITY_MISSING"),
        ({"size": 1 << 62}, "IMAGE_CORRUPT"),
        ({"cluster_bits": 60}, "IMAGE_CORRUPT"),
        ({"cluster_bits": 0}, "IMAGE_CORRUPT"),
        ({"l1_size": 1 << 31}, "IMAGE_CORRUPT"),
        ({"l1_offset": 1 << 62}, "IMAGE_CORRUPT"),
        ({"table": 1 << 50}, "IMAGE_CORRUPT"),
        ({"backing_offset": 1 << 40, "backing_size": 10}, "IMAGE_CORRUPT"),
        ({"backing_offset": 512, "backing_size": 5000}, "IMAGE_CORRUPT"),
        ({"version": 9}, "IMAGE_CORRUPT"),
        ({"length": 1 << 30}, "IMAGE_CORRUPT"),
    ],
)
async def test_a_broken_header_is_refused(node: Rig, pool: Path, changes: dict[str, int], reason: str) -> None:
    (pool / "evil").write_bytes(header(**changes))
    await node.client.refresh("images")
    volume = await node.client.get("pools/images/volumes/evil")
    assert (volume.spec.format, volume.status.state) == (QCOW2, volume_pb2.VOLUME_STATE_REFUSED)
    assert volume.status.state_reason == reason
    with pytest.raises(errors.BY_REASON[reason]):
        await node.attach("pools/images/volumes/evil")
    await node.client.delete("pools/images/volumes/evil")
    assert not (pool / "evil").exists()


async def test_a_ring_of_images_has_an_end(node: Rig, pool: Path) -> None:
    await make(pool, "a", "b", "qcow2")
    await make(pool, "b", "a", "qcow2")
    await node.client.refresh("images")
    await node.client.refresh("images")
    volume = await node.client.get("pools/images/volumes/a")
    assert volume.status.state_reason == "IMAGE_CORRUPT"


async def test_a_chain_breaks_and_is_whole_again(node: Rig, pool: Path) -> None:
    client = node.client
    await client.volume("images", "base", capacity_bytes=MIB)
    await client.volume("images", "top", backing=volume_pb2.VolumeBacking(volume="pools/images/volumes/base"))
    (pool / "base").rename(pool.parent / "base")
    await client.refresh("images")
    assert (await client.get("pools/images/volumes/base")).status.state == volume_pb2.VOLUME_STATE_MISSING
    top = await client.get("pools/images/volumes/top")
    assert (top.status.state, top.status.state_reason) == (volume_pb2.VOLUME_STATE_REFUSED, "BACKING_MISSING")
    with pytest.raises(errors.BackingMissing):
        await node.attach("pools/images/volumes/top")
    (pool.parent / "base").rename(pool / "base")
    await client.refresh("images")
    await client.refresh("images")
    assert (await client.get("pools/images/volumes/base")).status.state == volume_pb2.VOLUME_STATE_READY
    assert (await client.get("pools/images/volumes/top")).status.state == volume_pb2.VOLUME_STATE_READY
    await node.attach("pools/images/volumes/top")


async def test_a_file_that_becomes_a_link_leads_nowhere(node: Rig, pool: Path, tmp_path: Path) -> None:
    client = node.client
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    name = f"{PARENT}/pools/images/volumes/disk"
    swaps: tuple[Callable[[Path], None], ...] = (
        lambda path: path.symlink_to(secret),
        lambda path: path.hardlink_to(secret),
        # A pipe without an end would hold up whoever opens it; a device is whatever it is.
        os.mkfifo,
        lambda path: os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5)),
        lambda path: os.mknod(path, 0o600 | stat.S_IFBLK, os.makedev(7, 0)),
    )
    for number, swap in enumerate(swaps):
        # Beside a volume's name, and under one that nobody knows.
        swap(pool / f"unknown{number}")
        await client.volume("images", "disk", capacity_bytes=MIB)
        (pool / "disk").unlink()
        swap(pool / "disk")
        for attempt in (
            client.download("pools/images/volumes/disk"),
            client.do(client.volumes.WipeVolume, volume_pb2.WipeVolumeRequest(name=name), volume_pb2.Volume),
            client.do(
                client.volumes.ResizeVolume,
                volume_pb2.ResizeVolumeRequest(name=name, capacity_bytes=2 * MIB),
                volume_pb2.Volume,
            ),
            client.upload("pools/images/volumes/disk", b"evil"),
            client.volume("images", "copy", source="pools/images/volumes/disk"),
        ):
            with pytest.raises(Refused) as refused:
                await attempt
            assert refused.value.reason == "PATH_OUTSIDE_POOL"
        with pytest.raises(errors.PathOutsidePool):
            await node.attach("pools/images/volumes/disk", uid=23456)
        assert secret.read_bytes() == b"secret"
        assert secret.stat().st_uid == os.getuid()
        await client.refresh("images")
        assert [volume.name for volume in await client.volumes_of("images")] == [name]
        await client.delete("pools/images/volumes/disk")
        assert secret.read_bytes() == b"secret"


async def test_a_race_of_names_never_leads_out(node: Rig, pool: Path, tmp_path: Path) -> None:
    client = node.client
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret" * 1000)
    await client.volume("images", "disk", capacity_bytes=6000)
    real = pool / ".real"
    (pool / "disk").rename(real)
    stop = asyncio.Event()

    def swap() -> None:
        while not stop.is_set():
            for make_it in (lambda: (pool / ".swap").symlink_to(secret), lambda: real.rename(pool / ".swap")):
                make_it()
                if (pool / "disk").is_symlink() or not (pool / "disk").exists():
                    (pool / ".swap").rename(pool / "disk")
                else:
                    (pool / "disk").rename(real)
                    (pool / ".swap").rename(pool / "disk")

    racing = asyncio.get_running_loop().run_in_executor(None, swap)
    try:
        leaked = []
        for _ in range(150):
            try:
                _, data, _ = await client.download("pools/images/volumes/disk")
                leaked.append(b"secret" in data)
            except Refused as refused:
                assert refused.reason in ("PATH_OUTSIDE_POOL", "RESOURCE_NOT_FOUND", "BACKING_MISSING")  # noqa: PT017
        assert not any(leaked)
    finally:
        stop.set()
        await racing
    assert secret.read_bytes() == b"secret" * 1000

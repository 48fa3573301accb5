"""Files that others make, change, replace and remove; images that want more than they may."""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import stat
import struct
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from google.protobuf import empty_pb2

from tests.integration.storage.rig import MIB, PARENT, Refused, Rig, qemu_img
from virtfleet.storage.v1 import pool_pb2, volume_pb2, watch_pb2
from virtfleet_service import errors

RAW = volume_pb2.VOLUME_FORMAT_RAW
QCOW2 = volume_pb2.VOLUME_FORMAT_QCOW2
AT_FDCWD, RENAME_EXCHANGE = -100, 2


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


async def test_a_file_is_not_judged_before_its_first_bytes(node: Rig, pool: Path) -> None:
    """Whoever copies an image into a pool makes an empty file first."""
    with (pool / "copied").open("wb") as file:
        (pool / "empty").touch()
        os.utime(pool / "empty", (0, 0))
        await node.client.refresh("images")
        assert sorted(await until(node, bool)) == ["empty"]
        file.write(header())
        file.flush()
        await node.client.refresh("images")
        found = await until(node, lambda volumes: "copied" in volumes)
    assert found["copied"].spec.format == QCOW2
    assert found["empty"].spec.format == volume_pb2.VOLUME_FORMAT_RAW


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


async def test_colons_in_the_names_of_files_and_pools(node: Rig, pool: Path) -> None:
    client = node.client
    (pool / "nbd:a").write_bytes(bytes(MIB))
    await client.refresh("images")
    backing = volume_pb2.VolumeBacking(volume="pools/images/volumes/nbd-a")
    await client.volume("images", "top", backing=backing)
    await client.pool("odd", target_path=str(pool.parent / "o:dd"))
    await client.volume("odd", "base", capacity_bytes=MIB)
    await client.volume("odd", "top", backing=volume_pb2.VolumeBacking(volume="pools/odd/volumes/base"))
    for name, below in (("images", pool / "nbd:a"), ("odd", pool.parent / "o:dd/base")):
        await client.refresh(name)
        volume = await client.get(f"pools/{name}/volumes/top")
        assert volume.status.state == volume_pb2.VOLUME_STATE_READY, volume.status
        assert [link.path for link in volume.status.backing_chain] == [str(below)]
        attached = await node.attach(f"pools/{name}/volumes/top")
        assert [(link.path, link.format) for link in attached.file.backing_chain] == [(str(below), "raw")]


async def test_a_text_in_an_image_has_a_bound(node: Rig, pool: Path) -> None:
    data = bytearray(header(backing_offset=60_000, backing_size=4))
    data[104 : 104 + 8 + 50_000] = struct.pack(">II", 0xE2792ACA, 50_000) + b"q" * 50_000
    data[60_000:60_004] = b"base"
    (pool / "base").write_bytes(bytes(MIB))
    (pool / "evil").write_bytes(data)
    await node.client.refresh("images")
    await node.client.refresh("images")
    volume = await node.client.get("pools/images/volumes/evil")
    assert (volume.status.state, volume.status.state_reason) == (volume_pb2.VOLUME_STATE_REFUSED, "IMAGE_CORRUPT")
    assert volume.ByteSize() < 2000


async def test_a_disk_that_was_found_stays_raw_in_a_new_store(node: Rig, pool: Path) -> None:
    client = node.client
    (pool / "found").write_bytes(bytes(4 * MIB))
    (pool / "victim").write_bytes(b"secret" * 1000)
    await client.refresh("images")
    assert (await client.get("pools/images/volumes/found")).spec.format == RAW
    # A guest writes into its disk that it lies on top of another's.
    evil = pool.parent / "evil.qcow2"
    await qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "victim", "-F", "raw", evil, "4M")
    with (pool / "found").open("r+b") as file:
        file.write(evil.read_bytes())
    name = f"{PARENT}/pools/images"
    await client.do(client.pools.StopPool, pool_pb2.StopPoolRequest(name=name), pool_pb2.Pool)
    await client.do(client.pools.DeletePool, pool_pb2.DeletePoolRequest(name=name), empty_pb2.Empty)
    await client.pool("images")
    found = await until(node, lambda volumes: "found" in volumes)
    assert found["found"].spec.format == RAW
    attached = await node.attach("pools/images/volumes/found")
    assert (attached.file.format, list(attached.file.backing_chain)) == ("raw", [])


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
    with pytest.raises(errors.PathOutsidePool) as outside:
        await node.attach("pools/images/volumes/evil")
    assert outside.value.resource == volume.name
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
            assert refused.value.short == ("PERMISSION_DENIED", "PATH_OUTSIDE_POOL")
        with pytest.raises(errors.PathOutsidePool) as outside:
            await node.attach("pools/images/volumes/disk", uid=23456)
        assert outside.value.resource == name
        assert secret.read_bytes() == b"secret"
        assert secret.stat().st_uid == os.getuid()
        await client.refresh("images")
        assert [volume.name for volume in await client.volumes_of("images")] == [name]
        await client.delete("pools/images/volumes/disk")
        assert secret.read_bytes() == b"secret"


# Races: what a name means changes all the time, while the service works with it.


@contextmanager
def exchanging(place: Path, other: Path) -> Iterator[None]:
    """Have two names change places without pause for the length of a block: each means something all the time."""
    libc, chance = ctypes.CDLL(None, use_errno=True), random.Random()
    names = (os.fsencode(place), os.fsencode(other))
    stop = threading.Event()

    def exchange() -> None:
        assert libc.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0, os.strerror(
            ctypes.get_errno()
        )

    def run() -> None:
        while not stop.is_set():
            for _ in range(2):
                exchange()
                # Long enough that some calls find one meaning from their beginning to their end.
                time.sleep(chance.uniform(0, 0.003))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def facts(path: Path) -> tuple[bytes, int, int, int, int, list[str]]:
    """Return all that a stranger could have changed of a file."""
    status = path.stat()
    return path.read_bytes(), status.st_uid, status.st_gid, status.st_mode, status.st_mtime_ns, os.listxattr(path)


async def race_download(node: Rig, number: int) -> None:
    _, data, _ = await node.client.download("pools/images/volumes/disk")
    assert b"secret" not in data, number


async def race_copy(node: Rig, number: int) -> None:
    await node.client.volume("images", f"copy-{number}", source="pools/images/volumes/disk")
    assert b"secret" not in (node.root / "images" / f"copy-{number}").read_bytes()


async def race_wipe(node: Rig, number: int) -> None:
    request = volume_pb2.WipeVolumeRequest(name=f"{PARENT}/pools/images/volumes/disk")
    await node.client.do(node.client.volumes.WipeVolume, request, volume_pb2.Volume)
    assert number >= 0


async def race_resize(node: Rig, number: int) -> None:
    request = volume_pb2.ResizeVolumeRequest(name=f"{PARENT}/pools/images/volumes/disk")
    request.capacity_bytes = 8000 + number * 4096
    await node.client.do(node.client.volumes.ResizeVolume, request, volume_pb2.Volume)


async def race_attach(node: Rig, number: int) -> None:
    domain = f"11111111-2222-3333-4444-{number:012}"
    attached = await node.attach("pools/images/volumes/disk", domain_uid=domain, uid=23456)
    await node.release("pools/images/volumes/disk", attached.attachment_id)


async def race_copy_of_the_top(node: Rig, number: int) -> None:
    await node.client.volume("images", f"copy-{number}", source="pools/images/volumes/top", format=RAW)
    assert b"secret" not in (node.root / "images" / f"copy-{number}").read_bytes()


async def race_attach_of_the_top(node: Rig, number: int) -> None:
    domain = f"11111111-2222-3333-4444-{number:012}"
    attached = await node.attach("pools/images/volumes/top", domain_uid=domain, uid=23456)
    await node.release("pools/images/volumes/top", attached.attachment_id)


async def raced(node: Rig, pool: Path, secret: Path, use: Callable[[Rig, int], Awaitable[None]]) -> None:
    """Use a volume while its name, or that of the one below it, means a file outside of the pool half of the time."""
    secret.write_bytes(b"secret" * 1000)
    secret.chmod(0o640)
    before = facts(secret)
    link = pool / ".link"
    link.symlink_to(secret)
    outcomes: Counter[str] = Counter()
    ends_at = time.monotonic() + 30
    number = 0
    # Both must have been seen often, or there was no race.
    while time.monotonic() < ends_at and (len(outcomes) < 2 or min(outcomes.values()) < 3):
        number += 1
        # What was seen of the last race is forgotten: else what follows is refused without a look.
        await node.client.refresh("images")
        try:
            with exchanging(pool / "disk", link):
                await use(node, number)
        except (Refused, errors.VirtfleetError) as refused:
            outcomes[refused.reason] += 1
        else:
            outcomes["served"] += 1
    print(use.__name__, dict(outcomes))
    assert len(outcomes) > 1, "it was served and refused: there was a race"
    assert outcomes.keys() <= {"served", *RACE_REASONS}
    assert facts(secret) == before


RACE_REASONS = ("PATH_OUTSIDE_POOL", "RESOURCE_NOT_FOUND", "BACKING_MISSING", "WRONG_STATE")
"""What may be said of a name that means another thing each time one looks."""


@pytest.mark.parametrize("use", [race_download, race_copy, race_wipe, race_resize, race_attach])
async def test_a_race_of_names_never_leads_out(
    node: Rig, pool: Path, tmp_path: Path, use: Callable[[Rig, int], Awaitable[None]]
) -> None:
    await node.client.volume("images", "disk", capacity_bytes=6000)
    await raced(node, pool, tmp_path / "secret", use)


@pytest.mark.parametrize("use", [race_copy_of_the_top, race_attach_of_the_top])
async def test_a_race_of_the_name_of_a_backing_file_never_leads_out(
    node: Rig, pool: Path, tmp_path: Path, use: Callable[[Rig, int], Awaitable[None]]
) -> None:
    await node.client.volume("images", "disk", capacity_bytes=6144)
    await node.client.volume("images", "top", backing=volume_pb2.VolumeBacking(volume="pools/images/volumes/disk"))
    await raced(node, pool, tmp_path / "secret", use)

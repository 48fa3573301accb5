from __future__ import annotations

import asyncio
import gc
import os
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.longrunning import operations_pb2
from google.protobuf import duration_pb2

from tests.held import containers_naming
from tests.integration.storage.rig import MIB, PARENT, Refused, Rig, info
from virtfleet.storage.v1 import volume_pb2
from virtfleet.type.v1 import operation_pb2

RAW = volume_pb2.VOLUME_FORMAT_RAW
QCOW2 = volume_pb2.VOLUME_FORMAT_QCOW2


@pytest.fixture
async def pool(node: Rig) -> Path:
    await node.client.pool("images")
    return node.root / "images"


async def test_a_raw_volume_is_a_sparse_file(node: Rig, pool: Path) -> None:
    volume = await node.client.volume("images", "disk", capacity_bytes=64 * MIB)
    assert volume.status.state == volume_pb2.VOLUME_STATE_READY
    assert volume.status.path == volume.status.key == str(pool / "disk")
    facts = (pool / "disk").stat()
    assert facts.st_size == 64 * MIB == volume.status.capacity_bytes
    assert facts.st_blocks * 512 == volume.status.allocation_bytes
    assert facts.st_blocks < 16
    assert facts.st_mode & 0o777 == 0o600
    assert volume.spec.format == RAW


async def test_a_volume_of_a_pool_that_does_not_exist(node: Rig) -> None:
    with pytest.raises(Refused) as refused:
        await node.client.volume("none", "disk", capacity_bytes=MIB)
    assert refused.value.reason == "RESOURCE_NOT_FOUND"


@pytest.mark.parametrize("preallocation", [volume_pb2.PREALLOCATION_FALLOC, volume_pb2.PREALLOCATION_FULL])
async def test_room_can_be_taken_in_advance(node: Rig, pool: Path, preallocation: int) -> None:
    kind = volume_pb2.Preallocation.ValueType(preallocation)
    raw = await node.client.volume("images", "raw", capacity_bytes=8 * MIB, preallocation=kind)
    image = await node.client.volume("images", "image", capacity_bytes=8 * MIB, preallocation=kind, format=QCOW2)
    assert raw.status.allocation_bytes >= 8 * MIB
    assert image.status.allocation_bytes >= 8 * MIB
    assert (pool / "image").stat().st_blocks * 512 >= 8 * MIB


async def test_a_qcow2_volume_has_what_was_asked(node: Rig, pool: Path) -> None:
    volume = await node.client.volume(
        "images",
        "image",
        capacity_bytes=10 * MIB + 1,
        format=QCOW2,
        cluster_size_bytes=4096,
        compat=volume_pb2.QCOW2_COMPAT_0_10,
    )
    assert volume.status.capacity_bytes == 10 * MIB + 512 == volume.spec.capacity_bytes
    found = await info(pool / "image", "qcow2")
    assert found["virtual-size"] == 10 * MIB + 512
    assert found["cluster-size"] == 4096
    assert found["format-specific"]["data"]["compat"] == "0.10"


async def test_a_volume_on_top_of_another(node: Rig, pool: Path, tmp_path: Path) -> None:
    client = node.client
    await client.pool("other", target_path=str(tmp_path / "other"))
    await client.volume("images", "base", capacity_bytes=4 * MIB)
    middle = await client.volume(
        "images", "middle", backing=volume_pb2.VolumeBacking(volume="pools/images/volumes/base")
    )
    assert middle.spec.format == QCOW2
    assert middle.status.capacity_bytes == 4 * MIB
    top = await client.volume(
        "other",
        "top",
        capacity_bytes=8 * MIB,
        backing=volume_pb2.VolumeBacking(volume=f"{PARENT}/pools/images/volumes/middle", format=QCOW2),
    )
    assert top.spec.backing.volume == "pools/images/volumes/middle"
    assert [link.volume for link in top.status.backing_chain] == [
        "pools/images/volumes/middle",
        "pools/images/volumes/base",
    ]
    found = await info(tmp_path / "other" / "top", "qcow2")
    assert found["backing-filename"] == str(pool / "middle")
    assert found["backing-filename-format"] == "qcow2"
    assert (await info(pool / "middle", "qcow2"))["backing-filename"] == "base"
    for name, call in (
        ("base", client.delete("pools/images/volumes/base")),
        ("middle", client.delete("pools/images/volumes/middle")),
        (
            "middle",
            client.do(
                client.volumes.WipeVolume,
                volume_pb2.WipeVolumeRequest(name=f"{PARENT}/pools/images/volumes/middle"),
                volume_pb2.Volume,
            ),
        ),
    ):
        with pytest.raises(Refused) as refused:
            await call
        assert refused.value.reason == "HAS_CHILDREN"
        assert (pool / name).exists()
    await client.delete("pools/other/volumes/top")
    await client.delete("pools/images/volumes/middle")
    await client.delete("pools/images/volumes/base")
    assert await client.volumes_of() == []
    assert [path.name for path in pool.iterdir()] == [".virtfleet"]


@pytest.mark.parametrize(
    ("spec", "source", "reason", "field"),
    [
        ({"backing": volume_pb2.VolumeBacking(volume="pools/images/volumes/no")}, "", "RESOURCE_NOT_FOUND", None),
        (
            {"backing": volume_pb2.VolumeBacking(volume="nodes/n2/pools/images/volumes/base")},
            "",
            "REFERENCE_OTHER_NODE",
            None,
        ),
        (
            {"backing": volume_pb2.VolumeBacking(volume="pools/images/volumes/base"), "format": RAW},
            "",
            "FIELD_CONFLICT",
            "volume.spec.backing",
        ),
        (
            {"backing": volume_pb2.VolumeBacking(volume="pools/images/volumes/base", format=QCOW2)},
            "",
            "FIELD_CONFLICT",
            "volume.spec.backing.format",
        ),
        (
            {"backing": volume_pb2.VolumeBacking(volume="pools/images/volumes/base")},
            "pools/images/volumes/base",
            "FIELD_CONFLICT",
            "source_volume",
        ),
        ({"capacity_bytes": 1}, "pools/images/volumes/base", "FIELD_OUT_OF_RANGE", "volume.spec.capacity_bytes"),
        ({"capacity_bytes": -1}, "", "FIELD_OUT_OF_RANGE", "volume.spec.capacity_bytes"),
        ({"capacity_bytes": 1 << 60}, "", "FIELD_OUT_OF_RANGE", "volume.spec.capacity_bytes"),
        (
            {"capacity_bytes": 1 << 45, "preallocation": volume_pb2.PREALLOCATION_FALLOC},
            "",
            "POOL_FULL",
            None,
        ),
        ({"cluster_size_bytes": 4096}, "", "FIELD_CONFLICT", "volume.spec.cluster_size_bytes"),
        ({"cluster_size_bytes": 5000, "format": QCOW2}, "", "FIELD_OUT_OF_RANGE", "volume.spec.cluster_size_bytes"),
    ],
)
async def test_what_contradicts_itself_is_refused(
    node: Rig, pool: Path, spec: dict[str, object], source: str, reason: str, field: str | None
) -> None:
    await node.client.volume("images", "base", capacity_bytes=MIB)
    with pytest.raises(Refused) as refused:
        await node.client.volume("images", "new", source=source, **spec)
    assert refused.value.reason == reason
    if field is not None:
        assert refused.value.metadata["field"] == field
    assert sorted(path.name for path in pool.iterdir()) == [".virtfleet", "base"]
    assert sorted(path.name for path in (pool / ".virtfleet").iterdir()) == ["pool"]


@pytest.mark.parametrize("source_format", [RAW, QCOW2])
@pytest.mark.parametrize("format", [RAW, QCOW2])
async def test_a_copy_has_the_content_of_what_the_guest_sees(
    node: Rig, pool: Path, source_format: int, format: int
) -> None:
    client = node.client
    data = os.urandom(MIB)
    await client.volume("images", "base", capacity_bytes=4 * MIB)
    await client.upload("pools/images/volumes/base", data + bytes(3 * MIB))
    source = "pools/images/volumes/base"
    if source_format == QCOW2:
        source = "pools/images/volumes/top"
        await client.volume("images", "top", backing=volume_pb2.VolumeBacking(volume="pools/images/volumes/base"))
    copy = await client.volume(
        "images",
        "copy",
        source=source,
        capacity_bytes=6 * MIB,
        format=volume_pb2.VolumeFormat.ValueType(format),
    )
    assert copy.status.capacity_bytes == 6 * MIB
    assert not copy.status.backing_chain
    flat = await client.volume("images", "flat", source="pools/images/volumes/copy", format=RAW)
    assert flat.status.capacity_bytes == 6 * MIB
    content = (pool / "flat").read_bytes()
    assert content == data + bytes(5 * MIB)
    assert (pool / "copy").stat().st_blocks * 512 <= 5 * MIB


@pytest.mark.usefixtures("pool")
async def test_a_refusal_that_its_caller_no_longer_waits_for_is_no_error(
    node: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    await node.client.volume("images", "disk", capacity_bytes=MIB)
    request = volume_pb2.CreateVolumeRequest(parent=f"{PARENT}/pools/images", volume_id="disk")
    request.volume.spec.capacity_bytes = MIB

    async def ask(number: int) -> None:
        with pytest.raises(grpc.aio.AioRpcError):
            await node.client.volumes.CreateVolume(request, timeout=0.001 + number / 4000)

    for _ in range(4):
        await asyncio.gather(*map(ask, range(60)))
    gc.collect()
    assert not [record for record in caplog.records if record.exc_info]


async def test_two_volumes_of_one_uid_at_once(node: Rig, pool: Path) -> None:
    client = node.client

    async def attempt(number: int) -> str:
        request = volume_pb2.CreateVolumeRequest(parent=f"{PARENT}/pools/images", volume_id=f"v{number}")
        request.volume.uid = "0b6cf1a4-5a0e-4f5e-9d0a-0d5f3c1f7a11"
        request.volume.spec.capacity_bytes = MIB
        try:
            return (await client.do(client.volumes.CreateVolume, request, volume_pb2.Volume)).name
        except Refused as refused:
            return refused.reason

    outcomes = await asyncio.gather(*map(attempt, range(4)))
    made = [outcome for outcome in outcomes if outcome.startswith(PARENT)]
    assert len(made) == 1
    assert set(outcomes) - set(made) <= {"OPERATION_CONFLICT", "IDENTITY_IN_USE"}
    assert await attempt(9) == "IDENTITY_IN_USE"
    assert [volume.name for volume in await client.volumes_of("images")] == made
    assert [path.name for path in pool.glob("[!.]*")] == [made[0].rpartition("/")[2]]
    await client.delete(made[0].removeprefix(f"{PARENT}/"))
    assert await attempt(9) == f"{PARENT}/pools/images/volumes/v9"


async def test_a_repeated_creation_needs_its_source_no_more(node: Rig, pool: Path) -> None:
    client = node.client
    await client.volume("images", "source", capacity_bytes=MIB)
    request = volume_pb2.CreateVolumeRequest(
        parent=f"{PARENT}/pools/images",
        volume_id="copy",
        volume=volume_pb2.Volume(),
        source_volume="pools/images/volumes/source",
        request_id="once",
    )
    first = await client.call(client.volumes.CreateVolume, request)
    assert first.done
    await client.delete("pools/images/volumes/source")
    assert not (pool / "source").exists()
    assert await client.call(client.volumes.CreateVolume, request) == first


async def test_a_file_that_is_in_the_way_is_not_overwritten(node: Rig, pool: Path) -> None:
    (pool / "disk").symlink_to("/etc/passwd")
    with pytest.raises(Refused) as refused:
        await node.client.volume("images", "disk", capacity_bytes=MIB)
    assert refused.value.reason == "WOULD_OVERWRITE"
    assert (pool / "disk").is_symlink()
    with pytest.raises(Refused) as refused:
        await node.client.get("pools/images/volumes/disk")
    assert refused.value.reason == "RESOURCE_NOT_FOUND"


@pytest.mark.parametrize("format", [RAW, QCOW2])
async def test_a_volume_grows_and_shrinks(node: Rig, pool: Path, format: int) -> None:
    client = node.client
    kind = volume_pb2.VolumeFormat.ValueType(format)
    made = await client.volume("images", "disk", capacity_bytes=4 * MIB, format=kind)
    request = volume_pb2.ResizeVolumeRequest(name=made.name, capacity_bytes=8 * MIB, etag=made.etag)
    grown = await client.do(client.volumes.ResizeVolume, request, volume_pb2.Volume)
    assert grown.status.capacity_bytes == grown.spec.capacity_bytes == 8 * MIB
    assert grown.generation == 2
    assert (await info(pool / "disk", "raw" if format == RAW else "qcow2"))["virtual-size"] == 8 * MIB
    with pytest.raises(Refused) as refused:
        await client.do(client.volumes.ResizeVolume, request, volume_pb2.Volume)
    assert refused.value.reason == "ETAG_MISMATCH"
    request = volume_pb2.ResizeVolumeRequest(name=made.name, capacity_bytes=2 * MIB)
    with pytest.raises(Refused) as refused:
        await client.do(client.volumes.ResizeVolume, request, volume_pb2.Volume)
    assert refused.value.reason == "FIELD_CONFLICT"
    request.allow_shrink = True
    small = await client.do(client.volumes.ResizeVolume, request, volume_pb2.Volume)
    again = await client.do(client.volumes.ResizeVolume, request, volume_pb2.Volume)
    assert small.status.capacity_bytes == 2 * MIB
    assert again.generation == small.generation == 3
    request = volume_pb2.ResizeVolumeRequest(name=made.name, capacity_bytes=6 * MIB, allocate=True)
    taken = await client.do(client.volumes.ResizeVolume, request, volume_pb2.Volume)
    assert taken.status.allocation_bytes >= 4 * MIB


async def test_wiping_a_raw_volume_overwrites_it(node: Rig, pool: Path) -> None:
    client = node.client
    await client.volume("images", "disk", capacity_bytes=2 * MIB)
    await client.upload("pools/images/volumes/disk", os.urandom(2 * MIB))
    inode = (pool / "disk").stat().st_ino
    name = f"{PARENT}/pools/images/volumes/disk"
    request = volume_pb2.WipeVolumeRequest(name=name, algorithm=volume_pb2.WIPE_ALGORITHM_GUTMANN)
    with pytest.raises(Refused) as refused:
        await client.do(client.volumes.WipeVolume, request, volume_pb2.Volume)
    assert refused.value.reason == "CAPABILITY_MISSING"
    wiped = await client.do(client.volumes.WipeVolume, volume_pb2.WipeVolumeRequest(name=name), volume_pb2.Volume)
    assert wiped.status.digest == ""
    assert (pool / "disk").read_bytes() == bytes(2 * MIB)
    # In place: the blocks that held the data are those that hold the zeros.
    assert (pool / "disk").stat().st_ino == inode
    assert (pool / "disk").stat().st_blocks * 512 >= 2 * MIB


async def test_a_wiped_image_shows_what_is_below_it(node: Rig, pool: Path) -> None:
    client = node.client
    data = os.urandom(MIB)
    await client.volume("images", "base")
    await client.upload("pools/images/volumes/base", data)
    top = await client.volume("images", "top", backing=volume_pb2.VolumeBacking(volume="pools/images/volumes/base"))
    process = await asyncio.create_subprocess_exec(
        "qemu-io", "-f", "qcow2", "-c", "write -P 7 0 1M", pool / "top", stdout=asyncio.subprocess.DEVNULL
    )
    assert await process.wait() == 0
    wiped = await client.do(client.volumes.WipeVolume, volume_pb2.WipeVolumeRequest(name=top.name), volume_pb2.Volume)
    assert [link.volume for link in wiped.status.backing_chain] == ["pools/images/volumes/base"]
    await client.volume("images", "flat", source="pools/images/volumes/top", format=RAW)
    assert (pool / "flat").read_bytes() == data
    assert [path.name for path in (pool / ".virtfleet").iterdir()] == ["pool"]
    # And no file stays open.
    held = {str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.exists()}
    assert not [path for path in held if path.startswith(f"{pool}/") and not path.endswith("/.virtfleet")]


async def test_a_wipe_can_be_cancelled(node: Rig, pool: Path) -> None:
    client = node.client
    await client.volume("images", "disk", capacity_bytes=2048 * MIB, preallocation=volume_pb2.PREALLOCATION_FALLOC)
    # Written extents, not merely reserved ones.
    with (pool / "disk").open("r+b") as file:
        for at in range(0, 2048 * MIB, 64 * MIB):
            file.seek(at)
            file.write(b"\1" * 4 * MIB)
    name = f"{PARENT}/pools/images/volumes/disk"
    operation = await client.call(
        client.volumes.WipeVolume,
        volume_pb2.WipeVolumeRequest(name=name, inline_wait=duration_pb2.Duration(nanos=1)),
    )
    if not operation.done:
        with pytest.raises(Refused) as refused:
            await client.delete("pools/images/volumes/disk")
        assert refused.value.reason == "OPERATION_CONFLICT"
    metadata = operation_pb2.OperationMetadata()
    # One that is cancelled before it has begun leaves the volume as it was.
    while metadata.phase != "overwriting" and not operation.done:
        operation = await client.call(
            client.operations.GetOperation, operations_pb2.GetOperationRequest(name=operation.name)
        )
        operation.metadata.Unpack(metadata)
    await client.call(client.operations.CancelOperation, operations_pb2.CancelOperationRequest(name=operation.name))
    operation = await client.call(
        client.operations.WaitOperation, operations_pb2.WaitOperationRequest(name=operation.name)
    )
    operation.metadata.Unpack(metadata)
    assert metadata.target == name
    assert operation.error.code == 1
    volume = await client.get("pools/images/volumes/disk")
    assert [one.type for one in volume.status.conditions] == ["WipeIncomplete"]
    await client.delete("pools/images/volumes/disk")
    assert not (pool / "disk").exists()


async def test_volumes_are_found_by_name_uid_path_and_in_batches(node: Rig, pool: Path) -> None:
    client = node.client
    volume = await client.volume("images", "disk", capacity_bytes=MIB)
    assert (await client.get(f"pools/images/volumes/{volume.uid}")).name == volume.name
    found = await client.call(
        client.volumes.LookupVolume, volume_pb2.LookupVolumeRequest(parent=PARENT, path=str(pool / "disk"))
    )
    assert found.uid == volume.uid
    with pytest.raises(Refused) as refused:
        await client.call(
            client.volumes.LookupVolume, volume_pb2.LookupVolumeRequest(parent=PARENT, path="/etc/passwd")
        )
    assert refused.value.reason == "RESOURCE_NOT_FOUND"
    answer = await client.call(
        client.volumes.BatchGetVolumes,
        volume_pb2.BatchGetVolumesRequest(
            parent=f"{PARENT}/pools/-", names=[volume.name, f"{PARENT}/pools/images/volumes/none"]
        ),
    )
    for names, reason, field in (
        (["pools/images/volumes/disk"], "NAME_MALFORMED", "names[0]"),
        ([volume.name, f"{PARENT}/pools/other/volumes/disk"], "FIELD_CONFLICT", "names[1]"),
    ):
        with pytest.raises(Refused) as refused:
            await client.call(
                client.volumes.BatchGetVolumes,
                volume_pb2.BatchGetVolumesRequest(parent=f"{PARENT}/pools/images", names=names),
            )
        assert (refused.value.reason, refused.value.metadata["field"]) == (reason, field)
    assert [result.status.code for result in answer.results] == [0, 5]
    assert answer.results[0].volume.uid == volume.uid
    with pytest.raises(Refused) as refused:
        await client.volumes_of("none")
    assert refused.value.reason == "RESOURCE_NOT_FOUND"


async def test_preconditions_of_a_deletion(node: Rig, pool: Path) -> None:
    client = node.client
    volume = await client.volume("images", "disk", capacity_bytes=MIB)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"etag": "old"}, "ETAG_MISMATCH"),
        ({"expected_uid": "00000000-0000-0000-0000-000000000000"}, "UID_MISMATCH"),
    ]
    for fields, reason in wrong:
        with pytest.raises(Refused) as refused:
            await client.call(client.volumes.DeleteVolume, volume_pb2.DeleteVolumeRequest(name=volume.name, **fields))
        assert refused.value.reason == reason
        assert (pool / "disk").exists()
    await client.delete("pools/images/volumes/disk")
    with pytest.raises(Refused) as refused:
        await client.delete("pools/images/volumes/disk")
    assert refused.value.reason == "RESOURCE_NOT_FOUND"
    operation = await client.call(
        client.volumes.DeleteVolume, volume_pb2.DeleteVolumeRequest(name=volume.name, allow_missing=True)
    )
    assert operation.done
    assert not operation.HasField("error")


async def test_of_volumes_that_are_gone_nothing_is_kept_in_memory(node: Rig, pool: Path) -> None:
    client = node.client
    await client.volume("images", "ephemeral-1", capacity_bytes=MIB)
    await client.volume("images", "ephemeral-2", capacity_bytes=MIB, format=QCOW2)
    (pool / "ephemeral-3").write_bytes(bytes(MIB))
    attachment = await node.attach("pools/images/volumes/ephemeral-2")
    await node.release("pools/images/volumes/ephemeral-2", attachment.attachment_id)
    await client.refresh("images")
    await client.delete("pools/images/volumes/ephemeral-1")
    await client.delete("pools/images/volumes/ephemeral-2")
    (pool / "ephemeral-3").unlink()
    await client.refresh("images")
    assert not await client.volumes_of("images")
    # The last that was noticed is kept until there is something newer.
    (pool / "other").write_bytes(b"x")
    async with asyncio.timeout(10):
        while not await client.volumes_of("images"):
            await asyncio.sleep(0.05)
    assert not containers_naming("ephemeral-")


async def test_an_image_is_no_larger_than_its_clusters_allow(node: Rig) -> None:
    await node.client.pool("images")
    limit = 128 << 30
    with pytest.raises(Refused) as refused:
        await node.client.volume("images", "small", format=QCOW2, cluster_size_bytes=512, capacity_bytes=limit + 512)
    error = refused.value
    assert (error.reason, error.metadata["field"]) == ("FIELD_OUT_OF_RANGE", "volume.spec.capacity_bytes")
    assert error.metadata["limit_bytes"] == str(limit)
    await node.client.volume("images", "small", format=QCOW2, cluster_size_bytes=512, capacity_bytes=MIB)
    before = (node.root / "images" / "small").read_bytes()
    request = volume_pb2.ResizeVolumeRequest(name=f"{PARENT}/pools/images/volumes/small", capacity_bytes=limit + 512)
    with pytest.raises(Refused) as refused:
        await node.client.do(node.client.volumes.ResizeVolume, request, volume_pb2.Volume)
    assert (refused.value.reason, refused.value.metadata["field"]) == ("FIELD_OUT_OF_RANGE", "capacity_bytes")
    assert (node.root / "images" / "small").read_bytes() == before
    request.capacity_bytes = limit
    grown = await node.client.do(node.client.volumes.ResizeVolume, request, volume_pb2.Volume)
    assert grown.status.capacity_bytes == limit
    assert sorted(path.name for path in (node.root / "images").iterdir()) == [".virtfleet", "small"]

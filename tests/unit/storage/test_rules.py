"""Plans, states, claims, access and chains: what is decided without a disk."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from tests.held import containers_naming
from virtfleet.storage.v1 import pool_pb2, volume_pb2
from virtfleet_service.errors import (
    FieldConflict,
    FieldOutOfRange,
    OperationConflict,
    PathOutsidePool,
    WrongState,
)
from virtfleet_service.settings import SettingsError
from virtfleet_storage import lifecycle, specs
from virtfleet_storage.backends.api import QCOW2, RAW, Grant, capabilities
from virtfleet_storage.backends.dir import access, content, images
from virtfleet_storage.backends.dir.pool import DirPool
from virtfleet_storage.chains import target_of
from virtfleet_storage.claims import Claims
from virtfleet_storage.places import Place
from virtfleet_storage.settings import StorageSettings


def volume(format: int = RAW, capacity: int = 1000) -> volume_pb2.Volume:
    made = volume_pb2.Volume(name="nodes/n1/pools/p/volumes/v")
    made.spec.format = volume_pb2.VolumeFormat.ValueType(format)
    made.status.capacity_bytes = capacity
    return made


def test_a_plan_decides_what_is_left_open() -> None:
    spec = volume_pb2.VolumeSpec()
    plan = specs.plan_of(spec)
    assert (plan.format, plan.capacity_bytes, plan.cluster_size_bytes) == (RAW, 0, 65536)
    assert spec.format == RAW
    spec = volume_pb2.VolumeSpec(capacity_bytes=1, backing=volume_pb2.VolumeBacking(volume="pools/p/volumes/v"))
    plan = specs.plan_of(spec, backing=volume(), backing_name="v")
    assert (plan.format, plan.capacity_bytes, plan.backing_format) == (QCOW2, 512, RAW)
    assert (spec.capacity_bytes, spec.backing.format) == (512, RAW)
    plan = specs.plan_of(volume_pb2.VolumeSpec(), source=volume(QCOW2, 1024))
    assert (plan.format, plan.capacity_bytes) == (QCOW2, 1024)


def test_a_plan_that_contradicts_itself() -> None:
    backing = volume_pb2.VolumeBacking(volume="pools/p/volumes/v")
    with pytest.raises(FieldConflict):
        specs.plan_of(volume_pb2.VolumeSpec(backing=backing), source=volume())
    with pytest.raises(FieldConflict):
        specs.plan_of(volume_pb2.VolumeSpec(format=RAW, compat=volume_pb2.QCOW2_COMPAT_1_1))
    with pytest.raises(FieldConflict):
        specs.plan_of(
            volume_pb2.VolumeSpec(backing=backing, preallocation=volume_pb2.PREALLOCATION_FULL), backing=volume()
        )
    with pytest.raises(FieldOutOfRange):
        specs.plan_of(volume_pb2.VolumeSpec(capacity_bytes=999), source=volume())


@pytest.mark.parametrize("state", pool_pb2.PoolState.values())
@pytest.mark.parametrize("verb", sorted(lifecycle.POOL_VERBS))
def test_verbs_in_states(state: int, verb: str) -> None:
    pool = pool_pb2.Pool(name="nodes/n1/pools/p")
    pool.status.state = pool_pb2.PoolState.ValueType(state)
    if state in lifecycle.POOL_VERBS[verb]:
        lifecycle.check_pool(pool, verb)
        return
    with pytest.raises(WrongState) as refused:
        lifecycle.check_pool(pool, verb)
    assert refused.value.metadata["state"] == pool_pb2.PoolState.Name(pool.status.state).removeprefix("POOL_STATE_")


def test_claims_keep_readers_and_writers_apart() -> None:
    claims = Claims()
    reader, other, writer = claims.claim("copy"), claims.claim("copy 2"), claims.claim("wipe")
    reader.read("v")
    other.read("v")
    with pytest.raises(OperationConflict) as refused:
        writer.write("v")
    assert refused.value.metadata["holder"] == "copy"
    reader.release()
    reader.release()
    with pytest.raises(OperationConflict):
        writer.write("v")
    other.release()
    writer.write("v")
    for writing in (True, False):
        with pytest.raises(OperationConflict):
            claims.refuse("v", writing=writing)
    with claims.look() as during:
        assert during.unstable("v")
        writer.release()
        # Whoever looked while it was being written has seen something that is over.
        assert during.unstable("v")
        with claims.look() as after:
            assert not after.unstable("v")
    claims.refuse("v", writing=True)


def test_of_changes_only_those_remember_who_look_meanwhile() -> None:
    claims = Claims()

    def change(volumes: str) -> None:
        for number in range(20_000):
            claim = claims.claim("CreateVolume")
            claim.write(f"{volumes}-{number}")
            claim.release()

    change("unseen")
    assert not containers_naming("unseen-")
    with claims.look() as look:
        # However slow a look, and however many volumes come and go meanwhile.
        change("seen")
        assert look.unstable("seen-0")
        assert look.unstable("seen-19999")
        assert not look.unstable("unseen-0")


def test_what_is_taken_is_one_claim_s_and_nothing_is_remembered_of_it() -> None:
    claims = Claims()
    first, second = claims.claim("CreateVolume of a"), claims.claim("CreateVolume of b")
    with claims.look() as look:
        first.take("uid")
        with pytest.raises(OperationConflict):
            second.take("uid")
        first.release()
        assert not look.changed_names
    second.take("uid")


def test_an_access_list_names_each_guest() -> None:
    data = access.encode(0o600, [Grant(7, owner=False, write=False), Grant(9, owner=False, write=True)])
    (version,) = struct.unpack_from("<I", data)
    entries = [struct.unpack_from("<HHI", data, at) for at in range(4, len(data), 8)]
    assert version == 2
    none = 0xFFFFFFFF
    assert entries == [(1, 6, none), (2, 4, 7), (2, 6, 9), (4, 0, none), (16, 6, none), (32, 0, none)]


def test_a_chain_is_spelled_out_to_its_end() -> None:
    text = images.chain_argument([images.OpenImage(5, QCOW2), images.OpenImage(6, RAW)])
    assert text == (
        'json:{"driver": "qcow2", "file": {"driver": "file", "filename": "/proc/self/fd/5", "locking": "off"}, '
        '"backing": {"driver": "raw", "file": {"driver": "file", "filename": "/proc/self/fd/6", "locking": "off"}}}'
    )
    assert '"backing": null' in images.chain_argument([images.OpenImage(5, QCOW2)])


class _Somewhere:
    """Is a place that is only asked for its path."""

    kind = "dir"
    path = "/pools/p"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("base", ("/pools/p", "base")),
        ("/pools/q/base.img", ("/pools/q", "base.img")),
        ("/pools/q:1/a:b", ("/pools/q:1", "a:b")),
        ("/base", ("", "base")),
    ],
)
def test_names_inside_images(name: str, expected: tuple[str, str]) -> None:
    place = Place("nodes/n1/pools/p", _Somewhere())  # type: ignore[arg-type]  # of a place the path alone is read
    if expected[0]:
        assert target_of(place, name) == expected
    else:
        with pytest.raises(PathOutsidePool):
            target_of(place, name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "/",
        "a/b",
        "./a",
        "../a",
        "json:{}",
        "nbd:x:1",
        "nbd://h/x",
        "file:/a",
        "/pools/q/",
        "/pools/q/.x",
        "/pools/q/\x1b[2J",
        "/pools/q/a\nb",
        "a\0b",
    ],
)
def test_names_inside_images_that_lead_out(name: str) -> None:
    place = Place("nodes/n1/pools/p", _Somewhere())  # type: ignore[arg-type]  # of a place the path alone is read
    with pytest.raises(PathOutsidePool):
        target_of(place, name)


def test_extents_tell_data_from_holes(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.seek(1 << 20)
        file.write(b"x" * 4096)
        file.truncate(3 << 20)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        found = list(content.extents(descriptor, 0, 3 << 20))
        assert found == [(0, 1 << 20, False), (1 << 20, (1 << 20) + 4096, True), ((1 << 20) + 4096, 3 << 20, False)]
        assert b"".join(piece.data or bytes(piece.length) for piece in content.pieces(descriptor, 0, 3 << 20)) == (
            path.read_bytes()
        )
    finally:
        os.close(descriptor)


def test_capabilities_follow_from_the_class() -> None:
    assert set(capabilities(DirPool, (RAW, QCOW2))) == {
        "volume.copy",
        "volume.resize",
        "volume.wipe.zero",
        "volume.upload",
        "volume.download",
        "volume.attach.file",
        "volume.format.raw",
        "volume.format.qcow2",
    }


def test_settings_that_cannot_be() -> None:
    with pytest.raises(SettingsError, match="node"):
        StorageSettings()
    with pytest.raises(SettingsError, match="pools_root"):
        StorageSettings(node="n1", pools_root=Path("relative"))
    with pytest.raises(SettingsError, match="rescan"):
        StorageSettings(node="n1", rescan_seconds=60)

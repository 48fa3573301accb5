from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest
from google.protobuf import empty_pb2, field_mask_pb2

from tests.integration.storage.rig import PARENT, Client, Refused, Rig
from virtfleet.storage.v1 import pool_pb2, volume_pb2, watch_pb2
from virtfleet.type.v1 import resource_pb2


async def get(client: Client, id_: str) -> pool_pb2.Pool:
    answer: pool_pb2.Pool = await client.call(
        client.pools.GetPool, pool_pb2.GetPoolRequest(name=f"{PARENT}/pools/{id_}")
    )
    return answer


async def until_state(client: Client, id_: str, state: int) -> pool_pb2.Pool:
    async with asyncio.timeout(10):
        while True:
            pool = await get(client, id_)
            if pool.status.state == state:
                return pool
            await asyncio.sleep(0.05)


async def test_a_pool_is_made_started_stopped_and_forgotten(node: Rig) -> None:
    client = node.client
    pool = await client.pool("images", start=False)
    assert pool.status.state == pool_pb2.POOL_STATE_INACTIVE
    assert pool.status.target_path == str(node.root / "images")
    assert (node.root / "images").stat().st_mode & 0o777 == 0o711
    name = pool.name
    pool = await client.do(client.pools.StartPool, pool_pb2.StartPoolRequest(name=name), pool_pb2.Pool)
    assert pool.status.state == pool_pb2.POOL_STATE_RUNNING
    pool = await client.do(client.pools.StartPool, pool_pb2.StartPoolRequest(name=name), pool_pb2.Pool)
    pool = await client.refresh("images")
    room = os.statvfs(node.root)
    assert pool.status.capacity_bytes == room.f_blocks * room.f_frsize
    assert abs(pool.status.available_bytes - room.f_bavail * room.f_frsize) < 1 << 30
    pool = await client.do(client.pools.StopPool, pool_pb2.StopPoolRequest(name=name), pool_pb2.Pool)
    assert pool.status.state == pool_pb2.POOL_STATE_INACTIVE
    await client.do(client.pools.DeletePool, pool_pb2.DeletePoolRequest(name=name), empty_pb2.Empty)
    assert not (node.root / "images").exists()
    kinds = [event.type for event in await client.events()]
    for wanted in (
        watch_pb2.EVENT_TYPE_POOL_DEFINED,
        watch_pb2.EVENT_TYPE_POOL_BUILT,
        watch_pb2.EVENT_TYPE_POOL_STARTED,
        watch_pb2.EVENT_TYPE_POOL_REFRESHED,
        watch_pb2.EVENT_TYPE_POOL_STOPPED,
        watch_pb2.EVENT_TYPE_POOL_UNDEFINED,
    ):
        assert wanted in kinds


async def test_data_stays_when_a_pool_is_forgotten(node: Rig) -> None:
    client = node.client
    pool = await client.pool("keep")
    await client.volume("keep", "disk", capacity_bytes=4096)
    await client.do(client.pools.DeletePool, pool_pb2.DeletePoolRequest(name=pool.name), empty_pb2.Empty)
    assert sorted(path.name for path in (node.root / "keep").iterdir()) == ["disk"]
    await client.pool("keep")
    assert [volume.name for volume in await client.volumes_of("keep")] in ([], [f"{PARENT}/pools/keep/volumes/disk"])
    await client.refresh("keep")
    assert [volume.display_name for volume in await client.volumes_of("keep")] == ["disk"]


async def test_a_path_of_the_callers_choice_needs_a_permission(node: Rig, tmp_path: Path) -> None:
    operator = Client(node.socket("operator"))
    try:
        with pytest.raises(Refused) as refused:
            await operator.pool("else", target_path=str(tmp_path / "else"))
        assert refused.value.reason == "PERMISSION_MISSING"
        assert refused.value.metadata["permission"] == "hostPaths.use"
        assert not (tmp_path / "else").exists()
        await operator.pool("own", target_path=str(node.root / "own"))
    finally:
        await operator.close()
    pool = await node.client.pool("else", target_path=str(tmp_path / "else"))
    assert pool.status.target_path == str(tmp_path / "else")
    with pytest.raises(Refused) as refused:
        await node.client.pool("twin", target_path=str(tmp_path / "else"))
    assert refused.value.reason == "IDENTITY_IN_USE"


@pytest.mark.parametrize("path", ["/a/../b", "/a//b", "/a/./b", "/a/"])
async def test_a_path_that_is_not_plain_is_refused(node: Rig, path: str) -> None:
    with pytest.raises(Refused) as refused:
        await node.client.pool("odd", target_path=path)
    assert refused.value.reason == "FIELD_OUT_OF_RANGE"


async def test_a_link_on_the_way_to_a_pool_is_refused(node: Rig, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(Refused) as refused:
        await node.client.pool("odd", target_path=str(tmp_path / "link" / "pool"))
    assert refused.value.reason == "PATH_OUTSIDE_POOL"
    assert list((tmp_path / "real").iterdir()) == []
    with pytest.raises(Refused) as refused:
        await get(node.client, "odd")
    assert refused.value.reason == "RESOURCE_NOT_FOUND"


async def test_a_missing_parent_is_told(node: Rig, tmp_path: Path) -> None:
    with pytest.raises(Refused) as refused:
        await node.client.pool("deep", target_path=str(tmp_path / "a" / "b"))
    assert refused.value.reason == "BACKING_MISSING"


async def test_what_is_made_has_the_uid_that_was_asked_for(node: Rig) -> None:
    client, uid = node.client, "a0000000-0000-4000-8000-000000000000"
    request = pool_pb2.CreatePoolRequest(parent=PARENT, pool_id="one", pool=pool_pb2.Pool(uid=uid), start=True)
    assert (await client.do(client.pools.CreatePool, request, pool_pb2.Pool)).uid == uid
    making = volume_pb2.CreateVolumeRequest(
        parent=f"{PARENT}/pools/one", volume_id="disk", volume=volume_pb2.Volume(uid=uid)
    )
    assert (await client.do(client.volumes.CreateVolume, making, volume_pb2.Volume)).uid == uid
    request.pool_id, making.volume_id = "two", "other"
    for method, again, field in (
        (client.pools.CreatePool, request, "pool.uid"),
        (client.volumes.CreateVolume, making, "volume.uid"),
    ):
        with pytest.raises(Refused) as refused:
            await client.call(method, again)
        assert (refused.value.reason, refused.value.metadata["field"]) == ("IDENTITY_IN_USE", field)
    request.pool.uid = making.volume.uid = "A" + uid[1:]
    for method, again in ((client.pools.CreatePool, request), (client.volumes.CreateVolume, making)):
        with pytest.raises(Refused) as refused:
            await client.call(method, again)
        assert refused.value.reason == "FIELD_OUT_OF_RANGE"
    assert [volume.name for volume in await client.volumes_of()] == [f"{PARENT}/pools/one/volumes/disk"]


async def test_kinds_of_pools_come_in_pages(node: Rig) -> None:
    client = node.client
    request = pool_pb2.ListPoolBackendsRequest(parent=PARENT, page_size=1)
    found, pages = [], 0
    while pages == 0 or request.page_token:
        answer = await client.call(client.pools.ListPoolBackends, request)
        assert len(answer.pool_backends) <= 1
        found += [kind.name for kind in answer.pool_backends]
        request.page_token, pages = answer.next_page_token, pages + 1
    whole = await client.call(client.pools.ListPoolBackends, pool_pb2.ListPoolBackendsRequest(parent=PARENT))
    assert found == [kind.name for kind in whole.pool_backends]
    request.page_token = "made up"
    with pytest.raises(Refused) as refused:
        await client.call(client.pools.ListPoolBackends, request)
    assert refused.value.reason == "PAGE_TOKEN_INVALID"


async def test_a_transient_pool_has_no_autostart(node: Rig) -> None:
    client = node.client
    transient, always = resource_pb2.LIFETIME_TRANSIENT, resource_pb2.AUTOSTART_ALWAYS
    with pytest.raises(Refused) as refused:
        await client.pool("one", lifetime=transient, autostart=always)
    assert (refused.value.reason, refused.value.metadata["field"]) == ("FIELD_CONFLICT", "pool.spec.autostart")
    pool = await client.pool("one", lifetime=transient)
    change = pool_pb2.Pool(name=pool.name, spec=pool_pb2.PoolSpec(autostart=always))
    with pytest.raises(Refused) as refused:
        await client.call(client.pools.UpdatePool, pool_pb2.UpdatePoolRequest(pool=change))
    assert refused.value.reason == "FIELD_CONFLICT"
    assert (await get(client, "one")).generation == 1


async def test_the_same_id_twice_and_one_request_id(node: Rig) -> None:
    client = node.client
    request = pool_pb2.CreatePoolRequest(parent=PARENT, pool_id="one", pool=pool_pb2.Pool(), request_id="r1")
    first = await client.do(client.pools.CreatePool, request, pool_pb2.Pool)
    again = await client.do(client.pools.CreatePool, request, pool_pb2.Pool)
    assert first.uid == again.uid
    request.request_id = "r2"
    with pytest.raises(Refused) as refused:
        await client.do(client.pools.CreatePool, request, pool_pb2.Pool)
    assert refused.value.reason == "RESOURCE_EXISTS"


@pytest.mark.parametrize("same", ["place", "uid"])
async def test_two_pools_of_one_place_or_uid_at_once(node: Rig, same: str) -> None:
    client = node.client

    async def attempt(number: int) -> str:
        pool = pool_pb2.Pool()
        if same == "uid":
            pool.uid = "0b6cf1a4-5a0e-4f5e-9d0a-0d5f3c1f7a11"
        else:
            pool.spec.target_path = f"{node.base}/place"
        request = pool_pb2.CreatePoolRequest(parent=PARENT, pool_id=f"p{number}", pool=pool, start=True)
        try:
            return (await client.do(client.pools.CreatePool, request, pool_pb2.Pool)).name
        except Refused as refused:
            return refused.reason

    outcomes = await asyncio.gather(*map(attempt, range(4)))
    made = [outcome for outcome in outcomes if outcome.startswith(PARENT)]
    assert len(made) == 1
    assert set(outcomes) - set(made) <= {"OPERATION_CONFLICT", "IDENTITY_IN_USE"}
    assert await attempt(9) == "IDENTITY_IN_USE"
    answer = await client.call(client.pools.ListPools, pool_pb2.ListPoolsRequest(parent=PARENT))
    assert [pool.name for pool in answer.pools] == made
    # What is refused has made nothing, and what was made is free again when it is gone.
    assert len(list(node.root.glob("*"))) == (same == "uid")
    await client.do(client.pools.StopPool, pool_pb2.StopPoolRequest(name=made[0]), pool_pb2.Pool)
    await client.do(client.pools.DeletePool, pool_pb2.DeletePoolRequest(name=made[0]), empty_pb2.Empty)
    assert await attempt(9) == f"{PARENT}/pools/p9"


async def test_a_pool_that_is_applied_is_made_once_for_a_request_id(node: Rig) -> None:
    client = node.client
    request = pool_pb2.UpdatePoolRequest(
        pool=pool_pb2.Pool(name=f"{PARENT}/pools/one", labels={"a": "b"}), allow_missing=True, request_id="r1"
    )
    first = await client.call(client.pools.UpdatePool, request)
    assert await client.call(client.pools.UpdatePool, request) == first
    made = await get(client, "one")
    assert made.generation == 1
    await client.do(client.pools.DeletePool, pool_pb2.DeletePoolRequest(name=made.name), empty_pb2.Empty)
    assert await client.call(client.pools.UpdatePool, request) == first, "also when it is gone again"


async def test_appliers_of_one_pool_are_never_told_that_it_exists(node: Rig) -> None:
    client, pool = node.client, f"{PARENT}/pools/one"

    async def attempt(round_: int, number: int) -> str:
        # All through the time that the first of them takes.
        await asyncio.sleep(number * 0.0025)
        applied = pool_pb2.Pool(name=pool, labels={f"by{number}": "yes"})
        request = pool_pb2.UpdatePoolRequest(pool=applied, allow_missing=True, request_id=f"{round_}-{number}")
        try:
            await client.do(client.pools.UpdatePool, request, pool_pb2.Pool)
        except Refused as refused:
            return refused.reason
        return f"by{number}"

    for round_ in range(12):
        outcomes = await asyncio.gather(*(attempt(round_, number) for number in range(12)))
        done = {outcome for outcome in outcomes if outcome.startswith("by")}
        assert set(outcomes) - done <= {"OPERATION_CONFLICT"}
        assert set((await get(client, "one")).labels) == done
        await client.do(client.pools.DeletePool, pool_pb2.DeletePoolRequest(name=pool), empty_pb2.Empty)


async def test_validate_only_answers_the_plan_and_does_nothing(node: Rig) -> None:
    client = node.client
    request = pool_pb2.CreatePoolRequest(parent=PARENT, pool_id="plan", pool=pool_pb2.Pool(), validate_only=True)
    pool = await client.do(client.pools.CreatePool, request, pool_pb2.Pool)
    assert pool.status.target_path == str(node.root / "plan")
    assert not (node.root / "plan").exists()
    assert list((await client.call(client.pools.ListPools, pool_pb2.ListPoolsRequest(parent=PARENT))).pools) == []


async def test_an_update_changes_what_may_change(node: Rig) -> None:
    client = node.client
    pool = await client.pool("images")
    pool.labels["tier"] = "fast"
    pool.spec.autostart = resource_pb2.AUTOSTART_ALWAYS
    request = pool_pb2.UpdatePoolRequest(
        pool=pool, update_mask=field_mask_pb2.FieldMask(paths=["labels.tier", "spec.autostart"])
    )
    changed = await client.do(client.pools.UpdatePool, request, pool_pb2.Pool)
    assert changed.generation == 2
    assert changed.labels == {"tier": "fast"}
    with pytest.raises(Refused) as refused:
        await client.do(client.pools.UpdatePool, request, pool_pb2.Pool)
    assert refused.value.reason == "ETAG_MISMATCH"
    changed.spec.target_path = "/elsewhere"
    request = pool_pb2.UpdatePoolRequest(pool=changed, update_mask=field_mask_pb2.FieldMask(paths=["spec.target_path"]))
    with pytest.raises(Refused) as refused:
        await client.do(client.pools.UpdatePool, request, pool_pb2.Pool)
    assert refused.value.reason == "FIELD_CONFLICT"
    made = await client.do(
        client.pools.UpdatePool,
        pool_pb2.UpdatePoolRequest(pool=pool_pb2.Pool(name=f"{PARENT}/pools/fresh"), allow_missing=True),
        pool_pb2.Pool,
    )
    assert made.status.target_path == str(node.root / "fresh")
    gone = pool_pb2.Pool(name=f"{PARENT}/pools/gone", etag=made.etag)
    with pytest.raises(Refused) as refused:
        await client.do(
            client.pools.UpdatePool, pool_pb2.UpdatePoolRequest(pool=gone, allow_missing=True), pool_pb2.Pool
        )
    assert refused.value.reason == "ETAG_MISMATCH"


async def test_a_directory_that_vanishes_makes_the_pool_inaccessible_and_nothing_is_forgotten(node: Rig) -> None:
    client = node.client
    await client.pool("images")
    await client.volume("images", "disk", capacity_bytes=4096)
    place = node.root / "images"
    place.rename(node.root / "away")
    pool = await until_state(client, "images", pool_pb2.POOL_STATE_INACCESSIBLE)
    assert [one.type for one in pool.status.conditions] == ["Inaccessible"]
    assert [volume.display_name or volume.name for volume in await client.volumes_of("images")] == [
        f"{PARENT}/pools/images/volumes/disk"
    ]
    # An empty directory in its place is what an unmounted file system leaves: it must not be taken for the pool.
    place.mkdir()
    with pytest.raises(Refused) as refused:
        await client.do(client.pools.StartPool, pool_pb2.StartPoolRequest(name=f"{PARENT}/pools/images"), pool_pb2.Pool)
    assert refused.value.reason == "BACKING_MISSING"
    assert len(await client.volumes_of("images")) == 1
    with pytest.raises(Refused) as refused:
        await client.volume("images", "other", capacity_bytes=1)
    assert refused.value.reason == "WRONG_STATE"
    place.rmdir()
    (node.root / "away").rename(place)
    pool = await until_state(client, "images", pool_pb2.POOL_STATE_RUNNING)
    assert list(pool.status.conditions) == []
    kinds = [event.type for event in await client.events()]
    assert watch_pb2.EVENT_TYPE_BACKEND_LOST in kinds
    assert watch_pb2.EVENT_TYPE_BACKEND_BACK in kinds


async def test_pools_come_back_with_the_service(node: Rig) -> None:
    await node.client.pool("runs")
    await node.client.pool("rests", start=False)
    state = node.base / "state" / "storage.db"
    copy = Rig(node.base / "twin")
    (node.base / "twin" / "state").mkdir(parents=True)
    for suffix in ("", "-wal"):
        shutil.copy(f"{state}{suffix}", node.base / "twin" / "state" / f"storage.db{suffix}")
    async with copy.running():
        assert (await get(copy.client, "runs")).status.state == pool_pb2.POOL_STATE_RUNNING
        assert (await get(copy.client, "rests")).status.state == pool_pb2.POOL_STATE_INACTIVE


async def test_kinds_of_pools_are_told(node: Rig) -> None:
    answer = await node.client.call(node.client.pools.ListPoolBackends, pool_pb2.ListPoolBackendsRequest(parent=PARENT))
    (kind,) = answer.pool_backends
    assert kind.name == f"{PARENT}/poolBackends/dir"
    assert kind.status.available
    assert list(kind.status.volume_formats) == ["RAW", "QCOW2"]
    assert "volume.upload" in {capability.id for capability in kind.status.capabilities}
    assert kind.status.version.startswith("qemu-img ")


async def test_after_a_boot_pools_start_that_start_by_themselves(node: Rig) -> None:
    client = node.client
    for id_, autostart in (
        ("always", resource_pb2.AUTOSTART_ALWAYS),
        ("once", resource_pb2.AUTOSTART_ONCE),
        ("never", resource_pb2.AUTOSTART_NEVER),
    ):
        await client.pool(id_, start=id_ == "never", autostart=autostart)
    await node.app.store.write(lambda tx: tx.put_record("boot", "id", b"another boot"))
    twin = Rig(node.base / "twin")
    (node.base / "twin" / "state").mkdir(parents=True)
    for suffix in ("", "-wal"):
        shutil.copy(node.base / "state" / f"storage.db{suffix}", node.base / "twin" / "state" / f"storage.db{suffix}")
    async with twin.running():
        states = {id_: (await get(twin.client, id_)).status.state for id_ in ("always", "once", "never")}
        assert states == {
            "always": pool_pb2.POOL_STATE_RUNNING,
            "once": pool_pb2.POOL_STATE_RUNNING,
            "never": pool_pb2.POOL_STATE_INACTIVE,
        }
        once = await get(twin.client, "once")
        assert once.spec.autostart == resource_pb2.AUTOSTART_NEVER
        assert once.generation == 2

from __future__ import annotations

import asyncio
import os
import stat
import uuid
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.integration.storage.rig import MIB, PARENT, Refused, Rig
from virtfleet.node.v1 import attachment_pb2
from virtfleet.storage.v1 import pool_pb2, volume_pb2, watch_pb2
from virtfleet_service import errors
from virtfleet_service.authorization import Authorizer
from virtfleet_service.call import Call, Caller
from virtfleet_service.methods import facts_of
from virtfleet_storage.attachments import FORGET_OWNERS_SECONDS

EXCLUSIVE = attachment_pb2.ATTACHMENT_MODE_EXCLUSIVE
SHARED = attachment_pb2.ATTACHMENT_MODE_SHARED
READ_ONLY = attachment_pb2.ATTACHMENT_MODE_READ_ONLY
BASE, TOP = "pools/images/volumes/base", "pools/images/volumes/top"
GUEST, OTHER = 23456, 23457
COUNT, ROUNDS = 40, 6


@pytest.fixture
async def pool(node: Rig) -> Path:
    await node.client.pool("images")
    await node.client.volume("images", "base", capacity_bytes=MIB)
    return node.root / "images"


async def can(uid: int, path: Path, flags: int) -> bool:
    """Open a file as another user, in a process of its own."""

    def attempt() -> bool:
        child = os.fork()
        if child == 0:
            try:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
                os.close(os.open(path, flags))
            except OSError:
                os._exit(1)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    return attempt()


async def test_the_one_writer_owns_the_file_for_as_long_as_it_holds_it(node: Rig, pool: Path) -> None:
    before = (pool / "base").stat()
    domain = str(uuid.uuid4())
    answer = await node.attach(BASE, domain_uid=domain, uid=GUEST)
    assert answer.attachment_id == f"{domain}:disk0"
    assert answer.file.path == str(pool / "base")
    assert answer.file.format == "raw"
    assert answer.capacity_bytes == MIB
    assert (pool / "base").stat().st_uid == GUEST
    assert await can(GUEST, pool / "base", os.O_RDWR)
    assert not await can(OTHER, pool / "base", os.O_RDONLY)
    assert await node.attach(BASE, domain_uid=domain, uid=GUEST) == answer
    volume = await node.client.get(BASE)
    (held,) = volume.status.attachments
    assert (held.attachment_id, held.domain, held.domain_uid, held.device_id, held.mode) == (
        answer.attachment_id,
        f"{PARENT}/domains/web",
        domain,
        "disk0",
        volume_pb2.VOLUME_ATTACHMENT_MODE_EXCLUSIVE,
    )
    listed = await node.peer.call(
        "AttachmentService.ListAttachments",
        attachment_pb2.ListAttachmentsRequest(parent=PARENT),
        attachment_pb2.ListAttachmentsResponse,
    )
    assert [one.attachment_id for one in listed.attachments] == [answer.attachment_id]
    await node.release(BASE, answer.attachment_id)
    await node.release(BASE, answer.attachment_id)
    after = (pool / "base").stat()
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)
    assert list((await node.client.get(BASE)).status.attachments) == []
    kinds = [event.type for event in await node.client.events()]
    assert kinds.count(watch_pb2.EVENT_TYPE_VOLUME_ATTACHED) == 1
    assert kinds.count(watch_pb2.EVENT_TYPE_VOLUME_RELEASED) == 1


@pytest.mark.parametrize("first", [EXCLUSIVE, SHARED, READ_ONLY])
@pytest.mark.parametrize("second", [EXCLUSIVE, SHARED, READ_ONLY])
async def test_modes_that_go_together(node: Rig, pool: Path, first: int, second: int) -> None:
    held = await node.attach(BASE, mode=first, uid=GUEST)
    if first == second and first != EXCLUSIVE:
        await node.attach(BASE, mode=second, uid=OTHER)
        flags = os.O_RDWR if first == SHARED else os.O_RDONLY
        assert await can(GUEST, pool / "base", flags)
        assert await can(OTHER, pool / "base", flags)
        if first == READ_ONLY:
            assert not await can(GUEST, pool / "base", os.O_WRONLY)
        await node.release(BASE, held.attachment_id)
        assert not await can(GUEST, pool / "base", os.O_RDONLY)
        assert await can(OTHER, pool / "base", flags)
        return
    with pytest.raises(errors.ResourceInUse) as refused:
        await node.attach(BASE, mode=second)
    assert refused.value.metadata["holder"] == f"{PARENT}/domains/web"
    assert len((await node.client.get(BASE)).status.attachments) == 1
    assert not await can(OTHER, pool / "base", os.O_RDONLY)


async def test_what_is_below_is_readable_by_the_guest_and_by_nobody_else(node: Rig, pool: Path) -> None:
    client = node.client
    await client.volume("images", "top", backing=volume_pb2.VolumeBacking(volume=BASE))
    await client.volume("images", "twin", backing=volume_pb2.VolumeBacking(volume=BASE))
    before = (pool / "base").stat()
    one = await node.attach(TOP, uid=GUEST)
    assert [(link.path, link.format) for link in one.file.backing_chain] == [(str(pool / "base"), "raw")]
    two = await node.attach("pools/images/volumes/twin", uid=OTHER)
    for uid in (GUEST, OTHER):
        assert await can(uid, pool / "base", os.O_RDONLY)
        assert not await can(uid, pool / "base", os.O_WRONLY)
    assert not await can(GUEST + 7, pool / "base", os.O_RDONLY)
    assert stat.S_IMODE((pool / "base").stat().st_mode) & 0o040
    with pytest.raises(errors.HasChildren):
        await node.attach(BASE, uid=GUEST)
    await node.release(TOP, one.attachment_id)
    assert not await can(GUEST, pool / "base", os.O_RDONLY)
    assert await can(OTHER, pool / "base", os.O_RDONLY)
    await node.release("pools/images/volumes/twin", two.attachment_id)
    after = (pool / "base").stat()
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)
    assert "system.posix_acl_access" not in os.listxattr(pool / "base")


async def test_a_held_volume_is_not_changed(node: Rig, pool: Path) -> None:
    client = node.client
    await node.attach(BASE)
    name = f"{PARENT}/{BASE}"
    for method, request in (
        (client.volumes.DeleteVolume, volume_pb2.DeleteVolumeRequest(name=name)),
        (client.volumes.ResizeVolume, volume_pb2.ResizeVolumeRequest(name=name, capacity_bytes=2 * MIB)),
        (client.volumes.WipeVolume, volume_pb2.WipeVolumeRequest(name=name)),
        (
            client.volumes.CreateVolume,
            volume_pb2.CreateVolumeRequest(
                parent=f"{PARENT}/pools/images", volume_id="copy", volume=volume_pb2.Volume(), source_volume=BASE
            ),
        ),
    ):
        with pytest.raises(Refused) as refused:
            await client.call(method, request)
        assert refused.value.reason == "RESOURCE_IN_USE"
        assert refused.value.metadata["holder"] == f"{PARENT}/domains/web"
    for method, message in (
        (client.pools.DeletePool, pool_pb2.DeletePoolRequest(name=f"{PARENT}/pools/images")),
        (client.pools.StopPool, pool_pb2.StopPoolRequest(name=f"{PARENT}/pools/images")),
    ):
        with pytest.raises(Refused) as refused:
            await client.call(method, message)
        assert refused.value.reason == "RESOURCE_IN_USE"
    assert (pool / "base").stat().st_size == MIB


@pytest.mark.usefixtures("pool")
async def test_a_volume_of_a_stopped_pool_or_that_is_missing_is_not_given(node: Rig) -> None:
    with pytest.raises(errors.ResourceNotFound):
        await node.attach("pools/images/volumes/none")
    client = node.client
    await client.do(client.pools.StopPool, pool_pb2.StopPoolRequest(name=f"{PARENT}/pools/images"), pool_pb2.Pool)
    with pytest.raises(errors.WrongState):
        await node.attach(BASE)
    assert list((await client.get(BASE)).status.attachments) == []


@pytest.mark.usefixtures("pool")
async def test_a_caller_needs_the_right_on_all_of_the_chain(node: Rig) -> None:
    await node.client.volume("images", "top", backing=volume_pb2.VolumeBacking(volume=BASE))
    caller = Caller("spiffe://virtfleet.dev/user/eve", ("operator",), "unix", "", (f"{PARENT}/{TOP}",))
    facts = facts_of(volume_pb2.DESCRIPTOR.services_by_name["VolumeService"].methods_by_name["GetVolume"])
    call = Call(facts, caller, Authorizer(), node="n1")
    request = attachment_pb2.AttachVolumeRequest(
        name=f"{PARENT}/{TOP}", domain_uid=str(uuid.uuid4()), device_id="disk0", mode=EXCLUSIVE
    )
    with pytest.raises(errors.PermissionDenied) as refused:
        await node.peer.call("AttachmentService.AttachVolume", request, attachment_pb2.AttachVolumeResponse, call)
    assert refused.value.resource == f"{PARENT}/{BASE}"
    assert list((await node.client.get(TOP)).status.attachments) == []


@pytest.mark.usefixtures("pool")
async def test_the_service_is_not_served_to_callers_of_the_api(node: Rig) -> None:
    method: Any = node.client.channel.unary_unary("/virtfleet.node.v1.AttachmentService/ListAttachments")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await method(b"")
    assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_a_file_goes_back_to_its_owner_also_when_it_was_taken_again_at_once(node: Rig) -> None:
    """That a file had another owner is forgotten a little after its release: not while the next guest has it."""
    await node.client.pool("images")
    for number in range(COUNT):
        await node.client.volume("images", f"v{number}", capacity_bytes=MIB)
    owner, loop = os.geteuid(), asyncio.get_running_loop()

    async def take_twice(number: int, released: list[float]) -> None:
        name = f"pools/images/volumes/v{number}"
        first = await node.attach(name, uid=GUEST)
        await node.release(name, first.attachment_id)
        released.append(loop.time())
        second = await node.attach(name, uid=OTHER)
        # At all moments around the one at which the first is forgotten.
        await asyncio.sleep(released[0] + FORGET_OWNERS_SECONDS + (number - COUNT / 2) / 5000 - loop.time())
        await node.release(name, second.attachment_id)

    for _ in range(ROUNDS):
        released: list[float] = []
        await asyncio.gather(*(take_twice(number, released) for number in range(COUNT)))
        assert [path.name for path in (node.root / "images").glob("v*") if path.stat().st_uid != owner] == []


@pytest.mark.usefixtures("pool")
async def test_two_domains_race_for_one_volume(node: Rig) -> None:
    results = await asyncio.gather(*(node.attach(BASE, uid=GUEST + n) for n in range(8)), return_exceptions=True)
    won = [one for one in results if isinstance(one, attachment_pb2.AttachVolumeResponse)]
    assert len(won) == 1
    assert all(isinstance(one, errors.ResourceInUse) for one in results if one not in won)
    assert len((await node.client.get(BASE)).status.attachments) == 1

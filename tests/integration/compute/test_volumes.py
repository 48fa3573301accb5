"""Domains with volumes: a real storage service beside, and what holds when it is away or something fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from google.longrunning import operations_pb2
from google.protobuf import duration_pb2

from tests.integration.compute.rig import (
    NODE,
    PARENT,
    Client,
    Process,
    Refused,
    Service,
    State,
    folder,
    metadata,
    name,
    service,
)
from virtfleet.compute.v1 import device_pb2, domain_pb2, domain_spec_pb2
from virtfleet.node.v1 import attachment_pb2
from virtfleet.storage.v1 import pool_pb2, pool_pb2_grpc, volume_pb2, volume_pb2_grpc
from virtfleet_compute import records
from virtfleet_compute.context import ref
from virtfleet_compute.creation import OWNER_LABEL
from virtfleet_service.peers import Peer
from virtfleet_storage import app as storage_app
from virtfleet_storage.settings import StorageSettings

MIB = 1 << 20
FAILED = grpc.StatusCode.FAILED_PRECONDITION.value[0]


class Storage(Client):
    """A storage service in this process, with one pool."""

    def __init__(self, place: Path) -> None:
        self.place = place
        super().__init__(place / "r" / "storage" / "admin.sock")
        self.pools = pool_pb2_grpc.PoolServiceStub(self.channel)
        self.volumes = volume_pb2_grpc.VolumeServiceStub(self.channel)
        self.peer = Peer(place / "r" / "storage" / "peer.sock", service="compute", node=NODE)

    async def make_pool(self) -> None:
        request = pool_pb2.CreatePoolRequest(
            parent=PARENT,
            pool_id="p",
            pool=pool_pb2.Pool(spec=pool_pb2.PoolSpec(dir=pool_pb2.DirBackend())),
            start=True,
        )
        await self.do(self.pools.CreatePool, request, pool_pb2.Pool)

    async def names(self) -> list[str]:
        request = volume_pb2.ListVolumesRequest(parent=f"{PARENT}/pools/p")
        answer = await self.call(self.volumes.ListVolumes, request)
        return [volume.name.rpartition("/")[2] for volume in answer.volumes]

    async def making(self) -> str:
        """Wait until a volume is in the making; returns the operation."""
        request = operations_pb2.ListOperationsRequest(filter="done = false")
        async with asyncio.timeout(10):
            while True:
                for operation in (await self.call(self.operations.ListOperations, request)).operations:
                    if metadata(operation).phase:
                        name: str = operation.name
                        return name
                await asyncio.sleep(0.01)

    async def attach(self, volume: str, uid: str) -> None:
        """Attach a volume for a domain, as compute does."""
        request = attachment_pb2.AttachVolumeRequest(
            name=f"{PARENT}/pools/p/volumes/{volume}",
            domain_uid=uid,
            domain=name("gone"),
            device_id=volume,
            mode=attachment_pb2.ATTACHMENT_MODE_EXCLUSIVE,
        )
        await self.peer.call("AttachmentService.AttachVolume", request, attachment_pb2.AttachVolumeResponse)

    async def held(self) -> set[str]:
        answer = await self.peer.call(
            "AttachmentService.ListAttachments",
            attachment_pb2.ListAttachmentsRequest(parent=PARENT),
            attachment_pb2.ListAttachmentsResponse,
        )
        return {attachment.device_id for attachment in answer.attachments}


@asynccontextmanager
async def storage(place: Path, *, fresh: bool = True) -> AsyncIterator[Storage]:
    settings = StorageSettings(node=NODE, state_dir=place / "s", run_dir=place / "r", drain_seconds=1.0)
    async with storage_app.running(settings):
        client = Storage(place)
        if fresh:
            await client.make_pool()
        try:
            yield client
        finally:
            await client.peer.close()
            await client.close()


@pytest.fixture
async def both() -> AsyncIterator[tuple[Service, Storage]]:
    async with folder() as place, storage(place) as provider, service(place) as node:
        yield node, provider


def request(id_: str, *volumes: str, start: bool = True) -> domain_pb2.CreateDomainRequest:
    spec = domain_spec_pb2.DomainSpec()
    made = []
    for volume in volumes:
        spec.disks[volume].volume = f"pools/p/volumes/{volume}"
        new = domain_pb2.NewVolume(pool="pools/p", volume_id=volume)
        new.spec.format, new.spec.capacity_bytes = volume_pb2.VOLUME_FORMAT_QCOW2, MIB
        made.append(new)
    return domain_pb2.CreateDomainRequest(
        parent=PARENT,
        domain_id=id_,
        domain=domain_pb2.Domain(spec=spec),
        new_volumes=made,
        start=domain_pb2.StartOptions() if start else None,
    )


def big(id_: str) -> domain_pb2.CreateDomainRequest:
    """Ask for a domain whose volume takes some time to make, without waiting for it."""
    create = request(id_, "root", start=False)
    spec = create.new_volumes[0].spec
    spec.format, spec.capacity_bytes = volume_pb2.VOLUME_FORMAT_RAW, 2048 * MIB
    spec.preallocation = volume_pb2.PREALLOCATION_FULL
    create.inline_wait.SetInParent()
    return create


async def test_a_disk_of_another_format_than_its_volume_starts_nothing(both: tuple[Service, Storage]) -> None:
    node, provider = both
    await node.do(node.domains.CreateDomain, request("web", "root", start=False), domain_pb2.Domain)
    change = domain_pb2.Domain(name=name("web"))
    change.spec.disks["root"].format = device_pb2.DISK_FORMAT_RAW
    await node.update(change, "spec.disks.root.format")
    with pytest.raises(Refused) as refused:
        await node.start("web")
    assert refused.value.reason == "FIELD_CONFLICT"
    assert refused.value.metadata["device_id"] == "root"
    assert (refused.value.metadata["format"], refused.value.metadata["volume_format"]) == ("raw", "qcow2")
    assert not (await node.get("web")).status.active
    assert await provider.held() == set()
    change.spec.disks["root"].format = device_pb2.DISK_FORMAT_QCOW2
    await node.update(change, "spec.disks.root.format")
    assert (await node.start("web")).status.active


async def test_a_domain_with_new_volumes(both: tuple[Service, Storage]) -> None:
    node, provider = both
    domain = await node.do(node.domains.CreateDomain, request("web", "root", "data"), domain_pb2.Domain)
    assert await provider.names() == ["data", "root"]
    assert await provider.held() == {"root", "data"}
    disks = {disk.device_id: disk for disk in domain.status.disks}
    assert Path(disks["root"].path).exists()
    assert disks["root"].format == "qcow2"
    assert disks["root"].attachment_id == f"{domain.uid}:root"
    await node.stop("web")
    assert await provider.held() == set()
    assert not (await node.get("web")).status.disks
    await node.start("web")
    await node.delete("web", stop=True, delete_volumes=True)
    assert await provider.names() == []
    assert await provider.held() == set()


async def test_volumes_stay_unless_asked_for(both: tuple[Service, Storage]) -> None:
    node, provider = both
    await node.do(node.domains.CreateDomain, request("web", "root", start=False), domain_pb2.Domain)
    await node.delete("web")
    assert await provider.names() == ["root"]


async def test_a_failed_start_undoes_volumes_in_reverse(both: tuple[Service, Storage]) -> None:
    node, provider = both
    node.faults({"method": "start", "reason": "HYPERVISOR_FAILED"})
    with pytest.raises(Refused) as refused:
        await node.do(node.domains.CreateDomain, request("web", "root", "data"), domain_pb2.Domain)
    assert refused.value.reason == "HYPERVISOR_FAILED"
    assert await provider.names() == []
    assert await provider.held() == set()
    assert not (await node.list()).domains


async def test_a_volume_that_was_there_is_never_deleted(both: tuple[Service, Storage]) -> None:
    node, provider = both
    await node.do(node.domains.CreateDomain, request("old", "data", start=False), domain_pb2.Domain)
    with pytest.raises(Refused) as refused:
        await node.do(node.domains.CreateDomain, request("web", "root", "data"), domain_pb2.Domain)
    assert refused.value.reason == "RESOURCE_EXISTS"
    assert await provider.names() == ["data"]


async def test_volumes_of_a_domain_that_was_are_not_those_of_one_with_its_uid(both: tuple[Service, Storage]) -> None:
    """A domain that is made anew under its old uid and fails has no right to what the old one has left."""
    node, provider = both
    create = request("web", "root", start=False)
    create.domain.uid = "0b6cf1a4-5a0e-4f5e-9d0a-0d5f3c1f7a11"
    await node.do(node.domains.CreateDomain, create, domain_pb2.Domain)
    await node.delete("web")
    with pytest.raises(Refused) as refused:
        await node.do(node.domains.CreateDomain, create, domain_pb2.Domain)
    assert refused.value.reason == "RESOURCE_EXISTS"
    assert await provider.names() == ["root"]
    assert [path.name for path in provider.place.glob("s/pools/p/[!.]*")] == ["root"]
    assert not node.app.store.list_records("leftover")


async def test_two_domains_of_one_uid_at_once(both: tuple[Service, Storage]) -> None:
    node, provider = both
    uid = "0b6cf1a4-5a0e-4f5e-9d0a-0d5f3c1f7a11"
    creates = [request(f"web{number}", "root", start=False) for number in range(4)]
    for create in creates:
        create.domain.uid = uid

    async def attempt(create: domain_pb2.CreateDomainRequest) -> str:
        try:
            return (await node.do(node.domains.CreateDomain, create, domain_pb2.Domain)).name
        except Refused as refused:
            return refused.reason

    outcomes = await asyncio.gather(*map(attempt, creates))
    made = [outcome for outcome in outcomes if outcome.startswith(PARENT)]
    assert len(made) == 1
    assert set(outcomes) - set(made) <= {"OPERATION_CONFLICT", "IDENTITY_IN_USE"}
    assert [domain.name for domain in (await node.list()).domains] == made
    assert await provider.names() == ["root"]
    assert not node.app.store.list_records("create")


async def test_a_cancelled_creation_leaves_nothing(both: tuple[Service, Storage]) -> None:
    node, provider = both
    node.faults({"method": "start", "hang": True})
    create = request("web", "root")
    create.inline_wait.CopyFrom(duration_pb2.Duration(seconds=1))
    operation = await node.call(node.domains.CreateDomain, create)
    assert await provider.held() == {"root"}
    await node.call(node.operations.CancelOperation, operations_pb2.CancelOperationRequest(name=operation.name))
    assert Refused((await node.wait(operation)).error).reason == "OPERATION_CANCELLED"
    assert await provider.names() == []
    assert await provider.held() == set()


async def test_a_creation_that_is_cancelled_while_its_volume_is_made_leaves_none(both: tuple[Service, Storage]) -> None:
    node, provider = both
    operation = await node.call(node.domains.CreateDomain, big("web"))
    making = await provider.making()
    await node.call(node.operations.CancelOperation, operations_pb2.CancelOperationRequest(name=operation.name))
    assert Refused((await node.wait(operation)).error).reason == "OPERATION_CANCELLED"
    # Storage has stopped too: nothing is written for nobody.
    made = await provider.call(provider.operations.GetOperation, operations_pb2.GetOperationRequest(name=making))
    assert Refused(made.error).reason == "OPERATION_CANCELLED"
    assert await provider.names() == []
    assert [path.name for path in provider.place.glob("s/pools/p/[!.]*")] == []
    assert not node.app.store.list_records("leftover")


async def test_a_volume_that_was_still_made_when_its_creation_was_cut_goes(place: Path) -> None:
    process = Process(place)
    async with storage(place) as provider:
        try:
            client = await process.start()
            await client.call(client.domains.CreateDomain, big("web"))
            making = await provider.making()
            await process.kill()
            await client.close()
            client = await process.start()
            assert not (await client.list()).domains
            await provider.wait(operations_pb2.Operation(name=making))
            async with asyncio.timeout(15):
                while await provider.names():
                    await asyncio.sleep(0.05)
            await client.close()
        finally:
            await process.kill()


async def test_a_domain_that_is_made_again_keeps_its_volumes(place: Path) -> None:
    """The first attempt leaves word that a volume of this domain is to be deleted; the second has the same uid."""
    again = request("web", "root", start=False)
    again.domain.uid = "0b6cf1a4-5a0e-4f5e-9d0a-0d5f3c1f7a11"
    async with service(place) as node:
        with pytest.raises(Refused) as refused:
            await node.do(node.domains.CreateDomain, again, domain_pb2.Domain)
        assert refused.value.reason == "BACKEND_UNREACHABLE"
        # Storage is back between two looks of the sweep, which are further apart by now.
        await asyncio.sleep(2)
        async with storage(place) as provider:
            await node.do(node.domains.CreateDomain, again, domain_pb2.Domain)
            async with asyncio.timeout(10):
                while node.app.store.list_records("leftover"):
                    await asyncio.sleep(0.05)
            assert await provider.names() == ["root"]
            await node.start("web")


async def test_a_volume_to_be_deleted_that_was_attached_meanwhile_is_not_forgotten(
    both: tuple[Service, Storage],
) -> None:
    node, provider = both
    gone, other = "0b6cf1a4-5a0e-4f5e-9d0a-0d5f3c1f7a11", "0b6cf1a4-5a0e-4f5e-9d0a-0d5f3c1f7a22"
    for volume, uid in (("root", gone), ("data", other)):
        made = volume_pb2.CreateVolumeRequest(parent=f"{PARENT}/pools/p", volume_id=volume)
        made.volume.labels[OWNER_LABEL] = uid
        made.volume.spec.capacity_bytes = MIB
        await provider.do(provider.volumes.CreateVolume, made, volume_pb2.Volume)
    await provider.attach("data", other)
    sweep = node.app.context.wiring.unswept["storage"]
    async with node.app.context.holds.held(other):
        # The sweep has asked what is attached, and waits for whoever has the other domain.
        sweep.set()
        async with asyncio.timeout(10):
            while sweep.is_set():
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        await provider.attach("root", gone)
        left = records.Making(f"{PARENT}/pools/p/volumes/root", "", gone)
        await node.app.store.write(lambda tx: records.keep_leftover(tx, left))
    async with asyncio.timeout(10):
        while await provider.names() != ["data"]:
            await asyncio.sleep(0.05)
    assert await provider.held() == set()
    assert not node.app.store.list_records("leftover")


async def test_a_disk_in_use(both: tuple[Service, Storage]) -> None:
    node, provider = both
    await node.do(node.domains.CreateDomain, request("one", "root"), domain_pb2.Domain)
    spec = domain_spec_pb2.DomainSpec()
    spec.disks["root"].volume = "pools/p/volumes/root"
    await node.create("two", spec=spec)
    file = (provider.place / "s/pools/p/root").stat()
    with pytest.raises(Refused) as refused:
        await node.start("two")
    assert (refused.value.code, refused.value.reason) == (FAILED, "RESOURCE_IN_USE")
    assert refused.value.metadata["holder"] == name("one")
    two = await node.get("two")
    assert two.status.state == State.DOMAIN_STATE_SHUT_OFF
    assert not (await node.driver.inspect(ref(two))).active
    after = (provider.place / "s/pools/p/root").stat()
    assert (after.st_uid, after.st_gid, after.st_mode) == (file.st_uid, file.st_gid, file.st_mode)
    await node.stop("one")
    await node.start("two")
    assert await provider.held() == {"root"}


async def test_a_missing_kernel_and_a_stopped_pool(both: tuple[Service, Storage]) -> None:
    node, provider = both
    spec = domain_spec_pb2.DomainSpec()
    spec.os.kernel.kernel_volume = "pools/p/volumes/vmlinuz"
    await node.create("web", spec=spec)
    with pytest.raises(Refused) as refused:
        await node.start("web")
    assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.NOT_FOUND.value[0], "RESOURCE_NOT_FOUND")
    assert refused.value.metadata["resource"] == f"{PARENT}/pools/p/volumes/vmlinuz"
    await node.do(node.domains.CreateDomain, request("db", "root", start=False), domain_pb2.Domain)
    await provider.do(provider.pools.StopPool, pool_pb2.StopPoolRequest(name=f"{PARENT}/pools/p"), pool_pb2.Pool)
    with pytest.raises(Refused) as refused:
        await node.start("db")
    assert (refused.value.code, refused.value.reason) == (FAILED, "WRONG_STATE")
    assert refused.value.metadata["resource"] == f"{PARENT}/pools/p"
    for domain in (await node.list()).domains:
        assert domain.status.state == State.DOMAIN_STATE_SHUT_OFF
        assert not (await node.driver.inspect(ref(domain))).active
    assert await provider.held() == set()


async def test_storage_away(place: Path) -> None:
    spec = domain_spec_pb2.DomainSpec()
    spec.disks["root"].volume = "pools/p/volumes/root"
    async with service(place) as node:
        await node.create("plain", start=True)
        await node.create("web", spec=spec)
        with pytest.raises(Refused) as refused:
            await node.start("web")
        assert refused.value.reason == "BACKEND_UNREACHABLE"
        assert refused.value.metadata["peer"] == "storage"
        with pytest.raises(Refused):
            await node.do(node.domains.CreateDomain, request("new", "data"), domain_pb2.Domain)
        assert [domain.name for domain in (await node.list()).domains] == [name("plain"), name("web")]
        async with storage(place) as provider:
            async with asyncio.timeout(10):
                while node.app.store.list_records("leftover"):
                    await asyncio.sleep(0.05)
            assert await provider.names() == []
            await node.do(node.domains.CreateDomain, request("db", "root"), domain_pb2.Domain)
        # The guest runs on without storage; what it had is given back when storage is there again.
        await node.stop("db")
        async with storage(place, fresh=False) as provider, asyncio.timeout(10):
            while await provider.held():
                await asyncio.sleep(0.05)


@pytest.mark.parametrize("failpoint", ["compute.create.volume", "compute.start.connected", "compute.create.made"])
async def test_a_cut_creation_leaves_no_volume(place: Path, failpoint: str) -> None:
    process = Process(place)
    async with storage(place) as provider:
        try:
            client = await process.start(failpoint)
            with pytest.raises(Exception, match=r"UNAVAILABLE|Socket closed|closed"):
                await client.call(client.domains.CreateDomain, request("web", "root"))
            await process.died()
            await client.close()
            client = await process.start()
            async with asyncio.timeout(10):
                while await provider.names() or await provider.held():
                    await asyncio.sleep(0.05)
            assert not (await client.list()).domains
            await client.do(client.domains.CreateDomain, request("web", "root"), domain_pb2.Domain)
            await client.close()
        finally:
            await process.kill()


async def test_a_volume_that_two_creations_have_left_is_remembered_for_both(place: Path) -> None:
    """The first has made it, the second has only asked for it: the sweep must not take the one's word for the other's."""
    process = Process(place)
    try:
        async with storage(place) as provider:
            client = await process.start("compute.create.volume")
            with pytest.raises(Exception, match=r"UNAVAILABLE|Socket closed|closed"):
                await client.call(client.domains.CreateDomain, request("web", "root"))
            await process.died()
            await client.close()
            assert await provider.names() == ["root"]
        # Storage is away: neither can be told.
        client = await process.start()
        with pytest.raises(Refused) as refused:
            await client.do(client.domains.CreateDomain, request("web", "root"), domain_pb2.Domain)
        assert refused.value.reason == "BACKEND_UNREACHABLE"
        async with storage(place, fresh=False) as provider:
            async with asyncio.timeout(15):
                while await provider.names():
                    await asyncio.sleep(0.05)
            assert [path.name for path in place.glob("s/pools/p/[!.]*")] == []
            await client.do(client.domains.CreateDomain, request("web", "root"), domain_pb2.Domain)
            await client.close()
    finally:
        await process.kill()


@pytest.mark.parametrize("batch", [False, True], ids=["alone", "in a batch"])
@pytest.mark.parametrize("failpoint", ["compute.delete.stopped", "compute.delete.undone"])
async def test_a_cut_deletion_takes_its_volumes_with_it(place: Path, failpoint: str, *, batch: bool) -> None:
    process = Process(place)
    delete = domain_pb2.DeleteDomainRequest(name=name("web"), stop=True, delete_volumes=True)
    async with storage(place) as provider:
        try:
            client = await process.start(failpoint)
            await client.do(client.domains.CreateDomain, request("web", "root", "data"), domain_pb2.Domain)
            await client.do(client.domains.CreateDomain, request("stays", "other"), domain_pb2.Domain)
            several = domain_pb2.BatchDeleteDomainsRequest(parent=PARENT, requests=[delete])
            with pytest.raises(Exception, match=r"UNAVAILABLE|Socket closed|closed"):
                await (
                    client.call(client.domains.BatchDeleteDomains, several)
                    if batch
                    else client.call(client.domains.DeleteDomain, delete)
                )
            await process.died()
            await client.close()
            client = await process.start()
            async with asyncio.timeout(10):
                while await provider.names() != ["other"] or await provider.held() != {"other"}:
                    await asyncio.sleep(0.05)
            assert [domain.name for domain in (await client.list()).domains] == [name("stays")]
            listed = operations_pb2.ListOperationsRequest(name=f"{PARENT}/services/compute")
            for operation in (await client.call(client.operations.ListOperations, listed)).operations:
                assert operation.done
                assert not operation.HasField("error"), operation
            await client.close()
        finally:
            await process.kill()


async def test_volumes_of_a_cut_deletion_stay_unless_asked_for(place: Path) -> None:
    process = Process(place)
    async with storage(place) as provider:
        try:
            client = await process.start("compute.delete.undone")
            await client.do(client.domains.CreateDomain, request("web", "root"), domain_pb2.Domain)
            with pytest.raises(Exception, match=r"UNAVAILABLE|Socket closed|closed"):
                await client.delete("web", stop=True)
            await process.died()
            await client.close()
            client = await process.start()
            assert not (await client.list()).domains
            async with asyncio.timeout(10):
                while await provider.held():
                    await asyncio.sleep(0.05)
            assert await provider.names() == ["root"]
            await client.close()
        finally:
            await process.kill()


async def test_the_caller_is_conveyed_to_storage(both: tuple[Service, Storage]) -> None:
    node, provider = both
    await node.do(node.domains.CreateDomain, request("web", "root", start=False), domain_pb2.Domain)
    viewer = node.as_("viewer")
    try:
        with pytest.raises(Refused) as refused:
            await viewer.start("web")
        assert refused.value.reason == "READ_ONLY_SOCKET"
    finally:
        await viewer.close()
    assert await provider.held() == set()

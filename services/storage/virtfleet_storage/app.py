"""The composition root: the only module that knows all parts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from google.longrunning import operations_pb2 as _operations_pb2
from google.protobuf.descriptor import ServiceDescriptor

from virtfleet.common.v1 import operations_pb2
from virtfleet.node.v1 import attachment_pb2
from virtfleet.storage.v1 import pool_pb2, volume_pb2, watch_pb2
from virtfleet_service.admin import boot_id
from virtfleet_service.errors import BackendUnreachable, VirtfleetError
from virtfleet_service.longrunning import OperationsService
from virtfleet_service.operations import Operations
from virtfleet_service.server import Server
from virtfleet_service.store import Store
from virtfleet_service.transaction import Transaction
from virtfleet_service.watch import WatchHub, operation_watch_service, watch_service
from virtfleet_storage import catalog
from virtfleet_storage.attachments import Attachments
from virtfleet_storage.backends import registry
from virtfleet_storage.claims import Claims
from virtfleet_storage.downloads import Downloads
from virtfleet_storage.keeper import EXPIRY_SECONDS, Keeper
from virtfleet_storage.kinds import Kinds
from virtfleet_storage.lists import Lists
from virtfleet_storage.openings import Openings
from virtfleet_storage.places import Places
from virtfleet_storage.pools import Pools
from virtfleet_storage.refresh import Refresher
from virtfleet_storage.servicers.attachments import AttachmentServicer
from virtfleet_storage.servicers.pools import PoolServicer
from virtfleet_storage.servicers.volumes import VolumeServicer
from virtfleet_storage.settings import StorageSettings
from virtfleet_storage.uploads import Uploads
from virtfleet_storage.volumes import Volumes

_log = logging.getLogger(__name__)

SERVICE = "storage"
PACKAGE = "virtfleet.storage.v1"

_BOOT = "boot"
_BOOT_ID = "id"


@dataclass(frozen=True, slots=True)
class App:
    """Is the running service, as those who run it in their own process see it."""

    settings: StorageSettings
    server: Server
    store: Store


@asynccontextmanager
async def running(settings: StorageSettings) -> AsyncIterator[App]:
    """Run the service while the block is entered; drains at its end."""
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(
            Store.open(
                settings.state_dir / f"{SERVICE}.db",
                package=PACKAGE,
                resource_types={catalog.POOL: pool_pb2.Pool, catalog.VOLUME: volume_pb2.Volume},
            )
        )
        hub = WatchHub(store, ring_bytes=settings.watch_memory_bytes)
        places = Places(registry.load())
        for backend in places.backends.values():
            stack.callback(backend.close)
        stack.push_async_callback(places.close)
        operations = await stack.enter_async_context(
            Operations(store, SERVICE, settings.node).running(drain_seconds=settings.drain_seconds)
        )
        parts = _Parts(settings, store, operations, places)
        await parts.restore()
        server = Server(settings, service=SERVICE, store_id=lambda: store.store_id)
        parts.serve(server, hub)
        server.on_drain(hub.close)
        keeping = asyncio.create_task(parts.keeper.run(), name="keeper of pools")
        stack.push_async_callback(_end, keeping)
        async with server:
            yield App(settings, server, store)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


class _Parts:
    """Holds the use cases."""

    def __init__(self, settings: StorageSettings, store: Store, operations: Operations, places: Places) -> None:
        node, claims = settings.node, Claims()
        self.store, self.operations, self.places = store, operations, places
        self.refresher = Refresher(store, places, claims)
        self.kinds = Kinds(places, node, store.token_key)
        self.lists = Lists(store)
        self.openings = Openings(store, places, self.refresher, root=settings.root)
        self.pools = Pools(store, operations, places, self.openings, self.refresher, node=node, root=settings.root)
        self.volumes = Volumes(store, operations, places, claims, node=node)
        self.uploads = Uploads(store, places, claims, node=node, retention_seconds=settings.upload_retention_seconds)
        self.downloads = Downloads(store, places)
        self.attachments = Attachments(store, places, claims)
        self.keeper = Keeper(
            store,
            places,
            self.openings,
            self.refresher,
            self.uploads,
            self.attachments,
            rescan_seconds=settings.rescan_seconds,
            expiry_seconds=min(EXPIRY_SECONDS, settings.upload_retention_seconds),
        )

    async def restore(self) -> None:
        """Bring back what ran, end what a crash has left, and only then look what else is in the pools."""
        booted = await self.store.write(_note_boot)
        await self.openings.resume(booted=booted)
        await self.uploads.settle()
        await self.operations.settle({**self.pools.settlers(), **self.volumes.settlers()})
        await self.attachments.settle()
        for place in self.places.all():
            try:
                await self.refresher.refresh(place, exact=True)
            except BackendUnreachable:
                # Recorded as inaccessible; the keeper tries again.
                await self.places.remove(place.pool)
            except VirtfleetError as error:
                _log.warning("%s is looked at again: %s", place.pool, error)

    def serve(self, server: Server, hub: WatchHub) -> None:
        """Put the services on a server."""
        volumes = VolumeServicer(self.volumes, self.uploads, self.downloads, self.lists)
        pools = PoolServicer(self.pools, self.lists, self.kinds)
        longrunning = OperationsService(self.operations)
        server.add(_service(pool_pb2, "PoolService"), pools)
        server.add(_service(volume_pb2, "VolumeService"), volumes)
        server.add(_service(watch_pb2, "WatchService"), watch_service(hub))
        server.add(_service(_operations_pb2, "Operations"), longrunning)
        server.add(_service(operations_pb2, "OperationService"), operation_watch_service(hub, self.operations.owner))
        server.add(_service(attachment_pb2, "AttachmentService"), AttachmentServicer(self.attachments), peer=True)
        # Compute makes volumes for new domains on behalf of its callers.
        server.add(_service(pool_pb2, "PoolService"), pools, peer=True)
        server.add(_service(volume_pb2, "VolumeService"), volumes, peer=True)
        server.add(_service(_operations_pb2, "Operations"), longrunning, peer=True)


def _service(module: object, name: str) -> ServiceDescriptor:
    found: ServiceDescriptor = module.DESCRIPTOR.services_by_name[name]  # type: ignore[attr-defined]  # any generated module
    return found


def _note_boot(tx: Transaction) -> bool:
    """Record the boot of the node; returns whether it is another one than at the last start of the service."""
    present = boot_id().encode()
    if tx.get_record(_BOOT, _BOOT_ID) == present:
        return False
    tx.put_record(_BOOT, _BOOT_ID, present)
    return True

"""The network service, put together: the only module that knows all of its parts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from google.longrunning import operations_pb2

from virtfleet.common.v1 import operations_pb2 as common_operations_pb2
from virtfleet.network.v1 import network_pb2, port_pb2, watch_pb2
from virtfleet.node.v1 import plug_pb2
from virtfleet_network import reconcile
from virtfleet_network.backends import registry
from virtfleet_network.catalog import Catalog
from virtfleet_network.networks import Networks
from virtfleet_network.ports import Ports
from virtfleet_network.reconcile import Reconciler
from virtfleet_network.servicers.networks import NetworkServicer
from virtfleet_network.servicers.plugs import PlugServicer
from virtfleet_network.servicers.ports import PortServicer
from virtfleet_network.settings import NetworkSettings
from virtfleet_service.launcher import LauncherClient
from virtfleet_service.longrunning import longrunning_service
from virtfleet_service.operations import Operations
from virtfleet_service.server import Server
from virtfleet_service.settings import SettingsError
from virtfleet_service.store import Store
from virtfleet_service.watch import WatchHub, operation_watch_service, watch_service

__all__ = ["App", "running"]

PACKAGE = "virtfleet.network.v1"
_START_NETWORK = network_pb2.DESCRIPTOR.services_by_name["NetworkService"].methods_by_name["StartNetwork"]
RESOURCE_TYPES = {"network": network_pb2.Network, "port": port_pb2.Port, "lease": network_pb2.Lease}


@dataclass(frozen=True, slots=True)
class App:
    """Is a network service that serves."""

    settings: NetworkSettings
    server: Server
    store: Store


@asynccontextmanager
async def running(settings: NetworkSettings) -> AsyncIterator[App]:
    """Run the network service; it drains and stops when the block ends. Networks, guests' links and dnsmasq run on.

    Raises:
        SettingsError: There is no such back end, or an address cannot be used.
        VirtfleetError: The store or a certificate cannot be used.
    """
    if settings.backend not in registry.backend_ids():
        raise SettingsError(f"backend: there is no `{settings.backend}`; there are {', '.join(registry.backend_ids())}")
    # Others may enter, to reach what is theirs in it; nobody else may list it or read the store.
    settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o711)
    async with (
        Store.open(settings.state_dir / "network.db", package=PACKAGE, resource_types=RESOURCE_TYPES) as store,
        LauncherClient.connect(str(settings.launcher)) as launcher,
    ):
        hub = WatchHub(store, ring_bytes=settings.watch_memory_bytes)
        operations = Operations(store, "network", settings.node)
        context = registry.BackendContext(
            node=settings.node,
            state_dir=settings.state_dir,
            launcher=launcher,
            dnsmasq=settings.dnsmasq,
            nft=settings.nft,
            dnsmasq_uid=settings.dnsmasq_uid,
        )
        backend = registry.create(settings.backend, context)
        networks = Networks(store, operations, backend)
        ports = Ports(store, operations, backend, networks)
        reconciler = Reconciler(
            store=store,
            operations=operations,
            backend=backend,
            networks=networks,
            ports=ports,
            node=settings.node,
            boot_id=reconcile.boot_id(),
            repair_seconds=settings.repair_seconds,
        )
        server = _server(settings, store, hub, operations, networks, ports)
        try:
            await reconciler.start()
            async with _alone(), asyncio.TaskGroup() as tasks, operations.running():
                background = [
                    tasks.create_task(reconciler.run(), name="reconciliation"),
                    tasks.create_task(reconciler.take_news(), name="news of the back end"),
                    tasks.create_task(ports.forget_removed(), name="removed links"),
                ]
                own = reconciler.autostart(lambda: server.own_call(_START_NETWORK), settings.autostart_seconds)
                background.append(tasks.create_task(own, name="autostart"))
                try:
                    async with server:
                        yield App(settings, server, store)
                finally:
                    await operations.drain()
                    for task in background:
                        task.cancel()
        finally:
            await backend.close()


@asynccontextmanager
async def _alone() -> AsyncIterator[None]:
    """Raise an error that a task group has wrapped as it was: its class says how the process ends."""
    try:
        yield
    except ExceptionGroup as group:
        if len(group.exceptions) > 1:
            raise
        raise group.exceptions[0] from None


def _server(
    settings: NetworkSettings, store: Store, hub: WatchHub, operations: Operations, networks: Networks, ports: Ports
) -> Server:
    server = Server(settings, service="network", store_id=lambda: store.store_id)
    catalog = Catalog(store)
    served = NetworkServicer(networks, catalog)
    server.add(network_pb2.DESCRIPTOR.services_by_name["NetworkService"], served)
    # Compute reads the leases of its guests.
    server.add(network_pb2.DESCRIPTOR.services_by_name["NetworkService"], served, peer=True)
    server.add(port_pb2.DESCRIPTOR.services_by_name["PortService"], PortServicer(ports, catalog))
    server.add(watch_pb2.DESCRIPTOR.services_by_name["WatchService"], watch_service(hub))
    server.add(plug_pb2.DESCRIPTOR.services_by_name["PlugService"], PlugServicer(ports), peer=True)
    server.add(operations_pb2.DESCRIPTOR.services_by_name["Operations"], longrunning_service(operations))
    watched = operation_watch_service(hub, operations.owner)
    server.add(common_operations_pb2.DESCRIPTOR.services_by_name["OperationService"], watched)
    server.on_drain(hub.close)
    return server

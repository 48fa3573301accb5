"""The composition root of the compute service: the one module that knows all parts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from google.longrunning import operations_pb2 as longrunning_pb2

from virtfleet.common.v1 import operations_pb2
from virtfleet.compute.v1 import (
    capability_pb2,
    console_pb2,
    domain_pb2,
    guest_agent_pb2,
    host_pb2,
    stats_pb2,
    watch_pb2,
)
from virtfleet_compute import hosts as hosts_module
from virtfleet_compute.addresses import AddressBook
from virtfleet_compute.admission import Admission
from virtfleet_compute.autostart import Autostart
from virtfleet_compute.background import Background
from virtfleet_compute.batches import Batches
from virtfleet_compute.consoles import Consoles
from virtfleet_compute.context import Context
from virtfleet_compute.counters import Counters
from virtfleet_compute.creation import Creation
from virtfleet_compute.domains import Domains
from virtfleet_compute.drivers.api import Driver
from virtfleet_compute.guests import Guests
from virtfleet_compute.holds import Holds
from virtfleet_compute.hosts import Hosts
from virtfleet_compute.hypervisors import Hypervisors, Joined
from virtfleet_compute.observer import Observer
from virtfleet_compute.occupation import Occupation
from virtfleet_compute.power import Power
from virtfleet_compute.reconcile import Reconciler
from virtfleet_compute.servicers.consoles import ConsoleServicer
from virtfleet_compute.servicers.domains import DomainServicer
from virtfleet_compute.servicers.guests import GuestAgentServicer
from virtfleet_compute.servicers.hosts import CapabilityServicer, HostServicer
from virtfleet_compute.servicers.stats import StatsServicer
from virtfleet_compute.settings import ComputeSettings
from virtfleet_compute.sweep import Sweep
from virtfleet_compute.updates import Updates
from virtfleet_compute.wiring import Wiring
from virtfleet_service import admin
from virtfleet_service.longrunning import longrunning_service
from virtfleet_service.operations import Operations
from virtfleet_service.peers import Peer
from virtfleet_service.server import Server
from virtfleet_service.settings import SettingsError
from virtfleet_service.store import Store
from virtfleet_service.watch import WatchHub, operation_watch_service, watch_service

if TYPE_CHECKING:
    from google.protobuf.descriptor import FileDescriptor, ServiceDescriptor

SERVICE_NAME = "compute"
PACKAGE = "virtfleet.compute.v1"
_START_DOMAIN = domain_pb2.DESCRIPTOR.services_by_name["DomainService"].methods_by_name["StartDomain"]
RESOURCE_TYPES = {"domain": domain_pb2.Domain, "host": host_pb2.Host, "driver": capability_pb2.Driver}


@dataclass(frozen=True, slots=True)
class App:
    """Is the running service, for whoever holds it in a process of his own."""

    settings: ComputeSettings
    server: Server
    store: Store
    context: Context


def _service(file: FileDescriptor, name: str) -> ServiceDescriptor:
    found: ServiceDescriptor = file.services_by_name[name]
    return found


@asynccontextmanager
async def running(
    settings: ComputeSettings, *, server_class: type[Server] = Server, in_memory: bool = False
) -> AsyncIterator[App]:
    """Be the compute service while entered: store and host brought together first, then serving.

    Args:
        settings: The settings.
        server_class: How it is reached: by sockets, or by whoever holds it in a process of his own.
        in_memory: Whether the store is in memory alone: the next start knows nothing of this one.

    Raises:
        SettingsError: Something in the settings cannot be used.
        StoreError: The store cannot be opened.
    """
    if not settings.node:
        raise SettingsError("node: the id of this node is needed")
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    async with AsyncExitStack() as stack:
        open_store = Store.open_in_memory if in_memory else Store.open
        store = await stack.enter_async_context(
            open_store(settings.state_dir / "compute.db", package=PACKAGE, resource_types=RESOURCE_TYPES)
        )
        hub = WatchHub(store, ring_bytes=settings.watch_memory_bytes)
        operations = Operations(store, SERVICE_NAME, settings.node)
        server = server_class(settings, service=SERVICE_NAME, store_id=lambda: store.store_id)

        def outgoing() -> list[tuple[str, str]]:
            tracer = server.telemetry.tracer
            return tracer.outgoing() if tracer is not None else []

        peers = [
            await stack.enter_async_context(
                Peer(
                    settings.run_dir / name / "peer.sock",
                    service=SERVICE_NAME,
                    node=settings.node,
                    outgoing=outgoing,
                )
            )
            for name in ("storage", "network")
        ]
        wiring = Wiring(settings.node, peers[0], peers[1], settings.peer_seconds)
        hypervisors = await stack.enter_async_context(Hypervisors(settings).running())
        tasks = await stack.enter_async_context(Background())
        looks: list[Observer] = []
        holds = Holds(lambda uid: looks[0].look(uid) if looks else None)
        context = Context(
            settings=settings,
            store=store,
            operations=operations,
            hypervisors=hypervisors,
            admission=Admission(settings),
            holds=holds,
            wiring=wiring,
            occupation=Occupation(store, holds, tasks),
            batched={},
        )
        guests = Guests(context)
        creation = Creation(context, guests)
        domains = Domains(context, guests, creation)
        power = Power(context, guests)
        boot_id = admin.boot_id()
        autostart = Autostart(context, power, boot_id, lambda: server.own_call(_START_DOMAIN))
        hosts = Hosts(context, boot_id)
        await hosts_module.forget_drivers(store, settings.node, settings.enabled_drivers)
        await context.occupation.forget()
        reconciler = Reconciler(context, creation, domains, rebooted=autostart.rebooted)
        await reconciler.run()
        # Not before: what is allocated is counted anew by reconciliation, and the first who ask must not read 0.
        await hosts.store()
        observer = Observer(context, guests, tasks)
        looks.append(observer)
        for driver in hypervisors.ready():
            observer.listen(driver)
        await stack.enter_async_context(operations.running(drain_seconds=settings.drain_seconds))
        consoles = Consoles(context)
        addresses = AddressBook(context)
        batches = Batches(context, guests, creation, domains, power)
        _register(
            server,
            {
                domain_pb2.DESCRIPTOR: {
                    "DomainService": DomainServicer(
                        domains, Updates(context, guests, creation, domains), power, batches
                    )
                },
                console_pb2.DESCRIPTOR: {"ConsoleService": ConsoleServicer(consoles)},
                stats_pb2.DESCRIPTOR: {"StatsService": StatsServicer(Counters(context), hosts)},
                host_pb2.DESCRIPTOR: {"HostService": HostServicer(hosts)},
                capability_pb2.DESCRIPTOR: {"CapabilityService": CapabilityServicer(hosts)},
                guest_agent_pb2.DESCRIPTOR: {"GuestAgentService": GuestAgentServicer(addresses)},
                watch_pb2.DESCRIPTOR: {"WatchService": watch_service(hub)},
                operations_pb2.DESCRIPTOR: {"OperationService": operation_watch_service(hub, operations.owner)},
                longrunning_pb2.DESCRIPTOR: {"Operations": longrunning_service(operations)},
            },
        )
        server.on_drain(consoles.drain)
        server.on_drain(hub.close)
        await stack.enter_async_context(server)
        tasks.create_task(Sweep(context, creation, reconciler).run(), name="sweep")
        tasks.create_task(hypervisors.watch(_joining(reconciler, observer, wiring, hosts)), name="drivers")
        tasks.create_task(autostart.run(), name="autostart")
        tasks.create_task(hosts.run(), name="host")
        tasks.create_task(addresses.run(), name="addresses")
        yield App(settings, server, store, context)


def _joining(reconciler: Reconciler, observer: Observer, wiring: Wiring, hosts: Hosts) -> Joined:
    """Return what takes in a driver that has come to run."""

    async def joined(driver: Driver) -> None:
        await reconciler.take_in(driver, observer.record)
        observer.listen(driver)
        for wanted in wiring.unswept.values():
            wanted.set()
        await hosts.store()

    return joined


def _register(server: Server, services: dict[FileDescriptor, dict[str, object]]) -> None:
    for file, implementations in services.items():
        for name, implementation in implementations.items():
            server.add(_service(file, name), implementation)

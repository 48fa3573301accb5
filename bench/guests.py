"""Guests of QEMU on the stage: with a qcow2 disk, a port of a NAT network and a serial console."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path

from google.protobuf import empty_pb2

from bench import bare, stage
from bench.stage import Stage
from virtfleet.compute.v1 import domain_pb2
from virtfleet.network.v1 import network_pb2
from virtfleet.storage.v1 import pool_pb2, volume_pb2
from virtfleet_client import AsyncFleet

_MIB = 1 << 20


@asynccontextmanager
async def defined(on: Stage, direct: AsyncFleet, count: int) -> AsyncIterator[list[str]]:
    """Define guests; they, their disks, the pool and the network are gone at the end.

    Args:
        on: Where.
        direct: A connection to the compute service.
        count: How many.
    """
    fleet = await on.fleet()
    gateway = await on.connect(fleet)
    parent, place = f"nodes/{stage.NODE}", on.unique("bench")
    await _make_pool(gateway, parent, place)
    await _make_network(gateway, parent, place)
    names = [await _define(on, direct, parent, place) for _ in range(count)]
    yield names
    for name in names:
        delete = domain_pb2.DeleteDomainRequest(name=name, stop=True, delete_volumes=True)
        await stage.ready(direct, await direct.domains.DeleteDomain(delete), empty_pb2.Empty)
    network, pool = f"{parent}/networks/{place}", f"{parent}/pools/{place}"
    stop = network_pb2.StopNetworkRequest(name=network)
    await stage.ready(gateway, await gateway.networks.StopNetwork(stop), network_pb2.Network)
    await stage.ready(
        gateway, await gateway.networks.DeleteNetwork(network_pb2.DeleteNetworkRequest(name=network)), empty_pb2.Empty
    )
    await stage.ready(gateway, await gateway.pools.StopPool(pool_pb2.StopPoolRequest(name=pool)), pool_pb2.Pool)
    await stage.ready(gateway, await gateway.pools.DeletePool(pool_pb2.DeletePoolRequest(name=pool)), empty_pb2.Empty)


async def _make_pool(gateway: AsyncFleet, parent: str, pool_id: str) -> None:
    request = pool_pb2.CreatePoolRequest(parent=parent, pool_id=pool_id, start=True)
    request.pool.spec.dir.SetInParent()
    await stage.ready(gateway, await gateway.pools.CreatePool(request), pool_pb2.Pool)


async def _make_network(gateway: AsyncFleet, parent: str, network_id: str) -> None:
    request = network_pb2.CreateNetworkRequest(parent=parent, network_id=network_id, start=True)
    request.network.spec.nat.SetInParent()
    lan = request.network.spec.subnets["lan"]
    lan.prefix = "192.168.178.0/24"
    lan.dhcp.ranges.add(first="192.168.178.10", last="192.168.178.200")
    await stage.ready(gateway, await gateway.networks.CreateNetwork(request), network_pb2.Network)


async def _define(on: Stage, direct: AsyncFleet, parent: str, place: str) -> str:
    request = domain_pb2.CreateDomainRequest(parent=parent, domain_id=on.unique("guest"))
    spec = request.domain.spec
    spec.driver = "qemu"
    spec.cpu.vcpu_count = 1
    spec.memory.maximum_bytes = 160 * _MIB
    disk = request.new_volumes.add(pool=f"pools/{place}", volume_id=request.domain_id)
    disk.spec.format = volume_pb2.VOLUME_FORMAT_QCOW2
    disk.spec.capacity_bytes = 1 << 30
    spec.disks["root"].volume = f"pools/{place}/volumes/{request.domain_id}"
    spec.interfaces["lan"].network = f"networks/{place}"
    spec.serials["tty"].SetInParent()
    domain = await stage.ready(direct, await direct.domains.CreateDomain(request), domain_pb2.Domain)
    return domain.name


async def start(direct: AsyncFleet, name: str) -> float:
    """Start a guest paused; returns the seconds of the call.

    Raises:
        RuntimeError: It is not paused afterwards, or the call ended before the operation.
    """
    request = domain_pb2.StartDomainRequest(name=name, paused=True)
    request.inline_wait.FromSeconds(30)
    began = time.perf_counter()
    operation = await direct.domains.StartDomain(request)
    took = time.perf_counter() - began
    if not operation.done:
        raise RuntimeError(f"{operation.name} has not ended within 30 s")
    domain = await stage.ready(direct, operation, domain_pb2.Domain)
    if domain.status.state != domain_pb2.DOMAIN_STATE_PAUSED:
        raise RuntimeError(f"{name} is {domain_pb2.DomainState.Name(domain.status.state)} after a paused start")
    return took


async def stop(direct: AsyncFleet, name: str) -> float:
    """Stop a guest by force; returns the seconds of the call."""
    request = domain_pb2.StopDomainRequest(name=name, mode=domain_pb2.STOP_MODE_FORCE)
    request.inline_wait.FromSeconds(30)
    began = time.perf_counter()
    operation = await direct.domains.StopDomain(request)
    took = time.perf_counter() - began
    await stage.ready(direct, operation, domain_pb2.Domain)
    return took


async def twin(direct: AsyncFleet, name: str, folder: Path) -> AbstractContextManager[bare.Guest]:
    """Start a guest of ours once to learn its arguments, and stop it; returns the context of its bare twin."""
    await start(direct, name)
    domain = await direct.domains.GetDomain(domain_pb2.GetDomainRequest(name=name))
    argv = bare.arguments_of(domain.status.pid)
    await stop(direct, name)
    return bare.adapted(argv, folder)

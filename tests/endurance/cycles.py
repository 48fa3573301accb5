"""Whole lives of guests on a fleet: made with disk and port, started, stopped, deleted, again and again."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from google.longrunning import operations_pb2
from google.protobuf import empty_pb2

from bench.stage import NODE, ready
from virtfleet.compute.v1 import domain_pb2
from virtfleet.network.v1 import network_pb2
from virtfleet.storage.v1 import pool_pb2, volume_pb2
from virtfleet_client import AsyncFleet

MIB = 1 << 20
CALLERS = 4
PARENT = f"nodes/{NODE}"


@dataclass(slots=True)
class Ground:
    """Is a pool and a NAT network that run, and what lives on them.

    Attributes:
        fleet: A connection to the gateway.
        place: The id of pool and network.
    """

    fleet: AsyncFleet
    place: str
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    async def lives(self, count: int, *, ended: Callable[[], object] = lambda: None) -> None:
        """Let so many guests live and die, a few at a time.

        Args:
            count: How many.
            ended: Is called after each.
        """
        left = iter(range(count))

        async def caller() -> None:
            for _ in left:
                await self.life(f"guest-{next(self._numbers)}")
                ended()

        async with asyncio.TaskGroup() as group:
            for _ in range(CALLERS):
                group.create_task(caller())

    async def life(self, domain_id: str) -> None:
        """Make a guest of QEMU, start it paused, stop it, delete it and its disk."""
        request = domain_pb2.CreateDomainRequest(parent=PARENT, domain_id=domain_id)
        spec = request.domain.spec
        spec.driver = "qemu"
        spec.cpu.vcpu_count = 1
        spec.memory.maximum_bytes = 64 * MIB
        disk = request.new_volumes.add(pool=f"pools/{self.place}", volume_id=domain_id)
        disk.spec.format = volume_pb2.VOLUME_FORMAT_QCOW2
        disk.spec.capacity_bytes = 64 * MIB
        spec.disks["root"].volume = f"pools/{self.place}/volumes/{domain_id}"
        spec.interfaces["lan"].network = f"networks/{self.place}"
        spec.serials["tty"].SetInParent()
        name = f"{PARENT}/domains/{domain_id}"
        await self._done(self.fleet.domains.CreateDomain(request))
        domain = await self._done(
            self.fleet.domains.StartDomain(domain_pb2.StartDomainRequest(name=name, paused=True)),
        )
        assert domain.status.state == domain_pb2.DOMAIN_STATE_PAUSED, domain.status
        assert domain.status.pid
        stop = domain_pb2.StopDomainRequest(name=name, mode=domain_pb2.STOP_MODE_FORCE)
        await self._done(self.fleet.domains.StopDomain(stop))
        delete = domain_pb2.DeleteDomainRequest(name=name, delete_volumes=True)
        await ready(self.fleet, await self.fleet.domains.DeleteDomain(delete), empty_pb2.Empty)

    async def _done(self, call: asyncio.Future[operations_pb2.Operation]) -> domain_pb2.Domain:
        return await ready(self.fleet, await call, domain_pb2.Domain)


@asynccontextmanager
async def ground(fleet: AsyncFleet, place: str = "endurance") -> AsyncIterator[Ground]:
    """Make the pool and the network that guests need; the block ends with both gone."""
    pool = pool_pb2.CreatePoolRequest(parent=PARENT, pool_id=place, start=True)
    pool.pool.spec.dir.SetInParent()
    await ready(fleet, await fleet.pools.CreatePool(pool), pool_pb2.Pool)
    network = network_pb2.CreateNetworkRequest(parent=PARENT, network_id=place, start=True)
    network.network.spec.nat.SetInParent()
    lan = network.network.spec.subnets["lan"]
    lan.prefix = "192.168.179.0/24"
    lan.dhcp.ranges.add(first="192.168.179.10", last="192.168.179.200")
    await ready(fleet, await fleet.networks.CreateNetwork(network), network_pb2.Network)
    yield Ground(fleet, place)
    name = f"{PARENT}/networks/{place}"
    await ready(fleet, await fleet.networks.StopNetwork(network_pb2.StopNetworkRequest(name=name)), network_pb2.Network)
    await ready(fleet, await fleet.networks.DeleteNetwork(network_pb2.DeleteNetworkRequest(name=name)), empty_pb2.Empty)
    name = f"{PARENT}/pools/{place}"
    await ready(fleet, await fleet.pools.StopPool(pool_pb2.StopPoolRequest(name=name)), pool_pb2.Pool)
    await ready(fleet, await fleet.pools.DeletePool(pool_pb2.DeletePoolRequest(name=name)), empty_pb2.Empty)


async def churn(on: Ground, count: int) -> None:
    """Change labels of a domain, the pool and the network so often.

    What servers keep of the newest changes for watchers is bounded, and full after that: guests' lives, which take a
    sixth of a second each, would fill it too, but not while somebody waits.
    """
    request = domain_pb2.CreateDomainRequest(parent=PARENT, domain_id="churn")
    request.domain.spec.driver = "test"
    request.domain.spec.memory.maximum_bytes = 64 * MIB
    await ready(on.fleet, await on.fleet.domains.CreateDomain(request), domain_pb2.Domain)
    updates = (
        (domain_pb2.UpdateDomainRequest, "domain", f"{PARENT}/domains/churn", on.fleet.domains.UpdateDomain),
        (pool_pb2.UpdatePoolRequest, "pool", f"{PARENT}/pools/{on.place}", on.fleet.pools.UpdatePool),
        (network_pb2.UpdateNetworkRequest, "network", f"{PARENT}/networks/{on.place}", on.fleet.networks.UpdateNetwork),
    )
    async with asyncio.TaskGroup() as group:
        for kind, noun, name, method in updates:
            group.create_task(_change(on, kind, noun, name, method, count))
    delete = domain_pb2.DeleteDomainRequest(name=f"{PARENT}/domains/churn")
    await ready(on.fleet, await on.fleet.domains.DeleteDomain(delete), empty_pb2.Empty)


async def _change(on: Ground, kind: Any, noun: str, name: str, method: Any, count: int) -> None:
    for number in range(count):
        request = kind()
        resource = getattr(request, noun)
        resource.name = name
        resource.annotations["endurance/note"] = f"{number} " + "n" * 1000
        request.update_mask.paths.append("annotations")
        operation = await method(request)
        if not operation.done:
            await ready(on.fleet, operation, type(resource))

"""What the tests of the store and of what stands on it share: a store of the compute package, domains, calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from google.protobuf import descriptor_pool
from google.protobuf.descriptor import MethodDescriptor

from virtfleet.compute.v1 import capability_pb2, domain_pb2, host_pb2, watch_pb2
from virtfleet_service import resources
from virtfleet_service.authorization import Authorizer
from virtfleet_service.call import Call, Caller
from virtfleet_service.methods import facts_of
from virtfleet_service.store import Limits, Store
from virtfleet_service.watch import WatchHub

PACKAGE = "virtfleet.compute.v1"
TYPES = {"domain": domain_pb2.Domain, "host": host_pb2.Host, "driver": capability_pb2.Driver}
START = "virtfleet.compute.v1.DomainService.StartDomain"
TEST_CAUSE = "test"


def open_store(path: Path, limits: Limits | None = None) -> AbstractAsyncContextManager[Store]:
    return Store.open(path, package=PACKAGE, resource_types=TYPES, limits=limits)


def domain(id_: str, *, node: str = "n1", env: str = "", state: str = "SHUT_OFF") -> domain_pb2.Domain:
    made = domain_pb2.Domain()
    if env:
        made.labels["env"] = env
    resources.create_head(made, f"nodes/{node}/domains/{id_}")
    made.spec.memory.maximum_bytes = 1 << 30
    made.spec.disks["root"].volume = "pools/p/volumes/v"
    made.status.state = domain_pb2.DomainState.Value(f"DOMAIN_STATE_{state}")
    made.status.resolved_spec.memory.maximum_bytes = 1 << 30
    made.status.active_spec.memory.maximum_bytes = 1 << 30
    return made


async def put(store: Store, *domains: domain_pb2.Domain) -> None:
    await store.write(lambda tx: [tx.put("domain", one, cause=TEST_CAUSE) for one in domains])


def call(
    method: str = START, *, subject: str = "spiffe://virtfleet.dev/user/a", roles: tuple[str, ...] = ("admin",)
) -> Call:
    service, _, name = method.rpartition(".")
    pool = descriptor_pool.Default()
    descriptor: MethodDescriptor = pool.FindServiceByName(service).methods_by_name[name]
    return Call(facts_of(descriptor), Caller(subject, roles), Authorizer())


class Watcher:
    """Reads a watch until a condition holds."""

    def __init__(self, stream: AsyncIterator[bytes]) -> None:
        self.stream = stream
        self.messages: list[watch_pb2.WatchResourcesResponse] = []

    async def read(self) -> watch_pb2.WatchResourcesResponse:
        async with asyncio.timeout(5):
            message = watch_pb2.WatchResourcesResponse.FromString(await anext(self.stream))
        self.messages.append(message)
        return message

    async def until(self, count: int) -> list[watch_pb2.Change]:
        """Read until so many changes have come; return exactly what has come."""
        changes: list[watch_pb2.Change] = []
        while len(changes) < count:
            changes += (await self.read()).changes
        return changes

    async def snapshot(self) -> list[watch_pb2.Change]:
        changes: list[watch_pb2.Change] = []
        while True:
            message = await self.read()
            changes += message.changes
            if message.WhichOneof("marker") == "snapshot_end":
                return changes

    @property
    def token(self) -> str:
        return self.messages[-1].resume_token


@asynccontextmanager
async def watching(hub: WatchHub, request: watch_pb2.WatchResourcesRequest | None = None) -> AsyncIterator[Watcher]:
    stream = hub.stream(request or watch_pb2.WatchResourcesRequest(parent="nodes/n1"))
    try:
        yield Watcher(stream)
    finally:
        await stream.aclose()  # type: ignore[attr-defined]  # an async generator

# ruff: noqa: ARG002 - handlers have the signature that the pipeline calls
"""A node for tests of the gateway: three real servers with stores, watches and mutual TLS, and the simplest of handlers.

python -m tests.integration.gateway.node_process STATE_DIR NODE COMPUTE_PORT STORAGE_PORT NETWORK_PORT
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from google.longrunning import operations_pb2
from google.rpc import status_pb2

from virtfleet.compute.v1 import capability_pb2, console_pb2, domain_pb2, host_pb2, stats_pb2
from virtfleet.compute.v1 import watch_pb2 as compute_watch
from virtfleet.network.v1 import network_pb2, port_pb2
from virtfleet.network.v1 import watch_pb2 as network_watch
from virtfleet.storage.v1 import pool_pb2, volume_pb2
from virtfleet.storage.v1 import watch_pb2 as storage_watch
from virtfleet_service import paging, resources, server
from virtfleet_service.call import Call
from virtfleet_service.errors import ResourceNotFound
from virtfleet_service.settings import ServiceSettings, TelemetrySettings
from virtfleet_service.store import Store
from virtfleet_service.transaction import Transaction
from virtfleet_service.watch import WatchHub, watch_service

TYPES: dict[str, dict[str, Any]] = {
    "compute": {"domain": domain_pb2.Domain, "host": host_pb2.Host, "driver": capability_pb2.Driver},
    "storage": {"pool": pool_pb2.Pool, "volume": volume_pb2.Volume},
    "network": {"network": network_pb2.Network, "port": port_pb2.Port, "lease": network_pb2.Lease},
}
WATCHES: dict[str, Any] = {"compute": compute_watch, "storage": storage_watch, "network": network_watch}


class Domains:
    def __init__(self, store: Store, node: str) -> None:
        self._store = store
        self._node = node

    async def list_domains(self, request: domain_pb2.ListDomainsRequest, call: Call) -> bytes:
        return paging.list_reply(self._store, "domain", request, domain_pb2.ListDomainsResponse, call=call)

    async def get_domain(self, request: domain_pb2.GetDomainRequest, call: Call) -> bytes:
        return self._store.find("domain", request.name).body

    async def batch_get_domains(
        self, request: domain_pb2.BatchGetDomainsRequest, call: Call
    ) -> domain_pb2.BatchGetDomainsResponse:
        answer = domain_pb2.BatchGetDomainsResponse()
        for name in request.names:
            row = self._store.get(name)
            if row is None:
                answer.results.add(name=name, status=status_pb2.Status(code=5, message="gone"))
            else:
                answer.results.add(name=name, domain=domain_pb2.Domain.FromString(row.body))
        return answer

    async def create_domain(self, request: domain_pb2.CreateDomainRequest, call: Call) -> operations_pb2.Operation:
        domain = domain_pb2.Domain()
        domain.CopyFrom(request.domain)
        resources.create_head(domain, f"{request.parent}/domains/{request.domain_id}")
        domain.status.state = domain_pb2.DOMAIN_STATE_SHUT_OFF
        return await self._put(domain, "CreateDomain")

    async def update_domain(self, request: domain_pb2.UpdateDomainRequest, call: Call) -> operations_pb2.Operation:
        row = self._store.need(request.domain.name)
        domain = domain_pb2.Domain.FromString(row.body)
        domain.labels.clear()
        domain.labels.update(request.domain.labels)
        resources.touch(domain)
        return await self._put(domain, "UpdateDomain")

    async def delete_domain(self, request: domain_pb2.DeleteDomainRequest, call: Call) -> operations_pb2.Operation:
        def delete(tx: Transaction) -> None:
            if not tx.delete(request.name, cause="DeleteDomain"):
                raise ResourceNotFound("gone", resource=request.name)

        await self._store.write(delete)
        return operations_pb2.Operation(name=f"nodes/{self._node}/services/compute/operations/x", done=True)

    async def start_domain(self, request: domain_pb2.StartDomainRequest, call: Call) -> operations_pb2.Operation:
        """Tells a state change as an event, and who asked for it."""
        domain = domain_pb2.Domain.FromString(self._store.need(request.name).body)
        event = compute_watch.Event(
            resource=domain.name,
            uid=domain.uid,
            type=compute_watch.EVENT_TYPE_DOMAIN_STATE_CHANGED,
            message=f"{call.caller.subject} via {call.caller.via}",
        )
        await self._store.write(lambda tx: tx.event(event))
        return operations_pb2.Operation(name=f"nodes/{self._node}/services/compute/operations/y", done=True)

    async def _put(self, domain: domain_pb2.Domain, cause: str) -> operations_pb2.Operation:
        await self._store.write(lambda tx: tx.put("domain", domain, cause=cause))
        operation = operations_pb2.Operation(name=f"nodes/{self._node}/services/compute/operations/z", done=True)
        operation.response.Pack(domain)
        return operation


class Stats:
    def __init__(self, store: Store) -> None:
        self._store = store

    async def batch_get_domain_stats(
        self, request: stats_pb2.BatchGetDomainStatsRequest, call: Call
    ) -> stats_pb2.BatchGetDomainStatsResponse:
        page = paging.read_page(self._store, "domain", request.parent, request, call=call)
        answer = stats_pb2.BatchGetDomainStatsResponse(next_page_token=page.next_page_token)
        for item in page.items:
            assert isinstance(item, bytes)
            domain = domain_pb2.Domain.FromString(item)
            if not request.names or domain.name in request.names:
                answer.stats.add(name=domain.name, uid=domain.uid)
        return answer


class Consoles:
    async def open_console(
        self, requests: AsyncIterator[console_pb2.OpenConsoleRequest], call: Call
    ) -> AsyncIterator[console_pb2.OpenConsoleResponse]:
        async for request in requests:
            yield console_pb2.OpenConsoleResponse(data=console_pb2.ConsoleData(data=request.data))


@asynccontextmanager
async def node(state: Path, name: str, ports: dict[str, int]) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        for service, port in ports.items():
            settings = ServiceSettings(
                node=name,
                state_dir=state,
                run_dir=state / "r",
                listen=f"127.0.0.1:{port}",
                identity_dir=state / "identity",
                drain_seconds=1.0,
                telemetry=TelemetrySettings(otlp_endpoint=os.environ.get("VIRTFLEET_TELEMETRY_OTLP_ENDPOINT", "")),
            )
            store = await stack.enter_async_context(
                Store.open(state / f"{service}.db", package=f"virtfleet.{service}.v1", resource_types=TYPES[service])
            )
            hub = WatchHub(store)
            serving = server.Server(settings, service=service, store_id=store.store_id.__str__)
            serving.add(WATCHES[service].DESCRIPTOR.services_by_name["WatchService"], watch_service(hub))
            if service == "compute":
                serving.add(domain_pb2.DESCRIPTOR.services_by_name["DomainService"], Domains(store, name))
                serving.add(stats_pb2.DESCRIPTOR.services_by_name["StatsService"], Stats(store))
                serving.add(console_pb2.DESCRIPTOR.services_by_name["ConsoleService"], Consoles())
                await _put_host(store, name)
            serving.on_drain(hub.close)
            await stack.enter_async_context(serving)
        yield


async def _put_host(store: Store, name: str) -> None:
    await store.write(lambda tx: tx.put("host", _host(name), cause="observed"))


def _host(name: str) -> host_pb2.Host:
    host = host_pb2.Host()
    resources.create_head(host, f"nodes/{name}/host", uid=f"00000000-0000-4000-8000-{abs(hash(name)) % 10**12:012d}")
    host.status.cpu.online_count = 8
    host.status.memory_total_bytes = 1 << 34
    host.status.allocatable.memory_bytes = 1 << 33
    host.status.allocated.domain_count = 3
    return host


def main() -> int:
    state, name, *ports = sys.argv[1:]
    numbers = dict(zip(("compute", "storage", "network"), map(int, ports), strict=True))
    return server.main(lambda: node(Path(state), name, numbers))


if __name__ == "__main__":
    sys.exit(main())

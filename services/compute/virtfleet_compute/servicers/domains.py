"""DomainService."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.longrunning import operations_pb2

from virtfleet.compute.v1 import domain_pb2
from virtfleet_compute.batches import Batches
from virtfleet_compute.domains import Domains
from virtfleet_compute.power import Power
from virtfleet_compute.updates import Updates

if TYPE_CHECKING:
    from virtfleet_service.call import Call

Operation = operations_pb2.Operation


class DomainServicer:
    """Serves `virtfleet.compute.v1.DomainService`."""

    def __init__(self, domains: Domains, updates: Updates, power: Power, batches: Batches) -> None:
        self._domains = domains
        self._updates = updates
        self._power = power
        self._batches = batches

    async def list_domains(self, request: domain_pb2.ListDomainsRequest, call: Call) -> bytes:
        """Answer ListDomains."""
        return self._domains.page(request, call)

    async def get_domain(self, request: domain_pb2.GetDomainRequest, call: Call) -> bytes:
        """Answer GetDomain."""
        return self._domains.get(request.name, request.view, call)

    async def batch_get_domains(self, request: domain_pb2.BatchGetDomainsRequest, call: Call) -> bytes:
        """Answer BatchGetDomains."""
        return self._domains.batch_get(request, call)

    async def create_domain(self, request: domain_pb2.CreateDomainRequest, call: Call) -> Operation:
        """Answer CreateDomain."""
        return await self._domains.create(request, call)

    async def update_domain(self, request: domain_pb2.UpdateDomainRequest, call: Call) -> Operation:
        """Answer UpdateDomain."""
        return await self._updates.update(request, call)

    async def delete_domain(self, request: domain_pb2.DeleteDomainRequest, call: Call) -> Operation:
        """Answer DeleteDomain."""
        return await self._domains.delete(request, call)

    async def start_domain(self, request: domain_pb2.StartDomainRequest, call: Call) -> Operation:
        """Answer StartDomain."""
        return await self._power.start(request, call)

    async def stop_domain(self, request: domain_pb2.StopDomainRequest, call: Call) -> Operation:
        """Answer StopDomain."""
        return await self._power.stop(request, call)

    async def reboot_domain(self, request: domain_pb2.RebootDomainRequest, call: Call) -> Operation:
        """Answer RebootDomain."""
        return await self._power.reboot(request, call)

    async def reset_domain(self, request: domain_pb2.ResetDomainRequest, call: Call) -> Operation:
        """Answer ResetDomain."""
        return await self._power.reset(request, call)

    async def suspend_domain(self, request: domain_pb2.SuspendDomainRequest, call: Call) -> Operation:
        """Answer SuspendDomain."""
        return await self._power.suspend(request, call)

    async def resume_domain(self, request: domain_pb2.ResumeDomainRequest, call: Call) -> Operation:
        """Answer ResumeDomain."""
        return await self._power.resume(request, call)

    async def batch_create_domains(self, request: domain_pb2.BatchCreateDomainsRequest, call: Call) -> Operation:
        """Answer BatchCreateDomains."""
        return await self._batches.create(request, call)

    async def batch_start_domains(self, request: domain_pb2.BatchStartDomainsRequest, call: Call) -> Operation:
        """Answer BatchStartDomains."""
        return await self._batches.start(request, call)

    async def batch_stop_domains(self, request: domain_pb2.BatchStopDomainsRequest, call: Call) -> Operation:
        """Answer BatchStopDomains."""
        return await self._batches.stop(request, call)

    async def batch_delete_domains(self, request: domain_pb2.BatchDeleteDomainsRequest, call: Call) -> Operation:
        """Answer BatchDeleteDomains."""
        return await self._batches.delete(request, call)

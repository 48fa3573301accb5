"""Counters of domains, for one, for many, and again and again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import TYPE_CHECKING

from virtfleet.compute.v1 import domain_pb2, stats_pb2
from virtfleet_compute import statuses
from virtfleet_compute.context import KIND, Context, ref
from virtfleet_compute.drivers.facets import Stats
from virtfleet_service import filters, paging, resources, tokens
from virtfleet_service.errors import CapabilityMissing, OperationTimedOut, VirtfleetError
from virtfleet_service.peers import error_from_status

if TYPE_CHECKING:
    from virtfleet_service.call import Call

DEFAULT_INTERVAL_SECONDS = 10.0
COLLECT_SECONDS = 5.0
MESSAGE_COUNT = 250
"""How many domains one message of a stream holds at most."""

Groups = frozenset[stats_pb2.StatsGroup.ValueType]

ALL_GROUPS: Groups = frozenset(stats_pb2.StatsGroup.values()) - {stats_pb2.STATS_GROUP_UNSPECIFIED}


class Counters:
    """Reads the counters of domains from their drivers."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def get(self, request: stats_pb2.GetDomainStatsRequest, call: Call) -> stats_pb2.DomainStats:
        """Return the counters of a domain.

        Raises:
            ResourceNotFound: There is none.
            PermissionMissing: The caller may not see it.
            CapabilityMissing: Its driver has no counters.
        """
        domain = self._context.find(request.name)
        call.authorize(domain.name)
        if statuses.is_active(domain):
            self._context.facet(domain, Stats)  # type: ignore[type-abstract]  # a protocol names the facet
        answer = (await self.collect([domain], request.groups))[0]
        if answer.HasField("failure"):
            raise error_from_status(answer.failure)
        return answer

    async def page(
        self, request: stats_pb2.BatchGetDomainStatsRequest, call: Call
    ) -> stats_pb2.BatchGetDomainStatsResponse:
        """Return a page of counters.

        Raises:
            PageTokenInvalid: The token is of another list.
            FilterSyntax: The filter does not parse.
        """
        if request.names:
            return await self._page_of_names(request, call)
        found = paging.read_page(self._context.store, KIND, request.parent, request, view=0, call=call)
        return stats_pb2.BatchGetDomainStatsResponse(
            stats=await self.collect([_decoded(item) for item in found.items], request.groups),
            next_page_token=found.next_page_token,
        )

    async def _page_of_names(
        self, request: stats_pb2.BatchGetDomainStatsRequest, call: Call
    ) -> stats_pb2.BatchGetDomainStatsResponse:
        key = self._context.store.token_key
        binding = tokens.binding_of("stats", request.parent, request.filter, *request.names)
        place = int(tokens.unseal(key, binding, request.page_token)) if request.page_token else 0
        end = min(place + paging.page_size_of(request), len(request.names))
        answer = stats_pb2.BatchGetDomainStatsResponse()
        while place < end and answer.ByteSize() < paging.PAGE_LIMIT_BYTES:
            part = request.names[place : min(place + MESSAGE_COUNT, end)]
            answer.stats.extend(await self._collect_named(part, request.filter, request.groups, call))
            place += len(part)
        if place < len(request.names):
            answer.next_page_token = tokens.seal(key, binding, str(place).encode())
        return answer

    async def stream(
        self, request: stats_pb2.StreamDomainStatsRequest, call: Call
    ) -> AsyncIterator[stats_pb2.StreamDomainStatsResponse]:
        """Yield rounds of counters; the next round begins an interval after the one before, or when that was taken."""
        interval_seconds = DEFAULT_INTERVAL_SECONDS
        if request.HasField("interval"):
            interval_seconds = request.interval.ToNanoseconds() / 1e9
        loop = asyncio.get_running_loop()
        number = 0
        due = loop.time()
        while True:
            number += 1
            domains = [] if request.names else self._all(request, call)
            count = len(request.names) or len(domains)
            for start in range(0, max(count, 1), MESSAGE_COUNT):
                part = slice(start, start + MESSAGE_COUNT)
                if request.names:
                    found = await self._collect_named(request.names[part], request.filter, request.groups, call)
                else:
                    found = await self.collect(domains[part], request.groups)
                yield stats_pb2.StreamDomainStatsResponse(
                    stats=found, round_number=number, round_end=start + MESSAGE_COUNT >= count
                )
            due = max(due + interval_seconds, loop.time())
            await asyncio.sleep(due - loop.time())

    def _all(self, request: stats_pb2.StreamDomainStatsRequest, call: Call) -> list[domain_pb2.Domain]:
        page_request = stats_pb2.BatchGetDomainStatsRequest(
            parent=request.parent, filter=request.filter, page_size=paging.PAGE_SIZE_LIMIT
        )
        domains: list[domain_pb2.Domain] = []
        while True:
            found = paging.read_page(self._context.store, KIND, request.parent, page_request, view=0, call=call)
            domains += [_decoded(item) for item in found.items]
            if not found.next_page_token:
                return domains
            page_request.page_token = found.next_page_token

    async def _collect_named(
        self, wanted: Sequence[str], text: str, groups: Iterable[stats_pb2.StatsGroup.ValueType], call: Call
    ) -> list[stats_pb2.DomainStats]:
        """Return the counters of domains by their names.

        One that is not there has a failure; one that does not match is left out.
        """
        matches = filters.compile_filter(text, domain_pb2.Domain) if text else None
        found: list[domain_pb2.Domain | stats_pb2.DomainStats] = []
        for name in wanted:
            try:
                domain = self._context.find(name)
                call.authorize(domain.name)
                if matches is None or matches(domain):
                    found.append(domain)
            except VirtfleetError as error:
                found.append(stats_pb2.DomainStats(name=name, failure=error.to_status()))
        domains = [one for one in found if isinstance(one, domain_pb2.Domain)]
        counted = iter(await self.collect(domains, groups))
        return [next(counted) if isinstance(one, domain_pb2.Domain) else one for one in found]

    async def collect(
        self, domains: Sequence[domain_pb2.Domain], groups: Iterable[stats_pb2.StatsGroup.ValueType]
    ) -> list[stats_pb2.DomainStats]:
        """Return the counters of domains, in their order. A failure of a driver is that of its domains."""
        wanted: Groups = frozenset(groups) or ALL_GROUPS
        now = resources.now()
        answers: dict[str, stats_pb2.DomainStats] = {}
        by_driver: dict[str, list[domain_pb2.Domain]] = {}
        for domain in domains:
            if statuses.is_active(domain):
                by_driver.setdefault(domain.status.resolved_spec.driver, []).append(domain)
        for driver_id, active in by_driver.items():
            for domain, answer in zip(active, await self._ask(driver_id, active, wanted), strict=True):
                answers[domain.uid] = answer
        found = []
        for domain in domains:
            answer = answers.get(domain.uid, stats_pb2.DomainStats())
            answer.name, answer.uid = domain.name, domain.uid
            answer.runtime_id = domain.status.runtime_id
            answer.observe_time.CopyFrom(now)
            if stats_pb2.STATS_GROUP_STATE in wanted:
                answer.state.state = domain.status.state
                answer.state.reason = domain.status.state_reason
            found.append(answer)
        return found

    async def _ask(
        self, driver_id: str, domains: Sequence[domain_pb2.Domain], groups: Groups
    ) -> Sequence[stats_pb2.DomainStats]:
        failure: VirtfleetError
        try:
            facet = self._context.hypervisors.get(driver_id).facet(Stats)  # type: ignore[type-abstract]  # a protocol
            if facet is None:
                raise CapabilityMissing(
                    f"driver {driver_id} lacks domain.stats", driver=driver_id, capability="domain.stats"
                )
            async with asyncio.timeout(COLLECT_SECONDS):
                return await facet.domain_stats([ref(domain) for domain in domains], groups)
        except VirtfleetError as error:
            failure = error
        except TimeoutError:
            failure = OperationTimedOut(
                f"driver {driver_id} did not give its counters within {COLLECT_SECONDS:g} s", driver=driver_id
            )
        return [stats_pb2.DomainStats(failure=failure.to_status()) for _ in domains]


def _decoded(item: object) -> domain_pb2.Domain:
    if isinstance(item, bytes):
        return domain_pb2.Domain.FromString(item)
    assert isinstance(item, domain_pb2.Domain)  # noqa: S101  # a page holds nothing else
    return item

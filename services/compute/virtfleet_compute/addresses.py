"""Addresses of guests, with where each is known from."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence

from virtfleet.compute.v1 import domain_pb2, guest_agent_pb2
from virtfleet.network.v1 import network_pb2
from virtfleet_compute import records, statuses
from virtfleet_compute.context import KIND, Context, ref
from virtfleet_compute.drivers.facets import Addresses
from virtfleet_service import names, tokens
from virtfleet_service.errors import VirtfleetError
from virtfleet_service.store import Transaction

_log = logging.getLogger(__name__)

LIST_LEASES = "virtfleet.network.v1.NetworkService.ListLeases"
PAGE_SIZE = 500
NEIGHBOURS = "/proc/net/arp"

_LEASE = domain_pb2.ADDRESS_SOURCE_LEASE
_PORT = domain_pb2.ADDRESS_SOURCE_PORT
_DRIVER = domain_pb2.ADDRESS_SOURCE_DRIVER
_ARP = domain_pb2.ADDRESS_SOURCE_ARP
_AGENT = domain_pb2.ADDRESS_SOURCE_AGENT
_ALL = (_LEASE, _AGENT, _ARP, _PORT, _DRIVER)


class AddressBook:
    """Knows the addresses of guests."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def known(
        self, request: guest_agent_pb2.ListGuestAddressesRequest
    ) -> guest_agent_pb2.ListGuestAddressesResponse:
        """Return the addresses of a guest from the sources that are asked for."""
        domain = self._context.find(request.name)
        wanted = set(request.sources) or set(_ALL)
        found: list[domain_pb2.GuestAddress] = []
        missing: list[domain_pb2.AddressSource.ValueType] = []
        if _PORT in wanted:
            found += [address for address in domain.status.addresses if address.source == _PORT]
        if _LEASE in wanted:
            try:
                found += await self._leases_of(domain)
            except VirtfleetError as error:
                _log.info("the leases of %s are not known: %s", domain.name, error)
                missing.append(_LEASE)
        if _ARP in wanted:
            found += await asyncio.to_thread(_neighbours, _cards(domain))
        if _DRIVER in wanted:
            facet = self._context.driver(domain).facet(Addresses)  # type: ignore[type-abstract]  # a protocol
            if facet is None:
                missing.append(_DRIVER)
            else:
                found += [
                    domain_pb2.GuestAddress(
                        address=one.address,
                        prefix_length=one.prefix_length,
                        mac_address=one.mac_address,
                        device_id=one.device_id,
                        source=_DRIVER,
                        hostname=one.hostname,
                    )
                    for one in await facet.guest_addresses(ref(domain))
                ]
        if _AGENT in wanted:
            missing.append(_AGENT)
        explicit = [source for source in missing if request.sources or source == _LEASE]
        found.sort(key=lambda one: (one.device_id, one.address, one.source))
        return self._page(request, found, explicit)

    def _page(
        self,
        request: guest_agent_pb2.ListGuestAddressesRequest,
        found: Sequence[domain_pb2.GuestAddress],
        missing: Iterable[domain_pb2.AddressSource.ValueType],
    ) -> guest_agent_pb2.ListGuestAddressesResponse:
        size = request.page_size or PAGE_SIZE
        key, binding = self._context.store.token_key, tokens.binding_of("addresses", request.name, *request.sources)
        start = int(tokens.unseal(key, binding, request.page_token)) if request.page_token else 0
        more = start + size < len(found)
        return guest_agent_pb2.ListGuestAddressesResponse(
            addresses=found[start : start + size],
            next_page_token=tokens.seal(key, binding, str(start + size).encode()) if more else "",
            missing_sources=missing,
        )

    async def _leases_of(self, domain: domain_pb2.Domain) -> list[domain_pb2.GuestAddress]:
        cards = _cards(domain)
        if not cards or not _networks(domain, self._context.node):
            return []
        return [_leased(lease, cards) for lease in await self._leases() if lease.status.mac_address in cards]

    async def _leases(self) -> list[network_pb2.Lease]:
        request = network_pb2.ListLeasesRequest(parent=f"nodes/{self._context.node}/networks/-", page_size=1000)
        leases: list[network_pb2.Lease] = []
        while True:
            answer = await self._context.wiring.network.call(
                LIST_LEASES,
                request,
                network_pb2.ListLeasesResponse,
                timeout_seconds=self._context.settings.peer_seconds,
            )
            leases += answer.leases
            if not answer.next_page_token:
                return leases
            request.page_token = answer.next_page_token

    # What is written into the status of running domains.

    async def run(self) -> None:
        """Keep the addresses in the status of running domains up to date. Runs until cancelled."""
        while True:
            await asyncio.sleep(self._context.settings.address_seconds)
            joined = self.joined()
            if not joined:
                continue
            try:
                by_mac: dict[str, list[network_pb2.Lease]] = {}
                for lease in await self._leases():
                    by_mac.setdefault(lease.status.mac_address, []).append(lease)
                for domain in joined:
                    await self._store(domain, by_mac)
            except VirtfleetError as error:
                _log.debug("leases are not known for now: %s", error)

    def joined(self) -> list[domain_pb2.Domain]:
        """Read the running domains that have a card in a network; only those with a card are decoded."""
        store, node = self._context.store, self._context.node
        holders = {body.partition(b":")[0].decode() for _, body in store.list_records(records.MAC)}
        if holders:
            holders &= {uid for uid, _ in store.list_records(records.ACTIVE)}
        domains = (self._context.by_uid(uid) for uid in sorted(holders))
        return [domain for domain in domains if domain is not None and _networks(domain, node)]

    async def _store(self, domain: domain_pb2.Domain, by_mac: dict[str, list[network_pb2.Lease]]) -> None:
        cards = _cards(domain)
        leased = [_leased(lease, cards) for mac in sorted(cards) for lease in by_mac.get(mac, ())]
        leased.sort(key=lambda one: (one.device_id, one.address))
        if not _differ(domain, leased):
            return

        def write(tx: Transaction) -> None:
            row = tx.get_by_uid(KIND, domain.uid)
            if row is None:
                return
            stored = domain_pb2.Domain.FromString(row.body)
            if not statuses.is_active(stored):
                return
            kept = [address for address in stored.status.addresses if address.source != _LEASE]
            del stored.status.addresses[:]
            stored.status.addresses.extend([*kept, *leased])
            records.save(tx, stored, statuses.OBSERVED)

        await self._context.store.write(write)


def _differ(domain: domain_pb2.Domain, leased: Sequence[domain_pb2.GuestAddress]) -> bool:
    """Tell whether leases are other ones than those in the status; a renewal alone is no news."""
    old = [(one.device_id, one.address, one.hostname) for one in domain.status.addresses if one.source == _LEASE]
    return old != [(one.device_id, one.address, one.hostname) for one in leased]


def _cards(domain: domain_pb2.Domain) -> dict[str, str]:
    """Return the device id of each MAC."""
    status = domain.status
    spec = status.active_spec if statuses.is_active(domain) else status.resolved_spec
    cards = {card.mac_address: key for key, card in spec.interfaces.items()}
    cards |= {card.mac_address: card.device_id for card in status.interfaces if card.mac_address}
    return cards


def _networks(domain: domain_pb2.Domain, node: str) -> set[str]:
    spec = domain.status.resolved_spec
    found: set[str] = set()
    for card in spec.interfaces.values():
        if card.WhichOneof("source") == "network":
            found.add(names.absolute(card.network, node))
        elif card.WhichOneof("source") == "port":
            found.add(names.parent_of(names.absolute(card.port, node)))
    return found


def _leased(lease: network_pb2.Lease, cards: dict[str, str]) -> domain_pb2.GuestAddress:
    status = lease.status
    address = domain_pb2.GuestAddress(
        address=status.address,
        mac_address=status.mac_address,
        device_id=cards.get(status.mac_address, ""),
        source=_LEASE,
        hostname=status.hostname,
    )
    if status.HasField("expire_time"):
        address.expire_time.CopyFrom(status.expire_time)
    return address


def _neighbours(cards: dict[str, str]) -> list[domain_pb2.GuestAddress]:
    """Read the IPv4 neighbours of this network namespace that are cards of a guest."""
    found = []
    with open(NEIGHBOURS, encoding="ascii") as table:  # noqa: PTH123  # a file of the kernel, read in a thread
        for line in table.readlines()[1:]:
            columns = line.split()
            if len(columns) >= 4 and columns[3] in cards:
                found.append(
                    domain_pb2.GuestAddress(
                        address=columns[0], mac_address=columns[3], device_id=cards[columns[3]], source=_ARP
                    )
                )
    return found

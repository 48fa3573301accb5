"""Gives back what storage and network hold for domains that do not have it: after crashes, after peers were away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from virtfleet.compute.v1 import domain_pb2
from virtfleet.node.v1 import attachment_pb2, plug_pb2
from virtfleet_compute import records, statuses, wiring
from virtfleet_compute.context import Context
from virtfleet_compute.creation import Creation
from virtfleet_compute.drivers.api import DomainRef
from virtfleet_compute.reconcile import Reconciler
from virtfleet_service.errors import HasChildren, ResourceInUse, VirtfleetError
from virtfleet_service.peers import Peer

_log = logging.getLogger(__name__)

FIRST_DELAY_SECONDS = 0.5
LAST_DELAY_SECONDS = 10.0


class Sweep:
    """Looks at what the peers hold, at start and whenever something could not be given back."""

    def __init__(self, context: Context, creation: Creation, reconciler: Reconciler) -> None:
        self._context = context
        self._creation = creation
        self._reconciler = reconciler

    async def run(self) -> None:
        """Sweep at start and when asked to, again and again until both peers have answered. Runs until cancelled."""
        wiring = self._context.wiring
        storage = asyncio.create_task(self._repeat("storage", wiring.storage, self._volumes), name="sweep storage")
        network = asyncio.create_task(self._repeat("network", wiring.network, self._ports), name="sweep network")
        try:
            await asyncio.gather(storage, network)
        finally:
            storage.cancel()
            network.cancel()

    async def _repeat(self, name: str, peer: Peer, sweep: Callable[[], Awaitable[None]]) -> None:
        wanted = self._context.wiring.unswept[name]
        wanted.set()
        while True:
            await wanted.wait()
            wanted.clear()
            delay_seconds = FIRST_DELAY_SECONDS
            while True:
                try:
                    if peer.has_socket:
                        await sweep()
                        break
                except VirtfleetError as error:
                    _log.debug("the sweep of %s waits: %s", name, error)
                await asyncio.sleep(delay_seconds)
                delay_seconds = min(delay_seconds * 2, LAST_DELAY_SECONDS)

    async def _volumes(self) -> None:
        """Release the attachments that no domain has, delete the volumes of creations that were undone."""
        for attachment in await self._context.wiring.attachments():
            if attachment.domain_uid:
                await self._release(attachment)
        failure: VirtfleetError | None = None
        for making in records.leftovers(self._context.store.list_records(records.LEFTOVER)):
            try:
                await self._take_back(making)
            except VirtfleetError as error:
                failure = error
                continue
            await self._context.store.write(
                lambda tx, making=making: records.drop_leftover(tx, making)  # type: ignore[misc]  # bound here
            )
        if failure is not None:
            raise failure

    async def _take_back(self, making: records.Making) -> None:
        """Delete a volume that was made with a domain that is not there, unless others use it: then it is theirs."""
        async with self._context.holds.held(making.domain_uid):
            if self._context.by_uid(making.domain_uid) is not None:
                # It was made again, with the uid that it had.
                _log.warning("%s stays: the domain %s is there again", making.name, making.domain_uid)
                return
            try:
                await self._creation.take_back_volume(making)
            except ResourceInUse as error:
                if error.metadata.get("attachment_id", "").startswith(f"{making.domain_uid}:"):
                    # Attached after this sweep asked what is: the next one releases it.
                    raise
                _log.warning("%s stays: %s", making.name, error)
            except HasChildren as error:
                _log.warning("%s stays: %s", making.name, error)

    async def _release(self, attachment: attachment_pb2.Attachment) -> None:
        context = self._context
        async with context.holds.held(attachment.domain_uid):
            # Looked at under the hold: a start that was on its way has ended by now.
            if self._reconciler.waits(attachment.domain_uid):
                return
            domain = context.by_uid(attachment.domain_uid)
            if domain is not None and statuses.is_active(domain) and self._has_volume(domain, attachment):
                return
            await context.wiring.release(attachment)

    def _has_volume(self, domain: domain_pb2.Domain, attachment: attachment_pb2.Attachment) -> bool:
        uses = wiring.volume_uses(domain.status.active_spec, self._context.node)
        return any(use.device_id == attachment.device_id and use.volume == attachment.volume for use in uses)

    async def _ports(self) -> None:
        """Unplug the links that no running domain has, and remove the ports that no definition has."""
        for plug in await self._context.wiring.plugs():
            if plug.domain_uid:
                await self._unplug(plug)

    async def _unplug(self, plug: plug_pb2.PlugRecord) -> None:
        context = self._context
        target = DomainRef(plug.domain, plug.domain_uid)
        async with context.holds.held(plug.domain_uid):
            if self._reconciler.waits(plug.domain_uid):
                return
            domain = context.by_uid(plug.domain_uid)
            if domain is not None and statuses.is_active(domain) and plug.port in self._used(domain):
                return
            if domain is not None and plug.port in self._defined(domain):
                if plug.plugged:
                    await context.wiring.unplug(target, plug.port)
                return
            await context.wiring.give_up(target, plug.port)

    def _used(self, domain: domain_pb2.Domain) -> set[str]:
        return set(wiring.ports_of(domain, domain.status.active_spec, self._context.node).values())

    def _defined(self, domain: domain_pb2.Domain) -> set[str]:
        return set(wiring.ports_of(domain, domain.status.resolved_spec, self._context.node).values())

"""The store against the node: at start, and whenever something was noticed."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from virtfleet.network.v1 import network_pb2, port_pb2, watch_pb2
from virtfleet.type.v1 import resource_pb2
from virtfleet_network import records
from virtfleet_network.backends.api import Drift, DriftKind, LeaseRecord, NetworkBackend, Prior
from virtfleet_network.leases import Leases
from virtfleet_network.networks import Networks
from virtfleet_network.ports import Ports
from virtfleet_service import resources
from virtfleet_service.errors import VirtfleetError
from virtfleet_service.operations import Operations
from virtfleet_service.store import Store, StoreUnwritable
from virtfleet_service.transaction import Transaction

if TYPE_CHECKING:
    from virtfleet_service.call import Call

__all__ = ["Reconciler"]

_log = logging.getLogger(__name__)

GATHER_SECONDS = 0.5
"""How long what is noticed is gathered before a look. Each start and stop of a guest is noticed too, and a look while a
guest starts takes the processor from it."""

RECORD_AGAIN_SECONDS = 1.0
"""When the store refuses what was noticed, how long until it is asked again."""

QUIET_SECONDS = 0.2
"""How long nothing is looked at after a look: others may change things faster than we mend them."""

_NODE = "node"
"""Records.

`boot` → the boot id at the last start; `autostart` → the same, until what starts by itself after that boot has had its
time; `prior` → what the node had before networks ran.
"""

FIRST_DELAY_SECONDS, LAST_DELAY_SECONDS = 0.5, 5.0
"""How long until what did not start by itself is tried again: at first, and at last."""

_AUTOSTART = (resource_pb2.AUTOSTART_ALWAYS, resource_pb2.AUTOSTART_ONCE)


class Reconciler:
    """Keeps what runs and what is recorded the same, and is what the back end tells of what it notices."""

    def __init__(  # it is where all parts meet
        self,
        *,
        store: Store,
        operations: Operations,
        backend: NetworkBackend,
        networks: Networks,
        ports: Ports,
        node: str,
        boot_id: str,
        repair_seconds: float,
    ) -> None:
        self._store = store
        self._operations = operations
        self._backend = backend
        self._networks = networks
        self._ports = ports
        self._leases = Leases(store)
        self._node = f"nodes/{node}"
        self._boot_id = boot_id
        self._repair_seconds = repair_seconds
        self._leftovers = False
        self._changed = asyncio.Event()
        self._news: asyncio.Queue[tuple[str, Sequence[LeaseRecord] | Drift]] = asyncio.Queue()

    # What the back end notices.

    def leases_changed(self, network_uid: str, leases: Sequence[LeaseRecord]) -> None:
        """Take all leases of a network."""
        self._news.put_nowait((network_uid, leases))

    def something_changed(self) -> None:
        """Take that there is something to look at."""
        self._changed.set()

    def daemon_restarted(self, network_uid: str, detail: str) -> None:
        """Take that DHCP and DNS of a network had died and run again."""
        self._news.put_nowait((network_uid, Drift(network_uid, DriftKind.DAEMON_DIED, detail)))

    def daemon_failed(self, network_uid: str, detail: str) -> None:
        """Take that DHCP and DNS of a network do not start."""
        self._news.put_nowait((network_uid, Drift(network_uid, DriftKind.DAEMON_DIED, "dnsmasq", problem=detail)))

    # At start.

    async def start(self) -> None:
        """Find what ran before, and end what a crash left unfinished."""
        booted = self._store.get_record(_NODE, "boot") != self._boot_id.encode()
        prior = Prior(self._save_prior)
        if booted:
            await self._store.write(self._after_boot)
        else:
            prior.values.update(json.loads(self._store.get_record(_NODE, "prior") or b"{}"))
        self._prior = prior
        await self._backend.open(self, prior)
        running = [records.network_of(row) for row in self._store.list("network", parent=self._node)]
        running = [network for network in running if records.is_up(network)]
        await self._backend.adopt([records.current_plan(self._store, network) for network in running])
        await self._operations.settle(self._networks.settlements() | self._ports.settlements())
        await self._remove_leftovers()
        await self._repair()
        await self._store.write(self._adopted)

    async def _save_prior(self) -> None:
        body = json.dumps(self._prior.values, sort_keys=True).encode()
        await self._store.write(lambda tx: tx.put_record(_NODE, "prior", body))

    def _after_boot(self, tx: Transaction) -> None:
        """Record that a boot of the node has ended all that ran on it."""
        for row in tx.list("port", parent=self._node):
            port = records.port_of(row)
            if port.status.state == port_pb2.PORT_STATE_PLUGGED:
                port.status.state = port_pb2.PORT_STATE_UNPLUGGED
                port.status.ClearField("holder")
                port.status.ClearField("plug")
                tx.put("port", port, cause=records.OBSERVED)
        for row in tx.list("network", parent=self._node):
            network = records.network_of(row)
            if records.is_up(network):
                reason = network_pb2.NETWORK_STATE_REASON_NODE_BOOTED
                records.set_state(network, network_pb2.NETWORK_STATE_INACTIVE, reason, "the node was booted")
                records.count(tx, network)
                tx.put("network", network, cause=records.OBSERVED)
                kind = watch_pb2.EVENT_TYPE_NETWORK_STOPPED
                records.emit(tx, network, kind, "NODE_BOOTED", f"{network.name} ended with the node")
                if network.spec.lifetime == resource_pb2.LIFETIME_TRANSIENT:
                    self._networks.remove_rows(tx, network.uid, network.name, records.OBSERVED)
        for uid, _ in tx.list_records(records.LINKS):
            tx.delete_record(records.LINKS, uid)
        tx.delete_record(_NODE, "prior")
        tx.put_record(_NODE, "boot", self._boot_id.encode())
        tx.put_record(_NODE, "autostart", self._boot_id.encode())

    async def _remove_leftovers(self) -> None:
        """Remove what is recorded as possibly there and belongs to nothing that runs."""
        running = frozenset(
            row.uid for row in self._store.list("network", parent=self._node) if records.is_up(records.network_of(row))
        )
        recorded = self._store.list_records(records.LINKS)
        # A port whose link was made, but not its record, still has its row.
        ports = [(row.uid, b"{}") for row in self._store.list("port", parent=self._node)]
        try:
            await self._backend.remove_leftovers(records.leftovers([*recorded, *ports], running))
        except VirtfleetError as error:
            # The launcher may not be there yet; the service is useful all the same, and tries again.
            _log.warning("what a crash may have left cannot be removed yet: %s", error)
            self._leftovers = True
            return
        self._leftovers = False

        def forget(tx: Transaction) -> None:
            for uid, _ in recorded:
                if uid not in running:
                    tx.delete_record(records.LINKS, uid)
            for uid, _ in tx.list_records(records.DELETING):
                tx.delete_record(records.DELETING, uid)

        await self._store.write(forget)

    def _adopted(self, tx: Transaction) -> None:
        for row in tx.list("network", parent=self._node):
            network = records.network_of(row)
            if network.status.state == network_pb2.NETWORK_STATE_RUNNING:
                network.status.state_reason = network_pb2.NETWORK_STATE_REASON_ADOPTED
                tx.put("network", network, cause=records.OBSERVED)

    async def autostart(self, call: Callable[[], Call], seconds: float) -> None:
        """After a boot of the node start what starts by itself; returns when all of it runs or has had its time.

        What keeps a network from starting may pass: the launcher comes up beside this service, a program is being
        installed, a link is somebody's for a while.

        Args:
            call: Makes a call of the service itself.
            seconds: How much time that is.
        """
        if self._store.get_record(_NODE, "autostart") is None:
            return
        rows = self._store.list("network", parent=self._node)
        waiting = [row.name for row in rows if records.network_of(row).spec.autostart in _AUTOSTART]
        until = asyncio.get_running_loop().time() + seconds
        delay_seconds = FIRST_DELAY_SECONDS
        while True:
            waiting = [name for name in waiting if not await self._networks.autostart(name, call())]
            if not waiting or asyncio.get_running_loop().time() + delay_seconds > until:
                break
            await asyncio.sleep(delay_seconds)
            delay_seconds = min(2 * delay_seconds, LAST_DELAY_SECONDS)
        if waiting:
            _log.warning("given up after the boot: %s", ", ".join(waiting))
        while True:
            try:
                await self._store.write(lambda tx: tx.delete_record(_NODE, "autostart"))
                return
            except StoreUnwritable:
                await asyncio.sleep(RECORD_AGAIN_SECONDS)

    # While it runs.

    async def run(self) -> None:
        """Look whenever something was noticed, and from time to time; never ends."""
        while True:
            quiet = False
            try:
                async with asyncio.timeout(self._repair_seconds):
                    await self._changed.wait()
                await asyncio.sleep(GATHER_SECONDS)
            except TimeoutError:
                quiet = True
            self._changed.clear()
            try:
                if quiet:
                    await self._leases.sweep(self._node)
                if self._leftovers:
                    await self._remove_leftovers()
                await self._repair()
            except Exception:  # noqa: BLE001  # the boundary of one look: the next one must come
                _log.exception("the networks of the node could not be looked at")
            await asyncio.sleep(QUIET_SECONDS)

    async def take_news(self) -> None:
        """Record what the back end has noticed, in order; never ends."""
        while True:
            network_uid, news = await self._news.get()
            while True:
                if await self._taken(network_uid, news):
                    break
                await asyncio.sleep(RECORD_AGAIN_SECONDS)

    async def _taken(self, network_uid: str, news: Sequence[LeaseRecord] | Drift) -> bool:
        """Record a piece of news; False: the store refuses it for now, and nobody will tell it again."""
        try:
            if isinstance(news, Drift):
                await self._record([news])
            else:
                await self._leases.take(network_uid, news)
        except StoreUnwritable as error:
            _log.warning("what was noticed about network %s is recorded later: %s", network_uid, error)
            return False
        except Exception:  # noqa: BLE001  # the boundary of one piece of news
            _log.exception("what was noticed about network %s could not be recorded", network_uid)
        return True

    async def _repair(self) -> None:
        drifts = await self._backend.repair()
        await self._record(drifts)

    async def _record(self, drifts: Sequence[Drift]) -> None:
        """Write what was found and mended, or could not be."""
        found: dict[str, list[Drift]] = {}
        for drift in drifts:
            found.setdefault(drift.network_uid, []).append(drift)
        for uid, items in found.items():
            await self._store.write(lambda tx, uid=uid, items=items: _record_drifts(tx, uid, items))  # type: ignore[misc]  # bound here, not later
        for row in self._store.list("network", parent=self._node):
            degraded = records.network_of(row).status.state == network_pb2.NETWORK_STATE_DEGRADED
            if degraded and row.uid not in found:
                await self._store.write(lambda tx, uid=row.uid: _recovered(tx, uid))  # type: ignore[misc]  # bound here, not later


def _record_drifts(tx: Transaction, uid: str, drifts: Sequence[Drift]) -> None:
    row = tx.get_by_uid("network", uid)
    if row is None:
        return
    network = records.network_of(row)
    if not records.is_up(network):
        return
    status = network.status
    broken = [drift for drift in drifts if drift.problem]
    last = drifts[-1]
    known = resources.get_condition(status.conditions, "Degraded")
    if not broken or known is None or known.message != broken[-1].problem:
        for drift in drifts:
            message = f"{drift.subject}: {drift.kind.value}" + (f"; {drift.problem}" if drift.problem else "")
            resources.set_condition(status.conditions, "Drifted", holds=True, reason=drift.kind.name, message=message)
            records.emit(tx, network, watch_pb2.EVENT_TYPE_NETWORK_DRIFTED, drift.kind.name, message)
    if broken:
        status.state, status.state_reason = (
            network_pb2.NETWORK_STATE_DEGRADED,
            network_pb2.NETWORK_STATE_REASON_PART_LOST,
        )
        problem, reason = broken[-1].problem, broken[-1].kind.name
        status.state_message = problem
        resources.set_condition(status.conditions, "Degraded", holds=True, reason=reason, message=problem)
        tx.put("network", network, cause=records.OBSERVED)
        return
    # Twice, so that watchers see both: that it was so, and that it is no more.
    tx.put("network", network, cause=records.OBSERVED)
    _recover(tx, network, last.kind.name)
    for drift in drifts:
        if drift.kind is DriftKind.DAEMON_DIED:
            kind = watch_pb2.EVENT_TYPE_NETWORK_DAEMON_RESTARTED
            records.emit(tx, network, kind, "DAEMON_DIED", f"DHCP and DNS of {network.name} were started again")


def _recovered(tx: Transaction, uid: str) -> None:
    row = tx.get_by_uid("network", uid)
    if row is not None:
        network = records.network_of(row)
        if network.status.state == network_pb2.NETWORK_STATE_DEGRADED:
            _recover(tx, network, "RESTORED")


def _recover(tx: Transaction, network: network_pb2.Network, reason: str) -> None:
    status = network.status
    message = "all is as it should be"
    resources.set_condition(status.conditions, "Drifted", holds=False, reason=reason, message=message)
    if resources.get_condition(status.conditions, "Degraded") is not None:
        resources.set_condition(status.conditions, "Degraded", holds=False, reason=reason, message=message)
    if status.state == network_pb2.NETWORK_STATE_DEGRADED:
        status.state, status.state_message = network_pb2.NETWORK_STATE_RUNNING, ""
        status.state_reason = network_pb2.NETWORK_STATE_REASON_ADOPTED
    tx.put("network", network, cause=records.OBSERVED)
    records.emit(tx, network, watch_pb2.EVENT_TYPE_NETWORK_RESTORED, reason, f"{network.name} is as it was")


def boot_id() -> str:
    """Return the boot id of the node."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()

"""The back end `bridge`.

A Linux bridge, its addresses, packet filter rules and dnsmasq for each network; a tap for each plugged port.
"""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import logging
import os
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from virtfleet.network.v1 import network_pb2
from virtfleet_network.backends.api import (
    BackendReport,
    Drift,
    DriftKind,
    Leftover,
    Listener,
    NetworkPlan,
    PortLink,
    Prior,
)
from virtfleet_network.backends.bridge import forwarding, links
from virtfleet_network.backends.bridge.dnsmasq import Daemons
from virtfleet_network.backends.bridge.firewall import Firewall
from virtfleet_network.backends.bridge.links import BridgeSettings, RouteSettings
from virtfleet_network.backends.bridge.monitor import LinkNotice, Monitor
from virtfleet_network.backends.bridge.netlink import NetlinkThread
from virtfleet_service.errors import BackendFailed, DriverBroken, IdentityInUse, SubnetOverlap, VirtfleetError
from virtfleet_service.locks import Locks

if TYPE_CHECKING:
    from virtfleet_network.backends.registry import BackendContext

__all__ = ["BridgeBackend", "create"]

_log = logging.getLogger(__name__)

CAPABILITIES = frozenset(
    {
        "network.forward.isolated",
        "network.forward.nat",
        "network.forward.routed",
        "network.forward.open",
        "network.port_isolation",
        "network.dhcp",
        "network.dns",
        "network.router_advertisement",
    }
)
_CAP_NET_ADMIN = 12
_ONLY_FOR_DNSMASQ = frozenset({"DNSMASQ_MISSING", "STATE_DIR_UNREACHABLE", "LAUNCHER_UNREACHABLE"})


def create(context: BackendContext) -> BridgeBackend:
    """Make the back end for a service."""
    return BridgeBackend(context)


def bridge_settings(plan: NetworkPlan) -> BridgeSettings:
    """Return what the bridge of a network must be."""
    spec = plan.spec
    addresses = [
        ipaddress.ip_interface(f"{subnet.host_address}/{ipaddress.ip_network(subnet.prefix).prefixlen}")
        for _, subnet in sorted(spec.subnets.items())
    ]
    routes = [
        RouteSettings(ipaddress.ip_network(route.prefix), route.gateway_address, route.metric) for route in spec.routes
    ]
    return BridgeSettings(
        network_uid=plan.uid,
        name=spec.bridge_name,
        mac_address=spec.mac_address,
        mtu_bytes=spec.mtu_bytes,
        addresses=tuple(addresses),
        routes=tuple(routes),
        isolated_ports=spec.port_isolation,
    )


class BridgeBackend:
    """Runs isolated, NAT, routed and open networks. See `NetworkBackend` for what each method promises.

    Changes of one network are made one at a time (`_locks`); the rules of all are one table with a lock of its own.
    """

    def __init__(self, context: BackendContext) -> None:
        self._context = context
        self._netlink = NetlinkThread("changes")
        # Removals take 20 ms each; nothing else shall wait behind them.
        self._removals = NetlinkThread("removals")
        self._plans: dict[str, NetworkPlan] = {}
        self._firewall = Firewall(context.nft, lambda: list(self._plans.values()))
        self._starting: set[str] = set()
        self._bridge_indexes: dict[str, int] = {}
        self._taps: dict[str, str] = {}
        """The name of each tap that should be there → the uid of its network."""
        self._locks = Locks()
        self._half_undone: dict[str, NetworkPlan] = {}
        """What failed starts have left, by the uid of the network."""
        self._given_up: dict[str, str] = {}
        self._reaping = asyncio.Event()
        self._reaped = asyncio.Condition()
        self._reaper: asyncio.Task[None] | None = None
        self._monitor: Monitor | None = None
        self._daemons: Daemons | None = None
        self._prior = Prior(_save_nothing)

    @property
    def id(self) -> str:
        """The name in the registry."""
        return "bridge"

    async def open(self, listener: Listener, prior: Prior) -> None:
        """Begin to watch the node."""
        self._prior = prior
        context = self._context
        self._daemons = Daemons(
            context.launcher, context.dnsmasq, context.state_dir / "dnsmasq", context.dnsmasq_uid, listener
        )
        await self._daemons.open()
        self._monitor = Monitor(
            listener.something_changed, self._matters, lambda index: index in self._bridge_indexes.values()
        )
        self._monitor.open()
        self._reaper = asyncio.create_task(self._reap(), name="removal of links")

    async def close(self) -> None:
        """End what runs in this process; links that were given up are removed first."""
        if self._monitor is not None:
            self._monitor.close()
        if self._reaper is not None:
            self._reaper.cancel()
            await asyncio.gather(self._reaper, return_exceptions=True)
        if self._daemons is not None:
            await self._daemons.close()
        if self._given_up:
            with suppress(BackendFailed):
                await self._removals.call(links.delete_links, dict(self._given_up))
        await self._removals.close()
        await self._netlink.close()

    async def probe(self) -> BackendReport:
        """Look for the rights and the programs that it needs."""
        if not _may_administer_networks():
            return BackendReport(CAPABILITIES, "NOT_PERMITTED", "the service lacks CAP_NET_ADMIN")
        if not self._context.nft.exists():
            return BackendReport(CAPABILITIES, "NFT_MISSING", f"{self._context.nft} is missing: install nftables")
        cause, problem = await self._daemons.problem() if self._daemons is not None else ("", "")
        return BackendReport(CAPABILITIES, cause, problem)

    def missing_capability(self, spec: network_pb2.NetworkSpec) -> str:
        """Return what the spec needs and this back end lacks."""
        kind = f"network.forward.{spec.WhichOneof('forward') or 'isolated'}"
        if kind not in CAPABILITIES:
            return kind
        return "network.bandwidth" if spec.HasField("bandwidth") else ""

    async def check(self, plan: NetworkPlan) -> None:
        """Look for what stands against a start."""
        await self._check_parts(plan)
        snapshot = await self._netlink.call(links.take_snapshot)
        settings = bridge_settings(plan)
        link = snapshot.links.get(settings.name)
        if link is not None and link.alias != settings.alias:
            raise IdentityInUse(
                f"the node has a link {settings.name} that is not of {plan.name}; choose another bridge name",
                field="network.spec.bridge_name",
                holder=settings.name,
                bridge_name=settings.name,
            )
        own = frozenset({settings.name} | {other.spec.bridge_name for other in self._plans.values()})
        found = links.overlaps([address.network for address in settings.addresses], snapshot, own)
        if found is None:
            # A route of ours would take the place of one of the node's, and nobody would put that back.
            found = links.overlaps([route.prefix for route in settings.routes], snapshot, frozenset({settings.name}))
        if found is not None:
            prefix, other, name = found
            raise SubnetOverlap(
                f"{prefix} of {plan.name} overlaps {other} of the node's link {name}",
                resource=plan.name,
                holder=name,
                prefix=prefix,
                other_prefix=other,
            )

    async def _check_parts(self, plan: NetworkPlan) -> None:
        report = await self.probe()
        needs_daemon = bool(plan.spec.subnets)
        if report.cause and (needs_daemon or report.cause not in _ONLY_FOR_DNSMASQ):
            raise DriverBroken(f"{plan.name} cannot run here: {report.problem}", resource=plan.name, cause=report.cause)

    async def start(self, plan: NetworkPlan) -> None:
        """Make bridge, rules and dnsmasq; on failure nothing of it is left."""
        await self.check(plan)
        async with self._locks.of(plan.uid), AsyncExitStack() as undo:
            undo.push_async_callback(self._undo, plan)
            self._half_undone.pop(plan.uid, None)
            self._starting.add(plan.uid)
            undo.callback(self._starting.discard, plan.uid)
            self._take(plan)
            await self._ensure_links(plan)
            await self._ensure_rules()
            await self._need_daemons().ensure(plan, self._incarnation(plan.uid))
            self._starting.discard(plan.uid)
            undo.pop_all()

    def _take(self, plan: NetworkPlan) -> None:
        self._plans[plan.uid] = plan
        for link in plan.links.values():
            self._taps[link.interface_name] = plan.uid

    async def _undo(self, plan: NetworkPlan) -> None:
        try:
            await self._remove(plan, stubborn=True)
        except VirtfleetError as error:
            # The reason for the undoing is what the caller hears; what is left is removed when the node is looked at.
            _log.error("not all of the start of %s could be undone: %s", plan.name, error)
            self._half_undone[plan.uid] = plan

    async def adopt(self, plans: Sequence[NetworkPlan]) -> None:
        """Take running networks as they are."""
        for plan in plans:
            self._take(plan)
        self._firewall.adopted = bool(plans)

    async def update(self, plan: NetworkPlan) -> None:
        """Bring a running network to a plan with other hosts, ranges or names."""
        running = self._plans.get(plan.uid)
        if running is None:
            return
        # The links are this side's: one may have been plugged since the plan was made.
        self._plans[plan.uid] = dataclasses.replace(plan, links=running.links)
        await self._need_daemons().ensure(self._plans[plan.uid], self._incarnation(plan.uid))

    async def stop(self, plan: NetworkPlan) -> None:
        """Remove dnsmasq, rules and the bridge; taps of plugged ports stay, joined to nothing.

        On failure the network counts as running still: repair brings back what has been removed.
        """
        async with self._locks.of(plan.uid):
            ran = self._plans.get(plan.uid)
            try:
                await self._remove(plan)
            except VirtfleetError:
                # It is not stopped, so it runs: `repair` makes again what of it is gone, and a repetition may work.
                if ran is not None:
                    self._take(ran)
                raise
            self._half_undone.pop(plan.uid, None)

    async def _remove(self, plan: NetworkPlan, *, stubborn: bool = False) -> None:
        """Remove a network.

        Args:
            plan: The network.
            stubborn: Go on where a step fails, and raise at the end: of a network that is not to be, as much as can
                goes. Of one that was not to be stopped half, what is left runs on.
        """
        self._plans.pop(plan.uid, None)
        self._bridge_indexes.pop(plan.uid, None)
        for name in [name for name, owner in self._taps.items() if owner == plan.uid]:
            del self._taps[name]
        spec = plan.spec
        steps = (
            lambda: self._need_daemons().stop(plan.uid),
            self._firewall.apply,
            lambda: self._netlink.call(links.delete_bridge, spec.bridge_name, plan.uid, spec.mac_address),
            self._restore_forwarding,
        )
        failure: VirtfleetError | None = None
        for step in steps:
            try:
                await step()
            except VirtfleetError as error:
                failure = failure or error
            except OSError as error:
                refused = BackendFailed(f"the kernel does not let us set forwarding back: {error}", cause=error)
                failure = failure or refused
            if failure is not None and not stubborn:
                raise failure
        if failure is not None:
            raise failure

    async def forget(self, network_uid: str) -> None:
        """Remove the leases of a stopped network."""
        await self._need_daemons().forget(network_uid)

    async def plug(self, network_uid: str, link: PortLink) -> None:
        """Make the tap of a port."""
        async with self._locks.of(network_uid):
            plan = self._plans.get(network_uid)
            if plan is None:
                raise BackendFailed("the network does not run", network_uid=network_uid)
            if not os.access("/dev/net/tun", os.F_OK):
                raise DriverBroken("the node has no /dev/net/tun", cause="TUN_MISSING")
            # Known before it is made, so that nobody takes it for a leftover.
            self._taps[link.interface_name] = network_uid
            try:
                await self._netlink.call(links.make_tap, link, bridge_settings(plan))
            except BaseException:
                del self._taps[link.interface_name]
                # The thread may still be at it; what is asked of it next comes after.
                await self._netlink.call(links.delete_links, {link.interface_name: link.port_uid})
                raise
            self._plans[network_uid] = dataclasses.replace(plan, links={**plan.links, link.port_uid: link})

    async def unplug(self, network_uid: str, link: PortLink) -> None:
        """Give the tap of a port up; it is removed in the background."""
        async with self._locks.of(network_uid):
            self._taps.pop(link.interface_name, None)
            plan = self._plans.get(network_uid)
            if plan is not None:
                left = {uid: other for uid, other in plan.links.items() if uid != link.port_uid}
                self._plans[network_uid] = dataclasses.replace(plan, links=left)
            self._given_up[link.interface_name] = link.port_uid
            self._reaping.set()

    async def removed(self, interface_names: Sequence[str]) -> None:
        """Wait until links that were given up are gone."""
        async with self._reaped:
            await self._reaped.wait_for(lambda: not any(name in self._given_up for name in interface_names))

    async def _reap(self) -> None:
        """Remove what was given up, all that waits at once.

        What the kernel refuses stays for the next reconciliation.
        """
        while True:
            await self._reaping.wait()
            self._reaping.clear()
            batch = dict(self._given_up)
            try:
                await self._removals.call(links.delete_links, batch)
            except BackendFailed:
                _log.exception("links could not be removed: %s", ", ".join(sorted(batch)))
            async with self._reaped:
                for name in batch:
                    self._given_up.pop(name, None)
                self._reaped.notify_all()

    async def remove_leftovers(self, leftovers: Sequence[Leftover]) -> None:
        """Remove bridges and taps that were recorded before they were made and belong to nothing now."""
        for item in leftovers:
            if item.mac_address:
                await self._need_daemons().stop(item.uid)
                await self._netlink.call(links.delete_bridge, item.interface_name, item.uid, item.mac_address)
        ports = frozenset(item.uid for item in leftovers if not item.mac_address)
        if ports:
            await self._removals.call(links.delete_links_of, ports, frozenset(self._taps))

    async def repair(self) -> Sequence[Drift]:
        """Hold links, rules, forwarding and dnsmasq against the plans."""
        await self._undo_again()
        drifts: list[Drift] = []
        snapshot = await self._netlink.call(links.take_snapshot) if self._plans else None
        for uid in self._settled():
            lock = self._locks.of(uid)
            if lock.locked() or snapshot is None:
                # Somebody changes it right now; the notifications of that bring us here again.
                continue
            async with lock:
                drifts += await self._repair_links(uid, snapshot)
            drifts += await self._repair_daemon(uid)
        drifts += await self._repair_rules()
        drifts += await self._repair_forwarding()
        return drifts

    async def _undo_again(self) -> None:
        for uid, plan in list(self._half_undone.items()):
            async with self._locks.of(uid):
                if self._half_undone.pop(uid, None) is not None:
                    await self._undo(plan)

    def _settled(self) -> list[str]:
        """Return the networks that run, without those whose start is under way."""
        return [uid for uid in self._plans if uid not in self._starting]

    async def _repair_links(self, uid: str, snapshot: links.Snapshot) -> list[Drift]:
        plan = self._plans.get(uid)
        # The look was without the lock; the one that counts is `_ensure_links`.
        if plan is None or not self._link_differences(plan, snapshot):
            return []
        try:
            return await self._ensure_links(plan)
        except VirtfleetError as error:
            return [Drift(uid, DriftKind.LINK_LOST, plan.spec.bridge_name, problem=error.message)]

    async def _repair_daemon(self, uid: str) -> list[Drift]:
        plan = self._plans.get(uid)
        if plan is None:
            return []
        try:
            died = await self._need_daemons().ensure(plan, self._incarnation(uid))
        except VirtfleetError as error:
            return [Drift(uid, DriftKind.DAEMON_DIED, "dnsmasq", problem=error.message)]
        return [Drift(uid, DriftKind.DAEMON_DIED, "dnsmasq")] if died else []

    async def _repair_rules(self) -> list[Drift]:
        try:
            changed, problem = await self._firewall.repair(), ""
        except VirtfleetError as error:
            changed, problem = True, error.message
        if not changed:
            return []
        return [Drift(uid, DriftKind.RULES_CHANGED, "nftables", problem=problem) for uid in self._settled()]

    async def _repair_forwarding(self) -> list[Drift]:
        problem = ""
        try:
            await self._restore_forwarding()
            changed = await self._switch_forwarding()
        except OSError as error:
            changed, problem = True, str(error)
        if not changed:
            return []
        plans = [self._plans[uid] for uid in self._settled() if forwarding.needs([self._plans[uid]])]
        return [Drift(plan.uid, DriftKind.FORWARDING_DISABLED, "forwarding", problem=problem) for plan in plans]

    def _link_differences(self, plan: NetworkPlan, snapshot: links.Snapshot) -> bool:
        settings = bridge_settings(plan)
        bridge = snapshot.links.get(settings.name)
        if bridge is not None:
            self._bridge_indexes[plan.uid] = bridge.index
        return any(links.bridge_differences(settings, snapshot)) or any(
            any(links.tap_differences(link, settings, snapshot)) for link in plan.links.values()
        )

    async def _ensure_links(self, plan: NetworkPlan) -> list[Drift]:
        """Make what is missing of a bridge and its taps; returns what was."""
        index, found = await self._netlink.call(links.ensure_links, bridge_settings(plan), list(plan.links.values()))
        self._bridge_indexes[plan.uid] = index
        return [Drift(plan.uid, kind, name, port_uid) for kind, name, port_uid in found]

    async def _ensure_rules(self) -> None:
        await self._firewall.apply()
        try:
            await self._switch_forwarding()
        except OSError as error:
            raise BackendFailed(f"the kernel does not let us switch forwarding on: {error}", cause=error) from error

    async def _switch_forwarding(self) -> bool:
        needed = forwarding.needs(self._plans.values())
        noted: bool = await asyncio.to_thread(forwarding.note, needed, self._prior)
        if noted:
            await self._prior.save()
        return await asyncio.to_thread(forwarding.switch_on, needed)

    async def _restore_forwarding(self) -> None:
        needed = forwarding.needs(self._plans.values())
        restored: bool = await asyncio.to_thread(forwarding.restore, needed, self._prior)
        if restored:
            await self._prior.save()

    def _incarnation(self, uid: str) -> str:
        """Name the bridge as the kernel has it: dnsmasq that is bound to an earlier one serves nobody."""
        return str(self._bridge_indexes.get(uid, 0))

    def _matters(self, notice: LinkNotice) -> bool:
        owner = self._taps.get(notice.name)
        if owner is not None:
            plan = self._plans.get(owner)
            joined = notice.master == self._bridge_indexes.get(owner)
            return plan is not None and not (
                notice.exists and joined and notice.up and notice.mtu_bytes == plan.spec.mtu_bytes
            )
        for plan in self._plans.values():
            if plan.spec.bridge_name == notice.name:
                return not (notice.exists and notice.up and notice.mtu_bytes == plan.spec.mtu_bytes)
        return False

    def _need_daemons(self) -> Daemons:
        if self._daemons is None:
            raise BackendFailed("the back end is not open")
        return self._daemons


async def _save_nothing() -> None:
    """Stand in until the service gives its own."""


def _may_administer_networks() -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_NET_ADMIN & 1)
    return os.geteuid() == 0

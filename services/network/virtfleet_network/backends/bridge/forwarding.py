"""Forwarding between interfaces, which the kernel does only when told.

The rule: it is switched on while a network with a way out runs. What was there before is handed to the service,
which keeps it; when the last such network stops it is set back, unless somebody has changed it meanwhile. IPv6
forwarding makes the kernel ignore router advertisements on interfaces with `accept_ra` 1, which would take the node
its own address: those get 2 and are set back too.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from virtfleet_network.backends.api import NetworkPlan, Prior

__all__ = ["needs", "note", "restore", "switch_on"]

IPV4 = "/proc/sys/net/ipv4/ip_forward"
IPV6 = "/proc/sys/net/ipv6/conf/all/forwarding"
_IPV6_INTERFACES = Path("/proc/sys/net/ipv6/conf")


def needs(plans: Iterable[NetworkPlan]) -> frozenset[str]:
    """Return the switches that these networks need."""
    needed = set()
    for plan in plans:
        if plan.spec.WhichOneof("forward") not in ("nat", "routed", "open"):
            continue
        for subnet in plan.spec.subnets.values():
            needed.add(IPV6 if ":" in subnet.prefix else IPV4)
    return frozenset(needed)


def note(needed: Iterable[str], prior: Prior) -> bool:
    """Note what `switch_on` will change; False: there is nothing new to note."""
    before = dict(prior.values)
    for path in needed:
        if _read(path) in ("1", ""):
            continue
        if path == IPV6:
            for interface in _with_router_advertisements():
                prior.values.setdefault(interface, "1")
        prior.values.setdefault(path, _read(path))
    return prior.values != before


def switch_on(needed: Iterable[str]) -> bool:
    """Switch on what is off; False: all was on. `note` comes first."""
    changed = False
    for path in needed:
        if _read(path) in ("1", ""):
            continue
        if path == IPV6:
            for interface in _with_router_advertisements():
                Path(interface).write_text("2\n")
        Path(path).write_text("1\n")
        changed = True
    return changed


def _with_router_advertisements() -> list[str]:
    found = [interface / "accept_ra" for interface in sorted(_IPV6_INTERFACES.iterdir()) if interface.name != "all"]
    return [str(path) for path in found if _read(str(path)) == "1"]


def restore(needed: frozenset[str], prior: Prior) -> bool:
    """Set back what was noted and is not needed any more; False: there was nothing to set back.

    Back first, forgotten later (by the `save` that follows): whoever dies in between does it again.
    """
    changed = False
    for switch in (IPV4, IPV6):
        if switch in needed:
            continue
        family = _family(switch)
        for path in [path for path in prior.values if _family(path) == family]:
            before = prior.values.pop(path)
            changed = True
            if _read(path) in ("1", "2"):
                Path(path).write_text(before + "\n")
    return changed


def _family(path: str) -> str:
    # /proc/sys/net/FAMILY/…
    return path.split("/")[4]


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except FileNotFoundError:
        # The kernel is without that family, or the interface has just gone.
        return ""

"""What active domains have of the node, and whether one more fits: memory, processors, users of guests."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import NamedTuple

from virtfleet.compute.v1 import domain_pb2
from virtfleet_compute import lifecycle
from virtfleet_compute.settings import ComputeSettings
from virtfleet_service.errors import NodeMemoryShort, QuotaExceeded

_MEMINFO = Path("/proc/meminfo")


class Share(NamedTuple):
    """Is what one active domain has."""

    memory_bytes: int
    vcpu_count: int
    counted: bool
    """Whether it takes memory of this node."""


def memory_info() -> dict[str, int]:
    """Read /proc/meminfo: bytes by name."""
    found: dict[str, int] = {}
    for line in _MEMINFO.read_text().splitlines():
        name, _, rest = line.partition(":")
        number, _, unit = rest.strip().partition(" ")
        found[name] = int(number) * (1024 if unit == "kB" else 1)
    return found


def memory_total_bytes() -> int:
    """Read how much memory the host has: the first line of what `memory_info` reads."""
    with _MEMINFO.open("rb", buffering=0) as file:
        name, number, _ = file.read(64).split(maxsplit=2)
    return int(number) * 1024 if name == b"MemTotal:" else memory_info().get("MemTotal", 0)


class Admission:
    """Keeps account of the active domains. All of it is in memory and made anew from the store at start."""

    def __init__(self, settings: ComputeSettings) -> None:
        self._settings = settings
        self._shares: dict[str, Share] = {}
        self._users: dict[int, str] = {}
        self._next_user = 0
        self.allocated_memory_bytes = 0
        self.allocated_vcpu_count = 0
        self.changed = asyncio.Event()
        """Is set with every share that is given or taken back; whoever has heard of it clears it."""
        self._counted_bytes = 0

    @property
    def active_count(self) -> int:
        """How many domains have something."""
        return len(self._shares)

    def allocatable_memory_bytes(self) -> int:
        """Return what guests may have in all."""
        total = memory_total_bytes() - self._settings.memory_reserve_bytes
        return max(int(total * self._settings.memory_overcommit_ratio), 0)

    def adopt(self, domain: domain_pb2.Domain, *, counted: bool) -> None:
        """Count a domain that was found active."""
        spec = domain.status.active_spec
        self._count(domain.uid, Share(spec.memory.maximum_bytes, spec.cpu.vcpu_count, counted))
        if domain.status.run_as_uid:
            self._users[domain.status.run_as_uid] = domain.uid

    def admit(self, domain: domain_pb2.Domain, *, counted: bool) -> None:
        """Give a domain that is about to start its share. Succeeds if it has one.

        Raises:
            NodeMemoryShort: It does not fit.
        """
        spec = domain.status.resolved_spec
        need = spec.memory.maximum_bytes
        if counted and domain.uid not in self._shares:
            info = memory_info()
            limit = self.allocatable_memory_bytes()
            free = limit - self._counted_bytes
            if self._settings.memory_overcommit_ratio <= 1:
                free = min(free, info.get("MemAvailable", free))
            if need > free:
                raise NodeMemoryShort(
                    f"{domain.name} needs {need} bytes of memory; {max(free, 0)} of {limit} are free for guests",
                    resource=domain.name,
                    needed_bytes=need,
                    free_bytes=max(free, 0),
                    allocatable_bytes=limit,
                )
        self._count(domain.uid, Share(need, spec.cpu.vcpu_count, counted))

    def user_for(self, uid: str, wanted: int = 0) -> int:
        """Return a numeric user for the process of a guest, one that no other active domain has; 0: none is set up.

        Args:
            uid: The domain.
            wanted: A user that it had; taken again if it is free.

        Raises:
            QuotaExceeded: All are taken.
        """
        count, first = self._settings.guest_uid_count, self._settings.guest_uid_first
        if not count:
            return 0
        if wanted and self._users.get(wanted, uid) == uid and first <= wanted < first + count:
            self._users[wanted] = uid
            return wanted
        for _ in range(count):
            user = first + self._next_user
            self._next_user = (self._next_user + 1) % count
            if user not in self._users:
                self._users[user] = uid
                return user
        raise QuotaExceeded(f"all {count} users for guests are taken", limit=count, setting="guest_uid_count")

    def release(self, uid: str, run_as_uid: int = 0) -> None:
        """Take back what a domain had. Succeeds if it had nothing."""
        share = self._shares.pop(uid, None)
        if share is not None:
            self.allocated_memory_bytes -= share.memory_bytes
            self.allocated_vcpu_count -= share.vcpu_count
            self._counted_bytes -= share.memory_bytes if share.counted else 0
            self.changed.set()
        if run_as_uid and self._users.get(run_as_uid) == uid:
            del self._users[run_as_uid]

    def check_definitions(self, count: int, new: int) -> None:
        """Hold the number of definitions against the limit of the settings.

        Raises:
            QuotaExceeded: It would be passed.
        """
        limit = self._settings.domain_limit
        if limit and count + new > limit:
            raise QuotaExceeded(
                f"at most {limit} domains may be defined on this node", limit=limit, setting="domain_limit"
            )

    def _count(self, uid: str, share: Share) -> None:
        self.release(uid)
        self._shares[uid] = share
        self.allocated_memory_bytes += share.memory_bytes
        self.allocated_vcpu_count += share.vcpu_count
        self._counted_bytes += share.memory_bytes if share.counted else 0
        self.changed.set()


def is_active(domain: domain_pb2.Domain) -> bool:
    """Tell whether a domain has a guest."""
    return lifecycle.active(domain.status.state)

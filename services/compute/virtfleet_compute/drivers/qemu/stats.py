"""Counters of guests: from QEMU, and from the kernel about QEMU's processes, threads and taps."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from virtfleet.compute.v1 import stats_pb2
from virtfleet_compute.drivers.api import DomainRef
from virtfleet_compute.drivers.qemu import naming
from virtfleet_compute.drivers.qemu.guest import Guest
from virtfleet_compute.drivers.qemu.guests import Guests
from virtfleet_service.errors import HypervisorFailed

_log = logging.getLogger(__name__)

ANSWER_SECONDS = 1.8
"""How long a guest's QEMU may take; less than the 2 s that all of them have."""

_POLLING_SECONDS = 10
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_NANOSECONDS_PER_TICK = 1_000_000_000 // _TICKS_PER_SECOND
_UNKNOWN = 2**64 - 1

_Group: TypeAlias = stats_pb2.StatsGroup.ValueType


class Counters:
    """Is the driver's Stats."""

    def __init__(self, guests: Guests) -> None:
        self._guests = guests

    async def domain_stats(
        self, domains: Sequence[DomainRef], groups: frozenset[_Group]
    ) -> Sequence[stats_pb2.DomainStats]:
        """Read the counters of all at once."""
        links: dict[int, Mapping[str, Sequence[int]]] = {}
        return await asyncio.gather(*(self._one(domain, groups, links) for domain in domains))

    async def _one(
        self, domain: DomainRef, groups: frozenset[_Group], links: dict[int, Mapping[str, Sequence[int]]]
    ) -> stats_pb2.DomainStats:
        answer = stats_pb2.DomainStats()
        guest = self._guests.active(domain.uid)
        if guest is None:
            return answer
        try:
            await self._count(answer, guest, groups, links)
        except HypervisorFailed as error:
            answer = stats_pb2.DomainStats()
            answer.failure.CopyFrom(error.to_status())
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            _log.warning("the counters of %s cannot be read: %r", guest.birth.name, error)
            failure = HypervisorFailed(f"QEMU of {guest.birth.name} gives no counters", resource=guest.birth.name)
            answer = stats_pb2.DomainStats()
            answer.failure.CopyFrom(failure.to_status())
        except (FileNotFoundError, ProcessLookupError):
            # It has ended while we read.
            return stats_pb2.DomainStats()
        return answer

    async def _count(
        self,
        answer: stats_pb2.DomainStats,
        guest: Guest,
        groups: frozenset[_Group],
        links: dict[int, Mapping[str, Sequence[int]]],
    ) -> None:
        if stats_pb2.STATS_GROUP_CPU in groups:
            _process_times(answer.cpu, guest.pid)
        if stats_pb2.STATS_GROUP_MEMORY in groups:
            _process_memory(answer.memory, guest.pid)
        if stats_pb2.STATS_GROUP_VCPU in groups:
            await self._processors(answer, guest)
        if stats_pb2.STATS_GROUP_BALLOON in groups:
            await self._balloon(answer.balloon, guest)
        if stats_pb2.STATS_GROUP_INTERFACE in groups:
            _interfaces(answer, guest, links)
        if stats_pb2.STATS_GROUP_DISK in groups:
            await self._disks(answer, guest)

    async def _ask(self, guest: Guest, command: str, arguments: Mapping[str, object] | None = None) -> Any:  # noqa: ANN401  # JSON
        return await self._guests.ask(guest, command, arguments, timeout_seconds=ANSWER_SECONDS)

    async def _processors(self, answer: stats_pb2.DomainStats, guest: Guest) -> None:
        if not guest.threads:
            found = await self._ask(guest, "query-cpus-fast")
            threads = {int(cpu["cpu-index"]): int(cpu["thread-id"]) for cpu in found}
            known = range(guest.spec.cpu.maximum_vcpu_count)
            guest.threads = {number: thread for number, thread in threads.items() if number in known}
        for number, thread in sorted(guest.threads.items()):
            vcpu = answer.vcpus.add(vcpu_number=number, online=True)
            ran, waited = _thread_times(guest.pid, thread)
            vcpu.total_time.FromNanoseconds(ran)
            vcpu.wait_time.FromNanoseconds(waited)

    async def _balloon(self, answer: stats_pb2.BalloonStats, guest: Guest) -> None:
        answer.maximum_bytes = guest.spec.memory.maximum_bytes
        answer.current_bytes = guest.spec.memory.maximum_bytes
        for device_id in guest.spec.balloons:
            answer.current_bytes = int((await self._ask(guest, "query-balloon"))["actual"])
            path = f"/machine/peripheral/{naming.balloon(device_id)}"
            if not guest.balloon_polled:
                # From now on QEMU asks the guest by itself; what it knows is there at the next call.
                polling = {"path": path, "property": "guest-stats-polling-interval", "value": _POLLING_SECONDS}
                await self._ask(guest, "qom-set", polling)
                guest.balloon_polled = True
            told = (await self._ask(guest, "qom-get", {"path": path, "property": "guest-stats"}))["stats"]
            answer.unused_bytes = _known(told.get("stat-free-memory"))
            answer.usable_bytes = _known(told.get("stat-available-memory"))

    async def _disks(self, answer: stats_pb2.DomainStats, guest: Guest) -> None:
        found = {
            naming.disk_id(str(block.get("qdev", ""))): block for block in await self._ask(guest, "query-blockstats")
        }
        for device_id in sorted(guest.spec.disks):
            disk = answer.disks.add(device_id=device_id)
            counted = found.get(device_id, {}).get("stats", {})
            disk.reads_count = counted.get("rd_operations", 0)
            disk.read_bytes = counted.get("rd_bytes", 0)
            disk.read_time.FromNanoseconds(counted.get("rd_total_time_ns", 0))
            disk.writes_count = counted.get("wr_operations", 0)
            disk.write_bytes = counted.get("wr_bytes", 0)
            disk.write_time.FromNanoseconds(counted.get("wr_total_time_ns", 0))
            disk.flushes_count = counted.get("flush_operations", 0)
            disk.flush_time.FromNanoseconds(counted.get("flush_total_time_ns", 0))
            disk.capacity_bytes = guest.birth.capacities.get(device_id, 0)
            path = guest.birth.images.get(device_id)
            if path is not None:
                # A pool may be on a network, and slow.
                found_file = await asyncio.to_thread(_file, path)
                disk.physical_bytes, disk.allocation_bytes = found_file


def _known(value: int | None) -> int:
    return value if value is not None and 0 <= value < min(_UNKNOWN, 2**63) else 0


def _file(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)  # noqa: PTH116  # the text as storage gave it
    except OSError:
        # Storage may have moved it, or keeps it where only guests reach it.
        return 0, 0
    return found.st_size, found.st_blocks * 512


def _process_times(answer: stats_pb2.CpuStats, pid: int) -> None:
    # Behind the name, which may hold anything but is in parentheses.
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    user, system = int(fields[11]) * _NANOSECONDS_PER_TICK, int(fields[12]) * _NANOSECONDS_PER_TICK
    answer.user_time.FromNanoseconds(user)
    answer.system_time.FromNanoseconds(system)
    answer.total_time.FromNanoseconds(user + system)


def _thread_times(pid: int, thread: int) -> tuple[int, int]:
    ran, waited, *_ = Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()
    return int(ran), int(waited)


def _process_memory(answer: stats_pb2.MemoryStats, pid: int) -> None:
    _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    answer.resident_bytes = resident * _PAGE_BYTES
    answer.private_bytes = (resident - shared) * _PAGE_BYTES


def _interfaces(answer: stats_pb2.DomainStats, guest: Guest, links: dict[int, Mapping[str, Sequence[int]]]) -> None:
    if not guest.birth.taps:
        return
    # The taps are in the network namespace of the process, which need not be ours.
    space = _network_of(guest.pid)
    if space not in links:
        links[space] = _links(Path(f"/proc/{guest.pid}/net/dev").read_text())
    for device_id, tap in sorted(guest.birth.taps.items()):
        interface = answer.interfaces.add(device_id=device_id, host_device=tap)
        counted = links[space].get(tap)
        if counted is None:
            continue
        # What the host receives the guest has sent.
        (
            interface.transmitted_bytes,
            interface.transmitted_packets_count,
            interface.transmit_errors_count,
            interface.transmit_drops_count,
        ) = counted[:4]
        (
            interface.received_bytes,
            interface.received_packets_count,
            interface.receive_errors_count,
            interface.receive_drops_count,
        ) = counted[8:12]


def _network_of(pid: int) -> int:
    """Return what tells the network namespace of a process from others."""
    try:
        return Path(f"/proc/{pid}/ns/net").stat().st_ino
    except PermissionError:
        # Which namespace that is only a tracer may know; what links it has everybody may. So each is read by itself.
        return -pid


def _links(text: str) -> Mapping[str, Sequence[int]]:
    """Return the 16 counters of each link, as /proc/net/dev has them."""
    lines = (line.partition(":") for line in text.splitlines()[2:])
    return {name.strip(): [int(word) for word in rest.split()] for name, _, rest in lines}

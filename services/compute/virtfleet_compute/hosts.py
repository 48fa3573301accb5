"""The host of the node as a resource, and its counters; read from /proc and /sys, never from a tool."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import platform
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf.timestamp_pb2 import Timestamp

from virtfleet.compute.v1 import capability_pb2, host_pb2, stats_pb2
from virtfleet_compute import statuses
from virtfleet_compute.admission import memory_info
from virtfleet_compute.context import Context
from virtfleet_compute.drivers.api import DriverReport
from virtfleet_service import paging, resources, views
from virtfleet_service.errors import VirtfleetError
from virtfleet_service.store import Store, Transaction

if TYPE_CHECKING:
    from virtfleet_service.call import Call

_log = logging.getLogger(__name__)

HOST = "host"
DRIVER = "driver"
REFRESH_SECONDS = 5.0
GATHER_SECONDS = 0.5
"""How long what guests have been given or have given back may be unknown to the watchers of the host."""

_PROC = Path("/proc")
_NODES = Path("/sys/devices/system/node")
_HUGE = Path("/sys/kernel/mm/hugepages")


class Hosts:
    """Describes the host of this node."""

    def __init__(self, context: Context, boot_id: str) -> None:
        self._context = context
        self._boot_id = boot_id
        self._name = f"nodes/{context.node}/host"
        self._fixed: host_pb2.HostStatus | None = None
        self._reports: tuple[tuple[str, DriverReport], ...] = ()
        self._probe_time = resources.now()

    async def run(self) -> None:
        """Keep the stored host up to date, for watchers. Runs until cancelled."""
        changed = self._context.admission.changed
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REFRESH_SECONDS):
                    await changed.wait()
                    # Domains start and end in crowds: once for all of them.
                    await asyncio.sleep(GATHER_SECONDS)
            changed.clear()
            try:
                await self.store()
            except VirtfleetError as error:
                _log.warning("the host is not stored for now: %s", error)

    async def store(self) -> None:
        """Store host and drivers as they are now, where they differ from what is stored."""
        status = self._status()
        drivers = list(self._context.hypervisors.resources())
        stored = self._stored()
        if stored is None or stored.status != status:
            await self._context.store.write(lambda tx: self._put_host(tx, status))
        if not all(self._is_stored(driver) for driver in drivers):
            await self._context.store.write(lambda tx: _put_drivers(tx, drivers))

    def get(self, view: int = views.FULL) -> host_pb2.Host:
        """Return the host with what is allocated at this moment."""
        host = self._stored()
        if host is None:
            host = host_pb2.Host(name=self._name)
        host.status.CopyFrom(self._status())
        return views.apply_view(host, view)

    def drivers(self, request: capability_pb2.ListDriversRequest, call: Call) -> bytes:
        """Return a serialised page of drivers."""
        return paging.list_reply(self._context.store, DRIVER, request, capability_pb2.ListDriversResponse, call=call)

    def driver(self, request: capability_pb2.GetDriverRequest, call: Call) -> bytes:
        """Return a serialised driver.

        Raises:
            ResourceNotFound: There is none.
            PermissionMissing: The caller may not see it.
        """
        row = self._context.store.find(DRIVER, request.name)
        call.authorize(row.name)
        if request.view != views.BASIC:
            return row.body
        return views.apply_view(capability_pb2.Driver.FromString(row.body), request.view).SerializeToString()

    def _is_stored(self, driver: capability_pb2.Driver) -> bool:
        row = self._context.store.get(driver.name)
        return row is not None and capability_pb2.Driver.FromString(row.body).status == driver.status

    def _stored(self) -> host_pb2.Host | None:
        row = self._context.store.get(self._name)
        return host_pb2.Host.FromString(row.body) if row is not None else None

    def _put_host(self, tx: Transaction, status: host_pb2.HostStatus) -> None:
        row = tx.get(self._name)
        host = host_pb2.Host.FromString(row.body) if row is not None else host_pb2.Host()
        if row is None:
            resources.create_head(host, self._name)
            host.spec.SetInParent()
        host.status.CopyFrom(status)
        tx.put(HOST, host, cause=statuses.OBSERVED)

    def _status(self) -> host_pb2.HostStatus:
        reports = tuple(self._context.hypervisors.reports())
        if self._fixed is None or reports != self._reports:
            self._probe_time = resources.now()
            self._fixed, self._reports = self._read_fixed(reports), reports
        status = host_pb2.HostStatus()
        status.CopyFrom(self._fixed)
        admission = self._context.admission
        status.allocatable.vcpu_count = status.cpu.online_count
        status.allocatable.memory_bytes = admission.allocatable_memory_bytes()
        status.allocatable.domain_count = self._context.settings.domain_limit
        status.allocated.vcpu_count = admission.allocated_vcpu_count
        status.allocated.memory_bytes = admission.allocated_memory_bytes
        status.allocated.domain_count = admission.active_count
        return status

    def _read_fixed(self, reports: Sequence[tuple[str, DriverReport]]) -> host_pb2.HostStatus:
        """Read what does not change before the next boot, and what drivers have found out."""
        status = host_pb2.HostStatus()
        status.CopyFrom(_kernel_facts())
        status.boot_id = self._boot_id
        for driver_id, report in reports:
            for accelerator in report.accelerators:
                status.accelerators.add(
                    name=accelerator.name,
                    usable=accelerator.usable,
                    reason=accelerator.reason,
                    probe_time=self._probe_time,
                )
            for layer in report.isolation_layers:
                status.isolation_layers.add(
                    name=layer.name, enabled=layer.enabled, reason=layer.reason, driver=driver_id
                )
        return status

    def stats(self) -> stats_pb2.HostStats:
        """Return the counters of the host."""
        answer = stats_pb2.HostStats(name=self._name, observe_time=_now())
        ticks = _processor_ticks()
        nanoseconds = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
        user, nice, system, idle, wait, irq, soft_irq, steal = ticks
        answer.user_time.FromNanoseconds((user + nice) * nanoseconds)
        answer.system_time.FromNanoseconds((system + irq + soft_irq) * nanoseconds)
        answer.idle_time.FromNanoseconds(idle * nanoseconds)
        answer.io_wait_time.FromNanoseconds(wait * nanoseconds)
        answer.steal_time.FromNanoseconds(steal * nanoseconds)
        answer.load_one_minute = os.getloadavg()[0]
        info = memory_info()
        answer.memory_total_bytes = info.get("MemTotal", 0)
        answer.memory_free_bytes = info.get("MemFree", 0)
        answer.memory_available_bytes = info.get("MemAvailable", 0)
        answer.memory_cached_bytes = info.get("Cached", 0) + info.get("Buffers", 0)
        uptime = float((_PROC / "uptime").read_text().split()[0])
        answer.uptime.FromNanoseconds(int(uptime * 1e9))
        return answer


def _put_drivers(tx: Transaction, drivers: Sequence[capability_pb2.Driver]) -> None:
    for driver in drivers:
        _put_driver(tx, driver)


def _put_driver(tx: Transaction, driver: capability_pb2.Driver) -> None:
    row = tx.get(driver.name)
    if row is None:
        resources.create_head(driver, driver.name)
        driver.spec.SetInParent()
        tx.put(DRIVER, driver, cause=statuses.OBSERVED)
        return
    stored = capability_pb2.Driver.FromString(row.body)
    if stored.status != driver.status:
        stored.status.CopyFrom(driver.status)
        tx.put(DRIVER, stored, cause=statuses.OBSERVED)


async def forget_drivers(store: Store, node: str, enabled: tuple[str, ...]) -> None:
    """Delete the stored drivers that the settings no longer enable."""
    gone = [
        row.name for row in store.list(DRIVER, parent=f"nodes/{node}") if row.name.rpartition("/")[2] not in enabled
    ]
    if gone:
        await store.write(lambda tx: [tx.delete(name, cause=statuses.OBSERVED) for name in gone])


@functools.cache
def _kernel_facts() -> host_pb2.HostStatus:
    """Read what the kernel says of this host; the same for all nodes of a process. Never changed: it is copied."""
    uname = platform.uname()
    status = host_pb2.HostStatus(
        hostname=socket.gethostname(),
        kernel_release=uname.release,
        arch=uname.machine,
        memory_total_bytes=memory_info().get("MemTotal", 0),
    )
    status.boot_time.FromSeconds(int(_boot_seconds()))
    _read_cpu(status.cpu)
    _read_cells(status)
    _read_huge_pages(status)
    return status


def _now() -> Timestamp:
    return resources.now()


def _processor_ticks() -> tuple[int, ...]:
    line = (_PROC / "stat").read_text().partition("\n")[0].split()[1:]
    values = [int(value) for value in line[:8]]
    return tuple(values + [0] * (8 - len(values)))


def _boot_seconds() -> int:
    for line in (_PROC / "stat").read_text().splitlines():
        if line.startswith("btime "):
            return int(line.split()[1])
    return 0


def _read_cpu(cpu: host_pb2.HostCpu) -> None:
    cpu.online_count = len(os.sched_getaffinity(0))
    packages: set[str] = set()
    cores: set[tuple[str, str]] = set()
    package = ""
    for line in (_PROC / "cpuinfo").read_text().splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name" and not cpu.model_name:
            cpu.model_name = value
        elif key in ("vendor_id", "CPU implementer") and not cpu.vendor:
            cpu.vendor = value
        elif key in ("flags", "Features") and not cpu.features:
            cpu.features.extend(sorted(value.split()))
        elif key == "physical id":
            package = value
            packages.add(value)
        elif key == "core id":
            cores.add((package, value))
    cpu.socket_count = max(len(packages), 1)
    cpu.core_count = len(cores) or cpu.online_count
    cpu.thread_count = max(cpu.online_count // max(cpu.core_count, 1), 1)


def _read_cells(status: host_pb2.HostStatus) -> None:
    for folder in sorted(_NODES.glob("node[0-9]*"), key=lambda path: int(path.name.removeprefix("node"))):
        cell = status.cells.add(cell_number=int(folder.name.removeprefix("node")))
        for line in (folder / "meminfo").read_text().splitlines():
            if "MemTotal:" in line:
                cell.memory_total_bytes = int(line.split()[-2]) * 1024
        for part in filter(None, (folder / "cpulist").read_text().strip().split(",")):
            first, _, last = part.partition("-")
            cell.cpus.add(first=int(first), last=int(last or first))


def _read_huge_pages(status: host_pb2.HostStatus) -> None:
    for folder in sorted(_HUGE.glob("hugepages-*kB")):
        size = int(folder.name.removeprefix("hugepages-").removesuffix("kB")) * 1024
        status.huge_pages.add(
            page_size_bytes=size,
            total_count=int((folder / "nr_hugepages").read_text()),
            free_count=int((folder / "free_hugepages").read_text()),
        )

"""Counters of guests that do not exist: functions of uid and time, so that they move and cost no memory."""

from __future__ import annotations

import zlib

from virtfleet.compute.v1 import stats_pb2
from virtfleet_compute.drivers.test.guests import Guest, Shape

_PAGE = 4096


def fill(
    answer: stats_pb2.DomainStats,
    uid: str,
    guest: Guest,
    shape: Shape,
    groups: frozenset[stats_pb2.StatsGroup.ValueType],
    now_ns: int,
) -> None:
    """Fill the groups that are asked for."""
    load = 1 + zlib.crc32(uid.encode()) % 100
    run_ns = max(now_ns - guest.start_ns, 0)
    busy_ns = run_ns * load // 400
    milliseconds = run_ns // 1_000_000
    if stats_pb2.STATS_GROUP_CPU in groups:
        answer.cpu.total_time.FromNanoseconds(busy_ns * guest.vcpu_count)
        answer.cpu.user_time.FromNanoseconds(busy_ns * guest.vcpu_count * 4 // 5)
        answer.cpu.system_time.FromNanoseconds(busy_ns * guest.vcpu_count // 5)
    if stats_pb2.STATS_GROUP_BALLOON in groups:
        answer.balloon.current_bytes = guest.memory_bytes
        answer.balloon.maximum_bytes = guest.memory_bytes
        answer.balloon.unused_bytes = guest.memory_bytes * (100 - load) // 100
    if stats_pb2.STATS_GROUP_VCPU in groups:
        for number in range(guest.vcpu_count):
            vcpu = answer.vcpus.add(vcpu_number=number, online=True)
            vcpu.total_time.FromNanoseconds(busy_ns)
    _devices(answer, shape, groups, milliseconds, load)
    if stats_pb2.STATS_GROUP_MEMORY in groups:
        answer.memory.resident_bytes = guest.memory_bytes * load // 100
        answer.memory.private_bytes = guest.memory_bytes * load // 200
    if stats_pb2.STATS_GROUP_HYPERVISOR in groups:
        answer.driver_counters.add(
            name="test.ticks", kind=stats_pb2.DRIVER_COUNTER_KIND_COUNTER, integer_value=milliseconds
        )


def _devices(
    answer: stats_pb2.DomainStats,
    shape: Shape,
    groups: frozenset[stats_pb2.StatsGroup.ValueType],
    milliseconds: int,
    load: int,
) -> None:
    if stats_pb2.STATS_GROUP_INTERFACE in groups:
        for device_id in shape.interfaces:
            answer.interfaces.add(
                device_id=device_id,
                received_bytes=milliseconds * load,
                received_packets_count=milliseconds * load // 100,
                transmitted_bytes=milliseconds * load // 2,
                transmitted_packets_count=milliseconds * load // 200,
            )
    if stats_pb2.STATS_GROUP_DISK in groups:
        for device_id in shape.disks:
            disk = answer.disks.add(
                device_id=device_id,
                reads_count=milliseconds * load // 1000,
                read_bytes=milliseconds * load // 1000 * _PAGE,
                writes_count=milliseconds * load // 2000,
                write_bytes=milliseconds * load // 2000 * _PAGE,
                flushes_count=milliseconds // 5000,
            )
            disk.read_time.FromNanoseconds(milliseconds * load * 25)
            disk.write_time.FromNanoseconds(milliseconds * load * 12)

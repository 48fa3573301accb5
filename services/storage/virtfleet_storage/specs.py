"""Turns what is asked of a new volume into a plan that leaves nothing open, or says what contradicts itself."""

from __future__ import annotations

from virtfleet.storage.v1 import volume_pb2
from virtfleet_service.errors import FieldConflict, FieldOutOfRange
from virtfleet_storage.backends.api import QCOW2, RAW, Format, Plan

SECTOR_BYTES = 512
_DEFAULT_CLUSTER_BYTES = 65536
_FIRST_TABLE_BYTES, _ENTRY_BYTES = 32 << 20, 8
_TABLES = (
    volume_pb2.PREALLOCATION_METADATA,
    volume_pb2.PREALLOCATION_FALLOC,
    volume_pb2.PREALLOCATION_FULL,
)


def rounded(format: Format, capacity_bytes: int) -> int:
    """Return the size that a volume gets for the one that is asked for."""
    if format == QCOW2:
        return -(-capacity_bytes // SECTOR_BYTES) * SECTOR_BYTES
    return capacity_bytes


def check_size(capacity_bytes: int, cluster_size_bytes: int, field: str) -> None:
    """Accept a size that an image of such clusters can have.

    Raises:
        FieldOutOfRange: Its first table would be larger than QEMU takes.
    """
    limit = cluster_size_bytes * (cluster_size_bytes // _ENTRY_BYTES) * (_FIRST_TABLE_BYTES // _ENTRY_BYTES)
    if capacity_bytes > limit:
        raise FieldOutOfRange(
            f"an image with clusters of {cluster_size_bytes} bytes has at most {limit} bytes",
            field=field,
            capacity_bytes=capacity_bytes,
            limit_bytes=limit,
            cluster_size_bytes=cluster_size_bytes,
        )


def format_of(spec: volume_pb2.VolumeSpec, source: volume_pb2.Volume | None) -> Format:
    """Return the format of a new volume."""
    if spec.format:
        return spec.format
    if spec.HasField("backing"):
        return QCOW2
    return source.spec.format if source is not None else RAW


def plan_of(
    spec: volume_pb2.VolumeSpec,
    *,
    source: volume_pb2.Volume | None = None,
    backing: volume_pb2.Volume | None = None,
    backing_name: str = "",
) -> Plan:
    """Return the plan for a new volume, and write what is decided into its spec.

    Args:
        spec: What is asked; filled in place.
        source: What it is a copy of.
        backing: What it lies on top of.
        backing_name: How the image names that.

    Raises:
        FieldConflict: Two fields exclude each other.
        FieldOutOfRange: It would be smaller than what it is a copy of, or larger than its clusters allow.
    """
    if source is not None and spec.HasField("backing"):
        raise FieldConflict("a volume is a copy or lies on top of another, not both", field="source_volume")
    format = spec.format = format_of(spec, source)
    _check_format(spec)
    below = source or backing
    least = below.status.capacity_bytes if below is not None else 0
    capacity = rounded(format, spec.capacity_bytes if spec.HasField("capacity_bytes") else least)
    if source is not None and capacity < least:
        raise FieldOutOfRange(
            f"a copy of {source.name} needs at least {least} bytes",
            field="volume.spec.capacity_bytes",
            capacity_bytes=capacity,
            least_bytes=least,
        )
    spec.capacity_bytes = capacity
    if format == QCOW2:
        cluster_size_bytes = spec.cluster_size_bytes or _DEFAULT_CLUSTER_BYTES
        check_size(capacity, cluster_size_bytes, "volume.spec.capacity_bytes")
    if backing is not None and spec.backing.format not in (volume_pb2.VOLUME_FORMAT_UNSPECIFIED, backing.spec.format):
        raise FieldConflict(
            f"{backing.name} has another format", field="volume.spec.backing.format", resource=backing.name
        )
    if backing is not None:
        spec.backing.format = backing.spec.format
    return Plan(
        format=format,
        capacity_bytes=capacity,
        preallocation=spec.preallocation or volume_pb2.PREALLOCATION_OFF,
        cluster_size_bytes=spec.cluster_size_bytes or _DEFAULT_CLUSTER_BYTES,
        compat=spec.compat or volume_pb2.QCOW2_COMPAT_1_1,
        backing_name=backing_name,
        backing_format=backing.spec.format if backing is not None else volume_pb2.VOLUME_FORMAT_UNSPECIFIED,
    )


def _check_format(spec: volume_pb2.VolumeSpec) -> None:
    if spec.format == RAW:
        for name, given in (
            ("backing", spec.HasField("backing")),
            ("cluster_size_bytes", spec.HasField("cluster_size_bytes")),
            ("compat", bool(spec.compat)),
        ):
            if given:
                raise FieldConflict(f"a RAW volume has no {name}", field=f"volume.spec.{name}")
    elif spec.HasField("backing"):
        if not spec.backing.volume:
            raise FieldConflict("`volume.spec.backing` names no volume", field="volume.spec.backing.volume")
        if spec.preallocation in _TABLES:
            raise FieldConflict(
                "room cannot be taken in advance for a volume on top of another", field="volume.spec.preallocation"
            )


def plan_again(volume: volume_pb2.Volume, backing_name: str) -> Plan:
    """Return the plan for an empty volume like one that exists."""
    spec = volume.spec
    return Plan(
        format=spec.format,
        capacity_bytes=volume.status.capacity_bytes,
        cluster_size_bytes=spec.cluster_size_bytes or _DEFAULT_CLUSTER_BYTES,
        compat=spec.compat or volume_pb2.QCOW2_COMPAT_1_1,
        backing_name=backing_name,
        backing_format=spec.backing.format or RAW,
    )

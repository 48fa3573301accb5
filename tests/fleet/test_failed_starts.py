"""Starts of real QEMUs that cannot succeed: each says why, and the host has nothing of them, as the kernel tells."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import empty_pb2

from tests.fleet.rig import MIB, Refusal, State, create, delete, get, refusal_of, refused, unique
from tests.fleet.stand import outside
from virtfleet.compute.v1 import domain_pb2, domain_spec_pb2
from virtfleet.storage.v1 import pool_pb2, volume_pb2
from virtfleet_client import Fleet


@dataclass(frozen=True, slots=True)
class Bench:
    """Is a pool with one volume, on the first node."""

    fleet: Fleet
    node: str
    pool: str
    disk: volume_pb2.Volume

    @property
    def path(self) -> Path:
        """The file of the volume on the host."""
        return Path(self.disk.status.path)


@pytest.fixture
def bench(fleet: Fleet, nodes: list[str]) -> Iterator[Bench]:
    """Yield the pool and its volume."""
    pool = pool_pb2.CreatePoolRequest(parent=nodes[0], pool_id=unique("pool"), start=True)
    pool.pool.spec.dir.SetInParent()
    made = fleet.wait(fleet.pools.CreatePool(pool), pool_pb2.Pool)
    volume = volume_pb2.CreateVolumeRequest(parent=made.name, volume_id="disk")
    volume.volume.spec.capacity_bytes = 4 * MIB
    volume.volume.spec.format = volume_pb2.VOLUME_FORMAT_QCOW2
    disk = fleet.wait(fleet.volumes.CreateVolume(volume), volume_pb2.Volume)
    yield Bench(fleet, nodes[0], pool.pool_id, disk)
    fleet.wait(fleet.volumes.DeleteVolume(volume_pb2.DeleteVolumeRequest(name=disk.name)), empty_pb2.Empty)
    fleet.wait(fleet.pools.StopPool(pool_pb2.StopPoolRequest(name=made.name)), pool_pb2.Pool)
    fleet.wait(fleet.pools.DeletePool(pool_pb2.DeletePoolRequest(name=made.name)), empty_pb2.Empty)


def guest() -> domain_spec_pb2.DomainSpec:
    """Return the spec of a small machine."""
    spec = domain_spec_pb2.DomainSpec(driver="qemu")
    spec.memory.maximum_bytes = 64 * MIB
    return spec


def without_kernel(bench: Bench) -> domain_spec_pb2.DomainSpec:
    spec = guest()
    spec.os.kernel.kernel_volume = f"pools/{bench.pool}/volumes/vmlinuz"
    return spec


def with_too_much_memory(bench: Bench) -> domain_spec_pb2.DomainSpec:
    spec = guest()
    spec.memory.maximum_bytes = 1 << 42
    spec.disks["root"].volume = f"pools/{bench.pool}/volumes/disk"
    return spec


def on_a_broken_image(bench: Bench) -> domain_spec_pb2.DomainSpec:
    spec = guest()
    spec.disks["root"].volume = f"pools/{bench.pool}/volumes/disk"
    with bench.path.open("r+b") as file:
        # The table of clusters lies behind the end of the file.
        file.seek(40)
        file.write((1 << 40).to_bytes(8, "big"))
    return spec


def on_an_image_that_leads_out(bench: Bench) -> domain_spec_pb2.DomainSpec:
    spec = guest()
    spec.disks["root"].volume = f"pools/{bench.pool}/volumes/disk"
    name = b"/etc/shadow"
    with bench.path.open("r+b") as file:
        file.seek(8)
        file.write((512).to_bytes(8, "big") + len(name).to_bytes(4, "big"))
        file.seek(512)
        file.write(name)
    return spec


def on_a_link(bench: Bench) -> domain_spec_pb2.DomainSpec:
    spec = guest()
    spec.disks["root"].volume = f"pools/{bench.pool}/volumes/disk"
    bench.path.unlink()
    bench.path.symlink_to("/etc/shadow")
    return spec


OUTSIDE = Refusal("PERMISSION_DENIED", "PATH_OUTSIDE_POOL")
ROWS: list[tuple[str, Callable[[Bench], Any], Refusal, str]] = [
    ("no kernel", without_kernel, Refusal("NOT_FOUND", "RESOURCE_NOT_FOUND"), "vmlinuz"),
    ("too much memory", with_too_much_memory, Refusal("RESOURCE_EXHAUSTED", "NODE_MEMORY_SHORT"), ""),
    ("a broken image", on_a_broken_image, Refusal("DATA_LOSS", "IMAGE_CORRUPT"), "disk"),
    ("an image that leads out of its pool", on_an_image_that_leads_out, OUTSIDE, "disk"),
    ("a link that leads out of its pool", on_a_link, OUTSIDE, "disk"),
]
"""What is tried, how it is refused, and the volume that is named."""


def processes_of(uid: str) -> list[str]:
    """Return the processes that have a uid in their command."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if uid.encode() in command:
            found.append(process.name)
    return found


@pytest.mark.parametrize(("spec_of", "wanted", "volume_id"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_a_start_that_fails_leaves_nothing(
    bench: Bench, spec_of: Callable[[Bench], Any], wanted: Refusal, volume_id: str
) -> None:
    fleet = bench.fleet
    shadow = Path("/etc/shadow").stat()
    made = create(fleet, bench.node, spec=spec_of(bench))
    try:
        before = outside(bench.node)
        request = domain_pb2.StartDomainRequest(name=made.name)
        error = refused(lambda: fleet.wait(fleet.domains.StartDomain(request, timeout=30), domain_pb2.Domain))
        assert refusal_of(error) == wanted, error
        named = f"{bench.node}/pools/{bench.pool}/volumes/{volume_id}" if volume_id else made.name
        assert error.metadata["resource"] == named, error.metadata
        after = get(fleet, made.name)
        assert after.status.state == State.DOMAIN_STATE_SHUT_OFF
        assert after.spec == made.spec
        assert processes_of(made.uid) == []
        assert outside(bench.node) == before
        volume = fleet.volumes.GetVolume(volume_pb2.GetVolumeRequest(name=bench.disk.name))
        assert not volume.status.attachments
        now = Path("/etc/shadow").stat()
        assert (now.st_uid, now.st_gid, now.st_mode) == (shadow.st_uid, shadow.st_gid, shadow.st_mode)
    finally:
        delete(fleet, made.name)

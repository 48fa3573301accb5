"""Volumes and networks through the gateway; the host is asked what is really there."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import empty_pb2

from tests.fleet.rig import (
    MIB,
    Refusal,
    State,
    domain,
    get,
    mac,
    refusal_of,
    refused,
    small_spec,
    unique,
    until,
    verb,
)
from virtfleet.compute.v1 import domain_pb2
from virtfleet.network.v1 import network_pb2, port_pb2
from virtfleet.storage.v1 import pool_pb2, volume_pb2
from virtfleet_client import Fleet
from virtfleet_client.transfer import download, upload

RAW, QCOW2 = volume_pb2.VOLUME_FORMAT_RAW, volume_pb2.VOLUME_FORMAT_QCOW2


def record(run_folder: Path) -> dict[str, Any]:
    """Return what the fleet says of itself to its own tools."""
    found: dict[str, Any] = json.loads((run_folder / "fleet.json").read_text())
    return found


def links(run_folder: Path, node: str) -> dict[str, dict[str, Any]]:
    """Return the links of a node by name, as the kernel has them."""
    namespace = f"virtfleet-{record(run_folder)['tag']}-{node.removeprefix('nodes/')}"
    found = subprocess.run(["ip", "-n", namespace, "-j", "-d", "addr", "show"], capture_output=True, check=True)
    return {link["ifname"]: link for link in json.loads(found.stdout)}


# Storage.


@pytest.fixture
def pool(fleet: Fleet, nodes: list[str]) -> Iterator[pool_pb2.Pool]:
    """Yield a running pool of directories, deleted afterwards with all that is in it."""
    request = pool_pb2.CreatePoolRequest(parent=nodes[0], pool_id=unique("pool"), start=True)
    request.pool.spec.dir.SetInParent()
    made = fleet.wait(fleet.pools.CreatePool(request), pool_pb2.Pool)
    yield made
    fleet.wait(fleet.pools.StartPool(pool_pb2.StartPoolRequest(name=made.name)), pool_pb2.Pool)
    for volume in reversed(
        # Those made on top of others have later names here and go first.
        list(fleet.pages(fleet.volumes.ListVolumes, volume_pb2.ListVolumesRequest(parent=made.name)))
    ):
        fleet.wait(fleet.volumes.DeleteVolume(volume_pb2.DeleteVolumeRequest(name=volume.name)), empty_pb2.Empty)
    fleet.wait(fleet.pools.StopPool(pool_pb2.StopPoolRequest(name=made.name)), pool_pb2.Pool)
    fleet.wait(fleet.pools.DeletePool(pool_pb2.DeletePoolRequest(name=made.name)), empty_pb2.Empty)


def make(fleet: Fleet, pool: pool_pb2.Pool, id_: str, capacity: int, kind: Any = RAW) -> volume_pb2.Volume:
    """Make a volume."""
    request = volume_pb2.CreateVolumeRequest(parent=pool.name, volume_id=id_)
    request.volume.spec.format = kind
    request.volume.spec.capacity_bytes = capacity
    return fleet.wait(fleet.volumes.CreateVolume(request), volume_pb2.Volume)


def read(fleet: Fleet, name: str) -> volume_pb2.Volume:
    """Read a volume."""
    found: volume_pb2.Volume = fleet.volumes.GetVolume(volume_pb2.GetVolumeRequest(name=name), timeout=10)
    return found


def noise(path: Path, size: int) -> bytes:
    """Write a file that nothing can guess or shrink."""
    content = random.Random(str(path)).randbytes(size)
    path.write_bytes(content)
    return content


def pieces(
    name: str, content: bytes, *, digest: str = "", upload_id: str = "", begin: int = 0, end: int | None = None
) -> Iterator[volume_pb2.UploadVolumeRequest]:
    """Yield the messages of an upload, or of a part of one."""
    start = volume_pb2.UploadStart(
        length_bytes=len(content),
        digest=f"sha256:{digest or hashlib.sha256(content).hexdigest()}",
        upload_id=upload_id or uuid.uuid4().hex,
    )
    yield volume_pb2.UploadVolumeRequest(name=name, start=start)
    for offset in range(begin, len(content) if end is None else end, MIB):
        message = volume_pb2.UploadVolumeRequest()
        message.chunk.offset = offset
        message.chunk.data = content[offset : offset + MIB]
        yield message


def test_what_goes_up_comes_down(fleet: Fleet, pool: pool_pb2.Pool, tmp_path: Path) -> None:
    content = noise(tmp_path / "up", 8 * MIB)
    made = make(fleet, pool, "disk", 8 * MIB)
    after = upload(fleet, made.name, tmp_path / "up")
    assert after.status.digest == f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert after.uid == made.uid
    start = download(fleet, made.name, tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == content
    assert start.digest == after.status.digest
    on_host = Path(after.status.path)
    assert on_host.read_bytes() == content, "the file of the host"
    request = volume_pb2.DownloadVolumeRequest(name=made.name, offset_bytes=3 * MIB + 17, length_bytes=100_000)
    data = b"".join(answer.chunk.data for answer in fleet.volumes.DownloadVolume(request) if answer.HasField("chunk"))
    assert data == content[3 * MIB + 17 : 3 * MIB + 17 + 100_000]
    beyond = volume_pb2.DownloadVolumeRequest(name=made.name, offset_bytes=9 * MIB)
    error = refused(lambda: list(fleet.volumes.DownloadVolume(beyond)))
    assert (error.code().name, error.reason) == ("OUT_OF_RANGE", "RANGE_BEYOND_END"), error


def test_an_upload_goes_on_after_a_cut(fleet: Fleet, pool: pool_pb2.Pool, tmp_path: Path) -> None:
    content = noise(tmp_path / "up", 8 * MIB)
    made = make(fleet, pool, "disk", 8 * MIB)
    answer = fleet.volumes.UploadVolume(pieces(made.name, content, upload_id="cut", end=5 * MIB))
    assert not answer.complete
    assert answer.received_bytes == 5 * MIB
    half = read(fleet, made.name)
    assert [(one.upload_id, one.received_bytes) for one in half.status.uploads] == [("cut", 5 * MIB)]
    assert half.status.digest == made.status.digest, "the old content"
    assert not any(Path(half.status.path).read_bytes())
    answer = fleet.volumes.UploadVolume(pieces(made.name, content, upload_id="cut", begin=5 * MIB))
    assert answer.complete
    assert not read(fleet, made.name).status.uploads
    assert Path(half.status.path).read_bytes() == content


def test_a_wrong_digest_leaves_the_old_content(fleet: Fleet, pool: pool_pb2.Pool, tmp_path: Path) -> None:
    old = noise(tmp_path / "old", 2 * MIB)
    made = make(fleet, pool, "disk", 2 * MIB)
    upload(fleet, made.name, tmp_path / "old")
    before = read(fleet, made.name)
    content = noise(tmp_path / "new", 2 * MIB)
    error = refused(lambda: fleet.volumes.UploadVolume(pieces(made.name, content, digest="0" * 64)))
    assert (error.code().name, error.reason) == ("DATA_LOSS", "CHECKSUM_MISMATCH"), error
    assert error.metadata["digest"] == f"sha256:{hashlib.sha256(content).hexdigest()}"
    after = read(fleet, made.name)
    assert (after.status.digest, after.etag) == (before.status.digest, before.etag)
    assert Path(after.status.path).read_bytes() == old


def test_sizes_formats_and_content_of_volumes(fleet: Fleet, pool: pool_pb2.Pool) -> None:
    made = make(fleet, pool, "disk", 64 * MIB, QCOW2)
    assert made.status.capacity_bytes == 64 * MIB
    assert Path(made.status.path).read_bytes()[:4] == b"QFI\xfb"
    grow = volume_pb2.ResizeVolumeRequest(name=made.name, capacity_bytes=128 * MIB)
    assert fleet.wait(fleet.volumes.ResizeVolume(grow), volume_pb2.Volume).status.capacity_bytes == 128 * MIB
    shrink = volume_pb2.ResizeVolumeRequest(name=made.name, capacity_bytes=64 * MIB)
    error = refused(lambda: fleet.wait(fleet.volumes.ResizeVolume(shrink), volume_pb2.Volume))
    assert refusal_of(error) == Refusal("INVALID_ARGUMENT", "FIELD_CONFLICT", ("capacity_bytes",)), error
    assert read(fleet, made.name).status.capacity_bytes == 128 * MIB
    info = subprocess.run(["qemu-img", "info", "--output=json", made.status.path], capture_output=True, check=True)
    assert json.loads(info.stdout)["virtual-size"] == 128 * MIB


def test_a_volume_on_top_of_another(fleet: Fleet, pool: pool_pb2.Pool, nodes: list[str]) -> None:
    base = make(fleet, pool, "base", 16 * MIB)
    request = volume_pb2.CreateVolumeRequest(parent=pool.name, volume_id="top")
    request.volume.spec.format = QCOW2
    request.volume.spec.backing.volume = base.name.removeprefix(f"{nodes[0]}/")
    top = fleet.wait(fleet.volumes.CreateVolume(request), volume_pb2.Volume)
    assert [link.volume for link in top.status.backing_chain] == [request.volume.spec.backing.volume]
    error = refused(lambda: fleet.volumes.DeleteVolume(volume_pb2.DeleteVolumeRequest(name=base.name)))
    assert (error.code().name, error.reason) == ("FAILED_PRECONDITION", "HAS_CHILDREN"), error
    assert top.name in error.details()
    assert Path(base.status.path).exists()
    fleet.wait(fleet.volumes.DeleteVolume(volume_pb2.DeleteVolumeRequest(name=top.name)), empty_pb2.Empty)


def test_a_volume_is_found_by_its_path_and_by_its_names(fleet: Fleet, pool: pool_pb2.Pool, nodes: list[str]) -> None:
    made = [make(fleet, pool, f"disk{number}", MIB) for number in range(5)]
    for volume in made:
        request = volume_pb2.LookupVolumeRequest(parent=nodes[0], path=volume.status.path)
        assert fleet.volumes.LookupVolume(request) == volume
    listed = list(fleet.pages(fleet.volumes.ListVolumes, volume_pb2.ListVolumesRequest(parent=pool.name, page_size=2)))
    assert [volume.name for volume in listed] == sorted(volume.name for volume in made)
    everywhere = volume_pb2.ListVolumesRequest(parent=f"{nodes[0]}/pools/-", page_size=2)
    assert {volume.name for volume in fleet.pages(fleet.volumes.ListVolumes, everywhere)} >= {
        volume.name for volume in made
    }
    names = [made[0].name, f"{pool.name}/volumes/none"]
    answer = fleet.volumes.BatchGetVolumes(volume_pb2.BatchGetVolumesRequest(parent=pool.name, names=names))
    assert [result.status.code for result in answer.results] == [0, 5]
    error = refused(
        lambda: fleet.volumes.LookupVolume(volume_pb2.LookupVolumeRequest(parent=nodes[0], path="/etc/passwd"))
    )
    assert error.reason == "RESOURCE_NOT_FOUND"


def test_a_pool_that_is_forgotten_leaves_its_data(fleet: Fleet, pool: pool_pb2.Pool, nodes: list[str]) -> None:
    disk = make(fleet, pool, "disk", MIB)
    found = fleet.wait(fleet.pools.RefreshPool(pool_pb2.RefreshPoolRequest(name=pool.name)), pool_pb2.Pool)
    assert found.status.volume_count == 1
    assert found.status.capacity_bytes >= found.status.available_bytes > 0
    fleet.wait(fleet.pools.DeletePool(pool_pb2.DeletePoolRequest(name=pool.name)), empty_pb2.Empty)
    assert refused(lambda: read(fleet, disk.name)).reason == "RESOURCE_NOT_FOUND"
    assert Path(disk.status.path).stat().st_size == MIB
    request = pool_pb2.CreatePoolRequest(parent=nodes[0], pool_id=pool.name.rpartition("/")[2], start=True)
    request.pool.spec.dir.SetInParent()
    again = fleet.wait(fleet.pools.CreatePool(request), pool_pb2.Pool)
    assert again.uid != pool.uid

    def found_again() -> bool:
        listed = fleet.volumes.ListVolumes(volume_pb2.ListVolumesRequest(parent=again.name)).volumes
        return [volume.status.path for volume in listed] == [disk.status.path]

    until(found_again, 10, "its files are found again")


def test_a_domain_brings_its_volumes_and_takes_them_with_it(
    fleet: Fleet, pool: pool_pb2.Pool, nodes: list[str]
) -> None:
    relative = pool.name.removeprefix(f"{nodes[0]}/")
    request = domain_pb2.CreateDomainRequest(parent=nodes[0], domain_id=unique())
    request.domain.spec.CopyFrom(small_spec())
    request.domain.spec.disks["root"].volume = f"{relative}/volumes/root"
    request.start.SetInParent()
    request.new_volumes.add(pool=relative, volume_id="root", spec={"capacity_bytes": MIB, "format": RAW})
    made = fleet.wait(fleet.domains.CreateDomain(request), domain_pb2.Domain)
    disk = read(fleet, f"{pool.name}/volumes/root")
    assert [one.domain for one in disk.status.attachments] == [made.name]
    gone = domain_pb2.DeleteDomainRequest(name=made.name, stop=True, delete_volumes=True)
    fleet.wait(fleet.domains.DeleteDomain(gone), empty_pb2.Empty)
    assert refused(lambda: read(fleet, disk.name)).reason == "RESOURCE_NOT_FOUND"
    assert not Path(disk.status.path).exists()


def test_a_domain_that_cannot_be_made_leaves_no_volume(fleet: Fleet, pool: pool_pb2.Pool, nodes: list[str]) -> None:
    relative = pool.name.removeprefix(f"{nodes[0]}/")
    request = domain_pb2.CreateDomainRequest(parent=nodes[0], domain_id=unique())
    request.domain.spec.CopyFrom(small_spec())
    request.domain.spec.disks["root"].volume = f"{relative}/volumes/root"
    request.domain.spec.disks["other"].volume = f"{relative}/volumes/none"
    request.start.SetInParent()
    request.new_volumes.add(pool=relative, volume_id="root", spec={"capacity_bytes": MIB, "format": RAW})
    error = refused(lambda: fleet.wait(fleet.domains.CreateDomain(request), domain_pb2.Domain))
    assert (error.code().name, error.reason) == ("NOT_FOUND", "RESOURCE_NOT_FOUND"), error
    assert refused(lambda: get(fleet, f"{nodes[0]}/domains/{request.domain_id}")).reason == "RESOURCE_NOT_FOUND"
    listed = fleet.volumes.ListVolumes(volume_pb2.ListVolumesRequest(parent=pool.name))
    assert not listed.volumes
    assert not any(Path(pool.status.target_path).glob("root*"))


# Networks.


def network_of(parent: str, prefix: str, **fields: Any) -> network_pb2.CreateNetworkRequest:
    """Return a request for a network with NAT and DHCP."""
    request = network_pb2.CreateNetworkRequest(parent=parent, network_id=unique("net"), **fields)
    spec = request.network.spec
    spec.nat.SetInParent()
    base = prefix.rpartition(".")[0]
    spec.subnets["lan"].prefix = prefix
    spec.subnets["lan"].dhcp.ranges.add(first=f"{base}.10", last=f"{base}.20")
    spec.dns.enabled = True
    return request


@pytest.fixture
def network(fleet: Fleet, nodes: list[str]) -> Iterator[network_pb2.Network]:
    """Yield a running network, deleted afterwards with its ports."""
    made = fleet.wait(
        fleet.networks.CreateNetwork(network_of(nodes[0], "192.168.181.0/24", start=True)), network_pb2.Network
    )
    yield made
    gone = network_pb2.DeleteNetworkRequest(name=made.name, force=True)
    fleet.wait(fleet.networks.DeleteNetwork(gone), empty_pb2.Empty)


def test_the_life_of_a_network(fleet: Fleet, nodes: list[str], run_folder: Path) -> None:
    before = set(links(run_folder, nodes[0]))
    made = fleet.wait(fleet.networks.CreateNetwork(network_of(nodes[0], "192.168.182.0/24")), network_pb2.Network)
    assert made.status.state == network_pb2.NETWORK_STATE_INACTIVE
    assert set(links(run_folder, nodes[0])) == before
    start = network_pb2.StartNetworkRequest(name=made.name)
    for _ in range(2):
        running = fleet.wait(fleet.networks.StartNetwork(start), network_pb2.Network)
        assert running.status.state == network_pb2.NETWORK_STATE_RUNNING
    bridge = links(run_folder, nodes[0])[running.status.bridge_name]
    assert bridge["linkinfo"]["info_kind"] == "bridge"
    assert "192.168.182.1" in [address["local"] for address in bridge["addr_info"]]
    error = refused(lambda: fleet.networks.DeleteNetwork(network_pb2.DeleteNetworkRequest(name=made.name)))
    assert (error.code().name, error.reason) == ("FAILED_PRECONDITION", "WRONG_STATE"), error
    leases = fleet.networks.ListLeases(network_pb2.ListLeasesRequest(parent=made.name))
    assert not leases.leases
    for _ in range(2):
        stopped = fleet.wait(
            fleet.networks.StopNetwork(network_pb2.StopNetworkRequest(name=made.name)), network_pb2.Network
        )
        assert stopped.status.state == network_pb2.NETWORK_STATE_INACTIVE
    assert set(links(run_folder, nodes[0])) == before
    fleet.wait(fleet.networks.DeleteNetwork(network_pb2.DeleteNetworkRequest(name=made.name)), empty_pb2.Empty)
    error = refused(lambda: fleet.networks.GetNetwork(network_pb2.GetNetworkRequest(name=made.name)))
    assert error.reason == "RESOURCE_NOT_FOUND"


def test_subnets_do_not_overlap(fleet: Fleet, nodes: list[str], network: network_pb2.Network, run_folder: Path) -> None:
    before = set(links(run_folder, nodes[0]))
    for prefix in ("192.168.181.0/24", "192.168.181.128/25", "192.168.0.0/16"):
        request = network_pb2.CreateNetworkRequest(parent=nodes[0], network_id=unique("net"), start=True)
        request.network.spec.nat.SetInParent()
        request.network.spec.subnets["lan"].prefix = prefix
        error = refused(lambda request=request: fleet.wait(fleet.networks.CreateNetwork(request), network_pb2.Network))  # type: ignore[misc]  # binds the round's own
        assert (error.code().name, error.reason) == ("FAILED_PRECONDITION", "SUBNET_OVERLAP"), error
        assert network.name in error.metadata["holder"], error.metadata
    listed = fleet.networks.ListNetworks(network_pb2.ListNetworksRequest(parent=nodes[0]))
    assert network.name in [found.name for found in listed.networks]
    assert set(links(run_folder, nodes[0])) == before
    # On another node it overlaps nothing.
    other = fleet.wait(
        fleet.networks.CreateNetwork(network_of(nodes[1], "192.168.181.0/24", start=True)), network_pb2.Network
    )
    fleet.wait(
        fleet.networks.DeleteNetwork(network_pb2.DeleteNetworkRequest(name=other.name, force=True)), empty_pb2.Empty
    )


def test_a_port_reserves_address_and_mac(fleet: Fleet, nodes: list[str], network: network_pb2.Network) -> None:
    address = mac()
    request = port_pb2.CreatePortRequest(parent=network.name, port_id="p1")
    request.port.spec.mac_address = address
    request.port.spec.addresses.append("192.168.181.15")
    made = fleet.wait(fleet.ports.CreatePort(request), port_pb2.Port)
    assert made.status.mac_address == address
    assert list(made.status.addresses) == ["192.168.181.15"]
    assert made.status.state == port_pb2.PORT_STATE_UNPLUGGED
    assert fleet.ports.GetPort(port_pb2.GetPortRequest(name=made.name)) == made
    everywhere = port_pb2.ListPortsRequest(parent=f"{nodes[0]}/networks/-")
    assert made.name in [port.name for port in fleet.ports.ListPorts(everywhere).ports]
    taken = port_pb2.CreatePortRequest(parent=network.name, port_id="p2")
    taken.port.spec.mac_address = address
    error = refused(lambda: fleet.wait(fleet.ports.CreatePort(taken), port_pb2.Port))
    assert (error.code().name, error.reason) == ("ALREADY_EXISTS", "IDENTITY_IN_USE"), error
    taken.port.spec.mac_address = mac()
    taken.port.spec.addresses.append("192.168.181.15")
    error = refused(lambda: fleet.wait(fleet.ports.CreatePort(taken), port_pb2.Port))
    assert (error.code().name, error.reason) == ("ALREADY_EXISTS", "IDENTITY_IN_USE"), error
    fleet.wait(fleet.ports.DeletePort(port_pb2.DeletePortRequest(name=made.name)), empty_pb2.Empty)
    assert refused(lambda: fleet.ports.GetPort(port_pb2.GetPortRequest(name=made.name))).reason == "RESOURCE_NOT_FOUND"


def test_a_domain_owns_the_port_of_its_interface(
    fleet: Fleet, nodes: list[str], network: network_pb2.Network, run_folder: Path
) -> None:
    spec = small_spec()
    spec.interfaces["lan"].network = network.name.removeprefix(f"{nodes[0]}/")
    before = set(links(run_folder, nodes[0]))
    with domain(fleet, nodes[0], spec=spec) as made:
        name = f"{network.name}/ports/{made.name.rpartition('/')[2]}-lan"
        port = fleet.ports.GetPort(port_pb2.GetPortRequest(name=name))
        assert port.status.owner.domain_uid == made.uid
        assert port.status.mac_address == made.status.resolved_spec.interfaces["lan"].mac_address
        assert set(links(run_folder, nodes[0])) == before, "no link before the start"
        running = verb(fleet, "StartDomain", made.name)
        assert running.status.state == State.DOMAIN_STATE_RUNNING
        tap = fleet.ports.GetPort(port_pb2.GetPortRequest(name=name)).status.tap.interface_name
        assert links(run_folder, nodes[0])[tap]["master"] == network.status.bridge_name
        for call in (
            lambda: fleet.ports.DeletePort(port_pb2.DeletePortRequest(name=name)),
            lambda: fleet.networks.StopNetwork(network_pb2.StopNetworkRequest(name=network.name)),
        ):
            error = refused(call)
            assert (error.code().name, error.reason) == ("FAILED_PRECONDITION", "RESOURCE_IN_USE"), error
        verb(fleet, "StopDomain", made.name, mode=domain_pb2.STOP_MODE_FORCE)
        assert set(links(run_folder, nodes[0])) == before
        again = fleet.ports.GetPort(port_pb2.GetPortRequest(name=name))
        assert (again.status.mac_address, again.status.addresses) == (port.status.mac_address, port.status.addresses)
    assert refused(lambda: fleet.ports.GetPort(port_pb2.GetPortRequest(name=name))).reason == "RESOURCE_NOT_FOUND"

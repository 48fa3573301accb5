"""Starts and changes that the state of something forbids: refused, told why, and nothing left half done."""

from __future__ import annotations

from pathlib import Path

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
    verb,
)
from tests.fleet.stand import (
    Stand,
    everything,
    made,
    outside,
    update,
    with_disk,
)
from virtfleet.compute.v1 import domain_pb2, domain_spec_pb2
from virtfleet.network.v1 import network_pb2
from virtfleet.storage.v1 import pool_pb2, volume_pb2
from virtfleet.type.v1 import resource_pb2


def test_a_mac_address_is_given_once(stand: Stand) -> None:
    address = mac()
    parent = stand.node
    network = network_pb2.CreateNetworkRequest(parent=parent, network_id=unique("net"))
    network.network.spec.isolated.SetInParent()
    lan = stand.fleet.wait(stand.fleet.networks.CreateNetwork(network), network_pb2.Network)
    reference = lan.name.removeprefix(f"{parent}/")
    wanted = small_spec()
    wanted.interfaces["lan"].network = reference
    wanted.interfaces["lan"].mac_address = address
    try:
        with domain(stand.fleet, parent, spec=wanted) as first:
            before = everything(stand.fleet, parent)
            error = refused(lambda: stand.fleet.wait(made(stand, spec=wanted), domain_pb2.Domain))  # type: ignore[arg-type]  # an operation
            assert (error.code().name, error.reason) == ("ALREADY_EXISTS", "IDENTITY_IN_USE"), error
            assert error.metadata["holder"], error.metadata
            assert error.metadata["field"] == "domain.spec.interfaces.lan.mac_address", error.metadata
            nobody = small_spec()
            nobody.interfaces["lan"].network = reference
            nobody.interfaces["lan"].mac_address = "00:00:00:00:00:00"
            error = refused(lambda: stand.fleet.wait(made(stand, spec=nobody), domain_pb2.Domain))  # type: ignore[arg-type]  # an operation
            assert (error.reason, error.fields) == (
                "FIELD_OUT_OF_RANGE",
                ("domain.spec.interfaces.lan.mac_address",),
            ), error
            assert everything(stand.fleet, parent) == before
            assert get(stand.fleet, first.name) == first
        with domain(stand.fleet, parent, spec=wanted) as second:
            assert second.status.resolved_spec.interfaces["lan"].mac_address == address
    finally:
        stand.fleet.networks.DeleteNetwork(network_pb2.DeleteNetworkRequest(name=lan.name), timeout=10)


def test_a_change_that_cannot_go_live_is_refused_as_a_whole(stand: Stand) -> None:
    running = verb(stand.fleet, "StartDomain", stand.domain.name)
    wanted = domain_pb2.Domain(name=running.name, spec=domain_spec_pb2.DomainSpec(title="x"))
    wanted.spec.memory.maximum_bytes = 128 * MIB
    paths = ("spec.memory.maximum_bytes", "spec.title")
    for scope in (resource_pb2.CHANGE_SCOPE_LIVE_AND_CONFIG, resource_pb2.CHANGE_SCOPE_LIVE):
        mask = paths if scope == resource_pb2.CHANGE_SCOPE_LIVE_AND_CONFIG else paths[:1]
        error = refused(lambda scope=scope, mask=mask: update(stand, *mask, changed=wanted, scope=scope))  # type: ignore[misc]  # binds the round's own
        assert refusal_of(error) == Refusal(
            "FAILED_PRECONDITION", "NOT_LIVE_UPDATABLE", ("domain.spec.memory.maximum_bytes",)
        ), error
        assert get(stand.fleet, running.name) == running
    planned = update(stand, *paths, changed=wanted)
    assert planned.done  # type: ignore[attr-defined]  # an operation
    after = get(stand.fleet, running.name)
    assert [change.path for change in after.status.pending_changes] == ["spec.memory.maximum_bytes"]
    assert after.status.active_spec.memory.maximum_bytes == 64 * MIB
    assert after.spec.memory.maximum_bytes == 128 * MIB


def test_a_guest_is_as_it_was_after_a_change_that_cannot_go_live(stand: Stand) -> None:
    """Its memory is an argument of its QEMU, which goes on with those that it began with. It has no balloon."""
    spec = small_spec()
    spec.driver = "qemu"
    with domain(stand.fleet, stand.node, spec=spec, start="running") as running:
        process = Path(f"/proc/{running.status.pid}")
        before = (process / "cmdline").read_bytes(), _began(process), outside(stand.node)
        assert b"-m\0" in before[0]
        wanted = domain_pb2.Domain(name=running.name, spec=domain_spec_pb2.DomainSpec(title="x"))
        wanted.spec.memory.maximum_bytes = 128 * MIB
        error = refused(
            lambda: update(
                stand,
                "spec.memory.maximum_bytes",
                "spec.title",
                changed=wanted,
                scope=resource_pb2.CHANGE_SCOPE_LIVE_AND_CONFIG,
            )
        )
        assert refusal_of(error) == Refusal(
            "FAILED_PRECONDITION",
            "NOT_LIVE_UPDATABLE",
            ("domain.spec.memory.current_bytes", "domain.spec.memory.maximum_bytes"),
        ), error
        assert ((process / "cmdline").read_bytes(), _began(process), outside(stand.node)) == before
        assert get(stand.fleet, running.name) == running


def _began(process: Path) -> str:
    """Return when a process began, as the kernel has it."""
    return (process / "stat").read_text().rpartition(")")[2].split()[19]


def start(stand: Stand, name: str) -> object:
    """Start a domain and wait for the end."""
    return stand.fleet.wait(
        stand.fleet.domains.StartDomain(domain_pb2.StartDomainRequest(name=name), timeout=20), domain_pb2.Domain
    )


def test_a_start_without_its_volume(stand: Stand) -> None:
    pool = pool_pb2.CreatePoolRequest(parent=stand.node, pool_id=unique("pool"), start=True)
    pool.pool.spec.dir.SetInParent()
    made_pool = stand.fleet.wait(stand.fleet.pools.CreatePool(pool), pool_pb2.Pool)
    volume = volume_pb2.CreateVolumeRequest(parent=made_pool.name, volume_id="disk")
    volume.volume.spec.capacity_bytes = MIB
    volume.volume.spec.format = volume_pb2.VOLUME_FORMAT_RAW
    disk = stand.fleet.wait(stand.fleet.volumes.CreateVolume(volume), volume_pb2.Volume)
    try:
        with domain(stand.fleet, stand.node, spec=with_disk(disk.name)) as stopped:
            assert stopped.spec.disks["root"].volume == disk.name.removeprefix(f"{stand.node}/")
            started = verb(stand.fleet, "StartDomain", stopped.name)
            assert started.status.state == State.DOMAIN_STATE_RUNNING
            held = stand.fleet.volumes.GetVolume(volume_pb2.GetVolumeRequest(name=disk.name))
            assert [(one.domain, one.device_id) for one in held.status.attachments] == [(stopped.name, "root")]
            with domain(stand.fleet, stand.node, spec=with_disk(disk.name)) as second:
                before = outside(stand.node)
                error = refused(lambda: start(stand, second.name))
                assert (error.code().name, error.reason) == ("FAILED_PRECONDITION", "RESOURCE_IN_USE"), error
                assert stopped.name in error.metadata["holder"], error.metadata
                assert get(stand.fleet, second.name).status.state == State.DOMAIN_STATE_SHUT_OFF
                assert outside(stand.node) == before, "the file is as the first one has it"
            before = outside(stand.node)
            for call in (
                lambda: stand.fleet.volumes.DeleteVolume(volume_pb2.DeleteVolumeRequest(name=disk.name)),
                lambda: stand.fleet.pools.StopPool(pool_pb2.StopPoolRequest(name=made_pool.name)),
            ):
                error = refused(call)
                assert (error.code().name, error.reason) == ("FAILED_PRECONDITION", "RESOURCE_IN_USE"), error
                assert outside(stand.node) == before
            verb(stand.fleet, "StopDomain", stopped.name, mode=domain_pb2.STOP_MODE_FORCE)
            held = stand.fleet.volumes.GetVolume(volume_pb2.GetVolumeRequest(name=disk.name))
            assert not held.status.attachments

            stand.fleet.wait(stand.fleet.pools.StopPool(pool_pb2.StopPoolRequest(name=made_pool.name)), pool_pb2.Pool)
            before = outside(stand.node)
            error = refused(lambda: start(stand, stopped.name))
            assert (error.code().name, error.reason) == ("FAILED_PRECONDITION", "WRONG_STATE"), error
            assert error.metadata["resource"] == made_pool.name, error.metadata
            assert get(stand.fleet, stopped.name).status.state == State.DOMAIN_STATE_SHUT_OFF
            assert outside(stand.node) == before

            stand.fleet.wait(stand.fleet.pools.StartPool(pool_pb2.StartPoolRequest(name=made_pool.name)), pool_pb2.Pool)
            stand.fleet.volumes.DeleteVolume(volume_pb2.DeleteVolumeRequest(name=disk.name))
            before = outside(stand.node)
            error = refused(lambda: start(stand, stopped.name))
            assert (error.code().name, error.reason) == ("NOT_FOUND", "RESOURCE_NOT_FOUND"), error
            assert error.metadata["resource"] == disk.name, error.metadata
            after = get(stand.fleet, stopped.name)
            assert after.status.state == State.DOMAIN_STATE_SHUT_OFF
            assert after.status.last_failure.message
            assert outside(stand.node) == before
    finally:
        stand.fleet.pools.StopPool(pool_pb2.StopPoolRequest(name=made_pool.name), timeout=20)
        stand.fleet.pools.DeletePool(pool_pb2.DeletePoolRequest(name=made_pool.name), timeout=20)


def test_an_interface_without_its_network(stand: Stand) -> None:
    wanted = small_spec()
    wanted.interfaces["lan"].network = "networks/absent"
    before = everything(stand.fleet, stand.node)
    error = refused(lambda: stand.fleet.wait(made(stand, spec=wanted), domain_pb2.Domain))  # type: ignore[arg-type]  # an operation
    assert (error.code().name, error.reason) == ("NOT_FOUND", "RESOURCE_NOT_FOUND"), error
    assert error.metadata["resource"] == f"{stand.node}/networks/absent"
    assert everything(stand.fleet, stand.node) == before


def test_a_network_that_does_not_run(stand: Stand) -> None:
    network = network_pb2.CreateNetworkRequest(parent=stand.node, network_id=unique("net"))
    network.network.spec.isolated.SetInParent()
    lan = stand.fleet.wait(stand.fleet.networks.CreateNetwork(network), network_pb2.Network)
    wanted = small_spec()
    wanted.interfaces["lan"].network = lan.name
    try:
        with domain(stand.fleet, stand.node, spec=wanted) as stopped:
            before = outside(stand.node)
            error = refused(lambda: start(stand, stopped.name))
            assert (error.code().name, error.reason) == ("FAILED_PRECONDITION", "WRONG_STATE"), error
            assert error.metadata["resource"] == lan.name, error.metadata
            assert get(stand.fleet, stopped.name).status.state == State.DOMAIN_STATE_SHUT_OFF
            assert outside(stand.node) == before
    finally:
        stand.fleet.networks.DeleteNetwork(network_pb2.DeleteNetworkRequest(name=lan.name), timeout=10)

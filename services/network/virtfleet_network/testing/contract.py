"""The contract of `NetworkBackend` as named checks.

A test binds a back end by giving an `opened` one and a way to see the node.

    class TestBridge(NetworkBackendContract):
        @pytest.fixture
        async def subject(self): ...yield Subject(backend, listener, links_of_the_node)
"""

# ruff: noqa: S101  # checks are asserts, as in any test

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest

from virtfleet.network.v1 import network_pb2
from virtfleet_network import network_spec
from virtfleet_network.backends.api import LeaseRecord, Leftover, NetworkBackend, NetworkPlan, PortLink
from virtfleet_service.errors import BackendFailed, IdentityInUse, SubnetOverlap, VirtfleetError

__all__ = ["NetworkBackendContract", "RecordingListener", "Subject", "plan"]

_MADE_UP_CAPABILITY = "network.forward.macvtap"


@dataclass
class RecordingListener:
    """Notes what it is told."""

    leases: dict[str, Sequence[LeaseRecord]] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)

    def leases_changed(self, network_uid: str, leases: Sequence[LeaseRecord]) -> None:
        """Take leases."""
        self.leases[network_uid] = leases

    def something_changed(self) -> None:
        """Take a change."""
        self.told.append("changed")

    def daemon_restarted(self, network_uid: str, detail: str) -> None:
        """Take a restart."""
        self.told.append(f"restarted {network_uid} {detail}")

    def daemon_failed(self, network_uid: str, detail: str) -> None:
        """Take a failure."""
        self.told.append(f"failed {network_uid} {detail}")


@dataclass
class Subject:
    """Is a back end under test.

    Attributes:
        backend: It, open, on a node with nothing on it.
        listener: What it tells.
        links: Returns the names of all links of the node but `lo`, seen from outside.
        take_name: Makes a link of a name on the node.
        take_address: Gives the node an address with a prefix.
    """

    backend: NetworkBackend
    listener: RecordingListener
    links: Callable[[], set[str]]
    take_name: Callable[[str], None]
    take_address: Callable[[str], None]


def plan(prefix: str = "192.168.40.0/24", **fields: object) -> NetworkPlan:
    """Return the plan of a NAT network with DHCP."""
    uid = str(uuid.uuid4())
    spec = network_pb2.NetworkSpec(**fields)  # type: ignore[arg-type]  # fields of the spec
    spec.nat.SetInParent()
    spec.subnets["lan"].prefix = prefix
    base = prefix.rpartition(".")[0]
    spec.subnets["lan"].dhcp.ranges.add(first=f"{base}.10", last=f"{base}.20")
    network_spec.normalise(spec)
    resolved = network_spec.resolve(spec, uid, network_spec.new_mac_address())
    return NetworkPlan(uid, f"nodes/n1/networks/n-{uid[:8]}", resolved)


def _link() -> PortLink:
    uid = str(uuid.uuid4())
    return PortLink(uid, f"vp-{uid[:8]}", network_spec.new_mac_address())


class NetworkBackendContract:
    """One check for each promise of `backends/api.py`."""

    async def test_probe_says_that_it_can_run(self, subject: Subject) -> None:
        """Names no problem where there is none."""
        report = await subject.backend.probe()
        assert (report.cause, report.problem) == ("", "")

    async def test_capabilities_and_refusals_agree(self, subject: Subject) -> None:
        """Refuses what it does not list."""
        report = await subject.backend.probe()
        spec = network_pb2.NetworkSpec()
        spec.macvtap.SetInParent()
        missing = subject.backend.missing_capability(spec)
        assert (missing == _MADE_UP_CAPABILITY) is (_MADE_UP_CAPABILITY not in report.capabilities)
        assert subject.backend.missing_capability(plan().spec) == ""

    async def test_start_and_stop_may_be_repeated(self, subject: Subject) -> None:
        """Starts twice and stops twice."""
        network = plan()
        await subject.backend.start(network)
        there = subject.links()
        assert network.spec.bridge_name in there
        await subject.backend.start(network)
        assert subject.links() == there
        await subject.backend.stop(network)
        await subject.backend.stop(network)
        assert subject.links() == set()
        await subject.backend.forget(network.uid)
        await subject.backend.forget(network.uid)

    async def test_a_failed_start_leaves_nothing(self, subject: Subject) -> None:
        """Names the holder of a name, and touches nothing."""
        network = plan()
        subject.take_name(network.spec.bridge_name)
        there = subject.links()
        with pytest.raises(IdentityInUse) as refused:
            await subject.backend.start(network)
        assert refused.value.metadata["holder"] == network.spec.bridge_name
        assert subject.links() == there

    async def test_addresses_of_the_node_are_respected(self, subject: Subject) -> None:
        """Refuses a subnet that the node has a part of."""
        subject.take_address("192.168.40.129/25")
        with pytest.raises(SubnetOverlap):
            await subject.backend.check(plan())

    async def test_a_cancelled_start_leaves_nothing(self, subject: Subject) -> None:
        """Undoes what it had done, wherever it was."""
        for pause in (0.0, 0.005, 0.02, 0.05):
            network = plan()
            task = asyncio.create_task(subject.backend.start(network))
            await asyncio.sleep(pause)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if task.cancelled():
                assert subject.links() == set(), f"cancelled after {pause} s"
            else:
                await subject.backend.stop(network)

    async def test_plug_and_unplug_may_be_repeated(self, subject: Subject) -> None:
        """Makes one link, and removes it after the answer."""
        network, link = plan(), _link()
        await subject.backend.start(network)
        await subject.backend.plug(network.uid, link)
        await subject.backend.plug(network.uid, link)
        assert link.interface_name in subject.links()
        await subject.backend.unplug(network.uid, link)
        await subject.backend.unplug(network.uid, link)
        await subject.backend.removed([link.interface_name])
        assert link.interface_name not in subject.links()

    async def test_plug_into_a_stopped_network_is_refused(self, subject: Subject) -> None:
        """Makes no link without a network."""
        with pytest.raises(BackendFailed):
            await subject.backend.plug(str(uuid.uuid4()), _link())
        assert subject.links() == set()

    async def test_links_stay_over_stop_and_come_back(self, subject: Subject) -> None:
        """Keeps the links of plugged ports when the network stops."""
        network, link = plan(), _link()
        await subject.backend.start(network)
        await subject.backend.plug(network.uid, link)
        await subject.backend.stop(network)
        assert subject.links() == {link.interface_name}
        await subject.backend.start(replace(network, links={link.port_uid: link}))
        assert await subject.backend.repair() == []
        await subject.backend.unplug(network.uid, link)
        await subject.backend.removed([link.interface_name])

    async def test_repair_finds_nothing_after_a_start(self, subject: Subject) -> None:
        """Reports only what others did."""
        await subject.backend.start(plan())
        assert await subject.backend.repair() == []

    async def test_leftovers_are_removed_and_others_are_not(self, subject: Subject) -> None:
        """Removes what is named, and nothing else."""
        network, other, link = plan(), plan("192.168.41.0/24"), _link()
        await subject.backend.start(network)
        await subject.backend.start(other)
        await subject.backend.plug(network.uid, link)
        before = subject.links()
        await subject.backend.remove_leftovers([Leftover(str(uuid.uuid4()), "lo", "00:00:00:00:00:00")])
        await subject.backend.remove_leftovers([Leftover(link.port_uid)])
        assert subject.links() == before, "a link that a plan has is none"
        await subject.backend.stop(network)
        await subject.backend.remove_leftovers([Leftover(link.port_uid)])
        assert subject.links() == {other.spec.bridge_name}

    async def test_update_of_a_stopped_network_does_nothing(self, subject: Subject) -> None:
        """Succeeds without effect."""
        await subject.backend.update(plan())
        assert subject.links() == set()

    async def test_errors_are_of_the_tree(self, subject: Subject) -> None:
        """Raises what callers know, also for what the kernel refuses."""
        network = plan()
        await subject.backend.start(network)
        with pytest.raises(VirtfleetError):
            await subject.backend.plug(network.uid, replace(_link(), interface_name="much-too-long-for-a-link"))
        assert subject.links() == {network.spec.bridge_name}

from __future__ import annotations

from pathlib import Path

import pytest

from virtfleet.compute.v1 import domain_pb2
from virtfleet_compute.admission import Admission, memory_info, memory_total_bytes
from virtfleet_compute.settings import ComputeSettings
from virtfleet_service.errors import NodeMemoryShort, QuotaExceeded
from virtfleet_service.settings import SettingsError

MIB = 1 << 20


def settings(**changes: object) -> ComputeSettings:
    return ComputeSettings(node="n1", state_dir=Path("/nowhere"), run_dir=Path("/nowhere"), **changes)  # type: ignore[arg-type]  # as named


def domain(uid: str, memory_bytes: int = MIB, vcpus: int = 1) -> domain_pb2.Domain:
    made = domain_pb2.Domain(name=f"nodes/n1/domains/{uid}", uid=uid)
    made.status.resolved_spec.memory.maximum_bytes = memory_bytes
    made.status.resolved_spec.cpu.vcpu_count = vcpus
    return made


def test_what_is_given_is_taken_back() -> None:
    admission = Admission(settings(memory_reserve_bytes=0))
    for _ in range(2):
        admission.admit(domain("a", 8 * MIB, 2), counted=True)
    admission.admit(domain("b", MIB), counted=False)
    assert (admission.active_count, admission.allocated_memory_bytes, admission.allocated_vcpu_count) == (2, 9 * MIB, 3)
    for uid in ("a", "a", "b", "never"):
        admission.release(uid)
    assert (admission.active_count, admission.allocated_memory_bytes, admission.allocated_vcpu_count) == (0, 0, 0)


def test_memory_is_refused_before_anything_is_given() -> None:
    admission = Admission(settings())
    with pytest.raises(NodeMemoryShort) as refused:
        admission.admit(domain("a", memory_info()["MemTotal"]), counted=True)
    assert int(refused.value.metadata["free_bytes"]) < memory_info()["MemTotal"]
    assert admission.active_count == 0
    admission.admit(domain("a", memory_info()["MemTotal"]), counted=False)


def test_the_memory_of_the_host_is_read_without_the_rest() -> None:
    assert memory_total_bytes() == memory_info()["MemTotal"]


def test_a_node_may_be_overcommitted() -> None:
    admission = Admission(settings(memory_overcommit_ratio=8.0))
    admission.admit(domain("a", memory_info()["MemTotal"] * 2), counted=True)


def test_no_two_active_domains_share_a_user() -> None:
    admission = Admission(settings(guest_uid_first=100, guest_uid_count=2))
    assert {admission.user_for("a"), admission.user_for("b")} == {100, 101}
    with pytest.raises(QuotaExceeded):
        admission.user_for("c")
    admission.release("a", 100)
    assert admission.user_for("c") == 100
    admission.release("b", 100)
    with pytest.raises(QuotaExceeded):
        admission.user_for("d")


def test_without_users_guests_run_as_the_service() -> None:
    assert Admission(settings(guest_uid_count=0)).user_for("a") == 0


def test_a_limit_of_definitions() -> None:
    Admission(settings()).check_definitions(10**6, 1)
    with pytest.raises(QuotaExceeded):
        Admission(settings(domain_limit=5)).check_definitions(5, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"enabled_drivers": ()},
        {"drivers": {"test": {}}},
        {"guest_uid_first": 0},
        {"memory_overcommit_ratio": 0.0},
        {"parallel_count": 0},
    ],
    ids=str,
)
def test_settings_that_cannot_be(changes: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        settings(**changes)

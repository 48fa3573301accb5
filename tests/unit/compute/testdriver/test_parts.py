"""The parts of the test driver: guests, faults, settings, seeds."""

from __future__ import annotations

import asyncio
import json
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtfleet.compute.v1 import domain_spec_pb2
from virtfleet_compute.drivers.api import DomainState, DomainStateReason
from virtfleet_compute.drivers.test.faults import Faults
from virtfleet_compute.drivers.test.guests import Guests
from virtfleet_compute.drivers.test.seeds import Seeds, uuid5_text
from virtfleet_compute.drivers.test.settings import Fault, Settings, from_table
from virtfleet_service.errors import BackendUnreachable, DriverBroken, HypervisorFailed

OFF, ENDED = DomainState.DOMAIN_STATE_SHUT_OFF, DomainStateReason.DOMAIN_STATE_REASON_DESTROYED


def spec(**options: object) -> domain_spec_pb2.DomainSpec:
    made = domain_spec_pb2.DomainSpec(test=domain_spec_pb2.TestOptions(**options))  # type: ignore[arg-type]  # as named
    made.memory.current_bytes, made.cpu.vcpu_count = 1 << 30, 2
    made.disks["root"].volume = "pools/p/volumes/v"
    return made


def test_guests_are_found_again_from_their_file(tmp_path: Path) -> None:
    path, uids, run = tmp_path / "guests", [str(uuid.uuid4()) for _ in range(3)], str(uuid.uuid4())
    first = Guests()
    first.open(path)
    for uid in uids:
        first.start(uid, spec(obeys_power_button=False), run, 12345, paused=False)
    ended = first.get(uids[0])
    assert ended is not None
    first.change(uids[0], ended, OFF, ENDED)
    first.forget(uids[1])
    with path.open("ab") as file:
        file.write(b'["torn')
    second = Guests()
    second.open(path)
    assert dict(second.items()).keys() == {uids[0], uids[2]}
    found = second.get(uids[2])
    assert found is not None
    assert (found.runtime_id, found.start_ns, found.vcpu_count) == (run, 12345, 2)
    assert second.shape(found).disks == ("root",)
    assert not second.shape(found).obeys_power_button
    ended = second.get(uids[0])
    assert ended is not None
    assert (ended.state, ended.reason) == (OFF, ENDED)
    first.close()
    second.close()


def test_guests_of_one_shape_share_it() -> None:
    guests = Guests()
    for _ in range(100):
        guests.start(str(uuid.uuid4()), spec(), str(uuid.uuid4()), 1, paused=True)
    assert len({guest.shape_number for _, guest in guests.items()}) == 1
    assert len(guests) == 100


async def test_faults_match_count_and_skip() -> None:
    faults = Faults([Fault(method="start", domains="web-*", reason="BACKEND_UNREACHABLE", skip=1, count=1)])
    outcomes = []
    for domain_id in ("db", "web-1", "web-1", "web-1"):
        try:
            async with faults.around("start", domain_id):
                outcomes.append("done")
        except BackendUnreachable:
            outcomes.append("failed")
    assert outcomes == ["done", "done", "failed", "done"]
    async with faults.around("stop", "web-1"):
        pass


async def test_a_fault_after_the_effect() -> None:
    effects = []
    with pytest.raises(HypervisorFailed):
        async with Faults([Fault(method="*", reason="HYPERVISOR_FAILED", when="after")]).around("start", "web"):
            effects.append(1)
    assert effects == [1]


async def test_a_latency_delays_the_call_that_it_is_for_and_no_other() -> None:
    settings = from_table(
        Settings, {"faults": [{"method": "start", "domains": "slow-*", "latency_seconds": 0.2}]}, "[drivers.test]"
    )
    faults = Faults(settings.faults)
    clock = asyncio.get_running_loop().time
    for method, domain, delayed in (("start", "slow-1", True), ("start", "web", False), ("stop", "slow-1", False)):
        begun = clock()
        async with faults.around(method, domain):
            assert (clock() - begun >= 0.2) is delayed


async def test_a_hang_can_be_cancelled() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01), Faults([Fault(method="start", hang=True)]).around("start", "web"):
            pass


def test_chance_can_be_repeated() -> None:
    def run(seed: int) -> list[bool]:
        faults = Faults([Fault(method="start", reason="X", probability=0.5)], random_seed=seed)
        return [faults._match("start", "web") is not None for _ in range(50)]

    assert run(1) == run(1) != run(2)


@pytest.mark.parametrize(
    "table",
    [
        {"nothing": 1},
        {"broken": 1},
        {"random_seed": True},
        {"faults": [{"method": "start", "when": "never"}]},
        {"faults": [{}]},
        {"faults": {}},
        {"seed_file": 3},
    ],
    ids=str,
)
def test_settings_that_cannot_be(table: dict[str, object]) -> None:
    with pytest.raises(DriverBroken):
        from_table(Settings, table, "[drivers.test]")


@given(st.uuids(), st.text())
def test_uids_are_those_of_the_standard_library(space: uuid.UUID, name: str) -> None:
    assert uuid5_text(space.bytes, name) == str(uuid.uuid5(space, name))


def test_seeds_are_the_same_in_every_process(tmp_path: Path) -> None:
    path = tmp_path / "seed.json"
    path.write_text(
        json.dumps(
            {
                "domains": [
                    {
                        "id": "web-{number}",
                        "count": 3,
                        "running": True,
                        "spec": {"memory": {"maximumBytes": "1048576"}},
                    },
                    {"id": "db", "labels": {"a": "b"}},
                ]
            }
        )
    )
    first, second = list(Seeds(path, "n1").found()), list(Seeds(path, "n1").found())
    assert [found.uid for found in first] == [found.uid for found in second]
    assert [found.domain_id for found in first] == ["web-0", "web-1", "web-2", "db"]
    assert [found.observation is not None for found in first] == [True, True, True, False]
    assert len({found.runtime_id for found in first[:3]}) == 3
    assert first[3].runtime_id == ""
    assert first[0].spec.memory.maximum_bytes == 1 << 20
    assert {found.uid for found in first}.isdisjoint(found.uid for found in Seeds(path, "n2").found())


@pytest.mark.parametrize("text", ["{", '{"domains": 1}', '{"domains": [{"id": "a", "spec": {"x": 1}}]}', "[]"])
def test_seed_files_that_cannot_be(tmp_path: Path, text: str) -> None:
    path = tmp_path / "seed.json"
    path.write_text(text)
    with pytest.raises(DriverBroken):
        Seeds(path, "n1")
    with pytest.raises(DriverBroken):
        Seeds(tmp_path / "missing.toml", "n1")

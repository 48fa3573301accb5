"""A hundred thousand domains from a seed file: how long it takes and how much memory it holds."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.integration.compute.rig import PARENT, Process, Service, State, name, service
from virtfleet.compute.v1 import domain_pb2, stats_pb2
from virtfleet.type.v1 import resource_pb2
from virtfleet_compute.addresses import AddressBook

COUNT = 100_000
SECONDS = 150
"""An end, not a mark: `make bench` measures."""
MEMORY_MIB = 200


def seed(place: Path, count: int) -> Path:
    path = place / "seed.json"
    group = {"id": "d{number:06d}", "count": count, "running": True, "spec": {"memory": {"maximumBytes": "67108864"}}}
    path.write_text(json.dumps({"domains": [group]}))
    return path


def private_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no Private_Dirty")


@pytest.mark.timeout(200)
async def test_a_hundred_thousand_domains(place: Path) -> None:
    process = Process(place, drivers={"seed_file": str(seed(place, COUNT)), "state_file": ""})
    began = time.monotonic()
    try:
        client = await process.start(seconds=SECONDS)
        took = time.monotonic() - began
        domain = await client.get(f"d{COUNT - 1:06}")
        assert domain.status.state == State.DOMAIN_STATE_RUNNING
        page = await client.list(page_size=1000)
        assert page.next_page_token
        used = private_mib(process.pid)
        print(f"{COUNT} domains: {took:.1f} s, {used:.0f} MiB private")
        assert used < MEMORY_MIB
        await client.close()
    finally:
        await process.kill()


async def test_seeds_are_taken_over_once(place: Path) -> None:
    drivers = {"test": {"seed_file": str(seed(place, 5))}}
    async with service(place, drivers=drivers) as node:
        assert len((await node.list()).domains) == 5
        await _counted(node, running=5)
        await node.delete("d000001", stop=True)
    async with service(place, drivers=drivers) as node:
        domains = (await node.list()).domains
        assert name("d000001") not in [domain.name for domain in domains]
        assert {domain.status.state for domain in domains} == {State.DOMAIN_STATE_SHUT_OFF}


async def _counted(node: Service, *, running: int) -> None:
    answer = await node.call(node.stats.BatchGetDomainStats, stats_pb2.BatchGetDomainStatsRequest(parent=PARENT))
    assert len([one for one in answer.stats if one.HasField("cpu")]) == running
    assert node.app.context.admission.active_count == running
    domain = domain_pb2.Domain()
    domain.CopyFrom(await node.get("d000000"))
    assert domain.status.active_spec == domain.status.resolved_spec


async def test_addresses_are_kept_of_running_domains_with_a_card(place: Path) -> None:
    spec = {"memory": {"maximumBytes": "67108864"}}
    card = {**spec, "interfaces": {"eth0": {"network": "networks/lan"}}}
    groups = [
        {"id": "plain{number}", "count": 2, "running": True, "spec": spec},
        {"id": "joined{number}", "count": 2, "running": True, "spec": card},
        {"id": "off", "spec": card},
    ]
    file = place / "seed.json"
    file.write_text(json.dumps({"domains": groups}))
    async with service(place, drivers={"test": {"seed_file": str(file)}}) as node:
        book = AddressBook(node.app.context)
        assert {domain.name for domain in book.joined()} == {name("joined0"), name("joined1")}
        await node.delete("joined0", stop=True)
        assert {domain.name for domain in book.joined()} == {name("joined1")}
        assert node.app.context.admission.active_count == 3


async def test_equal_domains_are_what_each_would_be_alone(place: Path) -> None:
    spec = {"memory": {"maximumBytes": "67108864"}}
    card = {"memory": {"maximumBytes": "67108864"}, "interfaces": {"eth0": {"network": "networks/lan"}}}
    groups = [
        {"id": "a{number}", "count": 3, "running": True, "labels": {"tier": "web"}, "spec": spec},
        {"id": "b{number}", "count": 2, "display_name": "still", "spec": spec},
        {"id": "c{number}", "count": 2, "running": True, "spec": card},
    ]
    together, alone = place / "together.json", place / "alone.json"
    together.write_text(json.dumps({"domains": groups}))
    singles = [
        {**group, "id": str(group["id"]).format(number=number), "count": 1}
        for group in groups
        for number in range(int(str(group["count"])))
    ]
    alone.write_text(json.dumps({"domains": singles}))
    seen: list[list[domain_pb2.Domain]] = []
    for file in (together, alone):
        (place / file.stem).mkdir()
        async with service(place / file.stem, drivers={"test": {"seed_file": str(file)}}) as node:
            found = list((await node.list(view=resource_pb2.RESOURCE_VIEW_FULL)).domains)
        assert len({one.uid for one in found}) == 7
        assert len({one.status.runtime_id for one in found if one.status.active}) == 5
        for one in found:
            assert one.etag == f"{one.uid}.1"
            for field in ("create_time", "update_time"):
                one.ClearField(field)
            for field in ("runtime_id", "start_time"):
                one.status.ClearField(field)  # type: ignore[arg-type]  # a literal of the message
            for interface in (
                *one.status.resolved_spec.interfaces.values(),
                *one.status.active_spec.interfaces.values(),
            ):
                interface.ClearField("mac_address")
        seen.append(found)
    assert [one.name.rpartition("/")[2] for one in seen[0]] == ["a0", "a1", "a2", "b0", "b1", "c0", "c1"]
    assert seen[0] == seen[1]

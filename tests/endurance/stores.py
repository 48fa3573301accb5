"""Stores as a release wrote them, kept as SQL: `python -m tests.endurance.stores` makes those of the present code.

They lie in `tests/data/stores/RELEASE`: one file for each store, and `expected.json`, which says what the API then
answered. Each release adds a folder of its own before it goes out, and never changes an older one; a change of what is
stored that comes between two releases adds `RELEASE-N`.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from google.protobuf import empty_pb2, json_format
from google.protobuf.message import Message

from bench.stage import NODE, credentials, ready
from tests.endurance import cycles
from tools import fleet as development
from tools.paths import ROOT
from virtfleet.compute.v1 import domain_pb2, watch_pb2
from virtfleet.fleet.v1 import enrollment_pb2, node_pb2
from virtfleet.network.v1 import network_pb2, port_pb2
from virtfleet.storage.v1 import pool_pb2, volume_pb2
from virtfleet_client import AsyncFleet, connect_async
from virtfleet_service import backup, schema

KEPT = ROOT / "tests/data/stores"
STORES = ("gateway", "compute", "storage", "network")
PARENT = cycles.PARENT
NEXT = schema.MIGRATIONS[-1].number + 1
EXPAND = schema.Migration(NEXT, "a column more", schema.RELEASE, ("ALTER TABLE resources ADD COLUMN extra TEXT",))
"""What a later release may do to a store so that this one, a step back, still works on it."""

Answer = dict[str, Any]


def unpack(source: Path, target: Path) -> None:
    """Make a store from its SQL."""
    schema.create_file(target)
    with closing(sqlite3.connect(target)) as connection:
        connection.executescript(source.read_text())


def migrate(store: Path, *migrations: schema.Migration, release: str) -> None:
    """Change a store as a later release would at its first start."""
    with closing(schema.connect(store)) as connection:
        schema.prepare(connection, store, migrations=(*schema.MIGRATIONS, *migrations), release=release)


def pack(store: Path, target: Path) -> None:
    """Write a store as SQL."""
    with closing(sqlite3.connect(store)) as connection:
        (number,) = connection.execute("PRAGMA user_version").fetchone()
        lines = [*connection.iterdump(), f"PRAGMA user_version = {number};"]
    target.write_text("\n".join(lines) + "\n")


async def answers(fleet: AsyncFleet, store: str) -> Answer:
    """Return what the API says of each resource of a store: identity, generation, labels and what was asked for."""
    found: Answer = {}
    for method, request in _lists(fleet, store):
        async for resource in fleet.pages(method, request):
            found[resource.name] = _content(resource)
    return found


def _lists(fleet: AsyncFleet, store: str) -> list[tuple[Callable[..., Any], Message]]:
    pools, networks = f"{PARENT}/pools/kept", f"{PARENT}/networks/kept"
    lists: dict[str, list[tuple[Callable[..., Any], Message]]] = {
        "gateway": [
            (fleet.nodes.ListNodes, node_pb2.ListNodesRequest()),
            (fleet.enrollment.ListCertificates, enrollment_pb2.ListCertificatesRequest()),
        ],
        "compute": [(fleet.domains.ListDomains, domain_pb2.ListDomainsRequest(parent=PARENT))],
        "storage": [
            (fleet.pools.ListPools, pool_pb2.ListPoolsRequest(parent=PARENT)),
            (fleet.volumes.ListVolumes, volume_pb2.ListVolumesRequest(parent=pools)),
        ],
        "network": [
            (fleet.networks.ListNetworks, network_pb2.ListNetworksRequest(parent=PARENT)),
            (fleet.ports.ListPorts, port_pb2.ListPortsRequest(parent=networks)),
        ],
    }
    return lists[store]


def _content(resource: Any) -> Answer:
    content: Answer = {"uid": resource.uid, "generation": resource.generation, "labels": dict(resource.labels)}
    if "spec" in resource.DESCRIPTOR.fields_by_name:
        content["spec"] = json_format.MessageToDict(resource.spec)
    else:
        content["identity"] = resource.status.identity
        content["state"] = int(resource.status.state)
    return content


async def sample(connection: AsyncFleet) -> None:
    """Fill the stores: something of each kind, changed once, and something gone."""
    pool = pool_pb2.CreatePoolRequest(parent=PARENT, pool_id="kept", start=True)
    pool.pool.spec.dir.SetInParent()
    pool.pool.labels["tier"] = "gold"
    await ready(connection, await connection.pools.CreatePool(pool), pool_pb2.Pool)
    network = network_pb2.CreateNetworkRequest(parent=PARENT, network_id="kept")
    network.network.spec.nat.SetInParent()
    lan = network.network.spec.subnets["lan"]
    lan.prefix = "192.168.180.0/24"
    lan.dhcp.ranges.add(first="192.168.180.10", last="192.168.180.200")
    await ready(connection, await connection.networks.CreateNetwork(network), network_pb2.Network)
    for domain_id in ("kept", "running", "gone"):
        request = domain_pb2.CreateDomainRequest(parent=PARENT, domain_id=domain_id)
        request.domain.labels["role"] = domain_id
        request.domain.spec.driver = "test"
        request.domain.spec.memory.maximum_bytes = 64 << 20
        if domain_id == "kept":
            disk = request.new_volumes.add(pool="pools/kept", volume_id="root")
            disk.spec.format = volume_pb2.VOLUME_FORMAT_QCOW2
            disk.spec.capacity_bytes = 1 << 30
            request.domain.spec.disks["root"].volume = "pools/kept/volumes/root"
            request.domain.spec.interfaces["lan"].network = "networks/kept"
        if domain_id == "running":
            request.start.SetInParent()
        await ready(connection, await connection.domains.CreateDomain(request), domain_pb2.Domain)
    update = domain_pb2.UpdateDomainRequest(
        domain=domain_pb2.Domain(name=f"{PARENT}/domains/kept", annotations={"note": "changed"})
    )
    update.update_mask.paths.append("annotations")
    await ready(connection, await connection.domains.UpdateDomain(update), domain_pb2.Domain)
    delete = domain_pb2.DeleteDomainRequest(name=f"{PARENT}/domains/gone")
    await ready(connection, await connection.domains.DeleteDomain(delete), empty_pb2.Empty)


async def _place(fleet: development.Fleet) -> str:
    """Return the token of a watch of compute's at the present."""
    async with connect_async(f"unix://{fleet.folder / NODE / 'run/compute/admin.sock'}") as local:
        async for answer in local.watch(watch_pb2.WatchResourcesRequest(parent=PARENT)):
            if answer.WhichOneof("marker") == "snapshot_end":
                return str(answer.resume_token)
    raise RuntimeError("the watch has ended")


async def keep(folder: Path) -> None:
    """Write the stores of a fleet of the present code into a folder, while it runs."""
    folder.mkdir(parents=True)
    async with (
        development.Fleet.running(development.Plan(driver="test"), say=print) as fleet,
        connect_async(f"tls://{fleet.address}", credentials(fleet)) as connection,
    ):
        await sample(connection)
        expected: Answer = {"token": await _place(fleet)}
        stop = domain_pb2.SuspendDomainRequest(name=f"{PARENT}/domains/running")
        await ready(connection, await connection.domains.SuspendDomain(stop), domain_pb2.Domain)
        expected["stores"] = {store: await answers(connection, store) for store in STORES}
        for store in STORES:
            place = fleet.folder / (store if store == "gateway" else f"{NODE}/state") / f"{store}.db"
            copy = fleet.folder / f"copy-{store}.db"
            await asyncio.to_thread(backup.back_up, place, copy)
            pack(copy, folder / f"{store}.sql")
    (folder / "expected.json").write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")


def main() -> int:
    """Keep the stores of the present release; returns the exit code."""
    folder = KEPT / (sys.argv[1] if len(sys.argv) > 1 else schema.RELEASE)
    if folder.exists():
        print(f"{folder} exists: what a release has written is never changed", file=sys.stderr)
        return 1
    asyncio.run(keep(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())

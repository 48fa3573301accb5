"""Changes of definitions of networks that do not run: nothing of them is on any node."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from google.longrunning import operations_pb2

from virtfleet.network.v1 import network_pb2, port_pb2
from virtfleet.type.v1 import resource_pb2
from virtfleet_network.app import PACKAGE, RESOURCE_TYPES
from virtfleet_network.backends import registry
from virtfleet_network.catalog import Catalog
from virtfleet_network.networks import Networks
from virtfleet_service import errors
from virtfleet_service.authorization import Authorizer
from virtfleet_service.call import Call, Caller
from virtfleet_service.launcher import LauncherClient
from virtfleet_service.methods import facts_of
from virtfleet_service.operations import Operations
from virtfleet_service.store import Store

PARENT = "nodes/n1"


def call(method: str, *roles: str, prefix: str = "") -> Call:
    """Return a call by somebody with roles: a built-in one, or a permission that is all that he has."""
    own = {role: lambda permission, role=role: permission == role for role in roles if "." in role}
    service = "NetworkService" if "Network" in method else "PortService"
    file = network_pb2.DESCRIPTOR if "Network" in method else port_pb2.DESCRIPTOR
    facts = facts_of(file.services_by_name[service].methods_by_name[method])
    caller = Caller("carol", roles, name_prefixes=(prefix,) if prefix else ())
    return Call(facts, caller, Authorizer(own), node="n1")


class Rig:
    """Is the use cases of the service over a store, with a back end that nobody has opened."""

    def __init__(self, store: Store, networks: Networks) -> None:
        self.store = store
        self.networks = networks

    async def apply(self, id_: str, caller: Call, **fields: object) -> operations_pb2.Operation:
        request = network_pb2.UpdateNetworkRequest(
            network=network_pb2.Network(name=f"{PARENT}/networks/{id_}", **fields),  # type: ignore[arg-type]  # fields of a network
            allow_missing=True,
        )
        return await self.networks.update(caller, request)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with (
        Store.open(tmp_path / "network.db", package=PACKAGE, resource_types=RESOURCE_TYPES) as store,
        LauncherClient.connect(str(tmp_path / "launcher.sock")) as launcher,
        Operations(store, "network", "n1").running() as operations,
    ):
        context = registry.BackendContext("n1", tmp_path, launcher, tmp_path / "dnsmasq", tmp_path / "nft")
        yield Rig(store, Networks(store, operations, registry.create("bridge", context)))


async def test_who_may_only_change_networks_makes_none(rig: Rig) -> None:
    with pytest.raises(errors.PermissionMissing) as refused:
        await rig.apply("lan", call("UpdateNetwork", "networks.update"))
    assert refused.value.metadata["permission"] == "networks.create"
    assert rig.store.get(f"{PARENT}/networks/lan") is None
    assert (await rig.apply("lan", call("UpdateNetwork", "operator"))).done
    assert (await rig.apply("lan", call("UpdateNetwork", "networks.update"), labels={"a": "b"})).done


async def test_what_a_uid_leads_to_is_judged_by_its_name(rig: Rig) -> None:
    uid = "a0000000-0000-4000-8000-000000000000"
    await rig.apply("b", call("UpdateNetwork", "operator"), uid=uid)
    catalog = Catalog(rig.store)
    name = f"{PARENT}/networks/{uid}"
    with pytest.raises(errors.PermissionMissing):
        catalog.get("network", name, 0, call("GetNetwork", "viewer", prefix=f"{PARENT}/networks/a"))
    assert catalog.get("network", name, 0, call("GetNetwork", "viewer", prefix=f"{PARENT}/networks/b"))


async def test_a_transient_network_has_no_autostart(rig: Rig) -> None:
    spec = network_pb2.NetworkSpec(lifetime=resource_pb2.LIFETIME_TRANSIENT, autostart=resource_pb2.AUTOSTART_ALWAYS)
    with pytest.raises(errors.FieldConflict) as refused:
        await rig.apply("lan", call("UpdateNetwork", "operator"), spec=spec)
    assert refused.value.field == "network.spec.autostart"
    spec.autostart = resource_pb2.AUTOSTART_NEVER
    await rig.apply("lan", call("UpdateNetwork", "operator"), spec=spec)
    change = network_pb2.NetworkSpec(autostart=resource_pb2.AUTOSTART_ONCE)
    with pytest.raises(errors.FieldConflict):
        await rig.apply("lan", call("UpdateNetwork", "operator"), spec=change)


async def test_what_was_read_and_deleted_since_is_not_brought_back(rig: Rig) -> None:
    with pytest.raises(errors.EtagMismatch):
        await rig.apply("gone", call("UpdateNetwork", "operator"), etag="read-before")
    assert rig.store.get(f"{PARENT}/networks/gone") is None

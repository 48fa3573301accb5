"""A server whose certificates come from the identity directory of a node that has joined."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.integration.server import rig as rigs
from tests.integration.server.rig import ask, refused
from virtfleet.common.v1 import admin_pb2
from virtfleet.node.v1 import caller_pb2
from virtfleet_service import errors
from virtfleet_service.enrollment import Fleet
from virtfleet_service.settings import SettingsError, TlsSettings

WHO = admin_pb2.WhoAmIRequest()


def joined(rig: rigs.Rig, *, node: str = "n1", gateways: tuple[str, ...] = ()) -> Path:
    directory = rig.folder / "identity"
    directory.mkdir()
    issued = rig.pki.service("n1", "compute")
    shutil.copy(issued.certificate_file, directory / "compute.crt")
    shutil.copy(issued.key_file, directory / "compute.key")
    shutil.copy(rig.pki.ca_file, directory / "ca.crt")
    Fleet(node=node, trust_domain="virtfleet.dev", gateway_endpoints=(), gateway_identities=gateways).save(directory)
    return directory


async def test_certificates_are_found_in_the_identity_directory(tmp_path: Path) -> None:
    rig = rigs.Rig(tmp_path)
    async with rig.make(tls=TlsSettings(), identity_dir=joined(rig)):
        answer = await ask(rig.channel(rig.pki.user("a", "viewer")), rigs.WHO_AM_I, WHO, admin_pb2.WhoAmIResponse)
        assert answer.subject == "spiffe://virtfleet.dev/user/a"


async def test_only_the_gateways_of_the_fleet_convey_callers(tmp_path: Path) -> None:
    rig = rigs.Rig(tmp_path)
    known = ("spiffe://virtfleet.dev/gateway/g1", "spiffe://virtfleet.dev/gateway/")
    caller = caller_pb2.ConveyedCaller(subject="carol", roles=["viewer"]).SerializeToString()
    metadata = (("x-virtfleet-caller-bin", caller),)
    directory = joined(rig, gateways=known[:1])
    async with rig.make(tls=TlsSettings(), identity_dir=directory):
        await ask(rig.channel(rig.pki.gateway("g1")), rigs.WHO_AM_I, WHO, metadata=metadata)
        error = await refused(ask(rig.channel(rig.pki.gateway("g10")), rigs.WHO_AM_I, WHO, metadata=metadata))
        assert error.short == ("UNAUTHENTICATED", "CREDENTIALS_INVALID")
    shutil.rmtree(directory)
    async with rig.make(identity_dir=joined(rig, gateways=known[1:])):
        await ask(rig.channel(rig.pki.gateway("g10")), rigs.WHO_AM_I, WHO, metadata=metadata)


async def test_the_identity_of_another_node_is_refused(tmp_path: Path) -> None:
    rig = rigs.Rig(tmp_path)
    with pytest.raises(SettingsError, match="is of node `n2`"):
        async with rig.make(tls=TlsSettings(), identity_dir=joined(rig, node="n2")):
            pass


async def test_a_node_that_has_not_joined_names_what_is_missing(tmp_path: Path) -> None:
    rig = rigs.Rig(tmp_path)
    with pytest.raises(errors.BackingMissing, match=r"compute\.crt"):
        async with rig.make(tls=TlsSettings(), identity_dir=tmp_path / "none"):
            pass

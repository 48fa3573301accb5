"""What a caller may see whose role holds for some names only."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.compute.rig import NODE, PARENT, Service
from virtfleet.compute.v1 import domain_pb2
from virtfleet_service.call import Call, Caller
from virtfleet_service.errors import PermissionMissing

# A prefix of names that is one of uids too: names are chosen by those who make things, and so are uids.
UID = "a0000000-0000-4000-8000-000000000000"
PREFIX = f"{PARENT}/domains/a"


def asked(node: Service, name: str) -> tuple[Any, Call]:
    """Return the handler of a method, and a call of it by somebody who may see domains of some names."""
    caller = Caller("carol", ("viewer",), name_prefixes=(PREFIX,))
    for service in node.app.server._services:
        for facts in service.facts:
            if facts.name == name:
                call = Call(facts, caller, node.app.server.authorizer, node=NODE)
                return getattr(service.implementation, facts.handler), call
    raise AssertionError(name)


@pytest.mark.parametrize("method", ["GetDomain", "GetDomainStats"])
async def test_what_a_uid_leads_to_is_judged_by_its_name(node: Service, method: str) -> None:
    await node.create("b", uid=UID)
    handler, call = asked(node, method)
    with pytest.raises(PermissionMissing) as refused:
        await handler(call.method.request_class(name=f"{PARENT}/domains/{UID}"), call)
    assert refused.value.resource == f"{PARENT}/domains/b"
    await node.delete("b")
    mine = await node.create("a", uid=UID)
    assert await handler(call.method.request_class(name=f"{PARENT}/domains/{mine.uid}"), call)


async def test_in_a_batch_it_is_too(node: Service) -> None:
    await node.create("b", uid=UID)
    mine = await node.create("a")
    handler, call = asked(node, "BatchGetDomains")
    names = [f"{PARENT}/domains/{UID}", f"{PARENT}/domains/{mine.uid}"]
    answer = domain_pb2.BatchGetDomainsResponse.FromString(
        await handler(domain_pb2.BatchGetDomainsRequest(parent=PARENT, names=names), call)
    )
    assert [result.status.code for result in answer.results] == [7, 0]
    assert not answer.results[0].HasField("domain")


async def test_a_driver_is_seen_by_those_who_may_see_drivers(node: Service) -> None:
    handler, call = asked(node, "GetDriver")
    with pytest.raises(PermissionMissing):
        await handler(call.method.request_class(name=f"{PARENT}/drivers/test"), call)

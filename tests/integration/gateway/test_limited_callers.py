"""Callers whose roles hold for a part of a node."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from tests.integration.gateway.nodes import LimitedPassport, Rig, details_of, echo, named, rig
from virtfleet_gateway import wire

GET = "virtfleet.compute.v1.DomainService.GetDomain"
LIST_OPERATIONS = "google.longrunning.Operations.ListOperations"
OPERATIONS = [f"google.longrunning.Operations.{name}Operation" for name in ("Get", "Wait", "Cancel")]


@pytest_asyncio.fixture
async def fleet() -> AsyncIterator[Rig]:
    async with rig() as made:
        yield made


async def test_the_node_judges_calls_about_operations_whose_names_say_nothing(fleet: Rig) -> None:
    """Who may do things with domains of one prefix may wait for what he began, though no operation is called so."""
    fleet.gate.passport = LimitedPassport("spiffe://virtfleet.dev/user/ci", "nodes/n1/domains/ci-")
    mine = "nodes/n1/services/compute/operations/op1"
    for method in OPERATIONS:
        fleet.nodes["n1"].unary[method] = echo
        assert await fleet.call(method)(named(mine)) == named(mine)
    fleet.nodes["n1"].unary[LIST_OPERATIONS] = echo
    every = wire.delimited(4, b"nodes/n1/services/compute")
    assert await fleet.call(LIST_OPERATIONS)(every) == every
    fleet.nodes["n1"].unary[GET] = echo
    assert await fleet.call(GET)(named("nodes/n1/domains/ci-web")) == named("nodes/n1/domains/ci-web")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await fleet.call(GET)(named("nodes/n1/domains/web"))
    error = caught.value
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert details_of(error)["reason"] == "PERMISSION_MISSING"

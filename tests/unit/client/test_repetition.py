"""A call that was lost is repeated with the same request_id, by both clients; one that is refused is not."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.longrunning import operations_pb2

from virtfleet.compute.v1 import domain_pb2
from virtfleet_client import connect, connect_async, errors

START = domain_pb2.StartDomainRequest(name="nodes/n1/domains/web")


class Domains:
    """Ends the first call with a code and no reason, as gRPC itself does, and answers the next."""

    def __init__(self) -> None:
        self.code = grpc.StatusCode.UNAVAILABLE
        self.asked: list[str] = []

    def start_domain(self, request: Any, context: Any) -> operations_pb2.Operation:
        self.asked.append(request.request_id)
        if len(self.asked) == 1:
            context.abort(self.code, "")
        return operations_pb2.Operation(name="operations/x")


@pytest.fixture
def domains(tmp_path: Path) -> Iterator[tuple[Domains, str]]:
    servicer = Domains()
    server = grpc.server(ThreadPoolExecutor(2))
    start = grpc.unary_unary_rpc_method_handler(
        servicer.start_domain, domain_pb2.StartDomainRequest.FromString, operations_pb2.Operation.SerializeToString
    )
    service = grpc.method_handlers_generic_handler("virtfleet.compute.v1.DomainService", {"StartDomain": start})
    server.add_generic_rpc_handlers((service,))
    address = f"unix:{tmp_path}/s"
    server.add_insecure_port(address)
    server.start()
    yield servicer, f"unix://{tmp_path}/s"
    server.stop(0).wait()


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
async def test_a_lost_call_is_repeated(domains: tuple[Domains, str], code: grpc.StatusCode) -> None:
    servicer, address = domains
    servicer.code = code
    with connect(address) as fleet:
        assert fleet.domains.StartDomain(START).name == "operations/x"
    assert len(servicer.asked) == 2
    assert len(set(servicer.asked) - {""}) == 1
    servicer.asked.clear()
    async with connect_async(address) as other:
        assert (await other.domains.StartDomain(START)).name == "operations/x"
    assert len(servicer.asked) == 2
    assert len(set(servicer.asked) - {""}) == 1


async def test_what_is_not_lost_is_not_repeated(domains: tuple[Domains, str]) -> None:
    servicer, address = domains
    servicer.code = grpc.StatusCode.INTERNAL
    with connect(address) as fleet, pytest.raises(errors.VirtfleetError):
        fleet.domains.StartDomain(START)
    assert len(servicer.asked) == 1

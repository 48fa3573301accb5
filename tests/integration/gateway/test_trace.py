"""A call through the gateway is one trace: the client's span, the gateway's below it, the node's below that."""

from __future__ import annotations

import signal
import tempfile
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.integration.collector import Collector, collecting
from tests.integration.gateway.client import create
from tests.integration.gateway.real import RealFleet, real_fleet
from virtfleet.compute.v1 import console_pb2, console_pb2_grpc, domain_pb2, domain_pb2_grpc, watch_pb2, watch_pb2_grpc
from virtfleet.storage.v1 import volume_pb2, volume_pb2_grpc
from virtfleet.type.v1 import watch_pb2 as type_watch_pb2

TRACES = {
    "GetDomain": "11111111111111111111111111111111",
    "WatchResources": "22222222222222222222222222222222",
    "ListDomains": "77777777777777777777777777777777",
    "OpenConsole": "33333333333333333333333333333333",
    "UploadVolume": "44444444444444444444444444444444",
    "NotSampled": "55555555555555555555555555555555",
    "Nowhere": "66666666666666666666666666666666",
}
CLIENT_SPAN = "00f067aa0ba902b7"


def metadata(method: str, flags: str = "01") -> tuple[tuple[str, str], ...]:
    return (("traceparent", f"00-{TRACES[method]}-{CLIENT_SPAN}-{flags}"), ("tracestate", "vendor=1"))


async def call_all_kinds(fleet: RealFleet) -> None:
    domain = "nodes/n1/domains/web"
    domains = domain_pb2_grpc.DomainServiceStub(fleet.channel)
    get = domain_pb2.GetDomainRequest(name=domain)
    await domains.GetDomain(get, metadata=metadata("GetDomain"))
    await domains.GetDomain(get, metadata=metadata("NotSampled", "00"))
    await domains.ListDomains(
        domain_pb2.ListDomainsRequest(parent="nodes/-", read_through=True), metadata=metadata("ListDomains")
    )
    with pytest.raises(grpc.aio.AioRpcError):
        await domains.GetDomain(
            domain_pb2.GetDomainRequest(name="nodes/none/domains/web"), metadata=metadata("Nowhere")
        )
    watch = watch_pb2_grpc.WatchServiceStub(fleet.channel).WatchResources(
        watch_pb2.WatchResourcesRequest(parent="nodes/n1", snapshot=type_watch_pb2.WatchSnapshot()),
        metadata=metadata("WatchResources"),
    )
    await watch.read()
    watch.cancel()
    console = console_pb2_grpc.ConsoleServiceStub(fleet.channel).OpenConsole(metadata=metadata("OpenConsole"))
    await console.write(console_pb2.OpenConsoleRequest(name=domain, data=b"x"))
    await console.read()
    await console.done_writing()
    assert await console.read() is grpc.aio.EOF
    upload = volume_pb2_grpc.VolumeServiceStub(fleet.channel).UploadVolume(metadata=metadata("UploadVolume"))
    await upload.write(volume_pb2.UploadVolumeRequest(name="nodes/n1/pools/p/volumes/v"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await upload
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def status_of(span: Any) -> str:
    return str({entry.key: entry.value.string_value for entry in span.attributes}["rpc.grpc.status"])


def spans_of(collector: Collector, service: str, method: str) -> list[Any]:
    spans = collector.by_service.get(f"virtfleet-{service}", [])
    return [span for span in spans if span.trace_id.hex() == TRACES[method]]


async def test_client_gateway_and_node_form_one_chain_in_every_kind_of_call() -> None:
    with tempfile.TemporaryDirectory(prefix="vfg") as folder:
        async with (
            collecting() as collector,
            real_fleet(Path(folder), ("n1",), otlp_endpoint=collector.endpoint) as fleet,
        ):
            await create(fleet, "n1", "web")
            await call_all_kinds(fleet)
            # They send what is left when they stop.
            await fleet.nodes["n1"].end(signal.SIGTERM)
            await fleet.stop_gateway()
            await fleet.start_gateway()
    expected = {
        "GetDomain": "OK",
        "ListDomains": "OK",
        "WatchResources": "CANCELLED",
        "OpenConsole": "OK",
        "UploadVolume": "UNIMPLEMENTED",
    }
    for method, status in expected.items():
        (span,) = spans_of(collector, "gateway", method)
        assert span.name.endswith(f".{method}")
        assert span.parent_span_id.hex() == CLIENT_SPAN
        assert (status_of(span), span.trace_state) == (status, "vendor=1")
        if status != "UNIMPLEMENTED":
            (below,) = spans_of(collector, "compute", method)
            assert below.name == span.name
            assert below.parent_span_id == span.span_id
            assert below.start_time_unix_nano >= span.start_time_unix_nano
    for unseen in ("NotSampled", "Nowhere"):
        assert spans_of(collector, "gateway", unseen) == spans_of(collector, "compute", unseen) == []

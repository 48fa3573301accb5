"""Traces go to a collector and continue those of the client and into peers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from tests.integration.server import rig as rigs
from tests.integration.server.rig import ask, refused
from virtfleet.compute.v1 import domain_pb2
from virtfleet_service import errors
from virtfleet_service.call import Call
from virtfleet_service.settings import TelemetrySettings

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


class Collector:
    """Takes what an exporter sends."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.metrics: list[Any] = []
        self.port = 0

    def export(self, request: Any, _context: Any) -> Any:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return trace_service_pb2.ExportTraceServiceResponse()

    def export_metrics(self, request: Any, _context: Any) -> Any:
        for resource in request.resource_metrics:
            for scope in resource.scope_metrics:
                self.metrics += scope.metrics
        return metrics_service_pb2.ExportMetricsServiceResponse()


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    found = Collector()
    # In threads: the exporter blocks until it is answered when the server stops.
    server = grpc.server(futures.ThreadPoolExecutor(2))
    handler: Any = grpc.unary_unary_rpc_method_handler(
        found.export,
        request_deserializer=trace_service_pb2.ExportTraceServiceRequest.FromString,
        response_serializer=trace_service_pb2.ExportTraceServiceResponse.SerializeToString,
    )
    server.add_registered_method_handlers("opentelemetry.proto.collector.trace.v1.TraceService", {"Export": handler})
    metrics: Any = grpc.unary_unary_rpc_method_handler(
        found.export_metrics,
        request_deserializer=metrics_service_pb2.ExportMetricsServiceRequest.FromString,
        response_serializer=metrics_service_pb2.ExportMetricsServiceResponse.SerializeToString,
    )
    server.add_registered_method_handlers(
        "opentelemetry.proto.collector.metrics.v1.MetricsService", {"Export": metrics}
    )
    found.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield found
    await asyncio.to_thread(server.stop(0).wait)


async def test_a_call_is_a_span_below_that_of_its_client(tmp_path: Path, collector: Collector) -> None:
    rig = rigs.Rig(tmp_path)
    outgoing: list[dict[str, str]] = []

    async def act(request: Any, _call: Call) -> bytes:
        await asyncio.sleep(0)
        tracer = rig.server.telemetry.tracer
        assert tracer is not None
        outgoing.append(dict(tracer.outgoing()))
        if request.name.endswith("b"):
            raise errors.WrongState("no", resource=request.name)
        return b""

    rig.domains.act = act
    async with rig.make(telemetry=TelemetrySettings(otlp_endpoint=f"http://127.0.0.1:{collector.port}")):
        metadata = (("traceparent", f"00-{TRACE}-00f067aa0ba902b7-01"),)
        good = domain_pb2.GetDomainRequest(name="nodes/n1/domains/a")
        await ask(rig.socket("viewer"), rigs.GET_DOMAIN, good, metadata=metadata)
        bad = domain_pb2.GetDomainRequest(name="nodes/n1/domains/b")
        await refused(ask(rig.socket("viewer"), rigs.GET_DOMAIN, bad, metadata=metadata))
    spans = {
        next(entry.value.string_value for entry in span.attributes if entry.key == "rpc.grpc.status"): span
        for span in collector.spans
    }
    assert set(spans) == {"OK", "FAILED_PRECONDITION"}
    for span in spans.values():
        assert span.name == "virtfleet.compute.v1.DomainService.GetDomain"
        assert span.trace_id.hex() == TRACE
        assert span.parent_span_id.hex() == "00f067aa0ba902b7"
    reasons = [entry.value.string_value for entry in spans["FAILED_PRECONDITION"].attributes]
    assert "WRONG_STATE" in reasons
    assert outgoing[0]["traceparent"] == f"00-{TRACE}-{spans['OK'].span_id.hex()}-01"
    counted = {
        (attributes["method"], attributes["code"]): point.as_int
        for metric in collector.metrics
        if metric.name == "virtfleet.calls"
        for point in metric.sum.data_points
        for attributes in [{entry.key: entry.value.string_value for entry in point.attributes}]
    }
    method = "virtfleet.compute.v1.DomainService.GetDomain"
    assert counted[method, "OK"] == 1
    assert counted[method, "FAILED_PRECONDITION"] == 1
    assert {"virtfleet.calls", "virtfleet.call_seconds", "virtfleet.open_calls"} <= {
        metric.name for metric in collector.metrics
    }

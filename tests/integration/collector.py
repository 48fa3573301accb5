"""A collector of OpenTelemetry that keeps what it is sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent import futures
from contextlib import asynccontextmanager
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2


class Collector:
    """Takes what an exporter sends."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.by_service: dict[str, list[Any]] = {}
        self.metrics: list[Any] = []
        self.port = 0

    @property
    def endpoint(self) -> str:
        """Where exporters send to."""
        return f"http://127.0.0.1:{self.port}"

    def export(self, request: Any, _context: Any) -> Any:
        """Take spans."""
        for resource in request.resource_spans:
            service = {entry.key: entry.value.string_value for entry in resource.resource.attributes}["service.name"]
            for scope in resource.scope_spans:
                self.spans += scope.spans
                self.by_service.setdefault(service, []).extend(scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()

    def export_metrics(self, request: Any, _context: Any) -> Any:
        """Take metrics."""
        for resource in request.resource_metrics:
            for scope in resource.scope_metrics:
                self.metrics += scope.metrics
        return metrics_service_pb2.ExportMetricsServiceResponse()


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    """Run a collector on a free port of 127.0.0.1."""
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
    try:
        yield found
    finally:
        await asyncio.to_thread(server.stop(0).wait)

"""Metrics and traces. Counting is cheap and always on; what shows or sends it is loaded only when it is configured."""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_left
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

from virtfleet_service.settings import split_address

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from virtfleet_service.call import Call
    from virtfleet_service.settings import TelemetrySettings

_log = logging.getLogger(__name__)

_EXPORT_SECONDS: Final = 3
_METRICS_SECONDS: Final = 30
_STOP_SECONDS: Final = 3.5
"""How long the end waits for a collector: a little longer than one export may take."""
_TRACE_CONTEXT: Final = ("traceparent", "tracestate")

BUCKETS_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
"""The upper ends of the latency buckets."""


class MethodMeter:
    """Counts the calls of one method."""

    __slots__ = ("buckets", "codes", "method", "seconds")

    def __init__(self, method: str) -> None:
        self.method = method
        self.codes: dict[str, int] = {}
        self.buckets = [0] * (len(BUCKETS_SECONDS) + 1)
        self.seconds = 0.0

    def observe(self, code: str, seconds: float) -> None:
        """Count one call that has ended."""
        self.codes[code] = self.codes.get(code, 0) + 1
        self.buckets[bisect_left(BUCKETS_SECONDS, seconds)] += 1
        self.seconds += seconds


class Meters:
    """Holds all that is counted in a process."""

    def __init__(self) -> None:
        self._methods: dict[str, MethodMeter] = {}
        self._gauges: dict[tuple[str, str], Callable[[], float]] = {}

    def method(self, full_name: str) -> MethodMeter:
        """Return the meter of a method; the same one each time."""
        return self._methods.setdefault(full_name, MethodMeter(full_name))

    def gauge(self, name: str, description: str, read: Callable[[], float]) -> None:
        """Show a value that is read when somebody asks for it: `virtfleet_{name}`."""
        self._gauges[(name, description)] = read

    def calls(self) -> Iterator[tuple[str, str, int]]:
        """Yield method, code and count of all calls that have ended."""
        for meter in list(self._methods.values()):
            for code, count in list(meter.codes.items()):
                yield meter.method, code, count

    def seconds(self) -> Iterator[tuple[str, float]]:
        """Yield each method with the seconds that its calls took together."""
        for meter in list(self._methods.values()):
            yield meter.method, meter.seconds

    def gauges(self) -> Iterator[tuple[str, str, Callable[[], float]]]:
        """Yield name, description and reader of each gauge."""
        for (name, description), read in self._gauges.items():
            yield name, description, read

    def collect(self) -> Iterator[Any]:
        """Yield the families of metrics for Prometheus."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        calls = CounterMetricFamily("virtfleet_calls", "Calls that have ended.", labels=["method", "code"])
        seconds = HistogramMetricFamily("virtfleet_call_seconds", "How long calls took.", labels=["method"])
        # In a thread of its own, while the event loop counts on: what grows is copied first.
        for method, code, called in self.calls():
            calls.add_metric([method, code], called)
        for meter in list(self._methods.values()):
            total = 0
            buckets = []
            ends = (*(str(end) for end in BUCKETS_SECONDS), "+Inf")
            for end, count in zip(ends, list(meter.buckets), strict=True):
                total += count
                buckets.append((end, float(total)))
            seconds.add_metric([meter.method], buckets, meter.seconds)
        yield calls
        yield seconds
        for (name, description), read in self._gauges.items():
            yield GaugeMetricFamily(f"virtfleet_{name}", description, value=read())


class Span:
    """Is the trace of one call, from its acceptance to its end."""

    __slots__ = ("_span", "_stack")

    def __init__(self, span: Any, stack: ExitStack) -> None:  # noqa: ANN401  # of OpenTelemetry, which is not loaded without need
        self._span = span
        self._stack = stack

    def end(self, code: str, reason: str = "") -> None:
        """End it with what became of the call."""
        self._span.set_attribute("rpc.grpc.status", code)
        if reason:
            self._span.set_attribute("virtfleet.reason", reason)
        self._stack.close()


class Tracer:
    """Makes spans with OpenTelemetry and sends them to a collector.

    Args:
        endpoint: The OTLP endpoint.
        service: `virtfleet-{service}`.
        node: The node.
    """

    def __init__(self, endpoint: str, service: str, node: str) -> None:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({"service.name": f"virtfleet-{service}", "virtfleet.node": node})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(
            BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_SECONDS))
        )
        self._tracer = self._provider.get_tracer("virtfleet")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, call: Call) -> Span:
        """Begin the span of a call, below that of its client if it sent one."""
        from opentelemetry.trace import SpanKind, use_span

        carrier = {key: value for key in _TRACE_CONTEXT if isinstance(value := call.metadata(key), str)}
        span = self._tracer.start_span(
            call.method.full_name,
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "enduser.id": call.caller.subject},
        )
        stack = ExitStack()
        stack.enter_context(use_span(span, end_on_exit=True))
        return Span(span, stack)

    def pass_on(self, method: str, node: str, metadata: list[tuple[str, str | bytes]]) -> Span:
        """Begin the span of a call that a gateway passes on, below that of its client if it sent one.

        Args:
            method: The full name of the method.
            node: The node to which it goes.
            metadata: What is sent on; the trace context in it becomes that of the new span.
        """
        from opentelemetry.trace import SpanKind, set_span_in_context

        carrier = {key: value for key, value in metadata if key in _TRACE_CONTEXT and isinstance(value, str)}
        span = self._tracer.start_span(
            method,
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "virtfleet.node": node},
        )
        sent: dict[str, str] = {}
        self._propagator.inject(sent, set_span_in_context(span))
        metadata[:] = [item for item in metadata if item[0] not in _TRACE_CONTEXT]
        metadata += sent.items()
        stack = ExitStack()
        stack.callback(span.end)
        return Span(span, stack)

    def outgoing(self) -> list[tuple[str, str]]:
        """Return the metadata that continue the present span in a call to another process."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier)
        return list(carrier.items())

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


class MetricsSender:
    """Sends what is counted to a collector with OpenTelemetry, every half minute and at the end.

    Args:
        endpoint: The OTLP endpoint.
        service: `virtfleet-{service}`.
        node: The node.
        meters: What is counted.
    """

    def __init__(self, endpoint: str, service: str, node: str, meters: Meters) -> None:
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
        from opentelemetry.metrics import CallbackOptions, Observation
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.resources import Resource

        exporter = OTLPMetricExporter(endpoint=endpoint, timeout=_EXPORT_SECONDS)
        reader = PeriodicExportingMetricReader(exporter, export_interval_millis=_METRICS_SECONDS * 1000)
        resource = Resource.create({"service.name": f"virtfleet-{service}", "virtfleet.node": node})
        self._provider = MeterProvider([reader], resource, shutdown_on_exit=False)
        meter = self._provider.get_meter("virtfleet")

        def calls(_options: CallbackOptions) -> Iterator[Observation]:
            for method, code, count in meters.calls():
                yield Observation(count, {"method": method, "code": code})

        def seconds(_options: CallbackOptions) -> Iterator[Observation]:
            for method, total in meters.seconds():
                yield Observation(total, {"method": method})

        def gauge(read: Callable[[], float]) -> Callable[[CallbackOptions], Iterator[Observation]]:
            return lambda _options: iter([Observation(read())])

        meter.create_observable_counter("virtfleet.calls", [calls], description="Calls that have ended.")
        meter.create_observable_counter("virtfleet.call_seconds", [seconds], "s", "How long calls took together.")
        for name, description, read in meters.gauges():
            meter.create_observable_gauge(f"virtfleet.{name}", [gauge(read)], description=description)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


class Telemetry:
    """Owns what a process shows and sends; an async context manager.

    Args:
        settings: What is configured.
        service: The name of the service.
        node: The node.
    """

    def __init__(self, settings: TelemetrySettings, service: str, node: str) -> None:
        self._settings = settings
        self._service = service
        self._node = node
        self.meters = Meters()
        self.tracer: Tracer | None = None
        self._sender: MetricsSender | None = None
        self.metrics_port = 0
        self._stop: Callable[[], None] | None = None

    def start(self) -> None:
        """Begin to show and send what is configured.

        Raises:
            OSError: The address for metrics cannot be had.
        """
        if self._settings.otlp_endpoint:
            self.tracer = Tracer(self._settings.otlp_endpoint, self._service, self._node)
            self._sender = MetricsSender(self._settings.otlp_endpoint, self._service, self._node, self.meters)
        if self._settings.prometheus:
            self._serve_metrics(self._settings.prometheus)

    def _serve_metrics(self, address: str) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        host, port = split_address(address, "telemetry.prometheus")
        registry = CollectorRegistry()
        registry.register(self.meters)
        server, thread = start_http_server(port, addr=host, registry=registry)
        self.metrics_port = server.server_port

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        self._stop = stop
        _log.info("metrics are served", extra={"address": f"{host}:{self.metrics_port}"})

    def stop(self) -> None:
        """Stop; succeeds if nothing was started."""
        if self._stop is not None:
            self._stop()
            self._stop = None
        # Each in a thread that the end of the process does not wait for: a collector that hangs would hold it up.
        closings = [
            threading.Thread(target=one.close, name="end of telemetry", daemon=True)
            for one in (self.tracer, self._sender)
            if one is not None
        ]
        self.tracer = self._sender = None
        for closing in closings:
            closing.start()
        until = time.monotonic() + _STOP_SECONDS
        for closing in closings:
            closing.join(max(until - time.monotonic(), 0.0))

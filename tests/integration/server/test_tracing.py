"""Traces go to a collector and continue those of the client and into peers."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.collector import Collector, collecting
from tests.integration.server import rig as rigs
from tests.integration.server.rig import ask, refused
from virtfleet.compute.v1 import domain_pb2
from virtfleet_service import errors
from virtfleet_service.call import Call
from virtfleet_service.settings import TelemetrySettings

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    async with collecting() as found:
        yield found


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
    async with rig.make(telemetry=TelemetrySettings(otlp_endpoint=collector.endpoint)):
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


async def test_a_collector_that_hangs_holds_up_neither_calls_nor_the_end(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        rig = rigs.Rig(tmp_path)
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        async with rig.make(telemetry=TelemetrySettings(otlp_endpoint=endpoint), drain_seconds=0):
            tracer = rig.server.telemetry.tracer
            assert tracer is not None
            started = time.monotonic()
            request = domain_pb2.GetDomainRequest(name="nodes/n1/domains/a")
            for _ in range(20):
                await ask(rig.socket("viewer"), rigs.GET_DOMAIN, request)
            assert time.monotonic() - started < 5
            # More than its queue holds: what is too much is dropped.
            for _ in range(5000):
                tracer.begin(rig.domains.calls[0]).end("OK")
            started = time.monotonic()
        assert time.monotonic() - started < 5.5

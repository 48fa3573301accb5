"""Calls every method of the API on a live fleet and writes `protos/IMPLEMENTED.txt`: the methods that are built.

A method is built if it answers anything but METHOD_NOT_IMPLEMENTED. What it answers is not judged here (the request is
nearly empty);
other tests do that.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import grpc
import pytest
from google.longrunning import operations_pb2
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from grpc_channelz.v1 import channelz_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

import virtfleet
from tools.paths import PROTOS
from virtfleet_client import Fleet
from virtfleet_client.errors import VirtfleetError

TARGET = PROTOS / "IMPLEMENTED.txt"
COLLECTIONS = {
    "name": {
        "compute": "domains/none",
        "storage": "pools/none",
        "network": "networks/none",
    },
}


def methods() -> list[MethodDescriptor]:
    """List every method of the virtfleet packages that are served on TCP, and of google.longrunning."""
    found: list[MethodDescriptor] = []
    for module in pkgutil.walk_packages(virtfleet.__path__, "virtfleet."):
        # Of a node's own sockets, and of a fake fleet's control: no real gateway has them.
        if not module.name.endswith("_pb2") or ".node." in module.name or ".fake." in module.name:
            continue
        file = importlib.import_module(module.name).DESCRIPTOR
        found += [method for service in file.services_by_name.values() for method in service.methods]
    found += operations_pb2.DESCRIPTOR.services_by_name["Operations"].methods
    return sorted(found, key=lambda method: method.full_name)


def local_methods() -> list[MethodDescriptor]:
    """List every method of `virtfleet.node.v1`."""
    found: list[MethodDescriptor] = []
    for module in pkgutil.walk_packages(virtfleet.__path__, "virtfleet."):
        if module.name.endswith("_pb2") and ".node." in module.name:
            file = importlib.import_module(module.name).DESCRIPTOR
            found += [method for service in file.services_by_name.values() for method in service.methods]
    return found


def route(method: MethodDescriptor, node: str) -> str:
    """Return a value of the routing field that brings the call to the process that serves the method."""
    package = method.containing_service.file.package
    if package in ("virtfleet.common.v1", "google.longrunning"):
        tail = "/operations/none" if method.input_type.full_name != "google.longrunning.ListOperationsRequest" else ""
        return f"{node}/services/compute" + (tail if package == "google.longrunning" else "")
    if package == "virtfleet.fleet.v1":
        return ""
    return node


def call(channel: grpc.Channel, method: MethodDescriptor, node: str) -> grpc.RpcError | None:
    """Call a method with a request that is empty but for the routing field; return its error."""
    request = message_factory.GetMessageClass(method.input_type)()
    by_number = method.input_type.fields_by_number
    field = by_number[4] if method.input_type.full_name == "google.longrunning.ListOperationsRequest" else by_number[1]
    if field.message_type is None:
        setattr(request, field.name, route(method, node))
    elif "name" in field.message_type.fields_by_name:
        collection = COLLECTIONS["name"].get(method.containing_service.file.package.split(".")[1], "")
        getattr(request, field.name).name = f"{node}/{collection}" if collection else node
    path = f"/{method.containing_service.full_name}/{method.name}"
    reply = message_factory.GetMessageClass(method.output_type)
    kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    stub = getattr(channel, kind)(path, request.__class__.SerializeToString, reply.FromString)
    argument = iter([request]) if method.client_streaming else request
    try:
        answer = stub(argument, timeout=5)
        if method.server_streaming:
            next(answer, None)
            answer.cancel()
    except grpc.RpcError as error:
        return error
    return None


def is_built(error: grpc.RpcError | None) -> bool:
    """Tell whether an answer is that of a method that exists."""
    if not isinstance(error, VirtfleetError):
        return True
    return error.reason != "METHOD_NOT_IMPLEMENTED" and error.code() is not grpc.StatusCode.UNIMPLEMENTED


def standard(fleet: Fleet, node: str) -> Iterator[tuple[str, grpc.RpcError | None]]:
    """Call health and reflection of the gateway and, by metadata, of one node."""
    health = fleet.channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        health_pb2.HealthCheckRequest.SerializeToString,
        health_pb2.HealthCheckResponse.FromString,
    )
    for place, metadata in (("gateway", ()), ("node", (("x-virtfleet-node", node.removeprefix("nodes/")),))):
        try:
            answer = health(health_pb2.HealthCheckRequest(), timeout=5, metadata=metadata)
        except VirtfleetError as error:
            yield f"grpc.health.v1.Health/Check at the {place}", error
        else:
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            yield f"grpc.health.v1.Health/Check at the {place}", None
    for version in ("v1", "v1alpha"):
        stub = fleet.channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            reflection_pb2.ServerReflectionRequest.SerializeToString,
            reflection_pb2.ServerReflectionResponse.FromString,
        )
        stream = stub(iter([reflection_pb2.ServerReflectionRequest(list_services="*")]), timeout=5)
        names = {service.name for service in next(stream).list_services_response.service}
        stream.cancel()
        assert {"virtfleet.compute.v1.DomainService", "virtfleet.fleet.v1.NodeService"} <= names
        yield f"grpc.reflection.{version}.ServerReflection/ServerReflectionInfo", None


def test_every_method_of_the_api_is_built(fleet: Fleet, nodes: list[str]) -> None:
    built: list[str] = []
    missing: list[str] = []
    for method in methods():
        name = f"{method.containing_service.full_name}/{method.name}"
        (built if is_built(call(fleet.channel, method, nodes[0])) else missing).append(name)
    for name, error in standard(fleet, nodes[0]):
        (built if is_built(error) else missing).append(name)
    before = TARGET.read_text() if TARGET.exists() else ""
    TARGET.write_text("\n".join(built) + "\n")
    assert missing == []
    assert before == TARGET.read_text(), "protos/IMPLEMENTED.txt was out of date; it has been written again"


@pytest.mark.parametrize("method", local_methods(), ids=lambda method: method.full_name)
def test_a_nodes_own_methods_are_not_served_through_the_gateway(
    fleet: Fleet, nodes: list[str], method: MethodDescriptor
) -> None:
    assert not is_built(call(fleet.channel, method, nodes[0]))


def test_channelz_is_not_served_on_tcp(fleet: Fleet) -> None:
    stub = fleet.channel.unary_unary(
        "/grpc.channelz.v1.Channelz/GetServers",
        channelz_pb2.GetServersRequest.SerializeToString,
        channelz_pb2.GetServersResponse.FromString,
    )
    with pytest.raises(VirtfleetError) as caught:
        stub(channelz_pb2.GetServersRequest(), timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED

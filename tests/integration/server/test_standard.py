"""Health, reflection in both versions, channelz, and the services of common.v1."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2
from grpc_channelz.v1 import channelz_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from tests.integration.server import rig as rigs
from tests.integration.server.rig import ask, refused, running
from virtfleet.common.v1 import admin_pb2

CHECK = "/grpc.health.v1.Health/Check"
REFLECTION = {
    version: f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo" for version in ("v1", "v1alpha")
}


async def test_health_of_the_server_and_of_each_service(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        for service in ("", "virtfleet.compute.v1.DomainService", "virtfleet.common.v1.AdminService"):
            request = health_pb2.HealthCheckRequest(service=service)
            answer = await ask(rig.socket("viewer"), CHECK, request, health_pb2.HealthCheckResponse)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        error = await refused(ask(rig.socket("viewer"), CHECK, health_pb2.HealthCheckRequest(service="no.Such")))
        assert error.short == ("NOT_FOUND", "RESOURCE_NOT_FOUND")
        listed = await ask(rig.socket("viewer"), "/grpc.health.v1.Health/List", b"", health_pb2.HealthListResponse)
        assert "virtfleet.storage.v1.VolumeService" in listed.statuses
        assert "virtfleet.node.v1.AttachmentService" not in listed.statuses


async def test_a_watch_of_health_tells_each_change(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        channel = rig.socket("viewer")
        request = health_pb2.HealthCheckRequest(service="virtfleet.compute.v1.DomainService")
        watch: Any = channel.unary_stream("/grpc.health.v1.Health/Watch")(request.SerializeToString(), timeout=20)
        seen = [health_pb2.HealthCheckResponse.FromString(await watch.read()).status]
        rig.server.health.set(request.service, serving=False)
        seen.append(health_pb2.HealthCheckResponse.FromString(await watch.read()).status)
        rig.server.health.set(request.service, serving=True)
        seen.append(health_pb2.HealthCheckResponse.FromString(await watch.read()).status)
        assert seen == [1, 2, 1]
        late: Any = channel.unary_stream("/grpc.health.v1.Health/Watch")(
            health_pb2.HealthCheckRequest(service="later").SerializeToString(), timeout=20
        )
        assert health_pb2.HealthCheckResponse.FromString(await late.read()).status == 3
        rig.server.health.set("later", serving=True)
        assert health_pb2.HealthCheckResponse.FromString(await late.read()).status == 1
        await channel.close()


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_shows_services_files_and_extensions(tmp_path: Path, version: str) -> None:
    async with running(tmp_path) as rig:
        channel = rig.channel(rig.pki.user("a", "viewer"))
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="virtfleet.compute.v1.DomainService"),
            reflection_pb2.ServerReflectionRequest(file_by_filename="virtfleet/type/v1/method.proto"),
            reflection_pb2.ServerReflectionRequest(
                file_containing_extension=reflection_pb2.ExtensionRequest(
                    containing_type="google.protobuf.MethodOptions", extension_number=50201
                )
            ),
            reflection_pb2.ServerReflectionRequest(all_extension_numbers_of_type="google.protobuf.MethodOptions"),
            reflection_pb2.ServerReflectionRequest(
                file_containing_symbol=f"grpc.reflection.{version}.ServerReflection"
            ),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="no.Such"),
            reflection_pb2.ServerReflectionRequest(),
        ]
        method: Any = channel.stream_stream(REFLECTION[version])
        call = method(iter([request.SerializeToString() for request in requests]), timeout=20)
        answers = [reflection_pb2.ServerReflectionResponse.FromString(answer) async for answer in call]
        services = [service.name for service in answers[0].list_services_response.service]
        assert services == sorted(services)
        assert {
            "virtfleet.compute.v1.DomainService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
            "grpc.reflection.v1alpha.ServerReflection",
        } <= set(services)
        assert not [name for name in services if name.startswith("virtfleet.node.")]
        files = {
            descriptor_pb2.FileDescriptorProto.FromString(file).name: file
            for file in answers[1].file_descriptor_response.file_descriptor_proto
        }
        assert {"virtfleet/compute/v1/domain.proto", "buf/validate/validate.proto"} <= set(files)
        for index in (2, 3):
            names = [
                descriptor_pb2.FileDescriptorProto.FromString(file).name
                for file in answers[index].file_descriptor_response.file_descriptor_proto
            ]
            assert "virtfleet/type/v1/method.proto" in names
        assert 50201 in answers[4].all_extension_numbers_response.extension_number
        assert answers[5].WhichOneof("message_response") == "file_descriptor_response"
        assert answers[6].error_response.error_code == 5
        assert answers[7].error_response.error_code == 3
        assert answers[1].original_request == requests[1]
        await channel.close()


async def test_channelz_is_on_the_administrators_local_socket_only(tmp_path: Path) -> None:
    path = "/grpc.channelz.v1.Channelz/"
    async with running(tmp_path) as rig:
        servers = await ask(rig.socket("admin"), path + "GetServers", b"", channelz_pb2.GetServersResponse)
        assert len(servers.server) >= 5
        request = channelz_pb2.GetServerRequest(server_id=999_999)
        error = await refused(ask(rig.socket("admin"), path + "GetServer", request))
        assert error.short == ("NOT_FOUND", "RESOURCE_NOT_FOUND")
        error = await refused(ask(rig.socket("operator"), path + "GetServers", b""))
        assert error.short == ("PERMISSION_DENIED", "PERMISSION_MISSING")
        error = await refused(ask(rig.channel(rig.pki.user("a", "admin")), path + "GetServers", b""))
        assert error.short == ("UNIMPLEMENTED", "METHOD_NOT_IMPLEMENTED")


async def test_a_server_describes_itself(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        for name in ("", "nodes/n1/services/compute"):
            request = admin_pb2.GetServerRequest(name=name)
            answer = await ask(rig.socket("viewer"), rigs.GET_SERVER, request, admin_pb2.Server)
            assert answer.name == "nodes/n1/services/compute"
            assert answer.identity == "spiffe://virtfleet.dev/node/n1/compute"
            assert answer.active_calls_count == 1
            assert answer.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        for name, short in (
            ("nodes/n1/services/storage", ("NOT_FOUND", "RESOURCE_NOT_FOUND")),
            ("gateways/g1", ("NOT_FOUND", "RESOURCE_NOT_FOUND")),
            ("nodes/n2/services/compute", ("FAILED_PRECONDITION", "WRONG_NODE")),
        ):
            error = await refused(ask(rig.socket("viewer"), rigs.GET_SERVER, admin_pb2.GetServerRequest(name=name)))
            assert error.short == short


async def test_metrics_are_served_where_configured(tmp_path: Path) -> None:
    from dataclasses import replace

    from virtfleet_service.settings import TelemetrySettings

    rig = rigs.Rig(tmp_path)
    async with rig.make(telemetry=replace(TelemetrySettings(), prometheus="127.0.0.1:0")) as server:
        await ask(rig.socket("viewer"), rigs.WHO_AM_I, b"")
        reader, writer = await asyncio.open_connection("127.0.0.1", server.telemetry.metrics_port)
        writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
        text = (await reader.read()).decode()
        writer.close()
        await writer.wait_closed()
    assert 'virtfleet_calls_total{code="OK",method="virtfleet.common.v1.AccessService.WhoAmI"} 1.0' in text
    assert 'virtfleet_call_seconds_count{method="virtfleet.common.v1.AccessService.WhoAmI"} 1.0' in text
    assert "virtfleet_open_calls 0.0" in text


def test_files_of_ours_are_shown_with_their_comments() -> None:
    from google.protobuf import descriptor_pb2

    from virtfleet_service.standard import commented

    file = descriptor_pb2.FileDescriptorProto.FromString(commented()["virtfleet/compute/v1/domain.proto"])
    said = {tuple(place.path): place.leading_comments for place in file.source_code_info.location}
    assert "Defines, changes, starts and stops domains" in said[6, 0]
    assert len(said) > 100

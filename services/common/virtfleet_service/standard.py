"""The services that every gRPC server is expected to have: health, reflection (v1 and v1alpha), channelz."""

from __future__ import annotations

import asyncio
import functools
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import FileDescriptor, ServiceDescriptor
from grpc_channelz.v1 import channelz_pb2
from grpc_channelz.v1.channelz import ChannelzServicer
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from virtfleet_service.errors import FieldOutOfRange, ResourceNotFound, Unexpected

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping

    from google.protobuf.message import Message

    from virtfleet_service.call import Call

SERVING: Final = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN: Final = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

HEALTH: Final[ServiceDescriptor] = health_pb2.DESCRIPTOR.services_by_name["Health"]
CHANNELZ: Final[ServiceDescriptor] = channelz_pb2.DESCRIPTOR.services_by_name["Channelz"]
REFLECTION_V1ALPHA: Final[ServiceDescriptor] = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]

_V1_FILE: Final = "grpc/reflection/v1/reflection.proto"


def _reflection_v1() -> ServiceDescriptor:
    """Return the descriptor of reflection v1, which grpcio-reflection lacks: v1alpha word for word, renamed."""
    pool = descriptor_pool.Default()
    try:
        file = pool.FindFileByName(_V1_FILE)
    except KeyError:
        proto = descriptor_pb2.FileDescriptorProto()
        reflection_pb2.DESCRIPTOR.CopyToProto(proto)
        proto.name, proto.package = _V1_FILE, "grpc.reflection.v1"
        for message in proto.message_type:
            for field in message.field:
                if field.type_name:
                    field.type_name = field.type_name.replace(".v1alpha.", ".v1.")
        for method in proto.service[0].method:
            method.input_type = method.input_type.replace(".v1alpha.", ".v1.")
            method.output_type = method.output_type.replace(".v1alpha.", ".v1.")
        pool.AddSerializedFile(proto.SerializeToString())
        file = pool.FindFileByName(_V1_FILE)
    return file.services_by_name["ServerReflection"]


REFLECTION_V1: Final[ServiceDescriptor] = _reflection_v1()


class Health:
    """Tells whether services are ready; the empty name stands for the whole server."""

    def __init__(self) -> None:
        self._states: dict[str, health_pb2.HealthCheckResponse.ServingStatus] = {"": SERVING}
        self._changed = asyncio.Event()
        self._stopping = False

    def set(self, service: str, *, serving: bool) -> None:
        """Say whether a service is ready. Nothing becomes ready again once the server drains."""
        state = SERVING if serving and not self._stopping else NOT_SERVING
        if self._states.get(service) != state:
            self._states[service] = state
            self._wake()

    def stop(self) -> None:
        """Say that nothing is ready any more; watches send it and end."""
        self._stopping = True
        self._states = dict.fromkeys(self._states, NOT_SERVING)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def check(self, request: health_pb2.HealthCheckRequest, _call: Call) -> health_pb2.HealthCheckResponse:
        """Answer Check."""
        state = self._states.get(request.service)
        if state is None:
            raise ResourceNotFound(f"this server has no service `{request.service}`", service=request.service)
        return health_pb2.HealthCheckResponse(status=state)

    async def list(self, _request: health_pb2.HealthListRequest, _call: Call) -> health_pb2.HealthListResponse:
        """Answer List."""
        return health_pb2.HealthListResponse(
            statuses={service: health_pb2.HealthCheckResponse(status=state) for service, state in self._states.items()}
        )

    async def watch(
        self, request: health_pb2.HealthCheckRequest, _call: Call
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Answer Watch: the state now and each change. An unknown service may come to be known."""
        sent: int | None = None
        while True:
            # Taken before the state is read, so that no change in between is lost.
            changed = self._changed
            state = self._states.get(request.service, SERVICE_UNKNOWN)
            if state != sent:
                sent = state
                yield health_pb2.HealthCheckResponse(status=state)
            if self._stopping:
                return
            await changed.wait()


@functools.cache
def commented() -> Mapping[str, bytes]:
    """Return the files of our protos with their comments, by name; read when somebody asks, half a MiB."""
    data = resources.files("virtfleet").joinpath("commented.binpb").read_bytes()
    files = descriptor_pb2.FileDescriptorSet.FromString(data).file
    return {file.name: file.SerializeToString() for file in files}


class Reflection:
    """Shows the descriptors of the services of a server.

    The two versions differ in their package alone; the messages of either are answered in their own class.

    Args:
        services: The full names of the services.
        pool: Where descriptors are found.
    """

    def __init__(self, services: Iterable[str], pool: descriptor_pool.DescriptorPool | None = None) -> None:
        self._services = sorted(services)
        self._pool = pool if pool is not None else descriptor_pool.Default()

    async def server_reflection_info(self, requests: AsyncIterator[Any], _call: Call) -> AsyncIterator[Message]:
        """Answer ServerReflectionInfo."""
        async for request in requests:
            response = reflection_pb2.ServerReflectionResponse(valid_host=request.host)
            response.original_request.ParseFromString(request.SerializeToString())
            self._answer(request, response)
            yield response

    def _answer(self, request: Any, response: reflection_pb2.ServerReflectionResponse) -> None:  # noqa: ANN401  # of either version
        kind = request.WhichOneof("message_request")
        try:
            match kind:
                case "list_services":
                    for service in self._services:
                        response.list_services_response.service.add(name=service)
                case "file_by_filename":
                    self._files(self._pool.FindFileByName(request.file_by_filename), response)
                case "file_containing_symbol":
                    self._files(self._file_of(request.file_containing_symbol), response)
                case "file_containing_extension":
                    wanted = request.file_containing_extension
                    message = self._pool.FindMessageTypeByName(wanted.containing_type)
                    extension: Any = self._pool.FindExtensionByNumber(message, wanted.extension_number)
                    self._files(extension.file, response)
                case "all_extension_numbers_of_type":
                    message = self._pool.FindMessageTypeByName(request.all_extension_numbers_of_type)
                    numbers = response.all_extension_numbers_response
                    numbers.base_type_name = message.full_name
                    numbers.extension_number.extend(
                        sorted(extension.number for extension in self._pool.FindAllExtensions(message))
                    )
                case _:
                    self._error(response, grpc.StatusCode.INVALID_ARGUMENT, "the request asks for nothing")
        except KeyError as error:
            self._error(response, grpc.StatusCode.NOT_FOUND, f"not found: {error.args[0] if error.args else ''}")

    def _file_of(self, symbol: str) -> FileDescriptor:
        """Return the file of a symbol; the pool itself knows no methods, fields and values.

        Raises:
            KeyError: There is none.
        """
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            outer, _, name = symbol.rpartition(".")
            for find, inner in (
                (self._pool.FindServiceByName, "methods_by_name"),
                (self._pool.FindMessageTypeByName, "fields_by_name"),
                (self._pool.FindEnumTypeByName, "values_by_name"),
            ):
                try:
                    found: Any = find(outer)
                except KeyError:
                    continue
                if name in getattr(found, inner):
                    file: FileDescriptor = found.file
                    return file
            raise

    @staticmethod
    def _error(response: reflection_pb2.ServerReflectionResponse, code: grpc.StatusCode, message: str) -> None:
        number: int = code.value[0]
        response.error_response.error_code = number
        response.error_response.error_message = message

    @staticmethod
    def _files(file: FileDescriptor, response: reflection_pb2.ServerReflectionResponse) -> None:
        """Add a file and all that it imports, imports first, so that a client needs no second question."""
        seen: dict[str, bytes] = {}

        def visit(descriptor: FileDescriptor) -> None:
            if descriptor.name in seen:
                return
            seen[descriptor.name] = commented().get(descriptor.name, descriptor.serialized_pb)
            for dependency in descriptor.dependencies:
                visit(dependency)

        visit(file)
        response.file_descriptor_response.file_descriptor_proto.extend(seen.values())


class _Outcome:
    """Takes what the synchronous channelz code says about a failure; it expects a gRPC context."""

    def __init__(self) -> None:
        self.code: grpc.StatusCode | None = None
        self.details = ""

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details


class Channelz:
    """Shows the connections of the process; on local sockets only."""

    def _ask(self, ask: Callable[[Any, Any], Message | None], request: Message) -> Message:
        outcome = _Outcome()
        answer = ask(request, outcome)
        if outcome.code is grpc.StatusCode.NOT_FOUND:
            raise ResourceNotFound(outcome.details)
        if outcome.code is grpc.StatusCode.INVALID_ARGUMENT:
            raise FieldOutOfRange(outcome.details)
        if answer is None:
            raise Unexpected(outcome.details)
        return answer

    async def get_top_channels(self, request: Message, _call: Call) -> Message:
        """Answer GetTopChannels."""
        return self._ask(ChannelzServicer.GetTopChannels, request)

    async def get_servers(self, request: Message, _call: Call) -> Message:
        """Answer GetServers."""
        return self._ask(ChannelzServicer.GetServers, request)

    async def get_server(self, request: Message, _call: Call) -> Message:
        """Answer GetServer."""
        return self._ask(ChannelzServicer.GetServer, request)

    async def get_server_sockets(self, request: Message, _call: Call) -> Message:
        """Answer GetServerSockets."""
        return self._ask(ChannelzServicer.GetServerSockets, request)

    async def get_channel(self, request: Message, _call: Call) -> Message:
        """Answer GetChannel."""
        return self._ask(ChannelzServicer.GetChannel, request)

    async def get_subchannel(self, request: Message, _call: Call) -> Message:
        """Answer GetSubchannel."""
        return self._ask(ChannelzServicer.GetSubchannel, request)

    async def get_socket(self, request: Message, _call: Call) -> Message:
        """Answer GetSocket."""
        return self._ask(ChannelzServicer.GetSocket, request)

"""Comments of the API, asked of the fleet by server reflection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from virtfleet_client import Fleet


class Comments:
    """Finds the comment of an element of the protos.

    Args:
        fleet: The connection.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._files: dict[str, dict[str, str]] = {}

    def of(self, file: str, full_name: str) -> str:
        """Return the comment of an element in a file; empty: it has none there.

        Raises:
            VirtfleetError: The fleet cannot be asked.
        """
        if file not in self._files:
            self._files[file] = self._read(file)
        return self._files[file].get(full_name, "")

    def _read(self, file: str) -> dict[str, str]:
        from google.protobuf import descriptor_pb2
        from grpc_reflection.v1alpha import reflection_pb2

        ask = self._fleet.channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        found: dict[str, str] = {}
        for answer in ask(iter([reflection_pb2.ServerReflectionRequest(file_by_filename=file)]), timeout=10):
            for data in answer.file_descriptor_response.file_descriptor_proto:
                described = descriptor_pb2.FileDescriptorProto.FromString(data)
                if described.name == file:
                    found |= _comments(described)
        return found


def _comments(file: Any) -> dict[str, str]:  # noqa: ANN401 - a FileDescriptorProto
    found = {}
    for place in file.source_code_info.location:
        name = _name(file, list(place.path))
        if name and place.leading_comments:
            found[f"{file.package}.{name}"] = place.leading_comments.strip()
    return found


def _name(file: Any, path: list[int]) -> str:  # noqa: ANN401 - a FileDescriptorProto
    """Return the name of the element at a path of source info; empty: it is none that has a comment of use."""
    collections = {(0, 4): "message_type", (0, 5): "enum_type", (0, 6): "service"}
    inner = {
        "message_type": {2: "field", 3: "nested_type", 4: "enum_type"},
        "service": {2: "method"},
        "enum_type": {2: "value"},
    }
    names, element, kind = [], file, ""
    for index in range(0, len(path) - 1, 2):
        attribute = collections.get((0, path[0])) if index == 0 else inner.get(kind, {}).get(path[index])
        if attribute is None:
            return ""
        element = getattr(element, attribute)[path[index + 1]]
        kind = "message_type" if attribute == "nested_type" else attribute
        names.append(element.name)
    return ".".join(names) if len(path) % 2 == 0 else ""

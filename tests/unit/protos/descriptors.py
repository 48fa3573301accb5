"""Every element of the protos as a flat list, read from an image that protoc made from the sources just now.

Nothing here reads the annotations that the rules check except through the descriptors of protoc itself.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Known to the default pool before the image is parsed, so that the options are read as what they are.
from buf.validate import validate_pb2
from google.api import field_behavior_pb2, resource_pb2
from google.protobuf import descriptor_pb2 as pb
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor, MethodDescriptor

from tools import protos
from virtfleet.type.v1 import method_pb2

SCALARS = {
    FieldDescriptor.CPPTYPE_BOOL,
    FieldDescriptor.CPPTYPE_DOUBLE,
    FieldDescriptor.CPPTYPE_FLOAT,
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_STRING,
    FieldDescriptor.CPPTYPE_UINT32,
    FieldDescriptor.CPPTYPE_UINT64,
}
INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_UINT32,
    FieldDescriptor.CPPTYPE_UINT64,
}
NUMBERS = INTEGERS | {FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT}
HEAD = {
    "name": 1,
    "uid": 2,
    "display_name": 3,
    "labels": 4,
    "annotations": 5,
    "generation": 6,
    "etag": 7,
    "create_time": 8,
    "update_time": 9,
    "spec": 10,
    "status": 11,
}


@functools.cache
def image() -> pb.FileDescriptorSet:
    with tempfile.TemporaryDirectory() as work:
        return protos.write_image(Path(work) / "image.binpb")


@functools.cache
def _pool() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    for file in image().file:
        pool.Add(file)
    return pool


@functools.cache
def sources() -> tuple[pb.FileDescriptorProto, ...]:
    return tuple(file for file in image().file if file.name.startswith("virtfleet/"))


@functools.cache
def files() -> tuple[FileDescriptor, ...]:
    return tuple(_pool().FindFileByName(file.name) for file in sources())


def _nested(message: Descriptor) -> Iterator[Descriptor]:
    if not message.GetOptions().map_entry:
        yield message
        for inner in message.nested_types:
            yield from _nested(inner)


@functools.cache
def messages() -> tuple[Descriptor, ...]:
    return tuple(found for file in files() for top in file.message_types_by_name.values() for found in _nested(top))


@functools.cache
def fields() -> tuple[FieldDescriptor, ...]:
    return tuple(field for message in messages() for field in message.fields)


@functools.cache
def methods() -> tuple[MethodDescriptor, ...]:
    return tuple(method for file in files() for service in file.services_by_name.values() for method in service.methods)


def package(element: Descriptor | MethodDescriptor) -> str:
    """`compute` for an element of `virtfleet.compute.v1`."""
    return element.full_name.split(".")[1]


def rule(method: MethodDescriptor) -> method_pb2.MethodRule:
    # The pool of the image has classes of its own for options; the default pool knows the extension.
    options = pb.MethodOptions.FromString(method.GetOptions().SerializeToString())
    return options.Extensions[method_pb2.method]


def mutates(method: MethodDescriptor) -> bool:
    return rule(method).effect in {method_pb2.EFFECT_RECORD, method_pb2.EFFECT_BACKEND}


def target(field: FieldDescriptor) -> Descriptor:
    """The message that the field holds."""
    assert field.message_type is not None, f"{field.full_name} holds no message"
    return field.message_type


def is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def is_resource(message: Descriptor) -> bool:
    """It has a spec: what was asked for, beside what is."""
    return "spec" in message.fields_by_name and "name" in message.fields_by_name


def reference(field: FieldDescriptor) -> str:
    """The type in the field's google.api.resource_reference, empty without one."""
    options = pb.FieldOptions.FromString(field.GetOptions().SerializeToString())
    # The stubs of this wheel do not say which options the extension is for.
    extension: Any = resource_pb2.resource_reference
    found = options.Extensions[extension]
    return str(found.type or found.child_type)


def rules(field: FieldDescriptor) -> validate_pb2.FieldRules:
    """What protovalidate checks of the field."""
    options = pb.FieldOptions.FromString(field.GetOptions().SerializeToString())
    extension: Any = validate_pb2.field
    found: validate_pb2.FieldRules = options.Extensions[extension]
    return found


def behaviors(field: FieldDescriptor) -> set[int]:
    """The field's google.api.field_behavior."""
    options = pb.FieldOptions.FromString(field.GetOptions().SerializeToString())
    extension: Any = field_behavior_pb2.field_behavior
    return set(options.Extensions[extension])


def resource_type(message: Descriptor) -> str:
    """The type in the message's google.api.resource, empty without one."""
    options = pb.MessageOptions.FromString(message.GetOptions().SerializeToString())
    extension: Any = resource_pb2.resource
    return str(options.Extensions[extension].type)


@functools.cache
def spec_messages() -> tuple[Descriptor, ...]:
    """Every message of ours that a `spec` field reaches."""
    waiting = [target(message.fields_by_name["spec"]) for message in messages() if is_resource(message)]
    found: dict[str, Descriptor] = {}
    while waiting:
        message = waiting.pop()
        if message.full_name in found or not message.full_name.startswith("virtfleet."):
            continue
        found[message.full_name] = message
        waiting += [field.message_type for field in message.fields if field.message_type]
    return tuple(message for message in found.values() if not message.GetOptions().map_entry)


@dataclass(frozen=True)
class Documented:
    """An element and the comment before it."""

    kind: str
    name: str
    comment: str


def _in_message(
    message: pb.DescriptorProto, name: str, path: tuple[int, ...]
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    if message.options.map_entry:
        return
    yield "message", name, path
    for index, field in enumerate(message.field):
        yield "field", f"{name}.{field.name}", (*path, 2, index)
    for index, inner in enumerate(message.nested_type):
        yield from _in_message(inner, f"{name}.{inner.name}", (*path, 3, index))
    for index, enum in enumerate(message.enum_type):
        yield from _in_enum(enum, f"{name}.{enum.name}", (*path, 4, index))


def _in_enum(
    enum: pb.EnumDescriptorProto, name: str, path: tuple[int, ...]
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    yield "enum", name, path
    for index, value in enumerate(enum.value):
        yield "value", f"{name}.{value.name}", (*path, 2, index)


def documented() -> Iterator[Documented]:
    for file in sources():
        comments = {tuple(place.path): place.leading_comments.strip() for place in file.source_code_info.location}
        elements: list[tuple[str, str, tuple[int, ...]]] = []
        for index, message in enumerate(file.message_type):
            elements += _in_message(message, f"{file.package}.{message.name}", (4, index))
        for index, enum in enumerate(file.enum_type):
            elements += _in_enum(enum, f"{file.package}.{enum.name}", (5, index))
        for index, service in enumerate(file.service):
            name = f"{file.package}.{service.name}"
            elements.append(("service", name, (6, index)))
            elements += [
                ("method", f"{name}.{method.name}", (6, index, 2, number))
                for number, method in enumerate(service.method)
            ]
        for kind, name, path in elements:
            yield Documented(kind, name, comments.get(path, ""))

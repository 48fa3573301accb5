"""Where a call goes: from the method's path and one string of its first message to a node and a service.

The table is built from descriptors once, at start. A method that is not in it is not known to this release, and
refused:
a gateway older than a node cannot judge what such a method needs.
"""

from __future__ import annotations

import enum
import importlib
import pkgutil
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from google.longrunning import operations_pb2

import virtfleet.common.v1
import virtfleet.compute.v1
import virtfleet.fleet.v1
import virtfleet.network.v1
import virtfleet.storage.v1
from virtfleet.type.v1 import method_pb2
from virtfleet_gateway import wire
from virtfleet_service.errors import DocumentInvalid, FieldConflict, FieldRequired, NameMalformed
from virtfleet_service.methods import OPERATION_SERVICES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from google.protobuf.descriptor import Descriptor, FileDescriptor, MethodDescriptor

SERVICES: Final = ("compute", "network", "storage")
"""The services of a node, sorted; each is the package `virtfleet.{service}.v1` too."""

ANY_NODE: Final = "-"
NODE_METADATA: Final = "x-virtfleet-node"
NAME_LIMIT_CHARACTERS: Final = 1024

_ID = re.compile(r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?")
_ROUTING_FIELDS = ("name", "parent")
_CHUNK = "virtfleet.type.v1.DataChunk"
_FLAG = (96, 0)
"""Number and wire type of `allow_missing` in every request that has it."""


class Destination(enum.Enum):
    """Says who answers a method."""

    NODE = enum.auto()
    """A service of the node in the name; the package says which."""
    SERVICE = enum.auto()
    """The process in the name: `nodes/{node}/services/{service}/…`, or the gateway for all other names."""
    GATEWAY = enum.auto()
    """The gateway."""


@dataclass(frozen=True, slots=True)
class Route:
    """Is what the gateway must know of a method."""

    path: str
    """As it stands in the HTTP/2 request: `/virtfleet.compute.v1.DomainService/GetDomain`."""
    full_name: str
    destination: Destination
    service: str
    """Of the node, for `Destination.NODE`; empty otherwise."""
    field_path: tuple[int, ...]
    """Where the routing string stands in the first request message."""
    field_name: str
    """The same for people: `domain.name`."""
    client_streaming: bool
    server_streaming: bool
    permission: str
    checks_name: bool
    """Whether its name says what it is about; that of an operation does not, and the node judges by its target."""
    mutates: bool
    creates_domains: bool
    """Whether a cordoned node refuses it."""
    applies_domains: bool
    """Whether it may create the domain that it names (`allow_missing`), which a cordoned node refuses."""
    lists_processes: bool
    """Whether its name may have `-` in the place of a node or service: `nodes/-/services/-`."""
    bulk: bool
    """Whether it carries volume data, which must not share a connection with watches and quick calls."""
    descriptor: MethodDescriptor


@dataclass(frozen=True, slots=True)
class Target:
    """Is where one call goes: a service of a node. The node `-` means all of them, the node `` the gateway itself."""

    node: str
    service: str


OWN: Final = Target("", "")


def _files() -> Iterable[FileDescriptor]:
    for package in (
        virtfleet.compute.v1,
        virtfleet.storage.v1,
        virtfleet.network.v1,
        virtfleet.common.v1,
        virtfleet.fleet.v1,
    ):
        for module in sorted(module.name for module in pkgutil.iter_modules(package.__path__)):
            if module.endswith("_pb2"):
                yield importlib.import_module(f"{package.__name__}.{module}").DESCRIPTOR
    yield operations_pb2.DESCRIPTOR


def routing_field(request: Descriptor) -> tuple[tuple[int, ...], str]:
    """Return the path of the routing string as numbers and as text.

    Raises:
        ValueError: The message has none; such a method must not be in the API.
    """
    if request.full_name == "google.longrunning.ListOperationsRequest":
        # Its field 1 is the filter: routing on that would let a caller choose the node by a filter text.
        return (request.fields_by_name["name"].number,), "name"
    first = request.fields_by_number.get(1)
    if first is not None and first.containing_oneof is not None:
        raise ValueError(f"{request.full_name}: a member of a oneof does not route: a later member takes it back")
    if (
        first is not None
        and first.type == first.TYPE_STRING
        and first.name in _ROUTING_FIELDS
        and not first.is_repeated
    ):
        return (1,), first.name
    if first is not None and first.type == first.TYPE_MESSAGE and not first.is_repeated:
        resource = cast("Descriptor", first.message_type)
        inner = resource.fields_by_number.get(1)
        if inner is not None and inner.type == inner.TYPE_STRING and inner.name == "name":
            return (1, 1), f"{first.name}.name"
    raise ValueError(f"{request.full_name} has no routing field")


def _carries_chunks(message: Descriptor, depth: int = 2) -> bool:
    for field in message.fields:
        if field.message_type is not None and (
            field.message_type.full_name == _CHUNK or (depth > 0 and _carries_chunks(field.message_type, depth - 1))
        ):
            return True
    return False


def _route(package: str, method: MethodDescriptor) -> Route:
    rule = method.GetOptions().Extensions[method_pb2.method]
    part = package.split(".")[1]
    if part in SERVICES:
        destination = Destination.NODE
    elif package == "virtfleet.fleet.v1":
        destination = Destination.GATEWAY
    else:
        destination = Destination.SERVICE
    field_path, field_name = routing_field(method.input_type)
    return Route(
        path=f"/{method.containing_service.full_name}/{method.name}",
        full_name=method.full_name,
        destination=destination,
        service=part if destination is Destination.NODE else "",
        field_path=field_path,
        field_name=field_name,
        client_streaming=method.client_streaming,
        server_streaming=method.server_streaming,
        permission=rule.permission or _FOREIGN_PERMISSIONS.get(method.full_name, ""),
        checks_name=method.containing_service.full_name not in OPERATION_SERVICES,
        mutates=rule.effect not in (method_pb2.EFFECT_NONE, method_pb2.EFFECT_UNSPECIFIED)
        or method.full_name in _FOREIGN_MUTATIONS,
        lists_processes=method.full_name == f"{_OPERATIONS}ListOperations",
        creates_domains=method.name in ("CreateDomain", "BatchCreateDomains") and part == "compute",
        applies_domains=method.full_name == "virtfleet.compute.v1.DomainService.UpdateDomain",
        bulk=(method.client_streaming or method.server_streaming)
        and (_carries_chunks(method.input_type) or _carries_chunks(method.output_type)),
        descriptor=method,
    )


_OPERATIONS: Final = "google.longrunning.Operations."
_FOREIGN_PERMISSIONS: Final = {
    f"{_OPERATIONS}GetOperation": "operations.get",
    f"{_OPERATIONS}ListOperations": "operations.list",
    f"{_OPERATIONS}WaitOperation": "operations.get",
    f"{_OPERATIONS}CancelOperation": "operations.cancel",
    f"{_OPERATIONS}DeleteOperation": "operations.delete",
}
_FOREIGN_MUTATIONS: Final = frozenset({f"{_OPERATIONS}CancelOperation", f"{_OPERATIONS}DeleteOperation"})


def build_table() -> Mapping[str, Route]:
    """Return the route of every method that this release knows, by path. `virtfleet.node.v1` is not among them."""
    routes = (
        _route(file.package, method)
        for file in _files()
        for service in file.services_by_name.values()
        for method in service.methods
    )
    return {route.path: route for route in routes}


def is_id(text: str) -> bool:
    """Tell whether a text has the form of an id."""
    return _ID.fullmatch(text) is not None


def routing_name(route: Route, message: bytes) -> str:
    """Return the string that decides where a call goes.

    Raises:
        NameMalformed: It occurs twice, is not UTF-8 or too long.
        DocumentInvalid: The message does not parse on the way to it.
    """
    try:
        name = wire.string_at(message, route.field_path)
    except wire.FieldTwiceError as error:
        raise NameMalformed(
            f"{route.field_name} occurs more than once in the request: which node is meant cannot be told",
            field=route.field_name,
        ) from error
    except wire.NoTextError as error:
        raise NameMalformed(f"{route.field_name} is not UTF-8", field=route.field_name) from error
    except wire.WireError as error:
        # As the node would say it.
        type_ = route.descriptor.input_type.full_name
        raise DocumentInvalid(f"The request is no valid message of type {type_}: {error}", type=type_) from error
    if len(name) > NAME_LIMIT_CHARACTERS:
        raise NameMalformed(
            f"{route.field_name} has more than {NAME_LIMIT_CHARACTERS} characters", field=route.field_name
        )
    return name


def allows_missing(message: bytes) -> bool:
    """Tell whether a request has `allow_missing`; not if it does not parse, which its node will say."""
    try:
        flags = [start for number, kind, start, _ in wire.fields(message) if (number, kind) == _FLAG]
        return bool(flags and wire.read_varint(message, flags[-1]))
    except wire.WireError:
        return False


def target_of(route: Route, name: str, stated: str | None = None) -> Target:
    """Return where a call goes.

    Args:
        route: Of the method.
        name: The routing string.
        stated: The metadata `x-virtfleet-node`, if the call has it: `n1` or `n1/compute`.

    Raises:
        FieldRequired: The name is empty.
        NameMalformed: The name, or the metadata, does not have the form that the method demands.
        FieldConflict: The metadata names another node or service than the name does.
    """
    if route.destination is Destination.GATEWAY:
        target = OWN
    elif route.destination is Destination.NODE:
        parts = name.split("/", 2)
        if len(parts) < 2 or parts[0] != "nodes" or not (parts[1] == ANY_NODE or is_id(parts[1])):
            raise _malformed(route, name, "nodes/{node}/…")
        target = Target(parts[1], route.service)
    else:
        target = _process_in(route, name)
    if stated is None:
        return target
    return _reconcile(route, target, name, stated)


def _process_in(route: Route, name: str) -> Target:
    parts = name.split("/", 4)
    if parts[0] != "nodes":
        return OWN
    if len(parts) < 4 or parts[2] != "services":
        raise _malformed(route, name, "nodes/{node}/services/{service}/…")
    any_node, any_service = parts[1] == ANY_NODE, parts[3] == ANY_NODE
    if not (any_node or is_id(parts[1])) or not (any_service or parts[3] in SERVICES):
        raise _malformed(route, name, "nodes/{node}/services/{compute|storage|network}/…")
    if any_node or any_service:
        if not route.lists_processes:
            raise NameMalformed(
                f"{route.full_name.rpartition('.')[2]} is a call to one process; `-` is for lists",
                field=route.field_name,
                name=name,
            )
        # Several processes: the gateway asks them.
        return Target(ANY_NODE, parts[3])
    return Target(parts[1], parts[3])


def parse_stated(stated: str) -> Target:
    """Read the metadata `x-virtfleet-node`; the service is empty where only the node is named.

    Raises:
        NameMalformed: It is neither `{node}` nor `{node}/{service}`.
    """
    node, _, service = stated.partition("/")
    if not is_id(node) or (service and service not in SERVICES) or ("/" in stated and not service):
        raise NameMalformed(
            f"The metadata {NODE_METADATA} must be a node, or a node and compute, storage or network: n1, n1/compute",
            value=stated,
        )
    return Target(node, service)


def _reconcile(route: Route, target: Target, name: str, stated: str) -> Target:
    wanted = parse_stated(stated)
    if target is OWN and not name and route.destination is Destination.SERVICE and wanted.service:
        # An empty name means the process that is called, and the caller says in its metadata which one that is.
        return wanted
    if wanted.node != target.node or (wanted.service and wanted.service != target.service):
        raise FieldConflict(
            f"The metadata {NODE_METADATA} says {stated}, and {route.field_name} says {name or 'the gateway'}",
            field=route.field_name,
            stated=stated,
            name=name,
        )
    return target


def _malformed(route: Route, name: str, form: str) -> NameMalformed | FieldRequired:
    if not name:
        return FieldRequired(f"{route.field_name} is empty; it must have the form {form}", field=route.field_name)
    return NameMalformed(f"{route.field_name} must have the form {form}: {name}", field=route.field_name, name=name)

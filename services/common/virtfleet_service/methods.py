"""What a server must know of a method before it can serve it, read once from the descriptors.

The routing field, the permission, which fields refer to other resources, and whether anything is changed are facts of
the protos; nothing here is repeated by hand but the rules of foreign services, whose protos are not ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from google.api import field_behavior_pb2, resource_pb2
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor

from virtfleet.type.v1 import method_pb2
from virtfleet_service import messages, names

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from google.protobuf.message import Message

OPERATION: Final = "google.longrunning.Operation"
_ANY_TYPE: Final = "*"

# Extensions, whose stubs differ between the generators of these modules.
_RULE: Final[Any] = method_pb2.method
_RESOURCE: Final[Any] = resource_pb2.resource
_REFERENCE: Final[Any] = resource_pb2.resource_reference
_BEHAVIOR: Final[Any] = field_behavior_pb2.field_behavior

NONE: Final = method_pb2.EFFECT_NONE
RECORD: Final = method_pb2.EFFECT_RECORD
BACKEND: Final = method_pb2.EFFECT_BACKEND


def _rule(permission: str, effect: method_pb2.Effect.ValueType = NONE) -> method_pb2.MethodRule:
    return method_pb2.MethodRule(permission=permission, effect=effect)


FOREIGN_RULES: Final[Mapping[str, method_pb2.MethodRule]] = {
    "google.longrunning.Operations.ListOperations": _rule("operations.list"),
    "google.longrunning.Operations.GetOperation": _rule("operations.get"),
    "google.longrunning.Operations.WaitOperation": _rule("operations.get"),
    "google.longrunning.Operations.CancelOperation": _rule("operations.cancel", RECORD),
    "google.longrunning.Operations.DeleteOperation": _rule("operations.delete", RECORD),
    "grpc.health.v1.Health.Check": _rule(""),
    "grpc.health.v1.Health.List": _rule(""),
    "grpc.health.v1.Health.Watch": _rule(""),
    "grpc.reflection.v1.ServerReflection.ServerReflectionInfo": _rule(""),
    "grpc.reflection.v1alpha.ServerReflection.ServerReflectionInfo": _rule(""),
    **{
        f"grpc.channelz.v1.Channelz.{name}": _rule("channelz.get")
        for name in (
            "GetTopChannels",
            "GetServers",
            "GetServer",
            "GetServerSockets",
            "GetChannel",
            "GetSubchannel",
            "GetSocket",
        )
    },
}
"""The rules of services whose protos carry no option of ours."""

KNOWN_TEMPLATES: Final[Mapping[str, str]] = {
    "virtfleet.dev/Node": "nodes/{node}",
    "virtfleet.dev/Host": "nodes/{node}/host",
    "virtfleet.dev/Driver": "nodes/{node}/drivers/{driver}",
    "virtfleet.dev/Domain": "nodes/{node}/domains/{domain}",
    "virtfleet.dev/Pool": "nodes/{node}/pools/{pool}",
    "virtfleet.dev/Volume": "nodes/{node}/pools/{pool}/volumes/{volume}",
    "virtfleet.dev/Secret": "nodes/{node}/secrets/{secret}",
    "virtfleet.dev/Network": "nodes/{node}/networks/{network}",
    "virtfleet.dev/Port": "nodes/{node}/networks/{network}/ports/{port}",
}
"""Types that a package refers to without importing the one that defines them, which would cost memory."""

# The names of operations say nothing about what they touch: the caller's right is that on the operation's target, which
# the operations service knows and checks.
OPERATION_SERVICES: Final = ("google.longrunning.Operations", "virtfleet.common.v1.OperationService")


class RuleMissingError(Exception):
    """A method carries no rule, so that nobody knows who may call it."""


class Reference(NamedTuple):
    """Is a field that names another resource.

    Attributes:
        collection: The collection of that resource; empty: of any kind.
        pattern: The form of its full name.
        relative_pattern: The form of its node-relative name.
        template: Both, for people.
    """

    collection: str
    pattern: re.Pattern[str] | None
    relative_pattern: re.Pattern[str] | None
    template: str


class FoundReference(NamedTuple):
    """Is a reference in one request."""

    path: str
    value: str
    facts: Reference


class ReferenceWalk:
    """Finds the references in messages of one type; made once, asked often."""

    __slots__ = ("leaves", "parts")

    def __init__(self) -> None:
        self.leaves: list[tuple[str, str, Reference]] = []
        self.parts: list[tuple[str, str, ReferenceWalk]] = []

    def __bool__(self) -> bool:
        return bool(self.leaves or self.parts)

    def find(self, message: Message, prefix: str = "") -> Iterator[FoundReference]:
        """Yield each reference that is set, with the path of its field."""
        for name, kind, facts in self.leaves:
            for path, value in messages.elements(message, name, kind, prefix):
                # An element of a list that is empty names nothing and is refused; a field that is unset does not exist.
                if value or kind != messages.ONE:
                    yield FoundReference(path, value, facts)
        for path, element, walk in messages.inside(message, self.parts, prefix):
            yield from walk.find(element, path)


class Item(NamedTuple):
    """Is a repeated field of a batch request whose elements create resources, each with parent and id."""

    field: str
    id_field: str


@dataclass(frozen=True, slots=True)
class MethodFacts:
    """Is all that a server knows of a method.

    Attributes:
        full_name: `virtfleet.compute.v1.DomainService.GetDomain`.
        path: `/virtfleet.compute.v1.DomainService/GetDomain`.
        service: `virtfleet.compute.v1.DomainService`.
        name: `GetDomain`.
        handler: The name of the Python method that serves it: `get_domain`.
        permission: `noun.verb`; empty: any authenticated caller.
        effect: The number of `virtfleet.type.v1.Effect`.
        mutation: Whether it changes anything.
        anonymous: Whether it answers callers without a certificate, on the enrolment port.
        gateway_only: Whether nodes do not serve it.
        is_operation: Whether it answers with an Operation.
        request_class: The message class of the request.
        response_class: The message class of the answer.
        client_streaming: Whether the client sends a stream.
        server_streaming: Whether the server sends a stream.
        routing: The attribute path of the routing field; empty: none.
        routing_required: Whether that field must be set.
        is_parent: Whether it names the parent of what the call is about.
        finds: Whether it reads one resource, whose name may be told otherwise than it is (by uid, `-` as node): the
            handler judges what it finds.
        id_field: The field that holds the id of a resource to be made; empty: none.
        patterns: The forms of the name in the routing field; empty: any name.
        template: The same for people.
        references: Finds references in the request.
        items: The elements of a batch that create resources.
        checks_names: Whether the permission is checked on the name in the routing field; else the handler does it.
        has_request_id: Whether the request has a request_id.
    """

    full_name: str
    path: str
    service: str
    name: str
    handler: str
    permission: str
    effect: int
    mutation: bool
    anonymous: bool
    gateway_only: bool
    is_operation: bool
    request_class: type[Message]
    response_class: type[Message]
    client_streaming: bool
    server_streaming: bool
    routing: tuple[str, ...]
    routing_required: bool
    is_parent: bool
    finds: bool
    id_field: str
    patterns: tuple[re.Pattern[str], ...]
    template: str
    references: ReferenceWalk
    items: tuple[Item, ...]
    checks_names: bool
    has_request_id: bool

    @property
    def noun(self) -> str:
        """The collection that the permission is about."""
        return self.permission.partition(".")[0]

    @property
    def streaming(self) -> bool:
        """Whether either side sends a stream."""
        return self.client_streaming or self.server_streaming

    def routing_name(self, request: Message) -> str:
        """Return the value of the routing field; empty: it is unset, or there is none."""
        value: Any = request
        for part in self.routing:
            value = getattr(value, part)
        return value if isinstance(value, str) else ""


def snake(name: str) -> str:
    """Return the snake case of a method name: `GetDomain` is `get_domain`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _is_string(field: FieldDescriptor) -> bool:
    return field.cpp_type == FieldDescriptor.CPPTYPE_STRING and field.type == FieldDescriptor.TYPE_STRING


def routing_of(request: Descriptor) -> tuple[str, ...]:
    """Return the attribute path of the routing field: field 1, or for foreign requests the field that is called so."""
    first = request.fields_by_number.get(1)
    if first is not None and not first.is_repeated:
        if _is_string(first) and first.name in ("name", "parent"):
            return (first.name,)
        if first.message_type is not None:
            inner = first.message_type.fields_by_number.get(1)
            if inner is not None and inner.name == "name" and _is_string(inner):
                return (first.name, "name")
    for name in ("name", "parent"):
        field = request.fields_by_name.get(name)
        if field is not None and _is_string(field) and not field.is_repeated:
            return (name,)
    return ()


def routing_number(request: Descriptor) -> tuple[int, ...]:
    """Return the field numbers that lead to the routing field, for scans of bytes; empty: there is none."""
    numbers: list[int] = []
    where = request
    for part in routing_of(request):
        field = where.fields_by_name[part]
        numbers.append(field.number)
        where = cast("Descriptor", field.message_type)
    return tuple(numbers)


def _templates(type_: str, near: Descriptor) -> tuple[str, ...]:
    known = KNOWN_TEMPLATES.get(type_)
    if known is not None:
        return (known,)
    for message in near.file.message_types_by_name.values():
        options = message.GetOptions().Extensions[_RESOURCE]
        if options.type == type_:
            return tuple(options.pattern)
    for dependency in near.file.dependencies:
        for message in dependency.message_types_by_name.values():
            options = message.GetOptions().Extensions[_RESOURCE]
            if options.type == type_:
                return tuple(options.pattern)
    return ()


def _collection(type_: str, templates: tuple[str, ...]) -> str:
    if type_ == _ANY_TYPE:
        return ""
    if templates:
        parts = templates[0].split("/")
        return parts[-2] if parts[-1].startswith("{") else parts[-1]
    kind = type_.rpartition("/")[2]
    return kind[:1].lower() + kind[1:] + "s"


def _reference(field: FieldDescriptor) -> Reference | None:
    options = field.GetOptions().Extensions[_REFERENCE]
    if not options.type:
        # With a child_type alone it is a parent: judged with the permission of the method, on what is below it.
        return None
    near = cast("Descriptor", field.containing_type)
    templates = _templates(options.type, near)
    collection = _collection(options.type, templates)
    if not templates:
        return Reference(collection, None, None, "")
    full = templates[0]
    # What a batch or a list of counters is asked for has full names, as its answer has them; specs are node-relative.
    inner = full if field.name == "names" else full.removeprefix("nodes/{node}/")
    return Reference(
        collection,
        names.pattern_of(full, uid=True, wildcard=False),
        names.pattern_of(inner, uid=True, wildcard=False) if inner != full else None,
        inner,
    )


def _is_output(field: FieldDescriptor) -> bool:
    return field_behavior_pb2.OUTPUT_ONLY in field.GetOptions().Extensions[_BEHAVIOR]


_WALKS: dict[str, ReferenceWalk] = {}


def reference_walk(message: Descriptor) -> ReferenceWalk:
    """Return the walk that finds references in messages of a type; those in what only servers set are none."""
    known = _WALKS.get(message.full_name)
    if known is not None:
        return known
    # Registered before it is filled, so that a type may contain itself.
    walk = _WALKS[message.full_name] = ReferenceWalk()
    for field in message.fields:
        if _is_output(field):
            continue
        kind, leaf = messages.shape(field)
        if leaf.message_type is not None:
            if _reaches_reference(leaf.message_type, set()):
                walk.parts.append((field.name, kind, reference_walk(leaf.message_type)))
        elif _is_string(leaf):
            # The annotation of a map stands at the map, not at its values.
            reference = _reference(field)
            if reference is not None:
                walk.leaves.append((field.name, kind, reference))
    return walk


def _reaches_reference(message: Descriptor, seen: set[str]) -> bool:
    if message.full_name in seen:
        return False
    seen.add(message.full_name)
    for field in message.fields:
        if _is_output(field):
            continue
        _, leaf = messages.shape(field)
        if leaf.message_type is not None:
            if _reaches_reference(leaf.message_type, seen):
                return True
        elif _is_string(leaf) and _reference(field) is not None:
            return True
    return False


def _without(walk: ReferenceWalk, routing: tuple[str, ...]) -> ReferenceWalk:
    """Leave the routing field itself out: it is authorised with the method's own permission."""
    if len(routing) != 1:
        return walk
    rest = ReferenceWalk()
    rest.leaves = [leaf for leaf in walk.leaves if leaf[0] != routing[0]]
    rest.parts = walk.parts
    return rest


def _routing_templates(request: Descriptor, routing: tuple[str, ...]) -> tuple[str, ...]:
    if not routing:
        return ()
    field = request.fields_by_name[routing[0]]
    if len(routing) == 2:
        message = cast("Descriptor", field.message_type)
        return tuple(message.GetOptions().Extensions[_RESOURCE].pattern)
    options = field.GetOptions().Extensions[_REFERENCE]
    if options.type and options.type != _ANY_TYPE:
        return _templates(options.type, request)
    if options.child_type:
        parents = (names.parent_of(template) for template in _templates(options.child_type, request))
        return tuple(parent for parent in parents if parent)
    return ()


def _id_field(method: MethodDescriptor) -> str:
    field = method.input_type.fields_by_number.get(3)
    if method.name.startswith("Create") and field is not None and field.name.endswith("_id") and _is_string(field):
        return field.name
    return ""


def _items(method: MethodDescriptor) -> tuple[Item, ...]:
    if not method.name.startswith("Batch"):
        return ()
    found = []
    for field in method.input_type.fields:
        inner = field.message_type
        if not field.is_repeated or inner is None or "parent" not in inner.fields_by_name:
            continue
        id_ = inner.fields_by_number.get(3)
        found.append(Item(field.name, id_.name if id_ is not None and id_.name.endswith("_id") else ""))
    return tuple(found)


def facts_of(method: MethodDescriptor, rules: Mapping[str, method_pb2.MethodRule] = FOREIGN_RULES) -> MethodFacts:
    """Read the facts of a method.

    Args:
        method: The method.
        rules: The rules of methods whose protos are not ours, by full name.

    Raises:
        RuleMissingError: Neither its proto nor the table has a rule for it.
    """
    if rules is not FOREIGN_RULES:
        return _read_facts(method, rules)
    # They never change, and many servers in one process ask for the same ones.
    found = _FACTS.get(method.full_name)
    if found is None:
        found = _FACTS[method.full_name] = _read_facts(method, rules)
    return found


_FACTS: Final[dict[str, MethodFacts]] = {}


def _read_facts(method: MethodDescriptor, rules: Mapping[str, method_pb2.MethodRule]) -> MethodFacts:
    rule = method.GetOptions().Extensions[_RULE]
    if rule.effect == method_pb2.EFFECT_UNSPECIFIED:
        foreign = rules.get(method.full_name)
        if foreign is None:
            raise RuleMissingError(f"{method.full_name} has no rule")
        rule = foreign
    service = method.containing_service
    ours = service.full_name.startswith("virtfleet.") and not service.full_name.startswith("virtfleet.common.")
    request = method.input_type
    routing = routing_of(request)
    templates = _routing_templates(request, routing)
    mutation = rule.effect != NONE
    uid = method.name.startswith("Get")
    patterns = tuple(names.pattern_of(template, uid=uid, wildcard=not mutation) for template in templates)
    return MethodFacts(
        full_name=method.full_name,
        path=f"/{service.full_name}/{method.name}",
        service=service.full_name,
        name=method.name,
        handler=snake(method.name),
        permission=rule.permission,
        effect=rule.effect,
        mutation=mutation,
        anonymous=rule.anonymous,
        gateway_only=rule.gateway_only,
        is_operation=method.output_type.full_name == OPERATION and ours,
        request_class=message_factory.GetMessageClass(request),
        response_class=message_factory.GetMessageClass(method.output_type),
        client_streaming=method.client_streaming,
        server_streaming=method.server_streaming,
        routing=routing,
        routing_required=ours and bool(routing) and not rule.gateway_only,
        is_parent=routing[-1:] == ("parent",),
        finds=uid and routing == ("name",) and bool(templates),
        id_field=_id_field(method),
        patterns=patterns,
        template=" or ".join(templates),
        references=_without(reference_walk(request), routing),
        items=_items(method),
        checks_names=service.full_name not in OPERATION_SERVICES,
        has_request_id="request_id" in request.fields_by_name,
    )

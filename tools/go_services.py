"""The text of `services.go` and `reasons.go` of the Go module, from the descriptors and from the tree of errors.

A method that answers with an operation becomes one that returns `*Operation` of its result's type, and each list gets
an iterator over all of its pages; everything else is the stub's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from google.longrunning import operations_pb2
from google.protobuf import descriptor_pb2

from virtfleet.type.v1 import method_pb2
from virtfleet_service.errors import VirtfleetError

HEADER = "// Code generated from the protos by tools/go_services.py. DO NOT EDIT.\n\npackage virtfleet\n\n"
# Where the rule (the stem in the plural) says nothing; all clients use these names.
FIELDS = {
    "Access": "Access",
    "Admin": "Servers",
    "Enrollment": "Enrollment",
    "Operation": "OperationWatches",
    "Stats": "Stats",
}
# Every package has one of these.
SHARED = {"Watch"}
# Steers a fake fleet in tests; no part of a fleet.
LEFT_OUT = {"virtfleet.fake.v1"}


@dataclass(frozen=True)
class Service:
    """One service with the names that Go knows it by."""

    file: descriptor_pb2.FileDescriptorProto
    index: int
    prefix: str

    @property
    def descriptor(self) -> descriptor_pb2.ServiceDescriptorProto:
        """Its descriptor."""
        return self.file.service[self.index]

    @property
    def stem(self) -> str:
        """Its name without `Service`, with its package where several packages have one of that name."""
        return self.prefix + self.descriptor.name.removesuffix("Service")

    @property
    def type(self) -> str:
        """The name of its Go type."""
        return f"{self.stem}Service"

    @property
    def field(self) -> str:
        """The name by which a client has it."""
        if self.stem in FIELDS:
            return FIELDS[self.stem]
        if self.descriptor.name.removesuffix("Service") in SHARED:
            return self.stem
        return f"{self.stem[:-1]}ies" if self.stem.endswith("y") else f"{self.stem}s"

    @property
    def alias(self) -> str:
        """The name of its Go package."""
        return self.file.options.go_package.partition(";")[2]

    def comment(self, *path: int) -> str:
        """Return the comment of an element of the service, as one text."""
        wanted = [6, self.index, *path]
        found = [entry.leading_comments for entry in self.file.source_code_info.location if list(entry.path) == wanted]
        return "\n".join(line.strip() for line in "".join(found).strip().splitlines())


def all_services(files: Iterable[descriptor_pb2.FileDescriptorProto]) -> list[Service]:
    """List the services that clients have, by the names that they have them by."""
    found: list[Service] = []
    taken: set[str] = set()
    kept = [file for file in files if file.package not in LEFT_OUT]
    # Compute first: where two packages have a service of one name, the other's carries its package.
    for file in sorted(kept, key=lambda file: (file.package != "virtfleet.compute.v1", file.package, file.name)):
        for index, descriptor in enumerate(file.service):
            stem = descriptor.name.removesuffix("Service")
            prefix = file.package.split(".")[1].capitalize() if stem in SHARED or stem in taken else ""
            taken.add(stem)
            found.append(Service(file, index, prefix))
    return sorted(found, key=lambda service: service.field)


def services(files: Iterable[descriptor_pb2.FileDescriptorProto]) -> str:
    """Return the text of `services.go`."""
    files = list(files)
    types = _go_types(files)
    found = all_services(files)
    body = list(_struct(found))
    for service in found:
        body += _service(service, types)
    text = "\n".join(body)
    packages = {file.options.go_package.partition(";")[::2] for file in files}
    imports = [f'{alias} "{path}"' for path, alias in sorted(packages) if f"{alias}." in text]
    standard = (
        '"context"\n"iter"\n\n"cloud.google.com/go/longrunning/autogen/longrunningpb"\n"google.golang.org/grpc"\n'
    )
    standard += '"google.golang.org/protobuf/types/known/emptypb"\n'
    return f"{HEADER}import (\n{standard}\n{chr(10).join(imports)}\n)\n\n{text}"


def _go_types(files: Iterable[descriptor_pb2.FileDescriptorProto]) -> dict[str, str]:
    types = {".google.protobuf.Empty": "*emptypb.Empty", ".google.longrunning.Operation": "*longrunningpb.Operation"}
    for file in files:
        alias = file.options.go_package.partition(";")[2]
        types |= {f".{file.package}.{message.name}": f"*{alias}.{message.name}" for message in file.message_type}
    return types


def _struct(found: list[Service]) -> Iterator[str]:
    yield "// Services holds one client for each service of the API, all on one connection."
    yield "type Services struct {"
    for service in found:
        yield f"// {service.field} is {service.file.package}.{service.descriptor.name}."
        yield f"{service.field} {service.type}"
    yield "// Operations is google.longrunning.Operations. Operation is what most programs want instead."
    yield "Operations longrunningpb.OperationsClient"
    yield "}\n"
    yield "func newServices(c *Client) Services {"
    yield "return Services{"
    for service in found:
        stub = f"{service.alias}.New{service.descriptor.name}Client(c.conn)"
        yield f"{service.field}: {service.type}{{{service.descriptor.name}Client: {stub}, client: c}},"
    yield "Operations: longrunningpb.NewOperationsClient(c.conn),"
    yield "}\n}\n"


def _service(service: Service, types: dict[str, str]) -> Iterator[str]:
    name = service.descriptor.name
    yield _comment(f"{service.type} is {service.file.package}.{name}. {service.comment()}")
    yield f"type {service.type} struct {{\n{service.alias}.{name}Client\nclient *Client\n}}\n"
    messages = {message.name: message for message in service.file.message_type}
    for index, method in enumerate(service.descriptor.method):
        arguments = f"(ctx context.Context, request {types[method.input_type]}, options ...grpc.CallOption)"
        call = f"s.{name}Client.{method.name}(ctx, request, options...)"
        if method.output_type == ".google.longrunning.Operation":
            result = types[result_of(service, method)]
            yield _comment(f"{method.name}: {service.comment(2, index)}")
            yield f"func (s {service.type}) {method.name}{arguments} (*Operation[{result}], error) {{"
            yield f"operation, err := {call}"
            yield f"return started[{result}](s.client, operation, err)\n}}\n"
        answer = messages.get(method.output_type.rpartition(".")[2])
        if method.name.startswith("List") and answer and any(field.name == "next_page_token" for field in answer.field):
            item = next(field for field in answer.field if field.number == 1)
            resource = types[item.type_name]
            many = method.name.removeprefix("List")
            yield _comment(
                f"All{many} yields every item of {method.name}, page by page; request.PageToken is where it begins.\n"
                "The first error is the last that is yielded. The request stays as it is."
            )
            yield f"func (s {service.type}) All{many}{arguments} iter.Seq2[{resource}, error] {{"
            getter = f"{types[method.output_type]}.Get{''.join(part.capitalize() for part in item.name.split('_'))}"
            # Nodes that are away are in the lists of the gateway's own resources all the same.
            whole = "false" if rule_of(method).gateway_only else "true"
            pages = f"s.{name}Client.{method.name}, ({getter.replace('.Get', ').Get')}"
            yield f"return pages(ctx, {whole}, {pages}, request, options...)\n}}\n"
        if method.name.startswith("Watch") and method.server_streaming and not method.client_streaming:
            answer_type = types[method.output_type]
            yield _comment(
                f"Follow{method.name.removeprefix('Watch')} yields the answers of {method.name} for ever, resuming by "
                "token over every break. See [Follow]."
            )
            yield f"func (s {service.type}) Follow{method.name.removeprefix('Watch')}("
            yield f"ctx context.Context, request {types[method.input_type]}, options ...FollowOption,"
            yield f") iter.Seq2[{answer_type}, error] {{"
            yield f"return Follow(ctx, s.{name}Client.{method.name}, request, options...)\n}}\n"


def result_of(service: Service, method: descriptor_pb2.MethodDescriptorProto) -> str:
    """Return the message that the operation of a method ends with, by its full name with a dot before it."""
    extensions: Any = method.options.Extensions  # the annotations know the extension by another class
    kind: str = extensions[operations_pb2.operation_info].response_type
    return f".{kind}" if "." in kind else f".{service.file.package}.{kind}"


def rule_of(method: descriptor_pb2.MethodDescriptorProto) -> method_pb2.MethodRule:
    """Return what a method's annotation says."""
    return method.options.Extensions[method_pb2.method]


def _comment(text: str) -> str:
    return "\n".join(f"// {line}".rstrip() for line in text.strip().splitlines())


def reasons() -> str:
    """Return the text of `reasons.go`."""
    lines, codes = [], []
    for branch in VirtfleetError.__subclasses__():
        lines.append(f"// Reasons of {branch.code.name}.\nconst (")
        for leaf in branch.__subclasses__():
            text = re.sub(r"\s+", " ", (leaf.__doc__ or "").strip().splitlines()[0])
            # Go writes initialisms whole.
            name = "Err" + re.sub(r"(Uid|Id)(?=[A-Z]|$)", lambda found: found[0].upper(), leaf.__name__)
            lines += [f"// {name}: {text[0].lower()}{text[1:]}", f'{name} Reason = "{leaf.reason}"']
            codes.append(f"{name}: codes.{_code(branch.code.name)},")
        lines.append(")\n")
    table = "\n".join(codes)
    lines.append(f"var codesOfReasons = map[Reason]codes.Code{{\n{table}\n}}\n")
    return f'{HEADER}import "google.golang.org/grpc/codes"\n\n' + "\n".join(lines)


def _code(name: str) -> str:
    # Go's gRPC writes one of them the American way.
    return "Canceled" if name == "CANCELLED" else "".join(part.capitalize() for part in name.split("_"))

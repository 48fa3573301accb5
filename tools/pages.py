"""The pages of the documentation that are made: `python -m tools.pages`, a part of `make protos`, writes docs/api.md.

That list of all methods is committed. The others are made for the site, by `make docs`: the reference of all messages
with every comment, rule, permission and error (from the protos), advice per method, the catalogue of reasons, and each
public function of libvirt with its method here. In the repository a link leads to what they are made from.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from buf.validate import validate_pb2
from google.protobuf import descriptor_pb2 as pb

from tools import protos, reference
from tools.paths import ROOT

DOCS = ROOT / "docs"

_FIELD_TYPES = {
    value.number: value.name.removeprefix("TYPE_").lower() for value in pb.FieldDescriptorProto.Type.DESCRIPTOR.values
}


# Reference.


def _comments(file: pb.FileDescriptorProto) -> dict[tuple[int, ...], str]:
    return {tuple(place.path): place.leading_comments.strip() for place in file.source_code_info.location}


def _cell(comment: str) -> str:
    return " ".join(comment.split()).replace("|", "\\|")


def _type(field: pb.FieldDescriptorProto, maps: Mapping[str, pb.DescriptorProto]) -> str:
    entry = maps.get(field.type_name)
    if entry is not None:
        key, value = entry.field
        return f"map of {_FIELD_TYPES[key.type]} to {_type(value, maps)}"
    name = f"`{field.type_name[1:]}`" if field.type_name else _FIELD_TYPES[field.type]
    return f"list of {name}" if field.label == pb.FieldDescriptorProto.LABEL_REPEATED else name


def _messages(
    file: pb.FileDescriptorProto,
    messages: list[tuple[tuple[int, ...], str, pb.DescriptorProto]],
    comments: dict[tuple[int, ...], str],
) -> Iterator[str]:
    for path, name, message in messages:
        if message.options.map_entry:
            continue
        maps = {f".{file.package}.{name}.{one.name}": one for one in message.nested_type if one.options.map_entry}
        yield f"\n### {name}\n\n{comments.get(path, '')}\n"
        if message.field:
            yield "| field | | type | |\n|---|---|---|---|"
        for number, field in enumerate(message.field):
            text = _cell(comments.get((*path, 2, number), ""))
            yield f"| `{field.name}` | {field.number} | {_type(field, maps)} | {text} |"


def _walk(
    path: tuple[int, ...], prefix: str, message: pb.DescriptorProto
) -> Iterator[tuple[tuple[int, ...], str, pb.DescriptorProto]]:
    yield path, prefix + message.name, message
    for index, inner in enumerate(message.nested_type):
        yield from _walk((*path, 3, index), f"{prefix}{message.name}.", inner)


def _file(file: pb.FileDescriptorProto) -> Iterator[str]:
    comments = _comments(file)
    for index, service in enumerate(file.service):
        yield f"\n## {service.name}\n\n{comments.get((6, index), '')}\n"
        for number, method in enumerate(service.method):
            permission, effect = reference.rule(method)
            yield f"\n### {service.name}.{method.name}\n\n{comments.get((6, index, 2, number), '')}\n"
            yield (
                f"`{method.input_type[1:]}` → {'stream of ' if method.server_streaming else ''}"
                f"`{method.output_type[1:]}` · permission `{permission}` · changes: {effect or 'nothing'}\n"
            )
    messages = [one for index, message in enumerate(file.message_type) for one in _walk((4, index), "", message)]
    if messages:
        yield f"\n## Messages of {Path(file.name).name}\n"
        yield from _messages(file, messages, comments)
    for index, enum in enumerate(file.enum_type):
        yield f"\n### {enum.name}\n\n{comments.get((5, index), '')}\n\n| value | | |\n|---|---|---|"
        for number, value in enumerate(enum.value):
            yield f"| `{value.name}` | {value.number} | {_cell(comments.get((5, index, 2, number), ''))} |"


def reference_pages(image: pb.FileDescriptorSet) -> dict[str, str]:
    """Return a page for each package of ours, by its path."""
    packages: dict[str, list[str]] = {}
    for file in sorted(image.file, key=lambda file: (file.package, not file.service, file.name)):
        if not file.package.startswith("virtfleet."):
            continue
        lines = packages.setdefault(file.package, [f"# {file.package}\n"])
        lines += _file(file)
    return {f"reference/{package}.md": "\n".join(lines) + "\n" for package, lines in packages.items()}


# Advice per method.

_ADVICE = """\
# Retry, deadline and paging, method by method

Made from the protos. **Repeat** says what a client may do after UNAVAILABLE, or CANCELLED without a reason: *freely*
(it changes nothing), *with the same request_id* (the repetition has no second effect), *resume by token*, or *no*. Our
clients repeat unary calls so by themselves, and resume watches. **Deadline** is what suits a call through the gateway:
a read answers in milliseconds; an operation answers after at most two seconds, done or not, and is then waited for; a
stream has none. Nothing that changes something is ever to be repeated after DEADLINE_EXCEEDED without the same
request_id. **Pages**: the largest `page_size`; more is refused, 0 leaves it to the server. A page also ends at 1 MiB:
only an empty `next_page_token` says that it was the last.
"""

_ADVICE_TABLE = """\

## {package}

| method | repeat | deadline | pages |
|---|---|---|---|
"""

_DEADLINES = {"U": "5 s", "O": "10 s, then WaitOperation", "S": "none", "C": "none", "B": "none"}

_LONGRUNNING = """\

## google.longrunning

| method | repeat | deadline | pages |
|---|---|---|---|
| Operations.GetOperation | freely | 5 s |  |
| Operations.ListOperations | freely | 5 s | `page_size`; at most 5,000 are given |
| Operations.WaitOperation | freely | its `timeout` and 5 s |  |
| Operations.CancelOperation | no: look whether it was heard | 5 s |  |
| Operations.DeleteOperation | no: look whether it is gone | 5 s |  |
"""


def _page_size_limit(message: pb.DescriptorProto) -> int:
    """Return the largest page that a request may ask for; 0: it has no pages."""
    for field in message.field:
        if field.name == "page_size":
            # Read anew: the image may have been parsed before this extension was known.
            options = pb.FieldOptions.FromString(field.options.SerializeToString())
            return options.Extensions[validate_pb2.field].int32.lte
    return 0


def advice_rows(image: pb.FileDescriptorSet) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield package, method, repetition, deadline and pages of each public method."""
    requests = {f".{file.package}.{message.name}": message for file in image.file for message in file.message_type}
    for file in sorted(image.file, key=lambda file: (file.package, file.name)):
        if not file.package.startswith("virtfleet.") or file.package in ("virtfleet.node.v1", "virtfleet.fake.v1"):
            continue
        for service in file.service:
            for method in service.method:
                request = requests[method.input_type]
                fields = {field.name for field in request.field}
                _, effect = reference.rule(method)
                repeat = (
                    "freely" if effect == "none" else "with the same request_id" if "request_id" in fields else "no"
                )
                if method.server_streaming and method.name.startswith("Watch"):
                    repeat = "resume by token"
                limit = _page_size_limit(request)
                pages = f"`page_size` up to {limit:,}" if limit else ""
                deadline = _DEADLINES[reference.kind(method)]
                yield file.package, f"{service.name}.{method.name}", repeat, deadline, pages


def advice_page(image: pb.FileDescriptorSet) -> str:
    """Return the page with advice for each method."""
    text, before = _ADVICE, ""
    for package, *cells in advice_rows(image):
        if package != before:
            text, before = text + _ADVICE_TABLE.format(package=package), package
        text += f"| {' | '.join(cells)} |\n"
    return text + _LONGRUNNING


# Reasons.


_REASONS = """\
# Reasons of errors

Every error carries one of these in `google.rpc.ErrorInfo.reason` with the domain `virtfleet.dev`, and every variable of
its message in `metadata`. Branch on them, never on the text. `virtfleet explain REASON` shows the same.
"""


def reasons_page() -> str:
    """Return the catalogue of reasons."""
    from virtfleet_client.reasons import catalogue
    from virtfleet_service import errors

    again = {
        "no": "no: the same call fails again",
        "same": "yes, the same call with the same request_id, after the time that RetryInfo says",
        "changed": "after reading again and deciding anew",
    }
    entries = [
        f"\n## {reason.name}\n\n`{errors.BY_REASON[reason.name].code.name}` · {reason.means}\n\n"
        f"**Why.** {reason.cause}\n\n**What to do.** {reason.remedy}\n\n**Call again?** {again[reason.retry]}\n"
        for reason in catalogue().values()
    ]
    return _REASONS + "".join(entries)


# libvirt.


def libvirt_rows() -> list[dict[str, str]]:
    """Return the table of libvirt's public functions."""
    with (DOCS / "data" / "libvirt-api.tsv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def libvirt_state(row: Mapping[str, str], implemented: frozenset[str], messages: Messages) -> str:
    """Say whether what a function does can be done here today: by methods that are there, on fields that are there."""
    if row["service"] in ("none", "client-helper", ""):
        return "not needed"
    methods = re.findall(r"[A-Z]\w+\.[A-Z]\w+", row["rpc"])
    if not methods or any(method not in implemented for method in methods):
        return "planned"
    noun = re.sub(r"^(?:[A-Z][a-z]+)(?=[A-Z])", "", methods[0].partition(".")[2])
    for resource in (noun, noun.removesuffix("s")):
        message = messages.get(resource)
        if message is not None:
            paths = _PATH.findall(row["how"])
            return "yes" if all(_has(messages, message, path.split(".")) for path in paths) else "planned"
    return "yes"


Messages = Mapping[str, pb.DescriptorProto]
"""Messages by their names without a package; a nested one by `Outer.Inner`."""

_PATH = re.compile(r"\b(?:spec|status)(?:\.[a-z][a-z0-9_]*)+")


def messages_of(image: pb.FileDescriptorSet) -> Messages:
    """Return all messages of ours."""
    return {
        name: message
        for file in image.file
        if file.package.startswith("virtfleet.")
        for index, top in enumerate(file.message_type)
        for _, name, message in _walk((4, index), "", top)
    }


def _has(messages: Messages, message: pb.DescriptorProto, path: list[str]) -> bool:
    field = next((one for one in message.field if one.name == path[0]), None)
    if field is None:
        return False
    if len(path) == 1:
        return True
    inner = next((one for one in message.nested_type if field.type_name.endswith(f".{one.name}")), None)
    if inner is not None and inner.options.map_entry:
        field = inner.field[1]
        inner = None
    inner = inner or messages.get(re.sub(r"^\.virtfleet\.\w+\.v\d+\.", "", field.type_name))
    return inner is not None and _has(messages, inner, path[1:])


_FUNCTIONS = """\
# Each function of libvirt

{total} public functions: {yes} can be done today, {planned} are planned, {not_needed} are not needed here (the third
column says why). Made from `docs/data/libvirt-api.tsv` and from what a test has called on a live fleet.

| function | method here | how | today |
|---|---|---|---|"""


def libvirt_page(image: pb.FileDescriptorSet) -> str:
    """Return the page with each function of libvirt."""
    implemented = frozenset(
        line.rpartition("virtfleet.")[2].split(".", 2)[-1].replace("/", ".")
        for line in (ROOT / "protos" / "IMPLEMENTED.txt").read_text().splitlines()
    )
    rows, messages = libvirt_rows(), messages_of(image)
    states = {row["function"]: libvirt_state(row, implemented, messages) for row in rows}
    counts = {state: list(states.values()).count(state) for state in ("yes", "planned", "not needed")}
    lines = [_FUNCTIONS.format(total=len(rows), **{state.replace(" ", "_"): count for state, count in counts.items()})]
    for row in rows:
        how = " · ".join(part for part in (row["how"], row["by_design"]) if part)
        method = f"`{row['rpc']}`" if row["rpc"] else ""
        lines.append(f"| `{row['function']}` | {method} | {_cell(how)} | {states[row['function']]} |")
    return "\n".join(lines) + "\n"


# All of them.


MADE_FROM = {
    "advice.md": "protos/virtfleet/type/v1/method.proto",
    "reasons.md": "clients/python/virtfleet_client/data/reasons.toml",
    "libvirt-functions.md": "docs/data/libvirt-api.tsv",
    **{
        f"reference/virtfleet.{part}.v1.md": f"protos/virtfleet/{part}/v1"
        for part in ("common", "compute", "fake", "fleet", "network", "node", "storage", "type")
    },
}
"""The pages that the site alone has, and what each is made from: a link to that is one to the page, on the site."""


def made_pages(image: pb.FileDescriptorSet) -> dict[str, str]:
    """Return the pages of `MADE_FROM`, by their paths on the site."""
    return {
        **reference_pages(image),
        "advice.md": advice_page(image),
        "reasons.md": reasons_page(),
        "libvirt-functions.md": libvirt_page(image),
    }


def main() -> int:
    """Write docs/api.md, or with --check hold it against the protos; returns the exit code."""
    try:
        text = reference.page(protos.write_image(protos.IMAGE))
    except protos.ProtoError as error:
        print(f"docs: {error}", file=sys.stderr)
        return 1
    page = DOCS / "api.md"
    if page.exists() and page.read_text() == text:
        return 0
    if "--check" in sys.argv[1:]:
        print("docs: api.md is out of date: run `make protos`", file=sys.stderr)
        return 1
    page.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The list of all methods, `docs/api.md`, out of the proto image; tools/pages.py writes it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from google.protobuf import descriptor_pb2 as pb

from virtfleet.type.v1 import method_pb2

_EFFECTS = {
    method_pb2.EFFECT_NONE: "none",
    method_pb2.EFFECT_RECORD: "record",
    method_pb2.EFFECT_BACKEND: "back end",
}
_HEAD = """\
# All methods

Made from the protos by `make protos`; the comments there say more: what each field means, its unit and default, which
errors a method has. Kinds: `U` unary · `O` unary with an operation as its answer · `S` server stream · `C` client
stream · `B` both ways. Permission: `own` needs none beyond a certificate, `nobody's` not even that. Effect: what a call
changes: nothing, a record of ours, or a back end.

An error names the fields at fault (`google.rpc.BadRequest`) by their paths from the request message, as the client sent
it: `domain.spec.disks.root.bus`, `requests[2].name`, also where another service or an item of a batch found the fault.
Keys of maps stand as in update masks, in backquotes where they are no plain word:
``domain.labels.`example.com/team` ``.
"""


def rule(method: pb.MethodDescriptorProto) -> tuple[str, str]:
    """Return permission and effect from the method's option."""
    # Read anew: the image may have been parsed before this extension was known.
    options = pb.MethodOptions.FromString(method.options.SerializeToString())
    found = options.Extensions[method_pb2.method]
    return found.permission or ("nobody's" if found.anonymous else "own"), _EFFECTS.get(found.effect, "")


def kind(method: pb.MethodDescriptorProto) -> str:
    """Return the letter of the method's kind."""
    if method.client_streaming:
        return "B" if method.server_streaming else "C"
    if method.server_streaming:
        return "S"
    return "O" if method.output_type == ".google.longrunning.Operation" else "U"


def first_sentence(comment: str) -> str:
    """Return the first sentence of a comment on one line, fit for a cell of a table."""
    text = " ".join(comment.split())
    found = re.match(r".*?[.:](?= [A-Z]|$)", text)
    return (found[0] if found else text).rstrip(":").replace("|", "\\|")


def _service(file: pb.FileDescriptorProto, index: int, comments: dict[tuple[int, ...], str]) -> Iterator[str]:
    service = file.service[index]
    yield f"\n### {service.name}\n\n{' '.join(comments.get((6, index), '').split())}\n"
    yield "| method | kind | permission | effect | |\n|---|---|---|---|---|"
    for number, method in enumerate(service.method):
        permission, effect = rule(method)
        text = first_sentence(comments.get((6, index, 2, number), ""))
        yield f"| {method.name} | {kind(method)} | {permission} | {effect} | {text} |"


def page(image: pb.FileDescriptorSet) -> str:
    """Return the page for an image."""
    lines = [_HEAD]
    package = ""
    for file in sorted(image.file, key=lambda file: (file.package, file.name)):
        if not file.name.startswith("virtfleet/") or not file.service:
            continue
        comments = {tuple(place.path): place.leading_comments.strip() for place in file.source_code_info.location}
        if file.package != package:
            package = file.package
            lines.append(f"\n## {package}")
        for index in range(len(file.service)):
            lines += _service(file, index, comments)
    return "\n".join(lines) + "\n"

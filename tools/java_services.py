"""The Java client's services and reasons: what is committed of it that the protos and the tree of errors decide.

    python -m tools.java_services generate     replace the files by what the protos and the errors give now
    python -m tools.java_services check        fail if the committed files are not that

Messages and stubs are generated in the Maven build. Over them stands one class a service: a method that answers with an
operation returns an `Operation` of its result's type, a list all of its pages, a watch one that resumes.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

from google.protobuf import descriptor_pb2

from tools import go_services, protos
from tools.paths import ROOT
from virtfleet_service.errors import VirtfleetError

PACKAGE = "dev.virtfleet.client"
FOLDER = ROOT / "clients/java/client/src/main/java/dev/virtfleet/client"
HEADER = "// Code generated from the protos by tools/java_services.py. DO NOT EDIT.\n\n"
COLUMNS = 118
OPERATION = ".google.longrunning.Operation"
PRIVATE = "virtfleet/node/"
EMPTY = ".google.protobuf.Empty"
WRITTEN = re.compile(r"^// Code generated .* by tools/java_services\.py", re.MULTILINE)


def texts(files: Iterable[descriptor_pb2.FileDescriptorProto]) -> dict[str, str]:
    """Return the text of every generated file by its name."""
    public = list(files)
    types = _types(public)
    found = go_services.all_services(public)
    written = {f"{service.type}.java": _class(service, types) for service in found}
    return {**written, "Services.java": _services(found), "Reason.java": _reasons()}


def _types(files: Iterable[descriptor_pb2.FileDescriptorProto]) -> dict[str, str]:
    types = {EMPTY: "com.google.protobuf.Empty", OPERATION: "com.google.longrunning.Operation"}
    for file in files:
        types |= {
            f".{file.package}.{message.name}": f"{file.options.java_package}.{message.name}"
            for message in file.message_type
        }
    return types


def javadoc(text: str, indent: str = "", *tags: str) -> str:
    """Return a comment of Javadoc: the text as prose, then the tags."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("*/", "*&#47;")
    text = re.sub(r"`([^`]*)`", r"{@code \1}", text).replace(" @", " &#64;")
    paragraphs = [""]
    for line in text.strip().splitlines():
        # A line of reasons begins a paragraph; any other goes on with the sentence before it.
        if re.match(r"[A-Z]+_[A-Z_]+\b", line) and paragraphs[-1].endswith("."):
            paragraphs.append("<p>")
        paragraphs[-1] = f"{paragraphs[-1]} {line}".strip().replace("<p> ", "<p>")
    blocks = [textwrap.wrap(paragraph, COLUMNS - len(indent)) for paragraph in paragraphs]
    lines = [line for block in blocks for line in (*block, "")]
    for tag in tags:
        lines += textwrap.wrap(tag, COLUMNS - len(indent), subsequent_indent="    ")
    return "\n".join([f"{indent}/**", *(f"{indent} * {line}".rstrip() for line in _trimmed(lines)), f"{indent} */"])


def _trimmed(lines: list[str]) -> list[str]:
    return lines[:-1] if lines and not lines[-1] else lines


def _class(service: go_services.Service, types: dict[str, str]) -> str:
    name, kind = service.descriptor.name, service.type
    stub = f"{service.file.options.java_package}.{name}Grpc"
    body: list[str] = []
    for index, method in enumerate(service.descriptor.method):
        body += _method(service, index, method, types)
    code = "\n".join(body)
    about = (
        f"Calls {{@code {service.file.package}.{name}}}. {service.comment()}\n"
        "Threads may share it. What narrows a call ({@code withDeadlineAfter} and so on) returns a copy. "
        "No argument and no result is null."
    )
    members = f"""
    {kind}(VirtfleetClient client, Channel channel, CallOptions options) {{
        super(client, channel, options);
    }}

    @Override
    protected {kind} build(Channel channel, CallOptions options) {{
        return new {kind}(client(), channel, options);
    }}

    /** {{@return the generated stub whose calls return futures}} */
    public {name}Grpc.{name}FutureStub futureStub() {{
        return {name}Grpc.newFutureStub(getChannel());
    }}

    /** {{@return the generated stub whose calls are told to observers: for streams of requests}} */
    public {name}Grpc.{name}Stub asyncStub() {{
        return {name}Grpc.newStub(getChannel());
    }}
"""
    wanted = {stub, "io.grpc.CallOptions", "io.grpc.Channel"}
    for full in sorted(set(types.values())):
        simple = full.rpartition(".")[2]
        if full != types[OPERATION] and re.search(rf"\b{simple}\b", _without_comments(code)):
            wanted |= {full} if _mentioned(full, service, types) else set()
    if "Stream<" in code:
        wanted.add("java.util.stream.Stream")
    imports = "\n".join(f"import {one};" for one in sorted(wanted))
    return (
        f"{HEADER}package {PACKAGE};\n\n{imports}\n\n{javadoc(about).replace('{@code {@code', '{@code')}\n"
        f"public final class {kind} extends FleetService<{kind}> {{\n{members}\n{code}}}\n"
    )


def _without_comments(code: str) -> str:
    return re.sub(r"/\*\*.*?\*/", "", code, flags=re.DOTALL)


def _mentioned(full: str, service: go_services.Service, types: dict[str, str]) -> bool:
    """Tell whether a service uses a type of that full name, and not one of the same name in another package."""
    used = set()
    messages = {message.name: message for message in service.file.message_type}
    for method in service.descriptor.method:
        used |= {method.input_type, method.output_type}
        if method.output_type == OPERATION:
            used.add(go_services.result_of(service, method))
        answer = messages.get(method.output_type.rpartition(".")[2])
        used |= {field.type_name for field in answer.field if field.number == 1} if answer else set()
    return full in {types[name] for name in used if name in types}


def _method(
    service: go_services.Service, index: int, method: descriptor_pb2.MethodDescriptorProto, types: dict[str, str]
) -> Iterator[str]:
    if method.client_streaming:
        return  # a stream of requests has no blocking form: asyncStub()
    getter = f"{service.descriptor.name}Grpc.get{method.name}Method()"
    name = method.name[0].lower() + method.name[1:]
    request, answer = types[method.input_type].rpartition(".")[2], types[method.output_type].rpartition(".")[2]
    comment = service.comment(2, index)
    parameter = "@param request what is asked for; it stays as it is"
    failure = "@throws VirtfleetException the call failed"
    messages = {message.name: message for message in service.file.message_type}
    response = messages.get(answer)
    if method.server_streaming and _resumes(messages.get(request)):
        options = "@param options what is told of breaks, and what is done when the history is too short"
        returns = "@return the watch, which goes on over every break until it is closed"
        yield javadoc(comment, "    ", parameter, returns)
        yield f"    public ResourceWatch<{answer}> {name}({request} request) {{"
        yield f"        return {name}(request, WatchOptions.standard());\n    }}\n"
        yield javadoc(comment, "    ", parameter, options, returns)
        yield f"    public ResourceWatch<{answer}> {name}({request} request, WatchOptions options) {{"
        yield f"        return watch({getter}, request, options);\n    }}\n"
    elif method.server_streaming:
        yield javadoc(comment, "    ", parameter, "@return the answers as they come; closing it ends the call")
        yield f"    public Stream<{answer}> {name}({request} request) {{"
        yield f"        return stream({getter}, request);\n    }}\n"
    elif method.output_type == OPERATION:
        result = types[go_services.result_of(service, method)].rpartition(".")[2]
        yield javadoc(comment, "    ", parameter, "@return the work that has been started", failure)
        yield f"    public Operation<{result}> {name}({request} request) {{"
        yield f"        return start({getter}, request, {result}.class);\n    }}\n"
    elif method.name.startswith("List") and response and any(f.name == "next_page_token" for f in response.field):
        item = next(field for field in response.field if field.number == 1)
        kind = types[item.type_name].rpartition(".")[2]
        items = "".join(part.capitalize() for part in item.name.split("_"))
        # Nodes that are away are in the lists of the gateway's own resources all the same.
        whole = "false" if go_services.rule_of(method).gateway_only else "true"
        yield javadoc(comment, "    ", parameter, "@return every item, page by page as they are read")
        yield f"    public Pages<{kind}> {name}({request} request) {{"
        yield f"        return pages({getter}, request, {answer}::get{items}List, {whole});\n    }}\n"
        yield javadoc(f"Asks for one page. {comment}", "    ", parameter, "@return the page", failure)
        yield f"    public {answer} {name}Page({request} request) {{"
        yield f"        return call({getter}, request);\n    }}\n"
    elif method.output_type == EMPTY:
        yield javadoc(comment, "    ", parameter, failure)
        yield f"    public void {name}({request} request) {{"
        yield f"        call({getter}, request);\n    }}\n"
    else:
        yield javadoc(comment, "    ", parameter, "@return the answer", failure)
        yield f"    public {answer} {name}({request} request) {{"
        yield f"        return call({getter}, request);\n    }}\n"


def _resumes(request: descriptor_pb2.DescriptorProto | None) -> bool:
    return request is not None and any(field.name == "resume_token" for field in request.field)


def _services(found: list[go_services.Service]) -> str:
    lines = []
    for service in found:
        accessor = service.field[0].lower() + service.field[1:]
        lines.append(f"    /** {{@return the calls of {{@code {service.file.package}.{service.descriptor.name}}}}} */")
        lines.append(f"    public {service.type} {accessor}() {{")
        lines.append(f"        return new {service.type}(client(), channel(), CallOptions.DEFAULT);\n    }}\n")
    text = "\n".join(lines)
    about = (
        "The services of the API, one class for each: what a {@link VirtfleetClient} has. Threads may share it; "
        "nothing is null."
    )
    return (
        f"{HEADER}package {PACKAGE};\n\nimport io.grpc.CallOptions;\nimport io.grpc.Channel;\n\n/** {about} */\n"
        "public abstract sealed class Services permits VirtfleetClient {\n\n    Services() {\n    }\n\n"
        "    abstract VirtfleetClient client();\n\n"
        "    /** {@return the connection, for stubs of other services; calls through it are treated alike} */\n"
        f"    public abstract Channel channel();\n\n{text}}}\n"
    )


def _reasons() -> str:
    lines = []
    for branch in VirtfleetError.__subclasses__():
        for leaf in branch.__subclasses__():
            text = re.sub(r"\s+", " ", (leaf.__doc__ or "").strip().splitlines()[0])
            lines += [javadoc(text, "    "), f"    {leaf.reason}(Status.Code.{branch.code.name}),"]
    constants = "\n".join(lines)
    return f"""{HEADER}package {PACKAGE};

import io.grpc.Status;
import java.util.Map;
import java.util.function.Function;
import java.util.stream.Collectors;
import java.util.stream.Stream;

/**
 * The stable causes of errors of virtfleet. Branch on these, never on the text of a message.
 *
 * <p>Later releases add some: a {{@code switch}} over them needs a {{@code default}}.
 */
public enum Reason {{
{constants}
    /** The error is none of virtfleet's own: a lost connection, a deadline that ran out. */
    NONE(Status.Code.UNKNOWN),
    /** A reason that this release does not know; {{@link VirtfleetException#reasonText()}} has it as it came. */
    UNRECOGNIZED(Status.Code.UNKNOWN);

    private static final Map<String, Reason> BY_NAME =
            Stream.of(values()).collect(Collectors.toUnmodifiableMap(Reason::name, Function.identity()));

    private final Status.Code code;

    Reason(Status.Code code) {{
        this.code = code;
    }}

    /** {{@return the code that errors of this reason have; UNKNOWN for {{@link #NONE}} and {{@link #UNRECOGNIZED}}}} */
    public Status.Code code() {{
        return code;
    }}

    static Reason named(String text) {{
        return text.isEmpty() ? NONE : BY_NAME.getOrDefault(text, UNRECOGNIZED);
    }}
}}
"""


def fresh() -> dict[str, str]:
    """Return what should be committed."""
    with tempfile.TemporaryDirectory() as work:
        image = protos.write_image(Path(work) / "image.binpb")
    public = [file for file in image.file if file.name.startswith("virtfleet/")]
    return texts(file for file in public if not file.name.startswith(PRIVATE))


def committed(folder: Path = FOLDER) -> dict[str, str]:
    """Return what is committed; files that people wrote are left out."""
    found = {path.name: path.read_text() for path in folder.glob("*.java")}
    return {name: text for name, text in found.items() if WRITTEN.search(text)}


def differing(wanted: dict[str, str], known: dict[str, str]) -> list[str]:
    """Return the names of the files that are not what they should be, are missing, or should not be there."""
    return sorted(name for name in {*wanted, *known} if wanted.get(name) != known.get(name))


def main() -> int:
    """Generate or check; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.java_services")
    parser.add_argument("what", choices=["generate", "check"])
    wanted, known = fresh(), committed()
    if parser.parse_args().what == "check":
        names = differing(wanted, known)
        if names:
            print(f"out of date: run `make protos`: {' '.join(names)}", file=sys.stderr)
        return 1 if names else 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in {*known} - {*wanted}:
        (FOLDER / name).unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

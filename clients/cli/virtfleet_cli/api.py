"""`virtfleet api`: any method of the API, with JSON in and out."""

from __future__ import annotations

import difflib
import importlib
import json
import pkgutil
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

from virtfleet_cli.completion import complete_from, node_option
from virtfleet_cli.input import read
from virtfleet_cli.session import Session, pass_session

if TYPE_CHECKING:
    from google.protobuf.descriptor import MethodDescriptor


def methods() -> dict[str, MethodDescriptor]:
    """Return every method that this release knows, by its full name."""
    import virtfleet

    found: dict[str, MethodDescriptor] = {}
    modules = [*_modules(virtfleet.__path__, "virtfleet."), "google.longrunning.operations_pb2"]
    for name in modules:
        for service in importlib.import_module(name).DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                found[method.full_name] = method
    return found


def _modules(path: Any, prefix: str) -> Iterator[str]:  # noqa: ANN401 - the path of a package
    for module in pkgutil.walk_packages(path, prefix):
        if module.name.endswith("_pb2"):
            yield module.name


def find(name: str) -> MethodDescriptor:
    """Return the method that a person means: `StartDomain`, `DomainService.StartDomain`, or the whole name.

    Raises:
        ClickException: There is none, or more than one.
    """
    wanted = name.strip("/").replace("/", ".")
    known = methods()
    found = [full for full in known if full == wanted or full.endswith(f".{wanted}")]
    if len(found) == 1:
        return known[found[0]]
    if found:
        raise click.ClickException(f"`{name}` may be {', '.join(sorted(found))}")
    short = {full.rpartition(".")[2]: full for full in known}
    near = difflib.get_close_matches(wanted.rpartition(".")[2], short, 1)
    raise click.ClickException(f"there is no method `{name}`" + (f"; did you mean `{near[0]}`?" if near else ""))


def _short(names: Iterable[str]) -> Iterator[str]:
    """Yield the names of methods, with their service where another one has such a method too."""
    lasts = Counter(name.rpartition(".")[2] for name in names)
    for name in names:
        yield name.rpartition(".")[2] if lasts[name.rpartition(".")[2]] == 1 else name


@click.command()
@click.argument("method", required=False, shell_complete=complete_from(lambda: _short(methods())))
@click.option(
    "-d", "--data", default="", metavar="JSON", help="The request; `-`: standard input. A stream: several, one a line."
)
@node_option("Ask this node (x-virtfleet-node), where the name does not say.")
@pass_session
def api(session: Session, method: str | None, data: str, node: str) -> None:
    """Call any METHOD; without one, list them. Answers are JSON, one a line for a stream."""
    if method is None:
        for name in sorted(methods()):
            click.echo(name)
        return
    descriptor = find(method)
    requests = list(_requests(descriptor, read(data) if data == "-" else data))
    for answer in call(session, descriptor, requests, node):
        click.echo(_json(answer, one_line=descriptor.server_streaming))


def call(session: Session, method: MethodDescriptor, requests: list[Any], node: str) -> Iterator[Any]:
    """Yield the answers of a call."""
    from google.protobuf import message_factory

    path = f"/{method.containing_service.full_name}/{method.name}"
    kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    start = getattr(session.fleet.channel, kind)(
        path,
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
    )
    options: dict[str, Any] = {"metadata": (("x-virtfleet-node", node),) if node else ()}
    if not method.server_streaming:
        options["timeout"] = session.timeout_seconds
    answer = start(iter(requests) if method.client_streaming else requests[0], **options)
    if method.server_streaming:
        yield from answer
    else:
        yield answer


def _requests(method: MethodDescriptor, text: str) -> Iterator[Any]:
    from google.protobuf import json_format, message_factory

    kind = message_factory.GetMessageClass(method.input_type)
    lines = [line for line in text.splitlines() if line.strip()] if method.client_streaming else [text]
    for number, line in enumerate(lines, start=1):
        try:
            yield json_format.Parse(line or "{}", kind())
        except json_format.ParseError as error:
            raise click.ClickException(f"--data, request {number}: {error}") from None
        except RecursionError:
            raise click.ClickException(f"--data, request {number}: is nested too deep") from None


def _json(message: Any, *, one_line: bool) -> str:  # noqa: ANN401 - any message
    from google.protobuf import json_format

    document = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return json.dumps(document, indent=None if one_line else 2, ensure_ascii=False)

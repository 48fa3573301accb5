"""`virtfleet watch`: what becomes of resources, as it happens."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

import click
from google.protobuf import json_format

from virtfleet_cli.completion import node_option
from virtfleet_cli.kinds import EPILOG, Kind, KindType, enum_name
from virtfleet_cli.output import as_document, while_read
from virtfleet_cli.session import Session, pass_session


@click.command(epilog=EPILOG)
@click.argument("kind", type=KindType())
@node_option("Only of this node.")
@click.option("--filter", "filter_", default="", metavar="TEXT", help="Only those for which it holds.")
@pass_session
def watch(session: Session, kind: Kind, node: str, filter_: str) -> None:
    """Show resources of a KIND and every change of them, until Ctrl-C; goes on over lost connections."""
    follow(session, kind, node, filter_)


def follow(session: Session, kind: Kind, node: str, filter_: str, output: str = "table") -> None:
    """Print changes until interrupted.

    Args:
        session: The session.
        kind: The kind.
        node: Of this node only; empty: of all.
        filter_: Only those for which it holds.
        output: A format of `get`: a line each; names; documents with the change and the resource, JSON in a line each.
    """
    from virtfleet_client import Informer
    from virtfleet_client.informer import ChangeKind

    parent = None if kind.of_fleet or not node else f"nodes/{node}"
    session.reach()
    informer: Informer[Any] = Informer(session.fleet, kind.message_class, parent=parent, filter_=filter_)
    with informer, while_read(informer.close):
        lost = False
        for change in informer.changes():
            if change.kind is not ChangeKind.CONNECTION:
                text = _text(kind, change, output)
                if text:
                    click.echo(text)
            elif informer.connected == lost:
                # The first connection is no news.
                lost = not informer.connected
                click.echo("connection lost; going on" if lost else "connected again", err=True)


def _text(kind: Kind, change: Any, output: str) -> str:  # noqa: ANN401 - a Change of any kind
    if output in ("table", "wide"):
        return _line(kind, change)
    if output == "name":
        return change.resource.name if change.resource is not None else ""
    document: dict[str, Any] = {"change": change.kind.value}
    if change.resource is not None:
        document["resource"] = as_document(kind, change.resource)
    if change.source is not None:
        document["source"] = json_format.MessageToDict(change.source, preserving_proto_field_name=True)
    if output == "json":
        return json.dumps(document)
    import yaml

    return yaml.safe_dump(document, explicit_start=True, sort_keys=False, allow_unicode=True).rstrip("\n")


def _line(kind: Kind, change: Any) -> str:  # noqa: ANN401 - a Change of any kind
    now = dt.datetime.now().astimezone().strftime("%H:%M:%S")
    if change.source is not None:
        return f"{now}  {enum_name(change.source, 'state'):10} {change.source.node}"
    if change.resource is None:
        return f"{now}  {change.kind.value}"
    resource = change.resource
    cells = [column.value(resource) for column in kind.columns if not column.wide]
    before = f" (was {change.before.name})" if change.kind.value == "moved" and change.before is not None else ""
    return f"{now}  {change.kind.value:10} {resource.name}  {'  '.join(cell for cell in cells if cell)}{before}"

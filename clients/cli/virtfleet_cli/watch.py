"""`virtfleet watch`: what becomes of resources, as it happens."""

from __future__ import annotations

import datetime as dt
from typing import Any

import click

from virtfleet_cli.kinds import Kind, KindType, enum_name
from virtfleet_cli.session import Session, pass_session


@click.command()
@click.argument("kind", type=KindType())
@click.option("-n", "--node", default="", metavar="NODE", help="Only of this node.")
@click.option("--filter", "filter_", default="", metavar="TEXT", help="Only those for which it holds.")
@pass_session
def watch(session: Session, kind: Kind, node: str, filter_: str) -> None:
    """Show resources of a KIND and every change of them, until Ctrl-C; goes on over lost connections."""
    follow(session, kind, node, filter_)


def follow(session: Session, kind: Kind, node: str, filter_: str) -> None:
    """Print changes until interrupted."""
    from virtfleet_client import Informer
    from virtfleet_client.informer import ChangeKind

    parent = None if kind.of_fleet or not node else f"nodes/{node}"
    with Informer(session.fleet, kind.message_class, parent=parent, filter_=filter_) as informer:
        lost = False
        for change in informer.changes():
            if change.kind is not ChangeKind.CONNECTION:
                click.echo(_line(kind, change))
            elif informer.connected == lost:
                # The first connection is no news.
                lost = not informer.connected
                click.echo("connection lost; going on" if lost else "connected again", err=True)


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

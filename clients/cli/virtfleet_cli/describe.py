"""`virtfleet describe`: all of a resource, and what happened to it last."""

from __future__ import annotations

from typing import Final

import click

from virtfleet_cli.completion import complete, node_option
from virtfleet_cli.events import line, recent
from virtfleet_cli.kinds import EPILOG, Kind, KindType
from virtfleet_cli.output import as_document
from virtfleet_cli.selection import find
from virtfleet_cli.session import Session, pass_session

_EVENTS: Final = 10


@click.command(epilog=EPILOG)
@click.argument("kind", type=KindType())
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=complete(None))
@node_option()
@pass_session
def describe(session: Session, kind: Kind, names: tuple[str, ...], node: str) -> None:
    """Show all of a resource, and the last events about it."""
    import yaml

    for name in names:
        resource = find(session, kind, name, node)
        click.echo(yaml.safe_dump(as_document(kind, resource), sort_keys=False, allow_unicode=True), nl=False)
        events = recent(session, kind, resource.name, _EVENTS)
        if events:
            click.echo("events:")
            for event in events:
                click.echo(f"  {line(event)}")

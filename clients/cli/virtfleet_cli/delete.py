"""`virtfleet delete`: resources, many at once."""

from __future__ import annotations

import sys
from typing import Any

import click

from virtfleet_cli.completion import complete, node_option
from virtfleet_cli.kinds import EPILOG, Kind, KindType
from virtfleet_cli.selection import chosen
from virtfleet_cli.session import Session, pass_session
from virtfleet_cli.work import Crew


@click.command(epilog=EPILOG)
@click.argument("kind", type=KindType())
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=complete(None))
@click.option("-l", "--label", "labels", multiple=True, metavar="KEY=VALUE", help="All with it.")
@click.option("--all", "everything", is_flag=True, help="All (of --node, or of the fleet).")
@node_option()
@click.option("--stop", is_flag=True, help="End running domains first, by force.")
@click.option("--volumes", is_flag=True, help="Take the volumes along that were made with a domain.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--cancel", is_flag=True, help="Ctrl-C cancels what runs; else it goes on.")
@pass_session
def delete(  # noqa: PLR0913 - one parameter an option
    session: Session,
    kind: Kind,
    names: tuple[str, ...],
    labels: tuple[str, ...],
    node: str,
    *,
    everything: bool,
    stop: bool,
    volumes: bool,
    yes: bool,
    cancel: bool,
) -> None:
    """Delete resources of a KIND."""
    found = chosen(session, kind, names, labels, node, everything=everything)
    if not found:
        click.echo("nothing to delete", err=True)
        return
    if not yes and (labels or everything):
        if sys.stdin is None or not sys.stdin.isatty() or not session.errors.is_terminal:
            raise click.UsageError(f"say -y to delete {len(found)} {kind.plural}: there is nobody to ask")
        for name in found[:20]:
            click.echo(f"  {name}", err=True)
        click.confirm(f"delete {len(found)} {kind.plural}?", abort=True, err=True)
    stub = kind.stub(session.fleet)

    def call(name: str) -> Any:  # noqa: ANN401 - an operation or nothing
        request = kind.request("Delete")
        request.name = name
        fields = request.DESCRIPTOR.fields_by_name
        for wanted, field in ((stop, "stop"), (volumes, "delete_volumes")):
            if wanted:
                if field not in fields:
                    raise click.ClickException(f"a {kind.noun} has no such option")
                setattr(request, field, True)
        return getattr(stub, kind.method_name("Delete"))(request, timeout=session.timeout_seconds)

    Crew(session, "deleted", cancel=cancel).run(found, call)

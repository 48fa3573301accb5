"""`virtfleet get`: resources of a kind as a table, or as the API has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from virtfleet_cli.completion import complete, node_option
from virtfleet_cli.kinds import EPILOG, Kind, KindType
from virtfleet_cli.output import FORMATS, printer
from virtfleet_cli.session import Session, pass_session

if TYPE_CHECKING:
    from virtfleet_client import Fleet

PAGE = 500


def read(
    fleet: Fleet, kind: Kind, names: tuple[str, ...], node: str, filter_: str, timeout_seconds: float
) -> Iterator[Any]:
    """Yield resources as they arrive: those that are named, or all of the kind.

    Raises:
        VirtfleetError: One does not exist, or a page failed.
    """
    stub = kind.stub(fleet)
    for given in names:
        request = kind.request("Get")
        request.name = kind.name(given, node)
        yield getattr(stub, kind.method_name("Get"))(request, timeout=timeout_seconds)
    if not names:
        request = kind.request("List")
        request.parent = kind.parent(node)
        request.page_size, request.filter = PAGE, filter_
        yield from fleet.pages(getattr(stub, kind.method_name("List")), request, timeout_seconds=timeout_seconds)


def label_filter(labels: tuple[str, ...]) -> str:
    """Return the filter for `-l key=value` and `-l key`.

    Raises:
        ClickException: A label has no key.
    """
    parts = []
    for label in labels:
        key, equals, value = label.partition("=")
        if not key or '"' in label:
            raise click.ClickException(f"`{label}` is no label: KEY=VALUE or KEY")
        parts.append(f'labels."{key}" = "{value}"' if equals else f'labels."{key}":*')
    return " AND ".join(parts)


@click.command(epilog=EPILOG)
@click.argument("kind", type=KindType())
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=complete(None))
@click.option("-o", "--output", type=click.Choice(FORMATS), default="table", show_default=True)
@click.option(
    "-l", "--label", "labels", multiple=True, metavar="KEY=VALUE", help="Only those with it; may be repeated."
)
@click.option("--filter", "filter_", default="", metavar="TEXT", help="Only those for which it holds, as in the API.")
@node_option("Only of this node.")
@click.option("-w", "--watch", "follow_", is_flag=True, help="Go on with every change, until Ctrl-C.")
@pass_session
def get(
    session: Session,
    kind: Kind,
    names: tuple[str, ...],
    output: str,
    labels: tuple[str, ...],
    filter_: str,
    node: str,
    *,
    follow_: bool,
) -> None:
    """Show resources of a KIND, or some of them by NAME.

    A name is `web`, `n1/web`, or the whole `nodes/n1/domains/web`; a volume is `pool/volume`.
    """
    conditions = " AND ".join(part for part in (label_filter(labels), filter_) if part)
    if follow_:
        from virtfleet_cli.watch import follow

        if names:
            raise click.UsageError("-w watches a kind: use --filter for some of it")
        follow(session, kind, node, conditions, output)
        return
    out = printer(output, kind, one=len(names) == 1)
    with out:
        for resource in read(session.fleet, kind, names, node, conditions, session.timeout_seconds):
            out.add(resource)

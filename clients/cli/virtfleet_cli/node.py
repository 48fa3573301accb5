"""`virtfleet node`: nodes of the fleet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from virtfleet_cli.completion import complete
from virtfleet_cli.get import read
from virtfleet_cli.kinds import BY_NAME
from virtfleet_cli.output import FORMATS, printer
from virtfleet_cli.selection import chosen
from virtfleet_cli.session import Session, pass_session
from virtfleet_cli.work import Crew

if TYPE_CHECKING:
    from collections.abc import Callable

NODE = BY_NAME["node"]


@click.group()
def app() -> None:
    """Nodes of the fleet: list, join, cordon, remove."""


@app.command("list")
@click.option("-o", "--output", type=click.Choice(FORMATS), default="table", show_default=True)
@pass_session
def list_nodes(session: Session, output: str) -> None:
    """Show the nodes with their states."""
    with printer(output, NODE) as out:
        for node in read(session.fleet, NODE, (), "", "", session.timeout_seconds):
            out.add(node)


@app.command()
@click.argument("node")
@pass_session
def token(session: Session, node: str) -> None:
    """Make a join token for NODE, good once and for an hour, and print it."""
    from virtfleet.fleet.v1 import enrollment_pb2

    request = enrollment_pb2.CreateJoinTokenRequest()
    request.join_token.spec.node = f"nodes/{node}"
    click.echo(session.fleet.enrollment.CreateJoinToken(request, timeout=session.timeout_seconds).token)


def _verb(method: str, done: str, text: str) -> Callable[[Session, tuple[str, ...]], None]:
    @click.command(help=text)
    @click.argument("nodes", nargs=-1, required=True, metavar="NODE...", shell_complete=complete(NODE))
    @pass_session
    def command(session: Session, nodes: tuple[str, ...]) -> None:
        names = chosen(session, NODE, nodes, (), "", everything=False)
        request = getattr(NODE.messages, f"{method}Request")

        def call(name: str) -> Any:  # noqa: ANN401 - a node or an operation
            return getattr(NODE.stub(session.fleet), method)(request(name=name), timeout=session.timeout_seconds)

        Crew(session, done).run(names, call)

    return command


app.add_command(_verb("CordonNode", "cordoned", "Let nodes take no new domains."), "cordon")  # type: ignore[arg-type] # a command
app.add_command(_verb("UncordonNode", "uncordoned", "Let nodes take domains again."), "uncordon")  # type: ignore[arg-type] # a command
app.add_command(_verb("DeleteNode", "removed", "Remove nodes from the fleet; their guests go on."), "remove")  # type: ignore[arg-type] # a command

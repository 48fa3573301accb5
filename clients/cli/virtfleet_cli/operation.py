"""`virtfleet operation`: work that lasts."""

from __future__ import annotations

from typing import Any

import click

from virtfleet_cli.completion import node_option
from virtfleet_cli.failures import EXIT_REFUSED, sentence
from virtfleet_cli.kinds import age
from virtfleet_cli.seconds import Seconds
from virtfleet_cli.session import Session, pass_session


@click.group()
def operation() -> None:
    """Work that lasts: list it, wait for it, cancel it."""


def _state(one: Any) -> str:  # noqa: ANN401 - an Operation
    if not one.done:
        return "running"
    return "failed" if one.HasField("error") else "done"


@operation.command("list")
@node_option("Of this node.")
@click.option("--gateway", is_flag=True, help="Of the gateway itself.")
@click.option("--running", is_flag=True, help="Only what runs.")
@pass_session
def list_operations(session: Session, node: str, *, gateway: bool, running: bool) -> None:
    """Show operations."""
    from google.longrunning import operations_pb2

    from virtfleet_client.operations import metadata_of

    name = "" if gateway else f"nodes/{node or '-'}/services/-"
    request = operations_pb2.ListOperationsRequest(name=name, filter="done=false" if running else "", page_size=500)
    fleet = session.fleet
    for one in fleet.pages(fleet.operations.ListOperations, request, timeout_seconds=session.timeout_seconds):
        metadata = metadata_of(one)
        method = metadata.method.rpartition(".")[2]
        click.echo(f"{one.name}  {_state(one):8} {method:20} {metadata.target}  {age(metadata.create_time)}")


@operation.command()
@click.argument("name")
@click.option("--seconds", type=Seconds(), metavar="SECONDS", help="Give up after so long; the operation goes on.")
@pass_session
def wait(session: Session, name: str, seconds: float | None) -> None:
    """Wait for the end of an operation; its failure is this command's."""
    from google.longrunning import operations_pb2

    from virtfleet_client.errors import from_status

    found = session.fleet.operations.GetOperation(
        operations_pb2.GetOperationRequest(name=name), timeout=session.timeout_seconds
    )
    ended = session.fleet.finish(found, timeout_seconds=seconds)
    click.echo(f"{ended.name}  {_state(ended)}")
    if ended.HasField("error"):
        click.echo(f"virtfleet: {sentence(from_status(ended.error))}", err=True)
        raise click.exceptions.Exit(EXIT_REFUSED)


@operation.command()
@click.argument("name")
@pass_session
def cancel(session: Session, name: str) -> None:
    """Ask an operation to end; what it has done is undone."""
    from google.longrunning import operations_pb2

    session.fleet.operations.CancelOperation(
        operations_pb2.CancelOperationRequest(name=name), timeout=session.timeout_seconds
    )
    click.echo(f"{name} is asked to end")

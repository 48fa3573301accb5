"""`virtfleet events`: what has happened, and what happens."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

import click

from virtfleet_cli.completion import node_option
from virtfleet_cli.kinds import enum_name
from virtfleet_cli.output import while_read
from virtfleet_cli.session import Session, pass_session

if TYPE_CHECKING:
    from virtfleet_cli.kinds import Kind

PACKAGES: Final = ("compute", "storage", "network")


def line(event: Any) -> str:  # noqa: ANN401 - the Event of any package
    """Return an event as one line."""
    time = event.time.ToDatetime().isoformat(sep=" ", timespec="milliseconds")
    text = f" {event.message}" if event.message else ""
    reason = f" ({event.reason})" if event.reason else ""
    return f"{time}  {enum_name(event, 'type'):24} {event.resource}{reason}{text}"


def recent(session: Session, kind: Kind, name: str, count: int) -> list[Any]:
    """Return the last events about a resource, oldest first."""
    package = kind.module.split(".")[1]
    if package not in PACKAGES:
        return []
    messages = importlib.import_module(f"virtfleet.{package}.v1.watch_pb2")
    grpc_module = importlib.import_module(f"virtfleet.{package}.v1.watch_pb2_grpc")
    request = messages.ListEventsRequest(parent="/".join(name.split("/")[:2]), filter=f'resource="{name}"')
    found = session.fleet.pages(
        grpc_module.WatchServiceStub(session.fleet.channel).ListEvents, request, timeout_seconds=session.timeout_seconds
    )
    return list(found)[-count:]


@click.command()
@click.option("-w", "--watch", "follow", is_flag=True, help="Go on with what happens, until Ctrl-C.")
@click.option("--of", "package", type=click.Choice(PACKAGES), default="compute", show_default=True)
@node_option()
@click.option("--filter", "filter_", default="", metavar="TEXT", help="Only those for which it holds.")
@pass_session
def events(session: Session, package: str, node: str, filter_: str, *, follow: bool) -> None:
    """Show what has happened to domains, volumes or networks, oldest first."""
    messages = importlib.import_module(f"virtfleet.{package}.v1.watch_pb2")
    if follow:
        _follow(session, messages, node, filter_)
        return
    grpc_module = importlib.import_module(f"virtfleet.{package}.v1.watch_pb2_grpc")
    stub = grpc_module.WatchServiceStub(session.fleet.channel)
    request = messages.ListEventsRequest(parent=f"nodes/{node or '-'}", filter=filter_)
    for event in session.fleet.pages(stub.ListEvents, request, timeout_seconds=session.timeout_seconds):
        click.echo(line(event))


def _follow(session: Session, messages: Any, node: str, filter_: str) -> None:  # noqa: ANN401 - a generated module
    from virtfleet.type.v1 import resource_pb2

    request = messages.WatchResourcesRequest(
        parent=f"nodes/{node or '-'}", filter=filter_, view=resource_pb2.RESOURCE_VIEW_BASIC
    )
    request.snapshot.SetInParent()
    begun = False
    session.reach()
    watch = session.fleet.watch(request, resnapshot=True)
    with while_read(watch.close):
        for answer in watch:
            for change in answer.changes:
                if begun and change.HasField("event"):
                    click.echo(line(change.event))
            begun = begun or answer.HasField("snapshot_end")

"""`virtfleet logs`: what a guest has written to its console."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

import click

from virtfleet_cli.completion import complete, node_option
from virtfleet_cli.kinds import BY_NAME
from virtfleet_cli.output import while_read
from virtfleet_cli.selection import full_name
from virtfleet_cli.session import Session, pass_session

if TYPE_CHECKING:
    from virtfleet.compute.v1 import console_pb2


@click.command()
@click.argument("name", shell_complete=complete(BY_NAME["domain"]))
@node_option()
@click.option("--device", default="", metavar="ID", help="Which serial or console port; the first if left out.")
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until the guest ends.")
@pass_session
def logs(session: Session, name: str, node: str, device: str, *, follow: bool) -> None:
    """Print what a guest has written to its console, as far as it is held."""
    from virtfleet.compute.v1 import console_pb2

    request = console_pb2.ReadConsoleLogRequest(
        name=full_name(session, BY_NAME["domain"], name, node), device_id=device, follow=follow
    )
    if follow:
        with while_read():
            _follow(session, request)
    else:
        _print(session, request)


def _follow(session: Session, request: console_pb2.ReadConsoleLogRequest) -> None:
    """Print until the guest ends; goes on where it was cut off."""
    from virtfleet_client.calls import delay_seconds
    from virtfleet_client.errors import Unavailable

    failures = 0
    while True:
        before = request.SerializeToString()
        try:
            _print(session, request)
        except Unavailable as error:
            if request.SerializeToString() != before:
                failures = 0
            elif not request.epoch:
                # Nothing of it has ever been read: it fails as any call does.
                raise
            if not failures:
                click.echo("\n[connection lost; going on]", err=True)
            failures += 1
            # Nothing sets it: Ctrl-C ends the pause.
            threading.Event().wait(delay_seconds(failures, error.retry_delay_seconds))
        else:
            return


def _print(session: Session, request: console_pb2.ReadConsoleLogRequest) -> None:
    """Print what comes, and note in the request where it goes on."""
    out = sys.stdout.buffer
    for answer in session.fleet.consoles.ReadConsoleLog(request):
        if answer.HasField("opened"):
            request.epoch, request.offset = answer.opened.epoch, answer.opened.offset
        elif answer.HasField("gap"):
            lost = answer.gap.length_bytes or "some"
            click.echo(f"\n[{lost} bytes are no longer held]", err=True)
            request.epoch = answer.gap.epoch or request.epoch
        elif answer.HasField("data"):
            out.write(answer.data.data)
            out.flush()
            request.offset = answer.data.offset + len(answer.data.data)

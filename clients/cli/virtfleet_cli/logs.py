"""`virtfleet logs`: what a guest has written to its console."""

from __future__ import annotations

import sys

import click

from virtfleet_cli.completion import complete, node_option
from virtfleet_cli.kinds import BY_NAME
from virtfleet_cli.selection import full_name
from virtfleet_cli.session import Session, pass_session


@click.command()
@click.argument("name", shell_complete=complete(BY_NAME["domain"]))
@node_option()
@click.option("--device", default="", metavar="ID", help="Which serial or console port; the first if left out.")
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until the guest ends.")
@pass_session
def logs(session: Session, name: str, node: str, device: str, *, follow: bool) -> None:
    """Print what a guest has written to its console, as far as it is held."""
    from virtfleet.compute.v1 import console_pb2
    from virtfleet_client.errors import Unavailable

    request = console_pb2.ReadConsoleLogRequest(
        name=full_name(session, BY_NAME["domain"], name, node), device_id=device, follow=follow
    )
    out = sys.stdout.buffer
    while True:
        try:
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
        except Unavailable:
            if not follow:
                raise
            click.echo("\n[connection lost; going on]", err=True)
        else:
            return

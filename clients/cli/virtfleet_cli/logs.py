"""`virtfleet logs`: what a guest has written to its console."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

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
    log = _Log(session, request)
    if not follow:
        log.print()
        return
    with while_read(log.close):
        log.follow()


class _Log:
    """Prints a log. Another thread may end it."""

    def __init__(self, session: Session, request: console_pb2.ReadConsoleLogRequest) -> None:
        self._session = session
        self._request = request
        self._stream: Any = None
        self._closed = threading.Event()

    def close(self) -> None:
        """End it."""
        self._closed.set()
        stream = self._stream
        if stream is not None:
            stream.cancel()

    def follow(self) -> None:
        """Print until the guest ends, or `close`; goes on where it was cut off."""
        from virtfleet_client.calls import delay_seconds
        from virtfleet_client.errors import Cancelled, Unavailable

        failures = 0
        while not self._closed.is_set():
            before = self._request.SerializeToString()
            try:
                self.print()
            except Cancelled:
                if not self._closed.is_set():
                    raise
            except Unavailable as error:
                if self._request.SerializeToString() != before:
                    failures = 0
                elif not self._request.epoch:
                    # Nothing of it has ever been read: it fails as any call does.
                    raise
                if not failures:
                    click.echo("\n[connection lost; going on]", err=True)
                failures += 1
                self._closed.wait(delay_seconds(failures, error.retry_delay_seconds))
            else:
                return

    def print(self) -> None:
        """Print what comes, and note where it goes on."""
        out, request = sys.stdout.buffer, self._request
        self._stream = self._session.fleet.consoles.ReadConsoleLog(request)
        if self._closed.is_set():
            # It may have come before there was a stream to end.
            self._stream.cancel()
        for answer in self._stream:
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

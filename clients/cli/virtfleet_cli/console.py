"""`virtfleet console`: a guest's terminal in this one; `^]` leaves."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import click

from virtfleet_cli.completion import complete, node_option
from virtfleet_cli.kinds import BY_NAME
from virtfleet_cli.screen import orderly
from virtfleet_cli.selection import full_name
from virtfleet_cli.session import Session, pass_session

if TYPE_CHECKING:
    from virtfleet.compute.v1 import console_pb2

ESCAPE: Final = b"\x1d"
_ATTEMPTS: Final = 30


@click.command()
@click.argument("name", shell_complete=complete(BY_NAME["domain"]))
@node_option()
@click.option("--device", default="", metavar="ID", help="Which serial or console port; the first if left out.")
@click.option("--read-only", is_flag=True, help="Look only; others may write.")
@click.option("--force", is_flag=True, help="Take it from whoever writes.")
@pass_session
def console(session: Session, name: str, node: str, device: str, *, read_only: bool, force: bool) -> None:
    """Join a guest's serial console. ^] leaves; a lost connection is taken up again where it broke."""
    full = full_name(session, BY_NAME["domain"], name, node)
    terminal = Terminal(full, device, read_only=read_only, force=force)
    click.echo(f"connected to {full}; ^] leaves", err=True)
    with _raw():
        reason = terminal.run(session)
    click.echo(f"\n{reason}", err=True)


class Terminal:
    """Is one console on this terminal, over as many connections as it takes."""

    def __init__(self, name: str, device: str, *, read_only: bool, force: bool) -> None:
        self._name = name
        self._device = device
        self._read_only = read_only
        self._force = force
        self._epoch = ""
        self._offset: int | None = None
        self._left = threading.Event()
        self._input: queue.Queue[bytes | None] = queue.Queue()
        self._resized = threading.Event()
        self._waker, self._wake = os.pipe()

    def run(self, session: Session) -> str:
        """Carry bytes both ways until somebody leaves; returns why it ended."""
        from virtfleet_client.errors import Unavailable

        with contextlib.suppress(ValueError):
            # Only the main thread may; elsewhere the size is sent once.
            signal.signal(signal.SIGWINCH, lambda *_: self._resized.set())
        reader = threading.Thread(target=self._read_keyboard, daemon=True)
        reader.start()
        failures = 0
        try:
            while True:
                try:
                    return self._once(session)
                except Unavailable:
                    failures += 1
                    if failures >= _ATTEMPTS or self._left.is_set():
                        raise
                    sys.stderr.write("\r\n[connection lost; going on]\r\n")
                    self._left.wait(min(0.2 * failures, 2.0))
        finally:
            self._left.set()
            os.write(self._wake, b"x")
            reader.join(1)

    def _read_keyboard(self) -> None:
        descriptor = sys.stdin.fileno()
        while not self._left.is_set():
            ready, _, _ = select.select([descriptor, self._waker], [], [])
            if self._waker in ready:
                return
            data = os.read(descriptor, 4096)
            before, escape, _ = data.partition(ESCAPE)
            if before:
                self._input.put(before)
            if escape or not data:
                self._left.set()
                self._input.put(None)
                return

    def _messages(self, over: threading.Event) -> Iterator[console_pb2.OpenConsoleRequest]:
        """Yield what is sent over one connection, until it is over: gRPC reads in a thread of its own."""
        from virtfleet.compute.v1 import console_pb2

        first = console_pb2.OpenConsoleRequest(name=self._name)
        first.open.device_id, first.open.epoch = self._device, self._epoch
        first.open.mode = console_pb2.CONSOLE_MODE_READ_ONLY if self._read_only else console_pb2.CONSOLE_MODE_READ_WRITE
        # After a break the port may still be ours in the server's eyes.
        first.open.force = self._force or bool(self._epoch)
        if self._offset is not None:
            first.open.offset = self._offset
        yield first
        self._resized.set()
        while not over.is_set():
            if self._resized.is_set() and not self._read_only:
                self._resized.clear()
                size = shutil.get_terminal_size()
                resize = console_pb2.ConsoleResize(column_count=size.columns, row_count=size.lines)
                yield console_pb2.OpenConsoleRequest(resize=resize)
            try:
                data = self._input.get(timeout=0.2)
            except queue.Empty:
                continue
            if over.is_set():
                # It is for the next connection.
                self._input.put(data)
                return
            if data is None:
                yield console_pb2.OpenConsoleRequest(close=console_pb2.ConsoleClose())
                return
            if not self._read_only:
                yield console_pb2.OpenConsoleRequest(data=data)

    def _once(self, session: Session) -> str:
        over = threading.Event()
        try:
            return self._follow(session.fleet.consoles.OpenConsole(self._messages(over)))
        finally:
            over.set()

    def _follow(self, answers: Iterator[console_pb2.OpenConsoleResponse]) -> str:
        from virtfleet.compute.v1 import console_pb2

        for answer in answers:
            event = answer.WhichOneof("event")
            if event == "closed":
                if answer.closed.reason == console_pb2.CONSOLE_CLOSE_REASON_DRAINING:
                    from google.rpc import status_pb2

                    from virtfleet_client.errors import Unavailable

                    raise Unavailable(status_pb2.Status(code=14, message="the server drains"))
                return _REASONS.get(answer.closed.reason, "closed")
            self._take(event, answer)
        return "closed"

    def _take(self, event: str | None, answer: Any) -> None:  # noqa: ANN401 - OpenConsoleResponse
        if event == "opened":
            self._epoch = answer.opened.epoch
            self._offset = answer.opened.offset
        elif event == "gap":
            sys.stderr.write("\r\n[output is missing here]\r\n")
            self._epoch = answer.gap.epoch or self._epoch
        elif event == "data":
            sys.stdout.buffer.write(answer.data.data)
            sys.stdout.buffer.flush()
            self._offset = answer.data.offset + len(answer.data.data)


_REASONS: Final = {1: "left", 2: "the guest has ended", 3: "somebody else has taken the console"}


@contextlib.contextmanager
def _raw() -> Iterator[None]:
    """Have the terminal pass every key on; as it was, afterwards."""
    if not sys.stdin.isatty():
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    with orderly():
        try:
            tty.setraw(sys.stdin)
            yield
        finally:
            # Whoever hung up has taken the terminal along.
            with contextlib.suppress(termios.error):
                termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)

"""The command in a terminal of its own: windows that change their size, terminals that can little, and none at all."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
import pytest

from tests.integration.fake.fleet import Fake, running
from virtfleet.compute.v1 import console_pb2, console_pb2_grpc
from virtfleet.fake.v1 import fake_pb2

pytestmark = pytest.mark.timeout(90)

VIRTFLEET = str(Path(sys.executable).with_name("virtfleet"))
HOME, LEAVE = "\x1b[H", "\x1b[?25h\x1b[?1049l"
SEQUENCE = re.compile(r"\x1b\[\??[\d;]*[A-Za-z]")


class Terminal:
    """Runs the command in a terminal with a window of a size; entered around it."""

    def __init__(self, *arguments: str, columns: int = 80, rows: int = 24, **variables: str) -> None:
        self._command = [VIRTFLEET, *arguments]
        self._size = (columns, rows)
        self._variables = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        self._variables |= {"TERM": "xterm-256color", **variables}
        self.seen = ""

    def __enter__(self) -> Self:
        self._ours, theirs = pty.openpty()
        self.resize(*self._size)
        self._before = termios.tcgetattr(theirs)
        self.process = subprocess.Popen(
            self._command,
            env=self._variables,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            # Only the process itself can make a terminal its own; without that there is no SIGWINCH.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - nothing of ours is called
        )
        self._theirs = theirs
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._theirs)
        os.close(self._ours)

    def resize(self, columns: int, rows: int) -> None:
        """Give the window another size; the kernel tells the processes in it."""
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def press(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def until(self, holds: Callable[[], bool], seconds: float = 20.0) -> None:
        ends_at = time.monotonic() + seconds
        while not holds():
            ready, _, _ = select.select([self._ours], [], [], max(0.0, ends_at - time.monotonic()))
            assert ready, self.seen
            self.seen += os.read(self._ours, 65536).decode(errors="replace")

    def frame(self, holds: Callable[[list[str]], bool]) -> list[str]:
        """Wait for a whole screen for which something holds, drawn from now on, and return its lines."""
        begin = len(self.seen)
        found: list[str] = []

        def seen() -> bool:
            nonlocal found
            for text in self.seen[begin:].split(HOME)[1:]:
                if text.rstrip().endswith("\x1b[J"):
                    found = [SEQUENCE.sub("", line) for line in re.split(r"\r*\n", text)]
                    if holds(found):
                        return True
            return False

        self.until(seen)
        return found

    def ends(self, code: int) -> None:
        """Wait for its end, which leaves the terminal as it was."""
        ends_at = time.monotonic() + 15
        while self.process.poll() is None:
            assert time.monotonic() < ends_at, self.seen
            self._read()
        self._read()
        assert self.process.returncode == code, self.seen
        assert termios.tcgetattr(self._theirs) == self._before
        assert "Traceback" not in self.seen

    def _read(self) -> None:
        while select.select([self._ours], [], [], 0.05)[0]:
            self.seen += os.read(self._ours, 65536).decode(errors="replace")


@pytest.fixture(scope="module")
def shared() -> Iterator[Fake]:
    with running("--nodes", "3", "--domains", "4") as fake:
        yield fake


@pytest.fixture
def fake(shared: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Fake]:
    for name, value in shared.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VIRTFLEET_CONTEXTS_FILE", str(tmp_path / "contexts.json"))
    monkeypatch.delenv("NO_COLOR", raising=False)
    yield shared
    shared.clear()


def fits(lines: list[str], columns: int, rows: int) -> bool:
    return len(lines) <= rows and all(len(line) <= columns for line in lines)


@pytest.mark.usefixtures("fake")
def test_top_follows_the_window() -> None:
    # So long a pause that only the change of the window draws anew.
    with Terminal("top", "--interval", "300", columns=100, rows=30) as terminal:
        lines = terminal.frame(lambda lines: len(lines) == 13)
        assert fits(lines, 100, 30)
        assert lines[0].split() == ["DOMAIN", "CPU", "%", "MEMORY", "DISK/s", "NET/s"]
        for columns, rows, count, titles in (
            (20, 30, 13, "DOMAIN CPU %"),
            (500, 5, 5, "DOMAIN CPU % MEMORY DISK/s NET/s"),
            (8, 3, 3, "DOMAIN"),
            (80, 1, 1, "DOMAIN CPU % MEMORY DISK/s NET/s"),
            (1, 1, 1, "…"),
            (80, 24, 13, "DOMAIN CPU % MEMORY DISK/s NET/s"),
        ):
            terminal.resize(columns, rows)
            lines = terminal.frame(lambda lines, count=count, columns=columns: fits(lines, columns, count))  # type: ignore[misc]  # the defaults bind the values of this turn
            assert len(lines) == count
            assert " ".join(lines[0].split()) == titles
        terminal.press(b"\x03")
        terminal.ends(130)
    assert LEAVE in terminal.seen


def test_top_says_which_nodes_are_away(fake: Fake) -> None:
    with Terminal("top", "--interval", "0.2", columns=70, rows=6) as terminal:
        terminal.frame(lambda lines: "away" not in lines[-1])
        fake.inject("n3", away=fake_pb2.Away())
        lines = terminal.frame(lambda lines: "away" in lines[-1])
        assert re.fullmatch(r"1 away, last seen: n3 \d+s ago", lines[-1])
        assert len(lines) == 6
        assert not any("n3/" in line for line in lines)
        fake.inject("n2", away=fake_pb2.Away())
        assert terminal.frame(lambda lines: "2 away" in lines[-1])[-1].startswith("2 away, last seen: n2 ")
        terminal.resize(24, 6)
        assert fits(terminal.frame(lambda lines: "2 away" in lines[-1]), 24, 6)
        fake.clear()
        terminal.frame(lambda lines: "away" not in lines[-1])
        terminal.press(b"\x03")
        terminal.ends(130)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("kind", ["dumb", ""], ids=["dumb", "unnamed"])
def test_a_terminal_that_can_nothing_gets_lines(kind: str) -> None:
    with Terminal("top", "--count", "2", "--interval", "0.1", columns=30, TERM=kind) as terminal:
        terminal.ends(0)
    assert "\x1b" not in terminal.seen
    tables = terminal.seen.replace("\r\n", "\n").strip("\n").split("\n\n")
    assert [len(table.splitlines()) for table in tables] == [13, 13]
    assert all(len(line) <= 30 for table in tables for line in table.splitlines())


@pytest.mark.usefixtures("fake")
def test_no_color_is_no_bold_title() -> None:
    with Terminal("top", "--interval", "300") as terminal:
        terminal.frame(lambda lines: len(lines) == 13)
        assert "\x1b[1m" in terminal.seen
    with Terminal("top", "--interval", "300", NO_COLOR="1") as terminal:
        terminal.frame(lambda lines: len(lines) == 13)
        assert "\x1b[1m" not in terminal.seen


@pytest.mark.usefixtures("fake")
def test_without_a_terminal_there_are_no_sequences() -> None:
    done = subprocess.run([VIRTFLEET, "top", "--count", "1"], capture_output=True, text=True, timeout=30, check=True)
    assert "\x1b" not in done.stdout
    assert len(done.stdout.splitlines()) == 13
    assert done.stderr == ""


def test_a_watch_goes_on_in_a_window_of_another_size(fake: Fake) -> None:
    with Terminal("watch", "domains", "-n", "n1") as terminal:
        terminal.until(lambda: terminal.seen.count("added") == 4)
        terminal.resize(20, 1)
        del fake
        subprocess.run([VIRTFLEET, "suspend", "n1/d-00000"], capture_output=True, timeout=30, check=True)
        terminal.until(lambda: "PAUSED" in terminal.seen)
        terminal.press(b"\x03")
        terminal.ends(130)
    subprocess.run([VIRTFLEET, "resume", "n1/d-00000"], capture_output=True, timeout=30, check=True)


@pytest.mark.usefixtures("fake")
def test_bars_fit_into_a_narrow_window() -> None:
    for verb, done in (("suspend", "suspended"), ("resume", "resumed")):
        with Terminal(verb, "-n", "n2", "--all", columns=20) as terminal:
            terminal.until(lambda done=done: f"4 {done}, 0 failed" in terminal.seen)  # type: ignore[misc]  # as above
            terminal.ends(0)


class Peer(console_pb2_grpc.ConsoleServiceServicer):
    """Keeps what a console is told of the caller's window."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []

    def OpenConsole(  # noqa: N802 - the name of the method
        self, request_iterator: Iterator[console_pb2.OpenConsoleRequest], context: grpc.ServicerContext
    ) -> Iterator[console_pb2.OpenConsoleResponse]:
        del context
        for request in request_iterator:
            match request.WhichOneof("action"):
                case "open":
                    yield console_pb2.OpenConsoleResponse(opened=console_pb2.ConsoleOpened(writable=True))
                case "resize":
                    self.sizes.append((request.resize.column_count, request.resize.row_count))
                    text = f"<{request.resize.column_count}x{request.resize.row_count}>".encode()
                    yield console_pb2.OpenConsoleResponse(data=console_pb2.ConsoleData(data=text))
                case "close":
                    return

    def ReadConsoleLog(  # noqa: N802 - the name of the method
        self, request: console_pb2.ReadConsoleLogRequest, context: grpc.ServicerContext
    ) -> Iterator[console_pb2.ReadConsoleLogResponse]:
        """Refuse: nobody asks for it here."""
        del request
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "no log here")


def test_a_console_is_told_the_size_of_the_window(tmp_path: Path) -> None:
    """The drivers there are have ports without windows: so a server of this test is the other end."""
    server, peer = grpc.server(futures.ThreadPoolExecutor(2)), Peer()
    console_pb2_grpc.add_ConsoleServiceServicer_to_server(peer, server)
    server.add_insecure_port(f"unix:{tmp_path / 'socket'}")
    server.start()
    with Terminal("--address", f"unix://{tmp_path / 'socket'}", "console", "n1/web", columns=90, rows=20) as terminal:
        terminal.until(lambda: "<90x20>" in terminal.seen)
        for columns, rows in ((20, 1), (500, 60)):
            terminal.resize(columns, rows)
            terminal.until(lambda size=f"<{columns}x{rows}>": size in terminal.seen)  # type: ignore[misc]  # as above
        terminal.press(b"\x1d")
        terminal.ends(0)
    server.stop(0).wait()
    assert peer.sizes == [(90, 20), (20, 1), (500, 60)]


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_who_is_ended_leaves_the_terminal_as_it_was(signal_number: signal.Signals, tmp_path: Path) -> None:
    with Terminal("top", "--interval", "300") as terminal:
        terminal.frame(lambda lines: len(lines) == 13)
        terminal.process.send_signal(signal_number)
        terminal.ends(128 + signal_number)
    assert LEAVE in terminal.seen
    server = grpc.server(futures.ThreadPoolExecutor(2))
    console_pb2_grpc.add_ConsoleServiceServicer_to_server(Peer(), server)
    server.add_insecure_port(f"unix:{tmp_path / 'socket'}")
    server.start()
    with Terminal("--address", f"unix://{tmp_path / 'socket'}", "console", "n1/web") as terminal:
        terminal.until(lambda: "<80x24>" in terminal.seen)
        terminal.process.send_signal(signal_number)
        terminal.ends(128 + signal_number)
    server.stop(0).wait()

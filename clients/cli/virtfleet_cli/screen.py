"""What is shown again and again: over the whole terminal, or one block of lines after the other where that cannot be.

On a terminal it follows the size of the window at once, and no line is longer than the window is wide: a line that
wraps would push the others out of it.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Final

import click

from virtfleet_cli.session import Session

Lines = Callable[[int, int], Sequence[str]]
"""Makes what is shown for a number of columns and rows; 0: as many as it takes."""

_ENTER: Final = "\x1b[?1049h\x1b[?25l"
_LEAVE: Final = "\x1b[?25h\x1b[?1049l"
_HOME: Final = "\x1b[H"
_REST_OF_LINE: Final = "\x1b[K"
_REST_OF_SCREEN: Final = "\x1b[J"
_BOLD: Final = "\x1b[1m{}\x1b[0m"
_DEFAULT_SIZE: Final = (80, 24)


class Screen:
    """Shows lines, the first of them as a title.

    Args:
        whole: Whether the terminal is theirs alone; else they are printed below each other.
        styled: Whether the title may be bold.
        resized: Is readable when the window may have another size.
    """

    def __init__(self, resized: int, *, whole: bool, styled: bool) -> None:
        self._whole = whole
        self._styled = styled
        self._resized = resized
        self._lines: Lines | None = None
        self._printed = False

    def show(self, lines: Lines) -> None:
        """Show what is so from now on."""
        self._lines = lines
        if self._whole:
            self._draw()
            return
        if self._printed:
            click.echo()
        self._printed = True
        columns, _ = _size() if sys.stdout.isatty() else (0, 0)
        for line in self._titled(lines(columns, 0)):
            click.echo(line)

    def pause(self, seconds: float) -> None:
        """Wait, and follow the size of the window meanwhile."""
        ends_at = time.monotonic() + seconds
        while (left := ends_at - time.monotonic()) > 0:
            ready, _, _ = select.select([self._resized], [], [], left)
            if ready:
                os.read(self._resized, 4096)
                if self._whole:
                    self._draw()

    def _draw(self) -> None:
        columns, rows = _size()
        found = self._titled(self._lines(columns, rows)[:rows]) if self._lines is not None else []
        sys.stdout.write(_HOME + "\r\n".join(line + _REST_OF_LINE for line in found) + _REST_OF_SCREEN)
        sys.stdout.flush()

    def _titled(self, lines: Sequence[str]) -> list[str]:
        return [_BOLD.format(line) if self._styled and not number else line for number, line in enumerate(lines)]


@contextmanager
def screen(session: Session, *, whole: bool) -> Iterator[Screen]:
    """Yield the screen; the terminal is as it was afterwards.

    Args:
        session: The session.
        whole: Whether it may have the whole terminal, where there is one that can.
    """
    capable = session.interactive and os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown")
    whole = whole and capable
    with ExitStack() as stack:
        resized, told = os.pipe()
        for descriptor in (resized, told):
            os.set_blocking(descriptor, False)
            stack.callback(os.close, descriptor)

        def tell(*_: object) -> None:
            # Full: it is told already.
            with suppress(BlockingIOError):
                os.write(told, b"x")

        before = signal.signal(signal.SIGWINCH, tell)
        stack.callback(signal.signal, signal.SIGWINCH, before)
        if whole:
            stack.enter_context(orderly())
            sys.stdout.write(_ENTER)
            sys.stdout.flush()
            stack.callback(_leave)
        yield Screen(resized, whole=whole, styled=capable and session.colour)


@contextmanager
def orderly() -> Iterator[None]:
    """Have SIGTERM and SIGHUP end the command like Ctrl-C does, so that the terminal is put back as it was."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave() -> None:
    # The terminal may be gone.
    with suppress(OSError):
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()


def _size() -> tuple[int, int]:
    """Return columns and rows; a terminal that does not say has the usual ones."""
    try:
        columns, rows = os.get_terminal_size(sys.stdout.fileno())
    except OSError:
        return _DEFAULT_SIZE
    return (columns or _DEFAULT_SIZE[0], rows or _DEFAULT_SIZE[1])


def fitted(
    titles: Sequence[str],
    rows: Sequence[Sequence[str]],
    columns: int,
    *,
    right: Sequence[int],
    dispensable: Sequence[int],
) -> list[str]:
    """Return a table as lines that are no longer than the window is wide, the titles first.

    Args:
        titles: The titles of its columns.
        rows: Its rows.
        columns: How wide the window is; 0: any width will do.
        right: The columns that stand at the right side of their width.
        dispensable: The columns that are left out where there is no room, the first of them first.
    """
    table = [tuple(titles), *map(tuple, rows)]
    widths = [max(len(row[index]) for row in table) for index in range(len(titles))]
    kept = list(range(len(titles)))
    for index in dispensable:
        if not columns or sum(widths[one] for one in kept) + 2 * (len(kept) - 1) <= columns:
            break
        kept.remove(index)
    if columns:
        others = sum(widths[one] + 2 for one in kept[1:])
        widths[0] = max(min(widths[0], columns - others), min(widths[0], 4))
    lines = []
    for row in table:
        cells = [cut(row[one], widths[one]) for one in kept]
        cells = [
            cell.rjust(widths[one]) if one in right else cell.ljust(widths[one])
            for one, cell in zip(kept, cells, strict=True)
        ]
        lines.append(cut("  ".join(cells).rstrip(), columns))
    return lines


def cut(text: str, columns: int) -> str:
    """Return a text that is no longer than so many columns; 0: as it is."""
    return text if not columns or len(text) <= columns else text[: columns - 1] + "…"

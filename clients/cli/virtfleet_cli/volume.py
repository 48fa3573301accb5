"""`virtfleet volume`: data into volumes and out of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from virtfleet_cli.completion import complete, node_option
from virtfleet_cli.kinds import BY_NAME
from virtfleet_cli.selection import full_name
from virtfleet_cli.session import Session, pass_session


@click.group()
def volume() -> None:
    """Data into volumes and out of them."""


@contextmanager
def _bar(session: Session, what: str) -> Iterator[Callable[[int, int], None]]:
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=session.errors, disable=not session.errors.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@volume.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("name", shell_complete=complete(BY_NAME["volume"]))
@node_option()
@pass_session
def upload(session: Session, file: Path, name: str, node: str) -> None:
    """Replace the content of a volume by FILE: all of it or nothing; a broken connection is taken up again."""
    from virtfleet_client import transfer

    full = full_name(session, BY_NAME["volume"], name, node)
    with _bar(session, full) as progress:
        stored = transfer.upload(session.fleet, full, file, progress=progress)
    click.echo(f"{stored.name}: {file.stat().st_size} bytes")


@volume.command()
@click.argument("name", shell_complete=complete(BY_NAME["volume"]))
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@node_option()
@pass_session
def download(session: Session, name: str, file: Path, node: str) -> None:
    """Write the content of a volume into a new FILE."""
    from virtfleet_client import transfer

    full = full_name(session, BY_NAME["volume"], name, node)
    with _bar(session, full) as progress:
        start = transfer.download(session.fleet, full, file, progress=progress)
    click.echo(f"{file}: {start.length_bytes} bytes")

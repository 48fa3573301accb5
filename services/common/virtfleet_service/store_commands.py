"""Copies of the stores of this machine: `virtfleet store …`; imported by the command only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from virtfleet_service import backup as copies
from virtfleet_service.schema import StoreError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Copies of the stores of this machine: gateway.db, compute.db …"
)


@app.command()
def backup(
    store: Annotated[Path, typer.Argument(help="The store, in the state_dir of its service, which may run.")],
    copy: Annotated[Path, typer.Argument(help="The file to make; it must not exist.")],
) -> None:
    """Copy a store as it is now to one file, and look at the copy whole."""
    with _told():
        copies.back_up(store, copy)
        typer.echo(f"{copy}: {copy.stat().st_size} bytes")


@app.command()
def restore(
    copy: Annotated[Path, typer.Argument(help="What `backup` has made, or a NAME.before-N.")],
    store: Annotated[Path, typer.Argument(help="The store to replace. Its service must not run.")],
) -> None:
    """Put a copy in the place of a store; what was there is kept beside it."""
    with _told():
        kept = copies.restore(copy, store)
        typer.echo(f"{store} is as {copy}" + (f"; what was there is {kept}" if kept is not None else ""))


@contextmanager
def _told() -> Iterator[None]:
    """Say what is wrong with a file in a line, and end with 1."""
    try:
        yield
    except (StoreError, OSError) as error:
        sys.stderr.write(f"virtfleet: {error}\n")
        raise typer.Exit(1) from None

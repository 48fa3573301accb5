"""How resources are printed: as a table whose rows appear as they arrive, or as the API's own messages."""

from __future__ import annotations

import json
import os
import select
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, Protocol, Self

import click
from google.protobuf import json_format

from virtfleet_cli.kinds import Column, Kind

FORMATS: Final = ("table", "wide", "json", "yaml", "name")
_SAMPLE: Final = 100
"""How many rows decide how wide the columns are; later ones are cut to fit."""


@contextmanager
def while_read(end: Callable[[], object]) -> Iterator[None]:
    """End what runs for as long as somebody reads it, when nobody does any more.

    A write would tell, but in quiet times there is none. Whoever has closed the other end of a pipe is noticed at once
    by its end here.

    Args:
        end: Ends it, from another thread.
    """

    def listen() -> None:
        poll = select.poll()
        # Of these the end of the readers is told without being asked for.
        poll.register(output, 0)
        poll.register(done, select.POLLIN)
        if all(descriptor == output for descriptor, _ in poll.poll()):
            end()

    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError, AttributeError):
        # Closed, or a test's own: there is nothing to notice.
        yield
        return
    done, ended = os.pipe()
    listener = threading.Thread(target=listen, name="reader of the output", daemon=True)
    listener.start()
    try:
        yield
    finally:
        os.close(ended)
        listener.join()
        os.close(done)


class Printer(Protocol):
    """Prints resources one by one; entered around them."""

    def __enter__(self) -> Self:
        """Begin."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End."""
        ...

    def add(self, resource: Any) -> None:  # noqa: ANN401 - any resource
        """Print one."""
        ...


def printer(output: str, kind: Kind, *, one: bool = False) -> Printer:
    """Return what prints resources of a kind in a format.

    Args:
        output: The format.
        kind: The kind.
        one: Whether one resource was asked for, by its name: it is an object then, and no list of one.
    """
    if output in ("table", "wide"):
        return Table(kind, wide=output == "wide")
    if output == "name":
        return Names()
    return Documents(kind, yaml=output == "yaml", one=one)


class Names:
    """Prints full names."""

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(self, *_: object) -> None:
        """End."""

    def add(self, resource: Any) -> None:  # noqa: ANN401 - any resource
        """Print one."""
        click.echo(resource.name)


def as_document(kind: Kind, resource: Any) -> dict[str, Any]:  # noqa: ANN401 - any resource
    """Return a resource as `apply` reads it: its kind and its fields by their names in the proto."""
    return {"kind": kind.noun, **json_format.MessageToDict(resource, preserving_proto_field_name=True)}


class Documents:
    """Prints resources as YAML documents, or as one JSON object or list."""

    def __init__(self, kind: Kind, *, yaml: bool, one: bool) -> None:
        self._kind = kind
        self._yaml = yaml
        self._one = one
        self._found: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Print what there is, if nothing failed; nodes that are away keep nobody from the others."""
        if error is not None:
            from virtfleet_client import PartialList

            if not isinstance(error, PartialList):
                return
        if self._yaml:
            import yaml

            yaml.safe_dump_all(self._found, sys.stdout, sort_keys=False, allow_unicode=True)
        else:
            click.echo(json.dumps(self._found[0] if self._one and self._found else self._found, indent=2))

    def add(self, resource: Any) -> None:  # noqa: ANN401 - any resource
        """Take one."""
        self._found.append(as_document(self._kind, resource))


class Table:
    """Prints rows as they arrive; the first ones decide the widths."""

    def __init__(self, kind: Kind, *, wide: bool) -> None:
        self._kind = kind
        node = () if kind.of_fleet else (Column("NODE", lambda one: kind.node_of(one.name)),)
        name = Column("NAME", lambda one: kind.id_of(one.name))
        self._columns = [column for column in (*node, name, *kind.columns) if wide or not column.wide]
        self._waiting: list[list[str]] = []
        self._widths: list[int] = []

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Print what still waits."""
        if kind is None and not self._widths and not self._waiting:
            click.echo(f"there are no {self._kind.plural}", err=True)
        self._begin()

    def add(self, resource: Any) -> None:  # noqa: ANN401 - any resource
        """Print one, or keep it until the widths are known."""
        row = [column.value(resource) for column in self._columns]
        if self._widths:
            self._print(row)
            return
        self._waiting.append(row)
        if len(self._waiting) >= _SAMPLE:
            self._begin()

    def _begin(self) -> None:
        if not self._waiting:
            return
        rows = [[column.title for column in self._columns], *self._waiting]
        self._widths = [max(len(row[index]) for row in rows) for index in range(len(self._columns))]
        self._waiting = []
        for row in rows:
            self._print(row)

    def _print(self, row: list[str]) -> None:
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], self._widths, strict=False)]
        click.echo("  ".join([*cells, row[-1]]).rstrip())

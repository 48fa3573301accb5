"""Which resources a command is about: those that are named, those with labels, or all of a node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from virtfleet_cli.failures import sentence
from virtfleet_cli.get import label_filter, read

if TYPE_CHECKING:
    from virtfleet_cli.kinds import Kind
    from virtfleet_cli.session import Session


def find(session: Session, kind: Kind, given: str, node: str) -> Any:  # noqa: ANN401 - any resource
    """Return the one resource that a person means.

    Raises:
        VirtfleetError: There is none, or more than one.
    """
    request = kind.request("Get")
    request.name = kind.name(given, node)
    return getattr(kind.stub(session.fleet), kind.method_name("Get"))(request, timeout=session.timeout_seconds)


def full_name(session: Session, kind: Kind, given: str, node: str) -> str:
    """Return the full name of what a person means; asks the fleet where the node was left out.

    Raises:
        VirtfleetError: There is none, or more than one.
    """
    name = kind.name(given, node)
    if not name.startswith("nodes/-/"):
        return name
    found: str = find(session, kind, given, node).name
    return found


def chosen(
    session: Session, kind: Kind, names: tuple[str, ...], labels: tuple[str, ...], node: str, *, everything: bool
) -> list[str]:
    """Return the full names of what a command is about.

    Raises:
        ClickException: Nothing was said, or names and labels.
        VirtfleetError: One does not exist.
    """
    if bool(names) + bool(labels) + everything != 1:
        raise click.UsageError("say names, or labels (-l), or --all")
    if names:
        return list(dict.fromkeys(full_name(session, kind, name, node) for name in names))
    from virtfleet_client import PartialList

    found = []
    try:
        for resource in read(session.fleet, kind, (), node, label_filter(labels), session.timeout_seconds):
            found.append(resource.name)  # noqa: PERF401 - what came before the end is kept
    except PartialList as partial:
        # A node that is away does not keep a person from the others.
        click.echo(f"virtfleet: {sentence(partial)}", err=True)
    return found

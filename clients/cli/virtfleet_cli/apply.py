"""`virtfleet create`, `apply`, `edit`, `plan`: resources from files and from the command line."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from virtfleet_cli import changes
from virtfleet_cli.completion import complete, node_option
from virtfleet_cli.documents import Document, load
from virtfleet_cli.failures import EXIT_PARTIAL, exit_code, sentence
from virtfleet_cli.kinds import BY_NAME, EPILOG, Kind, KindType
from virtfleet_cli.masks import assign, value_at
from virtfleet_cli.output import as_document
from virtfleet_cli.selection import find
from virtfleet_cli.session import Session, pass_session

if TYPE_CHECKING:
    from virtfleet_client import VirtfleetError

SCOPES: Final = {"both": 0, "config": 1, "live": 2, "live-and-config": 3}

_file = click.option("-f", "--file", "files", multiple=True, required=True, metavar="FILE", help="`-`: standard input.")
_node = node_option("The node of resources that name none.")
_dry = click.option("--dry-run", is_flag=True, help="Show the plan, change nothing.")
_scope = click.option(
    "--scope",
    type=click.Choice(list(SCOPES)),
    default="both",
    show_default=True,
    help="Definition, running guest, both.",
)


def _all(files: tuple[str, ...], node: str) -> list[Document]:
    documents = [document for file in files for document in load(file, node)]
    seen: dict[str, str] = {}
    for document in documents:
        if document.name in seen:
            raise click.ClickException(f"{document.where}: {document.name} stands in {seen[document.name]} too")
        seen[document.name] = document.where
    return documents


def settle(session: Session, answer: Any) -> Any:  # noqa: ANN401 - a resource or an operation
    """Wait for an operation; what is none is returned as it is.

    Raises:
        VirtfleetError: It failed.
    """
    from google.longrunning import operations_pb2

    from virtfleet_client.errors import from_status

    if not isinstance(answer, operations_pb2.Operation):
        return answer
    if not answer.done:
        click.echo(f"  {answer.name} …", err=True)
        answer = session.fleet.finish(answer)
    if answer.HasField("error"):
        raise from_status(answer.error)
    return answer


def show(step: changes.Step) -> None:
    """Print what a document comes to."""
    click.echo(f"{step.document.name}: {step.verb}")
    for path, old, new in step.differences:
        click.echo(f"  {path}: {old or '(unset)'} → {new or '(unset)'}")


def _each(session: Session, documents: list[Document], work: Any) -> None:  # noqa: ANN401 - one of the functions below
    from virtfleet_client import VirtfleetError

    failed: list[VirtfleetError] = []
    for document in documents:
        try:
            work(session, document)
        except VirtfleetError as error:
            failed.append(error)
            click.echo(f"virtfleet: {document.where}: {document.name}: {sentence(error)}", err=True)
    if failed:
        raise click.exceptions.Exit(exit_code(failed[0]) if len(documents) == 1 else EXIT_PARTIAL)


@click.command()
@_file
@_node
@_dry
@pass_session
def create(session: Session, files: tuple[str, ...], node: str, *, dry_run: bool) -> None:
    """Create the resources of files; one that exists is an error."""

    def one(session: Session, document: Document) -> None:
        settle(session, changes.create(session, document, validate_only=dry_run))
        click.echo(f"{document.name} {'would be created' if dry_run else 'created'}")

    _each(session, _all(files, node), one)


@click.command()
@_file
@_node
@_dry
@_scope
@pass_session
def apply(session: Session, files: tuple[str, ...], node: str, scope: str, *, dry_run: bool) -> None:
    """Make resources be as files say: create what is not there, change the fields that the files name.

    Fields that a file leaves out stay as they are.
    """

    def one(session: Session, document: Document) -> None:
        step = changes.plan(session, document)
        if dry_run:
            show(step)
        if step.verb == "create":
            settle(session, changes.create(session, document, validate_only=dry_run))
        elif step.verb == "change":
            paths = [path for path, _, _ in step.differences]
            settle(session, changes.update(session, document, paths, scope=SCOPES[scope], validate_only=dry_run))
        if not dry_run:
            click.echo(
                f"{document.name} { {'create': 'created', 'change': 'changed', 'keep': 'unchanged'}[step.verb] }"
            )

    _each(session, _all(files, node), one)


@click.command(epilog=EPILOG)
@click.argument("kind", type=KindType())
@click.argument("name", shell_complete=complete(None))
@node_option()
@_scope
@pass_session
def edit(session: Session, kind: Kind, name: str, node: str, scope: str) -> None:
    """Change a resource in your editor ($VISUAL, $EDITOR); what somebody else changed meanwhile is refused."""
    import yaml

    resource = find(session, kind, name, node)
    content = {key: value for key, value in as_document(kind, resource).items() if key != "status"}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{kind.noun}.yaml"
        path.write_text(text)
        while True:
            click.edit(filename=os.fspath(path))
            if path.read_text() == text:
                click.echo("nothing was changed")
                return
            try:
                document = load(os.fspath(path))[0]
                break
            except ValueError as error:
                click.echo(f"virtfleet: {error}", err=True)
                if not click.confirm("edit again?", default=True):
                    raise click.Abort from error
    document.resource.etag, document.resource.uid = resource.etag, resource.uid
    step = changes.plan(session, document)
    paths = [path for path, _, _ in step.differences]
    # What was taken out of the file shall be unset.
    paths += [path for path in _leaves(kind, text, Path(folder)) if path not in document.paths]
    if not paths:
        click.echo("nothing was changed")
        return
    settle(session, changes.update(session, document, paths, scope=SCOPES[scope]))
    click.echo(f"{document.name} changed: {', '.join(paths)}")


def _leaves(kind: Kind, text: str, folder: Path) -> tuple[str, ...]:
    del kind
    with tempfile.TemporaryDirectory() as own:
        del folder
        path = Path(own) / "before.yaml"
        path.write_text(text)
        return load(os.fspath(path))[0].paths


@click.command()
@click.argument("name", shell_complete=complete(BY_NAME["domain"]))
@click.option(
    "--set", "settings", multiple=True, required=True, metavar="PATH=VALUE", help="spec.memory.current_bytes=2GiB"
)
@node_option()
@_scope
@pass_session
def plan(session: Session, name: str, settings: tuple[str, ...], node: str, scope: str) -> None:
    """Show what a change of a domain would do: what goes live, what waits for a start, what is refused, and why."""
    from virtfleet.compute.v1 import domain_pb2
    from virtfleet_client.errors import NotLiveUpdatable

    kind = BY_NAME["domain"]
    present = find(session, kind, name, node)
    wanted = domain_pb2.Domain(name=present.name, spec=present.spec, labels=present.labels)
    paths = []
    for setting in settings:
        path, equals, value = setting.partition("=")
        if not equals:
            raise click.ClickException(f"`{setting}`: write PATH=VALUE")
        assign(wanted, path, value)
        paths.append(path)
    document = Document(kind, present.name, wanted, tuple(paths), "--set")
    rows: list[tuple[str, ...]] = []
    try:
        answer = settle(session, changes.update(session, document, paths, scope=SCOPES[scope], validate_only=True))
    except NotLiveUpdatable as error:
        rows = [(path, _shown(present, path), _shown(wanted, path), f"refused: {error.details()}") for path in paths]
    else:
        planned = domain_pb2.Domain()
        answer.response.Unpack(planned)
        waiting = {change.path: change.message for change in planned.status.pending_changes}
        active = present.status.active
        for path in paths:
            why = next((text for at, text in waiting.items() if at == path or path.startswith(f"{at}.")), None)
            when = f"at next start: {why}" if why is not None else "live" if active else "in the definition"
            rows.append((path, _shown(present, path), _shown(wanted, path), when))
    _table(("PATH", "NOW", "THEN", "WHEN"), rows)


def _shown(resource: Any, path: str) -> str:  # noqa: ANN401 - any resource
    value = value_at(resource, path)
    return "(unset)" if value is None else str(value)


def _table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[index]) for row in (titles, *rows)) for index in range(len(titles))]
    for row in (titles, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

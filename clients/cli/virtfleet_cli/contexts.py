"""`virtfleet context`: the fleets that this user knows."""

from __future__ import annotations

from pathlib import Path

import click

from virtfleet_cli.completion import complete_from, known_contexts
from virtfleet_cli.session import Session, pass_session


@click.group()
def context() -> None:
    """The fleets that you know: list, add, use, remove."""


@context.command("list")
def list_contexts() -> None:
    """Show the contexts; the current one has a star."""
    from virtfleet_client.contexts import ContextFile

    file = ContextFile.load()
    for name, table in sorted(file.tables.items()):
        star = "*" if name == file.current else " "
        click.echo(f"{star} {name:20} {table.get('address', '')}  {table.get('cert_file', '')}".rstrip())


@context.command()
@click.argument("uri")
@click.option("--name", default="", help="What it is called; the host of the URI if left out.")
@click.option("--ca", type=click.Path(path_type=Path), help="The certificate of the fleet's authority.")
@click.option("--cert", type=click.Path(path_type=Path), help="Your certificate.")
@click.option("--key", type=click.Path(path_type=Path), help="Its key.")
@click.option("--use/--no-use", default=True, show_default=True, help="Make it the current one.")
def add(uri: str, name: str, ca: Path | None, cert: Path | None, key: Path | None, *, use: bool) -> None:
    """Add a fleet at URI: tls://host:port, unix:///path, ssh://[user@]host/path, command:program.

    Nothing is asked of it: `virtfleet version` does.
    """
    from virtfleet_client.contexts import ContextFile
    from virtfleet_client.endpoint import Endpoint

    endpoint = Endpoint.parse(uri)
    given = {"ca_file": ca, "cert_file": cert, "key_file": key}
    if endpoint.secure and not all(given.values()):
        raise click.UsageError("mutual TLS needs --ca, --cert and --key")
    for path in given.values():
        if path is not None and not path.is_file():
            raise click.ClickException(f"{path}: there is no such file")
    file = ContextFile.load()
    name = name or endpoint.target.rpartition("/")[2].partition(":")[0] or "fleet"
    file.tables[name] = {
        **file.tables.get(name, {}),
        "address": uri,
        **{field: str(path.resolve()) for field, path in given.items() if path is not None},
    }
    if use or not file.current:
        file.current = name
    file.save()
    click.echo(f"{name} added{', and in use' if file.current == name else ''}")


@context.command()
@click.argument("name", shell_complete=complete_from(known_contexts))
def use(name: str) -> None:
    """Make a context the current one."""
    from virtfleet_client.contexts import ContextFile

    file = ContextFile.load()
    file.get(name)
    file.current = name
    file.save()
    click.echo(f"{name} is in use")


@context.command()
@click.argument("name", shell_complete=complete_from(known_contexts))
def remove(name: str) -> None:
    """Forget a context; its files stay."""
    from virtfleet_client.contexts import ContextFile

    file = ContextFile.load()
    file.get(name)
    del file.tables[name]
    if file.current == name:
        file.current = ""
    file.save()
    click.echo(f"{name} removed")


@context.command()
@pass_session
def show(session: Session) -> None:
    """Show which fleet is in use, from where that is known, and who you are there."""
    from virtfleet.common.v1 import admin_pb2
    from virtfleet_client.contexts import locate

    found = locate(session.address, session.context)
    click.echo(f"{found.name or '(environment or option)'}: {found.address}")
    answer = session.fleet.access.WhoAmI(admin_pb2.WhoAmIRequest(), timeout=session.timeout_seconds)
    click.echo(f"{answer.subject}: {', '.join(answer.roles)}")

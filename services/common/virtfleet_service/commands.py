"""Make this machine a node of a fleet: `virtfleet join`; imported by the command only."""

from __future__ import annotations

import asyncio
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from virtfleet_service import enrollment, files
from virtfleet_service.errors import VirtfleetError

app = typer.Typer(add_completion=False, help="Make this machine a node of a fleet.", invoke_without_command=True)

DEFAULT_DIRECTORY = Path("/var/lib/virtfleet/identity")


@app.callback()
def join(
    gateway: Annotated[str, typer.Option(help="The enrolment port of the gateway, host:port.")],
    endpoint: Annotated[
        list[str], typer.Option(help="SERVICE=HOST:PORT: where the gateway reaches a service of this node.")
    ],
    token_file: Annotated[
        Path, typer.Option(help="Holds the join token; `-`: standard input. Never an argument: others could read it.")
    ],
    directory: Annotated[Path, typer.Option(help="Where keys and certificates are kept.")] = DEFAULT_DIRECTORY,
    label: Annotated[list[str] | None, typer.Option(help="KEY=VALUE, for a node that is new.")] = None,
) -> None:
    """Trade a join token for certificates. May be repeated after a lost answer."""
    text = _token(token_file)
    endpoints = dict(_pair(item, "endpoint") for item in endpoint)
    labels = dict(_pair(item, "label") for item in label or [])
    try:
        fleet = asyncio.run(
            enrollment.join(
                gateway,
                enrollment.JoinToken.parse(text),
                endpoints,
                directory,
                version=metadata.version("virtfleet-service"),
                labels=labels,
            )
        )
    except VirtfleetError as error:
        sys.stderr.write(f"virtfleet: {error.message} ({error.reason})\n")
        raise typer.Exit(1) from None
    typer.echo(f"nodes/{fleet.node} has joined {fleet.trust_domain}; its certificates are in {directory}")


def _token(path: Path) -> str:
    standard = str(path) == "-"
    content = files.read_from(sys.stdin.buffer, "-") if standard else files.read(path)
    if not standard and files.open_to_others(path):
        sys.stderr.write(
            f"virtfleet: {path} can be read by others, and whoever reads it first can join in the place of this node;"
            " `chmod 600` it, and delete the token at the gateway if this fails\n"
        )
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is no UTF-8") from error


def _pair(item: str, option: str) -> tuple[str, str]:
    key, equals, value = item.partition("=")
    if not equals or not key or not value:
        raise typer.BadParameter(f"--{option} {item}: write NAME=VALUE")
    return key, value

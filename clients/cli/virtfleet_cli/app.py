"""The command itself: groups of commands, its own and those that other distributions add.

A distribution adds a group by an entry point of the group `virtfleet.commands`: its name is the name on the command
line, its
value a `typer.Typer`. So a machine with the gateway has `virtfleet authority`, one with a node's services `virtfleet
join`.
"""

from __future__ import annotations

import sys
from importlib import metadata

import grpc
import typer

from virtfleet_client.errors import VirtfleetError

ENTRY_POINTS = "virtfleet.commands"

EXIT_REFUSED = 1
"""A server refused the call, or the call failed."""

EXIT_USAGE = 2
"""The command line, a file or the environment is wrong."""


def build() -> typer.Typer:
    """Return the command with every group that is installed."""
    app = typer.Typer(name="virtfleet", no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
    for entry in sorted(metadata.entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name):
        app.add_typer(entry.load(), name=entry.name)

    @app.command()
    def version() -> None:
        """Print the release of this command."""
        typer.echo(metadata.version("virtfleet-cli"))

    return app


def main() -> None:
    """Run the command line; never shows a traceback for what a server or a file says."""
    try:
        build()()
    except VirtfleetError as error:
        reason = f" ({error.reason})" if error.reason else ""
        sys.stderr.write(f"virtfleet: {error.details()}{reason}\n")
        raise SystemExit(EXIT_REFUSED) from None
    except grpc.RpcError as error:
        sys.stderr.write(f"virtfleet: {error}\n")
        raise SystemExit(EXIT_REFUSED) from None
    except KeyError as error:
        sys.stderr.write(f"virtfleet: {error.args[0]} is not set; `. .run/fleet.env` sets it for a development fleet\n")
        raise SystemExit(EXIT_USAGE) from None
    except (OSError, ValueError) as error:
        sys.stderr.write(f"virtfleet: {error}\n")
        raise SystemExit(EXIT_USAGE) from None

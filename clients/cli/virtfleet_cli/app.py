"""The command itself: its groups and what holds for all of them.

A command is imported when it is called, not before: `virtfleet --help` imports none. A distribution adds a group by an
entry point of the group `virtfleet.commands`: its name is the name on the command line, its value a `click.Command` or
a `typer.Typer`. So a machine with the gateway has `virtfleet authority`, one with a node's services `virtfleet join`,
one with the fake fleet `virtfleet fake`.
"""

from __future__ import annotations

import difflib
import importlib
import io
import os
import sys
from typing import TYPE_CHECKING, Any, Final

import click

from virtfleet_cli.completion import complete_from, known_contexts
from virtfleet_cli.seconds import Seconds
from virtfleet_cli.session import Session

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINTS: Final = "virtfleet.commands"

COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "api": ("virtfleet_cli.api:api", "Call any method of the API, with JSON."),
    "apply": ("virtfleet_cli.apply:apply", "Make resources be as files say."),
    "completion": ("virtfleet_cli.completion:completion", "Print the completion of a shell."),
    "console": ("virtfleet_cli.console:console", "Join a guest's console; ^] leaves."),
    "context": ("virtfleet_cli.contexts:context", "The fleets that you know."),
    "create": ("virtfleet_cli.apply:create", "Create the resources of files."),
    "delete": ("virtfleet_cli.delete:delete", "Delete resources."),
    "describe": ("virtfleet_cli.describe:describe", "Show all of a resource, and its last events."),
    "edit": ("virtfleet_cli.apply:edit", "Change a resource in your editor."),
    "events": ("virtfleet_cli.events:events", "Show what has happened, and what happens."),
    "explain": ("virtfleet_cli.explain:explain", "Explain the reason of an error, or a field."),
    "get": ("virtfleet_cli.get:get", "Show resources of a kind, or some of them by name."),
    "logs": ("virtfleet_cli.logs:logs", "Print what a guest has written to its console."),
    "node": ("virtfleet_cli.node:app", "Nodes of the fleet."),
    "operation": ("virtfleet_cli.operation:operation", "Work that lasts: list, wait, cancel."),
    "plan": ("virtfleet_cli.apply:plan", "Show what a change of a domain would do."),
    "proxy": ("virtfleet_cli.proxy:proxy", "A unix socket for any transport."),
    "reboot": ("virtfleet_cli.verbs:reboot", "Ask domains to boot again."),
    "reset": ("virtfleet_cli.verbs:reset", "Reset domains at once."),
    "resume": ("virtfleet_cli.verbs:resume", "Let paused domains go on."),
    "start": ("virtfleet_cli.verbs:start", "Start domains, networks, pools."),
    "stats": ("virtfleet_cli.stats:stats", "Show all counters of a domain."),
    "stop": ("virtfleet_cli.verbs:stop", "Stop domains (ask, wait, then force), networks, pools."),
    "suspend": ("virtfleet_cli.verbs:suspend", "Pause domains."),
    "top": ("virtfleet_cli.stats:top", "Show what domains use, busiest first."),
    "version": ("virtfleet_cli.version:version", "Show the releases of this command, the gateway and the nodes."),
    "volume": ("virtfleet_cli.volume:volume", "Data into volumes and out of them."),
    "watch": ("virtfleet_cli.watch:watch", "Show every change of resources as it happens."),
}
"""Our own commands: where each is, and what it does in one line."""


class Commands(click.Group):
    """Is the root: it knows its commands by name and imports one when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        del ctx
        return sorted({*COMMANDS, *_others()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command, imported now."""
        del ctx
        own = COMMANDS.get(cmd_name)
        if own is not None:
            module, _, attribute = own[0].partition(":")
            return as_command(getattr(importlib.import_module(module), attribute), cmd_name)
        other = _others().get(cmd_name)
        return as_command(other.load(), cmd_name) if other is not None else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that is called.

        Raises:
            UsageError: There is none of that name.
        """
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), 2)
            hint = f"; did you mean `{'` or `'.join(near)}`?" if near else "; `virtfleet --help` lists them"
            raise click.UsageError(f"there is no command `{args[0]}`{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        others = _others()
        rows = [
            (name, COMMANDS[name][1] if name in COMMANDS else summary(others[name])) for name in self.list_commands(ctx)
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _others() -> dict[str, EntryPoint]:
    from importlib import metadata

    return {entry.name: entry for entry in metadata.entry_points(group=ENTRY_POINTS)}


def summary(entry: EntryPoint) -> str:
    """Return what a command of another distribution does: the first line of its module, which is not imported."""
    from importlib.util import find_spec

    spec = find_spec(entry.module)
    if spec is None or spec.origin is None:
        return ""
    with open(spec.origin, encoding="utf-8") as source:  # noqa: PTH123 - pathlib costs the start 10 ms
        line = source.readline().strip().removeprefix('"""').removesuffix('"""')
    return line.partition(": ")[0].rstrip(".") + "."


def as_command(found: Any, name: str) -> click.Command:  # noqa: ANN401 - a click or a typer command
    """Return a command of either library as click's; Typer has a click of its own, which reads the rest of the line."""
    if isinstance(found, click.Command):
        found.name = name
        return found

    @click.command(name, add_help_option=False, context_settings={"ignore_unknown_options": True})
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def typed(arguments: tuple[str, ...]) -> None:
        found(args=list(arguments), prog_name=f"virtfleet {name}")

    return typed


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option(
    "-c",
    "--context",
    default="",
    metavar="NAME",
    help="Which fleet, as `virtfleet context list` shows them.",
    shell_complete=complete_from(known_contexts),
)
@click.option("--address", default="", metavar="URI", help="Where the fleet is, instead of a context.")
@click.option("-v", "--verbose", is_flag=True, help="Show the whole status of an error as it came over the wire.")
@click.option("--no-color", is_flag=True, help="No colours; NO_COLOR does the same.")
@click.option(
    "--timeout",
    type=Seconds(0.001),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long one call may take.",
)
@click.pass_context
def root(ctx: click.Context, context: str, address: str, *, verbose: bool, no_color: bool, timeout: float) -> None:
    """Manage virtual machines, containers, storage and networks of a fleet."""
    ctx.obj = Session(context=context, address=address, verbose=verbose, colour=not no_color, timeout_seconds=timeout)
    ctx.call_on_close(ctx.obj.close)


def main() -> None:
    """Run the command line; never shows a traceback for what a server, a file or a person says."""
    from virtfleet_cli.failures import run

    for stream in (sys.stdout, sys.stderr):
        # None where it is closed. What the encoding has not (`…`, a name in another script) must not fail.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    # gRPC's own lines about failed connections: what failed is in the error.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    sys.exit(run(root, sys.argv[1:]))

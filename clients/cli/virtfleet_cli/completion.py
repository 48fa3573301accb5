"""`virtfleet completion`, and the names of resources that a shell may complete with."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

import click
from click.shell_completion import CompletionItem

from virtfleet_cli.kinds import BY_NAME, Kind

if TYPE_CHECKING:
    from virtfleet_cli.session import Session

_SECONDS: Final = 2.0
"""How long a shell waits for names."""
_LIMIT: Final = 200

SHELLS: Final = ("bash", "zsh", "fish")


def complete(kind: Kind | None) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """Return what completes names of a kind from the fleet; None: the kind is the argument before."""

    def names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        del param
        wanted = kind if kind is not None else ctx.params.get("kind")
        if not isinstance(wanted, Kind):
            return []
        try:
            return [CompletionItem(name) for name in known(_session(ctx), wanted, incomplete)]
        except Exception:  # noqa: BLE001 - a shell that completes must not be told of errors in between
            return []

    return names


def node_option(help_: str = "The node, where the name does not say.") -> Callable[[Any], Any]:
    """Return the option `--node`, which completes the nodes of the fleet."""
    return click.option(
        "-n", "--node", default="", metavar="NODE", help=help_, shell_complete=complete(BY_NAME["node"])
    )


def complete_from(words: Callable[[], Iterable[str]]) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Return what completes words that need no fleet; their letters may be of either case."""

    def found(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
        del ctx, param
        try:
            return sorted(word for word in words() if word.lower().startswith(incomplete.lower()))
        except Exception:  # noqa: BLE001 - as above
            return []

    return found


def known_contexts() -> Iterable[str]:
    """Return the names of the contexts."""
    from virtfleet_client.contexts import ContextFile

    return ContextFile.load().tables


def _session(ctx: click.Context) -> Session:
    from virtfleet_cli.session import Session

    top = ctx.find_root().params
    return Session(
        context=top.get("context") or "",
        address=top.get("address") or "",
        verbose=False,
        colour=False,
        timeout_seconds=_SECONDS,
    )


def known(session: Session, kind: Kind, incomplete: str) -> list[str]:
    """Return the short names of a kind that begin with what has been typed, as `NODE/NAME` or `NAME`."""
    from virtfleet_cli.get import read
    from virtfleet_client import PartialList

    started, found = time.monotonic(), []
    # A node that is away takes none of the other names away.
    with contextlib.suppress(PartialList):
        for resource in read(session.fleet, kind, (), "", "", _SECONDS):
            id_, node = kind.id_of(resource.name), kind.node_of(resource.name)
            full = f"{node}/{id_}" if node else id_
            found += [name for name in (full, id_) if name.startswith(incomplete)][:1]
            if len(found) >= _LIMIT or time.monotonic() - started > _SECONDS:
                break
    session.close()
    return found


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion of a SHELL; names of resources come from the fleet.

    bash: into ~/.local/share/bash-completion/completions/virtfleet · zsh: into a file `_virtfleet` on your fpath ·
    fish: into ~/.config/fish/completions/virtfleet.fish
    """
    from click.shell_completion import get_completion_class

    found: Any = get_completion_class(shell)
    if found is None:
        raise click.ClickException(f"there is no completion for {shell}")
    click.echo(found(ctx.find_root().command, {}, "virtfleet", "_VIRTFLEET_COMPLETE").source())

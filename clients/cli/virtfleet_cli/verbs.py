"""`virtfleet start`, `stop`, `reboot`, `reset`, `suspend`, `resume`: one verb on many domains at once.

Networks and pools start and stop too: `networks/lan`, `pools/images`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import click

from virtfleet_cli.completion import complete, node_option
from virtfleet_cli.kinds import BY_NAME, Kind
from virtfleet_cli.seconds import Seconds
from virtfleet_cli.selection import chosen
from virtfleet_cli.session import Session, pass_session
from virtfleet_cli.work import Crew

if TYPE_CHECKING:
    from google.protobuf.message import Message

DOMAIN: Final = BY_NAME["domain"]
_IN_ORDER: Final = (BY_NAME["pool"], BY_NAME["network"], DOMAIN)
"""What starts, in the order in which one needs the other."""


def _options(command: Callable[..., None]) -> Callable[..., None]:
    for decorate in reversed(
        (
            click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=complete(DOMAIN)),
            click.option("-l", "--label", "labels", multiple=True, metavar="KEY=VALUE", help="All with it."),
            click.option("--all", "everything", is_flag=True, help="All (of --node, or of the fleet)."),
            node_option("Of this node."),
            click.option("--wait/--no-wait", default=True, show_default=True, help="Wait for the end."),
            click.option("--cancel", is_flag=True, help="Ctrl-C cancels what runs; else it goes on."),
        )
    ):
        command = decorate(command)
    return command


def _run(
    session: Session,
    method: str,
    done: str,
    request: Callable[[str], Message],
    chosen_: dict[str, Any],
    kind: Kind = DOMAIN,
) -> None:
    names = chosen(
        session, kind, chosen_["names"], chosen_["labels"], chosen_["node"], everything=chosen_["everything"]
    )
    stub = kind.stub(session.fleet)
    crew = Crew(session, done, wait=chosen_["wait"], cancel=chosen_["cancel"])
    crew.run(names, lambda name: getattr(stub, method)(request(name), timeout=session.timeout_seconds))


def kind_of(name: str) -> tuple[Kind, str]:
    """Return the kind that a name says, and the name as that kind has it; one that says none is a domain's."""
    parts = name.split("/")
    if parts[0] == "nodes" and len(parts) > 3:
        return next((kind for kind in _IN_ORDER if kind.collection == (parts[2],)), DOMAIN), name
    kind = BY_NAME.get(parts[0])
    if kind in _IN_ORDER and len(parts) > 1:
        return kind, "/".join(parts[1:])
    return DOMAIN, name


def _run_each(
    session: Session,
    done: str,
    kinds: tuple[Kind, ...],
    calls: Callable[[Kind], tuple[str, Callable[[str], Message]]],
    chosen_: dict[str, Any],
) -> None:
    """Run a verb that more kinds than domains have, kind by kind.

    Args:
        session: The session.
        done: What a success is called.
        kinds: The kinds, in order.
        calls: Returns the method for a kind and what makes its request.
        chosen_: The common options.

    Raises:
        UsageError: A kind does not have an option that was given.
    """
    named: dict[Kind, list[str]] = {}
    for name in chosen_["names"]:
        kind, own = kind_of(name)
        named.setdefault(kind, []).append(own)
    if not named:
        named[DOMAIN] = []
    work = [(kind, *calls(kind), named[kind]) for kind in kinds if kind in named]
    for kind, method, request, names in work:
        _run(session, method, done, request, {**chosen_, "names": tuple(names)}, kind)


@click.command()
@_options
@click.option("--paused", is_flag=True, help="Leave a domain paused before its first instruction.")
@pass_session
def start(session: Session, /, *, paused: bool, **chosen_: Any) -> None:  # noqa: ANN401 - the common options
    """Start domains; also networks and pools, named as `networks/lan` and `pools/images`."""

    def calls(kind: Kind) -> tuple[str, Callable[[str], Message]]:
        made = kind.request("Start")
        if kind is DOMAIN:
            made.paused = paused
        elif paused:
            raise click.UsageError(f"a {kind.noun} is not started --paused")
        return kind.method_name("Start"), lambda name: _named(made, name)

    _run_each(session, "started", _IN_ORDER, calls, chosen_)


def _named(request: Message, name: str) -> Message:
    made = type(request)()
    made.CopyFrom(request)
    made.name = name  # type: ignore[attr-defined]  # of every such request
    return made


@click.command()
@_options
@click.option("--force", is_flag=True, help="End it at once, as by pulling the plug; a network: with guests on it.")
@click.option("--graceful", is_flag=True, help="Ask only; leave it running if it does not comply.")
@click.option("--grace", type=Seconds(), metavar="SECONDS", help="How long it is given.")
@pass_session
def stop(session: Session, /, *, force: bool, graceful: bool, grace: float | None, **chosen_: Any) -> None:  # noqa: ANN401 - the common options
    """Stop domains: ask, wait, then force; also networks and pools, named as `networks/lan` and `pools/images`."""
    if force and graceful:
        raise click.UsageError("--force and --graceful exclude each other")

    def calls(kind: Kind) -> tuple[str, Callable[[str], Message]]:
        made = kind.request("Stop")
        if kind is DOMAIN:
            messages = kind.messages
            made.mode = messages.STOP_MODE_FORCE if force else messages.STOP_MODE_GRACEFUL if graceful else 0
            if grace is not None:
                made.grace_period.FromNanoseconds(round(grace * 1e9))
        elif graceful or grace is not None:
            raise click.UsageError(f"a {kind.noun} knows no --graceful and no --grace")
        elif force and "force" not in made.DESCRIPTOR.fields_by_name:
            raise click.UsageError(f"a {kind.noun} knows no --force")
        elif force:
            made.force = True
        return kind.method_name("Stop"), lambda name: _named(made, name)

    _run_each(session, "stopped", _IN_ORDER[::-1], calls, chosen_)


def _plain(verb: str, done: str, text: str) -> click.Command:
    """Make the command of a verb without options of its own."""

    @click.command(verb, help=text)
    @_options
    @pass_session
    def command(session: Session, /, **chosen_: Any) -> None:  # noqa: ANN401 - the common options
        request = getattr(DOMAIN.messages, f"{verb.capitalize()}DomainRequest")
        _run(session, f"{verb.capitalize()}Domain", done, lambda name: request(name=name), chosen_)

    return command


reboot = _plain("reboot", "rebooted", "Ask domains to boot again.")
reset = _plain("reset", "reset", "Reset domains at once, without asking the guest.")
suspend = _plain("suspend", "suspended", "Pause domains; their memory stays.")
resume = _plain("resume", "resumed", "Let paused domains go on.")

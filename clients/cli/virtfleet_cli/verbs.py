"""`virtfleet start`, `stop`, `reboot`, `reset`, `suspend`, `resume`: one verb on many domains at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import click

from virtfleet_cli.completion import complete, node_option
from virtfleet_cli.kinds import BY_NAME
from virtfleet_cli.seconds import Seconds
from virtfleet_cli.selection import chosen
from virtfleet_cli.session import Session, pass_session
from virtfleet_cli.work import Crew

if TYPE_CHECKING:
    from google.protobuf.message import Message

DOMAIN: Final = BY_NAME["domain"]


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


def _run(session: Session, method: str, done: str, request: Callable[[str], Message], chosen_: dict[str, Any]) -> None:
    names = chosen(
        session, DOMAIN, chosen_["names"], chosen_["labels"], chosen_["node"], everything=chosen_["everything"]
    )
    stub = DOMAIN.stub(session.fleet)
    crew = Crew(session, done, wait=chosen_["wait"], cancel=chosen_["cancel"])
    crew.run(names, lambda name: getattr(stub, method)(request(name), timeout=session.timeout_seconds))


@click.command()
@_options
@click.option("--paused", is_flag=True, help="Leave it paused before its first instruction.")
@pass_session
def start(session: Session, /, *, paused: bool, **chosen_: Any) -> None:  # noqa: ANN401 - the common options
    """Start domains."""
    request = DOMAIN.messages.StartDomainRequest
    _run(session, "StartDomain", "started", lambda name: request(name=name, paused=paused), chosen_)


@click.command()
@_options
@click.option("--force", is_flag=True, help="End it at once, as by pulling the plug.")
@click.option("--graceful", is_flag=True, help="Ask only; leave it running if it does not comply.")
@click.option("--grace", type=Seconds(), metavar="SECONDS", help="How long it is given.")
@pass_session
def stop(session: Session, /, *, force: bool, graceful: bool, grace: float | None, **chosen_: Any) -> None:  # noqa: ANN401 - the common options
    """Stop domains: ask, wait, then force."""
    if force and graceful:
        raise click.UsageError("--force and --graceful exclude each other")
    messages = DOMAIN.messages
    mode = messages.STOP_MODE_FORCE if force else messages.STOP_MODE_GRACEFUL if graceful else 0

    def request(name: str) -> Message:
        made = messages.StopDomainRequest(name=name, mode=mode)
        if grace is not None:
            made.grace_period.FromNanoseconds(round(grace * 1e9))
        return made  # type: ignore[no-any-return] # a generated message

    _run(session, "StopDomain", "stopped", request, chosen_)


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

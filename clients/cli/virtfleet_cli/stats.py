"""`virtfleet stats` and `top`: what domains use."""

from __future__ import annotations

import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final

import click

from virtfleet_cli.completion import complete, node_option
from virtfleet_cli.kinds import BY_NAME, age, bytes_text
from virtfleet_cli.screen import cut, fitted, screen
from virtfleet_cli.seconds import Seconds
from virtfleet_cli.selection import find, full_name
from virtfleet_cli.session import Session, pass_session

_BLOCKS: Final = "▁▂▃▄▅▆▇█"
_HISTORY: Final = 20
_FIRST_SECONDS: Final = 0.5
_TITLES: Final = ("DOMAIN", "CPU %", "", "MEMORY", "DISK/s", "NET/s")


@click.command()
@click.argument("name", shell_complete=complete(BY_NAME["domain"]))
@node_option()
@pass_session
def stats(session: Session, name: str, node: str) -> None:
    """Show all counters of a domain."""
    import yaml
    from google.protobuf import json_format

    from virtfleet.compute.v1 import stats_pb2

    request = stats_pb2.GetDomainStatsRequest(name=full_name(session, BY_NAME["domain"], name, node))
    answer = session.fleet.stats.GetDomainStats(request, timeout=session.timeout_seconds)
    document = json_format.MessageToDict(answer, preserving_proto_field_name=True)
    click.echo(yaml.safe_dump(document, sort_keys=False), nl=False)


class Usage:
    """Makes rates out of the counters of one domain."""

    def __init__(self) -> None:
        self._before: tuple[float, float, int, int] | None = None
        self.cpu: deque[float] = deque(maxlen=_HISTORY)
        self.memory_bytes = 0
        self.disk_rate = 0.0
        self.network_rate = 0.0

    def take(self, answer: Any) -> None:  # noqa: ANN401 - DomainStats
        """Take the next round."""
        at = answer.observe_time.ToNanoseconds() / 1e9
        cpu = answer.cpu.total_time.ToNanoseconds() / 1e9
        disk = sum(one.read_bytes + one.write_bytes for one in answer.disks)
        network = sum(one.receive_bytes + one.transmit_bytes for one in answer.interfaces)
        self.memory_bytes = answer.balloon.current_bytes
        if self._before is not None:
            seconds = at - self._before[0]
            if seconds > 0:
                self.cpu.append(max(0.0, (cpu - self._before[1]) / seconds * 100))
                self.disk_rate = max(0.0, (disk - self._before[2]) / seconds)
                self.network_rate = max(0.0, (network - self._before[3]) / seconds)
        self._before = (at, cpu, disk, network)

    @property
    def percent(self) -> float:
        """The processor time of the last interval; 100: one processor all the time."""
        return self.cpu[-1] if self.cpu else 0.0


def sparkline(values: deque[float]) -> str:
    """Return values as a line of blocks."""
    highest = max(values, default=0.0) or 1.0
    return "".join(_BLOCKS[min(len(_BLOCKS) - 1, int(value / highest * (len(_BLOCKS) - 1)))] for value in values)


class Absence:
    """Knows which nodes have nothing to tell because they are away, and when they were last seen.

    Args:
        session: The session.

    Attributes:
        line: It in one line; empty: none is away.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._seen: dict[str, Any] = {}
        self.line = ""

    def take(self, nodes: Iterable[str]) -> None:
        """Take the names of the nodes that are away in this round; each is asked about once."""
        names = sorted(nodes)
        self._seen = {name: self._seen[name] if name in self._seen else self._last_seen(name) for name in names}
        told = (
            name.removeprefix("nodes/") + (f" {age(time)} ago" if time is not None and age(time) else "")
            for name, time in self._seen.items()
        )
        self.line = f"{len(names)} away, last seen: {', '.join(told)}" if names else ""

    def _last_seen(self, name: str) -> Any:  # noqa: ANN401 - a Timestamp, or None
        from virtfleet_client import VirtfleetError

        try:
            return find(self._session, BY_NAME["node"], name, "").status.last_seen_time
        except VirtfleetError:
            # Who may see domains need not be one who may see nodes. That it is away is known all the same.
            return None


def read(session: Session, node: str, absence: Absence) -> dict[str, Any]:
    """Return the stats of all domains, and note which nodes do not tell theirs."""
    from virtfleet.compute.v1 import stats_pb2
    from virtfleet_client import PartialList

    request = stats_pb2.BatchGetDomainStatsRequest(parent=f"nodes/{node or '-'}", page_size=1000)
    found = session.fleet.pages(
        session.fleet.stats.BatchGetDomainStats, request, timeout_seconds=session.timeout_seconds
    )
    answers = {}
    missing: list[str] = []
    try:
        for one in found:
            if not one.HasField("failure"):
                answers[one.name] = one
    except PartialList as partial:
        # What there is is shown.
        missing = [failure.node for failure in partial.failures]
    absence.take(missing)
    return answers


@click.command()
@node_option()
@click.option(
    "--interval",
    type=Seconds(0.1),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="From one round to the next.",
)
@click.option(
    "--count", type=click.IntRange(0), default=0, metavar="N", help="End after so many rounds; 0: go on until Ctrl-C."
)
@click.option(
    "--sort", type=click.Choice(("cpu", "memory", "disk", "network", "name")), default="cpu", show_default=True
)
@pass_session
def top(session: Session, node: str, interval: float, count: int, sort: str) -> None:
    """Show what domains use, busiest first, again and again, and which nodes are away.

    On a terminal it has the whole of it, until Ctrl-C; elsewhere, and with --count, the tables follow each other.
    """
    usages: dict[str, Usage] = {}
    absence = Absence(session)
    with screen(session, whole=not count) as display:
        for number in itertools.count():
            started = time.monotonic()
            answers = read(session, node, absence)
            usages = {name: usages.get(name) or Usage() for name in answers}
            for name, answer in answers.items():
                usages[name].take(answer)
            if not number:
                # Rates need two looks at the counters; nobody shall wait long for the first of them.
                display.pause(min(interval, _FIRST_SECONDS))
                continue
            display.show(functools.partial(_lines, _rows(usages, sort), absence.line))
            if number == count:
                return
            display.pause(max(0.1, interval - (time.monotonic() - started)))


def _lines(rows: list[tuple[str, ...]], away: str, columns: int, height: int) -> list[str]:
    """Return the table for a window, the busiest first, with the nodes that are away in its last line."""
    room = max(1, height - 1 - bool(away)) if height else len(rows)
    found = fitted(_TITLES, rows[:room], columns, right=(1, 3, 4, 5), dispensable=(2, 5, 4, 3, 1))
    return [*found, *([cut(away, columns)] if away else [])]


def _rows(usages: dict[str, Usage], sort: str) -> list[tuple[str, ...]]:
    keys: dict[str, Callable[[tuple[str, Usage]], Any]] = {
        "cpu": lambda item: -item[1].percent,
        "memory": lambda item: -item[1].memory_bytes,
        "disk": lambda item: -item[1].disk_rate,
        "network": lambda item: -item[1].network_rate,
        "name": lambda item: item[0],
    }
    return [
        (
            name.removeprefix("nodes/").replace("/domains/", "/"),
            f"{usage.percent:.0f}",
            sparkline(usage.cpu),
            bytes_text(usage.memory_bytes),
            bytes_text(int(usage.disk_rate)),
            bytes_text(int(usage.network_rate)),
        )
        for name, usage in sorted(usages.items(), key=keys[sort])
    ]

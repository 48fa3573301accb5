"""`virtfleet stats` and `top`: what domains use."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, Final

import click

from virtfleet_cli.completion import complete
from virtfleet_cli.kinds import BY_NAME, bytes_text
from virtfleet_cli.selection import full_name
from virtfleet_cli.session import Session, pass_session

_BLOCKS: Final = "▁▂▃▄▅▆▇█"
_HISTORY: Final = 20


@click.command()
@click.argument("name", shell_complete=complete(BY_NAME["domain"]))
@click.option("-n", "--node", default="", metavar="NODE")
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


def rounds(session: Session, node: str, interval_seconds: float) -> Iterator[dict[str, Any]]:
    """Yield the stats of all domains, round by round."""
    from virtfleet.compute.v1 import stats_pb2
    from virtfleet_client import PartialList

    request = stats_pb2.BatchGetDomainStatsRequest(parent=f"nodes/{node or '-'}", page_size=1000)
    pause = threading.Event()
    while True:
        started = time.monotonic()
        found = session.fleet.pages(
            session.fleet.stats.BatchGetDomainStats, request, timeout_seconds=session.timeout_seconds
        )
        answers = {}
        # What is there is shown: the domains of a node that is away are not.
        with contextlib.suppress(PartialList):
            for one in found:
                if not one.HasField("failure"):
                    answers[one.name] = one
        yield answers
        # Nothing sets it: a pause that Ctrl-C ends.
        pause.wait(max(0.1, interval_seconds - (time.monotonic() - started)))


@click.command()
@click.option("-n", "--node", default="", metavar="NODE")
@click.option("--interval", default=2.0, show_default=True, metavar="SECONDS")
@click.option("--count", default=0, metavar="N", help="End after so many rounds; 0: go on until Ctrl-C.")
@click.option(
    "--sort", type=click.Choice(("cpu", "memory", "disk", "network", "name")), default="cpu", show_default=True
)
@pass_session
def top(session: Session, node: str, interval: float, count: int, sort: str) -> None:
    """Show what domains use, busiest first, again and again."""
    from rich.live import Live

    usages: dict[str, Usage] = {}
    live = Live(console=session.console, screen=session.interactive and not count, auto_refresh=False)
    with live:
        for number, answers in enumerate(rounds(session, node, interval), start=1):
            usages = {name: usages.get(name) or Usage() for name in answers}
            for name, answer in answers.items():
                usages[name].take(answer)
            # The first round only has counters; rates need two.
            if number > 1 or count == 1:
                live.update(_table(usages, sort, session.console.height if session.interactive else 0), refresh=True)
            if count and number > count:
                return


def _table(usages: dict[str, Usage], sort: str, height: int) -> Any:  # noqa: ANN401 - a rich table
    from rich.table import Table

    keys = {
        "cpu": lambda item: -item[1].percent,
        "memory": lambda item: -item[1].memory_bytes,
        "disk": lambda item: -item[1].disk_rate,
        "network": lambda item: -item[1].network_rate,
        "name": lambda item: item[0],
    }
    table = Table(box=None, pad_edge=False)
    for title in ("DOMAIN", "CPU %", "", "MEMORY", "DISK/s", "NET/s"):
        table.add_column(title, justify="left" if title in ("DOMAIN", "") else "right")
    rows = sorted(usages.items(), key=keys[sort])
    for name, usage in rows[: height - 3] if height > 4 else rows:
        table.add_row(
            name.removeprefix("nodes/").replace("/domains/", "/"),
            f"{usage.percent:.0f}",
            sparkline(usage.cpu),
            bytes_text(usage.memory_bytes),
            bytes_text(int(usage.disk_rate)),
            bytes_text(int(usage.network_rate)),
        )
    return table

"""A fleet in one process, for tests of controllers: `virtfleet fake`."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import json
import os
import re
import signal
import sys
import threading
from pathlib import Path
from typing import Literal

import click

from virtfleet.fake.v1 import fake_pb2
from virtfleet_fake import control, fleet
from virtfleet_fake.clock import MovableLoop
from virtfleet_service import logs
from virtfleet_service.errors import VirtfleetError
from virtfleet_service.server import raise_descriptor_limit
from virtfleet_service.settings import SettingsError

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m)")
_M_ARENA_MAX = -8
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0}


def parse_fault(text: str) -> fake_pb2.Fault:
    """Read a fault as the command line has it.

    `n7=freeze` · `n9=latency:300ms` · `n3=away` · `n2=error:HYPERVISOR_FAILED:DomainService.StartDomain`; without a
    node (`=freeze`) it strikes the connections of clients.

    Raises:
        ValueError: It has another form.
    """
    node, equals, rest = text.partition("=")
    kind, _, value = rest.partition(":")
    fault = fake_pb2.Fault(node=node)
    duration = _DURATION.fullmatch(value)
    if not equals:
        raise ValueError(f"`{text}` is no fault: NODE=freeze, NODE=away, NODE=latency:300ms or NODE=error:REASON")
    if kind == "freeze" and not value:
        fault.freeze.SetInParent()
    elif kind == "away" and not value:
        fault.away.SetInParent()
    elif kind == "latency" and duration:
        fault.latency.delay.FromNanoseconds(round(float(duration[1]) * _UNITS[duration[2]] * 1e9))
    elif kind == "error" and value:
        fault.error.reason, _, fault.error.method_pattern = value.partition(":")
    else:
        raise ValueError(f"`{text}` is no fault: NODE=freeze, NODE=away, NODE=latency:300ms or NODE=error:REASON")
    return fault


@click.command("fake")
@click.option("--nodes", type=click.IntRange(1, 1000), default=1, show_default=True, help="How many nodes: n1, n2, …")
@click.option(
    "--domains",
    type=click.IntRange(0, 100_000),
    default=0,
    show_default=True,
    help="How many running domains each node has.",
)
@click.option(
    "--seed-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The domains of each node instead: TOML or JSON.",
)
@click.option(
    "--fault",
    "faults",
    multiple=True,
    metavar="FAULT",
    help="n7=freeze, n9=latency:300ms, n3=away, n2=error:REASON[:METHOD]; may be given again.",
)
@click.option(
    "--listen",
    default="127.0.0.1:0",
    show_default=True,
    metavar="ADDRESS",
    help="Where clients connect, host:port; port 0: a free one.",
)
@click.option(
    "--control-listen", default="127.0.0.1:0", show_default=True, metavar="ADDRESS", help="Where FakeService listens."
)
@click.option("--until-eof", is_flag=True, help="End when standard input ends.")
def app(
    *,
    nodes: int,
    domains: int,
    seed_file: Path | None,
    faults: tuple[str, ...],
    listen: str,
    control_listen: str,
    until_eof: bool,
) -> None:
    """Run a fake fleet until SIGTERM or Ctrl-C.

    Prints one line of JSON when every node is ready: address, control_address, nodes, and the certificate files of an
    administrator (ca_file, cert_file, key_file) with those of an operator and a viewer beside them.
    """
    found = [parse_fault(text) for text in faults]
    plan = fleet.Plan(nodes=nodes, domains=domains, seed_file=seed_file, listen=listen)
    logs.configure("fake", "", "warning")
    raise_descriptor_limit()
    _share_arenas()
    try:
        with asyncio.Runner(loop_factory=MovableLoop) as runner:
            runner.run(_run(plan, found, control_listen, until_eof=until_eof))
    except SettingsError as error:
        raise ValueError(str(error)) from error
    except VirtfleetError as error:
        raise ValueError(f"{error.message} ({error.reason})") from error


def _share_arenas() -> None:
    """Have the threads of the stores share two arenas of the C library: one each would take most of the memory."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


async def _run(plan: fleet.Plan, faults: list[fake_pb2.Fault], control_listen: str, *, until_eof: bool) -> None:
    # Nothing that a start makes is garbage: looking for it again and again would take a tenth of the time.
    gc.disable()
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with fleet.running(plan, faults) as running, control.serving(running, control_listen) as control_address:
        ready = {"address": running.address, "control_address": control_address, **running.files()}
        ready["nodes"] = ",".join(running.nodes)
        gc.freeze()
        gc.enable()
        sys.stdout.write(f"{json.dumps(ready)}\n")
        sys.stdout.flush()
        async with asyncio.TaskGroup() as group:
            waiting = [group.create_task(stop.wait())]
            if until_eof:
                waiting.append(group.create_task(_end_of_input()))
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in waiting:
                task.cancel()


async def _end_of_input() -> Literal[True]:
    """Wait for the end of standard input, whatever it is: an event loop cannot wait for a file or /dev/null."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def read() -> None:
        # An input that cannot be read, or is none, has ended.
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        # The loop may have ended first.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=read, daemon=True).start()
    return await ended.wait()

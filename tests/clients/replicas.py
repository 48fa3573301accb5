"""What the example controller of every client must do on a real fleet, whatever it is written in."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.fleet.rig import delete, kill, until
from virtfleet.compute.v1 import domain_pb2
from virtfleet_client import Fleet

TEMPLATE = '{"spec": {"driver": "test", "memory": {"maximumBytes": "67108864"}}}'


@contextmanager
def running(command: list[str], environment: dict[str, str], output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program for the length of a `with` block."""
    with output.open("wb") as sink:
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=sink, stderr=sink)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def group(fleet: Fleet, name: str, *, running: bool = False) -> list[domain_pb2.Domain]:
    """Return the domains that a controller keeps under a name."""
    request = domain_pb2.ListDomainsRequest(
        parent="nodes/-", filter=f'labels."replicas.example/group"="{name}"', allow_stale=True
    )
    found = list(fleet.pages(fleet.domains.ListDomains, request))
    return [one for one in found if not running or one.status.state == domain_pb2.DOMAIN_STATE_RUNNING]


def keeps_its_count(
    fleet: Fleet, run_folder: Path, command: list[str], name: str, environment: dict[str, str], output: Path
) -> int:
    """Hold a controller of four domains to its task: spread, a death, a killed gateway; returns its exit code.

    Args:
        fleet: The fleet, of the nodes n1 and n2.
        run_folder: Its pid files.
        command: Starts the controller.
        name: The group that it keeps.
        environment: Leads it to the fleet.
        output: What it prints goes there.
    """

    def settled() -> bool:
        return len(group(fleet, name)) == len(group(fleet, name, running=True)) == 4

    try:
        with running(command, environment, output) as process:
            until(settled, 60, "four run")
            assert {one.name.partition("/domains/")[0] for one in group(fleet, name)} == {"nodes/n1", "nodes/n2"}
            victim = group(fleet, name)[0]
            stop = domain_pb2.StopDomainRequest(name=victim.name, mode=domain_pb2.STOP_MODE_FORCE)
            fleet.wait(fleet.domains.StopDomain(stop), domain_pb2.Domain)
            until(
                lambda: settled() and victim.uid not in {one.uid for one in group(fleet, name)},
                30,
                "the dead is replaced",
            )
            before = {one.uid for one in group(fleet, name)}
            kill(run_folder, "gateway")
            until(settled, 30, "four run after the gateway was killed")
            # Long enough for a controller that took the silence for a loss to have made more.
            time.sleep(3)
            assert {one.uid for one in group(fleet, name)} == before
            assert process.poll() is None, output.read_text()
        return process.wait()
    finally:
        for one in group(fleet, name):
            delete(fleet, one.name)

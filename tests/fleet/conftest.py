"""The fleet that these tests talk to, through the public API alone.

By default `make up` of two nodes, all processes real, is started for the session and ended after it. With
`VIRTFLEET_ADDRESS` (and
the files beside it, as in `fleet.env`) set, the same tests run against that fleet.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fleet.rig import Wire, domain, issue, small_spec, unique, until, whole
from tests.fleet.stand import Stand
from tools.paths import ROOT
from virtfleet_client import Credentials, Fleet, connect

START_SECONDS = 60


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Yield the variables of `fleet.env`."""
    if os.environ.get("VIRTFLEET_ADDRESS"):
        yield {key: value for key, value in os.environ.items() if key.startswith("VIRTFLEET_")}
        return
    run = tmp_path_factory.mktemp("run")
    log = run / "up.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tools.up"],
            cwd=ROOT,
            env={**os.environ, "VIRTFLEET_RUN": str(run), "NODES": "2", "DRIVER": "test,qemu", "METRICS": "1"},
            stdout=output,
            stderr=output,
        )
    try:
        ends_at = time.monotonic() + START_SECONDS
        while not (run / "fleet.env").exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < ends_at, log.read_text()
            time.sleep(0.05)
        lines = (run / "fleet.env").read_text().splitlines()
        values = dict(shlex.split(line.removeprefix("export "))[0].split("=", 1) for line in lines)
        yield {**values, "VIRTFLEET_RUN": str(run)}
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
        assert code == 0, log.read_text()
        assert "0 processes, 0 links, 0 namespaces, 0 mounts, 0 control groups and 0 files are left" in log.read_text()


@pytest.fixture(scope="session")
def fleet(environment: dict[str, str]) -> Iterator[Fleet]:
    """Yield a connection of an administrator to the gateway."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        with connect() as connection:
            yield connection
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def nodes(environment: dict[str, str]) -> list[str]:
    """Return the names of the nodes."""
    return [f"nodes/{node}" for node in environment["VIRTFLEET_NODES"].split(",")]


@pytest.fixture(scope="session")
def run_folder(environment: dict[str, str]) -> Path:
    """Return where the pid files of the fleet are."""
    return Path(environment["VIRTFLEET_RUN"])


@pytest.fixture
def made_whole(fleet: Fleet, nodes: list[str]) -> Iterator[None]:
    """Leave the fleet as it was after a test that kills: all of it ready and listed."""
    yield
    until(lambda: whole(fleet, nodes), 30, "the fleet is whole")


@pytest.fixture(scope="session")
def wire(environment: dict[str, str]) -> Iterator[Wire]:
    """Yield what calls with bytes as an administrator."""
    connection = Wire(environment)
    yield connection
    connection.close()


@pytest.fixture(scope="session")
def people(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Credentials]:
    """Return the credentials of one person a role: `viewer`, `operator` and another `admin`."""
    folder = tmp_path_factory.mktemp("people")
    return {role: issue(fleet, folder / role, unique(role), role) for role in ("viewer", "operator", "admin")}


@pytest.fixture
def stand(fleet: Fleet, wire: Wire, nodes: list[str]) -> Iterator[Stand]:
    """Yield a stopped domain on the first node."""
    with domain(fleet, nodes[0], spec=small_spec(), labels={"row": "errors"}) as made:
        yield Stand(fleet, wire, nodes[0], nodes[1], made)

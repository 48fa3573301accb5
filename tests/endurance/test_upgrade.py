"""Stores that earlier releases wrote: opened, migrated, read through the API, and the way back."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.endurance import stores
from tests.endurance.stores import EXPAND, KEPT, NEXT, PARENT, STORES, Answer
from tools import toml
from tools.paths import ROOT
from virtfleet.compute.v1 import domain_pb2, watch_pb2
from virtfleet_client import AsyncFleet, Credentials, VirtfleetError, connect_async
from virtfleet_service import backup, schema

RELEASES = sorted(path.name for path in KEPT.iterdir())
START_SECONDS = 30.0
CHANGE = schema.Migration(NEXT + 1, "much more", "99.0.0", ("CREATE TABLE extra (name TEXT)",))


class Machine:
    """Is a folder with the stores of a gateway and a node, whose services can be run on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.node = folder / "node"
        self.gateway = folder / "gateway"
        self.address = ""
        self.credentials = Credentials(*(folder / "admin" / name for name in ("ca.crt", "admin.crt", "admin.key")))

    async def prepare(self, release: str) -> None:
        """Put the stores of a release in their places; the authority is a new one."""
        for store in STORES:
            stores.unpack(KEPT / release / f"{store}.sql", self.store(store))
        authority = ["--directory", str(self.folder / "authority")]
        for arguments in (["init"], ["issue", "admin", "--role", "admin", "--output", str(self.folder / "admin")]):
            code, out = await run("virtfleet_cli", "authority", *arguments, *authority)
            assert code == 0, out
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        common: dict[str, object] = {"run_dir": str(self.folder / "run")}
        toml.write(
            self.folder / "node.toml",
            {**common, "node": "n1", "state_dir": str(self.node), "compute": {"enabled_drivers": ["test"]}},
        )
        toml.write(
            self.folder / "gateway.toml",
            {
                **common,
                "name": "g1",
                "state_dir": str(self.gateway),
                "authority_dir": str(self.folder / "authority"),
                "listen": self.address,
            },
        )

    def store(self, name: str) -> Path:
        """Return where a store is."""
        return (self.gateway if name == "gateway" else self.node) / f"{name}.db"

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[dict[str, AsyncFleet]]:
        """Run gateway and node; yields a connection to whoever serves each store."""
        # A namespace of its own: the network service looks after the links of the one that it is in.
        node = ("unshare", "--net", sys.executable, "-m", "virtfleet_node", "--config", str(self.folder / "node.toml"))
        gateway = (sys.executable, "-m", "virtfleet_gateway", "--config", str(self.folder / "gateway.toml"))
        async with AsyncExitStack() as stack:
            log = stack.enter_context((self.folder / "log").open("ab"))
            for command in (node, gateway):
                process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=log, stderr=log)
                stack.push_async_callback(_end, process)
            connections = {}
            for name in STORES:
                local = f"unix://{self.folder / 'run' / name / 'admin.sock'}"
                remote = (f"tls://{self.address}", self.credentials)
                place = connect_async(*remote) if name == "gateway" else connect_async(local)
                connections[name] = await stack.enter_async_context(place)
            yield connections

    async def answers(self, connections: dict[str, AsyncFleet]) -> dict[str, Answer]:
        """Return what the API says of all that the stores hold, as soon as they are served."""
        found = {}
        ends_at = time.monotonic() + START_SECONDS
        for name in STORES:
            while True:
                try:
                    found[name] = await stores.answers(connections[name], name)
                    break
                except VirtfleetError:
                    assert time.monotonic() < ends_at, (self.folder / "log").read_text()[-3000:]
                    await asyncio.sleep(0.1)
        return found

    def migrate(self, *migrations: schema.Migration, release: str) -> None:
        """Change all stores as a later release would at its first start."""
        for name in STORES:
            stores.migrate(self.store(name), *migrations, release=release)


async def _end(process: asyncio.subprocess.Process) -> None:
    process.terminate()
    assert await asyncio.wait_for(process.wait(), 20) == 0


async def run(module: str, *arguments: str, prefix: tuple[str, ...] = ()) -> tuple[int, str]:
    """Run a program to its end; returns its exit code and what it printed."""
    process = await asyncio.create_subprocess_exec(
        *prefix,
        sys.executable,
        "-m",
        module,
        *arguments,
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await asyncio.wait_for(process.communicate(), 30)
    return process.returncode or 0, out.decode()


def holds(found: dict[str, Answer], expected: dict[str, Answer]) -> None:
    """Check that all that is expected is there as it was; a gateway's own certificates may have come since."""
    for store in STORES:
        for name, content in expected[store].items():
            assert found[store].get(name) == content, (store, name)
        assert store == "gateway" or found[store].keys() == expected[store].keys()


async def told_since(connection: AsyncFleet, token: str) -> list[str]:
    """Return the first changes that a watch tells from a place on."""
    request = watch_pb2.WatchResourcesRequest(parent=PARENT, resume_token=token)
    async for answer in connection.watch(request):
        if answer.changes:
            return [change.WhichOneof("kind") for change in answer.changes]
    raise AssertionError("the watch has ended")


async def refuses(machine: Machine, store: str) -> None:
    """Check that a service does not start on a store that is too new, and says why."""
    settings = machine.folder / f"{store}.toml"
    if store != "gateway":
        run_dir = str(machine.folder / "run")
        toml.write(settings, {"node": "n1", "state_dir": str(machine.node), "run_dir": run_dir})
    code, out = await run(f"virtfleet_{store}", "--config", str(settings), prefix=("unshare", "--net"))
    last = out.strip().splitlines()[-1]
    assert code == 1, out
    assert f"{store}.db has schema {NEXT + 1}, which needs release 99.0.0 or newer; this is {schema.RELEASE}" in last
    assert f"put back the copy {store}.db.before-*" in last
    assert "Traceback" not in out


def test_the_present_release_keeps_its_stores() -> None:
    """The schema never changes without stores of the one before it."""
    assert schema.RELEASE in RELEASES


@pytest.mark.timeout(120)
@pytest.mark.parametrize("release", RELEASES)
async def test_stores_of_a_release_are_opened_migrated_and_given_back(release: str, tmp_path: Path) -> None:
    kept = json.loads((KEPT / release / "expected.json").read_text())
    expected: dict[str, Any] = kept["stores"]
    machine = Machine(tmp_path)
    await machine.prepare(release)

    # The present code opens them, says what was said, and goes on where watchers were.
    async with machine.serving() as connections:
        holds(await machine.answers(connections), expected)
        assert "put" in await told_since(connections["compute"], kept["token"])
        # Nothing runs any more: the guests were in the memory of a process that is gone.
        running = await connections["compute"].domains.GetDomain(
            domain_pb2.GetDomainRequest(name=f"{PARENT}/domains/running"), timeout=5
        )
        assert running.status.state == domain_pb2.DOMAIN_STATE_SHUT_OFF
        present = await machine.answers(connections)

    # A later release expands them; each is copied first; the present one works on them still.
    machine.migrate(EXPAND, release="99.0.0")
    assert all(machine.store(name).with_name(f"{name}.db.before-{NEXT}").exists() for name in STORES)
    async with machine.serving() as connections:
        holds(await machine.answers(connections), present)

    # One more changes them beyond that: all refuse in one line that says the way back, and touch nothing.
    machine.migrate(EXPAND, CHANGE, release="99.0.0")
    before = {name: machine.store(name).read_bytes() for name in STORES}
    await asyncio.gather(*(refuses(machine, name) for name in STORES))
    assert {name: machine.store(name).read_bytes() for name in STORES} == before

    # The way back.
    for name in STORES:
        backup.restore(machine.store(name).with_name(f"{name}.db.before-{NEXT + 1}"), machine.store(name))
    async with machine.serving() as connections:
        holds(await machine.answers(connections), present)

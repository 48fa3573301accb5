"""The fleet, put together: an authority, a gateway, its door, and the nodes."""

from __future__ import annotations

import asyncio
import datetime as dt
import fcntl
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from virtfleet.fake.v1 import fake_pb2
from virtfleet.fleet.v1 import node_pb2
from virtfleet_fake import nodes as nodes_module
from virtfleet_fake.door import Door
from virtfleet_fake.faults import Faults
from virtfleet_fake.nodes import FakeNode
from virtfleet_gateway import app as gateway
from virtfleet_gateway.authority import Authority, new_request, write_private
from virtfleet_gateway.settings import FleetSettings
from virtfleet_service import resources
from virtfleet_service.authorization import VIEWER
from virtfleet_service.call import Caller
from virtfleet_service.identity import encode_caller
from virtfleet_service.settings import split_address

if TYPE_CHECKING:
    import grpc.aio

    from virtfleet_service.transaction import Transaction

ROLES: Final = ("admin", "operator", "viewer")
_SERVICE: Final = "compute"
_READY_SECONDS: Final = 30.0
_DRAIN_SECONDS: Final = 2.0
_USER_LIFETIME: Final = dt.timedelta(days=30)
_PREFIX: Final = "virtfleet-fake-"
_ORPHAN_SECONDS: Final = 10.0
_AT_ONCE: Final = 8
"""So many nodes begin at a time: a node that begins holds its domains in memory once more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Is what is asked of a fleet.

    Attributes:
        nodes: How many; they are called n1, n2, …
        domains: How many running domains each has: d-00000, d-00001, … Left out where a seed file says it.
        seed_file: The domains that each node begins with (see the `test` driver's seeds).
        listen: Where clients connect, `host:port`.
    """

    nodes: int = 1
    domains: int = 0
    seed_file: Path | None = None
    listen: str = "127.0.0.1:0"


class Fleet:
    """Is a fleet that runs. Made by `running`.

    Attributes:
        folder: Where it keeps everything, the certificates of clients too.
        nodes: The nodes by their ids.
        door: Where clients come in.
        faults: What goes wrong.
    """

    def __init__(self, folder: Path, settings: FleetSettings, nodes: dict[str, FakeNode], door: Door) -> None:
        self.folder = folder
        self.nodes = nodes
        self.door = door
        self.faults = Faults(door, {node.node: node.link for node in nodes.values()})
        self._settings = settings
        self._stack = AsyncExitStack()
        self._app: gateway.App | None = None
        self._counts = (0, 0)
        self._calls: Counter[str] = Counter()
        self._restarting = asyncio.Lock()

    @property
    def app(self) -> gateway.App:
        """The gateway.

        Raises:
            RuntimeError: None runs now.
        """
        if self._app is None:
            raise RuntimeError("the gateway does not run")
        return self._app

    @property
    def watch_counts(self) -> tuple[int, int]:
        """How many watches of all nodes have begun afresh, and how many from a token, at all gateways so far."""
        fresh, resumed = self._app.fleet.watch_counts if self._app is not None else (0, 0)
        return self._counts[0] + fresh, self._counts[1] + resumed

    @property
    def call_counts(self) -> Counter[str]:
        """How many calls of each method have ended, at all gateways so far."""
        counts = Counter(self._calls)
        if self._app is not None:
            for method, _, count in self._app.server.telemetry.meters.calls():
                counts[method] += count
        return counts

    @property
    def address(self) -> str:
        """Where clients connect."""
        return f"127.0.0.1:{self.door.port}"

    def files(self, role: str = "admin") -> dict[str, str]:
        """Return the certificate files of a client with a role, by their use."""
        folder = self.folder / "clients"
        return {
            "ca_file": str(folder / "ca.crt"),
            "cert_file": str(folder / f"{role}.crt"),
            "key_file": str(folder / f"{role}.key"),
        }

    async def start_gateway(self) -> None:
        """Start the gateway and open the door."""
        self._app = await self._stack.enter_async_context(gateway.running(self._settings, connect=self._connect))
        self.door.gateway_port = self._app.server.port

    async def stop_gateway(self) -> None:
        """Stop the gateway; who is still connected is drained."""
        app, self._counts, self._app = self._app, self.watch_counts, None
        await self._stack.aclose()
        # Not before: the last calls end with it.
        if app is not None:
            for method, _, count in app.server.telemetry.meters.calls():
                self._calls[method] += count

    async def restart_gateway(self, pause_seconds: float, *, drain: bool) -> None:
        """Put another gateway in the place of this one, on the same store and at the same address."""
        async with self._restarting:
            if not drain:
                await self.door.shut()
            await self.stop_gateway()
            await self.door.shut()
            await asyncio.sleep(pause_seconds)
            await self.start_gateway()
            await self.door.reopen()
            await self.ready()

    async def ready(self) -> None:
        """Wait until the gateway has read every node that it can reach, and tells that it is ready."""
        async with asyncio.timeout(_READY_SECONDS):
            # One after the other: to look at all of them again and again is what would keep them from getting ready.
            for node in list(self.nodes):
                while True:
                    if self._is_ready(node) or self._struck(node):
                        break
                    await asyncio.sleep(0.01)

    def _is_ready(self, node: str) -> bool:
        # What is told of a node is recorded a moment after it is so: whoever asks must not find one that joins.
        row = self.app.store.get(f"nodes/{node}")
        if row is None:
            return True
        told = node_pb2.Node.FromString(row.body).status
        return told.state == self.app.registry.judge(node, told).state == node_pb2.NODE_STATE_READY

    async def close(self) -> None:
        """End everything but the nodes."""
        await self.faults.close()
        await self.door.shut()
        await self.stop_gateway()

    def _struck(self, node: str) -> bool:
        return any(fault.node == node for fault in self.faults.present)

    def _connect(self, node: str, service: str, endpoint: str, bulk: bool) -> grpc.aio.Channel:  # noqa: FBT001 - a callback
        del service, endpoint, bulk
        # It has what a lane uses of a channel.
        return cast("grpc.aio.Channel", self.nodes[node].channel())


@contextmanager
def _own_folder() -> Iterator[Path]:
    """Be the fleet's folder while entered, in memory where the system has a place for that.

    The folders of fleets that were killed are taken away first: nobody else would, and they are memory.
    """
    memory = Path("/dev/shm")  # noqa: S108 - a folder of its own is made below it
    place = memory if memory.is_dir() else Path(tempfile.gettempdir())
    _remove_orphans(place)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
    # The lock goes with the process, however it ends.
    lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_orphans(place: Path) -> None:
    for folder in place.glob(f"{_PREFIX}*"):
        try:
            status = folder.lstat()
            # One that is so young may not have got to its lock.
            if status.st_uid != os.geteuid() or time.time() - status.st_mtime < _ORPHAN_SECONDS:
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECTORY)
        except OSError:
            continue  # gone meanwhile, or nothing of ours
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            continue  # it lives
        finally:
            os.close(lock)


def _seed_file(plan: Plan, folder: Path) -> Path | None:
    if plan.seed_file is not None or not plan.domains:
        return plan.seed_file
    path = folder / "seed.toml"
    path.write_text(
        f'[[domains]]\nid = "d-{{number:05d}}"\ncount = {plan.domains}\nrunning = true\n'
        '[domains.spec]\nmemory = { maximumBytes = "1073741824" }\ncpu = { vcpuCount = 1 }\n'
    )
    return path


def _issue(authority: Authority, folder: Path) -> None:
    folder.mkdir()
    (folder / "ca.crt").write_bytes(authority.certificate_pem)
    for role in ROLES:
        key, request = new_request(role)
        write_private(folder / f"{role}.key", key)
        (folder / f"{role}.crt").write_bytes(authority.issue_user(request, role, (role,), _USER_LIFETIME).pem)


def _enrol(tx: Transaction, nodes: Sequence[str]) -> None:
    """Make the nodes members of the fleet, as enrolment does."""
    for name in nodes:
        if tx.get(f"nodes/{name}") is not None:
            continue
        node = node_pb2.Node()
        resources.create_head(node, f"nodes/{name}")
        node.display_name = name
        node.spec.schedulable = True
        node.status.state = node_pb2.NODE_STATE_JOINING
        node.status.reason = "ENROLLED"
        node.status.state_change_time.GetCurrentTime()
        node.status.observed_generation = node.generation
        node.status.services.add(service=_SERVICE, endpoint=f"in-process:{name}", version="")
        tx.put("node", node, cause="fakes.Start")


@asynccontextmanager
async def _all_nodes(
    names: Sequence[str], start: Callable[[str], AbstractAsyncContextManager[FakeNode]]
) -> AsyncIterator[dict[str, FakeNode]]:
    """Be all nodes while entered. Each has a task of its own, as what it holds ends where it began."""
    turn = asyncio.Semaphore(_AT_ONCE)
    end = asyncio.Event()
    begun = {name: asyncio.get_running_loop().create_future() for name in names}

    async def hold(name: str) -> None:
        async with AsyncExitStack() as stack:
            async with turn:
                if end.is_set():
                    return
                try:
                    node = await stack.enter_async_context(start(name))
                    node.app.context.hypervisors.get("test")
                except Exception as error:  # noqa: BLE001 - it is raised to who asked for the nodes
                    if not begun[name].done():
                        begun[name].set_exception(error)
                    return
            if not begun[name].done():
                begun[name].set_result(node)
            await end.wait()

    tasks = [asyncio.create_task(hold(name), name=f"node {name}") for name in names]
    try:
        yield dict(zip(names, await asyncio.gather(*begun.values()), strict=True))
    finally:
        end.set()
        await asyncio.gather(*tasks)


@asynccontextmanager
async def running(plan: Plan, faults: Sequence[fake_pb2.Fault] = ()) -> AsyncIterator[Fleet]:
    """Be a fleet while entered: every node ready, then the faults in force.

    Raises:
        OSError: The address cannot be listened on.
        VirtfleetError: The seed file or a fault cannot be used.
    """
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(_own_folder())
        authority = Authority.create(folder / "authority")
        _issue(authority, folder / "clients")
        host, port = split_address(plan.listen, "listen")
        settings = FleetSettings(
            state_dir=folder / "gateway",
            run_dir=folder,
            authority_dir=folder / "authority",
            listen="127.0.0.1:0",
            hosts=tuple(dict.fromkeys(("localhost", "127.0.0.1", host))),
            drain_seconds=_DRAIN_SECONDS,
            log_level="warning",
        )
        own = Caller(f"spiffe://{authority.trust_domain}/gateway/{settings.name}", (VIEWER,), "tls")
        own_caller = encode_caller(own)
        seed = _seed_file(plan, folder)
        nodes = await stack.enter_async_context(
            _all_nodes(
                [f"n{number}" for number in range(1, plan.nodes + 1)],
                lambda name: nodes_module.running(name, folder / "nodes" / name, seed, own_caller),
            )
        )
        fleet = Fleet(folder, settings, nodes, Door())
        stack.push_async_callback(fleet.close)
        await fleet.start_gateway()
        await fleet.app.store.write(lambda tx: _enrol(tx, list(nodes)))
        await fleet.ready()
        for fault in faults:
            await fleet.faults.inject(fault)
        await fleet.door.open(host, port)
        yield fleet

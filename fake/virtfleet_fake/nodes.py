"""One node of the fleet: the real compute service over the `test` driver, reached over a link instead of sockets."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from virtfleet.compute.v1 import domain_pb2
from virtfleet_compute import app as compute
from virtfleet_compute import records
from virtfleet_compute.context import KIND
from virtfleet_compute.drivers.test.driver import TestDriver
from virtfleet_compute.settings import ComputeSettings
from virtfleet_fake.transport import InProcessChannel, Link
from virtfleet_service.errors import ResourceExists, ResourceNotFound
from virtfleet_service.pipeline import PEER, Listener
from virtfleet_service.server import Server
from virtfleet_service.transaction import Transaction

_CAUSE = "virtfleet.fake.v1.FakeService.MoveDomain"


class _Handlers:
    """Makes the handler of a method when it is first called: most methods of most nodes never are."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._listener = Listener(PEER)
        self._made: dict[str, grpc.RpcMethodHandler[Any, Any] | None] = {}

    def __call__(self, path: str) -> grpc.RpcMethodHandler[Any, Any] | None:
        if path not in self._made:
            self._made[path] = self._server.handler(path, self._listener)
        return self._made[path]


class LinkedServer(Server):
    """Serves whoever holds its handlers; opens no socket."""

    async def listen(self) -> None:
        """Open nothing."""


@dataclass(frozen=True, slots=True)
class FakeNode:
    """Is a node that runs.

    Attributes:
        node: Its id.
        link: The way to it.
        app: Its compute service.
    """

    node: str
    link: Link
    app: compute.App

    def channel(self) -> InProcessChannel:
        """Return a new connection to it."""
        return InProcessChannel(self.link)

    @property
    def _driver(self) -> TestDriver:
        driver = self.app.context.hypervisors.get("test")
        if not isinstance(driver, TestDriver):
            raise TypeError("a fake node has the test driver")
        return driver

    async def compact(self) -> None:
        """Drop what the log holds, but for its newest entry."""
        store = self.app.store
        limits = store.limits
        store.limits = dataclasses.replace(limits, log_entries=0)
        try:
            await store.compact()
        finally:
            store.limits = limits

    async def move(self, name: str, target: FakeNode, *, dry: bool) -> str:
        """Move a domain to another node, its guest with it; returns its new name.

        Raises:
            ResourceNotFound: There is no such domain.
            ResourceExists: The other node has one of that name.
        """
        row = self.app.store.get(name)
        if row is None:
            raise ResourceNotFound(f"there is no domain `{name}`", resource=name)
        new_name = f"nodes/{target.node}/{name.split('/', 2)[2]}"
        if target.app.store.get(new_name) is not None:
            raise ResourceExists(f"`{new_name}` exists", resource=new_name)
        if dry:
            return new_name
        domain = domain_pb2.Domain.FromString(row.body)
        domain.name = new_name

        def arrive(tx: Transaction) -> None:
            tx.move_in(KIND, domain, name, cause=_CAUSE)
            records.take_macs(tx, domain)
            records.save(tx, domain, _CAUSE)

        def leave(tx: Transaction) -> None:
            tx.move_out(name, new_name)
            records.remove(tx, domain_pb2.Domain.FromString(row.body), _CAUSE)

        await target.app.store.write(arrive)
        self._driver.hand_over(domain.uid, domain.status.active_spec, target._driver)
        await self.app.store.write(leave)
        return new_name


@asynccontextmanager
async def running(node: str, folder: Path, seed_file: Path | None, own_caller: bytes) -> AsyncIterator[FakeNode]:
    """Be a node while entered.

    Args:
        node: Its id.
        folder: Where it keeps its store.
        seed_file: The domains that it begins with.
        own_caller: Conveys the gateway itself.
    """
    driver = {"seed_file": str(seed_file)} if seed_file is not None else {}
    settings = ComputeSettings(
        node=node,
        state_dir=folder,
        run_dir=folder,
        enabled_drivers=("test",),
        drivers={"test": driver},
        drain_seconds=0.0,
        log_level="warning",
    )
    async with compute.running(settings, server_class=LinkedServer, in_memory=True) as app:
        link = Link(own_caller)
        link.find = _Handlers(app.server)
        yield FakeNode(node, link, app)

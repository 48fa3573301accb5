"""Callers that change things without pause, and watchers that follow: what they were told is what must hold.

A call that fails in a way that the API calls retryable is made again with the same request_id; any other failure is a
fault. What has been acknowledged is held against what is, and against what watchers were told.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import empty_pb2

from bench.stage import NODE
from tests.fleet.rig import small_spec
from virtfleet.compute.v1 import domain_pb2, watch_pb2
from virtfleet.type.v1 import watch_pb2 as type_watch_pb2
from virtfleet_client import AsyncFleet, VirtfleetError

PARENT = f"nodes/{NODE}"
RETRYABLE = {grpc.StatusCode.UNAVAILABLE}
PATIENCE_SECONDS = 30.0
PAUSE_SECONDS = 0.02
KEPT_EVERY = 4
"""Of so many domains that a writer makes, one stays."""


@dataclass(slots=True)
class Truth:
    """Is what was acknowledged.

    Attributes:
        generations: Of each domain that exists.
        deleted: The domains that are gone.
        retried: How often a call was made again, by the reason.
        calls: How many calls were answered.
        faults: Failures that the API does not call retryable.
    """

    generations: dict[str, int] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)
    retried: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    faults: list[str] = field(default_factory=list)


class Writer:
    """Makes, starts, changes, stops and deletes domains until told to stop.

    Args:
        fleet: A connection to the gateway.
        name: Stands in the ids of its domains.
        truth: Gets what was acknowledged.
    """

    def __init__(self, fleet: AsyncFleet, name: str, truth: Truth) -> None:
        self._fleet = fleet
        self._name = name
        self._truth = truth
        self.stopping = False

    async def run(self) -> None:
        """Go on until `stopping`, and finish what was begun; after a fault nothing more is done."""
        number = 0
        while not self.stopping:
            number += 1
            with contextlib.suppress(VirtfleetError):  # it stands among the faults
                await self._life(f"{self._name}-{number}", keep=number % KEPT_EVERY == 0)

    async def _life(self, domain_id: str, *, keep: bool) -> None:
        name = f"{PARENT}/domains/{domain_id}"
        domains = self._fleet.domains
        made = domain_pb2.CreateDomainRequest(parent=PARENT, domain_id=domain_id)
        made.domain.spec.CopyFrom(small_spec())
        await self._change(name, domains.CreateDomain, made)
        await self._change(name, domains.StartDomain, domain_pb2.StartDomainRequest(name=name))
        for number in range(3):
            changed = domain_pb2.UpdateDomainRequest(domain=domain_pb2.Domain(name=name, labels={"n": str(number)}))
            changed.update_mask.paths.append("labels")
            await self._change(name, domains.UpdateDomain, changed)
        stop = domain_pb2.StopDomainRequest(name=name, mode=domain_pb2.STOP_MODE_FORCE)
        await self._change(name, domains.StopDomain, stop)
        if not keep:
            await self._change(name, domains.DeleteDomain, domain_pb2.DeleteDomainRequest(name=name))

    async def _change(self, name: str, method: Callable[..., Any], request: Any) -> None:
        request.request_id = str(uuid.uuid4())
        kind: Any = empty_pb2.Empty if isinstance(request, domain_pb2.DeleteDomainRequest) else domain_pb2.Domain
        try:
            answer = await self._until_answered(method, request, kind)
        except VirtfleetError as error:
            self._truth.faults.append(f"{type(request).__name__} {name}: {error!r}")
            self.stopping = True
            raise
        self._truth.calls += 1
        if kind is empty_pb2.Empty:
            del self._truth.generations[name]
            self._truth.deleted.add(name)
        else:
            self._check(name, request, answer.generation)
            self._truth.generations[name] = answer.generation
        await asyncio.sleep(PAUSE_SECONDS)

    def _check(self, name: str, request: Any, generation: int) -> None:
        """See that a change was made once: only a change of what was asked for raises the generation, by one."""
        expected = self._truth.generations.get(name, 0)
        expected += not isinstance(request, domain_pb2.StartDomainRequest | domain_pb2.StopDomainRequest)
        if generation != expected:
            self._truth.faults.append(f"{type(request).__name__} {name}: generation {generation}, not {expected}")
            self.stopping = True

    async def _until_answered(self, method: Callable[..., Any], request: Any, kind: Any) -> Any:
        ends_at = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                operation = await method(request, timeout=10)
                return await self._fleet.wait(operation, kind, timeout_seconds=PATIENCE_SECONDS)
            except VirtfleetError as error:
                if error.code() not in RETRYABLE or time.monotonic() > ends_at:
                    raise
                self._truth.retried[error.reason or error.code().name] += 1
                await asyncio.sleep(0.1)


class Watcher:
    """Follows the domains of the fleet, and remembers what it was told of those of one load.

    Attributes:
        known: The generation of each domain that exists, as told.
        deleted: The domains that were told to be gone.
        snapshots: How often all was told anew.
        states: The states of the node that were told.
        turned: Where a generation went back.
    """

    def __init__(self, fleet: AsyncFleet, tag: str) -> None:
        self.known: dict[str, int] = {}
        self.deleted: set[str] = set()
        self.snapshots = 0
        self.states: list[int] = []
        self.turned: list[str] = []
        self._newest: dict[str, int] = defaultdict(int)
        self._fleet = fleet
        self._prefix = f"{PARENT}/domains/{tag}-"
        self._task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        request = watch_pb2.WatchResourcesRequest(parent="nodes/-")
        request.resource_types.append(watch_pb2.RESOURCE_TYPE_DOMAIN)
        async for answer in self._fleet.watch(request):
            marker = answer.WhichOneof("marker")
            self.snapshots += marker == "snapshot_end"
            if marker == "source_status":
                self.states.append(answer.source_status.state)
            for change in answer.changes:
                self._take(change)

    def _take(self, change: watch_pb2.Change) -> None:
        kind = change.WhichOneof("kind")
        if kind == "put":
            told = change.put.domain
            if not told.name.startswith(self._prefix):
                return
            if told.generation < self._newest[told.name]:
                self.turned.append(f"{told.name}: {told.generation} after {self._newest[told.name]}")
            self._newest[told.name] = told.generation
            self.known[told.name] = told.generation
        elif kind == "delete":
            self.known.pop(change.delete.name, None)
            self.deleted.add(change.delete.name)

    def differences(self, truth: Truth) -> list[str]:
        """Return what this watcher was told otherwise than it is; empty: nothing."""
        found = [f"turned: {line}" for line in self.turned]
        found += [f"{name}: told {self.known.get(name)}, is {was}" for name, was in truth.generations.items()
                  if self.known.get(name) != was]  # fmt: skip
        found += [f"{name} is gone and was not told" for name in sorted(truth.deleted - self.deleted)]
        found += [f"{name} was told and is not" for name in sorted(self.known.keys() - truth.generations.keys())]
        if self.snapshots != 1 or type_watch_pb2.SOURCE_STATE_RESYNCING in self.states:
            found.append(f"a gap: {self.snapshots} snapshots, states {self.states}")
        return found

    async def close(self) -> None:
        """End the watch."""
        self._task.cancel()
        (ended,) = await asyncio.gather(self._task, return_exceptions=True)
        assert isinstance(ended, asyncio.CancelledError), ended


@dataclass(slots=True)
class Load:
    """Is what runs: see `running`."""

    truth: Truth
    watchers: list[Watcher]

    async def more(self, calls: int = 20) -> None:
        """Wait until so many more calls have been answered.

        Raises:
            AssertionError: A call has failed, or none is answered.
        """
        wanted = self.truth.calls + calls
        ends_at = time.monotonic() + 2 * PATIENCE_SECONDS
        while self.truth.calls < wanted:
            assert not self.truth.faults, self.truth.faults
            assert time.monotonic() < ends_at, f"{wanted - self.truth.calls} of {calls} calls are not answered"
            await asyncio.sleep(0.05)


@asynccontextmanager
async def running(fleet: AsyncFleet, *, writers: int = 3, watchers: int = 2) -> AsyncIterator[Load]:
    """Run writers and watchers for the length of a block, then hold all that was said against each other.

    Raises:
        AssertionError: A call failed, an acknowledged change is lost or done twice, or a watch had a gap.
    """
    tag = f"w{uuid.uuid4().hex[:6]}"
    load = Load(Truth(), [Watcher(fleet, tag) for _ in range(watchers)])
    all_writers = [Writer(fleet, f"{tag}-{number}", load.truth) for number in range(writers)]
    tasks = [asyncio.create_task(writer.run()) for writer in all_writers]
    try:
        yield load
    finally:
        for writer in all_writers:
            writer.stopping = True
        await asyncio.gather(*tasks)
    assert not load.truth.faults, load.truth.faults
    request = domain_pb2.ListDomainsRequest(parent=PARENT)
    there = {
        one.name: one.generation
        async for one in fleet.pages(fleet.domains.ListDomains, request)
        if one.name.startswith(f"{PARENT}/domains/{tag}-")
    }
    assert there == load.truth.generations
    ends_at = time.monotonic() + 20
    while any(watcher.differences(load.truth) for watcher in load.watchers) and time.monotonic() < ends_at:
        await asyncio.sleep(0.1)
    for watcher in load.watchers:
        assert not watcher.differences(load.truth)
        await watcher.close()
